"""Signatures by OpenSSF model-signing, which does the work where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, Final

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.folder import NEVER_UPLOADED
from flamingo_ckpt.release.manifest import SIGNATURE_NAMES
from flamingo_ckpt.release.result import Outcome, skipped
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import escape

SIGNATURE_NAME: Final = SIGNATURE_NAMES[0]
#: What the library says of two digests, as bytes in Python's notation; the file is what matters.
_DIGESTS: Final = re.compile(r": Expected 'Digest\(.*?\)', Actual 'Digest\(.*?\)'")
_INSTALL = "pip install 'flamingo-ckpt[sign]'"


def is_installed() -> bool:
    """Whether model-signing is there; it is not imported."""
    return importlib.util.find_spec("model_signing") is not None


def sign(
    folder: str, signature: str, *, private_key: str | None, identity_token: str | None
) -> None:
    """Sign every file of a folder but the signature.

    Args:
        folder: the release.
        signature: file to write.
        private_key: PEM of an elliptic key; None signs with Sigstore, which needs the network.
        identity_token: of Sigstore's sign-in, instead of a browser.

    Raises:
        CkptError: FC608 where it cannot be signed, FC012 without model-signing.
    """
    signing = _library().signing
    folder, signature = os.path.abspath(folder), os.path.abspath(signature)
    config = signing.Config().set_hashing_config(_hashing(folder, signature))
    try:
        if private_key is not None:
            config = config.use_elliptic_key_signer(private_key=private_key)
        else:
            config = config.use_sigstore_signer(identity_token=identity_token)
        config.sign(folder, signature)
    except Exception as error:  # of its cryptography, and of files that are no keys
        raise _failed("cannot sign", error, folder) from error


def verify(
    folder: str,
    signature: str,
    *,
    public_key: str | None = None,
    identity: str | None = None,
    identity_provider: str | None = None,
) -> None:
    """Raise unless the signature is of exactly these files and by this signer.

    Raises:
        CkptError: FC608 where it is not, FC012 without model-signing.
    """
    verifying = _library().verifying
    folder, signature = os.path.abspath(folder), os.path.abspath(signature)
    config = verifying.Config().set_hashing_config(_hashing(folder, signature))
    try:
        if public_key is not None:
            config = config.use_elliptic_key_verifier(public_key=public_key)
        else:
            config = config.use_sigstore_verifier(identity=identity, oidc_issuer=identity_provider)
        config.verify(folder, signature)
    except Exception as error:
        raise _failed("the signature does not hold", error, folder) from error


def _hashing(folder: str, signature: str) -> Any:
    """Every file counts but the signature, what downloads keep beside, and what is git's own.

    The hub adds `.gitattributes` after the signature was made. Paths are absolute, as the library
    compares them.
    """
    ignored = [os.path.abspath(signature)]
    ignored += [os.path.join(folder, name) for name in NEVER_UPLOADED]
    return _library().hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=True)


def _library() -> Any:
    if not is_installed():
        raise CkptError(
            "model-signing is not installed", code="FC012", hint=f"`{_INSTALL}` brings it"
        )
    return importlib.import_module("model_signing")


def _failed(what: str, error: Exception, where: str) -> CkptError:
    line = (_DIGESTS.sub("", str(error)).splitlines() or [""])[0]
    return CkptError(
        f"{what}: {escape(f'{type(error).__name__}: {line}')[:300]}",
        code="FC608",
        where=where,
        hint="a key is a PEM file of an elliptic curve; a changed file needs a new signature",
    )


def check_signature(subject: Subject, settings: Mapping[str, str]) -> Outcome:
    """The folder's signature against the signer that the policy names."""
    if not subject.is_folder:
        return skipped("signature", "a single file has no signature; check the folder")
    file = subject.by_path.get(SIGNATURE_NAME)
    if file is not None and not file.is_here:
        why = f"`{SIGNATURE_NAME}` stayed on the hub; `--include` of pull brings it"
        return skipped("signature", why)
    if file is None or not file.is_regular:
        note = Finding(
            code="FC614",
            severity="info",
            key=SIGNATURE_NAME,
            detail=f"there is no `{SIGNATURE_NAME}`",
            hint="`flamingo-ckpt sign` writes it",
        )
        return skipped("signature", "the folder is not signed", note)
    if not settings:
        return skipped(
            "signature",
            f"there is a `{SIGNATURE_NAME}`, and the policy does not say whose it should be",
        )
    if not is_installed():
        return skipped("signature", f"model-signing is not installed: {_INSTALL}")
    try:
        verify(subject.root, file.full, **settings)
    except CkptError as error:
        finding = Finding(
            code="FC608",
            severity="error",
            key=SIGNATURE_NAME,
            detail=error.message,
            hint="sign again after the last change, or find out who changed what",
            data={"file": SIGNATURE_NAME},
        )
        return Outcome(name="signature", sentence=error.message, findings=(finding,))
    signer = settings.get("identity") or settings.get("public_key")
    return Outcome(name="signature", sentence=f"signed by `{escape(str(signer))}`")
