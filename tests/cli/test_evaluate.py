"""`distill-trainers evaluate`: one table of several models, files beside it, refusals before weights, the bridge."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_trainers import models
from distill_trainers.cli import main
from distill_trainers.evaluation import EvaluationResults
from distill_trainers.evaluation.harness import Harness, harness_scores
from distill_trainers.evaluation.results import ModelResults
from distill_trainers.evaluation.settings import EvaluationSettings
from distill_trainers.toy import addition_rows


@pytest.fixture
def config(tmp_path, saved):
    """`config(**changes)` writes a small file of settings; a change to None drops the key."""
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in addition_rows(5, seed=5)))

    def write(**changes):
        content = {
            "students": {"after": saved.teacher},
            "teacher": saved.teacher,
            "baseline": saved.student,
            "dataset": str(data),
            "output_dir": str(tmp_path / "out"),
            "metrics": ["perplexity", "agreement", "rouge_l", "accuracy"],
            "answer_formats": ["first_line"],
            "answer_kind": "number",
            "seeds": [1],
            "max_length": 20,
            "max_new_tokens": 4,
            "bootstrap_samples": 50,
            "use_cpu": True,
            **changes,
        }
        path = tmp_path / "evaluation.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return str(path)

    return write


def test_a_table_and_its_files(config, tmp_path, capsys):
    assert main(["evaluate", "--config", config()]) == 0
    shown = capsys.readouterr().out
    assert "Forward KL to the teacher" in shown and "(100 %)" in shown
    results = EvaluationResults.load(tmp_path / "out")
    assert [(m.name, m.role) for m in results.models] == [
        ("teacher", "teacher"), ("baseline", "baseline"), ("after", "student"),
    ]  # fmt: skip
    assert results.data["name"] == "test.jsonl" and str(tmp_path) not in results.to_json()
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "Gap to the teacher" in text and str(tmp_path) not in text
    assert (tmp_path / "out" / "cache" / "completions").is_dir()
    assert main(["evaluate", "--config", config(), "--metrics", "perplexity", "--seeds", "1", "2"]) == 0
    assert EvaluationResults.load(tmp_path / "out").measures.keys() == {"perplexity", "bits_per_byte"}


@pytest.fixture
def refused(config, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the settings were refused")

    monkeypatch.setattr(models, "load_causal_lm", load)

    def message(changes, *options):
        assert main(["evaluate", "--config", config(**changes), *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"studnets": {"a": "b"}}, "Did you mean 'students'"),
        ({"student": "x"}, "both `student` and `students`"),
        ({"students": None, "teacher": None, "baseline": None}, "name no model"),
        ({"students": {"after": 5}}, "expected a folder or Hub id"),
        ({"students": "runs/gkd"}, "students"),
        ({"students": {"after": "./no/such/folder"}}, "student model './no/such/folder' is not a folder"),
        ({"teacher": "Some/Typo"}, "teacher model 'Some/Typo' cannot be read"),
        ({"dataset": None}, "name no data"),
        ({"dataset": "no/such/file.jsonl"}, "no such file"),
        ({"column_mapping": {"question": "prompt"}}, "question"),
        ({"metrics": ["rouge"]}, "rouge_l"),
        ({"metrics": "perplexity,kl"}, "metrics"),
        ({"temperature": "warm"}, "temperature"),
        ({"seeds": ["one"]}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
        ({"lm_eval_tasks": ["arc_easy"]}, "pip install lm-eval"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_loaded(refused, changes, expected, monkeypatch):
    found = importlib.util.find_spec  # lm-eval is missing here also where it is installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    assert expected in refused(changes)


def test_an_unknown_option(refused):
    assert "Did you mean 'max_samples'" in refused({}, "--max_sampels", "3")


def test_a_dry_run_loads_nothing(config, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_causal_lm", None)
    assert main(["evaluate", "--config", config(), "--dry_run", "true"]) == 0
    assert "perplexity, agreement, rouge_l, accuracy on 5 rows" in capsys.readouterr().out


def test_help(capsys):
    assert main(["evaluate"]) == 0 and "usage: distill-trainers evaluate" in capsys.readouterr().out


# ---- lm-eval --------------------------------------------------------------------------------------------------------

ANSWER = {
    "results": {
        "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 1, "acc_stderr,x": "N/A"},
    },
    "higher_is_better": {"sums": {"acc": True}},
}


def test_scores_of_lm_eval_by_our_names():
    assert harness_scores(ANSWER) == {
        "lm_eval/sums/acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
        "lm_eval/sums/exact,strict": {"value": 1.0, "stderr": None, "higher_is_better": None},
    }


class Named:
    """A subject whose lm-eval scores are known."""

    def __init__(self, name, role, value):
        self.name, self.role, self.value = name, role, value


def test_the_gap_of_a_task(monkeypatch):
    subjects = [Named("teacher", "teacher", 0.9), Named("baseline", "baseline", 0.5), Named("mine", "student", 0.8)]
    answer = {"stderr": 0.05, "higher_is_better": True}
    harness = Harness(EvaluationSettings())
    harness.tasks = ["sums"]
    monkeypatch.setattr(
        harness, "_run", lambda subject, *rest: {"lm_eval/sums/acc": {**answer, "value": subject.value}}
    )
    results = EvaluationResults([ModelResults(s.name, s.role, "", "") for s in subjects], {})
    harness.add_scores(results, subjects, None)
    score = results.model("mine").scores["lm_eval/sums/acc"]
    assert (score.low, score.high) == (pytest.approx(0.8 - 0.098, abs=1e-3), pytest.approx(0.898, abs=1e-3))
    assert score.difference.value == pytest.approx(0.3)
    assert score.gap_closed.value == pytest.approx(0.75) and score.gap_closed.decided
    assert results.measures["lm_eval/sums/acc"].title == "sums acc (lm-eval)"


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """Settings that name a folder with tasks of one's own, and their rows; lm-eval's own tasks take long to be read."""
    manager = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    monkeypatch.setattr(manager, "TaskManager", partial(manager.TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{n}+2=", "answer": str(n + 2), "label": n % 2} for n in range(1, 7)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choice = {
        "task": "tiny_sums",
        "output_type": "multiple_choice",
        "doc_to_target": "{{label}}",
        "doc_to_choice": ["3", "5"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    reading = {
        "task": "tiny_reading",
        "output_type": "loglikelihood",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    for task in (choice, reading):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return {"lm_eval_include_path": str(folder), "metrics": ["perplexity"]}, rows


def test_tasks_of_ones_own_through_lm_eval(config, own_tasks, saved, tmp_path, monkeypatch):
    """Accuracy and perplexity by lm-eval are those of the models' own probabilities; a second time runs no model."""
    settings, rows = own_tasks
    path = config(**settings, lm_eval_tasks=["tiny_*"])
    assert main(["evaluate", "--config", path]) == 0
    results = EvaluationResults.load(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(saved.teacher)
    for name, folder in (("teacher", saved.teacher), ("baseline", saved.student), ("after", saved.teacher)):
        model, right, read = AutoModelForCausalLM.from_pretrained(folder), 0, 0.0
        for row in rows:
            asked, answer = (tokenizer(row[key]).input_ids for key in ("question", "answer"))
            with torch.no_grad():
                logps = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 :].log_softmax(-1)
            choices = logps[0, tokenizer.convert_tokens_to_ids(["3", "5"])]
            right += int(choices.argmax()) == row["label"]
            read += sum(logps[i, token].item() for i, token in enumerate(answer))
        score = results.model(name).scores["lm_eval/tiny_sums/acc"]
        assert score.value == pytest.approx(right / len(rows)) and score.low <= score.value <= score.high
        perplexity = results.model(name).scores["lm_eval/tiny_reading/perplexity"]
        assert perplexity.value == pytest.approx(math.exp(-read / len(rows)), rel=1e-4)
        assert perplexity.low < perplexity.value < perplexity.high  # resampled
    assert results.measures["lm_eval/tiny_reading/perplexity"].higher_is_better is False
    monkeypatch.setattr(models, "load_causal_lm", None)
    assert main(["evaluate", "--config", path]) == 0


def test_tasks_that_cannot_be_run_are_refused_before_weights_are_loaded(own_tasks, refused, tmp_path):
    settings, _ = own_tasks
    said = refused({**settings, "lm_eval_tasks": ["tiny_sums", "tiny_smus"]})
    assert "`lm_eval_tasks: tiny_smus`" in said and "Did you mean 'tiny_sums'" in said
    assert "expected a folder" in refused({**settings, "lm_eval_tasks": ["x"], "lm_eval_include_path": "no/such"})
    (tmp_path / "tasks" / "rows.jsonl").unlink()
    said = refused({**settings, "lm_eval_tasks": ["tiny_sums"]})
    assert "`lm_eval_tasks: tiny_sums`, but lm-eval cannot load" in said


def test_a_stopped_task_keeps_those_before_it(config, own_tasks, saved, monkeypatch):
    import lm_eval

    settings, _ = own_tasks
    path, evaluate, run = config(**settings, lm_eval_tasks=["tiny_sums", "tiny_reading"]), lm_eval.simple_evaluate, []

    def stopped(**given):
        run.append(given["tasks"][0])
        if len(run) == 4:
            raise KeyboardInterrupt
        return evaluate(**given)

    monkeypatch.setattr(lm_eval, "simple_evaluate", stopped)
    assert main(["evaluate", "--config", path]) == 130
    assert main(["evaluate", "--config", path]) == 0
    # the model `after` is the teacher again, and is known by its weights
    assert run == ["tiny_sums", "tiny_reading", "tiny_sums", "tiny_reading", "tiny_reading"]


def test_a_student_of_nan_is_named(config, saved, tmp_path, capsys):
    """Its perplexity would be none, and its text that of whichever token sorts first."""
    broken = AutoModelForCausalLM.from_pretrained(saved.student)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(saved.student).save_pretrained(tmp_path / "broken")
    assert main(["evaluate", "--config", config(students={"broken": str(tmp_path / "broken")})]) == 2
    error = capsys.readouterr().err
    assert "broken" in error and "model.layers.0.mlp.up_proj.weight" in error and "NaN" in error
