"""Time `parity` against two plain loads and as many plain forwards; and run it in little memory.

    python benchmarks/parity.py --workdir /scratch --layers 24 --dtype bfloat16
    python benchmarks/parity.py --workdir /scratch --layers 6 --cap     # as root

A Flamingo of OpenFlamingo-3B's sizes and its conversion to the Hugging Face layout are made first.
Each round runs both commands once, one after the other. With `--cap` the check runs in a control
group whose memory is a quarter of one model's, page cache and all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from measure import describe_machine, machine_line, settle, tool, warm

HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", default=".cache/parity")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16", help="of the files; float32 is computed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cap", action="store_true", help="a quarter of one model's memory")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    a, b, config = make_pair(options.workdir, options.layers, options.dtype)
    command = [*tool(), "parity", a, b, "--config", config, "--device", options.device]
    found: dict[str, Any] = {
        "machine": describe_machine(options.workdir),
        "layers": options.layers,
        "file_dtype": options.dtype,
    }
    if options.cap:
        found["cap"] = capped(command, a, options)
        print(json.dumps(found["cap"], indent=1))
    else:
        found["rounds"] = [one_round(command, (a, b), options) for _ in range(options.rounds)]
        print(table(found))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


def make_pair(workdir: str, layers: int, dtype: str) -> tuple[str, str, str]:
    """(A, B, config): a checkpoint with OpenFlamingo's names, and the folder made of it."""
    folder = os.path.join(workdir, f"flamingo-{layers}-{dtype}")
    a, b = os.path.join(folder, "checkpoint.safetensors"), os.path.join(folder, "hf")
    config = os.path.join(folder, "config.json")
    if not os.path.isdir(b):
        make = os.path.join(HERE, "make_flamingo.py")
        subprocess.run(
            [sys.executable, make, folder, "--layers", str(layers), "--dtype", dtype], check=True
        )
        convert = [*tool(), "convert", a, b, "--to", "hf-flamingo", "--config", config, "-q"]
        subprocess.run([*convert, "--no-verify", "--max-shard-size", "20GB"], check=True)
    return a, b, config


def one_round(command: list[str], sides: tuple[str, str], options: Any) -> dict[str, Any]:
    settle()
    for path in files_of(sides):
        warm(path)
    started = time.monotonic()
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=True)
    parity_seconds = time.monotonic() - started
    report = json.loads(done.stdout)
    path = os.path.join(options.workdir, "report.json")
    with open(path, "wb") as file:
        file.write(done.stdout)
    plain = [sys.executable, os.path.join(HERE, "parity_plain.py"), path]
    started = time.monotonic()
    subprocess.run(plain, check=True)
    plain_seconds = time.monotonic() - started
    return {
        "parity_seconds": round(parity_seconds, 2),
        "plain_seconds": round(plain_seconds, 2),
        "ratio": round(parity_seconds / plain_seconds, 3),
        "num_forwards": [side["num_forwards"] for side in report["sides"]],
        "num_tokens": len((report["greedy"] or {}).get("a", ())),
        "seconds": report["seconds"],
        "verdict": report["verdict"],
        "passes": report["summary"]["passes"],
    }


def files_of(sides: tuple[str, str]) -> list[str]:
    a, folder = sides
    return [a, *(os.path.join(folder, name) for name in sorted(os.listdir(folder)))]


# --- little memory --------------------------------------------------------------------------------


def capped(command: list[str], a: str, options: Any) -> dict[str, Any]:
    """Run the check in a control group with a quarter of one model's bytes in float32."""
    num_parameters = os.path.getsize(a) // (4 if options.dtype == "float32" else 2)
    limit = num_parameters * 4 // 4
    group = Group(f"flamingo-parity-{os.getpid()}", limit)
    try:
        # what Python, torch and the inputs take is no weight's
        budget = max(limit // 4, 450 << 20)
        started = time.monotonic()
        done = subprocess.run(
            [*command, "--json", "--max-memory", str(budget)],
            stdout=subprocess.PIPE,
            preexec_fn=group.enter,
            check=False,
        )
        seconds = time.monotonic() - started
        report = json.loads(done.stdout or "{}")
        return {
            "model_bytes_float32": num_parameters * 4,
            "memory_limit_bytes": limit,
            "weights_budget_bytes": budget,
            "peak_bytes_of_the_group": group.peak(),
            "exit_code": done.returncode,
            "verdict": report.get("verdict"),
            "streamed": [side["streamed"] for side in report.get("sides", ())],
            "num_forwards": [side["num_forwards"] for side in report.get("sides", ())],
            "wall_seconds": round(seconds, 1),
            "passes": report.get("summary", {}).get("passes"),
        }
    finally:
        group.remove()


class Group:
    """A control group of Linux with a limit of memory; either version of them, as root."""

    def __init__(self, name: str, limit: int) -> None:
        old = "/sys/fs/cgroup/memory"
        self._is_old = os.path.isdir(old)
        self._path = os.path.join(old if self._is_old else "/sys/fs/cgroup", name)
        os.mkdir(self._path)
        self._write("memory.limit_in_bytes" if self._is_old else "memory.max", str(limit))

    def enter(self) -> None:
        """Put this process there; what it starts stays with it."""
        self._write("cgroup.procs", str(os.getpid()))

    def peak(self) -> int:
        """The most that was used at a time."""
        name = "memory.max_usage_in_bytes" if self._is_old else "memory.peak"
        with open(os.path.join(self._path, name)) as file:
            return int(file.read())

    def remove(self) -> None:
        os.rmdir(self._path)

    def _write(self, name: str, text: str) -> None:
        with open(os.path.join(self._path, name), "w") as file:
            file.write(text)


# --- the table ------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    lines = [machine_line(found["machine"]), ""]
    lines += ["| round | `parity` s | plain s | ratio | forwards | tokens | verdict |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for at, one in enumerate(found["rounds"]):
        forwards = " + ".join(map(str, one["num_forwards"]))
        lines.append(
            f"| {at + 1} | {one['parity_seconds']} | {one['plain_seconds']} | {one['ratio']} | "
            f"{forwards} | {one['num_tokens']} | {one['verdict']} |"
        )
    ratios = [one["ratio"] for one in found["rounds"]]
    lines.append(f"\nmedian ratio {statistics.median(ratios):.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
