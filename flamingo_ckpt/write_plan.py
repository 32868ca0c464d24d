"""Decide every file and offset of a destination before a byte is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from flamingo_ckpt import __version__
from flamingo_ckpt.errors import CkptError, Finding, name_some
from flamingo_ckpt.formats.folder import WEIGHT_FILES, FolderFiles, sort_files
from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.formats.safetensors import parse_json_object
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.formats.staging import check_replaceable
from flamingo_ckpt.plan import Plan, Step
from flamingo_ckpt.tensors import Manifest, escape

_SUFFIX_FORMATS = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".npz": "npz",
}
_FOLDER_NAMES = {
    "safetensors": ("model", ".safetensors"),
    "torch": ("pytorch_model", ".bin"),
    "npz": ("model", ".npz"),
}
#: The hub's own limit before files are split, and what makes upload hashing parallel.
DEFAULT_SHARD_BYTES = 5_000_000_000
#: Every metadata key of our own begins so.
OWN_KEYS = "flamingo_ckpt."
DIGEST_KEY = "flamingo_ckpt.source_digest"
VERSION_KEY = "flamingo_ckpt.version"
#: The file lacks what only a base has.
PARTIAL_KEY = "flamingo_ckpt.partial"
_MAX_CONFIG_BYTES = 16 << 20
#: As long as the digest that takes its place once it is known.
DIGEST_PLACEHOLDER = "xxh3-128:" + "0" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How to write: the flags of the same names of `flamingo-ckpt convert`."""

    format: str | None = None
    max_shard_bytes: int | None = None
    overwrite: bool = False
    copy_code: bool = False
    npy_bfloat16: bool = False
    record_source: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePlan:
    """Every file of the destination, before a byte is written.

    Attributes:
        dst: the destination.
        format: `safetensors`, `torch` or `npz`.
        is_folder: whether `dst` is a folder.
        layouts: one per weight file.
        index: name and content of the index, where there are shards.
        files: what goes along from the source folder.
        copied: the relative names of those that are copied.
        generated: name -> content of files that the conversion itself makes.
    """

    dst: str
    format: str
    is_folder: bool
    layouts: tuple[FileLayout, ...]
    index: tuple[str, bytes] | None
    files: FolderFiles
    copied: tuple[str, ...]
    generated: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all weight files."""
        return sum(layout.num_bytes for layout in self.layouts)


def plan_write(
    plan: Plan,
    dst: str,
    options: ConvertOptions,
    generated: Mapping[str, bytes] = MappingProxyType({}),
) -> WritePlan:
    """Decide every file and offset of the destination.

    Args:
        plan: what becomes of every tensor.
        dst: the destination.
        options: how to write.
        generated: name -> content of files that a folder gets besides its weights (its config).

    Raises:
        CkptError: FC006 contradicting options, FC305 a dtype the format lacks.
        WriteError: FC003 to FC005.
    """
    format, is_folder = choose_format(dst, options.format)
    if options.max_shard_bytes is not None and (not is_folder or format == "npz"):
        raise CkptError(
            "--max-shard-size needs a folder as destination, in safetensors or torch format",
            code="FC006",
            hint="give a destination without a file suffix",
        )
    check_replaceable(dst, overwrite=options.overwrite, folder=is_folder)
    for manifest in plan.manifests:
        _refuse_same(manifest, dst, is_folder)
    limit = options.max_shard_bytes or (DEFAULT_SHARD_BYTES if format != "npz" else None)
    shards = split_shards(plan.steps, limit if is_folder else None)
    names = _file_names(dst, format, is_folder, len(shards))
    metadata = _metadata(plan, options)
    layouts = tuple(
        _lay_out(format, name, shard, metadata, options)
        for name, shard in zip(names, shards, strict=True)
    )
    files = FolderFiles(carried=(), code=(), left=())
    if is_folder and plan.source.folder is not None:
        files = sort_files(plan.source.folder, _weight_files(plan.source), skip=dst)
    taken = (*files.carried, *(files.code if options.copy_code else ()))
    copied = tuple(name for name in taken if name not in generated)
    return WritePlan(
        dst=dst,
        format=format,
        is_folder=is_folder,
        layouts=layouts,
        index=_index(format, names, shards) if len(shards) > 1 else None,
        files=files,
        copied=copied,
        generated=generated if is_folder else {},
    )


def choose_format(dst: str, wanted: str | None) -> tuple[str, bool]:
    """(format, whether the destination is a folder) from the suffix and `--format`."""
    suffix = os.path.splitext(dst)[1].lower()
    by_suffix = _SUFFIX_FORMATS.get(suffix)
    if dst.endswith("/") or by_suffix is None:
        return wanted or "safetensors", True
    if wanted is not None and wanted != by_suffix:
        raise CkptError(
            f"`{dst}` ends in `{suffix}`, which is {by_suffix}, and --format says {wanted}",
            code="FC006",
            hint="make them agree, or leave --format out",
        )
    return by_suffix, False


def split_shards(steps: tuple[Step, ...], limit: int | None) -> list[list[Step]]:
    """Fill shards in order up to `limit` bytes; a larger tensor gets a shard of its own."""
    if limit is None:
        return [list(steps)]
    shards: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if shards[-1] and filled + step.num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(step)
        filled += step.num_bytes
    return shards


def _file_names(dst: str, format: str, is_folder: bool, count: int) -> list[str]:
    if not is_folder:
        return [os.path.basename(dst)]
    stem, suffix = _FOLDER_NAMES[format]
    if count == 1:
        return [stem + suffix]
    return [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]


def _lay_out(
    format: str,
    name: str,
    shard: list[Step],
    metadata: Mapping[str, str],
    options: ConvertOptions,
) -> FileLayout:
    tensors = [
        OutTensor(
            name=step.name,
            dtype=step.dtype,
            shape=step.shape,
            num_bytes=step.num_bytes,
            aliases=step.aliases,
        )
        for step in shard
    ]
    if format == "torch":
        from flamingo_ckpt.formats.torch_writer import layout_torch

        return layout_torch(name, tensors)
    if format == "npz":
        from flamingo_ckpt.formats.npz import layout_npz

        return layout_npz(name, tensors, bfloat16=options.npy_bfloat16)
    from flamingo_ckpt.formats.safetensors import layout_safetensors

    return layout_safetensors(name, tensors, metadata)


def _metadata(plan: Plan, options: ConvertOptions) -> dict[str, str]:
    """Strings for the header: those of a safetensors source, and ours where asked for."""
    from flamingo_ckpt.formats.safetensors import ALIASES_KEY

    names = {tensor.name for tensor in plan.source.tensors}
    is_mapped = plan.layout is not None and plan.target is not plan.layout.layout
    metadata = {
        key: value
        for key, value in plan.source.metadata.items()
        # `alias: name` entries of safetensors' `save_model` are written again in our own way
        if key not in (ALIASES_KEY, DIGEST_KEY, VERSION_KEY)
        and not (key in names and value in names)
        # what was remembered of a conversion says nothing about the next one
        and not (is_mapped and key.startswith(OWN_KEYS))
        # a base may have completed what was partial; the plan says so where it did not
        and not (plan.others and key == PARTIAL_KEY)
    }
    metadata |= plan.metadata
    metadata.setdefault("format", "pt")
    if options.record_source:
        metadata[DIGEST_KEY] = DIGEST_PLACEHOLDER
        metadata[VERSION_KEY] = __version__
    return metadata


def _index(format: str, names: list[str], shards: list[list[Step]]) -> tuple[str, bytes]:
    steps = [step for shard in shards for step in shard]
    content = {
        "metadata": {
            "total_parameters": sum(step.num_elements for step in steps),
            "total_size": sum(step.num_bytes for step in steps),
        },
        "weight_map": {
            name: file
            for file, shard in zip(names, shards, strict=True)
            for step in shard
            # torch shards hold the tied names themselves; safetensors shards only record them
            for name in (step.name, *(step.aliases if format == "torch" else ()))
        },
    }
    stem, suffix = _FOLDER_NAMES[format]
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return f"{stem}{suffix}.index.json", text.encode("utf-8")


def _weight_files(manifest: Manifest) -> set[str]:
    index = manifest.details.get("index")
    return {name for name, _ in manifest.files} | ({index} if isinstance(index, str) else set())


def _refuse_same(manifest: Manifest, dst: str, is_folder: bool) -> None:
    """The destination must not be the source, nor make one of its files disappear."""
    folder = manifest.folder
    sources = [
        os.path.join(folder, name) if folder is not None else name for name, _ in manifest.files
    ]
    same = CkptError(
        f"`{dst}` is the source itself",
        code="FC005",
        where=dst,
        hint="name another destination",
    )
    if not os.path.exists(dst):
        return
    if any(os.path.samefile(dst, source) for source in [*sources, *([folder] if folder else [])]):
        raise same
    if is_folder:
        # Both where the source is named and where a link leads: neither may disappear.
        inside = [
            place
            for source in sources
            for place in (os.path.abspath(source), os.path.realpath(source))
            if os.path.realpath(os.path.dirname(place)) == os.path.realpath(dst)
            and WEIGHT_FILES.fullmatch(os.path.basename(place))
        ]
        if inside:
            raise CkptError(
                f"the source `{inside[0]}` lies in `{dst}` and would be replaced",
                code="FC005",
                where=dst,
                hint="name another destination",
            )


def is_kept(name: str) -> bool:
    """Whether an entry of a folder that is replaced stays: no checkpoint writer made it."""
    return WEIGHT_FILES.fullmatch(name) is None


def planned_files(plan: Plan, write: WritePlan) -> list[tuple[str, int]]:
    """(name, size) of every file that a run would write."""
    files = [(layout.file, layout.num_bytes) for layout in write.layouts]
    if write.index is not None:
        files.append((write.index[0], len(write.index[1])))
    files += [(name, len(content)) for name, content in write.generated.items()]
    folder = plan.source.folder or ""
    return files + [(name, os.path.getsize(os.path.join(folder, name))) for name in write.copied]


def omissions(plan: Plan, write: WritePlan, options: ConvertOptions) -> list[Finding]:
    """What the destination lacks of the source, one finding each."""
    found = [
        Finding(
            code="FC209",
            severity="info",
            key=item.name,
            detail=f"`{escape(item.name)}` is left out: {escape(item.reason)}",
        )
        for item in plan.dropped
    ]
    if (
        write.format == "safetensors"
        and plan.target is None
        and _is_untied_in_config(plan.source.folder)
    ):
        found += [
            Finding(
                code="FC210",
                severity="warning",
                key=step.name,
                detail=f"`config.json` says the model is not tied, and the file shares "
                f"`{escape(step.name)}` with {name_some([escape(name) for name in step.aliases])}: "
                "a loader that follows the config will miss them",
                hint="write a copy for every name: --untie",
            )
            for step in plan.steps
            if step.aliases
        ]
    if write.format != "npz":
        found += [
            Finding(
                code="FC210",
                severity="info",
                key=step.name,
                detail=f"`{escape(step.name)}` is stored once for "
                + ", ".join(f"`{escape(alias)}`" for alias in step.aliases),
                data={"aliases": list(step.aliases)},
            )
            for step in plan.steps
            if step.aliases
        ]
    left = [(name, reason) for name, reason in write.files.left]
    if not options.copy_code:
        left += [(name, "code or pickle; --copy-code takes it") for name in write.files.code]
    found += [
        Finding(
            code="FC504",
            severity="info",
            key=name,
            detail=f"`{escape(name)}` stays behind: {reason}",
        )
        for name, reason in left
    ]
    keys = sorted(_metadata(plan, ConvertOptions()).keys() - {"format"})
    if write.format != "safetensors" and keys:
        found.append(
            Finding(
                code="FC209",
                severity="warning",
                detail=f"{write.format} files hold no metadata, so "
                f"{name_some([escape(key) for key in keys])} is left out",
            )
        )
    return found


def _is_untied_in_config(folder: str | None) -> bool:
    """Whether a release's own config says that input and output embeddings are separate."""
    if folder is None:
        return False
    path = os.path.join(folder, "config.json")
    try:
        source = FileSource(path)
        config = parse_json_object(source.read(0, min(source.size, _MAX_CONFIG_BYTES)), path)
    except CkptError:
        return False  # no config to contradict; the file itself goes along as it is
    return config.get("tie_word_embeddings") is False
