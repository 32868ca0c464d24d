"""The layout of a file to be written: every offset is fixed before the first byte.

Three formats, one shape of answer: fixed bytes, the place of each tensor, and the bytes that can
only be known when all tensors have been written (checksums, a digest in the header).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flamingo_ckpt.tensors import DType

#: name of a tensor -> CRC-32 of its bytes.
Checksums = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutTensor:
    """A tensor to be written.

    Attributes:
        name: the name that stores it.
        aliases: names that share it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    num_bytes: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """Where everything goes in one file.

    Attributes:
        file: its name.
        num_bytes: its size.
        offsets: of each stored tensor. A name may stand twice under `copies`.
        copies: for formats without aliases: further offsets that get the same bytes.
        needs_crc: whether `finish` needs the tensors' checksums.
        finish: gives (offset, bytes) of everything that is not a tensor.
    """

    file: str
    num_bytes: int
    offsets: Mapping[str, int]
    finish: Callable[[Checksums], Sequence[tuple[int, bytes]]]
    copies: Mapping[str, tuple[int, ...]]
    needs_crc: bool = False
