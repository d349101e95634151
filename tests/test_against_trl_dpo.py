"""TRL 1.16's `DPOTrainer` and ours on the same pairs: with `reference: student` and sums they are one method."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig

from distill_trainers import DPKDConfig, DPKDTrainer
from distill_trainers.toy import addition_rows, character_tokenizer, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")


def pairs(count=16):
    rows = addition_rows(count)
    return Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "7" * (1 + i % 3)} for i, r in enumerate(rows)]
    )


@pytest.fixture
def both(settings_of_both):
    """Trainers of both libraries whose students have left their reference, as in the middle of a run."""

    def build(theirs, student=None, **ours):
        tokenizer = character_tokenizer()
        student = student or tiny_llama(tokenizer, 32, 2, seed=1, initializer_range=0.3).double()
        settings = settings_of_both(bf16=False, max_length=32, max_steps=3, beta=0.3)
        args = trl.DPOConfig(**settings, loss_type=theirs, activation_checkpointing=False)
        models = copy.deepcopy(student), copy.deepcopy(student)
        their = trl.DPOTrainer(*models, args=args, train_dataset=pairs(), processing_class=tokenizer)
        args = DPKDConfig(**settings, reference="student", lm_loss_weight=0.0, **ours)
        teacher = tiny_llama(tokenizer, 48, 2, seed=2).double()
        our = DPKDTrainer(copy.deepcopy(student), teacher, args, pairs(), processing_class=tokenizer)
        for trainer in (their, our):
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        return their, our

    return build


CASES = [
    ("sigmoid", {"loss_type": "sigmoid", "length_normalized": False}),
    ("hinge", {"loss_type": "hinge", "length_normalized": False}),
    ("ipo", {"loss_type": "ipo", "length_normalized": True}),
    ("sigmoid_norm", {"loss_type": "sigmoid", "length_normalized": True}),
]


def mixture_of_experts():
    """A student whose config asks for the loss that balances its experts."""
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=14,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")


@pytest.mark.parametrize("student", [None, mixture_of_experts], ids=["dense", "experts"])
@pytest.mark.parametrize("theirs, ours", CASES, ids=[case[0] for case in CASES])
def test_one_batch_has_the_same_loss_and_gradient(both, theirs, ours, student):
    their, our = both(theirs, student and student(), **ours)
    rows = range(8)
    batch = their.data_collator([their.train_dataset[i] for i in rows])
    their.model.train()
    expected = their.compute_loss(their.model, batch)
    expected.backward()
    our.model.train()
    (batch,) = our.score([our.data_collator([our.train_dataset[i] for i in rows])])
    loss = our.compute_loss(our.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, p), q in zip(our.model.named_parameters(), their.model.parameters(), strict=True):
        near = 1e-5 * q.grad.abs().max().item()  # Llama normalises in float32
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=near, msg=name)


def test_rows_and_rewards_are_the_same(both):
    their, our = both("sigmoid", loss_type="sigmoid", length_normalized=False)
    for mine, theirs in zip(our.train_dataset, their.train_dataset, strict=True):
        assert mine["input_ids"] == theirs["prompt_ids"] + theirs["chosen_ids"]
        assert mine["rejected_ids"] == theirs["rejected_ids"]
    our.train_dataset = our.train_dataset.select(range(4))
    (batch,) = our.score([our.data_collator(list(our.train_dataset))])
    our.model.train()
    _, terms = our.compute_loss(our.model, batch, return_outputs=True)
    their.model.train()
    their.compute_loss(their.model, their.data_collator([their.train_dataset[i] for i in range(4)]))
    metrics = their._metrics["train"]
    for mine, theirs in (("reward_chosen", "rewards/chosen"), ("reward_margin", "rewards/margins")):
        assert (terms[mine].sum() / 4).item() == pytest.approx(metrics[theirs][-1], rel=1e-4)
