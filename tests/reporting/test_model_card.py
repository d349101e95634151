"""Model cards: valid for the Hub, whole for a reader, and without paths."""

from __future__ import annotations

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig

from distill_trainers.cards.model_card import model_card, with_scores
from distill_trainers.evaluation.results import (
    EvaluationResults,
    GapClosed,
    MeasureInfo,
    MeasureScore,
    ModelResults,
)
from distill_trainers.exceptions import DatasetError
from distill_trainers.toy import addition_dataset

GAP = GapClosed(0.62, 0.5, 0.7, decided=True)


def _results(source="out", gap=GAP):
    def model(name, role, source, value, **more):
        score = MeasureScore(value, value - 1, value + 1, **more)
        return ModelResults(name, role, source, "f", {"perplexity": score})

    models = [model("teacher", "teacher", "org/big", 10.0), model("before", "baseline", "student_init", 60.0)]
    models.append(model("student", "student", source, 29.0, gap_closed=gap))
    measures = {"perplexity": MeasureInfo("Perplexity", "", False)}
    return EvaluationResults(models, measures, {"confidence": 0.9}, {"name": "held-out.jsonl", "rows": 48})


def _metadata(card):
    return yaml.safe_load(card.split("---")[1])


def _trained(make_trainer, **settings):
    trainer = make_trainer(eval_dataset=addition_dataset(8, seed=5), **settings)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_a_card_is_whole_and_valid(make_trainer):
    trainer = _trained(make_trainer, hub_model_id="me/student", seed=7, divergence="reverse_kl")
    trainer.data_sources = ["org/rows"]
    card = ModelCard(model_card(trainer.card_facts()))
    (_, scores) = model_index_to_eval_results(card.data.to_dict()["model-index"])
    metrics = trainer.last_eval_metrics
    assert {s.metric_type: s.metric_value for s in scores}["kl"] == pytest.approx(metrics["eval_kl"], rel=1e-4)
    assert card.data.library_name == "transformers" and card.data.datasets == ["org/rows"]
    for heading in ("Scores", "Training", "How to reproduce", "Limits", "Licence", "Method and citation"):
        assert f"\n## {heading}\n" in card.text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert recipe["method"] == "gkd" and recipe["divergence"] == "reverse_kl" and recipe["seed"] == 7
    assert not [key for key in recipe if key.startswith(("hub_", "push_"))]
    assert "arXiv:2306.13649" in card.text and "eprint = {2306.13649}" in card.text
    assert re.search(r"pip install .*torch==", card.text) and "distill-trainers train --config" in card.text


def test_licences_that_differ_are_told(make_trainer, tmp_path, caplog):
    for name, license_id in (("big", "llama2"), ("small", "apache-2.0"), ("rows", "mit")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {license_id}\n---\n")
    trainer = make_trainer()
    trainer.teacher.name, trainer.data_sources = str(tmp_path / "big"), [str(tmp_path / "rows")]
    trainer.model.config._name_or_path = str(tmp_path / "small")
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    told = "The licences differ (apache-2.0, llama2, mit)"
    assert told in card and "improve no other language models" in card and "license" not in _metadata(card)
    assert f"Licences: {told}" in caplog.text and str(tmp_path) not in card
    for name in ("big", "small", "rows"):
        (tmp_path / name / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert _metadata(model_card(trainer.card_facts()))["license"] == "cc-by-nc-4.0"


def test_no_evaluation_is_said(make_trainer):
    card = model_card(make_trainer().card_facts())
    assert "No evaluation was run." in card and "model-index" not in _metadata(card)
    ModelCard(card)


def test_measures_of_the_evaluations_in_training_are_in_the_card(make_trainer):
    trainer = _trained(make_trainer)
    trainer.log({"eval_rouge_l": 33.0, "eval_completion_tokens": 7.0, "eval_gap_closed_rouge_l": 0.4})
    card = model_card(trainer.card_facts())
    index = {each.metric_type: each.metric_value for each in ModelCard(card).data.eval_results}
    assert index["rouge_l"] == 33.0 and "gap_closed_rouge_l" not in index and "kl" in index
    assert "| Rouge-L (F x 100) | 33.0000 |" in card and "| Gap closed: Rouge-L | 0.4000 |" in card


def test_several_sets(make_trainer):
    sets = {"easy": addition_dataset(8, seed=5), "hard": addition_dataset(8, seed=6)}
    trainer = make_trainer(eval_dataset=sets)
    trainer.evaluate()
    index = _metadata(model_card(trainer.card_facts()))["model-index"][0]["results"]
    assert {result["dataset"]["name"] for result in index} == {"easy", "hard"}


def test_scores_of_an_evaluation_come_with_intervals_and_the_gap(make_trainer, tmp_path):
    trainer = make_trainer(hub_model_id="me/student")
    before = model_card(trainer.card_facts())
    (tmp_path / "out").mkdir(exist_ok=True)
    _results().save(tmp_path / "out")
    for card in (model_card(trainer.card_facts()), with_scores(before, _results(), "out")):
        assert "| Perplexity | 10.000 [9.000, 11.000] | 60.000 [59.000, 61.000] | 29.000 [28.000, 30.000] |" in card
        assert "62 % [50, 70]" in card and "90 % intervals" in card and card.count("<!-- scores -->") == 1
        (score,) = ModelCard(card).data.eval_results
        assert score.metric_value == 29.0 and score.dataset_name == "held-out.jsonl"
        assert score.metric_args == {"confidence": 0.9, "low": 28.0, "high": 30.0, "gap_closed": 0.62}
    assert with_scores(with_scores(before, _results(), "out"), _results(), "out") == with_scores(
        before, _results(), "out"
    )


def test_scores_of_another_student_are_refused(make_trainer):
    results = _results()
    results.models.append(ModelResults("second", "student", "second", "f"))
    with pytest.raises(DatasetError, match="of 'mine', they are of out, second"):
        with_scores(model_card(make_trainer().card_facts()), results, "mine")


def test_a_gap_within_noise_is_no_result(make_trainer):
    card = with_scores(model_card(make_trainer().card_facts()), _results(gap=GapClosed(0.62, -3.0, 4.0)), "out")
    (score,) = ModelCard(card).data.eval_results
    assert "(62 %)" in card and "gap_closed" not in score.metric_args


def test_a_damaged_evaluation_costs_no_card(make_trainer, tmp_path, caplog):
    trainer = make_trainer()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "evaluation.json").write_text("{")
    assert "No evaluation was run." in model_card(trainer.card_facts()) and "own scores" in caplog.text


def test_adapters_and_their_base(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer.model.get_base_model().config._name_or_path = "org/small"
    metadata = _metadata(model_card(trainer.card_facts()))
    assert metadata["library_name"] == "peft" and metadata["base_model_relation"] == "adapter"
    assert metadata["base_model"] == "org/small"
    merged = _metadata(model_card(trainer.card_facts(), merged=True))
    assert merged["library_name"] == "transformers" and merged["base_model_relation"] == "finetune"
