"""TRL's `GRPOTrainer` and our rewards on the same samples: where both mean the same, loss and gradient are equal.

beta = 0 there and `anchor_weight` = 0 here, the mean over all tokens of a step on both sides. Where they differ, a test
pins down what TRL does, and a float64 reference says who is right.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from datasets import Dataset

from distill_trainers import GKDConfig, GKDTrainer
from distill_trainers.losses.divergences import forward_kl, reverse_kl
from distill_trainers.toy import addition_rows, character_tokenizer, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")

SHARED = {"max_completion_length": 4, "num_generations": 4, "temperature": 1.3, "per_device_train_batch_size": 8}


def digits(completions, **kwargs):
    return [sum(map(int, filter(str.isdigit, text))) / 10 for text in completions]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def both(tokenizer, settings_of_both):
    def build(scale, loss_type):
        student = tiny_llama(tokenizer, 32, 2, seed=1, initializer_range=0.3)
        settings = {**settings_of_both(), **SHARED, "scale_rewards": scale}
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in addition_rows(16)])
        theirs = trl.GRPOTrainer(
            copy.deepcopy(student),
            digits,
            trl.GRPOConfig(**settings, beta=0.0, loss_type=loss_type, bf16=False, gradient_checkpointing=False),
            train_dataset=data,
            processing_class=tokenizer,
        )
        own = {"lmbda": 1.0, "reward_schedule": "joint", "advantage": "group", "anchor_weight": 0.0, "max_length": 24}
        ours = GKDTrainer(
            copy.deepcopy(student),
            tiny_llama(tokenizer, 32, 2, seed=2),
            GKDConfig(**settings, **own, eval_pass_rows=0),
            data,
            processing_class=tokenizer,
            reward_funcs=digits,
        )
        return theirs, ours

    return build


def losses(theirs, ours):
    """TRL's loss and ours on what TRL has sampled, and TRL's inputs."""
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    rows = [row for row in [dict(ours_row) for ours_row in theirs.train_dataset.select(range(2))] for _ in range(4)]
    inputs = theirs._prepare_inputs(rows)
    loss = theirs.compute_loss(theirs.model, inputs)
    texts = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]

    collated = ours.data_collator([ours.train_dataset[i] for i in (0, 1) for _ in range(4)])
    answers = {}
    for prompt, text in zip(prompts, texts, strict=True):
        answers.setdefault(tuple(prompt), []).append(text)
    own_prompts = [
        ids[mask.bool()].tolist() for ids, mask in zip(collated["prompt_ids"], collated["prompt_mask"], strict=True)
    ]
    given = [answers[tuple(prompt)].pop(0) for prompt in own_prompts]
    ours.engine.generate = lambda model, ids, mask, sampling, streams: given
    ours.model.train()
    (batch,), count = ours.get_batch_samples(iter([collated]), 1, torch.device("cpu"))
    return loss, ours.compute_loss(ours.model, batch, num_items_in_batch=count), inputs


@pytest.mark.parametrize(
    ("scale", "loss_type"), [("none", "bnpo"), ("group", "bnpo"), ("batch", "bnpo"), ("group", "dapo")]
)
def test_same_loss_and_gradient_on_the_same_samples(both, scale, loss_type):
    """The last are TRL's defaults: over a whole step `dapo` takes the mean of its tokens, `bnpo` of a micro-batch's."""
    theirs, ours = both(scale, loss_type)
    loss, own, _ = losses(theirs, ours)
    assert own.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    first, second = gradients(ours.model, own), gradients(theirs.model, loss)
    assert second.abs().max() > 1e-3
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def test_the_mean_of_each_completion_weighs_tokens_of_short_ones_more(both):
    """TRL's `loss_type: grpo` divides a text's advantage by its length, which is another objective."""
    loss, own, inputs = losses(*both("none", "grpo"))
    advantages, lengths = inputs["advantages"], inputs["completion_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-6)
    assert own.item() == pytest.approx(-(advantages * lengths).sum().item() / lengths.sum().item(), rel=1e-5)
    assert abs(own.item()) > 1e-3


def test_trls_penalty_has_the_gradient_of_the_forward_kl():
    """TRL adds k3 = p/q - 1 - log p/q of sampled tokens; its gradient in expectation is not that of KL(q || p)."""
    generator = torch.Generator().manual_seed(0)
    student, reference = torch.randn(2, 1, 5, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    q, p = student.log_softmax(-1), reference.log_softmax(-1)
    k3 = (p - q).exp() - (p - q) - 1
    found = torch.autograd.grad((q.exp().detach() * k3).sum(), student)[0]
    of = {}
    for name, divergence in (("forward", forward_kl), ("reverse", reverse_kl)):
        of[name] = torch.autograd.grad(divergence(student.log_softmax(-1), p).sum(), student)[0]
    assert torch.allclose(found, of["forward"], atol=1e-12)
    assert (found - of["reverse"]).abs().max() > 0.01
