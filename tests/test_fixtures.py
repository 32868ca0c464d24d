"""The checked-in files: small, each with its line, and what the script would make again."""

from __future__ import annotations

from pathlib import Path

from tests.support import FIXTURES, facts_at


def checked_in() -> list[Path]:
    return [
        path
        for path in sorted(FIXTURES.rglob("*"))
        if path.is_file()
        and not {"broken", "__pycache__"} & set(path.parts)
        and (path.parent != FIXTURES or path.suffix not in (".py", ".sh", ".md"))
    ]


def test_every_file_has_its_line() -> None:
    lines = (FIXTURES / "README.md").read_text().splitlines()
    listed = {line.split("`")[1] for line in lines if line.startswith("| `")}
    there = set()
    for path in checked_in():
        inside = path.relative_to(FIXTURES)
        there.add(f"{inside.parts[0]}/" if len(inside.parts) > 1 else inside.name)
    scripts = {name for name in listed if name.endswith((".py", ".sh"))}
    assert there == listed - {"broken/"} - scripts
    assert scripts == {
        path.name for path in FIXTURES.iterdir() if path.suffix in (".py", ".sh")
    } - {"handmade.py"}


def test_every_file_is_small() -> None:
    for path in checked_in():
        assert path.stat().st_size < 20_000, path


def test_values_are_random() -> None:
    """Defaults of 0 and 1 would hide a swapped tensor: no two tensors of one file are equal."""
    for path in ("torch-bare.pt", "tiny.safetensors", "sharded", "torchscript.pt", "arrays.npz"):
        facts = facts_at(FIXTURES / path)
        seen: dict[bytes, str] = {}
        for name, fact in facts.items():
            if len(fact.data) < 8 or name.endswith("head.weight"):
                continue
            assert fact.data not in seen, (path, name, seen[fact.data])
            seen[fact.data] = name
