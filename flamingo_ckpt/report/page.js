// A box that filters the table of tensors. Without scripts the table is there, whole.
(() => {
  const table = document.getElementById("tensors");
  if (!table) return;
  const rows = Array.from(table.tBodies[0].rows);
  if (rows.length < 2) return;
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "perceiver bf16 64x1024";
  const count = document.createElement("output");
  const label = document.createElement("label");
  label.className = "filter";
  label.append("Filter ", box, " ", count);
  table.parentElement.before(label);
  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, at) => {
      row.hidden = !words.every((word) => texts[at].includes(word));
      shown += row.hidden ? 0 : 1;
    });
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };
  box.addEventListener("input", filter);
})();
