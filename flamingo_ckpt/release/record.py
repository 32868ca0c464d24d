"""The conversion record: what a release was made from and what was proven, in the card's own block.

The block is the tool's: it is found by its two marks and rewritten in place; the rest of the card
is the author's and stays as it is, byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from flamingo_ckpt import __version__
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.release.folder import digest_of
from flamingo_ckpt.release.result import Outcome
from flamingo_ckpt.release.yaml_text import load_yaml
from flamingo_ckpt.tensors import Manifest, escape

_BEGIN: Final = "<!-- flamingo-ckpt conversion record: begin -->"
_END: Final = "<!-- flamingo-ckpt conversion record: end -->"
_BLOCK: Final = re.compile(
    re.escape(_BEGIN) + r"\s*```yaml\r?\n(?P<yaml>.*?)\r?\n```\s*" + re.escape(_END), re.DOTALL
)
_NOTE: Final = "# written by flamingo-ckpt, which rewrites it in place; do not edit by hand"
_MAX_RECORD = 64 << 10


def source_of(manifest: Manifest) -> dict[str, Any]:
    """Name and SHA-256 of what a release was made from; of a local path the last part only.

    Raises:
        CkptError: FC002 where a file cannot be read any more.
    """
    uri = manifest.uri
    named = uri if "://" in uri else os.path.basename(os.path.abspath(uri))
    files = {
        os.path.basename(one.path): digest_of(one.path)
        for one in manifest.sources
        if isinstance(one, FileSource)
    }
    return {"name": escape(named), "sha256": {escape(name): files[name] for name in sorted(files)}}


def make_record(
    *,
    source: Mapping[str, Any],
    content: str,
    layouts: tuple[str, str] | None = None,
    verify: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of a record.

    Args:
        source: as `source_of` gives it.
        content: digest of all weights, as `content_digest` gives it.
        layouts: names of the layouts that the map led from and to.
        verify: verdict of the comparison of bits.
        parity: verdict of the comparison of what both compute.
    """
    record: dict[str, Any] = {
        "tool": f"flamingo-ckpt {__version__}",
        "source": dict(source),
        "content": content,
    }
    if layouts is not None:
        record["map"] = {"from": layouts[0], "to": layouts[1]}
    if verify is not None:
        record["verify"] = dict(verify)
    if parity is not None:
        record["parity"] = dict(parity)
    return record


def record_of(outcomes: Sequence[Outcome], source: Manifest) -> dict[str, Any] | None:
    """The record of what checks have shown; None where the weights are not what they should be."""
    made = {one.name: one for one in outcomes}
    bits, values, parity = made["bits"], made["values"], made["parity"]
    content = values.details.get("content")
    if content is None or any(one.status == "fail" for one in (bits, values, parity)):
        return None
    counts = bits.details.get("bits", {}).get("summary")
    verify = {"verdict": bits.status, **{name: counts[name] for name in ("bit_exact", "cast")}}
    return make_record(
        source=source_of(source),
        content=content,
        layouts=bits.details.get("layouts"),
        verify=verify if counts is not None and bits.status == "pass" else {"verdict": "not run"},
        parity=_parity(parity),
    )


def _parity(outcome: Outcome) -> dict[str, Any]:
    passes = outcome.details.get("parity", {}).get("summary", {}).get("passes")
    if outcome.status == "skip" or not passes:
        return {"verdict": "not run"}
    return {
        "verdict": "pass",
        "device": passes[0]["device"],
        "dtypes": list(dict.fromkeys(one["dtype"] for one in passes)),
        "gates": list(dict.fromkeys(one["gates"] for one in passes)),
        "max_rel": max(float(one["max_rel"]) for one in passes),
    }


def find_record(text: str) -> dict[str, Any] | None:
    """The record in a card, or None where it has none.

    Raises:
        CkptError: FC611 for a block that is not whole, or is there twice.
    """
    begins, ends = text.count(_BEGIN), text.count(_END)
    if not begins and not ends:
        return None
    match = _BLOCK.search(text)
    if begins != 1 or ends != 1 or match is None:
        raise _broken("its two marks do not stand once each around one block of YAML")
    try:
        found = load_yaml(match["yaml"], _MAX_RECORD)
    except ValueError:
        raise _broken("it is not YAML") from None
    if not isinstance(found, dict):
        raise _broken("it has no fields")
    return found


def with_record(text: str, record: Mapping[str, Any]) -> str:
    """The card with this record, in place of the one that it has or at its end.

    Raises:
        CkptError: FC611 as `find_record`.
    """
    import yaml  # type: ignore[import-untyped]

    has_one = find_record(text) is not None
    body = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=False, width=1000)
    end = "\r\n" if "\r\n" in text else "\n"
    block = f"{_BEGIN}\n```yaml\n{_NOTE}\n{body}```\n{_END}".replace("\n", end)
    if has_one:
        return _BLOCK.sub(lambda _: block, text, count=1)
    if not text or text.endswith(2 * end):
        return f"{text}{block}{end}"
    return f"{text}{end if text.endswith(end) else 2 * end}{block}{end}"


def write_record(path: str, record: Mapping[str, Any]) -> None:
    """Put a record into a card, atomically; a card that is not there is made of it alone.

    Raises:
        CkptError: FC002 where the card cannot be read, FC611 where its block is broken.
    """
    from flamingo_ckpt.formats.staging import staged_file, write_at_path

    if os.path.islink(path):
        raise CkptError(
            f"`{escape(os.path.basename(path))}` is a symbolic link, and is not written through",
            code="FC503",
            where=path,
            hint="put the card itself there",
        )
    mode = None
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
            mode = os.fstat(file.fileno()).st_mode & 0o777
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise CkptError(
            f"the card cannot be read: {escape(str(error))[:200]}", code="FC002", where=path
        ) from error
    with staged_file(path, overwrite=True) as staging:
        write_at_path(staging, with_record(text, record).encode("utf-8"))
        if mode is not None:
            os.chmod(staging, mode)


def _broken(why: str) -> CkptError:
    return CkptError(
        f"the conversion record of the card is broken: {why}",
        code="FC611",
        where="README.md",
        hint="remove what is left of the block; the tool writes a new one",
    )
