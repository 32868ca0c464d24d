"""Compare the loaders with torch's, safetensors' and transformers': interleaved, one process each.

    python benchmarks/loading.py --workdir /scratch --json loading.json

Sources are made first: a training checkpoint, the same weights as safetensors, and a folder with a
PaliGemma. Every round runs every way to load once, in a process of its own; a ratio is taken
within a round, to the baseline of its group. README.md beside this file says what is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from ballast import Ballast
from measure import describe_machine, machine_line, settle, timed, tool, warm

HERE = os.path.dirname(os.path.abspath(__file__))
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Way:
    """One way to load.

    Attributes:
        name: the case of load_one.py.
        title: for the table.
        source: `pt`, `st` or `hf`.
        group: ways that end in the same state; the first of a group is its baseline.
        copies: how often the source's size it has in memory at most.
    """

    name: str
    title: str
    source: str
    group: str
    copies: float


_PT_THERE = "`.pt` into a model that is there"
_PT_META = "`.pt` into a model on meta"
_ST_THERE = "`.safetensors` into a model that is there"
_ST_META = "`.safetensors` into a model on meta"
_HF = "PaliGemma folder: model and tokenizer"
_HF_BF16 = "The same, cast to bfloat16"

WAYS = (
    Way("pt-torch", "`torch.load`, `load_state_dict`", "pt", _PT_THERE, 2.1),
    Way("pt-torch-mmap", "`torch.load(mmap=True)`, `load_state_dict`", "pt", _PT_THERE, 1.1),
    Way("pt-ours", "`load_checkpoint`", "pt", _PT_THERE, 1.1),
    Way("pt-meta-torch", "`torch.load`, `load_state_dict(assign=True)`", "pt", _PT_META, 1.1),
    Way(
        "pt-meta-torch-mmap",
        "`torch.load(mmap=True)`, `load_state_dict(assign=True)`",
        "pt",
        _PT_META,
        0.1,
    ),
    Way("pt-meta-ours", "`load_checkpoint`", "pt", _PT_META, 0.1),
    Way("st-file", "`load_file`, `load_state_dict`", "st", _ST_THERE, 1.1),
    Way("st-ours", "`load_checkpoint`", "st", _ST_THERE, 1.1),
    Way("st-meta-file", "`load_file`, `load_state_dict(assign=True)`", "st", _ST_META, 0.1),
    Way("st-meta-ours", "`load_checkpoint`", "st", _ST_META, 0.1),
    Way("hf-from-pretrained", "`from_pretrained`", "hf", _HF, 1.1),
    Way("hf-ours", "`load_hf_model`", "hf", _HF, 0.1),
    Way("hf-bf16-from-pretrained", '`from_pretrained(dtype="bfloat16")`', "hf", _HF_BF16, 0.6),
    Way("hf-bf16-ours", '`load_hf_model(dtype="bfloat16")`', "hf", _HF_BF16, 0.6),
)
BASELINES = {way.group: way for way in reversed(WAYS)}
#: What everything is also compared with.
SLOW = "pt-torch"


class Bench:
    """The sources, and one run."""

    def __init__(self, folder: str, scratch: str, *, ballast: bool) -> None:
        self.sources = {
            "pt": os.path.join(folder, "loading.pt"),
            "st": os.path.join(folder, "loading.safetensors"),
            "hf": os.path.join(folder, "paligemma"),
        }
        self.result = os.path.join(scratch, "result.json")
        self.ballast = Ballast() if ballast else None
        self.checksums: dict[str, float] = {}

    def make(self, gib: float) -> None:
        """What is not there yet."""
        scripts = {"pt": ["make_checkpoint.py", "--gib", str(gib)], "hf": ["make_paligemma.py"]}
        for name, (script, *options) in scripts.items():
            if not os.path.exists(self.sources[name]):
                argv = [sys.executable, os.path.join(HERE, script), self.sources[name], *options]
                subprocess.run(argv, check=True)
        if not os.path.exists(self.sources["st"]):
            argv = [*tool(), "convert", self.sources["pt"], self.sources["st"], "--no-verify"]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def files(self, source: str) -> list[str]:
        path = self.sources[source]
        if os.path.isfile(path):
            return [path]
        return [os.path.join(path, name) for name in sorted(os.listdir(path))]

    def size(self, source: str) -> int:
        return sum(os.path.getsize(path) for path in self.files(source))

    def run(self, way: Way, *, memory: bool = False) -> dict[str, Any]:
        """One process from a calm start; checks that ways with one source load the same."""
        if self.ballast is not None:
            self.ballast.hold(int(self.size(way.source) * way.copies) + 512 * _MIB)
        for path in self.files(way.source):
            warm(path)
        settle()
        if self.ballast is not None:
            self.ballast.release()
        script = os.path.join(HERE, "load_one.py")
        argv = [sys.executable, script, way.name, self.sources[way.source], self.result]
        run = timed([*argv, "--memory"] if memory else argv)
        with open(self.result) as file:
            result: dict[str, Any] = json.load(file)
        kind = way.group if way.source == "hf" else "weights"
        if self.checksums.setdefault(kind, result["checksum"]) != result.pop("checksum"):
            raise SystemExit(f"{way.name} loaded other weights than the ways before it")
        return {**result, "other_cores": round(run.other_cpu / run.wall, 3)}


def run_rounds(
    bench: Bench, ways: list[Way], args: argparse.Namespace, rows: list[dict[str, Any]]
) -> None:
    """Add all runs to `rows`; round 0 warms up, and is not counted."""
    for number in range(args.rounds + 1):
        for way in ways:
            for tries_left in reversed(range(args.repeats + 1 if number else 1)):
                found = bench.run(way)
                disturbed = found["other_cores"] > args.max_other
                print(
                    f"round {number}  {way.name:<20} loaded {found['loaded']:7.3f} s  touched "
                    f"{found['touched']:7.3f} s  others {found['other_cores']:.2f} cores",
                    "(disturbed)" if disturbed else "",
                    flush=True,
                )
                again = disturbed and tries_left > 0
                row = {"round": number, "name": way.name, **found, "disturbed": disturbed}
                rows.append({**row, "counted": number > 0 and not again})
                if not again:
                    break


def summarise(rows: list[dict[str, Any]], ways: list[Way]) -> list[dict[str, Any]]:
    """Per way: the spread of its times, and of its ratios to two baselines of the same round."""
    counted = [row for row in rows if row["counted"]]
    summary = []
    for way in ways:
        mine = [row for row in counted if row["name"] == way.name]
        if not mine:
            continue  # stopped before it ran
        entry: dict[str, Any] = {"name": way.name, "title": way.title, "group": way.group}
        entry |= {"rounds": len(mine), "disturbed": sum(row["disturbed"] for row in mine)}
        for key in ("loaded", "touched"):
            entry[key] = _spread([row[key] for row in mine])
        for title, base in (("group", BASELINES[way.group].name), ("slow", SLOW)):
            for key in ("loaded", "touched"):
                entry[f"{key}_ratio_{title}"] = _ratios(mine, counted, base, key)
        summary.append(entry)
    return summary


def _ratios(
    mine: list[dict[str, Any]], counted: list[dict[str, Any]], base: str, key: str
) -> dict[str, float] | None:
    """Of rounds in which neither run was disturbed, where there are any."""
    bases = {row["round"]: row for row in counted if row["name"] == base}
    pairs = [(row, bases[row["round"]]) for row in mine if row["round"] in bases]
    calm = [(a, b) for a, b in pairs if not a["disturbed"] and not b["disturbed"]]
    found = [a[key] / b[key] for a, b in calm or pairs]
    return {**_spread(found), "calm": len(calm)} if found else None


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "max": round(max(values), 4),
    }


def times_table(summary: list[dict[str, Any]]) -> str:
    lines = [
        "| | loaded, s | every page touched, s | ratio, loaded | ratio, touched "
        "| `torch.load` takes, times | runs (disturbed) |",
        "|---|---|---|---|---|---|---|",
    ]
    group = ""
    for row in summary:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** | | | | | | |")
        slow = row["loaded_ratio_slow"]
        is_ours = row["name"].endswith("ours") and group not in (_HF, _HF_BF16)
        times = f"{1 / slow['median']:.1f}" if is_ours and slow is not None else ""
        lines.append(
            f"| {row['title']} | {_show(row['loaded'])} | {_show(row['touched'])} "
            f"| {_show(row['loaded_ratio_group'])} | {_show(row['touched_ratio_group'])} "
            f"| {times} | {row['rounds']} ({row['disturbed']}) |"
        )
    return "\n".join(lines)


def _show(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})"


def memory_table(rows: list[dict[str, Any]], sizes: dict[str, int]) -> str:
    lines = [
        "| | size of the weights | largest tensor | own memory, peak | own memory, after "
        "| mapped pages, after | mapped pages, all touched |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        way = next(one for one in WAYS if one.name == row["name"])
        seen, before = row["memory"], row["memory"]["before"]
        own = [seen["peak"]["own"] - before["own"], seen["after"]["own"] - before["own"]]
        mapped = [seen[key]["file"] - before["file"] for key in ("after", "touched")]
        cells = [sizes[way.source], seen["largest_tensor"], *own, *mapped]
        shown = " | ".join(f"{max(cell, 0) / _MIB:,.0f}" for cell in cells)
        lines.append(f"| {way.group}: {way.title} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", default="benchmark-scratch", help="on the disk to be measured")
    parser.add_argument("--gib", type=float, default=2.0, help="of the training checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-other", type=float, default=0.4, metavar="CORES")
    parser.add_argument("--repeats", type=int, default=2, help="of a disturbed run")
    parser.add_argument("--no-ballast", action="store_true", help="see ballast.py")
    parser.add_argument("--only", help="names, separated by commas; baselines always run")
    parser.add_argument("--json", help="write all runs and the summary to this file")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [way.name for way in WAYS]
    unknown = set(wanted) - {way.name for way in WAYS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    needed = {BASELINES[way.group].name for way in WAYS if way.name in wanted}
    ways = [way for way in WAYS if way.name in {*wanted, *needed}]
    os.makedirs(args.workdir, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="loading-", dir=args.workdir)
    machine = describe_machine(scratch)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bench = Bench(args.workdir, scratch, ballast=not args.no_ballast)
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    try:
        bench.make(args.gib)
        sizes = {name: bench.size(name) for name in bench.sources}
        memory += [{"name": way.name, **bench.run(way, memory=True)} for way in ways]
        run_rounds(bench, ways, args, rows)
    except KeyboardInterrupt:
        print("stopped; what follows is of the runs so far")
    finally:
        if bench.ballast is not None:
            bench.ballast.close()
        shutil.rmtree(scratch)
    summary = summarise(rows, ways)
    if args.json:
        result = {
            "machine": machine,
            "source_bytes": sizes,
            "ballast": not args.no_ballast,
            "summary": summary,
            "memory": memory,
            "runs": rows,
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    shown = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items())
    print(f"\nSources: {shown}; warm in the page cache.\n{machine_line(machine)}.\n")
    print(times_table(summary), memory_table(memory, sizes), sep="\n\n")


if __name__ == "__main__":
    main()
