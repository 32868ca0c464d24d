"""The policy: what is required, what is let pass, and that nothing passes which did not run."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from tests.release.faults import FAULTS, NOTES, TOKEN, told
from tests.release.releases import (
    SHARDS,
    edit_json,
    edit_text,
    write,
    write_sums,
)
from tests.support import Outcome, cli

WAIVER = """
[[policy.waiver]]
code = "{code}"
key = "{key}"
reason = "known"
owner = "release-team"
until = {until}
"""
TOMORROW = datetime.date.today() + datetime.timedelta(days=1)
YESTERDAY = datetime.date.today() - datetime.timedelta(days=2)


def waiver(code: str, key: str, until: datetime.date = TOMORROW) -> str:
    return WAIVER.format(code=code, key=key, until=until.isoformat())


def check(release: Path, policy: str, *options: object) -> Outcome:
    path = release.parent / "flamingo-ckpt.toml"
    path.write_text(policy)
    return cli("check", release, "--policy", path, "--json", *options)


def unlicensed(release: Path) -> Path:
    edit_text(release / "README.md", "license: mit\n", "")
    write_sums(release)
    return release


def test_a_waiver_lets_its_finding_pass_and_is_told(release: Path) -> None:
    outcome = check(unlicensed(release), waiver("FC601", "lic*"))
    assert (outcome.code, told(outcome)) == (0, NOTES)
    document = outcome.document
    assert document["summary"]["waived"] == 1
    assert document["summary"]["checks"]["card"] == "pass"
    (row,) = [one for one in document["checks"] if one["name"] == "card"]
    assert row["sentence"].endswith("(1 waived)")
    (told_waiver,) = document["waived"]
    assert told_waiver["code"] == "FC601"
    assert told_waiver["check"] == "card"
    assert told_waiver["severity"] == "error"
    assert told_waiver["owner"] == "release-team"
    assert told_waiver["until"] == TOMORROW.isoformat()
    text = cli("check", release, "--policy", release.parent / "flamingo-ckpt.toml").out
    assert "known" in text
    assert "1 waived" in text


def test_a_waiver_holds_to_the_end_of_its_day(release: Path) -> None:
    assert check(unlicensed(release), waiver("FC601", "*", datetime.date.today())).code == 0


def test_an_expired_waiver_lets_nothing_pass_and_is_an_error(release: Path) -> None:
    outcome = check(unlicensed(release), waiver("FC601", "license", YESTERDAY))
    wanted = {("FC601", "error", "license"), ("FC621", "error", "FC601 license")}
    assert (outcome.code, told(outcome)) == (1, NOTES | wanted)


def test_an_expired_waiver_fails_a_release_without_fault(clean: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(waiver("FC601", "license", YESTERDAY))
    assert cli("check", clean, "--policy", policy, "--json").code == 1


@pytest.mark.parametrize(("code", "key"), [("FC601", "licence"), ("FC602", "license")])
def test_a_waiver_that_fits_nothing_is_told(release: Path, code: str, key: str) -> None:
    outcome = check(unlicensed(release), waiver(code, key))
    wanted = {("FC601", "error", "license"), ("FC622", "warning", f"{code} {key}")}
    assert (outcome.code, told(outcome)) == (1, NOTES | wanted)


def test_what_cannot_be_read_has_not_passed_when_it_is_waived(release: Path) -> None:
    """A waiver lets a fault pass, and not a check that the fault kept from running."""
    FAULTS["hole"].plant(release)
    write_sums(release)
    outcome = check(release, waiver("FC103", "*"))
    assert outcome.code == 3
    checks = outcome.document["summary"]["checks"]
    assert {checks[name] for name in ("container", "keys", "values", "config")} == {"skip"}


def test_a_config_that_cannot_be_read_has_not_passed_when_it_is_waived(release: Path) -> None:
    write(release / "config.json", "{")
    write_sums(release)
    outcome = check(release, waiver("FC401", "*"))
    assert outcome.code == 3
    assert outcome.document["summary"]["checks"]["config"] == "skip"


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (waiver("FC501", "*"), "cannot be waived"),
        (waiver("FC623", "keys"), "cannot be waived"),
        (waiver("FC999", "*"), "no code of a finding"),
        (waiver("FC601", ""), "policy.waiver[0].key"),
        (waiver("FC601", "*").replace("until", "untill"), "policy.waiver[0].untill"),
        (waiver("FC601", "*").replace('owner = "release-team"', ""), "policy.waiver[0].owner"),
        (waiver("FC601", "*").replace(TOMORROW.isoformat(), '"soon"'), "no date"),
        ("[policy]\nrequire = ['keys']", "`policy.require` is not known"),
        ("[polcy]\n", "`polcy` is not known"),
        ("[policy]\nrequired = ['kees']", "kees"),
        ("[policy]\nrequired = 'keys'", "not a list of words"),
        ("[policy]\nstrict = 'yes'", "neither true nor false"),
        ("policy = 3", "not a table"),
        ("[[policy]]\nstrict = true", "not a table"),
        ("[policy]\nwaiver = 1", "waiver"),
        ("[policy.severity]\nFC501 = 'info'", "FC501 stays an error"),
        ("[policy.severity]\nFC601 = 'harmless'", "none of error"),
        ('[policy.severity]\n"FC\\u001b" = "info"', r"FC\x1b"),
        ("[policy.tolerance]\nnorm_factor = nan", "above 1"),
        ("[policy.parity]\ndtypes = []", "nothing would be compared"),
        ("[policy.parity]\ngates = []", "nothing would be compared"),
        ("[policy.parity]\ndevice = 'tpu'", "device"),
        ("[policy.parity]\nseed = true", "seed"),
        ("[policy.signature]\nidentity = 'me'", "identity_provider"),
        ("[policy.signature]\npublic_key = 'k'\nidentity = 'me'", "identity_provider"),
        ("not toml", "not TOML"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(
    clean: Path, tmp_path: Path, policy: str, said: str
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy)
    outcome = cli("check", clean, "--policy", path, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC620"])
    assert said in outcome.document["findings"][0]["detail"]


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nflamingo-ckpt = 3\n"])
def test_a_pyproject_of_another_form(
    clean: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    outcome = cli("check", clean, "--json")
    assert outcome.code == (2 if "flamingo" in text else 0)


def test_a_policy_is_found_in_the_current_folder(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (release.parent / "pyproject.toml").write_text(
        "[tool.flamingo-ckpt.policy]\nlicenses = ['apache-2.0']\n"
    )
    monkeypatch.chdir(release.parent)
    outcome = cli("check", "release", "--json")
    assert told(outcome) == NOTES | {("FC601", "error", "license")}
    assert outcome.document["policy"]["source"].endswith("pyproject.toml")


@pytest.mark.parametrize("inside", [".", "docs"])
def test_a_release_does_not_set_its_own_standard(
    release: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlicensed(release)
    write(release / inside / "flamingo-ckpt.toml", waiver("FC601", "*"))
    write_sums(release)
    monkeypatch.chdir(release / inside)
    outcome = cli("check", release, "--json")
    assert (outcome.code, told(outcome)) == (1, NOTES | {("FC601", "error", "license")})
    assert outcome.document["policy"]["source"] is None


@pytest.mark.parametrize("name", ["bits", "parity", "signature"])
def test_what_is_required_and_did_not_run_is_never_0(
    clean: Path, tmp_path: Path, name: str
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f"[policy]\nrequired = ['{name}']\n")
    outcome = cli("check", clean, "--policy", policy, "--json")
    notes = NOTES | {("FC623", "warning", name)}
    assert (outcome.code, told(outcome)) == (3, notes)
    assert outcome.document["verdict"] == "incomplete"
    strict = cli("check", clean, "--policy", policy, "--strict", "--json")
    assert strict.code == 3


def test_what_is_missing_and_what_is_wrong_is_wrong(release: Path) -> None:
    outcome = check(unlicensed(release), "[policy]\nrequired = ['parity', 'card']\n")
    assert outcome.code == 1
    assert ("FC623", "warning", "parity") in told(outcome)


def test_a_severity_of_ones_own(release: Path) -> None:
    (release / SHARDS[0]).chmod(0o600)
    outcome = check(release, "[policy.severity]\nFC115 = 'error'\nFC611 = 'warning'\n")
    wanted = {("FC115", "error", SHARDS[0]), ("FC611", "warning", "record")}
    assert (outcome.code, told(outcome)) == (1, NOTES - {("FC611", "info", "record")} | wanted)


def test_the_severity_of_a_waiver_that_fits_nothing(clean: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(waiver("FC601", "*") + "[policy.severity]\nFC622 = 'error'\n")
    assert cli("check", clean, "--policy", policy, "--json").code == 1


def test_strict_makes_of_a_warning_a_fault(release: Path) -> None:
    (release / SHARDS[0]).chmod(0o600)
    assert cli("check", release, "--json").code == 0
    assert cli("check", release, "--strict", "--json").code == 1
    assert check(release, "[policy]\nstrict = true\n").code == 1


def test_strict_and_clean(clean: Path) -> None:
    assert cli("check", clean, "--strict", "--json").code == 0


def test_headers_alone(release: Path) -> None:
    """What reads no data finds no NaN; it says what it left out, and does not call it passed."""
    FAULTS["nan"].plant(release)
    FAULTS["missing tensor"].plant(release)
    outcome = cli("check", release, "--level", "headers", "--json")
    document = outcome.document
    assert (outcome.code, document["level"]) == (1, "headers")
    checks = document["summary"]["checks"]
    skipped = {name for name, status in checks.items() if status == "skip"}
    assert skipped == {"bits", "values", "parity", "manifest", "signature"}
    assert "FC203" in outcome.codes
    assert "FC352" not in outcome.codes
    assert document["files"] == []


def test_headers_of_a_clean_release(clean: Path) -> None:
    outcome = cli("check", clean, "--level", "headers")
    assert outcome.code == 0
    assert "ready as far as headers tell" in outcome.out


def test_a_secret_is_in_no_report(release: Path, tmp_path: Path) -> None:
    write(release / "run.sbatch", f"export HF_TOKEN={TOKEN}\ncd /home/{TOKEN}/x\n")
    edit_json(release / "config.json", lambda d: d.update(_name_or_path=f"/home/a/{TOKEN}"))
    outcome = cli("check", release, "--json", "--output", tmp_path / "report.html")
    assert "FC509" in outcome.codes
    text = cli("check", release, "-v")
    for place in (outcome.out, text.out, text.err, (tmp_path / "report.html").read_text()):
        assert TOKEN not in place
        assert TOKEN[:20] not in place
