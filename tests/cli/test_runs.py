"""What a run does beside training: uploads, full disks, the terminal, students made of layers, plans."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, PreTrainedModel

from distill_trainers.cli import main
from distill_trainers.cli.plan import make_plan
from distill_trainers.cli.train import build_trainer, run
from distill_trainers.exceptions import CheckpointError, TrainingDivergedError
from distill_trainers.recipe.checks import check_recipe
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.rollouts import CompletionStore
from distill_trainers.toy import RATIONALE_PROMPTS
from distill_trainers.trainers import GKDTrainer

ROOT = Path(__file__).parents[2]
from_teacher = {"model_name_or_path": None, "student_init": {"from_teacher": True, "keep_layers": 1}}


def test_the_card_tells_no_path(recipe, tmp_path, saved):
    assert main(["train", "--config", recipe()]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert str(saved.root) not in card and "`teacher`" in card and "`student`" in card


def test_the_card_names_a_student_of_the_hub(make_trainer):
    from distill_trainers.cards.model_card import model_card

    trainer = make_trainer()
    trainer.model.config._name_or_path = "org/small"
    assert yaml.safe_load(model_card(trainer.card_facts()).split("---")[1])["base_model"] == "org/small"


# ---- Full disks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Models written into a folder of this name come to a full disk halfway."""

    def fill(name):
        write = PreTrainedModel.save_pretrained

        def save_pretrained(self, folder, **kwargs):
            if Path(folder).name != name:
                return write(self, folder, **kwargs)
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)

    return fill


def test_the_last_save_on_a_full_disk_is_explained(recipe, tmp_path, full_disk, capsys):
    full_disk("out")
    assert main(["train", "--config", recipe(save_strategy="steps", save_steps=2)]) == 1
    message = capsys.readouterr().err
    assert re.search(r"error: Could not write the student to .*No space left.* MiB are free.*--resume_from", message)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()


def test_a_student_made_on_a_full_disk_is_explained(recipe, tmp_path, full_disk, capsys):
    full_disk("student_init")
    assert main(["train", "--config", recipe(**from_teacher)]) == 1
    assert "error: Could not write the student" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "student_init").glob("*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json", "tokenizer.json"])
def test_an_initial_student_that_has_changed_is_made_again(recipe, tmp_path, name):
    """One byte of it, or all: a run would start from other weights, and nobody would know."""
    from distill_trainers.cli.train import make_initial_student

    parsed, folder = parse_recipe(["--config", recipe(**from_teacher)]), tmp_path / "out" / "student_init"
    make_initial_student(parsed, None)
    file = folder / name
    data = file.read_bytes()
    stamp = file.stat().st_mtime_ns
    make_initial_student(parsed, None)
    assert file.stat().st_mtime_ns == stamp, "what is whole is kept"
    middle = len(data) // 2
    for harmed in (data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], data[:middle], b""):
        file.write_bytes(harmed)
        make_initial_student(parsed, None)
        assert file.read_bytes() == data


def test_completions_on_a_full_disk_are_explained_and_none_is_lost(tmp_path):
    store = CompletionStore(tmp_path, {"teacher": "t"})
    store.append([("a", [1, 2])])
    part, other = (store.folder / f"part-0000{rank}.jsonl" for rank in (0, 1))
    kept = part.read_text()
    part.rename(other)
    part.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="completions .*No space left.* free some space"):
        store.append([("b", [3])])
    assert other.read_text() == kept and part.is_symlink()


# ---- The terminal ---------------------------------------------------------------------------------------------------


def test_an_error_gives_the_cursor_back(recipe, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def fail(self, *args, **kwargs):
        raise TrainingDivergedError("the loss is NaN")

    monkeypatch.setattr(GKDTrainer, "training_step", fail)
    assert main(["train", "--config", recipe()]) == 1
    printed = capsys.readouterr().err
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l")
    assert printed.endswith("error: the loss is NaN\n")


# ---- Students made of layers ----------------------------------------------------------------------------------------


def test_importance_needs_no_room_for_samples_that_nobody_takes(recipe, tmp_path):
    init = {"from_teacher": True, "keep_layers": 1, "strategy": "importance", "importance_batches": 1}
    changes = {"model_name_or_path": None, "student_init": init, "lmbda": 0.0, "max_new_tokens": 128}
    assert main(["train", "--config", recipe(**changes)]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_importance_measures_on_a_stream(recipe):
    init = {"from_teacher": True, "keep_layers": 1, "strategy": "importance", "importance_batches": 1}
    assert main(["train", "--config", recipe(model_name_or_path=None, student_init=init, streaming=True)]) == 0


# ---- Plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4), (None, 2)])
def test_memory_of_the_teacher_follows_its_checkpoint(recipe, saved, make_teacher, tokenizer, tmp_path, dtype, width):
    folder = tmp_path / "teacher16"
    make_teacher().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kwargs = {"teacher_model_init_kwargs": {"dtype": dtype}} if dtype else {}
    plan = make_plan(parse_recipe(["--config", recipe(teacher_model_name_or_path=str(folder), **kwargs)]))
    assert plan.memory_mib["teacher"] == plan.teacher_parameters * width / 2**20
    assert plan.memory_mib["weights"] == plan.student_parameters * 4 / 2**20


def test_plan_and_run_agree_on_the_student(recipe, tmp_path):
    parsed = parse_recipe(["--config", recipe(**from_teacher)])
    plan, student = make_plan(parsed), build_trainer(parsed).model
    assert plan.student_parameters == sum(p.numel() for p in student.parameters())


def test_a_run_and_a_dry_run_go_through_the_same_checks(recipe, monkeypatch):
    seen = []

    def check(parsed):
        seen.append(parsed)
        return check_recipe(parsed)

    monkeypatch.setattr("distill_trainers.cli.train.check_recipe", check)
    monkeypatch.setattr("distill_trainers.cli.plan.check_recipe", check)
    path = recipe()
    assert main(["train", "--config", path, "--dry_run", "true"]) == 0 and len(seen) == 1
    assert main(["train", "--config", path, "--max_steps", "1"]) == 0 and len(seen) == 2


OWN_SETTINGS = {"divergence", "lmbda", "teacher_mix_alpha", "num_inner_epochs", "gamma", "loss_type", "beta"}
OWN_SETTINGS |= {"refresh_steps", "objective", "rationale_weight"}


# ---- Recipes that are shipped ---------------------------------------------------------------------------------------


# The same methods for other models, full and LoRA: parsed and planned in every run, trained in the slow one.
ALIKE = {"llama-2-3b", "llama-2-13b", "llama-3.1-8b", "llama-3.2-1b", "open-llama-3b", "qwen2.5-7b", "smollm2-1.7b"}
ALIKE |= {"llama-7b", "qwen3-1.7b", "minillm_340M", "minillm_760M", "gkd_pruned"}  # folders, and names of recipes
# A run goes on for each method, and where there are adapters, integers or a student made of the teacher.
GO_ON = {"qwen2.5-0.5b", "minillm_120M", "gkd_lora", "int4", "draft"}
ELSEWHERE = {"two_experts.yaml"}  # needs adapters: tests/cli/test_several_teachers.py makes them


def _shipped():
    for path in sorted(ROOT.glob("recipes/*/*.yaml")):
        if path.name in ELSEWHERE:
            continue
        alike = bool({path.parent.name, path.stem} & ALIKE)
        marks = [pytest.mark.slow] if alike else []
        yield pytest.param(path, marks=marks, id=f"{path.parent.name}/{path.name}")


@pytest.mark.parametrize("path", _shipped())
def test_every_recipe_trains_tiny_models_and_goes_on(path, tmp_path, tokenizer, make_teacher, rows_for, monkeypatch):
    """Names, data and the device are the test's; every other setting is the recipe's."""
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(path.read_text())
    layers = settings["student_init"].get("keep_layers", 10) + 2 if "student_init" in settings else 2
    teacher = make_teacher(num_hidden_layers=layers)
    teacher.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    rows = list(rows_for(settings["method"])(48))  # enough for one step of each
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {layout: column for column, layout in settings.get("column_mapping", {}).items()}
    rows = [{own.get(name, name): value for name, value in row.items()} for row in rows]
    if "privileged_context" in own:
        rows = [{own["prompt"]: row[own["prompt"]], own["privileged_context"]: row["completion"]} for row in rows]
    owners = list(settings.get("teachers", {}))
    rows = [{**row, "teacher": owners[i % len(owners)]} for i, row in enumerate(rows)] if owners else rows
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows[:8])))
    names = {"dataset": "rows.jsonl", "output_dir": "out"}
    names |= {} if "eval_fraction" in settings else {"eval_dataset": "few.jsonl"}
    names |= {"pretraining_dataset": "text.jsonl"} if "pretraining_dataset" in settings else {}
    has_teacher = bool(settings.keys() & {"teacher_model_name_or_path", "self_teacher", "teachers"})
    names |= {n: "large" for n in ("teacher_model_name_or_path", "model_name_or_path") if n in settings}
    options = [part for name, value in names.items() for part in (f"--{name}", str(tmp_path / value))]
    options += ["--config", str(path), "--use_cpu", "true", "--max_new_tokens", "4"]
    options += ["--quantize_group_size", "16"] if "quantize_student" in settings else []  # tiny models are 48 wide
    teachers = {owner: {"teacher_model_name_or_path": str(tmp_path / "large")} for owner in owners}
    options += ["--teachers", json.dumps(teachers)] if owners else []
    if "accuracy" in settings.get("eval_measures", []):  # "####" is not in the tokenizer's alphabet
        options += ["--eval_measures", "diversity"]
    splits = settings.keys() & {"dataset_split", "eval_split", "pretraining_split"}
    options += [part for name in splits for part in (f"--{name}", "train")]  # a hundredth of these rows would be none
    options += ["--eval_fraction", "8"] if "eval_fraction" in settings else []
    init = settings.get("student_init", {})
    if "parameters" in init:  # as small a share of this teacher
        init = {**init, "parameters": 0.6 * teacher.num_parameters(), "importance_batches": 1}
        options += ["--student_init", json.dumps(init)]
    if settings["method"] == "rationale":  # in the tokenizer's alphabet
        prompts = {name: text for name, text in RATIONALE_PROMPTS.items() if isinstance(text, str)}
        options += [part for name, text in prompts.items() for part in (f"--{name}", text)]

    trainer = run(parse_recipe([*options, "--max_steps", "1"]))
    has_kl = has_teacher and "teacher_tokenizer" not in settings  # else there is no id that both have
    assert trainer.state.global_step == 1 and trainer.last_eval_metrics["eval_kl" if has_kl else "eval_loss"] >= 0
    own = settings.keys() & OWN_SETTINGS
    assert own and all(getattr(trainer.args, name) == settings[name] for name in own)
    if not settings.get("use_peft"):
        assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == len(tokenizer)
    if not {path.parent.name, path.stem} & GO_ON:
        return
    again = run(parse_recipe([*options, "--max_steps", "2", "--resume_from_checkpoint", "true"]))
    assert again.state.global_step == 2 and again.run_checkpoints[0].endswith("checkpoint-1")
