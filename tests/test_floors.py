"""The house stands: imports go to lower floors only, and files stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import distill_trainers

ROOT = Path(distill_trainers.__file__).parent
FLOORS = {
    "exceptions": 0,
    "signals": 0,
    "losses": 0,
    "hub": 1,
    "models": 1,
    "data": 1,
    "rationales": 1,
    "gguf": 2,
    "students": 2,
    "teachers": 2,
    "rollouts": 2,
    "evaluation": 2,
    "trainers": 3,
    "reporting": 3,
    "doctor": 3,
    "cli": 4,
}
# Packages of one floor may use each other, but for these pairs.
STRANGERS = [{"teachers", "rollouts"}]
# What any file of `trainers` may import from its own package; all others are methods, which do not know each other.
COMMON = {"base", "caching", "callbacks", "checkpoints", "completions", "config", "cycles", "evaluating"}
COMMON |= {"forward", "guard", "held_out", "innovations", "metrics", "order", "pretraining", "publishing"}
COMMON |= {"recording", "references", "rejections", "remote", "scoring", "side_by_side", "sources"}
# Settings that fill a file of their own, beside the method's.
OWN_CONFIGS = {"dpkd": "dpkd_config", "minillm": "minillm_config", "rationale": "rationale_config"}
FILES = sorted(ROOT.rglob("*.py"))
by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def _room(parts):
    return parts[0].removesuffix(".py")


def _imports(file):
    """Every import of the package's own modules, wherever it stands: (line, parts below the package, typing only)."""
    package = file.relative_to(ROOT).parent.parts
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1]
                module = ("distill_trainers", *base, *module)
            # `from .. import models` names modules, `from ..models import f` does not.
            below = ROOT.joinpath(*module[1:])
            names = [(*module, alias.name) if below.is_dir() else module for alias in node.names]
        for name in names:
            if name[0] == "distill_trainers" and len(name) > 1:
                yield node.lineno, name[1:], id(node) in typing_only


def test_every_room_has_a_floor():
    rooms = {_room(file.relative_to(ROOT).parts) for file in FILES} - {"__init__", "__main__"}
    assert rooms <= FLOORS.keys(), "say in FLOORS where a new module belongs"


@by_file
def test_imports_go_to_lower_floors_only(file):
    here = _room(file.relative_to(ROOT).parts)
    if here == "__init__":
        return  # the package's own exports
    for line, target, typing_only in _imports(file):
        there = _room(target)
        if there not in FLOORS:
            continue  # such as __version__
        assert typing_only or FLOORS[there] <= FLOORS[here], f"{file}:{line} imports {'.'.join(target)} from above"
        assert {here, there} not in STRANGERS, f"{file}:{line}: {here} and {there} do not know each other"


@pytest.mark.parametrize("file", sorted((ROOT / "trainers").glob("*.py")), ids=lambda file: file.name)
def test_a_method_imports_no_other_method(file):
    if file.stem == "__init__":
        return  # the METHODS table
    for line, target, _ in _imports(file):
        if target[0] == "trainers":
            assert len(target) > 1 and target[1] in COMMON | {file.stem, OWN_CONFIGS.get(file.stem)}, (
                f"{file}:{line} imports {'.'.join(target)}"
            )
    if file.stem in COMMON:
        methods = {path.stem for path in (ROOT / "trainers").glob("*.py")} - COMMON
        assert not any(target[:1] == ("trainers",) and target[1] in methods for _, target, _ in _imports(file))


@by_file
def test_losses_never_see_a_model(file):
    if "losses" not in file.parts:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        outside = {name.split(".")[0] for name in names}
        assert not outside & {"transformers", "trl", "peft", "accelerate", "datasets", "deepspeed"}


@by_file
def test_files_can_be_read(file):
    assert len(file.read_text().splitlines()) <= 600


def test_the_check_sees_every_way_to_import(tmp_path, monkeypatch):
    """Relative and absolute, of modules and of names, at the top and inside functions."""
    file = ROOT / "losses" / "imagined.py"
    source = (
        "import distill_trainers.trainers.base\n"
        "from distill_trainers import cli\n"
        "from .. import models\n"
        "from ..teachers import Teacher\n"
        "def f():\n    from ..rollouts.hf import generate_completions\n"
        "from .reduction import token_mean\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    found = [_room(target) for _, target, _ in _imports(file)]
    assert sorted(found) == ["cli", "losses", "models", "rollouts", "teachers", "trainers"]
