"""Facts of a run for its report: what computed each side, and where."""

from __future__ import annotations

import platform
from typing import Any

from flamingo_ckpt.parity.opening import Side, describe_config
from flamingo_ckpt.parity.passes import SideRun
from flamingo_ckpt.tensors import escape


def side_details(side: Side, run: SideRun) -> dict[str, Any]:
    """What made one side, and how it was run."""
    return {
        "uri": escape(side.uri),
        "computed_by": run.computed_by,
        "config": describe_config(side),
        "bases": [escape(base.manifest.uri) for base in side.bases],
        "streamed": run.is_streamed,
        "num_forwards": run.num_forwards,
        "deterministic": not run.unstable if run.num_forwards else None,
    }


def environment(device: str) -> dict[str, Any]:
    """The machine and the libraries."""
    import torch
    import transformers

    is_cuda = device.startswith("cuda")
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
        "notes": [] if is_cuda else ["not run on a GPU"],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
