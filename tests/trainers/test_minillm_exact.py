"""MiniLLM's expected gradient, summed over every sequence of a toy, is that of the sequence-level reverse KL.

Three tokens, at most three of them, float64; a sequence ends at EOS or at its third token. All of it goes through the
trainer's own `score` and `compute_loss`.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distill_trainers.data import replace_completions
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import Mixture, SamplingSettings, decode_completions, decode_scored
from distill_trainers.toy import tiny_llama
from distill_trainers.trainers.minillm.cycles import with_logps

EOS, LENGTH = 1, 3
SEQUENCES = [
    ids
    for length in range(1, LENGTH + 1)
    for ids in itertools.product(range(3), repeat=length)
    if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH)
]


@pytest.fixture
def trainer_of(make_trainer, toy):
    def make(**settings):
        tokenizer, model = toy
        rows = Dataset.from_list([{"prompt": "a"}] * 4)
        defaults = {"length_normalization": False, "loss_reduction": "sequence", "max_new_tokens": LENGTH}
        settings = {**defaults, **settings}
        return make_trainer(model(1), model(2), train=rows, method="minillm", tok=tokenizer, max_length=8, **settings)

    return make


def token_logps(model, ids):
    """log-probabilities of the tokens after the prompt "a", with a graph."""
    logits = model(input_ids=torch.tensor([[2, *ids]])).logits[0, :-1]
    return F.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def gradient_of(trainer, loss):
    grads = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in grads])


def exact_gradient(trainer):
    """Of KL(q||p) over sequences, by autograd through the sum itself."""
    total = 0.0
    for ids in SEQUENCES:
        q = token_logps(trainer.model, ids).sum()
        p = token_logps(trainer.teacher.model, ids).sum().detach()
        total = total + q.exp() * (q - p)
    return gradient_of(trainer, total), total.item()


def expected_gradient(trainer, alpha):
    """Of the trainer's own loss, over all sequences by the probability with which they are sampled."""
    total, mass = 0.0, 0.0
    for ids in SEQUENCES:
        q = token_logps(trainer.model, ids).detach()
        p = token_logps(trainer.teacher.model, ids).detach()
        drawn = (alpha * p.exp() + (1 - alpha) * q.exp()).log()
        batch = replace_completions(trainer.data_collator([trainer.train_dataset[0]]), [list(ids)], 0)
        (batch,) = trainer.score([with_logps(batch, torch.stack([q, drawn, p], dim=1))])
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        probability = drawn.sum().exp()
        total = total + probability * gradient_of(trainer, loss)
        mass += probability.item()
    assert mass == pytest.approx(1.0, abs=1e-12)
    return total


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def letters(*merges):
    """One token a letter, and one for each merge; `c` is part of none."""
    vocab = {token: i for i, token in enumerate(["<eos>", *"abc", *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab, list(merges), unk_token="<eos>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def test_it_is_exact_across_tokenizers(make_trainer):
    """`aba` is ab|a and `bab` b|ab: a letter decides how those before it are read, and that `c` ends what they were."""
    student, teacher = letters(), letters(("a", "b"), ("b", "a"))
    pair = [tiny_llama(tok, 16, 1, seed=s, initializer_range=0.5).double() for s, tok in ((1, student), (2, teacher))]
    settings = {"length_normalization": False, "loss_reduction": "sequence", "estimator": "sampled", "max_length": 8}
    settings |= {"teacher_mix_alpha": 0.0, "teacher_processing_class": teacher}
    rows, run = Dataset.from_list([{"prompt": "c"}] * 4), {"teacher_tokenizer": "own", "max_new_tokens": LENGTH}
    trainer = make_trainer(*pair, train=rows, method="minillm", tok=student, **settings, **run)
    texts = [ids for n in range(1, LENGTH + 1) for ids in itertools.product(range(4), repeat=n)]
    texts = [ids for ids in texts if 0 not in ids[:-1] and (ids[-1] == 0 or len(ids) == LENGTH)]
    batch = trainer.data_collator([trainer.train_dataset[0]] * len(texts))
    batch = trainer.two_models.completed(replace_completions(batch, [list(ids) for ids in texts], 0))
    predicts = batch["labels"][:, 1:] != -100
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    q = F.log_softmax(logits, -1).gather(2, batch["input_ids"][:, 1:, None])[..., 0].masked_fill(~predicts, 0)
    p, _ = trainer.two_models.frozen_logps(trainer.teacher, batch)
    totals = torch.zeros(len(texts)).double().index_add(0, predicts.nonzero()[:, 0], p)
    chances = q.sum(1).exp()
    assert chances.sum().item() == pytest.approx(1.0)
    expected = gradient_of(trainer, (chances * (q.sum(1) - totals)).sum())
    drawn = q.detach()[predicts]
    (scored,) = trainer.score([with_logps(batch, torch.stack([drawn, drawn, p], dim=1))])
    for name in ("token_long", "token_single"):  # the loss is linear in them
        scored[name] = scored[name] * len(texts) * chances.detach()[:, None]
    trainer.model.train()
    found = gradient_of(trainer, trainer.compute_loss(trainer.model, scored))
    assert relative(found, expected) < 1e-5 and expected.norm() > 0.05


@pytest.mark.parametrize("importance", ["token", "prefix"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_on_policy_the_expected_gradient_is_that_of_the_sequence_kl(trainer_of, estimator, importance):
    trainer = trainer_of(teacher_mix_alpha=0.0, estimator=estimator, importance=importance)
    expected, kl = exact_gradient(trainer)
    assert kl > 0.05 and expected.norm() > 0.05
    assert (expected_gradient(trainer, 0.0) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("correction", ["none", "prefix"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_prefix_weights_keep_it_exact_under_teacher_mixed_sampling(trainer_of, estimator, correction):
    """With the correction for a sampler, too: the mixture is the sampler, and is not weighed twice."""
    given = {"estimator": estimator, "importance": "prefix", "sampler_correction": correction}
    trainer = trainer_of(teacher_mix_alpha=0.2, **given)
    assert (expected_gradient(trainer, 0.2) - exact_gradient(trainer)[0]).abs().max() < 1e-9


def test_token_weights_are_biased_and_by_how_much(trainer_of):
    """The bias grows with the teacher's share, and is small beside that of no weights at all."""
    errors = {}
    for alpha in (0.05, 0.2, 0.5):
        trainer = trainer_of(teacher_mix_alpha=alpha, importance="token")
        errors[alpha] = relative(expected_gradient(trainer, alpha), exact_gradient(trainer)[0])
    print(errors)
    assert 1e-3 < errors[0.05] < errors[0.2] < errors[0.5]
    assert 0.02 < errors[0.2] < 0.5


def test_single_and_long_are_the_form_of_the_whole_return(trainer_of):
    """-E sum (R_t - 1) grad log q, with R_t = r_t + R_{t+1} written out."""
    trainer = trainer_of(teacher_mix_alpha=0.0)
    total = 0.0
    for ids in SEQUENCES:
        q, p = token_logps(trainer.model, ids), token_logps(trainer.teacher.model, ids).detach()
        rewards = (p - q).detach()
        returns = torch.stack([rewards[t:].sum() for t in range(len(ids))])
        total = total - q.sum().exp().detach() * ((returns - 1) * q).sum()
    found = gradient_of(trainer, total)
    assert (expected_gradient(trainer, 0.0) - found).abs().max() < 1e-9


def test_without_long_it_is_another_objective(trainer_of):
    """On-policy reverse KL per token (GKD's) has Single alone for its gradient."""
    trainer = trainer_of(objective="token")
    whole = exact_gradient(trainer)[0]
    found = expected_gradient(trainer, 0.0)
    assert relative(found, whole) > 0.05
    sampled = trainer_of(objective="token", estimator="sampled")
    assert (expected_gradient(sampled, 0.0) - found).abs().max() < 1e-9


def moved_by_e(trainer, rewards):
    """Loss and what it is made of, on a row whose tokens have become e times as likely as when they were sampled."""
    ids = (2, 2, 1)
    old = token_logps(trainer.model, ids).detach() - 1.0
    batch = replace_completions(trainer.data_collator([trainer.train_dataset[0]]), [list(ids)], 0)
    told = old + torch.tensor(rewards, dtype=old.dtype)
    (batch,) = trainer.score([with_logps(batch, torch.stack([old, old, told], dim=1))])
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch, return_outputs=True)


def test_the_gradient_is_clipped_where_the_student_has_moved(trainer_of):
    """A token that has become much likelier than when it was sampled gets no more credit, but still blame."""
    trainer = trainer_of(teacher_mix_alpha=0.0, estimator="sampled", clip_range=0.2)
    for reward, moves in ((0.5, False), (-0.5, True)):
        loss, found = moved_by_e(trainer, [reward] * 3)
        assert (gradient_of(trainer, loss).abs().max() > 0) == moves
        torch.testing.assert_close(found["ratio"], torch.full((3,), math.e, dtype=torch.float64))
        assert found["clipped"].tolist() == ([0, 0, 0] if moves else [1, 1, 1])


def test_with_the_exact_single_it_is_long_that_is_clipped(trainer_of):
    trainer = trainer_of(teacher_mix_alpha=0.0, clip_range=0.2)
    _, found = moved_by_e(trainer, [0.5, 0.5, 0.5])
    assert found["clipped"].tolist() == [1, 1, 0], "nothing follows the last"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_single_and_long_of_sampled_tokens_are_clipped_as_one(trainer_of, sign):
    """Their signs differ at the first token; its return, their sum, has Long's."""
    trainer = trainer_of(teacher_mix_alpha=0.0, estimator="sampled", clip_range=0.2)
    rewards, long = [sign * r for r in (-0.2, 0.5, 0.5)], [sign * r for r in (1.0, 0.5, 0.0)]
    loss, found = moved_by_e(trainer, rewards)
    ratio = 1.2 if sign > 0 else math.e
    assert found["clipped"].tolist() == [float(sign > 0)] * 3
    assert found["single"].tolist() == pytest.approx([-ratio * r for r in rewards])
    assert found["long"].tolist() == pytest.approx([-ratio * r for r in long])
    assert loss.item() == pytest.approx(-ratio * (sum(rewards) + sum(long)))
    gradient = gradient_of(trainer, loss)
    returns = torch.tensor(rewards, dtype=torch.float64) + torch.tensor(long, dtype=torch.float64)
    expected = gradient_of(trainer, -math.e * (returns * token_logps(trainer.model, (2, 2, 1))).sum())
    torch.testing.assert_close(gradient, torch.zeros_like(expected) if sign > 0 else expected)


# ---- Sampling from the mixture --------------------------------------------------------------------------------------


def test_mixed_sampling_draws_from_the_mixture(toy, streams):
    """Pearson's test over all sequences, and the log-probabilities that come with them."""
    student, teacher = toy[1](1), toy[1](2)
    alpha, draws = 0.3, 800
    ids = torch.full((1, 1), 2)
    sampling = SamplingSettings(LENGTH, eos_token_ids=[EOS])
    found = []
    for step in range(draws):  # rows of one call share their coins, so a call for each
        mixture = Mixture(teacher, alpha, Stream(3, Role.RUN, Purpose.MIXTURE).at(step=step))
        drawn = streams(1, step=step)
        found += decode_scored(student, ids, torch.ones_like(ids), sampling, streams=drawn, mixture=mixture)
    counts = dict.fromkeys(SEQUENCES, 0)
    kept = {}
    for each in found:
        counts[tuple(each.ids)] += 1
        kept[tuple(each.ids)] = each.logps
    statistic, against_student = 0.0, 0.0
    for sequence, count in counts.items():
        q, p = token_logps(student, sequence).detach(), token_logps(teacher, sequence).detach()
        drawn = (alpha * p.exp() + (1 - alpha) * q.exp()).log()
        expected = draws * drawn.sum().exp().item()
        statistic += (count - expected) ** 2 / expected
        against_student += (count - draws * q.sum().exp().item()) ** 2 / (draws * q.sum().exp().item())
        if sequence in kept:
            torch.testing.assert_close(kept[sequence], torch.stack([q, drawn, p], dim=1))
    freedom = len(SEQUENCES) - 1
    bound = freedom + 4 * math.sqrt(2 * freedom)
    assert statistic < bound < against_student, (statistic, against_student)


def test_without_the_teacher_draws_are_the_plain_ones(toy, streams):
    student = toy[1](1)
    ids = torch.full((64, 1), 2)
    sampling = SamplingSettings(6, eos_token_ids=[EOS])
    runs = []
    for complete in (decode_completions, decode_scored):
        runs.append(complete(student, ids, torch.ones_like(ids), sampling, streams=streams(64)))
    assert [each.ids for each in runs[1]] == runs[0]
    for each in runs[1]:
        torch.testing.assert_close(each.logps[:, 0], token_logps(student, each.ids).detach())
        assert torch.equal(each.logps[:, 0], each.logps[:, 1]), "weights are exactly 1"
