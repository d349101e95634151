"""Completions that another sampler than the student has drawn: what the loss makes of them, and what is logged."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset

from distill_trainers import DPKDConfig, GKDConfig, MiniLLMConfig
from distill_trainers.data import replace_completions
from distill_trainers.exceptions import CheckpointError, ConfigurationError
from distill_trainers.losses.sampler_ratio import SAMPLED, SAMPLER_LOGPS
from distill_trainers.rollouts import Completions
from distill_trainers.trainers.lifecycle.metrics import RunningMetrics
from distill_trainers.trainers.minillm.cycles import LOGPS

EOS, LENGTH = 1, 3
SEQUENCES = [
    ids
    for length in range(1, LENGTH + 1)
    for ids in itertools.product(range(3), repeat=length)
    if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH)
]


# ---- The enumerable toy ---------------------------------------------------------------------------------------------


def token_logps(model, ids):
    """Log-probabilities of the tokens after the prompt "a"."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[2, *ids]])).logits[0, :-1]
    return F.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def batch_of_sequences(trainer, sequences):
    row = trainer.data_collator([trainer.train_dataset[0]] * len(sequences))
    return replace_completions(row, [list(ids) for ids in sequences], 0)


def gradient_of(trainer, batch):
    """Of the trainer's own loss, summed over the tokens of a batch; and its terms."""
    trainer.model.train()
    loss, terms = trainer.compute_loss(trainer.model, batch, True, num_items_in_batch=torch.tensor(1))
    grads = torch.autograd.grad(loss, list(trainer.model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads]), terms


def expected_gradient(trainer, sampler, told=True):
    """Over all sequences, by the probability with which `sampler` writes them."""
    total, mass = 0.0, 0.0
    for ids in SEQUENCES:
        batch, mu = batch_of_sequences(trainer, [ids]), token_logps(sampler, ids)
        if told:
            drawn = batch["labels"] != -100
            entry = torch.zeros(drawn.shape, dtype=torch.float64).masked_scatter(drawn, mu)
            batch |= {SAMPLER_LOGPS: entry, SAMPLED: drawn.double()}
        total = total + mu.sum().exp() * gradient_of(trainer, batch)[0]
        mass += mu.sum().exp().item()
    assert mass == pytest.approx(1.0, abs=1e-12)
    return total


@pytest.fixture
def stale(make_trainer, toy):
    """`stale(**settings)`: a trainer on the toy, and its student as it was two steps ago."""

    def make(**settings):
        tokenizer, model = toy
        rows = Dataset.from_list([{"prompt": "a"}] * 4)
        settings = {"train": rows, "tok": tokenizer, "max_length": 8, "max_new_tokens": LENGTH, **settings}
        trainer = make_trainer(model(1), model(2), **settings)
        before = copy.deepcopy(trainer.model)
        parameters = list(trainer.model.parameters())
        for _ in range(2):
            gradient, _ = gradient_of(trainer, batch_of_sequences(trainer, SEQUENCES))
            for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                parameter.data -= 0.0003 * part.view_as(parameter)
        return trainer, before

    return make


@pytest.mark.parametrize(
    "settings, kinds",
    [
        ({"method": "gkd", "lmbda": 1.0, "divergence": "reverse_kl"}, ("truncate", "mask", "prefix")),
        ({"method": "minillm", "objective": "token"}, ("prefix",)),
    ],
    ids=["gkd", "minillm"],
)
def test_old_text_gives_nearly_the_gradient_of_new_text_and_with_products_exactly(stale, settings, kinds):
    trainer, before = stale(**settings)
    exact = expected_gradient(trainer, trainer.model, told=False)
    errors = {}
    for kind in ("none", *kinds):
        trainer.two_models.sampler_ratio = replace(trainer.sampler_ratio, kind=kind, least=0.2, most=3.0)
        errors[kind] = ((expected_gradient(trainer, before) - exact).norm() / exact.norm()).item()
    print(errors)
    assert errors["none"] > 0.02, "the student has moved"
    assert all(errors[kind] < 0.7 * errors["none"] for kind in kinds)
    assert errors["prefix"] < 1e-10
    assert (expected_gradient(trainer, trainer.model) - exact).abs().max() < 1e-12, "weights of 1"


def test_the_ratio_of_a_token_itself_would_correct_nothing_of_its_divergence(stale):
    """Which is why the weight is that of the token before."""
    trainer, before = stale(method="gkd", lmbda=1.0)
    values = gradient_of(trainer, batch_of_sequences(trainer, SEQUENCES))[1]["divergence"]
    plain, own, exact = 0.0, 0.0, 0.0
    for ids, part in zip(SEQUENCES, values.split([len(ids) for ids in SEQUENCES]), strict=True):
        mu, q = token_logps(before, ids), token_logps(trainer.model, ids)
        plain += (mu.sum().exp() * part.sum()).item()
        own += (mu.sum().exp() * ((q - mu).exp() * part).sum()).item()
        exact += (q.sum().exp() * part.sum()).item()
    assert own == pytest.approx(plain, rel=1e-12)
    assert abs(plain / exact - 1) > 1e-3


# ---- Engines --------------------------------------------------------------------------------------------------------

SAMPLING = [{"temperature": 0.0}, {}, {"temperature": 0.6}, {"temperature": 1.3, "top_p": 0.8, "top_k": 9}]
GKD, TOKENS = {"method": "gkd", "lmbda": 1.0}, {"method": "minillm", "objective": "token"}
CASES = [(GKD, engine, sampling) for engine in ("decode", "hf") for sampling in SAMPLING]


@pytest.mark.parametrize("method, engine, sampling", [*CASES, (TOKENS, "decode", SAMPLING[-1])], ids=str)
def test_a_sampler_that_is_the_student_has_ratios_and_weights_of_1(make_trainer, batch_of, method, engine, sampling):
    settings = {**method, **sampling, "rollout_engine": engine, "max_new_tokens": 8, "max_length": 32}
    trainer = make_trainer(**settings, **({"sampler_correction": "prefix"} if sampling != SAMPLING[0] else {}))
    (batch,) = trainer.score(trainer.rollout([batch_of(trainer, range(12))]))
    assert torch.equal(batch[SAMPLED], (batch["labels"] != -100).float())
    trainer.model.train()
    loss, terms = trainer.compute_loss(trainer.model, batch, True)
    ones = torch.ones(int(batch[SAMPLED].sum()))
    torch.testing.assert_close(terms["sampler_ratio"], ones, rtol=0, atol=1e-5)
    plain = trainer.compute_loss(trainer.model, {k: v for k, v in batch.items() if k not in (SAMPLED, SAMPLER_LOGPS)})
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    if sampling != SAMPLING[0]:
        (other,) = [{**batch, SAMPLER_LOGPS: batch[SAMPLER_LOGPS] - 0.1 * batch[SAMPLED]}]
        weighed = trainer.compute_loss(trainer.model, other)
        assert weighed.item() > 1.1 * plain.item(), "ratios of e^0.1"


@pytest.mark.parametrize("kind", ["none", "truncate"])
def test_replayed_text_is_held_against_those_who_wrote_it(make_trainer, by_step, kind):
    trainer = make_trainer(lmbda=1.0, replay_buffer_size=8, max_steps=8, sampler_correction=kind, learning_rate=1e-2)
    trainer.train()
    ratio, low, high = (by_step(trainer, f"sampler_ratio{end}") for end in ("", "_p05", "_p95"))
    fresh = {step for step, count in by_step(trainer, "rollouts").items() if count}
    assert ratio.keys() == low.keys() == high.keys() == set(range(1, 9)) and 1 < len(fresh) < 8
    for step in range(1, 9):
        if step in fresh:
            assert ratio[step] == pytest.approx(1.0, abs=1e-4) and low[step] == high[step] == 1.0
        else:
            assert low[step] < 0.999 and high[step] > 1.001 and low[step] < ratio[step] < high[step]
    assert all(0 <= share <= 1 for share in by_step(trainer, "sampler_outside").values())


def test_ratios_are_averaged_over_the_tokens_whose_sampler_is_known(make_trainer, batch_of):
    """Half of the rows were replayed from a run that told no log-probabilities."""
    trainer = make_trainer(lmbda=1.0, sampler_ratio_max=1.1)
    (batch,) = trainer.rollout([batch_of(trainer, range(4))])
    known = batch[SAMPLED] * (torch.arange(4) < 2)[:, None]
    batch |= {SAMPLED: known, SAMPLER_LOGPS: (batch[SAMPLER_LOGPS] - 0.2) * known}
    trainer.model.train()
    trainer.metrics.read(trainer.accelerator)
    trainer.compute_loss(trainer.model, batch)
    told = trainer.metrics.read(trainer.accelerator)
    assert 0 < known.sum() < told["trained_tokens"]
    assert told["sampler_ratio"] == pytest.approx(math.exp(0.2), rel=1e-4) and told["sampler_outside"] == 1


def test_cycles_of_minillm_tell_how_far_their_text_is_off(make_trainer, by_step):
    trainer = make_trainer(
        method="minillm",
        teacher_mix_alpha=0.0,
        num_inner_epochs=3,
        max_steps=3,
        sampler_correction="truncate",
        learning_rate=1e-2,
    )
    trainer.train()
    ratio, high = by_step(trainer, "sampler_ratio"), by_step(trainer, "sampler_ratio_p95")
    assert ratio[1] == pytest.approx(1.0, abs=1e-5) and high[1] == 1.0
    assert 1.001 < high[2] < high[3], "older with each step"


class Told:
    """An engine whose own probabilities are off by a factor."""

    runs_the_model = True

    def __init__(self, inner, off=0.2, processed=True):
        self.inner, self.off, self.processed = inner, off, processed

    def generate(self, *given):
        texts = self.inner.generate(*given)
        logps = [[value - self.off for value in row] for row in texts.logps]
        return Completions(texts, None if self.processed is None else logps, bool(self.processed))


@pytest.mark.parametrize("kind", ["none", "truncate"])
def test_minillm_takes_the_engine_for_the_sampler_where_that_is_asked_for(make_trainer, batch_of, kind):
    settings = {"method": "minillm", "teacher_mix_alpha": 0.0, "rollout_engine": "hf", "sampler_ratio_max": 1.1}
    trainer = make_trainer(sampler_correction=kind, **settings)
    trainer.engine = Told(trainer.engine)
    (batch,) = trainer.rollout([batch_of(trainer, range(6))])
    mask = batch["labels"] != -100
    student, sampler, _, *told = batch[LOGPS].unbind(-1)
    off = torch.full((int(mask.sum()),), 0.0 if kind == "none" else 0.2)
    torch.testing.assert_close((student - sampler)[mask], off, rtol=0, atol=1e-5)
    (scored,) = trainer.score([batch])
    trainer.model.train()
    _, terms = trainer.compute_loss(trainer.model, scored, True)
    torch.testing.assert_close(terms["sampler_ratio"], torch.full_like(off, math.exp(0.2)), rtol=0, atol=1e-5)
    assert terms["sampler_outside"].all()
    plain = make_trainer(**settings)
    (again,) = plain.score([{**batch, LOGPS: torch.stack([student, student, batch[LOGPS][..., 2]], -1)}])
    _, unweighted = trainer.compute_loss(trainer.model, {k: v for k, v in again.items() if "sampler" not in k}, True)
    first = mask & (mask.cumsum(1) == 1)
    expected = torch.where(first, 1.0, 1.0 if kind == "none" else 1.1)[mask]
    torch.testing.assert_close(terms["single"], expected * unweighted["single"], rtol=1e-4, atol=1e-6)
    through = 1.0 if kind == "none" else 1.1
    torch.testing.assert_close(terms["long"], through * unweighted["long"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature, processed, fine", [(0.7, False, False), (1.0, False, True), (1.0, None, False)])
def test_an_engine_that_does_not_tell_what_it_drew_from_is_refused(
    make_trainer, batch_of, temperature, processed, fine
):
    """At construction, by what it says of itself, and once more if it then tells nothing."""
    settings = {"lmbda": 1.0, "temperature": temperature, "sampler_correction": "truncate"}
    trainer = make_trainer(**settings)
    trainer.engine = Told(trainer.engine, 0.0, processed)
    if fine:
        trainer.set_up_method()
        assert SAMPLED in trainer.rollout([batch_of(trainer, range(4))])[0]
        return
    for act in (trainer.set_up_method, lambda: trainer.rollout([batch_of(trainer, range(4))])):
        with pytest.raises(ConfigurationError, match="processed_logprobs.*sampler_correction: none"):
            act()
    quiet = make_trainer(**{**settings, "sampler_correction": "none"})
    quiet.engine = Told(quiet.engine, 0.0, processed)
    assert SAMPLED not in quiet.rollout([batch_of(quiet, range(4))])[0]


def test_text_whose_sampler_is_not_known_is_refused_where_it_would_be_weighed(make_trainer):
    trainer = make_trainer(lmbda=1.0, replay_buffer_size=8, sampler_correction="mask")
    trainer.replay.push([([4, 5], [6, 7])])
    state = {"replay": trainer.replay.state_dict()}
    with pytest.raises(CheckpointError, match="1 rows without log-probabilities.*sampler_correction: none"):
        make_trainer(lmbda=1.0, replay_buffer_size=8, sampler_correction="truncate").load_method_state(state)
    make_trainer(lmbda=1.0, replay_buffer_size=8).load_method_state(state)


# ---- Settings and metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, settings, named",
    [
        (GKDConfig, {"sampler_correction": "clip"}, "sampler_correction: clip.*none, truncate, mask, prefix"),
        (GKDConfig, {"sampler_correction": "mask", "lmbda": 0.0}, "sampler_correction: mask.*no step"),
        (GKDConfig, {"sampler_correction": "mask", "sampler_ratio_max": None}, "sampler_ratio_max.*a bound"),
        (GKDConfig, {"sampler_correction": "truncate", "temperature": 0.0}, "temperature: 0.0.*greedy"),
        (GKDConfig, {"sampler_correction": "truncate", "repetition_penalty": 1.2}, "repetition_penalty: 1.2"),
        (GKDConfig, {"sampler_ratio_max": 0.9}, "sampler_ratio_max: 0.9"),
        (GKDConfig, {"sampler_ratio_min": 1.1}, "sampler_ratio_min: 1.1"),
        (DPKDConfig, {"sampler_correction": "truncate"}, "sampler_correction: truncate.*DPKDTrainer"),
        (MiniLLMConfig, {"sampler_correction": "prefix"}, "importance: token"),
        (MiniLLMConfig, {"sampler_correction": "mask", "importance": "prefix"}, "importance: prefix"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, config, settings, named):
    with pytest.raises(ConfigurationError, match=named):
        config(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_quantiles_do_not_depend_on_how_tokens_were_cut():
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(5000, generator=generator) * 0.4).exp()
    values[::50] = 0.0
    counted = (torch.rand(5000, generator=generator) < 0.7).float()
    metrics, read = RunningMetrics(torch.device("cpu")), []
    for size in (5000, 700):
        for start in range(0, 5000, size):
            rows = slice(start, start + size)
            metrics.add_quantiles("r", values[rows], counted[rows])
        metrics.add_means({"m": 3.0}, 2)
        read.append(metrics.read(Accelerator(cpu=True)))
    assert read[0] == read[1] and read[0].keys() == {"m", "r_p05", "r_p95"} and read[0]["m"] == 1.5
    low, high = torch.quantile(values[counted > 0], torch.tensor([0.05, 0.95])).tolist()
    assert (read[0]["r_p05"], read[0]["r_p95"]) == pytest.approx((low, high), rel=0.03)
    metrics.add_quantiles("r", torch.tensor([1.0, 1.0, 1.0003]), torch.ones(3))
    metrics.add_quantiles("none", torch.ones(3), torch.zeros(3))
    metrics.add_means({"m": 1.0}, 1)
    read = metrics.read(Accelerator(cpu=True))
    assert read == {"m": 1.0, "r_p05": 1.0, "r_p95": pytest.approx(1.0003, abs=1e-4)}
