"""The zip that `torch.save` writes since torch 1.6, and the TorchScript archive beside it.

Records (torch/serialization.py, caffe2/serialize/inline_container.cc): `NAME/data.pkl`, one
`NAME/data/KEY` per storage, `NAME/version`, optionally `NAME/byteorder`. A TorchScript archive has
`NAME/constants.pkl` too, and its `data.pkl` holds module objects instead of dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flamingo_ckpt.errors import Finding, FormatError
from flamingo_ckpt.formats.pickle_globals import in_table
from flamingo_ckpt.formats.pickle_machine import MAX_PICKLE_BYTES, Pickled, read_pickle
from flamingo_ckpt.formats.torch_objects import TorchObjects
from flamingo_ckpt.formats.torchscript import read_module
from flamingo_ckpt.formats.wrapper import select_weights
from flamingo_ckpt.formats.zip_archive import ZipArchive, no_checksums
from flamingo_ckpt.tensors import ByteSource, Manifest, Storage, escape

_VERSIONS = range(1, 11)


def read_torch_zip(
    source: ByteSource, archive: ZipArchive, *, wrapper_key: str | None = None
) -> Manifest:
    """The manifest of a torch zip or TorchScript archive, its `data.pkl` read inertly.

    Raises:
        FormatError, UnsafeError, CkptError: naming the record or the key.
    """
    where = source.name
    version = _read_version(archive, _find_root(archive, where), where)
    pickled, objects, root = read_zip_pickle(source, archive)
    scripted = f"{root}constants.pkl" in archive
    if scripted:
        select = read_module(pickled.value, objects, where)
    else:
        select = select_weights(pickled.value, objects, wrapper_key, where)
    return Manifest(
        uri=where,
        format="torchscript" if scripted else "torch-zip",
        tensors=select.tensors,
        files=((where, source.size),),
        wrapper=select.key,
        pickle_globals=classify_globals(pickled),
        beside=select.beside,
        findings=tuple(
            _unreferenced(archive, root, pickled)
            + unknown_findings(select.unknown_classes)
            + no_checksums(where, archive.without_checksum())
        ),
        details={
            "byteorder": objects.byteorder,
            "version": version,
            "num_storages": sum(1 for name in archive.entries if name.startswith(f"{root}data/")),
        },
        sources=(source,),
        check=archive.check,
    )


def read_zip_pickle(source: ByteSource, archive: ZipArchive) -> tuple[Pickled, TorchObjects, str]:
    """The `data.pkl` of a torch zip, read inertly, what gives its tensors, and its folder.

    Raises:
        FormatError, UnsafeError: naming the record.
    """
    where = source.name
    root = _find_root(archive, where)
    byteorder = _read_byteorder(archive, root, where)
    pickle_name = f"{root}data.pkl"
    archive.read(pickle_name, MAX_PICKLE_BYTES)  # checks its CRC before a byte is interpreted
    data, offset = archive.locate(pickle_name)
    end = offset + archive.entries[pickle_name].num_bytes
    pickled = read_pickle(data, offset, end, f"{where}: {pickle_name}")
    if pickled.end != end:
        raise FormatError(
            f"{end - pickled.end} bytes follow the pickle in `{pickle_name}`",
            code="FC110",
            where=where,
        )
    storages: dict[str, Storage] = {}
    objects = TorchObjects(_finder(archive, root, storages, where), byteorder, where)
    return pickled, objects, root


def is_torch_zip(archive: ZipArchive) -> bool:
    """Whether a zip is torch's: it has a `data.pkl`, at most one folder deep."""
    return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.entries)


def _find_root(archive: ZipArchive, where: str) -> str:
    pickles = [name for name in archive.entries if name == "data.pkl" or name.endswith("/data.pkl")]
    top = [name for name in pickles if name.count("/") <= 1]
    if len(top) != 1:
        raise FormatError(
            f"the archive has {len(top)} records `data.pkl` where torch writes one",
            code="FC106",
            where=where,
        )
    return top[0].removesuffix("data.pkl")


def _read_version(archive: ZipArchive, root: str, where: str) -> int:
    for name in (f"{root}version", f"{root}.data/version"):
        if name in archive:
            text = archive.read(name, 64).strip()
            if not text.isdigit() or int(text) not in _VERSIONS:
                raise FormatError(
                    f"archive version {escape(text.decode('latin-1'))!r} is not known",
                    code="FC112",
                    where=where,
                )
            return int(text)
    raise FormatError("the archive has no `version` record", code="FC106", where=where)


def _read_byteorder(archive: ZipArchive, root: str, where: str) -> str:
    name = f"{root}byteorder"
    if name not in archive:
        return "little"  # torch before 2.1 wrote no record, and only on little-endian machines
    value = archive.read(name, 16).strip().decode("latin-1")
    if value not in ("little", "big"):
        raise FormatError(f"byte order {escape(value)!r} is not known", code="FC110", where=where)
    return value


def _finder(
    archive: ZipArchive, root: str, storages: dict[str, Storage], where: str
) -> Callable[[str, int], Storage]:
    def find(key: str, num_bytes: int) -> Storage:
        name = f"{root}data/{key}"
        entry = archive.entries.get(name)
        if entry is None:
            raise FormatError(
                f"storage `{escape(key)}` is not in the archive", code="FC102", where=where
            )
        if entry.num_bytes != num_bytes:
            raise FormatError(
                f"storage `{escape(key)}` has {entry.num_bytes} bytes, its tensors expect "
                f"{num_bytes}",
                code="FC103",
                where=where,
                hint="the file is damaged or was altered",
            )
        if key not in storages:
            storages[key] = Storage(
                key=key,
                num_bytes=entry.num_bytes,
                locate=lambda: archive.locate(name),
                # Writers that skip the checksum store 0; that a CRC really is 0 is rare enough.
                crc32=entry.crc32 or None,
                where=f"{where}: {name}",
            )
        return storages[key]

    return find


def _unreferenced(archive: ZipArchive, root: str, pickled: Pickled) -> list[Finding]:
    used = {
        f"{root}data/{item.id[2]}"
        for item in pickled.persistent
        if type(item.id) is tuple and len(item.id) > 2 and type(item.id[2]) is str
    }
    frozen = [name for name in archive.entries if name.startswith(f"{root}constants/")]
    unused = [
        name for name in archive.entries if name.startswith(f"{root}data/") and name not in used
    ]
    foreign = [
        name
        for name in archive.entries
        if not name.startswith(root) or name.endswith((".pkl", ".pickle"))
    ]
    foreign = [name for name in foreign if name not in (f"{root}data.pkl", f"{root}constants.pkl")]
    lost = [
        Finding(
            code="FC113",
            severity="warning",
            detail=f"{len(frozen)} tensors lie among the constants of frozen code, without names; "
            "they are not read",
            hint="take the module from before `torch.jit.freeze`",
        )
    ]
    return (lost if frozen else []) + [
        Finding(
            code="FC113",
            severity="warning",
            key=escape(name),
            detail=f"record `{escape(name)}` is in the archive and nothing refers to it",
        )
        for name in [*unused, *foreign]
    ]


def classify_globals(pickled: Pickled) -> Mapping[str, str]:
    """`module.name` -> `table` or `inert`."""
    return {
        str(name): "table" if in_table(name.module, name.name) else "inert"
        for name in pickled.globals
    }


def unknown_findings(classes: tuple[str, ...]) -> list[Finding]:
    """One finding per unknown class beside the weights."""
    return [
        Finding(
            code="FC506",
            severity="warning",
            key=escape(name),
            detail=f"objects of the class `{escape(name)}` lie beside the weights; "
            "they were not built",
        )
        for name in classes
    ]
