"""DPKD: the loss of a pair, what fixed responses do to it, where responses come from, references on disk, the guard."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig

from distill_trainers import DPKDConfig
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.teachers import DeferredTeacher
from distill_trainers.toy import addition_dataset, addition_rows
from distill_trainers.trainers.dpkd import references
from distill_trainers.trainers.dpkd.guard import CollapseGuard
from distill_trainers.trainers.preflight import prepare_rows


def pairs(count=12, seed=0, wrong="7"):
    """Right answers of one to three digits over wrong ones of one to four."""
    rows = addition_rows(count, seed)
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": wrong * (1 + i % 4)}
            for i, r in enumerate(rows)
        ]
    )


@pytest.fixture
def make_pair_trainer(make_trainer, make_student, make_teacher):
    """A DPKD trainer on given pairs, in float64 and without an anchor unless told otherwise."""

    def make(student=None, teacher=None, train=None, **settings):
        own = {"lm_loss_weight": 0.0, **settings}
        models = student or make_student().double(), teacher or make_teacher().double()
        return make_trainer(*models, train if train is not None else pairs(), method="dpkd", **own)

    return make


def loss_and_terms(trainer, batch):
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, trainer.score([batch])[0], return_outputs=True)
    return loss, outputs


def per_pair(terms, name):
    """The values of pairs: each stands on one token, all others hold 0."""
    values = terms[name]
    return values[values != 0]


def sequence_logps(model, ids, start):
    """Sum of log-probabilities of `ids[start:]`, one unpadded row, without anything of the package."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return F.log_softmax(logits[:-1], -1)[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum()


def by_hand(trainer, student=None):
    """Log-ratios to the teacher and lengths of both responses of each pair: (ratio_w, n_w, ratio_l, n_l)."""
    student, teacher = student or trainer.model, trainer.teacher.model
    for row in trainer.train_dataset:
        start, found = row["prompt_length"], []
        for ids in (row["input_ids"], row["input_ids"][:start] + row["rejected_ids"]):
            with torch.no_grad():
                reference = sequence_logps(teacher, ids, start)
            found += [sequence_logps(student, ids, start) - reference, len(ids) - start]
        yield found


# ---- The loss -------------------------------------------------------------------------------------------------------


def test_a_student_equal_to_its_teacher_has_ln_2(make_pair_trainer, make_teacher, batch_of):
    teacher = make_teacher().double()
    trainer = make_pair_trainer(copy.deepcopy(teacher), teacher)
    loss, terms = loss_and_terms(trainer, batch_of(trainer))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-9)
    assert terms["reward_margin"].abs().max() < 1e-9
    other = make_pair_trainer(teacher=teacher)
    assert abs(loss_and_terms(other, batch_of(other))[0].item() - math.log(2)) > 1e-2


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_value_by_hand_on_ragged_pairs(make_pair_trainer, batch_of, loss_type, normalized):
    trainer = make_pair_trainer(loss_type=loss_type, beta=0.7, length_normalized=normalized)
    expected = []
    for ratio_w, n_w, ratio_l, n_l in by_hand(trainer):
        margin = 0.7 * (ratio_w / (n_w if normalized else 1) - ratio_l / (n_l if normalized else 1)).item()
        expected.append(
            {
                "sigmoid": -math.log(1 / (1 + math.exp(-margin))),
                "ipo": (margin / 0.7 - 1 / 1.4) ** 2,
                "hinge": max(0, 1 - margin),
            }[loss_type]
        )
    loss, terms = loss_and_terms(trainer, batch_of(trainer))
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    if loss_type != "hinge":
        assert per_pair(terms, "preference").tolist() == pytest.approx(expected, rel=1e-9)


def test_simpo_needs_no_teacher(make_pair_trainer, batch_of, monkeypatch):
    trainer = make_pair_trainer(loss_type="simpo", beta=2.0, target_margin=0.3)
    monkeypatch.setattr(trainer.teacher, "signal", None)
    expected = []
    for row in trainer.train_dataset:
        start = row["prompt_length"]
        sides = row["input_ids"], row["input_ids"][:start] + row["rejected_ids"]
        w, l = (sequence_logps(trainer.model, ids, start).item() / (len(ids) - start) for ids in sides)
        expected.append(math.log(1 + math.exp(0.3 - 2 * (w - l))))
    assert loss_and_terms(trainer, batch_of(trainer))[0].item() == pytest.approx(sum(expected) / 12, rel=1e-9)


@pytest.mark.parametrize("normalized", [True, False])
def test_gradient_is_the_corrected_closed_form(make_pair_trainer, batch_of, normalized):
    """−β·σ(r̂_l − r̂_w)·[∇log q(y_w)/|y_w| − ∇log q(y_l)/|y_l|], with the sign that eq. 11 of the paper has not."""
    beta = 0.7
    trainer = make_pair_trainer(beta=beta, length_normalized=normalized)
    loss_and_terms(trainer, batch_of(trainer))[0].backward()
    ours = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    found = list(by_hand(trainer))
    total = 0
    for ratio_w, n_w, ratio_l, n_l in found:
        n_w, n_l = (n_w, n_l) if normalized else (1, 1)
        weight = torch.sigmoid(beta * (ratio_l / n_l - ratio_w / n_w)).detach()
        total = total - beta * weight * (ratio_w / n_w - ratio_l / n_l) / len(found)
    total.backward()
    for name, p in trainer.model.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-7, atol=1e-11), name


def test_swapping_pairs_flips_margins(make_pair_trainer, batch_of):
    swapped = pairs().rename_columns({"chosen": "rejected", "rejected": "chosen"})
    found = []
    for train in (pairs(), swapped):
        trainer = make_pair_trainer(train=train)
        found.append(loss_and_terms(trainer, batch_of(trainer))[1])
    assert torch.allclose(per_pair(found[0], "reward_margin"), -per_pair(found[1], "reward_margin"), atol=1e-12)
    assert torch.allclose(per_pair(found[0], "reward_chosen"), per_pair(found[1], "reward_rejected"), atol=1e-12)
    accuracy = [each["reward_accuracy"].sum().item() for each in found]
    assert sum(accuracy) == 12 and 0 < accuracy[0] < 12


def test_padding_changes_nothing(make_pair_trainer, batch_of):
    losses, gradients = [], []
    for settings in ({}, {"pad_to_multiple_of": 16}, {"loss_chunk_mib": 1e-4}):
        trainer = make_pair_trainer(lm_loss_weight=0.5, logprob_mse_weight=0.2, **settings)
        loss = loss_and_terms(trainer, batch_of(trainer))[0]
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.model.model.embed_tokens.weight.grad)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-10)
    assert all(torch.allclose(each, gradients[0], atol=1e-10) for each in gradients)
    trainer = make_pair_trainer()
    alone = [loss_and_terms(trainer, batch_of(trainer, [i]))[0].item() for i in range(12)]
    together = loss_and_terms(trainer, batch_of(trainer))[0].item()
    assert together == pytest.approx(sum(alone) / 12, rel=1e-9), "a mean over pairs, whatever their lengths"


def test_anchor_and_squared_difference_are_added(make_pair_trainer, batch_of):
    trainer = make_pair_trainer(lm_loss_weight=0.5, logprob_mse_weight=0.25)
    loss, terms = loss_and_terms(trainer, batch_of(trainer))
    nll, tokens, squares = 0.0, 0, []
    for row, (ratio_w, n_w, ratio_l, n_l) in zip(trainer.train_dataset, by_hand(trainer), strict=True):
        nll -= sequence_logps(trainer.model, row["input_ids"], row["prompt_length"]).item()
        tokens += n_w
        squares += [(ratio_w / n_w).item() ** 2, (ratio_l / n_l).item() ** 2]
    preference = per_pair(terms, "preference").mean().item()
    assert loss.item() == pytest.approx(preference + 0.5 * nll / tokens + 0.25 * sum(squares) / 24, rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_anchor_without_weight_is_not_logged(make_pair_trainer, by_step, weight):
    trainer = make_pair_trainer(lm_loss_weight=weight, max_steps=2)
    trainer.train()
    assert len(by_step(trainer, "lm_loss")) == (2 if weight else 0)
    assert len(by_step(trainer, "nll_chosen")) == 2


def test_a_head_that_cannot_be_fused_gives_the_same(make_pair_trainer, batch_of):
    losses = []
    for fused in (True, False):
        trainer = make_pair_trainer(lm_loss_weight=1.0, logprob_mse_weight=1.0)
        trainer.two_models.head_is_fused = fused
        loss = loss_and_terms(trainer, batch_of(trainer))[0]
        loss.backward()
        losses.append((loss.item(), trainer.model.model.embed_tokens.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- Fixed responses ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """The toy of the benchmark that the plot in the docs is made by."""
    file = Path(__file__).parents[2] / "benchmarks" / "collapse.py"
    spec = importlib.util.spec_from_file_location("collapse", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy_gradient(toy, folder, student, rejected, **settings):
    """Gradient of the trainer's loss with respect to the output matrix, at a given student."""
    trainer = toy.toy_trainer(str(folder), start=student, **settings)
    trainer.compute_loss(trainer.model, toy.batch_of_pairs(trainer, toy.TEACHER, rejected)).backward()
    return trainer.model.lm_head.weight.grad.abs().max().item()


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_with_fixed_responses_the_optimum_is_not_the_teacher(toy, tmp_path, beta):
    """Stationary at q ∝ p·(p/s)^(1/β), not at p."""
    assert toy_gradient(toy, tmp_path, toy.optimum(beta), toy.START, beta=beta) < 1e-9
    assert toy_gradient(toy, tmp_path, toy.TEACHER, toy.START, beta=beta) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"lm_loss_weight": 1.0}, {"loss_type": "ipo"}, {"logprob_mse_weight": 1.0}])
def test_with_the_students_own_responses_the_teacher_is_stationary(toy, tmp_path, settings):
    assert toy_gradient(toy, tmp_path, toy.TEACHER, toy.TEACHER, **settings) < 1e-12


def test_fixed_responses_drift_and_the_defaults_do_not(toy, tmp_path):
    trainer = toy.toy_trainer(str(tmp_path), beta=0.1)
    path = toy.descend(trainer, 60, 0.1, on_policy=False)
    teacher = torch.tensor(toy.TEACHER, dtype=torch.float64) / toy.PARTS
    to_teacher, to_optimum = toy.kl_to(path, teacher), toy.kl_to(path, toy.optimum(0.1))
    assert min(to_teacher) < to_teacher[0] < to_teacher[-1], "past the teacher, and farther than it began"
    assert to_optimum[-1] < 0.02 and path[-1][0] > 0.99 > teacher[0]
    defaults = toy.toy_trainer(str(tmp_path), lm_loss_weight=None)
    assert (defaults.args.beta, defaults.args.lm_weight, defaults.args.refresh_steps) == (1.0, 1.0, 1)
    path = toy.descend(defaults, 60, 0.1, on_policy=True)
    assert toy.kl_to(path, teacher)[-1] < 0.05 < toy.kl_to(path, teacher)[0]


def test_the_defaults_train_towards_the_teacher_by_themselves(toy, tmp_path):
    """The same in the trainer's own loop, with rollouts of the student at every step."""
    settings = {"max_steps": 40, "learning_rate": 0.05, "lr_scheduler_type": "constant", "logging_steps": 100}
    settings |= {"per_device_train_batch_size": 32, "save_strategy": "no", "lm_loss_weight": None, "weight_decay": 0.0}
    trainer = toy.toy_trainer(str(tmp_path), **settings)
    teacher = torch.tensor(toy.TEACHER, dtype=torch.float64) / toy.PARTS
    prompts = Dataset.from_list([{"prompt": toy.PROMPT}] * 32)
    trainer.train_dataset = prepare_rows(trainer.args, prompts, trainer.processing_class, "train", trainer.requirements)
    # The chosen side is drawn here: the teacher answers each prompt once, so equal prompts alike.
    ids = trainer.processing_class.convert_tokens_to_ids(list(toy.TOKENS))
    drawn = [w for w, count in enumerate(toy.TEACHER) for _ in range(count * 32 // toy.PARTS)]
    drawn += [0] * (32 - len(drawn))

    def answered(row, index):
        prompt = row["input_ids"][: row["prompt_length"]]
        return {"input_ids": [*prompt, ids[drawn[index]]], "labels": [-100] * len(prompt) + [ids[drawn[index]]]}

    trainer.train_dataset = trainer.train_dataset.map(answered, with_indices=True, load_from_cache_file=False)
    trainer._ready_train = trainer.train_dataset
    trainer.model.requires_grad_(False)
    trainer.model.lm_head.weight.requires_grad_(True)
    before = toy.kl_to([toy.distribution(trainer.model, trainer.processing_class)], teacher)[0]
    trainer.train()
    after = toy.kl_to([toy.distribution(trainer.model, trainer.processing_class)], teacher)[0]
    assert after < 0.1 < before


# ---- Where responses come from --------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Batches of a run as they reach the loss."""
    from distill_trainers import DPKDTrainer

    seen, own = [], DPKDTrainer.score

    def score(self, batches):
        seen.append([{k: v.clone() for k, v in b.items()} for b in batches])
        return own(self, batches)

    monkeypatch.setattr(DPKDTrainer, "score", score)
    return seen


def responses(batch):
    """(prompt and chosen, prompt and rejected) of each pair, unpadded."""
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))


@pytest.mark.parametrize("refresh", [1, 3])
def test_rejected_responses_are_refreshed(make_trainer, by_step, recorded, refresh):
    trainer = make_trainer(method="dpkd", refresh_steps=refresh, max_steps=7, learning_rate=0.0)
    trainer.train()
    sampled = [step - 1 for step, number in by_step(trainer, "rollouts").items() if number]
    assert sampled == list(range(0, 7, refresh))
    kept = {str(pair) for pair in responses(recorded[0][0])}
    for step in range(1, 7):
        now = {str(pair) for pair in responses(recorded[step][0])}
        if step % refresh:
            assert now == kept, "the pairs of the last sampling step, and no others"
        else:
            assert now != kept
            kept = now
    prompts = [row["input_ids"][: row["prompt_length"]] for row in trainer.train_dataset]
    for batch in (batch for step in recorded for batch in step):
        for chosen, rejected in responses(batch):
            assert any(chosen[: len(p)] == p == rejected[: len(p)] for p in prompts), "both follow one prompt"


def test_chosen_responses_are_the_teachers_or_the_datasets(make_trainer, recorded):
    answers = {}
    for chosen in ("teacher", "dataset"):
        trainer = make_trainer(method="dpkd", chosen=chosen, max_steps=6, learning_rate=0.0)
        trainer.train()
        answers[chosen] = {tuple(each) for step in recorded for each, _ in responses(step[0])}
        recorded.clear()
    given = {tuple(row["input_ids"]) for row in trainer.train_dataset}
    assert answers["dataset"] == given and not answers["teacher"] & given


def test_evaluation_keeps_its_pairs(make_trainer, tmp_path):
    """Scores of two steps compare, and a resumed run reads the responses of the student that the first began with."""
    settings = {"method": "dpkd", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    trainer = make_trainer(eval_dataset=addition_dataset(6, seed=9), **settings)
    before = trainer.evaluate()
    rows = [row["rejected_ids"] for row in trainer.get_eval_dataloader().dataset]
    trainer.train()
    assert [row["rejected_ids"] for row in trainer.get_eval_dataloader().dataset] == rows
    after = trainer.evaluate()
    assert after["eval_nll_rejected"] != before["eval_nll_rejected"]
    expected = {"reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected", "nll_chosen", "nll_rejected"}
    expected |= {"sequence_kl", "chosen_length", "rejected_length", "kl", "top1_agreement", "preference", "lm_loss"}
    expected |= {"acceptance"}
    assert {f"eval_{name}" for name in expected} <= after.keys()
    resumed = make_trainer(eval_dataset=addition_dataset(6, seed=9), **settings)
    resumed.written_by = "another"
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [row["rejected_ids"] for row in resumed.get_eval_dataloader().dataset] == rows


@pytest.mark.parametrize("train", ["default", "pairs"])
def test_prompts_of_evaluation_leave_room_for_the_students_responses(make_trainer, train):
    long = Dataset.from_list([{"prompt": "1+" * 11 + "1="}] * 3)
    trainer = make_trainer(method="dpkd", train=pairs() if train == "pairs" else train, eval_dataset=long)
    assert all(batch["input_ids"].shape[1] <= trainer.args.max_length for batch in trainer.get_eval_dataloader())


def test_a_stream_of_pairs(make_trainer, by_step):
    """Processes read batches of their own: those of different lengths cannot be split."""
    settings = {"method": "dpkd", "max_steps": 4, "train_sampling_strategy": "sequential"}
    runs = []
    for train in (pairs(), pairs().to_iterable_dataset()):
        trainer = make_trainer(train=train, **settings)
        trainer.train()
        runs.append(by_step(trainer))
    assert trainer.args.accelerator_config.dispatch_batches is False
    assert runs[0] == runs[1]


def test_evaluation_after_training_has_the_responses_of_before(make_trainer):
    settings = {"method": "dpkd", "max_steps": 4, "learning_rate": 0.1, "eval_dataset": addition_dataset(6, seed=9)}
    found = []
    for evaluates_first in (True, False):
        trainer = make_trainer(**settings)
        trainer.args.completions_dir = f"{trainer.args.output_dir}/{evaluates_first}"
        if evaluates_first:
            trainer.evaluate()
        trainer.train()
        found.append([row["rejected_ids"] for row in trainer.get_eval_dataloader().dataset])
    assert found[0] == found[1]


def test_evaluation_is_of_the_chosen_responses(make_pair_trainer, dense):
    """KL, perplexity and agreement compare with other methods on the same answers; rejected ones play no part."""
    trainer = make_pair_trainer()
    trainer.eval_dataset = trainer.train_dataset
    scores = trainer.evaluate()
    rows = list(trainer.train_dataset)
    found = dense(trainer.model, trainer.teacher.model, rows)
    kl = (found.p.exp() * (found.p - found.q)).sum(-1)
    assert scores["eval_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert scores["eval_sequence_kl"] == pytest.approx(kl.sum().item() / len(rows), rel=1e-5)
    nll = -found.q.gather(1, found.labels[:, None]).mean().item()
    assert scores["eval_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert scores["eval_tokens"] == len(found.labels)
    margins = [ratio_w / n_w - ratio_l / n_l for ratio_w, n_w, ratio_l, n_l in by_hand(trainer)]
    assert scores["eval_reward_margin"] == pytest.approx(sum(map(float, margins)) / len(rows), rel=1e-5)


def test_the_last_batch_of_an_evaluation_counts_its_pairs_once(make_pair_trainer):
    scores = []
    for size in (1, 5, 12):
        trainer = make_pair_trainer(per_device_eval_batch_size=size)
        trainer.eval_dataset = trainer.train_dataset
        scores.append(trainer.evaluate())
    for name in ("eval_loss", "eval_kl", "eval_reward_margin", "eval_nll_rejected"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-5) == pytest.approx(scores[2][name], rel=1e-5)


# ---- References -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, "none", "all"])
def test_the_initial_student_as_reference(make_pair_trainer, make_student, batch_of, adapter):
    """At the start the margin is 0; after training, of biases of the base too, that against the student as given."""
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft = LoraConfig(**lora, bias=adapter) if adapter else None
    student = make_student(attention_bias=adapter == "all").double()
    trainer = make_pair_trainer(student, reference="student", peft_config=peft, max_steps=3, learning_rate=1e-2)
    initial = copy.deepcopy(trainer.model)
    batch = batch_of(trainer)
    loss, terms = loss_and_terms(trainer, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-9)
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    every = {"none": ("lora_",), "all": ("lora_", "bias"), None: ("",)}[adapter]
    assert trained == {name for name, _ in trainer.model.named_parameters() if any(part in name for part in every)}
    margins = per_pair(loss_and_terms(trainer, batch)[1], "reward_margin")
    for margin, row in zip(margins, trainer.train_dataset, strict=True):
        start, means = row["prompt_length"], []
        for ids in (row["input_ids"], row["input_ids"][:start] + row["rejected_ids"]):
            now, then = (sequence_logps(model, ids, start).item() for model in (trainer.model, initial))
            means.append((now - then) / (len(ids) - start))
        assert margin.item() == pytest.approx(means[0] - means[1], abs=1e-9)


def test_an_adapter_that_has_been_trained_is_part_of_the_reference(make_pair_trainer, make_student, batch_of):
    from peft import get_peft_model

    student = get_peft_model(make_student().double(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trainer = make_pair_trainer(student, reference="student")
    assert loss_and_terms(trainer, batch_of(trainer))[0].item() == pytest.approx(math.log(2), abs=1e-9)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_goes_on_with_the_reference_that_it_began_with(
    make_trainer, make_student, by_step, die_at, tmp_path, adapter
):
    peft = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None
    settings = {"method": "dpkd", "train": pairs(), "reference": "student", "max_steps": 6, "peft_config": peft}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    with pytest.raises(die_at.error):
        make_trainer(callbacks=[die_at(5)], **settings).train()
    with pytest.raises(ConfigurationError, match="another student than the run to be resumed began with"):
        make_trainer(make_student(seed=99), **settings).train(resume_from_checkpoint=True)
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert by_step(resumed) == by_step(whole)


def logged(by_step, trainer):
    return [by_step(trainer, name) for name in ("loss", "reward_margin", "grad_norm")]


def test_kept_log_probabilities_train_alike_without_the_teacher(make_trainer, saved, tmp_path, by_step, monkeypatch):
    settings = {"method": "dpkd", "train": pairs(), "max_steps": 5}
    live = make_trainer(saved.student, saved.teacher, **settings)
    live.train()
    kept = {**settings, "reference_logps_dir": str(tmp_path / "kept")}
    first = make_trainer(saved.student, saved.teacher, **kept)
    assert isinstance(first.teacher, DeferredTeacher) and not first.teacher.is_live
    first.train()
    assert not first.teacher.is_live, "asked once, then let go"
    again = make_trainer(saved.student, saved.teacher, **kept)
    monkeypatch.setattr(again.teacher, "_load", None)
    again.train()
    for theirs in (first, again):
        for ours, other in zip(logged(by_step, live), logged(by_step, theirs), strict=True):
            assert ours == pytest.approx(other, rel=1e-4)


def test_a_killed_fill_goes_on_where_it_was(make_trainer, saved, tmp_path, monkeypatch):
    from distill_trainers.trainers.dpkd import references

    monkeypatch.setattr(references, "_FLUSH_SECONDS", 0.0)
    settings = {"method": "dpkd", "train": pairs(), "reference_logps_dir": str(tmp_path / "kept")}
    settings |= {"per_device_eval_batch_size": 2}
    trainer = make_trainer(saved.student, saved.teacher, **settings)
    ask, asked = trainer.references._ask, []

    def dies(batch, predicts):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(batch["input_ids"]))
        return ask(batch, predicts)

    monkeypatch.setattr(trainer.references, "_ask", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.references.fill(trainer.train_dataset)
    again = make_trainer(saved.student, saved.teacher, **settings)
    assert again.references.fill(again.train_dataset) == 24 - 6
    assert again.references.fill(again.train_dataset) == 0


def test_kept_log_probabilities_of_another_teacher_are_refused(make_trainer, saved, tmp_path, make_teacher, tokenizer):
    settings = {"method": "dpkd", "train": pairs(), "reference_logps_dir": str(tmp_path / "kept")}
    make_trainer(saved.student, saved.teacher, **settings)
    make_teacher(seed=8).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="reference_logps_dir"):
        make_trainer(saved.student, str(tmp_path / "other"), **settings)
    with pytest.raises(ConfigurationError, match="made by"):
        make_trainer(saved.student, saved.teacher, reference="student", **settings)


def test_log_probabilities_of_prompts_cannot_be_kept(make_trainer, tmp_path):
    with pytest.raises(ConfigurationError, match="new at every step"):
        make_trainer(method="dpkd", reference_logps_dir=str(tmp_path / "kept"))


@pytest.mark.parametrize("filled", [False, True])
def test_a_teacher_cache_holds_both_rows_of_a_pair(make_trainer, saved, tmp_path, by_step, monkeypatch, filled):
    """Rejected responses of a dataset come again in every epoch, as chosen ones do."""
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    settings = {"method": "dpkd", "train": pairs(), "max_steps": 6}
    live = make_trainer(saved.student, saved.teacher, **settings)
    live.train()
    settings["teacher_cache"] = str(tmp_path / "cache")
    first = make_trainer(saved.student, saved.teacher, **settings)
    if filled:
        done = fill_cache(first)
        assert done["rows"] == done["computed"] == 24 and fill_cache(first)["computed"] == 0
    else:
        first.train()
        assert by_step(first) == pytest.approx(by_step(live), rel=1e-4)
    again = make_trainer(saved.student, saved.teacher, **settings)
    monkeypatch.setattr(type(again.teacher), "live", lambda self: pytest.fail("asked again"))
    again.train()
    assert by_step(again) == pytest.approx(by_step(live), rel=1e-4)
    alone = make_trainer(saved.student, None, **settings, teacher_placement="cached")
    alone.train()
    assert by_step(alone) == pytest.approx(by_step(live), rel=1e-4)


def test_a_cache_alone_answers_no_prompts(make_trainer, saved, tmp_path):
    """The student's responses are new at every step, and the teacher's have to be written."""
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    settings = {"method": "dpkd", "teacher_cache": str(tmp_path)}
    fill_cache(make_trainer(saved.student, saved.teacher, train=pairs(), **settings))
    with pytest.raises(ConfigurationError, match="cannot write any"):
        make_trainer(saved.student, None, **settings, teacher_placement="cached")


# ---- The guard ------------------------------------------------------------------------------------------------------


def watch(logs, mode="warn", limit=1.0):
    guard = CollapseGuard(mode, limit)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    for step, (chosen, rejected) in enumerate(logs):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step)
        guard.on_log(None, state, control, {"nll_chosen": chosen, "nll_rejected": rejected})
    return guard, control


def test_the_guard_tells_collapse_from_learning(caplog):
    collapsing = [(2.0 + 0.1 * i, 2.0 + 0.4 * i) for i in range(12)]
    learning = [(2.0 - 0.1 * i, 2.0 + 0.4 * i) for i in range(12)]
    forgetting = [(2.0 + 0.1 * i, 2.0 - 0.05 * i) for i in range(12)]
    assert not watch(learning)[0].tripped and not watch(forgetting)[0].tripped
    assert not watch(collapsing, mode="off")[0].tripped and not caplog.records
    guard, control = watch(collapsing)
    assert guard.tripped and not control.should_training_stop
    (message,) = [record.message for record in caplog.records]
    for part in ("collapsing", "refresh_steps", "lm_loss_weight", "beta", "learning_rate", "rejected 2."):
        assert part in message
    assert watch(collapsing, mode="stop")[1].should_training_stop


def test_the_guard_goes_on_after_a_resume():
    whole, _ = watch([(2.0, 2.0 + 0.05 * i) for i in range(9)])
    half, _ = watch([(2.0, 2.0 + 0.05 * i) for i in range(4)])
    resumed = CollapseGuard("warn", 1.0)
    resumed.load_state_dict(half.state_dict())
    for i in range(4, 9):
        resumed.on_log(None, SimpleNamespace(), None, {"nll_chosen": 2.0, "nll_rejected": 2.0 + 0.05 * i})
    assert resumed.state_dict() == whole.state_dict()


def test_the_guard_stops_a_run_on_fixed_pairs(make_pair_trainer, caplog):
    """Few pairs, a small β, no anchor, a high learning rate: the reproduction that collapsed."""
    settings = {"beta": 0.1, "length_normalized": False, "guard": "stop", "guard_limit": 0.5, "learning_rate": 0.1}
    trainer = make_pair_trainer(train=pairs(24), max_steps=60, **settings)
    trainer.train()
    assert trainer.guard.tripped and trainer.state.global_step < 60
    assert "collapsing" in caplog.text


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"loss_type": "dpo"}, "loss_type: dpo"),
        ({"beta": 0.0}, "beta: 0.0"),
        ({"lm_loss_weight": -1.0}, "lm_loss_weight: -1.0"),
        ({"logprob_mse_weight": -1.0}, "logprob_mse_weight: -1.0"),
        ({"reference": "base"}, "reference: base"),
        ({"reference": "student", "loss_type": "simpo"}, "reference: student"),
        ({"chosen": "human"}, "chosen: human"),
        ({"refresh_steps": 0}, "refresh_steps: 0"),
        ({"replay_buffer_size": 64}, "replay_buffer_size: 64"),
        ({"replay_buffer_size": 1, "refresh_steps": 2}, "replay_buffer_size: 1"),
        ({"target_margin": 0.5}, "target_margin: 0.5"),
        ({"loss_type": "simpo", "length_normalized": False}, "length_normalized: False"),
        ({"skew_alpha": 0.001}, "skew_alpha: 0.001"),
        ({"kd_temperature": 2.0}, "kd_temperature: 2.0"),
        ({"bad_pairs": "keep"}, "bad_pairs: keep"),
        ({"guard": "on"}, "guard: on"),
        ({"guard_limit": 0.0}, "guard_limit: 0.0"),
        ({"assistant_only_loss": True}, "assistant_only_loss: True"),
        ({"teacher_cache_kind": "topk", "teacher_cache": "x"}, "teacher_cache_kind: topk"),
        ({"loss_type": "contrastive_skew", "reference_logps_dir": "x"}, "reference_logps_dir: x"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, settings, named):
    with pytest.raises(ConfigurationError) as caught:
        DPKDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert named in str(caught.value) and "expected" in str(caught.value)


def test_pairs_are_for_this_method_only(make_trainer):
    with pytest.raises(DatasetError, match="DPKD"):
        make_trainer(train=pairs(), lmbda=0.0)


def test_contrastive_skew_adapts_and_remembers(make_trainer, die_at, tmp_path):
    """α follows the gaps of the step before; evaluation takes α₀ and the last weights."""
    settings = {"method": "dpkd", "loss_type": "contrastive_skew", "train": pairs(24), "max_steps": 4}
    trainer = make_trainer(**settings)
    shares = []
    trainer.after_step, after = (
        lambda loss: (shares.append(trainer.contrastive_share()), after(loss)),
        trainer.after_step,
    )
    trainer.train()
    assert all(value != 0 for value in trainer.skew_gaps.values())
    assert shares == [0.625, 0.75, 0.75, 0.75]  # of the steps to come
    trainer.model.eval()
    assert trainer.contrastive_share() == 0.75
    assert trainer.method_state()["gaps"] == trainer.skew_gaps


def test_a_sampler_that_answers_with_nothing_spoils_no_mean(make_trainer, by_step):
    """One empty response made the mean gap, and with it α of all responses to come, NaN."""
    trainer = make_trainer(method="dpkd", loss_type="contrastive_skew", max_steps=3)
    generate = trainer.engine.generate
    trainer.engine.generate = lambda *args: [[], *generate(*args)[1:]]
    trainer.train()
    assert all(math.isfinite(value) for value in trainer.skew_gaps.values())
    assert all(math.isfinite(loss) for loss in by_step(trainer).values())


@pytest.mark.parametrize(
    ("reference", "placement", "together"),
    [
        ("teacher", "zero3", True),
        ("teacher", "fsdp2", True),
        ("teacher", "replicate", False),
        ("student", "zero3", False),
    ],
)
def test_whether_all_processes_ask_the_reference_follows_its_placement(monkeypatch, reference, placement, together):
    """Under DDP, where the launch shards nothing: one that asks a sharded teacher alone would wait for the others."""
    monkeypatch.setattr(references.models, "zero_stage", lambda accelerator: None)
    monkeypatch.setattr(references.models, "fsdp_version", lambda accelerator: None)
    args = SimpleNamespace(reference=reference, teacher_placement=placement)
    asked = object.__new__(references.ReferenceLogps)
    asked.run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), args=args)
    assert asked._collective == together
