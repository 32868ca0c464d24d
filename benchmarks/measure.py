"""Run one command as a whole process and say what it took; describe the machine it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

_BLOCK = 1 << 20
_CALM_DIRTY_KIB = 8 << 10
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Run:
    """One process, from its start to its end.

    Attributes:
        wall: seconds.
        cpu: user and system seconds of the process and its children.
        rss_mib: the largest resident set of any of them. No less than that of this process, from
            which they are started: about 23 MiB.
        other_cpu: seconds that everything else on the machine computed meanwhile.
    """

    wall: float
    cpu: float
    rss_mib: float
    other_cpu: float

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def timed(argv: list[str]) -> Run:
    """Run a command; its output is thrown away unless it fails."""
    busy = _busy_seconds()
    started = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # Commands here print a few lines at most, which the pipe holds until they have ended.
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    message = process.stderr.read().decode()
    process.stderr.close()
    if process.returncode != 0:
        raise SystemExit(f"{argv} ended with {process.returncode}: {message}")
    cpu = usage.ru_utime + usage.ru_stime
    other = max(_busy_seconds() - busy - cpu, 0.0)
    return Run(wall, cpu, usage.ru_maxrss / 1024, other)


def _busy_seconds() -> float:
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / _TICKS


def warm(path: str) -> None:
    """Bring a file into the page cache, so that no run pays for the disk's reading."""
    buffer = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def settle(limit: float = 30.0) -> None:
    """Write everything to disk and wait until the system has nothing left to write."""
    os.sync()
    end = time.monotonic() + limit
    while _dirty_kib() > _CALM_DIRTY_KIB and time.monotonic() < end:
        time.sleep(0.1)


def _dirty_kib() -> int:
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    return sum(int(lines[key].split()[0]) for key in ("Dirty", "Writeback"))


def describe_machine(folder: str) -> dict[str, Any]:
    """What the numbers depend on; no host name and no path."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "filesystem": _filesystem(folder),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "safetensors", "numpy", "zlib-ng", "xxhash")},
    }


def _filesystem(folder: str) -> str:
    """Of the deepest mount point that holds `folder`."""
    here, best = os.path.realpath(folder), ("", "unknown")
    with open("/proc/mounts") as file:
        for line in file:
            _, point, kind, *_ = line.split()
            holds = here == point or here.startswith(point.rstrip("/") + "/")
            if holds and len(point) >= len(best[0]):
                best = (point, kind)
    return best[1]


def machine_line(machine: dict[str, Any]) -> str:
    """The same for a reader."""
    rest = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "torch", "safetensors", "numpy")
    )
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['filesystem']}, Linux {machine['kernel']}; {rest}"
    )


def tool() -> list[str]:
    """The command as it is installed beside this interpreter."""
    return [os.path.join(os.path.dirname(sys.executable), "flamingo-ckpt")]
