"""What stayed on the hub is not called absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo_ckpt.release.folder import not_here
from flamingo_ckpt.release.manifest import check_manifest
from flamingo_ckpt.release.signature import check_signature
from flamingo_ckpt.release.subject import Subject


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.sig"])
def test_a_manifest_or_signature_that_was_not_downloaded(name: str, tmp_path: Path) -> None:
    file = not_here(name, 10)
    subject = Subject(uri="hf://a/b", root=str(tmp_path), files=(file,), by_path={name: file})
    made = check_manifest(subject, ()) if name == "SHA256SUMS" else check_signature(subject, {})
    assert (made.status, made.findings) == ("skip", ())
    assert made.sentence.startswith(f"`{name}` stayed on the hub")
