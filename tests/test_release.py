"""What a release consists of: what is promised, help with examples, completion, wheel and sdist."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import fields
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import distill_trainers
from distill_trainers import installing
from distill_trainers.cli import COMMANDS, main
from distill_trainers.cli.completion import make_parser_of_all
from distill_trainers.cli.examples import EXAMPLES
from distill_trainers.cli.recipes import FOLDERS
from distill_trainers.installing import pip_install
from distill_trainers.trainers import METHODS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLAIN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # no way to the source
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))


# ---- What is promised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after", "promised"), [("names", distill_trainers.__all__), ("commands", COMMANDS)])
def test_public_names_and_commands_are_those_of_the_page(after, promised):
    text = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    table = text.split(f"| {after} | for |\n|---|---|\n")[1].split("\n\n")[0]
    listed = [name for line in table.splitlines() for name in re.findall(r"`([\w-]+)`", line.split(" | ")[0])]
    assert sorted(listed) == sorted(promised)


def test_one_version_everywhere():
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert distill_trainers.__version__ == version == citation["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["cff-version"] == "1.2.0" and citation["license"] == PROJECT["license"]
    assert citation["title"] and citation["message"] and citation["authors"]


def test_the_workflow_does_what_our_own_check_does():
    ours = (ROOT / ".ci/run").read_text(encoding="utf-8")
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    targets = {name for step in steps for name in re.findall(r"make ([a-z -]+)", step.get("run", ""))}
    asked = [name for line in re.findall(r"^make (.+)$", ours, re.MULTILINE) for name in line.split()]
    assert asked and set(asked) <= {name for target in targets for name in target.split()}
    exported = dict(re.findall(r"^export (HF_\w+|TOKENIZERS_\w+)=(\w+)", ours, re.MULTILINE))
    assert exported.items() <= WORKFLOW["env"].items()
    versions = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert all(f"Programming Language :: Python :: {version}" in PROJECT["classifiers"] for version in versions)


def test_the_image_copies_what_there_is():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", lines, re.MULTILINE) for name in line.split()]
    assert {"distill_trainers", *FOLDERS} <= set(copied) and all((ROOT / name).exists() for name in copied)
    assert re.search(r"^ARG TORCH=(.+)$", lines, re.MULTILINE)[1] in (ROOT / "constraints.txt").read_text().split()


# ---- Help, completion, recipes without a clone ----------------------------------------------------------------------


def test_each_command_has_examples():
    """That they parse is seen by tests/test_docs.py."""
    assert EXAMPLES.keys() == COMMANDS.keys()
    for name, lines in EXAMPLES.items():
        assert re.search(rf"^(distill-trainers {name}|accelerate .*cli.{COMMANDS[name][0]})\b", lines, re.MULTILINE)
        assert lines.count("\n# ") == len(re.findall(r"^(?:distill-trainers|accelerate) ", lines, re.MULTILINE))


@pytest.mark.parametrize("argv", [["push", "--help"], ["pairs", "-h"], ["rationales", "extract", "--help"]], ids=str)
def test_help_ends_with_examples(argv, capsys):
    try:
        assert main(argv) == 0
    except SystemExit as left:
        assert left.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and shown.rstrip().splitlines()[-1].strip() in EXAMPLES[argv[0]]


def test_the_parser_of_all_knows_each_command_and_key():
    (commands,) = [action for action in make_parser_of_all("files")._actions if action.choices]
    assert list(commands.choices) == list(COMMANDS)
    options = {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}
    assert {"--config", "--lmbda", "--lora_r", "--dry_run"} <= options["train"] & options["prune"] & options["doctor"]
    for name, own in {"prune": "--keep_layers", "push": "--repo", "cache-teacher": "--inspect"}.items():
        assert own in options[name]
    for config, _ in METHODS.values():
        assert {f"--{field.name}" for field in fields(config) if field.init} <= options["train"]
    train = commands.choices["train"]._option_string_actions
    assert train["--config"].complete == "files" and train["--bf16"].choices == ["true", "false"]


def test_completion_without_its_package_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert pip_install("completion") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "command", "asked_for"),
    [
        (None, "pip install 'distill-trainers[serve]'", "distill-trainers==0.1.0"),
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, "pip install -e '/a b[serve]'", ""),
        ({"url": "file:///c", "dir_info": {}}, "pip install '/c[serve]'", ""),
        (
            {"url": "https://github.com/o/it.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'distill-trainers[serve] @ git+https://github.com/o/it.git@abc'",
            "'distill-trainers @ git+https://github.com/o/it.git@abc'",
        ),
        *(
            (
                {"url": url, "vcs_info": {"vcs": "git", "commit_id": "abc"}},
                f"pip install 'distill-trainers[serve] @ git+{url}@abc'",
                "distill-trainers==0.1.0",
            )
            for url in ("ssh://internal.host/x.git", "https://me:secret@github.com/o/x.git", "https://host:8/x.git")
        ),
        (
            {"url": "https://host/x.whl", "archive_info": {}},
            "pip install 'distill-trainers[serve] @ https://host/x.whl'",
            "distill-trainers==0.1.0",
        ),
    ],
    ids=["index", "clone", "folder", "repository", "internal", "user", "port", "wheel"],
)
def test_what_to_install_comes_from_where_the_package_came_from(told, command, asked_for, monkeypatch):
    there = SimpleNamespace(read_text=lambda name: told and json.dumps(told))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: there)
    installing._origin.cache_clear()
    try:
        assert (installing.pip_install("serve"), installing.requirement("0.1.0")) == (command, asked_for)
    finally:
        installing._origin.cache_clear()


def test_a_shell_completes(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_distill_trainers; echo "${COMPREPLY[@]}"'

    def proposed(*words):
        shell = ["bash", "--norc", "-c", ask, str(script), "distill-trainers", *words]
        return subprocess.run(shell, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()

    assert proposed("re") == ["recipes", "report"]
    assert proposed("rationales", "") == ["extract", "parse", "verify", "dual"]
    assert proposed("train", "--lmb") == ["--lmbda"]
    assert proposed("train", "--bf16", "") == ["true", "false"]
    assert proposed("train", "--config", "READ") == ["README.md"]


def test_recipes_are_copied_and_never_replaced(tmp_path, monkeypatch, capsys):
    assert main(["recipes", str(tmp_path / "work")]) == 0
    for name in FOLDERS:
        copied = sorted(file.relative_to(tmp_path / "work") for file in (tmp_path / "work" / name).rglob("*"))
        assert copied == sorted(file.relative_to(ROOT) for file in (ROOT / name).rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--config", "recipes/gpt2/minillm_120M.yaml"]) == 2
    assert "`distill-trainers recipes` copies ours into this folder." in capsys.readouterr().err
    changed = tmp_path / "work/recipes/smollm2-135m/gkd.yaml"
    changed.write_text("mine", encoding="utf-8")
    assert main(["recipes", str(tmp_path / "work")]) == 2
    assert "nothing is replaced" in capsys.readouterr().err and changed.read_text(encoding="utf-8") == "mine"


def test_both_folders_are_copied_or_none(tmp_path, monkeypatch, capsys):
    copy = shutil.copytree

    def full(source, *args, **options):
        if source.name == FOLDERS[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, *args, **options)

    monkeypatch.setattr(shutil, "copytree", full)
    assert main(["recipes", str(tmp_path / "work")]) == 1
    assert "Free some space" in capsys.readouterr().err
    assert not any((tmp_path / "work" / name).exists() for name in FOLDERS)
    monkeypatch.undo()
    assert main(["recipes", str(tmp_path / "work")]) == 0


# ---- Wheel and sdist ------------------------------------------------------------------------------------------------


def _run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel) by the build requirements that pyproject.toml names, in an environment of their own."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def _files(*folders):
    """What git would have in these folders."""
    found = (file for name in folders for file in (ROOT / name).rglob("*") if file.is_file())
    return {file.relative_to(ROOT).as_posix() for file in found if "__pycache__" not in file.parts}


@pytest.mark.slow
def test_the_wheel_has_all_that_runs(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    assert names == _files("distill_trainers") | {f"distill_trainers/{name}" for name in _files(*FOLDERS)}
    assert "distill_trainers/py.typed" in names and "distill_trainers/reporting/assets/report.css" in names
    assert {f"Provides-Extra: {extra}" for extra in PROJECT["optional-dependencies"]} <= set(metadata.splitlines())
    assert "License-File: LICENSE" in metadata


@pytest.mark.slow
def test_the_sdist_has_the_sources_and_nothing_of_ours(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    kept = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"}
    assert kept | _files("distill_trainers", "tests", "docs", *FOLDERS) <= names
    assert not {name for name in names if re.match(r"\.(ci|cache|venv|git/)|runs/|build/|dist/", name)}


def _required(extras=()):
    """Distributions that the package requires with these extras, with all that they require, by name.

    Looked up among those of the tests: one that is missing, or of a version that is not allowed, fails.
    """
    found, seen = {}, set()
    todo = [Requirement(line) for line in PROJECT["dependencies"]]
    optional = PROJECT["optional-dependencies"]
    todo += [Requirement(line) for extra in extras for line in optional[extra]]
    while todo:
        wanted = todo.pop()
        name, asked = canonicalize_name(wanted.name), {"", *wanted.extras}
        if (name, *sorted(asked)) in seen or not (wanted.marker is None or wanted.marker.evaluate()):
            continue
        seen.add((name, *sorted(asked)))
        if name == PROJECT["name"]:
            todo += [Requirement(line) for extra in wanted.extras for line in optional[extra]]
            continue
        found[name] = there = distribution(name)
        assert wanted.specifier.contains(there.version, prereleases=True), f"{wanted}, but {there.version}"
        for needed in map(Requirement, there.requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in asked):
                needed.marker = None
                todo.append(needed)
    return found


def test_the_tested_versions_are_those_that_extras_allow():
    """Those of the extras that `make install` installs; bitsandbytes alone is left out there."""
    extras = re.search(r"^EXTRAS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split(
        ","
    )
    assert PROJECT["optional-dependencies"].keys() - extras == {"all", "kernels", "quantization", "test"}
    assert {"shtab", "hypothesis", "gguf", "trl"} <= _required(extras).keys()


# What shows that an extra is there; those that need a GPU or a compiler are left out.
EXTRAS = {"gguf": "gguf", "plots": "matplotlib", "remote": "openai", "serve": "uvicorn", "completion": "shtab"}


@pytest.mark.slow
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["without extras", "with extras"])
def test_the_wheel_works_in_an_environment_that_is_else_empty(built, tmp_path, extras):
    """What it requires is seen there, by links to the packages of the tests, and nothing else is."""
    packages, environment = tmp_path / "packages", tmp_path / "environment"
    packages.mkdir()
    for there in _required(extras).values():
        tops = {file.parts[0] for file in there.files or () if file.parts[0] != ".."}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(there.locate_file(top))
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    python, command = environment / "bin/python", environment / "bin/distill-trainers"
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(str(packages), encoding="utf-8")
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile", built[1], env=PLAIN)
    code = "import importlib.util, distill_trainers; from distill_trainers import GKDTrainer, prune\n"
    code += f"assert {{m: bool(importlib.util.find_spec(m)) for m in {[*EXTRAS.values(), 'pytest']!r}}} == "
    code += f"{ {module: module in extras.values() for module in [*EXTRAS.values(), 'pytest']}!r}\n"
    code += "print(distill_trainers.__file__)"
    assert Path(_run(python, "-c", code, cwd=tmp_path, env=PLAIN).strip()).is_relative_to(site)
    shown = _run(command, "--help", cwd=tmp_path, env=PLAIN)
    assert all(f"  {name} " in shown for name in COMMANDS)
    _run(command, "recipes", cwd=tmp_path, env=PLAIN)
    assert (tmp_path / "recipes/smollm2-135m/gkd.yaml").is_file()
    shell = subprocess.run([command, "completion", "bash"], capture_output=True, text=True, cwd=tmp_path, env=PLAIN)
    assert (shell.returncode, "pip install" in shell.stderr) == ((0, False) if extras else (2, True)), shell.stderr
