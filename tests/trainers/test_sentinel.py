"""What trains nothing is told, once; what trains is left in peace."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from distill_trainers import models
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.lifecycle import sentinel

NO_GRADIENT, NO_LABELS = "exactly 0, so nothing", "has no trained token"
NOT_MOVED, CONSTANT = "is exactly what it was at the start", "The loss has been exactly"
ALL = (NO_GRADIENT, NO_LABELS, NOT_MOVED, CONSTANT)


@pytest.fixture
def warned(caplog):
    """`warned()`: how often each warning came."""
    return lambda: [sum(part in record.getMessage() for record in caplog.records) for part in ALL]


def lora(*targets):
    return LoraConfig(r=4, target_modules=list(targets) or ["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Stop(TrainerCallback):
    """Ends a run after its first step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 1.0, "gradient_accumulation_steps": 2},
        {"peft_config": lora(), "activation_checkpointing": True},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 1},  # with a learning rate of 0
        {"max_steps": 12},
        {"callbacks": [Stop()]},
        {"learning_rate": 0.0, "max_steps": 2},
    ],
    ids=lambda settings: "stopped" if "callbacks" in settings else str(settings)[:60],
)
def test_a_run_that_trains_is_left_in_peace(make_trainer, warned, settings):
    settings = copy.deepcopy(settings)
    make_trainer(**{"lmbda": 0.0, **settings}).train()
    assert warned() == [0, 0, 0, 0]


def test_a_run_that_has_finished_before_is_left_in_peace(make_trainer, warned):
    for resume in (None, True):
        trainer = make_trainer(lmbda=0.0, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
    assert warned() == [0, 0, 0, 0]


def frozen_but_the_norm(student):
    """All that trains is a norm whose output is thrown away."""
    student.requires_grad_(False)
    student.unused = nn.LayerNorm(4)
    student.model.embed_tokens.register_forward_hook(lambda module, inputs, out: out + 0 * student.unused.weight.sum())
    return student


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_first_gradient_of_zero_and_a_student_that_stands_still(make_trainer, make_student, warned, accumulation):
    settings = {"lmbda": 0.0, "weight_decay": 0.0, "gradient_accumulation_steps": accumulation}
    make_trainer(frozen_but_the_norm(make_student()), **settings, max_steps=4).train()
    assert warned() == [1, 0, 1, 0]


def test_a_student_that_is_its_own_teacher(make_trainer, make_teacher, warned):
    """Its gradient is rounding or 0, and its loss a constant 0."""
    settings = {"lmbda": 0.0, "divergence": "total_variation", "train_sampling_strategy": "sequential"}
    make_trainer(make_teacher(), **settings, max_steps=12, learning_rate=0.0).train()
    assert warned()[3] == 1


def test_steps_that_bfloat16_rounds_away(make_trainer, make_student, warned):
    student = make_student().to(torch.bfloat16)
    for parameter in student.parameters():
        parameter.data.fill_(1.0)  # 1 + 1e-6 is 1
    make_trainer(student, lmbda=0.0, learning_rate=1e-6, weight_decay=0.0).train()
    assert warned()[2] == 1


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_an_optimizer_without_the_students_weights(make_trainer, make_student, warned, peft_config):
    other = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    make_trainer(lmbda=0.0, optimizers=(optimizer, schedule), peft_config=peft_config).train()
    assert warned()[2] == 1


def test_a_loss_that_does_not_change(make_trainer, warned):
    """The same rows at each step, and no learning rate."""
    train = addition_dataset(4)
    settings = {"lmbda": 0.0, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    make_trainer(train=train, **settings, max_steps=sentinel.CONSTANT_LOGS - 1).train()
    assert warned() == [0, 0, 0, 0]
    make_trainer(train=train, **settings, max_steps=sentinel.CONSTANT_LOGS + 3).train()
    assert warned() == [0, 0, 0, 1]


class AllIgnored:
    """A collator that forgets the labels of some batches."""

    def __init__(self, inner, every):
        self.inner, self.every, self.calls = inner, every, 0

    def __call__(self, rows):
        batch = self.inner(rows)
        self.calls += 1
        if self.calls % self.every == 0:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


@pytest.mark.parametrize("accumulation", [1, 3])
def test_batches_without_labels(make_trainer, warned, accumulation):
    settings = {"lmbda": 0.0, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    collator = AllIgnored(make_trainer(**settings).data_collator, every=3)
    make_trainer(**settings, data_collator=collator).train()
    assert warned() == [0, 1, 0, 0]


def test_a_row_of_which_only_the_first_token_is_trained(make_trainer, warned):
    """Nothing predicts it."""
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 8
    collator = make_trainer(train=Dataset.from_list(rows), lmbda=0.0, max_steps=1).data_collator

    def first_only(batch_rows):
        batch = collator(batch_rows)
        batch["labels"][:, 1:] = -100
        return batch

    trainer = make_trainer(train=Dataset.from_list(rows), lmbda=0.0, data_collator=first_only, max_steps=2)
    trainer.train()
    assert warned()[1] == 1


def test_any_change_of_a_weight_changes_its_checksum(make_trainer):
    watch = make_trainer().sentinel
    before = watch._checksums()
    weight = watch.run.model.model.embed_tokens.weight
    with torch.no_grad():
        weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(1e9))
    assert (watch._checksums() != before).sum() == 1


# ---- Weights in 4 bits on a CPU --------------------------------------------------------------------------------------


class Packing(nn.Linear):
    """As bitsandbytes' layer: the first forward in eval mode puts the weight into a layout that passes no gradient."""

    support_avx512bf16_for_cpu = True

    def forward(self, x):
        state = self.weight.__dict__.setdefault("quant_state", SimpleNamespace(packing_format_for_cpu=False))
        if not self.training and self.support_avx512bf16_for_cpu:
            state.packing_format_for_cpu = True
        return super().forward(x.detach() if state.packing_format_for_cpu else x)


@pytest.mark.parametrize("packed_before", [False, True])
def test_weights_in_4_bits_stay_trainable_after_an_evaluation(
    make_trainer, make_student, warned, monkeypatch, packed_before
):
    fake = ModuleType("bitsandbytes.functional")
    fake._convert_weight_packed_for_cpu_inverse = lambda data, state: (
        data,
        SimpleNamespace(packing_format_for_cpu=False),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", fake)
    student = make_student()
    for layer in student.model.layers:
        layer.mlp.down_proj.__class__ = Packing
    if packed_before:
        student.eval()(torch.tensor([[4, 5]]))
        assert student.model.layers[0].mlp.down_proj.weight.quant_state.packing_format_for_cpu
    trainer = make_trainer(student, lmbda=1.0, peft_config=lora("gate_proj"), eval_dataset=addition_dataset(4))
    trainer.evaluate()
    trainer.train()
    assert warned() == [0, 0, 0, 0]
    for name, parameter in trainer.model.named_parameters():
        assert not parameter.requires_grad or "lora_A" in name or parameter.abs().sum() > 0, name


def test_other_layers_are_left_alone(make_student):
    student = make_student()
    assert models.keep_4bit_trainable(student) is student
