"""Time `check` and `manifest` of a 4 GiB release against `sha256sum`; count a remote diff's bytes.

    python benchmarks/release.py --workdir /scratch

A training checkpoint of OpenFlamingo-3B's sizes and its conversion are made first. Each round runs
every command once, one after the other; `parity` is left out by a policy, it has a benchmark of its
own. The hub is the server of the tests, on this machine, which keeps the ends of both files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from measure import describe_machine, machine_line, settle, timed, tool, warm

HERE = os.path.dirname(os.path.abspath(__file__))
_END_BYTES = 1 << 20
POLICY = """\
[policy]
required = ["container", "bits", "values", "safety"]
[policy.severity]
FC602 = "warning"
FC351 = "warning"
FC355 = "warning"
FC354 = "warning"
FC353 = "warning"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", default=".cache/release")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.makedirs(options.workdir, exist_ok=True)
    source, folder = make(options.workdir, options.scale)
    policy = os.path.join(options.workdir, "policy.toml")
    with open(policy, "w") as file:
        file.write(POLICY)
    weights = os.path.join(folder, "model.safetensors")
    base = [*tool(), "check", folder, "--policy", policy]
    commands = {
        "sha256sum": ["sha256sum", weights],
        "manifest": [*tool(), "manifest", folder],
        "check --level headers": [*base, "--level", "headers"],
        "verify": [*tool(), "verify", source, folder],
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        for path in (source, weights):
            warm(path)
        settle()
        rounds.append({name: timed(argv).as_dict() for name, argv in commands.items()})
    found: dict[str, Any] = {
        "machine": describe_machine(options.workdir),
        "file_bytes": os.path.getsize(weights),
        "rounds": rounds,
        "checks": checks(base),
        "remote": remote(source, folder),
    }
    print(table(found))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


def make(workdir: str, scale: float) -> tuple[str, str]:
    """(checkpoint, release folder)."""
    source, folder = os.path.join(workdir, "checkpoint.pt"), os.path.join(workdir, "release")
    if not os.path.exists(source):
        script = os.path.join(HERE, "make_checkpoint.py")
        subprocess.run([sys.executable, script, source, "--scale", str(scale)], check=True)
    if not os.path.exists(folder):
        subprocess.run([*tool(), "convert", source, f"{folder}/", "-q"], check=True)
    return source, folder


def checks(base: list[str]) -> dict[str, float]:
    """Seconds of each check of one run."""
    done = subprocess.run([*base, "--json"], capture_output=True, text=True, check=False)
    return {one["name"]: one["seconds"] for one in json.loads(done.stdout)["checks"]}


def remote(source: str, folder: str) -> dict[str, Any]:
    """Bytes and seconds of a diff of two files on a hub, as the report tells them."""
    sys.path.insert(0, os.path.dirname(HERE))
    from tests.hub_server import HubServer

    weights = os.path.join(folder, "model.safetensors")
    with HubServer() as hub:
        hub.push("bench/0", {"checkpoint.pt": ends_of(source)})
        hub.push("bench/1", {"model.safetensors": ends_of(weights)})
        told = subprocess.run(
            [*tool(), "diff", "hf://bench/0/checkpoint.pt", "hf://bench/1", "--json"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"},
        )
    document = json.loads(told.stdout)
    return {
        "num_bytes_read": [one["remote"]["num_bytes_read"] for one in document["inputs"]],
        "num_bytes_total": [one["remote"]["num_bytes_total"] for one in document["inputs"]],
        "seconds": document["duration_seconds"],
    }


def ends_of(path: str) -> Any:
    """The file as the server of the tests gives it: its ends as they are, zeros between them.

    What is read lies there; a server that digests 4 GB at every request would be what is timed.
    """
    from tests.hub_server import Hollow

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_END_BYTES)
        file.seek(-_END_BYTES, os.SEEK_END)
        return Hollow(size, head, file.read())


def table(found: dict[str, Any]) -> str:
    """Medians, and their ratio to `sha256sum` of the same file."""
    rounds = found["rounds"]
    lines = [machine_line(found["machine"]), "", "| command | s | of sha256sum | peak MiB |"]
    lines.append("|---|---|---|---|")
    reference = statistics.median(one["sha256sum"]["wall"] for one in rounds)
    for name in rounds[0]:
        wall = statistics.median(one[name]["wall"] for one in rounds)
        ratio = statistics.median(one[name]["wall"] / one["sha256sum"]["wall"] for one in rounds)
        peak = max(one[name]["rss_mib"] for one in rounds)
        lines.append(f"| {name} | {wall:.2f} | {ratio:.2f} | {peak:.0f} |")
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["checks"].items())
    remote = found["remote"]
    read = " + ".join(f"{number / 1000:.0f} kB" for number in remote["num_bytes_read"])
    whole = " + ".join(f"{number / 1e9:.2f} GB" for number in remote["num_bytes_total"])
    lines += [
        "",
        f"seconds of each check, without a source ({reference:.2f} s of sha256sum): {told}",
        f"remote diff: {read} read of {whole}, {remote['seconds']:.2f} s beyond imports",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
