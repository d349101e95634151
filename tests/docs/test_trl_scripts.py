"""Scripts of TRL's documentation, changed only in import and class names: they train here, or say what to do."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_rows

_spec = importlib.util.spec_from_file_location("trl_scripts", Path(__file__).with_name("trl_scripts.py"))
SCRIPTS = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(SCRIPTS)

# The imports that a user changes, and what the classes are called here.
OURS = {"SFT": "GKD", "DPO": "DPKD", "Distillation": "GKD", "GKD": "GKD"}


def _moved(script: str) -> str:
    """TRL's script with the import and the class names of this package."""
    names = "|".join(OURS)
    ours = lambda match: OURS[match[1]] + match[2]  # noqa: E731
    script = re.sub(rf"\b({names})(Config|Trainer)\b", ours, script)
    script = script.replace("from trl.experimental.gkd import", "from distill_trainers import")
    return re.sub(
        r"from trl import ((?:\w+(?:Config|Trainer)(?:, )?)+)$", r"from distill_trainers import \1", script, flags=re.M
    )


@pytest.fixture
def folders(tmp_path, saved, make_tokenizer, make_student, make_teacher, monkeypatch):
    """What the upper-case names of the scripts stand for."""
    from distill_trainers.toy import tiny_llama

    tokenizer = make_tokenizer()
    values = {"OUT": str(tmp_path / "out")}
    for name, width in (("STUDENT", 16), ("TEACHER", 32)):
        values[name] = str(tmp_path / name.lower())
        tiny_llama(tokenizer, width, 1, seed=width).save_pretrained(values[name])
        tokenizer.save_pretrained(values[name])
    sums = addition_rows(8, seed=0)

    def turn(role, text):
        return {"role": role, "content": text}

    rows = {
        "MESSAGES": [{"messages": [turn("user", r["prompt"]), turn("assistant", r["completion"])]} for r in sums],
        "QUESTIONS": [{"question": r["prompt"], "answer": r["completion"]} for r in sums],
        "PROMPTS": [{"prompt": [turn("user", r["prompt"])]} for r in sums],
        "PREFERENCES": [
            {
                "prompt": [turn("user", r["prompt"])],
                "chosen": [turn("assistant", r["completion"])],
                "rejected": [turn("assistant", "0" + r["completion"])],
            }
            for r in sums
        ],
    }
    for name, listed in rows.items():
        file = tmp_path / f"{name.lower()}.jsonl"
        file.write_text("\n".join(map(json.dumps, listed)))
        values[name] = str(file)
    values["ARGUMENTS"] = (
        f"--model_name_or_path {values['STUDENT']} --output_dir {values['OUT']} --dataset_name me/sums --dtype float32 "
        "--max_steps 2 --max_new_tokens 4 --max_length 64 --per_device_train_batch_size 2 --use_cpu true --bf16 false "
        "--report_to none --gradient_checkpointing true"
    ).split()
    monkeypatch.chdir(tmp_path)
    return values


@pytest.fixture
def run(folders, tmp_path):
    def runs(script):
        shutil.rmtree(folders["OUT"], ignore_errors=True)  # a folder with checkpoints is refused
        file = tmp_path / "script.py"
        file.write_text(script)
        return runpy.run_path(str(file), init_globals=folders)["trainer"]

    return runs


@pytest.mark.parametrize("name", ["GKD", "GKD_SCRIPT"])
def test_the_script_trains(run, name):
    trainer = run(_moved(getattr(SCRIPTS, name)))
    assert type(trainer).__module__.startswith("distill_trainers.")
    assert trainer.state.global_step == 2
    if "save_model" in getattr(SCRIPTS, name):
        assert (Path(trainer.args.output_dir) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name, words",
    [
        ("SFT_START", "Got no teacher model, which GKDTrainer learns from.*`teacher_model`"),
        ("SFT", "Got no teacher model, which GKDTrainer learns from.*`teacher_model`"),
        ("DPO_START", "Got no teacher model, which DPKDTrainer learns from.*`teacher_model`"),
        ("DISTILLATION", r"has prompts alone.*train on rollouts only \(lmbda=1\)"),
        ("DPO", "DPKDTrainer has no argument `ref_model`: write `teacher_model=`.*set `reference='student'`"),
    ],
)
def test_the_script_stops_with_a_sentence_that_names_the_argument(run, name, words):
    with pytest.raises((ConfigurationError, DatasetError), match=words):
        run(_moved(getattr(SCRIPTS, name)))


def test_the_sentences_remedies_are_enough(run):
    """What they say to write is written, and no more: then the scripts train."""
    dpo = _moved(SCRIPTS.DPO).replace("ref_model=ref_model", "teacher_model=ref_model")
    distillation = _moved(SCRIPTS.DISTILLATION).replace("max_steps=2", "max_steps=2, lmbda=1")
    sft = _moved(SCRIPTS.SFT).replace("    STUDENT,\n", "    STUDENT,\n    teacher_model=TEACHER,\n")
    with pytest.raises(DatasetError, match=r"plain text, which has no prompts.*off-policy \(lmbda=0\)"):
        run(sft)
    for script in (dpo, distillation, sft.replace("max_steps=2", "max_steps=2, lmbda=0")):
        assert run(script).state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "GKD", "GKD_SCRIPT", "DPO", "DISTILLATION"])
def test_the_scripts_are_trls(run, name):
    """As they stand they train with TRL; those that leave its settings out want a GPU."""
    trainer = run(getattr(SCRIPTS, name))
    assert type(trainer).__module__.startswith("trl.") and trainer.state.global_step == 2
