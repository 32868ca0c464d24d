"""Compare `flamingo-ckpt` with `cp` and with other converters: whole processes, interleaved.

    python benchmarks/run.py --source ck.pt --workdir /scratch --json results.json

Every round runs every contender once, so that what else the machine does hits all of them, and a
ratio is taken within a round before the median is taken over rounds. README.md beside this file
says what happens around each run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ballast import Ballast
from measure import Run, describe_machine, machine_line, settle, timed, tool, warm

BASELINE = "cp"
# Held for a run, in sizes of the source: the new file's pages; and twice the tensors in memory.
_BALLAST, _SLOW_BALLAST = 1.1, 3.2
HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True, slots=True)
class Contender:
    """A command to be timed.

    Attributes:
        name: for `--only` and the JSON.
        title: for the table.
        argv: with `{tool}`, `{python}`, `{rivals}`, `{src}`, `{dst}` and `{done}`, which is SRC
            converted before the rounds began.
        dst: file name of what it writes, if it writes.
        slow: whether it runs in the fewer rounds of `--slow-rounds`.
        same_as: the group of contenders that must write the same bytes.
    """

    name: str
    title: str
    argv: tuple[str, ...]
    dst: str = ""
    slow: bool = False
    same_as: str = ""


_CONVERT = ("{tool}", "convert", "{src}", "{dst}")
_RIVAL = ("{python}", "{rivals}")
_MODEL = "model:openflamingo-3b-vitl-mpt1b"
_BF16 = ("--dtype", "bfloat16")

CONTENDERS = (
    # `sync FILE` of coreutils is an fsync of that file
    Contender(
        BASELINE,
        "`cp` and fsync",
        ("sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", "{src}", "{dst}"),
        dst="copy.pt",
    ),
    Contender(
        "convert-no-verify",
        "`convert --no-verify`",
        (*_CONVERT, "--no-verify"),
        dst="a.safetensors",
        same_as="fp32",
    ),
    Contender("convert", "`convert` (verifies)", _CONVERT, dst="b.safetensors", same_as="fp32"),
    Contender(
        "bf16-no-verify",
        "`convert --dtype bfloat16 --no-verify`",
        (*_CONVERT, *_BF16, "--no-verify"),
        dst="c.safetensors",
        same_as="bf16",
    ),
    Contender(
        "bf16",
        "`convert --dtype bfloat16` (verifies)",
        (*_CONVERT, *_BF16),
        dst="d.safetensors",
        same_as="bf16",
    ),
    Contender(
        "to-hf",
        "`convert --to hf-flamingo --no-verify`",
        (*_CONVERT, "--to", "hf-flamingo", "--no-verify"),
        dst="h.safetensors",
    ),
    Contender("verify", "`verify`", ("{tool}", "verify", "{src}", "{done}")),
    Contender("inspect", "`inspect`", ("{tool}", "inspect", "{src}")),
    # the model's keys are on disk: `prepare` builds the model once
    Contender(
        "diff",
        "`diff` with `model:openflamingo-3b-vitl-mpt1b`",
        ("{tool}", "diff", "{src}", _MODEL),
    ),
    Contender("help", "`--help`", ("{tool}", "--help")),
    Contender(
        "mmap-save",
        "`torch.load(mmap=True)`, `save_file`",
        (*_RIVAL, "mmap", "{src}", "{dst}"),
        dst="e.safetensors",
        slow=True,
        same_as="fp32",
    ),
    Contender(
        "load-save",
        "`torch.load`, `save_file`",
        (*_RIVAL, "load", "{src}", "{dst}"),
        dst="f.safetensors",
        slow=True,
        same_as="fp32",
    ),
    Contender(
        "load-save-compare",
        "`torch.load`, `save_file`, `load_file`, `torch.equal`",
        (*_RIVAL, "checked", "{src}", "{dst}"),
        dst="g.safetensors",
        slow=True,
        same_as="fp32",
    ),
)


class Bench:
    """One source, one scratch folder, and the places that commands name."""

    def __init__(self, source: str, folder: str, command: Sequence[str]) -> None:
        self.source = source
        self.folder = folder
        self.command = list(command)
        self.size = os.path.getsize(source)
        self.done = os.path.join(folder, "done.safetensors")
        self.ballast: Ballast | None = None
        self.digests: dict[str, str] = {}

    def argv(self, contender: Contender) -> list[str]:
        places = {
            "{python}": sys.executable,
            "{rivals}": os.path.join(HERE, "rivals.py"),
            "{src}": self.source,
            "{dst}": os.path.join(self.folder, contender.dst),
            "{done}": self.done,
        }
        words = [self.command if word == "{tool}" else [word] for word in contender.argv]
        return [places.get(word, word) for group in words for word in group]

    def prepare(self) -> None:
        """What `verify` compares with, and the model that `diff` compares with."""
        subprocess.run([*self.command, "inspect", _MODEL], check=True, stdout=subprocess.DEVNULL)
        argv = [*self.command, "convert", self.source, self.done, "--no-verify", "--overwrite"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def run(self, contender: Contender, *, compare: bool) -> Run:
        """One timed run from a calm start; `compare` checks that groups write the same bytes."""
        if self.ballast is not None:
            times = _SLOW_BALLAST if contender.slow else _BALLAST
            self.ballast.hold(int(self.size * times))
        warm(self.source)
        if "{done}" in contender.argv:
            warm(self.done)
        settle()
        if self.ballast is not None:
            self.ballast.release()
        run = timed(self.argv(contender))
        if contender.dst:
            path = os.path.join(self.folder, contender.dst)
            if compare and contender.same_as:
                self._compare(contender, path)
            os.unlink(path)
        return run

    def _compare(self, contender: Contender, path: str) -> None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.digests.setdefault(contender.same_as, digest) != digest:
            raise SystemExit(f"{contender.name} wrote other bytes than the contenders before it")


def run_rounds(
    bench: Bench, contenders: list[Contender], args: argparse.Namespace, rows: list[dict[str, Any]]
) -> None:
    """Add all runs to `rows`. Round 0 warms up and compares outputs, and is not counted.

    A run during which the rest of the machine was busy is marked `disturbed` and repeated.
    """
    for number in range(args.rounds + 1):
        for contender in contenders:
            if contender.slow and number > args.slow_rounds:
                continue
            for tries_left in reversed(range(args.repeats + 1 if number else 1)):
                run = bench.run(contender, compare=number == 0)
                disturbed = run.other_cpu > args.max_other * run.wall
                print(
                    f"round {number}  {contender.name:<20} {run.wall:7.2f} s  cpu {run.cpu:6.2f} s"
                    f"  {run.rss_mib:7.0f} MiB  others {run.other_cpu:5.2f} s",
                    "(disturbed)" if disturbed else "",
                    flush=True,
                )
                again = disturbed and tries_left > 0
                row = {"round": number, "name": contender.name, **run.as_dict()}
                rows.append({**row, "disturbed": disturbed, "counted": number > 0 and not again})
                if not again:
                    break


def summarise(rows: list[dict[str, Any]], contenders: list[Contender]) -> list[dict[str, Any]]:
    """Per contender: the spread of its runs, and of its ratio to the baseline of the same round.

    Where there are rounds in which neither of the two was disturbed, only those give the ratio.
    """
    counted = [row for row in rows if row["counted"]]
    base = {row["round"]: row for row in counted if row["name"] == BASELINE}
    summary = []
    for contender in contenders:
        mine = [row for row in counted if row["name"] == contender.name]
        if not mine:
            continue
        pairs = [(row, base[row["round"]]) for row in mine if row["round"] in base]
        calm = [(a, b) for a, b in pairs if not a["disturbed"] and not b["disturbed"]]
        ratios = [a["wall"] / b["wall"] for a, b in calm or pairs]
        summary.append(
            {
                "name": contender.name,
                "title": contender.title,
                "rounds": len(mine),
                "disturbed": sum(row["disturbed"] for row in mine),
                "wall": _spread([row["wall"] for row in mine]),
                "cpu": _spread([row["cpu"] for row in mine]),
                "rss_mib": _spread([row["rss_mib"] for row in mine]),
                "ratio": _spread(ratios) if ratios else None,
                "ratios_undisturbed": len(calm),
            }
        )
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


def table(summary: list[dict[str, Any]]) -> str:
    lines = [
        "| command | wall s, median (min to max) | ratio to `cp` and fsync | user+sys s "
        "| peak RSS MiB | runs (disturbed, calm pairs) |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary:
        wall, ratio = row["wall"], row["ratio"]
        shown = "" if ratio is None else f"{_show(ratio['median'])} ({_range(ratio)})"
        calm = row["ratios_undisturbed"]
        lines.append(
            f"| {row['title']} | {_show(wall['median'])} ({_range(wall)}) | {shown} "
            f"| {_show(row['cpu']['median'])} | {row['rss_mib']['max']:,.0f} "
            f"| {row['rounds']} ({row['disturbed']}, {calm}) |"
        )
    return "\n".join(lines)


def _range(spread: dict[str, float]) -> str:
    return f"{_show(spread['min'])} to {_show(spread['max'])}"


def _show(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", help="a checkpoint; without it a 3.9 GiB one is made")
    parser.add_argument("--workdir", default="benchmark-scratch", help="on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2, help="for what takes many seconds")
    parser.add_argument(
        "--max-other",
        type=float,
        default=0.4,
        metavar="CORES",
        help="repeat a run while everything else on the machine, the kernel's writing included, "
        "used more than this",
    )
    parser.add_argument("--repeats", type=int, default=3, help="so often; then it counts anyway")
    parser.add_argument("--no-ballast", action="store_true", help="see ballast.py")
    parser.add_argument("--only", help="names, separated by commas; `cp` always runs")
    parser.add_argument("--tool", help="the command under test, instead of the installed one")
    parser.add_argument("--json", help="write all runs and the summary to this file")
    args = parser.parse_args()

    wanted = args.only.split(",") if args.only else [one.name for one in CONTENDERS]
    unknown = set(wanted) - {one.name for one in CONTENDERS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    contenders = [one for one in CONTENDERS if one.name in (*wanted, BASELINE)]
    os.makedirs(args.workdir, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="run-", dir=args.workdir)
    machine = describe_machine(folder)
    rows: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    source = args.source or make_source(args.workdir)
    bench = Bench(source, folder, shlex.split(args.tool) if args.tool else tool())
    try:
        if any("{done}" in one.argv for one in contenders):
            bench.prepare()
        if not args.no_ballast:
            bench.ballast = Ballast()
        run_rounds(bench, contenders, args, rows)
    except KeyboardInterrupt:
        print("stopped; what follows is of the runs so far")
    finally:
        if bench.ballast is not None:
            bench.ballast.close()
        shutil.rmtree(folder)
    summary = summarise(rows, contenders)
    if args.json:
        result = {
            "machine": machine,
            "source_bytes": bench.size,
            "ballast": not args.no_ballast,
            "summary": summary,
            "runs": rows,
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    print(f"\nSource: {bench.size / 2**30:.2f} GiB, warm in the page cache.")
    print(f"{machine_line(machine)}.\n")
    print(table(summary))


def make_source(folder: str) -> str:
    """Made once, by another process: this one must stay small, its children inherit its RSS."""
    path = os.path.join(folder, "checkpoint.pt")
    if not os.path.exists(path):
        script = os.path.join(HERE, "make_checkpoint.py")
        subprocess.run([sys.executable, script, path], check=True)
    return path


if __name__ == "__main__":
    main()
