"""Recipes whose teacher reads another prompt, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_trainers.cli import main
from distill_trainers.cli.evaluate import parse_arguments, prepare_evaluation
from distill_trainers.toy import tiny_llama

ROOT = Path(__file__).parents[2]
HASHES = "{% for m in messages %}##{{ m['role'] }} {{ m['content'] }} {% endfor %}##assistant "


def history(tmp_path):
    return json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_a_cache_is_filled_ahead_with_the_teachers_rows(recipe, tmp_path, capsys):
    keys = {"lmbda": 0.0, "teacher_prompt": "9+{prompt}", "teacher_max_length": 30}
    assert main(["train", "--config", recipe(**keys)]) == 0
    live = history(tmp_path)
    keys |= {"teacher_cache": str(tmp_path / "cache"), "teacher_placement": "cached", "overwrite_output_dir": True}
    assert main(["cache-teacher", "--config", recipe(**keys)]) == 0
    assert main(["train", "--config", recipe(**keys, teacher_model_name_or_path=None)]) == 0
    cached = history(tmp_path)
    for ours, theirs in zip(cached, live, strict=True):
        assert ("loss" in ours) == ("loss" in theirs) and abs(ours.get("loss", 0) - theirs.get("loss", 0)) < 1e-4
    capsys.readouterr()
    other = recipe(**keys, teacher_model_name_or_path=None)
    assert main(["train", "--config", other, "--teacher_prompt", "{prompt}9+"]) == 2
    assert "24 of 24 different rows in the training rows are not in the teacher cache" in capsys.readouterr().err


def test_evaluation_of_a_run_asks_its_teacher_as_the_run_did(recipe, tmp_path, tokenizer):
    data = tmp_path / "hinted.jsonl"
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b), "hint": "9+"} for a in range(6) for b in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    mapping = {"question": "prompt", "answer": "completion"}
    keys = {"dataset": str(data), "column_mapping": mapping, "eval_fraction": 4, "lmbda": 0.0, "max_steps": 1}
    assert main(["train", "--config", recipe(**keys, teacher_prompt="{hint}{question}")]) == 0
    args, settings = parse_arguments(["--run", str(tmp_path / "out"), "--use_cpu", "true"])
    examples = prepare_evaluation(args, settings).examples.examples
    texts = [tokenizer.decode(example.teacher_prompt_ids) for example in examples]
    assert texts == [f"9+{example.prompt_text}" for example in examples] and len(texts) == 4


def test_evaluation_asks_students_and_teacher_each_in_its_own_chat_template(tmp_path, make_tokenizer):
    """As training does: the student's prompt by the student's, the teacher's own by the teacher's."""
    models, data = {}, tmp_path / "chat.jsonl"
    for name, template in (("teacher", HASHES), ("student", None), ("plain", "")):
        tokenizer, models[name] = make_tokenizer(), str(tmp_path / name)
        tokenizer.chat_template = tokenizer.chat_template if template is None else template or None
        tokenizer.save_pretrained(models[name])
        tiny_llama(tokenizer, 16, 1).save_pretrained(models[name])
    data.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1"}]})
    )

    def asked(student, teacher):
        options = ["--student", models[student], "--teacher", models[teacher], "--dataset", str(data)]
        options += ["--teacher_system_prompt", "S", "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
        (example,) = prepare_evaluation(*parse_arguments(options)).examples.examples
        return [make_tokenizer().decode(ids) for ids in (example.prompt_ids, example.teacher_prompt_ids)]

    own, view = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "##system S ##user Hi ##assistant "
    assert asked("student", "teacher") == [own, view]
    assert asked("plain", "teacher") == ["##user Hi ##assistant ", view]  # a student without a template takes the other
    assert asked("student", "plain") == [own, "<|im_start|>system\nS<|im_end|>\n" + own]


def test_pairs_are_not_made_of_two_prompts(recipe, capsys):
    path = recipe(method="dpkd", teacher_prompt="9+{prompt}", pairs_file="pairs.jsonl")
    assert main(["pairs", "--config", path]) == 2
    assert "where pairs are written for one prompt, which both models answer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_puts_a_system_prompt_into_the_weights(tmp_path, make_tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    tokenizer = make_tokenizer()
    tiny_llama(tokenizer, 32, 1, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    keys = {
        "model_name_or_path": tmp_path / "model",
        "output_dir": tmp_path / "out",
        "max_train_samples": 8,
        "eval_dataset": "recipes/smollm2-135m/prompts_train.jsonl",
        "max_new_tokens": 4,
        "max_steps": 2,
        "teacher_max_length": 512,
        "eval_strategy": "no",
        "eval_on_start": "false",
        "logging_steps": 1,
        "learning_rate": 0.05,
        "warmup_steps": 0,
    }
    options = [text for name, value in keys.items() for text in (f"--{name}", str(value))]
    recipe = "recipes/smollm2-135m/prompt_distillation.yaml"
    assert main(["train", "--config", recipe, *options]) == 0
    losses = [row["loss"] for row in history(tmp_path) if "loss" in row]
    assert len(losses) == 2 and losses[0] > 0  # the model alone would be its own teacher, with loss 0
