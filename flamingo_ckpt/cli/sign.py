"""`flamingo-ckpt sign DIR`."""

from __future__ import annotations

import os
import time

import click

from flamingo_ckpt.cli.options import verb
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report

EPILOG = """\b
Examples:
  flamingo-ckpt sign release/ --private-key key.pem
  flamingo-ckpt sign release/
  flamingo-ckpt verify-signature release/ --public-key key.pub.pem
"""


@click.command(epilog=EPILOG, short_help="Sign a release.")
@click.argument("folder", metavar="DIR")
@click.option(
    "--private-key", metavar="FILE", help="PEM of an elliptic key. Default: sign with Sigstore."
)
@click.option("--identity-token", metavar="TOKEN", help="For Sigstore, instead of a browser.")
@click.option("--signature", metavar="FILE", help="Where it is written. Default: model.sig in DIR.")
@verb
def sign(
    *,
    folder: str,
    private_key: str | None,
    identity_token: str | None,
    signature: str | None,
    out: Output,  # noqa: ARG001
    argv: tuple[str, ...],
    started: float,
) -> Report:
    """Sign every file of DIR with OpenSSF model-signing, which the extra `sign` brings.

    It is the last step before an upload: a file that changes afterwards breaks the signature.
    """
    from flamingo_ckpt.release import signature as signing

    check_folder(folder)
    if private_key is not None and identity_token is not None:
        raise CkptError("--private-key and --identity-token are two ways to sign", code="FC006")
    target = signature or os.path.join(folder, signing.SIGNATURE_NAME)
    signing.sign(folder, target, private_key=private_key, identity_token=identity_token)
    return Report(
        command="sign",
        argv=argv,
        verdict="pass",
        exit_code=0,
        summary={"signature": target, "signed_with": "key" if private_key else "sigstore"},
        duration_seconds=time.monotonic() - started,
    )


def check_folder(folder: str) -> None:
    """Raise FC002 for what is no folder."""
    if not os.path.isdir(folder):
        raise CkptError(
            f"`{folder}` is no folder",
            code="FC002",
            where=folder,
            hint="a signature is of a whole release folder",
        )
