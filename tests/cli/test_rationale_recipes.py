"""Recipes and pipelines of rationale distillation: parsed, and the small one run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_trainers.cli import main
from distill_trainers.cli.rationales import parse_arguments

ROOT = Path(__file__).parents[2]
PIPELINES = sorted(ROOT.glob("recipes/*/pipeline/*.yaml"))
SMALL = ROOT / "recipes/smollm2-135m/rationale.yaml"


def test_pipelines_exist():
    assert len(PIPELINES) >= 3


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: f"{p.parents[1].name}/{p.name}")
def test_every_pipeline_parses(path):
    args = parse_arguments(["--config", str(path)])
    assert args.teacher and args.questions and args.folder.startswith("runs/")


def tiny(saved, tmp_path, *options):
    changes = ["--model_name_or_path", saved.student, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    return ["train", "--config", str(SMALL), *changes, "--max_new_tokens", "8", "--max_length", "256", *options]


@pytest.mark.parametrize("objective", ["step_by_step", "edit", "dual_chain"])
def test_the_small_recipe_runs(saved, tmp_path, monkeypatch, objective):
    monkeypatch.chdir(ROOT)
    assert main(tiny(saved, tmp_path, "--objective", objective, "--eval_accuracy_samples", "8")) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0 and "eval_kl" not in metrics
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2305.02301" in card and "the text of its training data" in card and "| Accuracy |" in card


def test_its_plan_needs_no_teacher(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(tiny(saved, tmp_path, "--dry_run", "true")) == 0
    assert "no teacher" in capsys.readouterr().out
    assert main(tiny(saved, tmp_path, "--distill_weight", "1.0", "--dry_run", "true")) == 2
    assert "names no teacher" in capsys.readouterr().err
    named = ["--distill_weight", "1.0", "--teacher_model_name_or_path", saved.teacher]
    assert main(tiny(saved, tmp_path, *named, "--dry_run", "true")) == 0


def test_its_rows_are_right(tmp_path):
    for line in (ROOT / "recipes/smollm2-135m/data/sums.jsonl").read_text().splitlines():
        row = json.loads(line)
        a, b = row["question"].removeprefix("What is ").rstrip("?").split(" + ")
        assert row["answer"] == str(int(a) + int(b)) != row["wrong_answer"]
        assert row["rationale"] != row["wrong_rationale"]
