"""What a release consists of: what is promised, help with examples, completion, wheel and sdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import distill_trainers
from distill_trainers.cli import COMMANDS, main
from distill_trainers.cli.completion import make_parser_of_all
from distill_trainers.cli.examples import EXAMPLES
from distill_trainers.cli.recipes import FOLDERS
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
    assert "pip install 'distill-trainers[completion]'" in capsys.readouterr().err


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


def test_recipes_are_copied_and_never_replaced(tmp_path, capsys):
    assert main(["recipes", str(tmp_path / "work")]) == 0
    for name in FOLDERS:
        copied = sorted(file.relative_to(tmp_path / "work") for file in (tmp_path / "work" / name).rglob("*"))
        assert copied == sorted(file.relative_to(ROOT) for file in (ROOT / name).rglob("*"))
    changed = tmp_path / "work/recipes/smollm2-135m/gkd.yaml"
    changed.write_text("mine", encoding="utf-8")
    assert main(["recipes", str(tmp_path / "work")]) == 2
    assert "nothing is replaced" in capsys.readouterr().err and changed.read_text(encoding="utf-8") == "mine"


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


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """`installed(extras)`: the interpreter of a new environment, once the wheel is installed there with these extras.

    pip finds what the wheel requires among the packages of the tests, and nowhere else. So a requirement that is not
    written down, or that the tested versions do not meet, fails. Neither the source nor an installation of it is seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    packages, environment = folder / "packages", folder / "environment"
    packages.mkdir()
    for place in map(Path, sys.path):
        for package in place.iterdir() if any(place.glob("*.dist-info")) else ():
            if "distill_trainers" not in package.name and not (packages / package.name).exists():
                (packages / package.name).symlink_to(package)
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(str(packages), encoding="utf-8")

    def install(extras=""):
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--quiet"]
        _run(*pip, f"distill-trainers{extras} @ {built[1].as_uri()}", env=PLAIN)
        return python

    return install


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(installed, tmp_path):
    python = installed()
    code = "import distill_trainers as d, sys; print(d.__file__); from distill_trainers import GKDTrainer, prune"
    place = _run(python, "-c", code, cwd=tmp_path, env=PLAIN)
    assert Path(place.strip()).is_relative_to(python.parents[1])
    command = python.with_name("distill-trainers")
    assert all(f"  {name} " in _run(command, "--help", cwd=tmp_path, env=PLAIN) for name in COMMANDS)
    _run(command, "recipes", cwd=tmp_path, env=PLAIN)
    plan = _run(command, "push", "--help", cwd=tmp_path, env=PLAIN)
    assert EXAMPLES["push"].strip().splitlines()[-1] in plan


@pytest.mark.slow
def test_the_wheel_installs_with_its_extras(installed, tmp_path):
    extras = re.search(r"^EXTRAS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    python = installed(f"[{extras}]")
    assert "complete" in _run(python.with_name("distill-trainers"), "completion", "--help", cwd=tmp_path, env=PLAIN)
