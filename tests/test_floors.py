"""The house stands: imports go to lower floors only, and files stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import distill_trainers

ROOT = Path(distill_trainers.__file__).parent
FLOORS = {
    "exceptions": 0,
    "redaction": 0,
    "escaping": 0,
    "addresses": 0,
    "installing": 0,
    "reachable": 0,
    "storage": 0,
    "locks": 0,
    "randomness": 0,
    "requirements": 0,
    "settings": 0,
    "value_types": 0,
    "trl_names": 0,
    "signals": 0,
    "joining": 0,
    "losses": 0,
    "hub": 1,
    "manifest": 1,
    "models": 1,
    "servers": 1,
    "answers": 1,
    "data": 1,
    "toy": 1,
    "rationales": 2,
    "rewards": 2,
    "gguf": 2,
    "run_files": 2,
    "students": 2,
    "teachers": 2,
    "rollouts": 2,
    "evaluation": 2,
    "cards": 3,
    "trainers": 4,
    "recipe": 5,
    "reporting": 5,
    "doctor": 5,
    "cli": 6,
}
# Packages of one floor may use each other, but for these pairs.
STRANGERS = [{"teachers", "rollouts"}]
SHARED = {"given", "lifecycle", "rewarded"}  # folders of trainers that are no method
METHODS = {folder.name for folder in (ROOT / "trainers").iterdir() if folder.is_dir()} - SHARED
FILES = sorted(ROOT.rglob("*.py"))
by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def _room(parts):
    return parts[0].removesuffix(".py")


def _imports(file):
    """Every import of the package's own modules, lazy and typing ones too: (line, parts below the package)."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
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
                yield node.lineno, name[1:]


def test_every_room_has_a_floor():
    rooms = {_room(file.relative_to(ROOT).parts) for file in FILES} - {"__init__", "__main__"}
    assert rooms <= FLOORS.keys(), "say in FLOORS where a new module belongs"


@by_file
def test_imports_go_to_lower_floors_only(file):
    here = _room(file.relative_to(ROOT).parts)
    if here == "__init__":
        return  # the package's own exports
    for line, target in _imports(file):
        there = _room(target)
        if there not in FLOORS:
            continue  # such as __version__
        assert FLOORS[there] <= FLOORS[here], f"{file}:{line} imports {'.'.join(target)} from above"
        assert {here, there} not in STRANGERS, f"{file}:{line}: {here} and {there} do not know each other"


MODULES = {file.relative_to(ROOT).with_suffix("").parts: file for file in FILES if file.name != "__init__.py"}


def _module(target):
    """The module that an import names, or that defines the name; packages hand names on. None for anything else."""
    if target in MODULES:
        return target
    if target[:-1] in MODULES:
        return target[:-1]
    package = ROOT.joinpath(*target[:-1], "__init__.py")
    for node in ast.parse(package.read_text()).body if package.is_file() else ():
        if isinstance(node, ast.ImportFrom) and node.level and target[-1] in {alias.name for alias in node.names}:
            above = target[: len(target) - node.level]
            return _module((*above, *(node.module or "").split("."), target[-1]))
    return None


def test_no_modules_import_each_other():
    """No circles, of any length; a name counts for the module that defines it, whichever package hands it on."""
    below = {name: {_module(target) for _, target in _imports(file)} for name, file in MODULES.items()}
    while leaves := [name for name, targets in below.items() if not targets & below.keys() - {name}]:
        for name in leaves:
            del below[name]
    while tops := [name for name in below if not any(name in below[other] for other in below if other != name)]:
        for name in tops:
            del below[name]
    assert not below, f"these import each other: {sorted('.'.join(name) for name in below)}"


@by_file
def test_a_method_is_known_to_nobody_below_it(file):
    """A method's folder imports no other method's; what all methods stand on imports none."""
    here = file.relative_to(ROOT).parts
    if here[0] != "trainers" or here[1:] == ("__init__.py",):
        return  # the METHODS table
    for line, target in _imports(file):
        if target[0] == "trainers" and len(target) > 1:
            assert target[1] not in METHODS - {here[1]}, f"{file}:{line} imports {'.'.join(target)}"


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
    found = [_room(target) for _, target in _imports(file)]
    assert sorted(found) == ["cli", "losses", "models", "rollouts", "teachers", "trainers"]
