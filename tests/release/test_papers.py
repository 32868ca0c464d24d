"""Manifest and signature: as the programs of others read them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.release.faults import NOTES, told
from tests.release.releases import read_weights, safetensors_bytes, sums_of, write
from tests.support import cli, cli_ok, tree

SUMS = "SHA256SUMS"


def sha256sum(folder: Path, name: str = SUMS) -> bool:
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "--quiet", name],
        cwd=folder, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode == 0


@pytest.fixture
def listed(release: Path) -> Path:
    """A release with the manifest that the command writes."""
    (release / SUMS).unlink()
    cli_ok("manifest", release)
    return release


def test_sha256sum_accepts_the_manifest(listed: Path) -> None:
    assert sha256sum(listed)
    assert (listed / SUMS).read_text() == sums_of(listed)
    outcome = cli("check", listed, "--json")
    assert (outcome.code, told(outcome)) == (0, NOTES)
    assert cli("manifest", listed, "--check").code == 0
    before = tree(listed)
    cli_ok("manifest", listed)
    assert tree(listed) == before


def test_the_manifest_has_every_tensor(listed: Path) -> None:
    document = json.loads((listed / "manifest.json").read_text())
    tensors, _ = read_weights(listed)
    found = {
        one["name"]: (one["dtype"], one["shape"], one["sha256"]) for one in document["tensors"]
    }
    assert found == {
        name: ("F32", [*array.shape], hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in tensors.items()
    }


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("LICENSE", lambda path: path.write_text("changed\n")),
        ("LICENSE", lambda path: path.unlink()),
        ("new.txt", lambda path: path.write_text("new\n")),
    ],
)
def test_what_changed_since(listed: Path, path: str, change: Any) -> None:
    change(listed / path)
    outcome = cli("manifest", listed, "--check", "--json")
    assert (outcome.code, told(outcome)) == (1, {("FC607", "error", path)})
    assert told(cli("check", listed, "--json")) >= {("FC607", "error", path)}


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["files"][1].update(sha256="0" * 64),
        lambda document: document["files"].pop(),
        lambda document: document["tensors"][0].update(shape=[1]),
        lambda document: document["tensors"].pop(),
    ],
)
def test_a_manifest_of_tensors_that_is_of_another_release(listed: Path, change: Any) -> None:
    """Its own line in the sums is right, and what it says is not."""
    document = json.loads((listed / "manifest.json").read_text())
    change(document)
    write(listed / "manifest.json", json.dumps(document))
    write(listed / SUMS, sums_of(listed))
    assert sha256sum(listed)
    outcome = cli("check", listed, "--json")
    assert (outcome.code, told(outcome)) == (1, NOTES | {("FC607", "error", "manifest.json")})


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"tool": {"name": "flamingo-ckpt"}, "files": 3}', '{"name": "of npm"}']
)
def test_a_manifest_of_another_form(release: Path, text: str) -> None:
    write(release / "manifest.json", text)
    write(release / SUMS, sums_of(release))
    outcome = cli("check", release, "--json")
    stale = {("FC607", "error", "manifest.json")} if "flamingo" in text else set()
    assert told(outcome) == NOTES | stale


def test_sums_that_others_write(release: Path) -> None:
    """`find . -type f | xargs sha256sum` puts `./` before each name; some have capital letters."""
    lines = [line.split("  ") for line in sums_of(release).splitlines()]
    write(release / SUMS, "".join(f"{digest.upper()} *./{name}\n" for digest, name in lines))
    assert sha256sum(release)
    assert told(cli("check", release, "--json")) == NOTES


@pytest.mark.parametrize(
    "change", [str.upper, lambda text: text.replace("\n", "\r\n"), lambda text: text[1:]]
)
def test_sums_are_taken_where_sha256sum_takes_them(release: Path, change: Any) -> None:
    write(release / SUMS, change(sums_of(release)))
    assert (cli("check", release, "--json").code == 0) == sha256sum(release)


@pytest.mark.parametrize("name", ["a b.txt", "é.txt", "-n", " x", "#x", "*x"])
def test_names_that_shells_stumble_over(release: Path, name: str) -> None:
    write(release / name, "x\n")
    (release / SUMS).unlink()
    cli_ok("manifest", release)
    assert sha256sum(release)
    assert cli("manifest", release, "--check").code == 0


@pytest.mark.parametrize(
    "name", ["a\nb", "a\\b", "a\x1b", b"a\xff".decode("utf-8", "surrogateescape")]
)
def test_names_that_cannot_be_listed(release: Path, name: str) -> None:
    write(release / name, "x\n")
    before = tree(release)
    outcome = cli("manifest", release, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC505"])
    assert tree(release) == before
    if "\\" not in name:
        assert "FC505" in cli("check", release, "--json").codes


def test_the_manifest_of_a_single_file(clean: Path, tmp_path: Path) -> None:
    tensors, _ = read_weights(clean)
    write(tmp_path / "m.safetensors", safetensors_bytes(tensors))
    cli_ok("manifest", tmp_path / "m.safetensors")
    assert sha256sum(tmp_path, "m.safetensors.sha256")
    assert cli("manifest", tmp_path / "m.safetensors", "--check").code == 0


def test_a_dry_run_writes_nothing(release: Path) -> None:
    before = tree(release)
    outcome = cli_ok("manifest", release, "--dry-run", "--json")
    assert tree(release) == before
    assert outcome.document["written"] == []


def test_no_manifest_to_compare_with(release: Path) -> None:
    (release / SUMS).unlink()
    outcome = cli("manifest", release, "--check", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC612"])


# Signatures.


def make_key(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public) key of an elliptic curve, by OpenSSL's library."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def signed(release: Path) -> tuple[Path, Path]:
    """(signed release, public key)."""
    pytest.importorskip("model_signing")
    private, public = make_key(release.parent, "key")
    cli_ok("sign", release, "--private-key", private)
    return release, public


def by_policy(release: Path, public: Path) -> Path:
    policy = release.parent / "policy.toml"
    policy.write_text(
        f"[policy]\nrequired = ['signature']\n[policy.signature]\npublic_key = '{public}'\n"
    )
    return policy


SIGNED_NOTES = NOTES - {("FC614", "info", "model.sig")}


def test_a_signature_holds(signed: tuple[Path, Path]) -> None:
    release, public = signed
    assert cli("verify-signature", release, "--public-key", public).code == 0
    outcome = cli("check", release, "--policy", by_policy(release, public), "--json")
    assert (outcome.code, told(outcome)) == (0, SIGNED_NOTES)
    assert outcome.document["summary"]["checks"]["signature"] == "pass"
    nobody = cli("check", release, "--json")
    assert nobody.document["summary"]["checks"]["signature"] == "skip"


def test_a_signature_without_a_signer_in_the_policy_is_not_required_and_passed(
    signed: tuple[Path, Path],
) -> None:
    release, _ = signed
    policy = release.parent / "policy.toml"
    policy.write_text("[policy]\nrequired = ['signature']\n")
    assert cli("check", release, "--policy", policy, "--json").code == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write(folder / "LICENSE", "changed\n"),
        lambda folder: (folder / "LICENSE").unlink(),
        lambda folder: write(folder / "new.txt", "new\n"),
        lambda folder: write(folder / "deep" / "new.txt", "new\n"),
        lambda folder: shutil.move(folder / "LICENSE", folder / "COPYING"),
        lambda folder: write(folder / "model.sig", "{}"),
        lambda folder: write(folder / "model.sig", b"\x00\xff"),
    ],
)
def test_a_signature_is_of_exactly_these_files(signed: tuple[Path, Path], change: Any) -> None:
    release, public = signed
    change(release)
    outcome = cli("verify-signature", release, "--public-key", public, "--json")
    assert (outcome.code, outcome.codes) == (1, ["FC608"])
    write(release / SUMS, sums_of(release))  # the manifest is right, the signature is not
    checked = cli("check", release, "--policy", by_policy(release, public), "--json")
    assert checked.code == 1
    assert ("FC608", "error", "model.sig") in told(checked)


def test_the_key_of_somebody_else(signed: tuple[Path, Path]) -> None:
    release, _ = signed
    _, other = make_key(release.parent, "other")
    assert cli("verify-signature", release, "--public-key", other, "--json").codes == ["FC608"]
    checked = cli("check", release, "--policy", by_policy(release, other), "--json")
    assert (checked.code, told(checked)) == (1, SIGNED_NOTES | {("FC608", "error", "model.sig")})


def test_what_hub_and_downloads_put_beside_does_not_break_a_signature(
    signed: tuple[Path, Path],
) -> None:
    release, public = signed
    write(release / ".cache" / "huggingface" / "x.metadata", "x\n")
    write(release / ".gitattributes", "*.safetensors filter=lfs\n")
    write(release / ".git" / "HEAD", "ref: refs/heads/main\n")
    assert cli("verify-signature", release, "--public-key", public).code == 0


@pytest.mark.parametrize("key", ["no key", None])
def test_keys_that_are_none(release: Path, key: str | None) -> None:
    pytest.importorskip("model_signing")
    path = release.parent / "key.pem"
    if key is not None:
        path.write_text(key)
    before = tree(release)
    outcome = cli("sign", release, "--private-key", path, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC608"])
    assert tree(release) == before


def test_a_token_of_a_signer_is_in_no_report(release: Path) -> None:
    token = "eyJhbGciOiJSUzI1NiJ9.secretsecretsecret.signature"
    options = ["--identity-token", token, "--private-key", "k"]
    for words in (options, [f"--identity-token={token}", "--private-key", "k"]):
        outcome = cli("sign", release, *words, "--json")
        assert outcome.code == 2
        assert "secretsecret" not in outcome.out + outcome.err
