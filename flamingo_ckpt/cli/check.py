"""`flamingo-ckpt check SRC`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from flamingo_ckpt.cli.options import (
    describe_release,
    local_sources,
    mapping_options,
    open_bases,
    plan_source,
    verb,
)
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.report.document import Report

if TYPE_CHECKING:
    from flamingo_ckpt.plan import Plan
    from flamingo_ckpt.release.behaviour import Source
    from flamingo_ckpt.release.result import CheckResult, Outcome
    from flamingo_ckpt.release.subject import Subject
    from flamingo_ckpt.tensors import Manifest

EPILOG = """\b
Examples:
  flamingo-ckpt check release/
  flamingo-ckpt check release/ --source checkpoint.pt --base-vision clip.pt --base-language mpt/
  flamingo-ckpt check release/ --policy flamingo-ckpt.toml --output check.html
  flamingo-ckpt check release/ --fix
"""
#: Of the options, those that only a conversion to another layout has a use for.
_ONLY_MAPPED = {"config": None, "base_vision": None, "base_language": None, "vocab_rows": None}


@click.command(epilog=EPILOG, short_help="May I upload this.")
@click.argument("src")
@click.option("--source", metavar="SRC", help="What the release was made from.")
@click.option(
    "--policy",
    metavar="FILE",
    help="What is required. Default: flamingo-ckpt.toml or pyproject.toml here, else built in.",
)
@click.option(
    "--level",
    type=click.Choice(["all", "headers"]),
    default="all",
    show_default=True,
    help="`headers` reads no tensor data: no bits, values or parity.",
)
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("--fix", is_flag=True, help="Show what can safely be mended (modes, totals, dtypes).")
@click.option("--yes", is_flag=True, help="With --fix: mend it, then check.")
@click.option(
    "--record", is_flag=True, help="Write what was proven into the card's conversion record."
)
@mapping_options
@verb
def check(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Check a release before its upload: structure, keys, bits, values, behaviour, safety, papers.

    SRC is a folder, or one file, of which less can be said. With --source every tensor is derived
    again and both sides are run; give the options that the conversion had. Exit 0 when it may be
    uploaded, 1 when something is wrong, 3 when a required check could not run.
    """
    from flamingo_ckpt.release.check import Watch, check_release
    from flamingo_ckpt.release.policy import find_policy

    _check_options(chosen)
    _refuse_remote(chosen)
    chosen = local_sources(chosen, out, "src", "source", "base_vision", "base_language")
    policy = find_policy(chosen["policy"], strict=chosen["strict"], release=chosen["src"])
    subject = _open(chosen, out)
    fixes, subject = _fixed(subject, chosen, out)
    source = _source(subject, chosen)
    notes: list[Finding] = []
    with out.status() as say:
        result = check_release(
            subject,
            policy,
            source=source,
            level=chosen["level"],
            watch=Watch(say=say, on_bytes=_Counters(say)),
            between=_recorder(subject, chosen, out, notes) if chosen["record"] else None,
        )
    return Report(
        command="check",
        argv=argv,
        verdict=result.verdict,
        exit_code=result.exit_code,
        inputs=_inputs(subject, chosen),
        summary=result.summary(),
        findings=(*result.findings, *notes),
        duration_seconds=time.monotonic() - started,
        extra={
            "level": result.level,
            "checks": result.rows(),
            "files": [
                {"path": one.path, "num_bytes": one.num_bytes, "sha256": one.sha256}
                for one in result.files
            ],
            "source": source.uri if source is not None else None,
            "policy": policy.describe(has_source=source is not None),
            "waived": [one.describe() for one in result.waived],
            "fixes": fixes,
            "tensors": _tensors(subject),
            **_details(result),
        },
    )


class _Counters(dict[str, Callable[[int], None]]):
    """A callback for every check that reads data: it tells how much is done, now and then."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say
        self._lock = threading.Lock()

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ARG002
        """The callback of a check."""
        done, told = 0, 0.0

        def count(num_bytes: int) -> None:
            nonlocal done, told
            with self._lock:
                done += num_bytes
                now = time.monotonic()
                if now - told > 0.2:
                    told = now
                    self._say(f"{name}: {done / 1e6:.0f} MB read")

        return count


def _check_options(chosen: dict[str, Any]) -> None:
    if chosen["yes"] and not chosen["fix"]:
        raise CkptError("--yes without --fix", code="FC006", hint="--fix says what it would do")
    if chosen["record"] and (chosen["source"] is None or chosen["level"] != "all"):
        raise CkptError(
            "--record without --source, or with --level headers: there is nothing proven to write",
            code="FC006",
            hint="--source names what the release was made from",
        )
    given = [name for name in ("to", "source_layout", "vocab_rows") if chosen[name] is not None]
    if given and chosen["source"] is None:
        raise CkptError(
            f"--{given[0].replace('_', '-').replace('source-layout', 'from')} without --source",
            code="FC006",
            hint="it says how the release was made from its source",
        )


def _refuse_remote(chosen: dict[str, Any]) -> None:
    """Raise FC006 for what would write into the hub's cache."""
    from flamingo_ckpt import hub

    if hub.is_uri(chosen["src"]) and (chosen["yes"] or chosen["record"]):
        raise CkptError(
            "--yes and --record write into SRC, and it is on the hub",
            code="FC006",
            hint="`flamingo-ckpt pull` it into a folder first",
        )


def _open(chosen: dict[str, Any], out: Output) -> Subject:
    from flamingo_ckpt.release.subject import open_subject

    has_source = chosen["source"] is not None
    return open_subject(
        chosen["src"],
        config=chosen["config"],
        # with a source these are about it
        wrapper_key=None if has_source else chosen["wrapper_key"],
        npy_bfloat16=chosen["npy_bfloat16"],
        skip=(out.output,) if out.output else (),
    )


def _fixed(
    subject: Subject, chosen: dict[str, Any], out: Output
) -> tuple[list[dict[str, Any]], Subject]:
    """(what can be mended and whether it was, the release after that)."""
    if not chosen["fix"]:
        return [], subject
    from flamingo_ckpt.release.fix import plan_fixes

    fixes = plan_fixes(subject)
    told = [{"path": one.path, "what": one.what, "applied": chosen["yes"]} for one in fixes]
    if chosen["yes"] and fixes:
        for one in fixes:
            one.apply()
        subject = _open(chosen, out)
    return told, subject


def _folder_or_file(uri: str) -> str:
    """Where a local SRC is; an index stands for its folder."""
    return os.path.realpath(os.path.dirname(uri) or "." if uri.endswith(".index.json") else uri)


def _open_source(chosen: dict[str, Any]) -> Manifest:
    from flamingo_ckpt.formats import open_checkpoint

    return open_checkpoint(
        chosen["source"], wrapper_key=chosen["wrapper_key"], npy_bfloat16=chosen["npy_bfloat16"]
    )


def _source(subject: Subject, chosen: dict[str, Any]) -> Source | None:
    if chosen["source"] is None:
        return None
    if _folder_or_file(chosen["source"]) == _folder_or_file(chosen["src"]):
        raise CkptError(
            "the source is the release itself: it would be compared with itself, and agree",
            code="FC006",
            hint="--source names what it was made from",
        )
    from flamingo_ckpt.release.behaviour import Source

    def make_plan() -> Plan:
        from flamingo_ckpt.inspection import find_layout, other_layout

        manifest = _open_source(chosen)
        assert subject.manifest is not None
        to = other_layout(manifest, find_layout(subject.manifest))
        mapped = chosen if to or chosen["to"] else {**chosen, **_ONLY_MAPPED}
        return plan_source(manifest, mapped, writes=False, to=to).plan

    def open_pair() -> Any:
        from flamingo_ckpt.parity import open_pair as pair

        return pair(
            chosen["source"],
            subject.uri,
            config=chosen["config"],
            bases=open_bases(chosen),
            source_layout=chosen["source_layout"],
            wrapper_key=chosen["wrapper_key"],
            npy_bfloat16=chosen["npy_bfloat16"],
        )

    named = getattr(chosen["source"], "uri", chosen["source"])
    return Source(uri=named, make_plan=make_plan, open_pair=open_pair)


def _recorder(
    subject: Subject, chosen: dict[str, Any], out: Output, notes: list[Finding]
) -> Callable[[list[Outcome]], Subject]:
    """What writes the record once bits and behaviour are judged, and before the card is read."""

    def write(made: list[Outcome]) -> Subject:
        from flamingo_ckpt.release.record import record_of, write_record

        source = _open_source(chosen)
        record = record_of(made, source)
        if record is None or not subject.is_folder:
            notes.append(
                Finding(
                    code="FC611",
                    severity="info",
                    detail="the conversion record was not written: the weights are not as the "
                    "source gives them, or SRC is no folder",
                    data={"check": "card"},
                )
            )
            return subject
        write_record(os.path.join(subject.root, "README.md"), record)
        return _open(chosen, out)

    return write


def _inputs(subject: Subject, chosen: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The release, whatever is wrong with it (findings name files in it), then its source."""
    if subject.manifest is not None:
        found = [describe_release(subject.manifest)]
    else:
        unknown = dict.fromkeys(("format", "layout", "prefix", "wrapper"))
        num_bytes = sum(one.num_bytes for one in subject.files)
        found = [{"uri": subject.uri, **unknown, "num_tensors": 0, "num_bytes": num_bytes}]
    if chosen["source"] is not None:
        try:
            found.append(describe_release(_open_source(chosen)))
        except CkptError:
            pass  # told by the check of bits
    return tuple(found)


def _tensors(subject: Subject) -> list[dict[str, Any]]:
    from flamingo_ckpt.inspection import tensor_rows

    return tensor_rows(subject.manifest) if subject.manifest is not None else []


def _details(result: CheckResult) -> dict[str, Any]:
    from flamingo_ckpt.release.check import details_of

    return {name: details_of(result, name) for name in ("bits", "parity", "content")}
