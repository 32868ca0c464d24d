"""Memory that is held between runs and given back right before each of them.

Many virtual machines return free memory to their host, and the next process that touches a page
waits until the host has given it back: seconds for each GiB, and not the same twice. A run that
writes 4 GiB into the page cache then measures the host. So a helper process holds as much memory as
a run needs, and lets go of it in the moment before: the run begins with free memory that is there,
as on a machine without a host. On such a machine this changes nothing.
"""

from __future__ import annotations

import mmap
import subprocess
import sys

_PIECE = bytes([1]) * (1 << 20)


class Ballast:
    """A helper process, because children inherit the peak RSS of the process that starts them."""

    def __init__(self) -> None:
        self._helper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hold(self, num_bytes: int) -> None:
        """Touch that much memory; what is held already is given back first."""
        self._ask(str(num_bytes))

    def release(self) -> None:
        """Give it back to the system. The host takes it after about two seconds."""
        self._ask("0")

    def close(self) -> None:
        self._helper.communicate()

    def _ask(self, line: str) -> None:
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        self._helper.stdin.write(line + "\n")
        self._helper.stdin.flush()
        if not self._helper.stdout.readline():
            raise SystemExit("the helper that holds memory has died; is there enough of it?")


def _serve() -> None:
    held: mmap.mmap | None = None
    for line in sys.stdin:
        if held is not None:
            held.close()
            held = None
        if size := int(line):
            held = mmap.mmap(-1, size)
            for _ in range(size // len(_PIECE)):
                held.write(_PIECE)
        print("done", flush=True)


if __name__ == "__main__":
    _serve()
