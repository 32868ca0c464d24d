"""Open anything: recognise the format by content, never by suffix, and give its manifest."""

from __future__ import annotations

import os
from dataclasses import replace

from flamingo_ckpt import hub
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.safetensors import looks_like_safetensors, read_safetensors
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.formats.zip_archive import LOCAL_MAGIC
from flamingo_ckpt.tensors import ByteSource, Manifest, escape

# (offset, bytes, what it is, the way on): containers that are recognised and refused.
_KNOWN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (0, b"\x1f\x8b", "gzip-compressed", "unpack it first: `gunzip`"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first: `unzstd`"),
    (0, b"BZh", "bzip2-compressed", "unpack it first: `bunzip2`"),
    (0, b"\xfd7zXZ", "xz-compressed", "unpack it first: `unxz`"),
    (0, b"Rar!", "a RAR archive", "unpack it first"),
    (0, b"\x89HDF\r\n", "an HDF5 file", "convert it with Keras or h5py first"),
    (0, b"GGUF", "a GGUF file", "GGUF is quantized for inference; take the original weights"),
    (0, b"\x08\x08\x12", "an ONNX graph", "take the weights it was exported from"),
    (
        0,
        b"<!DOCTYPE",
        "a web page",
        "the download answered with a page; log in or mend the address",
    ),
    (0, b"<html", "a web page", "the download answered with a page; log in or mend the address"),
    (
        257,
        b"ustar",
        "a tar archive (torch before 0.1.10 wrote these)",
        "load it with torch 1.13 and save it again, in a place where running its code is safe; "
        "if it is an ordinary tar, unpack it first",
    ),
    (
        0,
        b"PK\5\6",
        "an empty zip archive",
        "the file holds nothing; copy or download it again",
    ),
)


def open_checkpoint(
    path: str, *, wrapper_key: str | None = None, npy_bfloat16: bool = False
) -> Manifest:
    """The manifest of a file, a folder or an index; no tensor data is read.

    Args:
        path: file, folder, or `*.index.json`; or `hf://OWNER/NAME[@REVISION][/PATH]`, of which
            the headers alone are read, by ranges, and nothing else is downloaded.
        wrapper_key: take the weights under this key of a torch file.
        npy_bfloat16: read 2-byte void elements of numpy files as bfloat16.

    Raises:
        CkptError: FC001 or FC002 where it cannot be read at all, else what the format raises.

    Example:
        >>> manifest = open_checkpoint("fixtures/tiny.safetensors")
        >>> manifest.format
        'safetensors'
    """
    if isinstance(path, hub.LocalCopy):
        copy = open_checkpoint(str(path), wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
        cost = path.remote
        return replace(copy, uri=path.uri, remote=lambda: cost)
    if hub.is_uri(path):
        from flamingo_ckpt.formats.remote import open_on_hub

        return open_on_hub(path, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    if "://" in path:
        raise CkptError(
            f"`{escape(path)}` is an address that is not read",
            code="FC002",
            hint="`hf://OWNER/NAME` is; download others first, then name the file or folder",
        )
    if os.path.isdir(path):
        from flamingo_ckpt.formats.sharded import open_folder

        return open_folder(path, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    source = FileSource(path)
    if is_index(source):
        from flamingo_ckpt.formats.sharded import open_index

        return open_index(path, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    return read_source(source, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)


def read_source(
    source: ByteSource, *, wrapper_key: str | None = None, npy_bfloat16: bool = False
) -> Manifest:
    """The manifest of one file behind any byte source. Errors name the source."""
    try:
        manifest = _read(source, wrapper_key, npy_bfloat16)
        if wrapper_key is not None and manifest.format not in ("torch-zip", "torch-legacy"):
            raise CkptError(
                f"--wrapper-key is for torch files that hold a dict, this is {manifest.format}",
                code="FC006",
                hint="leave it out",
            )
        return manifest
    except CkptError as error:
        raise error.at(source.name) from error.__cause__


def _read(source: ByteSource, wrapper_key: str | None, npy_bfloat16: bool) -> Manifest:
    if source.size == 0:
        raise CkptError("the file is empty", code="FC102", hint="copy or download the file again")
    head = source.read(0, min(source.size, 512))
    if head.startswith(LOCAL_MAGIC):
        return _read_zip(source, wrapper_key, npy_bfloat16)
    if looks_like_safetensors(head):
        return read_safetensors(source)
    from flamingo_ckpt.formats.npy import NPY_MAGIC
    from flamingo_ckpt.formats.npz import read_npy
    from flamingo_ckpt.formats.torch_legacy import MAGIC_BYTES, MAGIC_PICKLE, read_torch_legacy

    if head.startswith(MAGIC_PICKLE) or (head[:1] == b"\x80" and MAGIC_BYTES in head[:32]):
        return read_torch_legacy(source, wrapper_key=wrapper_key)
    if head.startswith(NPY_MAGIC):
        return read_npy(source, bfloat16=npy_bfloat16)
    raise _unknown(head)


def _read_zip(source: ByteSource, wrapper_key: str | None, npy_bfloat16: bool) -> Manifest:
    from flamingo_ckpt.formats.npz import is_npz, read_npz
    from flamingo_ckpt.formats.torch_zip import is_torch_zip, read_torch_zip
    from flamingo_ckpt.formats.zip_archive import ZipArchive

    archive = ZipArchive(source)
    if is_torch_zip(archive):
        return read_torch_zip(source, archive, wrapper_key=wrapper_key)
    if is_npz(archive):
        return read_npz(source, archive, bfloat16=npy_bfloat16)
    if any(name.endswith("model.json") for name in archive.entries):
        raise CkptError(
            "it is a TorchScript archive of torch before 1.4",
            code="FC112",
            hint="load it with torch 1.13 where running its code is safe, and save its "
            "`state_dict()`",
        )
    raise CkptError(
        f"it is a zip of {len(archive.entries)} files, none of them torch's or numpy's",
        code="FC001",
        hint="if a checkpoint is inside, unpack it first",
    )


def _unknown(head: bytes) -> CkptError:
    for offset, magic, what, hint in _KNOWN:
        if head[offset : offset + len(magic)].lower() == magic.lower():
            return CkptError(f"it is {what}", code="FC112", hint=hint)
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return CkptError(
            "it is a bare pickle, which `torch.save` did not write",
            code="FC112",
            hint="pickles can run code: take the weights from their author as safetensors",
        )
    if len(head) >= 9 and head[8:9] in b" \t\r\n{" and not any(head[5:8]):
        return CkptError("it looks like safetensors with a damaged header", code="FC101")
    return CkptError(
        f"its first bytes ({head[:8].hex(' ')}) are of no checkpoint format",
        code="FC001",
        hint="read are: torch .pt/.pth/.bin, safetensors, npz/npy, and folders of them",
    )


def is_index(source: ByteSource) -> bool:
    """An index is JSON with a weight map; its name is only looked at to tell a broken one."""
    if source.size > 256 << 20 or source.size < 2:
        return False
    head = source.read(0, min(source.size, 64)).lstrip()
    return head.startswith(b"{") and not looks_like_safetensors(source.read(0, min(9, source.size)))
