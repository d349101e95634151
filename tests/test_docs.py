"""The documentation keeps its word: examples run, recipes parse, links lead somewhere, tables list what there is."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser

from distill_trainers import DistillConfig
from distill_trainers.cli import COMMANDS
from distill_trainers.cli.doctor import DoctorArguments
from distill_trainers.cli.evaluate import EvaluateArguments
from distill_trainers.cli.evaluate import parse_arguments as parse_evaluation
from distill_trainers.cli.examples import EXAMPLES
from distill_trainers.cli.pairs import PairArguments
from distill_trainers.cli.prune import PruneArguments
from distill_trainers.cli.rationales import STAGES, PipelineArguments, parse_arguments
from distill_trainers.cli.serve_teacher import make_parser
from distill_trainers.data.formats import LAYOUTS, detect_dataset_type
from distill_trainers.data.pairs import is_pair, split_pair
from distill_trainers.evaluation import MEASURES, METRICS, EvaluationSettings
from distill_trainers.losses import DIVERGENCES
from distill_trainers.recipe.parse import RecipeArguments, parse_recipe
from distill_trainers.teachers.options import TeacherOptions
from distill_trainers.trainers import METHODS

ROOT = Path(__file__).parents[1]
EXTRAS = {"pairs": PairArguments, "doctor": DoctorArguments, "prune": PruneArguments}
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
OTHERS += [ROOT / "accelerate_configs/README.md", ROOT / "benchmarks/README.md", *ROOT.glob("recipes/*/README.md")]
every_page = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page, language):
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def _anchors(page):
    """GitHub's names for the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _section(page, title):
    """The text below one heading, up to the next heading."""
    text = page.read_text(encoding="utf-8")
    start = text.index(f"{title}\n") + len(title)
    return re.split(r"^#+ ", text[start:], maxsplit=1, flags=re.MULTILINE)[0]


# ---- All pages ------------------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(found), f"{page.name} links to {target}"


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"^\| \[[^]]*\]\(([^)\s]+\.md)\)", index, re.MULTILINE))
    assert linked == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"}


def test_each_page_says_first_whom_it_is_for():
    for page in PAGES[1:]:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ") and lines[1] == "" and lines[2].startswith("For "), page.name


def test_figures_are_drawings_with_words():
    """What pages show has a text for those who do not see it, and needs nothing from elsewhere."""
    shown = {
        (page.parent / file).resolve()
        for page in PAGES
        for file in re.findall(r"!\[[^]]+\]\(([^)\s]+)\)", page.read_text())
    }
    assert {DOCS / "figures" / f"{name}.svg" for name in ("data_flow", "choosing")} <= shown
    for file in (DOCS / "figures").glob("*.svg"):
        drawing = file.read_text(encoding="utf-8")
        assert file in shown and "<title" in drawing and "<desc" in drawing and "href" not in drawing


def test_the_figure_of_equal_time_is_that_of_the_kept_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    figures = importlib.import_module("figures")
    kept = json.loads(figures.RESULTS.read_text(encoding="utf-8"))["results"]
    assert figures.FIGURE.read_text(encoding="utf-8") == figures.equal_time(kept), "run benchmarks/figures.py"


# ---- Commands -------------------------------------------------------------------------------------------------------


def _commands():
    """Every line of every shell block and example of `--help`, as its words; comments and line breaks are taken out."""
    kinds = ("bash", "sh", "console")
    blocks = [
        (f"{page.parent.name}/{page.name}", block)
        for page in [*PAGES, *sorted(OTHERS)]
        for kind in kinds
        for block in _blocks(page, kind)
    ]
    for where, block in [*blocks, *((f"{name} --help", lines) for name, lines in EXAMPLES.items())]:
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.partition(" > ")[0], comments=True):
                yield pytest.param(words, id=f"{where}: {' '.join(words)[:60]}")


def _check_make(words):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) <= targets


def _check_pip(words):
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    wanted = {name for listed in re.findall(r"\[(.*?)\]", " ".join(words)) for name in listed.split(",")}
    assert words[0] == "install" and wanted <= extras


def _check_cli(words, settings):
    """A command of ours: its options parse, and its recipe fits the launch configuration `settings`."""
    name, *options = words
    assert name in COMMANDS
    if "--import" in options:  # a module of the reader's
        del options[(place := options.index("--import")) : place + 2]
    if name == "rationales":
        stage, *options = options
        assert stage in STAGES and parse_arguments(options).folder
        return
    if name == "evaluate":
        parse_evaluation(options if "--config" not in options else [])
        return
    if name == "serve-teacher":
        assert make_parser().parse_args(options).model
        return
    if name == "cache-teacher" and "--inspect" in options:
        assert options[0] == "--inspect" and len(options) == 2
        return
    if name not in ("train", "cache-teacher", "pairs", "doctor", "prune"):
        return _check_options(name, options)
    example = options[options.index("--config") + 1] == "recipe.yaml"  # the reader's own
    assert example or (ROOT / options[options.index("--config") + 1]).is_file()
    if example:
        options[options.index("--config") + 1] = str(ROOT / "recipes/smollm2-135m/gkd.yaml")
    on_gpus = settings is not None and not settings["use_cpu"]
    cpu = ["--use_cpu", "true"] if not torch.cuda.is_available() else []
    recipe = parse_recipe([*options, *cpu], EXTRAS.get(name))
    written = yaml.safe_load(Path(options[options.index("--config") + 1]).read_text())
    assert not (on_gpus and written.get("use_cpu")), "a recipe for CPUs was given to a launch on GPUs"
    sharded = settings is not None and settings["distributed_type"] in ("DEEPSPEED", "FSDP")
    assert not (sharded and recipe.args.save_only_model), "optimiser states are needed to go on or to load the best"


class Parsed(Exception):
    """The options of a command have been read."""


def _check_options(name, options):
    """The options of a command whose parser is inside of its `main`, which is left once it has read them."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_leave(self, args, namespace=None):
        _, others = parse(self, args, namespace)
        assert name == "demo" or not others  # it hands them on to the recipe
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_leave)
        importlib.import_module(f"distill_trainers.cli.{COMMANDS[name][0]}").main(options)


@pytest.mark.parametrize("words", list(_commands()))
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, *rest = words
    if first == "make":
        return _check_make(rest)
    if first == "python" and rest[0].endswith(".py"):
        script = (ROOT / rest[0]).read_text()
        assert all(f'"{word}"' in script for word in rest[1:] if word.startswith("--"))
        return None
    if first == "pytest":
        folder = ROOT / rest[0] if (ROOT / rest[0]).is_dir() else (ROOT / rest[0]).parent
        own = (folder / "conftest.py").read_text()
        assert (ROOT / rest[0]).exists() and all(f'"{word}"' in own for word in rest if word.startswith("--"))
        return None
    if first in ("pip", "python") or first.endswith("/pip"):
        return _check_pip(rest)
    if first == "distill-trainers":
        return _check_cli(rest, None)
    settings = None
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        if launch.config_file:
            settings = yaml.safe_load(Path(launch.config_file).read_text())
        rest = [launch.training_script, *launch.training_script_args]
        assert launch.module
    else:
        assert first.endswith("bin/python") and rest.pop(0) == "-m", words
    module, *options = rest
    (name,) = [name for name, (file, _) in COMMANDS.items() if module == f"distill_trainers.cli.{file}"]
    return _check_cli([name, *options], settings)


# ---- recipes.md -----------------------------------------------------------------------------------------------------


def _own_fields(config_class):
    """Fields that the class itself declares, with their defaults."""
    defaults = {f.name: f.default for f in fields(config_class)}
    return {name: defaults[name] for name in inspect.get_annotations(config_class) if name in defaults}


@pytest.mark.parametrize(
    "title, config_class",
    [
        ("## Keys of a run", RecipeArguments),
        ("## Keys of every method", DistillConfig),
        ("## Keys about the teacher", TeacherOptions),
        ("## Keys of `distill-trainers pairs`", PairArguments),
    ],
)
def test_key_tables_list_every_field_with_its_default(title, config_class):
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", _section(DOCS / "recipes.md", title), re.MULTILINE)
    documented = [(name, yaml.safe_load(default)) for name, default in rows]
    assert documented == list(_own_fields(config_class).items())


def test_the_doctors_options_are_listed():
    section = _section(DOCS / "doctor.md", "## Options")
    assert set(re.findall(r"`--(\w+)", section)) == set(_own_fields(DoctorArguments))


def test_the_table_of_stages_lists_every_setting_with_its_default():
    section = _section(DOCS / "rationales.md", "## Settings of the stages")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, re.MULTILINE)
    assert [(name, yaml.safe_load(default)) for name, default in rows] == list(_own_fields(PipelineArguments).items())


@pytest.mark.parametrize("config_class", [EvaluationSettings, EvaluateArguments])
def test_the_tables_of_evaluation_list_every_setting_with_its_default(config_class):
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", _section(DOCS / "evaluation.md", "## Settings"), re.MULTILINE)
    settings = config_class()
    own = {name: getattr(settings, name) for name in inspect.get_annotations(config_class)}
    found = {name: yaml.safe_load(default) for name, default in rows}
    assert {name: found.get(name, "missing") for name in own} == own
    assert len(rows) == sum(len(inspect.get_annotations(each)) for each in (EvaluationSettings, EvaluateArguments))


def test_every_measure_and_metric_is_explained():
    section = _section(DOCS / "evaluation.md", "## What is measured")
    names = {name for name in MEASURES if not name.startswith("student_text_")} | set(METRICS)
    assert not [name for name in names if f"`{name}`" not in section]


def test_the_settings_of_the_page_are_read(tmp_path):
    code, in_training = _blocks(DOCS / "evaluation.md", "yaml")
    recipe = yaml.safe_load(_blocks(DOCS / "recipes.md", "yaml")[0]) | yaml.safe_load(in_training)
    assert _parse(yaml.safe_dump({**recipe, "report_to": "none"}), tmp_path).args.greater_is_better is True
    (tmp_path / "evaluation.yaml").write_text(code, encoding="utf-8")
    args, settings = parse_evaluation(["--config", str(tmp_path / "evaluation.yaml")])
    assert args.named_students() == {"gkd": "runs/gkd", "minillm": "runs/minillm"} and settings.max_new_tokens == 256


def test_every_divergence_is_named():
    section = _section(DOCS / "maths.md", "## Divergences")
    assert not [name for name in DIVERGENCES if f"`{name}`" not in section]


def _parse(code, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(code, encoding="utf-8")
    return parse_recipe(["--config", str(file), "--use_cpu", "true"])


def test_recipes_parse(tmp_path):
    whole, early_stopping = _blocks(DOCS / "recipes.md", "yaml")
    assert _parse(whole, tmp_path).args.divergence == "forward_kl"
    settings = yaml.safe_load(whole) | yaml.safe_load(early_stopping)
    recipe = _parse(yaml.safe_dump(settings), tmp_path)
    assert recipe.run.early_stopping_patience == 3 and recipe.args.greater_is_better is False


def test_data_settings_are_keys_of_recipes(tmp_path):
    base = yaml.safe_load(_blocks(DOCS / "recipes.md", "yaml")[0])
    for name in ("dataset", "eval_fraction"):
        del base[name]
    blocks = [yaml.safe_load(code) for code in _blocks(DOCS / "data.md", "yaml")]
    assert len(blocks) == 5
    for settings in blocks:
        _parse(yaml.safe_dump({**base, "dataset": "rows.jsonl", **settings}), tmp_path)


# ---- data.md --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_examples_are_of_their_layout(layout):
    (block,) = [code for kind, code in FENCE.findall(_section(DOCS / "data.md", f"### `{layout}`")) if kind == "json"]
    for line in block.splitlines():
        assert detect_dataset_type(json.loads(line)) == layout


def test_the_example_of_pairs_is_one():
    (block,) = [
        code for kind, code in FENCE.findall(_section(DOCS / "data.md", "### Preference pairs")) if kind == "json"
    ]
    rows = [json.loads(line) for line in block.splitlines()]
    assert len(rows) == 3 and all(is_pair(row) for row in rows)
    assert [bool(split_pair(row)[0]) for row in rows] == [True] * 3


# ---- adding_a_method.md ---------------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Imports one of the page's files by name, from a folder that also becomes the working directory."""
    names = []
    for code in _blocks(DOCS / "adding_a_method.md", "python"):
        name = re.match(r"# (\w+)\.py\n", code)[1]
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        names.append(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "entropy_kd", None)  # the page fills it in; afterwards it is gone again
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_the_method_of_the_page_trains(example, tmp_path):
    trainer = example("run_entropy_kd").trainer
    logs = [log for log in trainer.state.log_history if "weighted_kl" in log]
    assert trainer.state.global_step == 2 and len(logs) == 2
    assert all(log["loss"] == pytest.approx(log["weighted_kl"], rel=1e-4) for log in logs)
    assert 0 < trainer.last_eval_metrics["eval_teacher_entropy"] < 2.65  # ln 14 = 2.639
    assert trainer.last_eval_metrics["eval_loss"] > trainer.last_eval_metrics["eval_kl"] > 0
    assert (tmp_path / "runs/entropy_kd/config.json").is_file()
    assert "1503.02531" in (tmp_path / "runs/entropy_kd/README.md").read_text(encoding="utf-8")


def test_the_test_of_the_page_passes(example, make_trainer, batch_of, dense):
    example("my_methods")
    example("test_entropy_kd").test_loss_is_the_formula(make_trainer, batch_of, dense)


def test_the_recipe_of_the_page_parses(example, tmp_path):
    launcher = example("my_methods")
    (recipe,) = _blocks(DOCS / "adding_a_method.md", "yaml")
    parsed = _parse(recipe, tmp_path)
    assert METHODS["entropy_kd"] == (launcher.EntropyKDConfig, launcher.EntropyKDTrainer)
    assert type(parsed.args) is launcher.EntropyKDConfig and parsed.args.entropy_weight == 2.0


def test_the_page_is_short():
    page = DOCS / "adding_a_method.md"
    (method,) = [code for code in _blocks(page, "python") if code.startswith("# entropy_kd.py")]
    assert len(method.splitlines()) <= 150


# ---- Somebody who has never seen the project -----------------------------------------------------------------------


@pytest.mark.parametrize("page", ["choosing", "from_trl", "troubleshooting"])
def test_the_readme_leads_a_stranger_to_the_three_pages(page):
    """Which recipe, how to move a script of TRL's, why a run stopped: one question each, one link away."""
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert any(f"](docs/{page}.md)" in row and "?" in row for row in rows)
    first = (DOCS / f"{page}.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert first.startswith("For you if "), "a page begins with whom it is for"


def test_each_case_of_choosing_has_a_recipe():
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    cases = [line for line in page.splitlines() if line.startswith(("| **", "| the same", "| prompts"))]
    unnamed = [
        line for line in cases if not re.search(r"\(\.\./recipes/[\w./-]+\.yaml\)|your recipe|the same with", line)
    ]
    assert len(cases) >= 5 and not unnamed
