"""`metric_for_best_model` is a score that evaluation gives, or it is refused before anything is loaded."""

import pytest
import transformers

from distill_trainers import DPKDConfig, GKDConfig, GKDTrainer, LocalTeacher, RationaleConfig, models
from distill_trainers.evaluation.measures import higher_is_better
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.given.best_metric import scores_of

PLAIN = {"output_dir": "out", "use_cpu": True, "report_to": "none"}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {**EVALUATES, "load_best_model_at_end": True}
TWO = {"easy": addition_dataset(4, seed=8), "hard": addition_dataset(4, seed=9)}
WAYS = [
    ("gkd", {"lmbda": 0.0, "lm_loss_weight": 0.5}),
    ("gkd", {"lmbda": 1.0}),
    ("minillm", {}),
    ("minillm", {"objective": "token", "lmbda": 0.5, "lm_loss_weight": 0.1}),
    ("dpkd", {"logprob_mse_weight": 0.5}),
    ("dpkd", {"loss_type": "contrastive_skew"}),
    ("rationale", {}),
    ("rationale", {"objective": "edit", "distill_weight": 1.0}),
    ("rationale", {"objective": "dual_chain", "eval_accuracy": False}),
]


@pytest.mark.parametrize(("method", "settings"), WAYS, ids=str)
def test_the_scores_are_those_of_an_evaluation(make_trainer, rows_for, method, settings):
    trainer = make_trainer(method=method, eval_dataset=rows_for(method)(4, seed=9), **settings)
    given = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"epoch", "model_preparation_time"}
    of_levels = {name for name in given if name.startswith("accuracy_")}
    assert given - of_levels == scores_of(trainer.args)


@pytest.fixture
def refused(make_trainer, saved, monkeypatch):
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))

    def message(evaluation, **settings):
        with pytest.raises(ConfigurationError) as error:
            make_trainer(student=saved.student, teacher=saved.teacher, eval_dataset=evaluation, **BEST | settings)
        return str(error.value)

    return message


def test_the_default_does_not_exist_with_two_sets(refused):
    said = refused(TWO)
    assert "eval_perplexity` with the evaluation sets easy, hard" in said
    assert "eval_easy_perplexity, eval_hard_perplexity" in said


@pytest.mark.parametrize(
    ("evaluation", "metric", "told"),
    [
        ("one", "eval_perplexty", "eval_perplexity"),
        ("one", "eval_divergance", "eval_divergence"),
        ("one", "eval_easy_loss", "eval_loss"),
        ("one", "eval_lm_loss", "eval_loss"),  # it is 0 without a weight, and not logged
        ("two", "loss", "eval_easy_loss, eval_hard_loss"),
        ("two", "eval_eazy_kl", "eval_easy_kl"),
    ],
)
def test_names_that_no_evaluation_gives(refused, evaluation, metric, told):
    said = refused(TWO if evaluation == "two" else TWO["easy"], metric_for_best_model=metric)
    assert f"`metric_for_best_model: {metric}`" in said and told in said


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_tokenizer": "own"},
        {"temperature": 0.5, "teacher_cache": "cache", "teacher_cache_kind": "topk", "divergence": "forward_kl"},
    ],
    ids=["a draft with another tokenizer", "a top k at another temperature"],
)
def test_acceptance_where_nothing_tells_it(refused, tmp_path, settings):
    settings = {name: str(tmp_path / value) if value == "cache" else value for name, value in settings.items()}
    said = refused(TWO["easy"], metric_for_best_model="eval_acceptance", lmbda=0.0, **settings)
    assert "`metric_for_best_model: eval_acceptance`" in said and "expected a score that evaluation gives" in said


@pytest.mark.parametrize(("tells", "metric"), [("topk of 4 ids", "eval_acceptance"), ("token_logprobs", "eval_kl")])
def test_a_score_that_a_teacher_given_in_python_does_not_tell(make_trainer, make_teacher, monkeypatch, tells, metric):
    """Its own kind counts, not the settings, which are of teachers that are named."""
    teacher = LocalTeacher(make_teacher())
    settings = {"eval_dataset": TWO["easy"], "lmbda": 0.0, "temperature": 0.5, **BEST, "metric_for_best_model": metric}
    make_trainer(teacher=teacher, **settings)
    monkeypatch.setattr(type(teacher), "tells", tells)
    with pytest.raises(ConfigurationError, match="expected a score that evaluation gives"):
        make_trainer(teacher=teacher, **settings)


def test_a_tied_head_is_not_missing_when_the_best_model_is_loaded(make_trainer, make_student, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *args: said.append(message))
    trainer = make_trainer(make_student(tie_word_embeddings=True), eval_dataset=TWO["easy"], max_steps=1, **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint and not any("missing keys" in message for message in said)
    found = trainer.model.load_state_dict({"lm_head.weight": trainer.model.lm_head.weight}, strict=False)
    trainer._issue_warnings_after_load(found)
    assert "missing keys" in said[-1] and "norm.weight" in said[-1] and "embed_tokens" not in said[-1]


def test_early_stopping_needs_a_score_that_comes(refused):
    """transformers switches it off with a warning after the first evaluation, where no best model is kept."""
    said = refused(TWO["easy"], load_best_model_at_end=False, metric_for_best_model="eval_top1_agreemnt")
    assert "eval_top1_agreement" in said


@pytest.mark.parametrize("metric", ["eval_easy_perplexity", "hard_kl", "eval_hard_divergence"])
def test_with_two_sets_the_best_model_is_that_of_one(make_trainer, metric):
    trainer = make_trainer(eval_dataset=TWO, metric_for_best_model=metric, lmbda=0.0, max_steps=2, **BEST)
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = {e["step"]: e[name] for e in trainer.state.log_history if name in e}
    assert trainer.state.best_global_step == min(values, key=values.get)


def test_a_metric_is_not_asked_for_where_nothing_is_evaluated(make_trainer):
    make_trainer(metric_for_best_model="eval_anything", lmbda=0.0)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("eval_loss", False),
        ("eval_easy_jsd", False),
        ("eval_easy_reverse_kl", False),
        ("eval_easy_ece", False),
        ("eval_easy_top1_agreement", True),
        ("eval_easy_acceptance", True),
        ("eval_hard_self_bleu", False),
        ("eval_hard_rouge_l", True),
        ("eval_gap_closed_kl", True),
    ],
)
def test_the_direction_does_not_depend_on_the_set(metric, better):
    assert higher_is_better(metric) is better


@pytest.mark.parametrize(
    ("config", "metric", "better"),
    [
        (RationaleConfig, "eval_label", False),
        (RationaleConfig, "eval_hard_rationale", False),
        (RationaleConfig, "eval_accuracy", True),
        (DPKDConfig, "eval_preference", False),
        (DPKDConfig, "eval_reward_accuracy", True),
        (DPKDConfig, "eval_reward_margin", True),
        (GKDConfig, "divergence", False),
    ],
)
def test_of_a_term_of_the_loss_less_is_better(config, metric, better):
    assert config(**PLAIN, metric_for_best_model=metric).greater_is_better is better


def test_the_user_has_the_last_word():
    assert GKDConfig(**PLAIN, metric_for_best_model="eval_kl", greater_is_better=True).greater_is_better is True


def test_a_score_of_ones_own_is_taken(make_student, make_teacher, tokenizer, tmp_path):
    """With `compute_metrics` nobody but its author knows the names."""
    args = GKDConfig(**{**PLAIN, **BEST, "output_dir": str(tmp_path)}, lmbda=0.0, metric_for_best_model="eval_mine")
    own = {"eval_dataset": TWO["easy"], "compute_metrics": lambda prediction: {"mine": 1.0}}
    trainer = GKDTrainer(make_student(), make_teacher(), args, addition_dataset(4), processing_class=tokenizer, **own)
    assert trainer.evaluate()["eval_mine"] == 1.0
