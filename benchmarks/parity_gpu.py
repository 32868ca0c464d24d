"""The check on a GPU, in one command: OpenFlamingo-3B's size, float32 and bfloat16, a table last.

    python benchmarks/parity_gpu.py --json parity-gpu.json

Makes a pair of random weights (21 GB in float32), runs `parity` on it as it is, on a copy with
a planted fault, and streamed within a quarter of the model. Ends with exit code 3 where there is no
GPU: nothing was run then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any

from measure import describe_machine, tool
from parity import make_pair

_FAULTY = "lang_encoder.transformer.blocks.{}.gated_cross_attn_layer.attn.to_kv.weight"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", default=".cache/parity-gpu")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="float32", help="of the files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("not run on a GPU: torch sees none", file=sys.stderr)
        return 3
    a, b, config = make_pair(options.workdir, options.layers, options.dtype)
    faulty = plant(b, options.layers // 2)
    quarter = os.path.getsize(a) // 4
    runs = {
        "clean": (b, ["--dtype", "float32", "--dtype", "bfloat16"]),
        "clean, float64": (b, ["--dtype", "float64"]),
        "key and value swapped": (faulty, []),
        "clean, streamed in a quarter": (b, ["--max-memory", str(quarter)]),
    }
    found: dict[str, Any] = {"machine": describe_machine(options.workdir), "runs": {}}
    for name, (folder, more) in runs.items():
        found["runs"][name] = run([a, folder, "--config", config, *more], options.device)
        print(f"{name}: exit code {found['runs'][name]['exit_code']}", file=sys.stderr)
    shutil.rmtree(faulty)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")
    print(table(found))
    good = [found["runs"][name]["exit_code"] == ("swapped" in name) for name in runs]
    return 0 if all(good) else 1


def plant(folder: str, layer: int) -> str:
    """A copy of a folder in which the key and the value of one gated block change places."""
    import numpy as np
    from safetensors import safe_open

    faulty = folder + "-faulty"
    shutil.rmtree(faulty, ignore_errors=True)
    shutil.copytree(folder, faulty)
    path, name = os.path.join(faulty, "model.safetensors"), _FAULTY.format(layer)
    with safe_open(path, framework="np") as file:
        rows = file.get_slice(name).get_shape()[0]
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(size))[name]["data_offsets"]
    whole = np.memmap(path, np.uint8, "r+", 8 + size + begin, (rows, (end - begin) // rows))
    whole[:] = np.roll(whole.copy(), rows // 2, axis=0)
    whole.flush()
    return faulty


def run(arguments: list[str], device: str) -> dict[str, Any]:
    started = time.monotonic()
    command = [*tool(), "parity", *arguments, "--device", device, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    report = json.loads(done.stdout)
    return {
        "exit_code": done.returncode,
        "verdict": report["verdict"],
        "wall_seconds": round(time.monotonic() - started, 1),
        "device_name": (report.get("environment") or {}).get("device_name"),
        "seconds": report.get("seconds"),
        "num_forwards": [side["num_forwards"] for side in report.get("sides", ())],
        "streamed": [side["streamed"] for side in report.get("sides", ())],
        "passes": report["summary"]["passes"],
        "blame": report.get("blame"),
        "findings": [one for one in report["findings"] if one["severity"] != "info"],
    }


def table(found: dict[str, Any]) -> str:
    names = {one["device_name"] for one in found["runs"].values()}
    lines = [", ".join(map(str, names)) + f"; torch {found['machine']['torch']}", ""]
    lines += ["| run | s | dtype | gates | max rel | argmax | KL | first divergence |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, one in found["runs"].items():
        for each in one["passes"]:
            where = each["first_divergence"] or ("none" if each["decides"] else "reported only")
            lines.append(
                f"| {name} | {one['wall_seconds']} | {each['dtype']} | {each['gates']} | "
                f"{float(each['max_rel']):.1e} | {each['argmax_agreement']} | "
                f"{float(each['kl'] or 0):.1e} | {where} |"
            )
    blamed = [b["suspect"] for one in found["runs"].values() for b in one["blame"] or ()]
    return "\n".join([*lines, "", "blamed: " + ("; ".join(map(str, blamed)) or "nothing")])


if __name__ == "__main__":
    sys.exit(main())
