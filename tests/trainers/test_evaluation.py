"""Evaluation is teacher-forced: exact means over all tokens, the same at every call, from the text it was given."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from distill_trainers import GKDConfig
from distill_trainers.exceptions import DatasetError
from distill_trainers.toy import addition_dataset, addition_rows


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_equals_a_dense_reference_at_any_batch_size(make_trainer, dense, jsd_mean, batch_size):
    trainer = make_trainer(
        eval_dataset=addition_dataset(10, seed=5), per_device_eval_batch_size=batch_size, lmbda=1.0, beta=0.3
    )
    metrics = trainer.evaluate()
    found = dense(trainer.model, trainer.teacher.model, trainer.eval_dataset)
    nll = -found.q.gather(1, found.labels[:, None]).mean()
    teacher_nll = -found.p.gather(1, found.labels[:, None]).mean()
    assert metrics["eval_tokens"] == len(found.labels) == sum(len(r["completion"]) + 1 for r in addition_rows(10, 5))
    assert metrics["eval_loss"] == pytest.approx(jsd_mean(found, beta=0.3), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert metrics["eval_teacher_perplexity"] == pytest.approx(teacher_nll.exp().item(), rel=1e-4)
    assert metrics["eval_kl"] == pytest.approx((found.p.exp() * (found.p - found.q)).sum(-1).mean().item(), rel=1e-5)
    agreement = (found.p.argmax(-1) == found.q.argmax(-1)).double().mean().item()
    assert metrics["eval_top1_agreement"] == pytest.approx(agreement, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_acceptance_is_that_of_drafts_at_the_sampling_temperature(make_trainer, dense, temperature):
    trainer = make_trainer(eval_dataset=addition_dataset(6, seed=5), lmbda=0.0, temperature=temperature)
    models = trainer.model, trainer.teacher.model
    found = dense(*models, trainer.eval_dataset, temperature=temperature or 1e-4)  # the limit of 0 is greedy
    expected = torch.minimum(found.p.exp(), found.q.exp()).sum(-1).mean().item()
    assert trainer.evaluate()["eval_acceptance"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_samples_nothing_and_repeats_exactly(make_trainer):
    trainer = make_trainer(eval_dataset=addition_dataset(8, seed=5), lmbda=1.0)

    def refuse(*args, **kwargs):
        raise AssertionError("evaluation generated")

    trainer.model.generate = trainer.teacher.model.generate = refuse
    names = ("eval_loss", "eval_kl", "eval_perplexity", "eval_top1_agreement")
    first, second = trainer.evaluate(), trainer.evaluate()
    assert [first[name] for name in names] == [second[name] for name in names]


def test_evaluation_does_not_disturb_training(make_trainer, by_step):
    runs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": addition_dataset(8, seed=5)}):
        trainer = make_trainer(lmbda=0.5, max_steps=4, **settings)
        trainer.train()
        runs.append((by_step(trainer), by_step(trainer, "trained_tokens")))
    assert runs[0] == runs[1]


def _count_generate(teacher):
    calls, inner = [], teacher.model.generate

    def generate(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        return inner(*args, **kwargs)

    teacher.model.generate = generate
    return calls


def test_prompts_without_completions_are_evaluated_on_the_teachers_text_generated_once(make_trainer, tmp_path):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in addition_rows(9, seed=5)])
    metrics = []
    for expected in (9, 0):
        trainer = make_trainer(eval_dataset=prompts, completions_dir=str(tmp_path / "kept"), rollout_engine="hf")
        calls = _count_generate(trainer.teacher)
        metrics.append(trainer.evaluate())
        assert trainer.evaluate()["eval_loss"] == metrics[-1]["eval_loss"]
        assert sum(calls) == expected
    assert metrics[0]["eval_tokens"] >= 9
    assert metrics[0]["eval_kl"] == metrics[1]["eval_kl"]


def test_a_stream_is_evaluated_like_its_rows(make_trainer):
    rows = addition_dataset(9, seed=5)
    trainer = make_trainer(eval_dataset=rows.to_iterable_dataset(), per_device_eval_batch_size=4)
    found, expected = trainer.evaluate(), make_trainer(eval_dataset=rows, per_device_eval_batch_size=4).evaluate()
    names = ("eval_loss", "eval_kl", "eval_perplexity", "eval_tokens")
    assert [found[name] for name in names] == [expected[name] for name in names]
    assert hasattr(trainer.get_eval_dataloader(), "__len__"), "processes share what has a length"


@pytest.mark.parametrize("seq_kd", [False, True])
def test_a_stream_is_evaluated_on_the_teachers_text_where_rows_would_be(make_trainer, seq_kd, tmp_path):
    rows = addition_rows(9, seed=5)
    data = Dataset.from_list(rows if seq_kd else [{"prompt": row["prompt"]} for row in rows])
    settings = {"lmbda": 0.0, "seq_kd": seq_kd, "completions_dir": str(tmp_path / "kept")}
    expected = make_trainer(eval_dataset=data, **settings).evaluate()
    found = make_trainer(eval_dataset=data.to_iterable_dataset(), **settings).evaluate()
    given = make_trainer(eval_dataset=addition_dataset(9, seed=5), lmbda=0.0).evaluate()
    assert found["eval_kl"] == expected["eval_kl"] != given["eval_kl"]


def test_evaluation_over_no_token_is_refused(make_trainer):
    row = {"input_ids": [3, 4, 5], "labels": [-100] * 3, "prompt_length": 3}
    trainer = make_trainer(eval_dataset=addition_dataset(4, seed=5))
    loader = torch.utils.data.DataLoader(Dataset.from_list([row] * 2), batch_size=2, collate_fn=trainer.data_collator)
    with pytest.raises(DatasetError, match="no tokens to score"):
        trainer.evaluation_loop(loader, "Evaluation")


def test_the_best_model_is_that_of_the_lowest_perplexity_unless_another_metric_is_named(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    config = GKDConfig(str(tmp_path), **best)
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_perplexity", False)
    for metric, greater in (("eval_kl", False), ("eval_nll", False), ("eval_top1_agreement", True)):
        config = GKDConfig(str(tmp_path), metric_for_best_model=metric, **best)
        assert (config.metric_for_best_model, config.greater_is_better) == (metric, greater)


def test_several_evaluation_sets_are_reported_apart(make_trainer, tmp_path):
    sets = {"near": addition_dataset(6, seed=5), "far": addition_dataset(9, seed=6)}
    trainer = make_trainer(eval_dataset=sets, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    for name, data in sets.items():
        alone = trainer.evaluate(data)
        assert logged[f"eval_{name}_kl"] == pytest.approx(alone["eval_kl"], rel=1e-6)
        assert logged[f"eval_{name}_tokens"] == alone["eval_tokens"]


def test_the_card_shows_the_scores_of_every_evaluation_set(make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset={"near": addition_dataset(6, seed=5), "far": addition_dataset(9, seed=6)})
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("near", "far"):
        assert f"{metrics[f'eval_{name}_kl']:.4f}" in card
