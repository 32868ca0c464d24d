"""`flamingo-ckpt push DIR URI`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from flamingo_ckpt import __version__
from flamingo_ckpt.cli.options import verb
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.report.document import Report, to_document

if TYPE_CHECKING:
    from flamingo_ckpt.hub.upload import Commit
    from flamingo_ckpt.transfer.push import LocalFile, PushPlan

EPILOG = """\b
Examples:
  flamingo-ckpt check release/ --output report.json
  flamingo-ckpt push release/ hf://someone/model --report report.json --dry-run
  flamingo-ckpt push release/ hf://someone/model --report report.json
  flamingo-ckpt push release/ hf://someone/new --report report.json --create --private --direct
"""


@click.command(epilog=EPILOG, short_help="A checked release to the hub, as a pull request.")
@click.argument("folder", metavar="DIR")
@click.argument("uri")
@click.option("--report", "report_path", metavar="FILE", help="The JSON report of DIR's check.")
@click.option("--no-check", is_flag=True, help="Push without one; the commit says so.")
@click.option("--direct", is_flag=True, help="Commit to the branch; no pull request.")
@click.option("--message", metavar="TEXT", help="First line of the commit.")
@click.option("--create", is_flag=True, help="Make the repository if there is none.")
@click.option("--private", is_flag=True, help="Make it a private one.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@verb
def push(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Upload DIR to hf://OWNER/NAME[@BRANCH][/FOLDER]: exactly the files that a check has passed.

    A pull request is opened unless --direct is given. --report names the report of a `check` of
    DIR that passed; a file that it has not seen, or not with these bytes, stops the push. Hidden
    files are never sent, links are not followed out of DIR, and nothing is deleted on the hub.
    """
    from flamingo_ckpt.transfer.push import no_report, plan_push, run_push

    _check_options(chosen)
    files, left = _list_files(chosen, out)
    findings: list[Finding] = []
    seen = _match_report(chosen, files)
    if seen is None and not chosen["no_check"]:
        missing = no_report(chosen["folder"])
        if not chosen["dry_run"]:
            raise missing
        findings.append(_as_warning(missing))
    plan = plan_push(chosen["uri"], files, left, create=chosen["create"])
    commit = None
    if plan.sent and not chosen["dry_run"]:
        commit = run_push(
            plan,
            message=chosen["message"] or _message(chosen["folder"]),
            description=_description(seen),
            direct=chosen["direct"],
            private=chosen["private"],
            shows_progress=out.draws,
        )
    return _report(plan, commit, chosen, [*findings, *plan.findings], argv, started)


def _check_options(chosen: dict[str, Any]) -> None:
    from flamingo_ckpt import hub

    hub.parse_uri(chosen["uri"])
    if chosen["report_path"] and chosen["no_check"]:
        raise CkptError(
            "--report and --no-check contradict each other", code="FC006", hint="leave one out"
        )
    if chosen["private"] and not chosen["create"]:
        raise CkptError(
            "--private is about a repository that --create makes",
            code="FC006",
            hint="add --create, or leave --private out",
        )
    if chosen["message"] is not None and not chosen["message"].strip():
        raise CkptError("--message is empty", code="FC006", hint="leave it out")


def _list_files(
    chosen: dict[str, Any], out: Output
) -> tuple[list[LocalFile], list[tuple[str, str]]]:
    from flamingo_ckpt.transfer.push import list_local, num_bytes_of

    folder = chosen["folder"]
    with out.progress_bar([("hashing", num_bytes_of(folder))]) as progress:
        return list_local(folder, chosen["report_path"], progress.phase("hashing"))


def _match_report(chosen: dict[str, Any], files: list[LocalFile]) -> dict[str, Any] | None:
    """The report of the check, held to the files; None where there is none."""
    from flamingo_ckpt.report.stored import read_report
    from flamingo_ckpt.transfer.push import match_report

    path = chosen["report_path"]
    if not path:
        return None
    try:
        document = to_document(read_report(path))
    except CkptError as error:
        if error.code != "FC011":
            raise
        raise CkptError(
            f"this report is not one of a passing check: {error.message}",
            code="FC630",
            where=path,
            hint=error.hint,
        ) from None
    match_report(document, path, files, chosen["folder"])
    return document


def _message(folder: str) -> str:
    name = os.path.basename(os.path.abspath(folder))
    return f"Upload {name} with flamingo-ckpt"


def _description(seen: dict[str, Any] | None) -> str:
    from flamingo_ckpt.transfer.push import NO_CHECK

    if seen is None:
        return NO_CHECK
    tool = seen["tool"]["version"]
    ran = [name for name, word in seen["summary"].get("checks", {}).items() if word != "skip"]
    waived = int(seen["summary"].get("waived", 0))
    let_pass = f" {waived} findings were waived by its policy." if waived else ""
    return (
        f"Checked by flamingo-ckpt {tool}: {', '.join(ran)}.{let_pass} "
        f"Uploaded by flamingo-ckpt {__version__}."
    )


def _as_warning(error: CkptError) -> Finding:
    return Finding(code=error.code, severity="warning", detail=error.message, hint=error.hint)


def _report(
    plan: PushPlan,
    commit: Commit | None,
    chosen: dict[str, Any],
    findings: list[Finding],
    argv: tuple[str, ...],
    started: float,
) -> Report:
    sent = plan.sent
    listed = {
        "uri": chosen["folder"],
        "format": None,
        "layout": None,
        "prefix": None,
        "wrapper": None,
        "num_tensors": 0,
        "num_bytes": sum(one.local.num_bytes for one in plan.files),
    }
    return Report(
        command="push",
        argv=argv,
        verdict="pass",
        exit_code=0,
        inputs=(listed,),
        summary={
            "num_files": len(plan.files),
            "num_sent": len(sent),
            "num_bytes_sent": sum(one.local.num_bytes for one in sent),
            "num_same": len(plan.files) - len(sent),
            "num_left": len(plan.left),
            "num_stays": len(plan.stays),
        },
        findings=tuple(findings),
        duration_seconds=time.monotonic() - started,
        extra={
            "dst": plan.uri,
            "parent": plan.head,
            "dry_run": chosen["dry_run"],
            "checked": chosen["report_path"] is not None,
            "commit": commit.oid if commit else None,
            "commit_url": commit.url if commit else None,
            "pull_request": commit.pull_request if commit else None,
            "files": [
                {
                    "path": one.target,
                    "num_bytes": one.local.num_bytes,
                    "sha256": one.local.sha256,
                    "status": one.status,
                }
                for one in plan.files
            ],
            "left": [{"path": path, "reason": why} for path, why in plan.left],
            "stays": list(plan.stays),
        },
    )
