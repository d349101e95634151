"""What is written from the code: tables of settings, the API reference, and all of it as HTML without a warning."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import distill_trainers

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: the module `docs/<name>.py`."""
    monkeypatch.syspath_prepend(str(DOCS))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_tables_of_settings_are_those_of_the_configs(page, script):
    text = page.read_text(encoding="utf-8")
    assert script("tables").with_tables(text) == text, "write them anew with `python docs/tables.py`"


def test_each_method_has_its_table():
    found = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("methods/*.md"))
    named = re.findall(r"^<!-- settings: (\w+) -->\n\| key \| default \| meaning \|\n", found, re.MULTILINE)
    assert sorted(named) == sorted(config.__name__ for config, _ in distill_trainers.trainers.METHODS.values())


@pytest.mark.parametrize("name", [name for name in distill_trainers.__all__ if name != "__version__"])
def test_public_names_have_docstrings_of_their_own(name):
    value = getattr(distill_trainers, name)
    assert len(vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__) > 30
    methods = [(n, v) for n, v in vars(value).items() if n[0] != "_" and inspect.isfunction(v)]
    inherited = {n for base in value.__mro__[1:] for n in vars(base)} if inspect.isclass(value) else set()
    assert not [n for n, v in methods if not v.__doc__ and n not in inherited], "methods without a docstring"


def test_the_reference_has_every_public_name(script):
    pages = script("reference").reference_pages()
    text = pages["distill_trainers.md"]
    for name in distill_trainers.__all__:
        assert f"\n## `{name}`\n" in text
    names = re.findall(r"^## `(\w+)`$", text, re.MULTILINE)
    assert names[0] == "DistillTrainer"
    assert names.index("RewardedTrainer") < names.index("DPKDConfig") < names.index("prune")
    assert "**Args**" in text and "- `teacher_model`: the teacher" in text
    assert not [name for name, page in pages.items() if "<function" in page or " at 0x" in page]


@pytest.mark.slow
def test_html_is_built_without_warnings(script, tmp_path, capfd):
    """Links, anchors, contents and blocks of every page, as Sphinx reads them."""
    pytest.importorskip("sphinx", reason="needs the extra `docs`")
    pytest.importorskip("myst_parser", reason="needs the extra `docs`")
    assert script("build").main([str(tmp_path)]) == 0, capfd.readouterr().err
    for name in ("README", "docs/choosing", "docs/methods/gkd", "docs/api/distill_trainers"):
        assert (tmp_path / "html" / f"{name}.html").is_file()
    assert "README.html" in (tmp_path / "html" / "index.html").read_text()
