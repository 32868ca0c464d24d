"""The house rules, read from the source: who may import whom, who prints, what is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flamingo_ckpt
from flamingo_ckpt.errors import CODES

PACKAGE = Path(flamingo_ckpt.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "open_clip", "torchvision", "huggingface_hub", "safetensors"}

#: room -> the rooms it may import from, besides itself.
GROUND = {"tensors", "errors"}
ALLOWED: dict[str, set[str]] = {
    "codes": set(),
    "errors": {"codes"},
    "tensors": {"errors"},
    # a remote file is a source of bytes like any other
    "formats": GROUND | {"hub"},
    "layouts": GROUND,
    "plan": GROUND | {"formats", "layouts", "selection"},
    "stream": GROUND | {"formats", "layouts", "plan"},
    "write_plan": GROUND | {"formats", "layouts", "plan", ""},
    "inspection": GROUND | {"formats", "layouts"},
    "convert": GROUND | {"formats", "layouts", "plan", "stream", "write_plan", ""},
    "difference": GROUND | {"formats"},
    "verify": GROUND | {"formats", "layouts", "plan", "stream", "difference"},
    "models": GROUND | {"layouts", "formats", ""},
    "hub": GROUND | {""},
    "loading": GROUND
    | {"formats", "layouts", "plan", "selection", "stream", "write_plan", "models", "hub"}
    | {"report", "convert", "verify", "vocabulary", ""},
    "training": GROUND,
    "selection": GROUND | {"layouts"},
    "vocabulary": GROUND | {"layouts"},
    "bases": GROUND | {"layouts", "selection", "vocabulary"},
    "provenance": GROUND | {"layouts", "bases", "vocabulary"},
    "map_checks": GROUND | {"layouts", "plan", "vocabulary"},
    "map_plan": GROUND
    | {"layouts", "plan", "selection", "bases", "vocabulary", "provenance", "map_checks"},
    "diff": GROUND
    | {"formats", "layouts", "plan", "selection", "provenance", "stream", "verify", "models"}
    | {"difference"},
    "prepare": GROUND
    | {"formats", "layouts", "plan", "selection", "bases", "vocabulary", "map_plan", "map_checks"}
    | {"diff", "models"},
    "parity": GROUND
    | {"formats", "layouts", "plan", "selection", "bases", "vocabulary", "map_plan", "stream"}
    | {"models", "diff", "prepare", "loading"},
    "release": GROUND
    | {"formats", "layouts", "plan", "selection", "bases", "vocabulary", "map_plan", "stream"}
    | {"models", "hub", "diff", "prepare", "verify", "parity", "loading", "inspection"}
    | {"codes", ""},
    # whole releases from the hub and to it
    "transfer": GROUND | {"formats", "hub", ""},
    # the version of the tool is part of every document
    "report": GROUND | {"codes", ""},
    "cli": GROUND
    | {"formats", "layouts", "plan", "stream", "write_plan", "convert", "verify", "inspection"}
    | {"models", "report", "selection", "bases", "prepare", "diff", "parity", "hub", "release"}
    | {"codes", "transfer", ""},
    # the loaders, on demand
    "": {"loading"},
    "__main__": {"cli"},
}
#: Rooms of the standard library alone (and of the rooms they may import).
STANDARD_ONLY = {"codes", "errors", "tensors"}


def room(module: Path) -> str:
    """`formats` for formats/npz.py, `plan` for plan.py, `` for the package itself."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text(), filename=str(module))


def imports(node: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """(dotted name, statement) of everything imported anywhere below."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            base = child.module or ""
            for alias in child.names:
                # `from flamingo_ckpt import inspection` imports a room
                whole = f"{base}.{alias.name}"
                path = PACKAGE.parent / whole.replace(".", "/")
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                yield (whole if is_module else base), child


def ids(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


each_module = pytest.mark.parametrize("module", MODULES, ids=ids)


@each_module
def test_rooms_import_only_what_they_may(module: Path) -> None:
    here = room(module)
    assert here in ALLOWED, f"`{here}` has no place in the house: add it to ALLOWED on purpose"
    for name, _ in imports(tree_of(module)):
        if name.split(".")[0] != "flamingo_ckpt":
            continue
        there = name.split(".")[1] if "." in name else ""
        assert there == here or there in ALLOWED[here], f"{ids(module)} imports {name}"


@each_module
def test_the_ground_floor_needs_the_standard_library_alone(module: Path) -> None:
    if room(module) in STANDARD_ONLY:
        for name, _ in imports(tree_of(module)):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "flamingo_ckpt"


#: Definitions of torch modules: a class statement needs its base. Nothing of the package reaches
#: them but from inside functions, so no command line pays for them that does not build a model.
MODULE_TREES = "flamingo_ckpt.models.modules"


@each_module
def test_heavy_libraries_are_imported_inside_functions(module: Path) -> None:
    tree = tree_of(module)
    inside = {
        id(statement)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for _, statement in imports(function)
    }
    for name, statement in imports(tree):
        heavy = HEAVY | ({"numpy"} if room(module) != "models" else set())
        torch_kind = name.split(".")[0] in ("torch", "transformers")
        if torch_kind and module.parent == PACKAGE / "models" / "modules":
            continue
        is_heavy = name.split(".")[0] in heavy or (
            name.startswith(MODULE_TREES) and module.parent != PACKAGE / "models" / "modules"
        )
        if is_heavy and id(statement) not in inside:
            assert _under_type_checking(tree, statement), f"{ids(module)} imports {name}"


def _under_type_checking(tree: ast.Module, statement: ast.stmt) -> bool:
    return any(
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
        and statement in ast.walk(node)
        for node in tree.body
    )


@each_module
def test_formats_and_layouts_never_touch_a_model_library(module: Path) -> None:
    if room(module) in ("models", "loading", "hub", "training", "parity", "cli"):
        return
    for name, _ in imports(tree_of(module)):
        assert name.split(".")[0] not in HEAVY, f"{ids(module)} imports {name}"


@each_module
def test_only_the_command_line_prints(module: Path) -> None:
    # the table of findings has a command of its own, which writes the document that is made of it
    if room(module) == "cli" or ids(module) == "codes/__main__.py":
        return
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("print", "click.echo", "click.secho", "warnings.warn"), ids(module)
        if called == "logging.getLogger" and [ast.unparse(one) for one in node.args] == [
            "__name__"
        ]:
            continue  # a logger of the module's own, silent until the user wants to hear it
        assert not called.startswith(("sys.stdout", "sys.stderr", "logging.")), ids(module)


@each_module
def test_only_the_command_line_ends_the_process(module: Path) -> None:
    if room(module) in ("cli", "__main__"):
        return
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("sys.exit", "exit", "quit", "os._exit")


@each_module
def test_nothing_can_run_what_a_file_says(module: Path) -> None:
    """No unpickling and no evaluation anywhere in the package."""
    tree = tree_of(module)
    for name, _ in imports(tree):
        assert name.split(".")[0] not in ("pickle", "_pickle", "cloudpickle", "dill", "joblib")
        assert name.split(".")[0] not in ("marshal", "shelve", "zipfile", "subprocess", "socket")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load")


@each_module
def test_public_names_are_documented(module: Path) -> None:
    tree = tree_of(module)
    if module.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{ids(module)} has no docstring"
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        if isinstance(owner, ast.ClassDef) and owner.name.startswith("_"):
            continue
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{ids(module)}: {node.name} has no docstring"


@each_module
def test_results_are_frozen_and_slotted(module: Path) -> None:
    """What travels between rooms does not change on the way."""
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            text = ast.unparse(decorator)
            if text.startswith("dataclass"):
                assert "slots=True" in text, f"{ids(module)}: {node.name}"


@each_module
def test_no_path_of_a_machine_is_written_down(module: Path) -> None:
    assert not re.search(r"/(home|root|tmp|Users)/", module.read_text())


def used_codes() -> dict[str, set[str]]:
    """Every `FC…` string constant of the package, docstrings and the table itself aside."""
    found: dict[str, set[str]] = {}
    for module in MODULES:
        tree = tree_of(module)
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in documentation or room(module) == "codes":
                    continue
                for code in re.findall(r"\bFC\d{3}\b", node.value):
                    found.setdefault(code, set()).add(ids(module))
    return found


def test_every_code_is_in_the_table_and_every_entry_is_used() -> None:
    used = used_codes()
    assert sorted(used.keys() - CODES.keys()) == []
    assert sorted(CODES.keys() - used.keys()) == []


def test_codes_that_docstrings_promise_exist() -> None:
    for module in MODULES:
        for code in re.findall(r"\bFC\d{3}\b", module.read_text()):
            assert code in CODES, f"{ids(module)}: {code}"


@each_module
def test_examples_in_docstrings_run(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = module.relative_to(PACKAGE.parent).with_suffix("").parts
    if ">>>" not in module.read_text():
        return
    monkeypatch.chdir(PACKAGE.parent)  # examples name the fixtures from there
    imported = importlib.import_module(".".join(parts))
    assert doctest.testmod(imported).failed == 0


def test_titles_are_distinct() -> None:
    assert len(set(CODES.values())) == len(CODES)


def test_every_room_has_its_tests() -> None:
    """Tests mirror the package."""
    tests = Path(__file__).parent
    for name in (*("formats", "layouts", "models", "loading", "report", "cli"), "hub", "transfer"):
        assert list((tests / name).glob("test_*.py")), name
    for name in ("plan", "convert", "verify"):
        assert (tests / f"test_{name}.py").exists()
