"""`flamingo-ckpt verify-signature DIR`."""

from __future__ import annotations

import os
import time

import click

from flamingo_ckpt.cli.options import verb
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.cli.sign import check_folder
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report

EPILOG = """\b
Examples:
  flamingo-ckpt verify-signature release/ --public-key key.pub.pem
  flamingo-ckpt verify-signature release/ --identity me@example.org --identity-provider https://...
"""


@click.command(
    "verify-signature", epilog=EPILOG, short_help="Is DIR exactly what its signer signed."
)
@click.argument("folder", metavar="DIR")
@click.option("--public-key", metavar="FILE", help="PEM of the signer's elliptic key.")
@click.option("--identity", metavar="NAME", help="Of the signer, for Sigstore.")
@click.option("--identity-provider", metavar="URL", help="Who vouches for the identity.")
@click.option("--signature", metavar="FILE", help="Default: model.sig in DIR.")
@verb
def verify_signature(
    *,
    folder: str,
    public_key: str | None,
    identity: str | None,
    identity_provider: str | None,
    signature: str | None,
    out: Output,  # noqa: ARG001
    argv: tuple[str, ...],
    started: float,
) -> Report:
    """Verify the signature of DIR with OpenSSF model-signing, which the extra `sign` brings.

    Exit 0 when it is of exactly these files and by this signer, 1 when it is not, 2 when that
    cannot be told.
    """
    from flamingo_ckpt.release import signature as signing

    check_folder(folder)
    by_identity = identity is not None and identity_provider is not None
    if (public_key is not None) == by_identity or (identity is None) != (identity_provider is None):
        raise CkptError(
            "whose signature should it be?",
            code="FC006",
            hint="--public-key, or --identity together with --identity-provider",
        )
    source = signature or os.path.join(folder, signing.SIGNATURE_NAME)
    if not os.path.isfile(source):
        raise CkptError(f"there is no signature `{source}`", code="FC002", where=source)
    summary = {"signature": source, "signer": public_key or identity}
    try:
        signing.verify(
            folder,
            source,
            public_key=public_key,
            identity=identity,
            identity_provider=identity_provider,
        )
    except CkptError as error:
        if error.code != "FC608":
            raise
        return Report(
            command="verify-signature",
            argv=argv,
            verdict="fail",
            exit_code=1,
            summary=summary,
            findings=(error.as_finding(),),
            duration_seconds=time.monotonic() - started,
        )
    return Report(
        command="verify-signature",
        argv=argv,
        verdict="pass",
        exit_code=0,
        summary=summary,
        duration_seconds=time.monotonic() - started,
    )
