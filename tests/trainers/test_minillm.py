"""MiniLLM's rollouts, cycles, plain text and settings; its gradients are in test_minillm_exact.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, MambaConfig

from distill_trainers import MiniLLMConfig
from distill_trainers.exceptions import CheckpointError, ConfigurationError, DatasetError
from distill_trainers.rollouts import Mixture
from distill_trainers.signals import TokenLogprobs
from distill_trainers.teachers import LocalTeacher, Teacher
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.minillm import scoring
from distill_trainers.trainers.minillm.cycles import LOGPS
from distill_trainers.trainers.minillm.plain_text import PlainText

CPU = torch.device("cpu")
CYCLES = {"num_minibatches": 3, "num_inner_epochs": 2, "teacher_mix_alpha": 0.0}


def text_dataset(count=10):
    return Dataset.from_list([{"text": f"{n}+{n}={2 * n}"} for n in range(10, 10 + count)])


@pytest.fixture
def make(make_trainer):
    """`make(pretraining=…, **settings)`: a MiniLLM trainer."""

    def build(student=None, *, pretraining=None, **settings):
        if pretraining is not None:
            settings["pretraining_dataset"] = pretraining
        return make_trainer(student, method="minillm", **settings)

    return build


# ---- What rollouts carry --------------------------------------------------------------------------------------------


def logps_of(model, ids, mask, temperature=1.0):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    return F.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_mix_alpha": 0.0},
        {"teacher_mix_alpha": 0.3},
        {"teacher_mix_alpha": 0.0, "temperature": 0.7},
        {"teacher_mix_alpha": 0.0, "rollout_engine": "hf", "temperature": 0.7},
        {"teacher_mix_alpha": 0.0, "estimator": "sampled"},
    ],
    ids=str,
)
@torch.no_grad()
def test_log_probabilities_are_those_of_the_models(make, batch_of, settings):
    trainer = make(**settings)
    batches = trainer.rollout([batch_of(trainer, range(3)), batch_of(trainer, range(3, 8))])
    alpha, temperature = settings["teacher_mix_alpha"], settings.get("temperature", 1.0)
    for batch in batches:
        mask = batch["labels"] != -100
        ids, padding = batch["input_ids"], batch["attention_mask"]
        q = logps_of(trainer.model.eval(), ids, padding)
        p = logps_of(trainer.teacher.model, ids, padding)
        drawn = logps_of(trainer.model, ids, padding, temperature)
        if alpha:
            drawn = (alpha * p.exp() + (1 - alpha) * q.exp()).log()
        told = [drawn] if settings.get("rollout_engine") == "hf" else []  # by the engine itself
        expected = torch.stack([q, drawn, p, *told], dim=2)
        kept = mask[:, 1:]
        torch.testing.assert_close(batch[LOGPS][:, 1:][kept], expected[kept], rtol=1e-4, atol=1e-5)
        assert not batch[LOGPS][~mask].any()


def test_the_first_step_on_a_rollout_has_ratio_1_and_reports(make, by_step):
    trainer = make(teacher_mix_alpha=0.2, num_inner_epochs=3, max_steps=6)
    trainer.train()
    ratio, clipped, share = (by_step(trainer, name) for name in ("ratio", "clipped", "teacher_mix_share"))
    assert ratio[1] == pytest.approx(1.0, abs=1e-5) and ratio[4] == pytest.approx(1.0, abs=1e-5)
    assert clipped[1] == clipped[4] == 0.0
    assert all(abs(ratio[step] - 1) > 1e-4 for step in (2, 3, 5, 6)), "the student has moved since"
    assert share.keys() == {1, 4} and all(0.02 < value < 0.6 for value in share.values())
    assert {step for step, count in by_step(trainer, "rollouts").items() if count} == {1, 4}
    for name in ("reward", "sequence_kl", "completion_length"):
        assert by_step(trainer, name).keys() == {1, 4}
    for name in ("advantage", "advantage_std", "single", "long"):
        assert by_step(trainer, name).keys() == set(range(1, 7))


def test_a_teacher_is_not_asked_twice(make, monkeypatch):
    """On-policy its hidden states serve rewards and loss; mixed in, they are those of generation."""
    calls = []
    signal = LocalTeacher.signal
    monkeypatch.setattr(LocalTeacher, "signal", lambda *args: calls.append(1) or signal(*args))
    make(teacher_mix_alpha=0.0, max_steps=2, gradient_accumulation_steps=2).train()
    assert len(calls) == 4, "once for each micro-batch"
    calls.clear()
    for estimator in ("exact", "sampled"):
        make(teacher_mix_alpha=0.2, estimator=estimator, max_steps=2, gradient_accumulation_steps=2).train()
    assert not calls


def test_states_kept_from_generation_give_the_loss_of_a_teacher_that_is_asked(make, monkeypatch, by_step):
    losses = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(
                scoring, "Mixture", lambda model, alpha, coins, keeps_hidden: Mixture(model, alpha, coins)
            )
        trainer = make(teacher_mix_alpha=0.2, max_steps=3, logging_steps=1)
        trainer.train()
        losses.append(by_step(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- Cycles ---------------------------------------------------------------------------------------------------------


def steps_of(trainer):
    """The (prompt and completion) rows of every optimiser step of a run."""
    steps, inner = [], trainer.get_batch_samples

    def spy(*args):
        batches, counts = inner(*args)
        rows = []
        for batch in batches:
            for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
                rows.append(tuple(ids[: sum(mask)]))
        steps.append(rows)
        return batches, counts

    trainer.get_batch_samples = spy
    trainer.train()
    return steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_rollout_is_trained_on_once_an_inner_epoch(make, accumulation):
    """32 rows are 8 steps a pass: cycles of 3, 3 and 2 steps, each twice."""
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make(train=addition_dataset(32), num_train_epochs=2, **sizes, **CYCLES)
    steps = steps_of(trainer)
    assert len(steps) == 2 * 8 * 2 and all(len(rows) == 4 for rows in steps)
    start, prompts = 0, []
    for size in (3, 3, 2, 3, 3, 2):
        first, second = (sum(steps[start + e * size : start + (e + 1) * size], []) for e in (0, 1))
        assert sorted(first) == sorted(second) and first != second, "the same rows in another order"
        prompts.append({row[: row.index(13) + 1] for row in first})  # up to the "="
        start += 2 * size
    one_pass = set().union(*prompts[:3])
    assert len(one_pass) == 32 and one_pass == set().union(*prompts[3:]), "every prompt once a pass"
    assert trainer.state.epoch == 2


def test_a_run_killed_in_an_inner_epoch_goes_on_with_its_rollouts(make, make_student, by_step, die_at, tmp_path):
    """Into every place of a cycle: before its prompts have all been trained, in its second inner epoch, at its end."""
    settings = {**CYCLES, "teacher_mix_alpha": 0.2, "max_steps": 9, "save_strategy": "steps", "verify_saved": False}
    whole = make(**{**settings, "save_strategy": "no"})
    whole.train()
    for step in (1, 4, 6, 8):
        killed = {**settings, "output_dir": str(tmp_path / f"killed-{step}"), "save_steps": step}
        with pytest.raises(die_at.error):
            make(callbacks=[die_at(step)], **killed).train()
        resumed = make(make_student(seed=99), **killed)
        resumed.train(resume_from_checkpoint=True)
        assert by_step(resumed) == by_step(whole)
        rollouts = by_step(resumed, "rollouts")
        assert rollouts == by_step(whole, "rollouts"), "nothing is sampled twice"
        weights = whole.model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


OTHER_CYCLES = [
    ({"num_minibatches": 2}, "num_minibatches: 2", "num_minibatches: 3"),
    ({"num_inner_epochs": 3}, "num_inner_epochs: 3", "num_inner_epochs: 2"),
    (
        {"num_minibatches": 2, "num_inner_epochs": 3},
        "num_minibatches: 2, num_inner_epochs: 3",
        "num_minibatches: 3",
    ),
    (
        {"num_minibatches": 1, "num_inner_epochs": 1},
        "num_minibatches: 1, num_inner_epochs: 1",
        "num_minibatches: 3",
    ),
    ({"per_device_train_batch_size": 2}, "rows per optimiser step: 2", "rows per optimiser step: 4"),
    ({"gradient_accumulation_steps": 2}, "rows per optimiser step: 8", "rows per optimiser step: 4"),
]


def test_other_cycles_than_the_checkpoints_are_refused(make):
    """Wherever the checkpoint stands: at the end of a cycle too, where no rollout is missing."""
    settings = {**CYCLES, "save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    make(**settings).train()
    for other, got, expected in OTHER_CYCLES:
        with pytest.raises(CheckpointError, match=f"Got `{got}`; expected `{expected}.*Resume with those"):
            make(**{**settings, "max_steps": 12, **other}).train(resume_from_checkpoint=True)


def test_the_same_rows_in_other_batches_go_on(make):
    settings = {**CYCLES, "save_strategy": "steps", "save_steps": 2}
    make(**settings, max_steps=2).train()
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = make(**settings, **sizes, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_checkpoint_without_cycles_is_refused_by_a_run_with_them(make):
    settings = {"teacher_mix_alpha": 0.0, "save_strategy": "steps", "save_steps": 2}
    make(**settings, max_steps=2).train()
    with pytest.raises(CheckpointError, match="Got `num_inner_epochs: 2`; expected `num_inner_epochs: 1`"):
        make(**settings, num_inner_epochs=2, max_steps=4).train(resume_from_checkpoint=True)


def test_fewer_rows_than_a_step_are_refused(make):
    with pytest.raises(DatasetError, match="Got 3 training rows, but one optimiser step takes 4"):
        make(train=addition_dataset(3), **CYCLES).train()


def test_streams_cannot_be_cut_into_cycles(make):
    rows = addition_dataset(8)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(DatasetError, match="num_minibatches: 3"):
        make(train=stream, **CYCLES)


# ---- Plain text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_text_adds_its_own_mean(make, dense, by_step, accumulation):
    """The loss of text is a mean over its own tokens, and rollouts' terms do not see it."""
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    settings = {"max_steps": 1, "teacher_mix_alpha": 0.0, "train": addition_dataset(4), **sizes}
    plain = make(**settings)
    plain.train()
    trainer = make(pretraining=text_dataset(4), pretraining_weight=0.5, **settings)
    model = trainer.model
    rows = [trainer.text.rows[i] for i in range(4)]
    found = dense(model, trainer.teacher.model, rows)
    nll = -found.q.gather(1, found.labels[:, None]).mean().item()
    trainer.train()
    assert by_step(trainer, "pretraining")[1] == pytest.approx(nll, rel=1e-5)
    for name in ("single", "long", "ratio", "reward"):
        assert by_step(trainer, name)[1] == pytest.approx(by_step(plain, name)[1], rel=1e-4)
    assert by_step(trainer)[1] == pytest.approx(by_step(plain)[1] + 0.5 * nll, rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"teacher_mix_alpha": 0.0}, {**CYCLES, "teacher_mix_alpha": 0.2}, {"objective": "token"}], ids=str
)
def test_the_teacher_does_not_read_the_text(make, monkeypatch, settings):
    asked = []
    signal = LocalTeacher.signal

    def spy(self, inputs, predicts, vocab_size):
        asked.append((inputs["input_ids"].shape, predicts.shape))
        return signal(self, inputs, predicts, vocab_size)

    monkeypatch.setattr(LocalTeacher, "signal", spy)
    long_text = Dataset.from_list([{"text": "1+2=3" * 4}] * 5)
    trainer = make(pretraining=long_text, pretraining_batch_size=2, max_steps=2, **settings)
    trainer.train()
    assert asked and all(shape[0] == 4 and shape[1] < 20 and mask == (4, shape[1] - 1) for shape, mask in asked)


def test_text_without_a_weight_is_not_read(make, by_step):
    settings = {"max_steps": 2, "teacher_mix_alpha": 0.0}
    plain, trainer = make(**settings), make(pretraining=text_dataset(), pretraining_weight=0.0, **settings)
    asked, inner = [], trainer.token_terms

    def spy(model, inputs, *args):
        asked.append(len(inputs["labels"]))
        return inner(model, inputs, *args)

    trainer.token_terms = spy
    plain.train()
    trainer.train()
    assert set(asked) == {4}
    assert by_step(trainer) == by_step(plain) and not by_step(trainer, "pretraining")


def test_text_has_an_order_of_its_own():
    """Processes and micro-batches share it out; each pass serves every row once; it follows from seed and step."""

    def served(steps, accumulated, world, size, seed=1):
        text = PlainText(list(range(12)), size, None, seed)
        return [
            number
            for step in steps
            for batch in range(accumulated)
            for rank in range(world)
            for number in text.numbers(step, accumulated, batch, world, rank)
        ]

    one = served(range(6), 1, 1, 4)
    assert one == served(range(6), 2, 1, 2) == served(range(6), 1, 2, 2)
    assert sorted(one[:12]) == sorted(one[12:]) == list(range(12)) and one[:12] != one[12:]
    assert served([4], 1, 1, 4) == one[16:20]
    assert served(range(6), 1, 1, 4, seed=2) != one


def test_text_that_is_a_stream_or_empty_is_refused(make):
    stream = IterableDataset.from_generator(lambda: iter(text_dataset()))
    with pytest.raises(DatasetError, match="pretraining_dataset"):
        make(pretraining=stream)
    with pytest.raises(DatasetError, match="pretraining"):
        make(pretraining=Dataset.from_list([{"text": ""}]))


# ---- Teachers -------------------------------------------------------------------------------------------------------


class Remote(Teacher):
    """Tells log-probabilities of given tokens, and nothing else."""

    provides = frozenset({"token_logprobs"})

    def __init__(self, model):
        self.model = model
        self.asked = 0

    def prepare(self, accelerator): ...

    @torch.no_grad()
    def signal(self, inputs, predicts, vocab_size):
        self.asked += 1
        logps = logps_of(self.model, inputs["input_ids"], inputs["attention_mask"])
        return TokenLogprobs(logps[predicts])

    def fingerprint(self):
        return "remote"


@pytest.mark.parametrize("objective", ["sequence", "token"])
def test_log_probabilities_of_tokens_are_enough_for_the_sampled_estimator(make, make_teacher, by_step, objective):
    settings = {"objective": objective, "estimator": "sampled", "teacher_mix_alpha": 0.0, "max_steps": 4}
    settings |= {"eval_dataset": addition_dataset(8, seed=9)}
    local, teacher = make(**settings), Remote(make_teacher())
    remote = make(teacher=teacher, **settings)
    local.train()
    remote.train()
    assert by_step(remote) == pytest.approx(by_step(local), rel=1e-4)
    assert teacher.asked == 4, "for rewards alone"
    scores, theirs = remote.evaluate(), local.evaluate()
    assert scores["eval_perplexity"] == pytest.approx(theirs["eval_perplexity"], rel=1e-4)
    gap = math.log(scores["eval_perplexity"] / scores["eval_teacher_perplexity"])
    assert scores["eval_loss"] == pytest.approx(gap, rel=1e-4) and "eval_kl" not in scores
    with pytest.raises(ConfigurationError, match="distribution"):
        make(teacher=Remote(make_teacher()), teacher_mix_alpha=0.0)
    with pytest.raises(ConfigurationError, match="completions"):
        make(teacher=Remote(make_teacher()), estimator="sampled")


def test_a_model_that_cannot_be_mixed_is_refused_by_name(make, tokenizer):
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    student = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigurationError, match=r"student: .*teacher_mix_alpha: 0"):
        make(student=student)
    make(student=student, teacher_mix_alpha=0.0, max_steps=1).train()  # by `generate` and a forward after it


def test_settings_that_the_token_objective_leaves_out(make, by_step):
    """On given tokens its loss is the reverse KL of them, as GKD's."""
    trainer = make(objective="token", lmbda=0.0, max_steps=2)
    trainer.train()
    other = make(objective="token", lmbda=0.0, max_steps=2, loss_reduction="sequence")
    other.train()
    lengths = by_step(other, "trained_tokens")[1] / 4
    assert by_step(other)[1] == pytest.approx(by_step(trainer)[1] * lengths, rel=1e-5)


def given_rows(tokenizer):
    """Rows of given tokens by how their prompts are: none at all, none but a masked stretch, several stretches."""
    texts = [tokenizer(f"{n}+{n}={2 * n}").input_ids for n in range(10, 18)]
    plain = Dataset.from_list([{"text": f"{n}+{n}={2 * n}"} for n in range(10, 18)])
    empty = Dataset.from_list([{"prompt": "", "completion": f"{n}+{n}={2 * n}"} for n in range(10, 18)])
    masked = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in texts]
    stretches = [{"input_ids": ids, "labels": [*ids[:2], -100, ids[3], -100, *ids[5:]]} for ids in texts]
    kinds = {"text": plain, "empty prompt": empty, "masked stretch": masked, "several stretches": stretches}
    return {name: Dataset.from_list(rows) if isinstance(rows, list) else rows for name, rows in kinds.items()}


@pytest.mark.parametrize("kind", ["text", "empty prompt", "masked stretch", "several stretches"])
def test_a_sum_over_each_row_is_divided_by_the_rows(make, tokenizer, dense, by_step, kind):
    """Label 0 is predicted by nothing: where it is trained, another one must stand for its row."""
    rows = given_rows(tokenizer)[kind]
    settings = {"objective": "token", "lmbda": 0.0, "loss_reduction": "sequence", "max_steps": 1}
    trainer = make(train=rows, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    found = dense(trainer.model, trainer.teacher.model, trainer.train_dataset)
    expected = (found.q.exp() * (found.q - found.p)).sum().item() / 8
    trainer.train()
    assert by_step(trainer)[1] == pytest.approx(expected, rel=1e-5)


def test_given_tokens_have_a_language_model_loss_and_sampled_ones_none(make, by_step):
    trainer = make(objective="token", lmbda=0.5, lm_loss_weight=0.1, max_steps=4, seed=1)
    trainer.train()
    given = {step for step, rollouts in by_step(trainer, "rollouts").items() if not rollouts}
    assert 0 < len(given) < 4 and by_step(trainer, "lm_loss").keys() == given
    for step, value in by_step(trainer).items():
        language = 0.1 * by_step(trainer, "lm_loss").get(step, 0.0)
        assert value == pytest.approx(by_step(trainer, "single")[step] + language, rel=1e-5)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"objective": "word"}, "objective: word"),
        ({"estimator": "k3"}, "estimator: k3"),
        ({"importance": "none"}, "importance: none"),
        ({"loss_reduction": "sum"}, "loss_reduction: sum"),
        ({"lmbda": 0.5}, "lmbda: 0.5"),
        ({"lmbda": 0.5, "objective": "token", "estimator": "sampled"}, "lmbda: 0.5"),
        ({"teacher_mix_alpha": 1.0}, "teacher_mix_alpha: 1.0"),
        ({"teacher_mix_alpha": 0.2, "objective": "token"}, "teacher_mix_alpha: 0.2"),
        ({"rollout_engine": "hf"}, "rollout_engine: hf"),
        ({"temperature": 0.7}, "temperature: 0.7"),
        ({"temperature": 0.0, "teacher_mix_alpha": 0.0}, "temperature: 0.0"),
        ({"top_p": 0.9}, "top_p: 0.9"),
        ({"top_k": 50}, "top_k: 50"),
        ({"min_p": 0.1}, "min_p: 0.1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: 1.2"),
        ({"kd_temperature": 2.0}, "kd_temperature: 2.0"),
        ({"gamma": 1.1}, "gamma: 1.1"),
        ({"reward_scale": 0.0}, "reward_scale: 0.0"),
        ({"reward_clip": 0.0}, "reward_clip: 0.0"),
        ({"clip_range": -0.2}, "clip_range: -0.2"),
        ({"num_minibatches": 0}, "num_minibatches: 0"),
        ({"num_inner_epochs": 0}, "num_inner_epochs: 0"),
        ({"num_minibatches": 1.5}, "num_minibatches: 1.5"),
        ({"num_minibatches": None}, "num_minibatches: null"),
        ({"num_inner_epochs": 2.0}, "num_inner_epochs: 2.0"),
        ({"pretraining_batch_size": 1.5}, "pretraining_batch_size: 1.5"),
        ({"num_inner_epochs": 2, "objective": "token"}, "num_inner_epochs: 2"),
        ({"num_inner_epochs": 2, "ignore_data_skip": True}, "ignore_data_skip: True"),
        ({"num_minibatches": 2, "auto_find_batch_size": True}, "auto_find_batch_size: True"),
        ({"num_minibatches": 2, "accelerator_config": {"split_batches": True}}, "split_batches: True"),
        ({"lm_loss_weight": 0.5}, "lm_loss_weight: 0.5"),
        ({"pretraining_weight": -1.0}, "pretraining_weight: -1.0"),
        ({"pretraining_batch_size": 0}, "pretraining_batch_size: 0"),
        ({"max_length": 32, "max_new_tokens": 32}, "max_new_tokens: 32"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, settings, named):
    with pytest.raises(ConfigurationError, match=named.replace(".", r"\.")) as caught:
        MiniLLMConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert "expected" in str(caught.value)


def test_without_cycles_the_data_may_be_counted_otherwise(tmp_path):
    others = {"ignore_data_skip": True, "auto_find_batch_size": True, "accelerator_config": {"split_batches": True}}
    assert MiniLLMConfig(output_dir=str(tmp_path), use_cpu=True, **others).accelerator_config.split_batches


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_rewards_are_scaled_in_long_and_in_the_sampled_single(make, batch_of, estimator):
    """As the help says: the exact Single has no rewards."""
    found = []
    for scale in (1.0, 0.5):
        trainer = make(teacher_mix_alpha=0.0, estimator=estimator, reward_scale=scale)
        trainer.model.eval()
        (batch,) = trainer.score(trainer.rollout([batch_of(trainer, range(4))]))
        found.append(batch)
    whole, half = found
    torch.testing.assert_close(half["token_long"], 0.5 * whole["token_long"])
    factor = 1.0 if estimator == "exact" else 0.5
    torch.testing.assert_close(half["token_single"], factor * whole["token_single"])
    assert whole["token_long"].any() and whole["token_single"].any()
