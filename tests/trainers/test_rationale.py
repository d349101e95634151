"""Rationale distillation: each loss against its formula, through the trainer's own loss function."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from distill_trainers import DistillConfig, DistillTrainer, GKDConfig, GKDTrainer, RationaleConfig
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.losses import token_logps
from distill_trainers.losses.reduction import step_counts
from distill_trainers.toy import addition_rationales
from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

# ---- References -----------------------------------------------------------------------------------------------------


def halves(trainer, rows):
    """First and other sequences of prepared rows, in the form that `dense` reads."""
    first = [{name: row[name] for name in ("input_ids", "labels", "marks")} for row in rows]
    other = [{name: row[f"other_{name}"] for name in ("input_ids", "labels", "marks")} for row in rows]
    return first, other


def nlls(model, sequences, chosen=None):
    """float64 −log q of every trained token, one unpadded sequence at a time."""
    model = copy.deepcopy(model).double().eval()
    found = []
    for each in sequences:
        ids = torch.tensor([each["input_ids"]])
        logps = F.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        places = [t for t in range(1, ids.shape[1]) if (chosen or (lambda s, t: s["labels"][t] != -100))(each, t)]
        found += [-logps[t - 1, ids[0, t]] for t in places]
    return torch.stack(found)


def grads(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).double()


def loss_of(trainer, batch_of, rows=range(8)):
    return trainer.compute_loss(trainer.model, batch_of(trainer, rows))


def rationale_trainer(make_trainer, **settings):
    return make_trainer(method="rationale", **settings)


# ---- Step by step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_step_by_step_is_the_sum_of_two_token_means(make_trainer, batch_of, weight):
    trainer = rationale_trainer(make_trainer, rationale_weight=weight)
    first, other = halves(trainer, [trainer.train_dataset[i] for i in range(8)])
    label, rationale = nlls(trainer.model, first), nlls(trainer.model, other)
    assert len(rationale) > 3 * len(label)
    expected = label.mean() + weight * rationale.mean()
    assert loss_of(trainer, batch_of).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradient_of_step_by_step(make_trainer, make_student, batch_of):
    trainer = rationale_trainer(make_trainer, student=make_student().double(), rationale_weight=0.7)
    found = grads(trainer, loss_of(trainer, batch_of))
    first, other = halves(trainer, [trainer.train_dataset[i] for i in range(8)])
    reference = make_student().double()
    total = 0.0
    for sequences, weight in ((first, 1.0), (other, 0.7)):
        terms = []
        for each in sequences:
            ids = torch.tensor(each["input_ids"])
            logps = F.log_softmax(reference(input_ids=ids[None]).logits[0], dim=-1)
            terms += [-logps[t - 1, ids[t]] for t in range(1, len(ids)) if each["labels"][t] != -100]
        total = total + weight * torch.stack(terms).mean()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)  # Llama normalises in float32


class LabelConfig(DistillConfig):
    needs = frozenset()


class PlainTrainer(DistillTrainer):
    """Fine-tuning on completions: −log q and nothing else."""

    loss_weights = {"nll": 1.0}

    def distill_terms(self, student, teacher, tokens):
        return {"nll": -token_logps(student, tokens["labels"])}


def test_without_rationales_it_is_plain_fine_tuning_on_labels(make_trainer, make_student, tokenizer, by_step, tmp_path):
    trainer = rationale_trainer(make_trainer, rationale_weight=0.0, max_steps=5)
    settings = {n: getattr(trainer.args, n) for n in ("max_steps", "learning_rate", "per_device_train_batch_size")}
    settings |= {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "use_cpu": True}
    rows = [{"prompt": f"={r['question']}=", "completion": r["answer"]} for r in addition_rationales(24)]
    args = LabelConfig(output_dir=str(tmp_path), max_length=40, logging_steps=1, disable_tqdm=True, **settings)
    plain = PlainTrainer(make_student(), None, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    plain.train()
    assert by_step(trainer) == by_step(plain)
    other = plain.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in trainer.model.state_dict().items())


def test_a_tiny_weight_of_rationales_is_nearly_none(make_trainer, batch_of):
    """The rows that a weight of 0 leaves out are there, and change nothing but what the weight says."""
    none = rationale_trainer(make_trainer, rationale_weight=0.0)
    tiny = rationale_trainer(make_trainer, rationale_weight=1e-12)
    assert len(batch_of(tiny, range(8))["input_ids"]) == 2 * len(batch_of(none, range(8))["input_ids"])
    assert loss_of(tiny, batch_of).item() == pytest.approx(loss_of(none, batch_of).item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.25, 0.8, 1.0])
def test_the_alpha_form_is_the_lambda_form_rescaled(make_trainer, make_student, batch_of, alpha):
    one = rationale_trainer(make_trainer, student=make_student().double(), alpha=alpha)
    two = rationale_trainer(make_trainer, student=make_student().double(), rationale_weight=(1 - alpha) / alpha)
    losses = [loss_of(trainer, batch_of) for trainer in (one, two)]
    assert losses[0].item() == pytest.approx(alpha * losses[1].item(), rel=1e-12)
    torch.testing.assert_close(grads(one, losses[0]), alpha * grads(two, losses[1]), rtol=1e-3, atol=1e-7)


def test_tasks_keep_their_own_counts_in_a_window_of_unlike_batches(make_trainer, make_student, batch_of):
    """The sum over micro-batches is the loss of all rows in one, though tasks have other shares in each."""
    trainer = rationale_trainer(make_trainer, student=make_student().double())
    rows = [*trainer.train_dataset]
    rows[0] = {**rows[0], "other_input_ids": [], "other_labels": [], "other_marks": []}  # a label alone
    parts = [trainer.data_collator(rows[:2]), trainer.data_collator(rows[2:8])]
    counts = step_counts(parts, trainer.loss_divisors)
    total = sum(trainer.compute_loss(trainer.model, part, num_items_in_batch=counts) for part in parts)
    first, other = halves(trainer, rows[:8])
    expected = nlls(trainer.model, first).mean() + nlls(trainer.model, other[1:]).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"rationale_weight": 0.0}, "rationale"),
        ({"objective": "dual_chain", "innovation_weight": 0.0}, "innovation"),
        ({"objective": "dual_chain", "answer_weight": 0.0, "innovation_weight": 0.0}, "answer"),
    ],
)
def test_terms_without_weight_are_measured_in_evaluation_alone(make_trainer, by_step, settings, unused):
    trainer = rationale_trainer(make_trainer, max_steps=2, eval_dataset=addition_rationales(4, seed=9), **settings)
    trainer.train()
    assert not by_step(trainer, unused)
    for name, weight in trainer.loss_weights.items():
        assert len(by_step(trainer, name)) == 2 and weight
    assert f"eval_{unused}" in trainer.evaluate()


def test_distillation_is_the_divergence_on_the_same_tokens(make_trainer, batch_of, dense):
    settings = {"distill_weight": 2.0, "divergence": "jsd", "divergence_params": {"beta": 0.3}, "kd_temperature": 1.5}
    trainer = rationale_trainer(make_trainer, **settings)
    rows = [trainer.train_dataset[i] for i in range(8)]
    first, other = halves(trainer, rows)
    found = dense(trainer.model, trainer.teacher.model, first + other, temperature=1.5)
    p, q = found.p.exp(), found.q.exp()
    m = 0.3 * p + 0.7 * q
    divergence = (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1).mean()
    expected = nlls(trainer.model, first).mean() + nlls(trainer.model, other).mean() + 2.0 * divergence
    assert loss_of(trainer, batch_of).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_that_the_loss_does_not_need_is_asked_in_evaluation_only(make_trainer, make_teacher, monkeypatch):
    trainer = rationale_trainer(make_trainer, teacher=make_teacher(), eval_dataset=addition_rationales(4, seed=9))
    asked, signal = [], trainer.teacher.signal
    monkeypatch.setattr(trainer.teacher, "signal", lambda *a: asked.append(trainer.model.training) or signal(*a))
    trainer.train()
    assert not asked
    assert trainer.evaluate()["eval_kl"] > 0 and not any(asked)


def test_a_stream_of_questions(make_trainer, by_step):
    settings = {"max_steps": 4, "train_sampling_strategy": "sequential"}
    runs = []
    for train in (addition_rationales(24), addition_rationales(24).to_iterable_dataset()):
        trainer = rationale_trainer(make_trainer, train=train, **settings)
        trainer.train()
        runs.append(by_step(trainer))
    assert trainer.args.accelerator_config.dispatch_batches is False
    assert runs[0] == runs[1]


# ---- Key steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, floor", [("likelihood", -10.0), ("likelihood", -2.5), ("unlikelihood", -10.0)])
def test_edit_is_the_weighted_sum_over_key_tokens(make_trainer, batch_of, kind, floor):
    settings = {"right_weight": 0.8, "wrong_weight": 0.3, "wrong_term": kind, "wrong_floor": floor}
    trainer = rationale_trainer(make_trainer, objective="edit", imitation_weight=0.5, **settings)
    first, other = halves(trainer, [trainer.train_dataset[i] for i in range(8)])
    right = nlls(trainer.model, first, lambda s, t: s["marks"][t])
    wrong = -nlls(trainer.model, other, lambda s, t: s["marks"][t])
    assert 0 < len(wrong) < sum(map(len, (s["input_ids"] for s in other)))
    values = wrong.clamp(min=floor) if kind == "likelihood" else -(1 - wrong.exp()).log()
    expected = (0.8 * right.sum() + 0.3 * values.sum()) / (len(right) + len(wrong))
    expected = expected + 0.5 * nlls(trainer.model, first).mean()
    assert loss_of(trainer, batch_of).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["likelihood", "unlikelihood"])
def test_gradient_of_wrong_steps(kind):
    from distill_trainers.losses import wrong_step_loss
    from distill_trainers.signals import TokenLogits

    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    logps = F.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
    expected = torch.where(logps < -3, -3.0, logps) if kind == "likelihood" else -torch.log1p(-logps.exp())
    (reference,) = torch.autograd.grad(expected.sum(), logits)
    student = TokenLogits(logits)
    found = wrong_step_loss(student, labels, token_logps(student, labels), kind, floor=-3.0)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("kind, lowest", [("likelihood", -10.0), ("unlikelihood", 0.0)])
def test_the_wrong_term_cannot_run_away(kind, lowest):
    from distill_trainers.losses import wrong_step_loss
    from distill_trainers.signals import TokenLogits

    for size in (10.0, 1e3, 1e6):
        logits = torch.tensor([[-size, size, 0.0], [size, -size, 0.0]], requires_grad=True)
        student, labels = TokenLogits(logits), torch.tensor([0, 0])  # one is long gone, one nearly certain
        found = wrong_step_loss(student, labels, token_logps(student, labels), kind)
        assert found[0] >= lowest and found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient.isfinite().all() and gradient[0].abs().max() < 1e-6


def test_training_against_wrong_steps_alone_stays_bounded(make_trainer, by_step):
    settings = {"right_weight": 0.0, "wrong_weight": 1.0, "wrong_floor": -4.0, "learning_rate": 0.05}
    trainer = rationale_trainer(make_trainer, objective="edit", max_steps=20, **settings)
    trainer.train()
    losses, logps = by_step(trainer), by_step(trainer, "wrong_logp")
    assert min(losses.values()) >= -4.0 and logps[20] < logps[1]


def test_identical_chains_have_no_loss(make_trainer, batch_of):
    rows = [
        {**row, "wrong_rationale": row["rationale"], "wrong_answer": row["answer"]} for row in addition_rationales(8)
    ]
    rows += list(addition_rationales(9, seed=3))[8:]
    trainer = rationale_trainer(make_trainer, train=Dataset.from_list(rows), objective="edit")
    assert len(trainer.train_dataset) == 1  # the one pair that differs; the others are dropped, and counted
    anchored = rationale_trainer(make_trainer, train=Dataset.from_list(rows), objective="edit", imitation_weight=1e-30)
    loss = loss_of(anchored, batch_of)
    assert abs(loss.item()) < 1e-20
    assert grads(anchored, loss).abs().max() < 1e-20


def test_key_tokens_are_the_edits_and_nothing_else_of_a_wrong_chain_is_trained(make_trainer, tokenizer, batch_of):
    trainer = rationale_trainer(make_trainer, objective="edit")
    row = next(row for row in trainer.train_dataset if row["task"] == "carry")
    chars = tokenizer.convert_ids_to_tokens
    right = [c for c, key in zip(chars(row["input_ids"]), row["marks"], strict=True) if key]
    wrong = [c for c, key in zip(chars(row["other_input_ids"]), row["other_marks"], strict=True) if key]
    assert 0 < len(right) <= 6 and 0 < len(wrong) <= 6  # carry, tens, and the answer's tens
    batch = trainer.data_collator([row])
    assert (batch["labels"][1] != -100).sum() == len(wrong) == batch["token_wrong_key"].sum()
    assert batch["token_key"].sum() == len(right) + len(wrong)


# ---- Dual chain -----------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that answers as it was told."""

    runs_the_model = True

    def __init__(self, texts, tokenizer):
        self.texts, self.tokenizer, self.asked = texts, tokenizer, 0

    def generate(self, model, prompt_ids, prompt_mask, sampling, streams=None):
        texts = [self.texts[i % len(self.texts)] for i in range(len(prompt_ids))]
        self.asked += len(prompt_ids)
        return [self.tokenizer(text.removesuffix("|")).input_ids + [1] * (not text.endswith("|")) for text in texts]


TEXTS = [
    "7+8=15==95",  # right and shorter
    "7+8=15=3+5+1=9==95",  # right, as long as the teacher's
    "7+8=15==94",  # wrong
    "==95",  # right, without a chain
    "7+8=15==95",  # the first once more
    "7+8==95|",  # right, but never ended
    "7+8=15",  # no answer
]


def dual_chain(make_trainer, **settings):
    rows = Dataset.from_list([{"question": "37+58", "answer": "95", "rationale": "7+8=15=3+5+1=9"}] * 2)
    how = {"objective": "dual_chain", "innovation_samples": len(TEXTS), "per_device_train_batch_size": 2}
    return rationale_trainer(make_trainer, train=rows, **{**how, **settings})


def test_only_right_shorter_chains_become_innovations(make_trainer, tokenizer, batch_of):
    trainer = dual_chain(make_trainer)
    trainer.engine = Scripted(TEXTS, tokenizer)
    (batch,) = trainer.rollout([batch_of(trainer)])
    assert trainer.engine.asked == 2 * len(TEXTS)
    new = batch["token_innovation"].sum(1).nonzero().flatten().tolist()
    assert new == [2, 3]  # below the two rows of the data, one for each
    for row in new:
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tokenizer.decode(ids).replace(" ", "").removesuffix("<eos>") == "37+58=7+8=15==95"
    assert (batch["labels"][2:] != -100).sum() == batch["token_innovation"].sum() == 2 * 11
    assert not batch["token_rationale"][2:].any() and not batch["token_answer"][2:].any()


def test_dual_chain_is_imitation_answer_and_innovation(make_trainer, tokenizer, batch_of):
    trainer = dual_chain(make_trainer, imitation_weight=0.9, answer_weight=0.4, innovation_weight=0.5)
    trainer.engine = Scripted(TEXTS, tokenizer)
    (batch,) = trainer.rollout([batch_of(trainer)])
    first, _ = halves(trainer, trainer.train_dataset)
    imitation = nlls(trainer.model, first, lambda s, t: s["labels"][t] != -100 and not s["marks"][t])
    answer = nlls(trainer.model, first, lambda s, t: s["marks"][t])
    assert len(answer) == 2 * 5  # "==95" and the end
    prompt, chain = tokenizer("37+58=").input_ids, [*tokenizer("7+8=15==95").input_ids, 1]
    mine = {"input_ids": prompt + chain, "labels": [-100] * len(prompt) + chain}
    expected = 0.9 * imitation.mean() + 0.4 * answer.mean() + 0.5 * nlls(trainer.model, [mine]).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_innovation_nothing_is_sampled(make_trainer):
    trainer = dual_chain(make_trainer, innovation_weight=0.0)
    assert not trainer.requirements.samples_completions and not hasattr(trainer, "engine")
    trainer.train()


def test_no_innovation_is_no_term(make_trainer, tokenizer, by_step):
    trainer = dual_chain(make_trainer, max_steps=2)
    trainer.engine = Scripted(["0==0"], tokenizer)
    trainer.train()
    assert list(by_step(trainer, "innovations").values()) == [0.0, 0.0]
    assert not by_step(trainer, "innovation")
    assert all(math.isfinite(loss) for loss in by_step(trainer).values())


# ---- Evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["step_by_step", "edit", "dual_chain"])
def test_evaluation_does_not_depend_on_batches(make_trainer, objective):
    scores = []
    for size in (5, 2):
        evaluation = addition_rationales(5, seed=9)
        how = {"objective": objective, "per_device_eval_batch_size": size, "eval_dataset": evaluation}
        scores.append(rationale_trainer(make_trainer, **how).evaluate())
    for name in ("eval_loss", "eval_perplexity", "eval_tokens", "eval_accuracy", "eval_tokens_per_answer"):
        assert scores[1][name] == pytest.approx(scores[0][name], rel=1e-5), name


def test_perplexity_of_edit_is_that_of_right_chains(make_trainer):
    trainer = rationale_trainer(make_trainer, objective="edit", eval_dataset=addition_rationales(5, seed=9))
    first, _ = halves(trainer, trainer.eval_dataset)
    expected = nlls(trainer.model, first).mean().exp().item()
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_accuracy_counts_right_answers_by_task(make_trainer, tokenizer, monkeypatch):
    evaluation = addition_rationales(20, seed=9)
    carry = sum(row["task"] == "carry" for row in evaluation)
    answers = {row["question"]: row["answer"] if row["task"] == "carry" else "0" for row in evaluation}

    class Knows(Scripted):
        def generate(self, model, prompt_ids, prompt_mask, sampling, streams=None):
            assert sampling.temperature == 0
            prompts = [
                tokenizer.decode(ids[m.bool()]).replace(" ", "") for ids, m in zip(prompt_ids, prompt_mask, strict=True)
            ]
            assert all(prompt[0] == prompt[-1] == "=" for prompt in prompts)  # the label task
            return [[*tokenizer(answers[prompt.strip("=")]).input_ids, 1] for prompt in prompts]

    module = "distill_trainers.trainers.rationale.trainer.local_engine"
    monkeypatch.setattr(module, lambda *args: Knows([], tokenizer))
    scores = rationale_trainer(make_trainer, eval_dataset=evaluation, per_device_eval_batch_size=3).evaluate()
    assert scores["eval_accuracy"] == carry / 20
    assert (scores["eval_accuracy_carry"], scores["eval_accuracy_plain"], scores["eval_answered"]) == (1.0, 0.0, 1.0)
    lengths = [len(answer) + 1 for answer in answers.values()]
    assert scores["eval_tokens_per_answer"] == sum(lengths) / 20


def test_without_answers_there_is_no_accuracy(make_trainer, caplog):
    """Chains without answers can be trained and scored on; the evaluation failed at its end."""
    rows = addition_rationales(4, seed=9).map(lambda row: {"answer": ""})
    scores = rationale_trainer(make_trainer, eval_dataset=rows, objective="edit").evaluate()
    assert scores["eval_loss"] and "eval_accuracy" not in scores and "no accuracy" in caplog.text


def test_early_stopping_can_watch_accuracy(make_trainer):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
    trainer = rationale_trainer(make_trainer, eval_dataset=addition_rationales(4, seed=9), **settings)
    assert trainer.args.greater_is_better
    trainer.train()
    assert trainer.state.best_metric is not None


@pytest.mark.slow
def test_rationales_teach_more_than_labels_alone(make_trainer, tokenizer, tmp_path):
    """The convergence gate: the same student, problems and updates; 6.7 % against 22.8 % when it was written.

    Of 500 problems the labels are soon known by heart. Two more seeds, and where it does not help: docs/log.md.
    """
    from distill_trainers.toy import ADAM_BETA2, tiny_llama

    rows = addition_rationales(2500, seed=5)
    settings = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 500, "max_new_tokens": 5}
    settings |= {"max_steps": 800, "warmup_steps": 80, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "seed": 1}
    settings |= {
        "adam_beta2": ADAM_BETA2,
        "train": rows.select(range(500)),
        "eval_dataset": rows.select(range(1500, 2500)),
    }
    accuracy = {}
    for weight in (0.0, 1.0):
        student = tiny_llama(tokenizer, 48, 2, seed=1)
        trainer = rationale_trainer(make_trainer, student=student, rationale_weight=weight, **settings)
        trainer.train()
        accuracy[weight] = trainer.evaluate()["eval_accuracy"]
    assert accuracy[1.0] > 1.4 * accuracy[0.0] > 0


# ---- Encoder-decoders -----------------------------------------------------------------------------------------------


def tiny_t5(tokenizer, **config):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ends, **config))


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_t5_has_the_loss_of_transformers(make_trainer, tokenizer, batch_of, weight):
    trainer = rationale_trainer(make_trainer, student=tiny_t5(tokenizer), rationale_weight=weight)
    reference = tiny_t5(tokenizer).double().eval()
    means = []
    for prefix, column in (("=", "answer"), ("+", "rationale")):
        total = count = 0
        for row in list(addition_rationales(24))[:8]:
            ids = tokenizer(f"{prefix}{row['question']}=", return_tensors="pt").input_ids
            labels = torch.tensor([[*tokenizer(row[column]).input_ids, 1]])
            total += reference(input_ids=ids, labels=labels).loss.item() * labels.shape[1]
            count += labels.shape[1]
        means.append(total / count)
    assert loss_of(trainer, batch_of).item() == pytest.approx(means[0] + weight * means[1], rel=1e-5)


def test_t5_learns_evaluates_saves_and_resumes(make_trainer, tokenizer, by_step, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    how = {"learning_rate": 1e-2, "eval_dataset": addition_rationales(6, seed=9), "max_steps": 30}
    trainer = rationale_trainer(make_trainer, student=tiny_t5(tokenizer), **how)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"] and after["eval_answered"] == 1.0
    assert after["eval_tokens_per_answer"] < 20
    trainer.save_model(str(tmp_path / "t5"))
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5").eval()
    ids = tokenizer("=37+58=", return_tensors="pt").input_ids
    expected = trainer.model.eval().generate(ids, max_new_tokens=4)
    assert torch.equal(again.generate(ids, max_new_tokens=4), expected)
    by_name = rationale_trainer(make_trainer, student=str(tmp_path / "t5"), max_steps=1)
    by_name.train()


def test_t5_answers_are_those_of_generate(tokenizer):
    from distill_trainers.rollouts import DecodeEngine, SamplingSettings

    model = tiny_t5(tokenizer).eval()
    prompts = torch.tensor([[0, 0, 4, 12, 5, 13], [4, 5, 12, 6, 6, 13]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = DecodeEngine(tokenizer).generate(model, prompts, mask, SamplingSettings(5, 0.0, eos_token_ids=[1]))
    for row, ids in enumerate(found):
        alone = model.generate(prompts[row][mask[row].bool()][None], max_new_tokens=5, do_sample=False)[0].tolist()
        assert alone[1 : 1 + len(ids)] == ids


def test_encoder_decoders_are_refused_elsewhere(make_trainer, make_teacher, tokenizer):
    with pytest.raises(ConfigurationError, match="t5.*step_by_step"):
        rationale_trainer(make_trainer, student=tiny_t5(tokenizer), objective="edit")
    with pytest.raises(ConfigurationError, match="t5.*rationale"):
        make_trainer(tiny_t5(tokenizer), method="gkd")
    with pytest.raises(ConfigurationError, match="distill_weight: 0"):
        rationale_trainer(make_trainer, student=tiny_t5(tokenizer), teacher=make_teacher(), distill_weight=1.0)


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "imitation"}, "step_by_step, edit, dual_chain"),
        ({"alpha": 0.0}, r"\(0, 1\]"),
        ({"alpha": 0.5, "rationale_weight": 2.0}, "either `alpha` or `rationale_weight`"),
        ({"rationale_weight": -1.0}, "0 or more"),
        ({"objective": "edit", "right_weight": 0.0, "wrong_weight": 0.0}, "some weight above 0"),
        ({"wrong_floor": 1.0}, "below 0"),
        ({"wrong_term": "hinge"}, "likelihood, unlikelihood"),
        ({"label_prompt": "Answer:"}, "{question}"),
        ({"chain_completion": "{answer} because {rationale}"}, "behind it"),
        ({"answer_formats": ["regex:("]}, "does not compile"),
        ({"answer_kind": "fuzzy"}, "auto, number"),
        ({"divergence": "klx"}, "klx"),
        ({"teacher_cache": "here"}, "`distill_weight` above 0"),
        ({"prompt_style": "chatty"}, "auto, text, chat"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        RationaleConfig(output_dir="x", **settings)


@pytest.mark.parametrize(
    "settings, rows",
    [({}, 48), ({"rationale_weight": 0.0}, 24), ({"objective": "edit", "wrong_weight": 0.5}, 48)],
    ids=["both", "labels", "edit"],
)
def test_a_teacher_cache_holds_the_rows_of_all_tasks(make_trainer, saved, tmp_path, by_step, settings, rows):
    """Filled ahead, alone, over two epochs: the losses of the live teacher."""
    settings = {"distill_weight": 0.7, "max_steps": 4, "per_device_train_batch_size": 12, **settings}
    live = rationale_trainer(make_trainer, student=saved.student, teacher=saved.teacher, **settings)
    live.train()
    cache = {"teacher_cache": str(tmp_path / "cache")}
    done = fill_cache(
        rationale_trainer(make_trainer, student=saved.student, teacher=saved.teacher, **cache, **settings)
    )
    assert done["rows"] == done["computed"] == rows
    cache["teacher_placement"] = "cached"
    alone = rationale_trainer(make_trainer, student=saved.student, teacher=None, **cache, **settings)
    alone.train()
    assert by_step(alone) == pytest.approx(by_step(live), rel=1e-4)


def test_a_teacher_is_needed_for_distillation_only(make_trainer, make_student, tokenizer, tmp_path):
    with pytest.raises(ConfigurationError, match="no teacher"):
        rationale_trainer(make_trainer, teacher=None, distill_weight=1.0)
    with pytest.raises(ConfigurationError, match="no teacher"):
        GKDTrainer(make_student(), None, GKDConfig(output_dir=str(tmp_path)), addition_rationales(2), None, tokenizer)


def test_rows_of_another_layout_are_refused(make_trainer):
    rows = Dataset.from_list([{"prompt": "1+1=", "completion": "2"}])
    with pytest.raises(DatasetError, match="question, answer and rationale"):
        rationale_trainer(make_trainer, train=rows)
    with pytest.raises(DatasetError, match="method `rationale`"):
        make_trainer(train=addition_rationales(4))
    unpaired = addition_rationales(4).remove_columns(["wrong_rationale", "wrong_answer"])
    with pytest.raises(DatasetError, match="without a wrong rationale"):
        rationale_trainer(make_trainer, train=unpaired, objective="edit")
