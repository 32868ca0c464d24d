"""Peak RSS of `convert` against the size of the file: it should not depend on it.

    python benchmarks/memory.py --workdir /scratch --gib 0.25,1,4 --json memory.json

Sources are made one after the other and removed again: plain ones, and ones whose matrices are
transposed views, which cannot be copied as they lie. The number is `ru_maxrss` of the whole
process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from measure import describe_machine, machine_line, timed, tool

HERE = os.path.dirname(os.path.abspath(__file__))
#: title -> (whether the source is transposed, DST, options)
CASES: dict[str, tuple[bool, str, tuple[str, ...]]] = {
    "`convert --no-verify`": (False, "out.safetensors", ("--no-verify",)),
    "`convert`": (False, "out.safetensors", ()),
    "`convert`, 64 MB shards": (False, "out", ("--max-shard-size", "64MB")),
    "`convert` to `.pt`": (False, "out.pt", ()),
    "`convert --dtype bfloat16`": (False, "out.safetensors", ("--dtype", "bfloat16")),
    "`convert`, transposed matrices": (True, "out.safetensors", ()),
    "`convert --dtype bfloat16`, transposed": (True, "out.safetensors", ("--dtype", "bfloat16")),
}


def measure(folder: str, gib: float) -> list[dict[str, Any]]:
    """One row per case at one size."""
    rows = []
    for transposed in (False, True):
        source = os.path.join(folder, "source.pt")
        extra = ["--transposed"] if transposed else []
        script = os.path.join(HERE, "make_checkpoint.py")
        subprocess.run(
            [sys.executable, script, source, "--gib", str(gib), *extra],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        size = os.path.getsize(source) / 2**30
        for title, (wants_transposed, name, options) in CASES.items():
            if wants_transposed is not transposed:
                continue
            dst = os.path.join(folder, name)
            run = timed([*tool(), "convert", source, dst, *options])
            _remove(dst)
            print(f"{size:6.2f} GiB  {title:<40} {run.rss_mib:6.1f} MiB", flush=True)
            row = {"gib": round(size, 3), "case": title, "rss_mib": round(run.rss_mib, 1)}
            rows.append(row | {"wall": round(run.wall, 2), "cpu": round(run.cpu, 2)})
        _remove(source)
    return rows


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def table(rows: list[dict[str, Any]], sizes: list[float]) -> str:
    heads = [f"{gib:g} GiB" for gib in sizes]
    lines = [
        f"| peak RSS, MiB | {' | '.join(heads)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for title in CASES:
        values = [f"{row['rss_mib']:.0f}" for row in rows if row["case"] == title]
        lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", default="0.25,1,4", help="sizes, separated by commas")
    parser.add_argument("--workdir", default="benchmark-scratch")
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    sizes = [float(word) for word in args.gib.split(",")]
    os.makedirs(args.workdir, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="memory-", dir=args.workdir)
    try:
        machine = describe_machine(folder)
        rows = [row for gib in sizes for row in measure(folder, gib)]
    finally:
        shutil.rmtree(folder)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "runs": rows}, file, indent=1)
            file.write("\n")
    print(f"\n{machine_line(machine)}\n\n{table(rows, sizes)}")


if __name__ == "__main__":
    main()
