"""Adapters: what trains, what is saved, and a head that carries one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_dataset

ATTENTION = ["q_proj", "v_proj"]


def _lora(targets=ATTENTION, **settings):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_only_the_adapter_trains(make_trainer, make_student, by_step, lmbda):
    student = make_student()
    base = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = make_trainer(student, peft_config=_lora(), lmbda=lmbda, max_steps=4, weight_decay=0.1)
    assert isinstance(trainer.model, PeftModel)
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.train()
    inner = trainer.model.get_base_model().state_dict()
    for name, value in base.items():
        kept = inner[name] if name in inner else inner[name.replace("_proj.", "_proj.base_layer.")]
        assert torch.equal(kept, value), name
    adapters = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert adapters and all(value.abs().sum() > 0 for value in adapters)


def test_an_adapter_is_saved_and_comes_back(make_trainer, make_student, tmp_path):
    trainer = make_trainer(peft_config=_lora(), lmbda=0.5, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    ids = torch.tensor([[4, 5, 12, 6, 13]])
    again = PeftModel.from_pretrained(make_student(), str(tmp_path / "adapter")).eval()
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.allclose(again(ids).logits, make_student()(ids).logits)


def test_an_adapter_is_resumed_exactly(make_trainer, by_step, die_at, tmp_path):
    settings = {"lmbda": 0.5, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(peft_config=_lora(), output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    with pytest.raises(die_at.error):
        make_trainer(peft_config=_lora(), callbacks=[die_at(5)], **settings).train()
    resumed = make_trainer(peft_config=_lora(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert by_step(resumed) == by_step(whole)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_a_peft_student_goes_on_with_its_own_adapter(make_trainer, make_student):
    student = get_peft_model(make_student(), _lora())
    trainer = make_trainer(student, lmbda=0.0)
    assert trainer.model is student
    trainer.train()
    assert any(p.abs().sum() > 0 for name, p in student.named_parameters() if "lora_B" in name)
    with pytest.raises(ConfigurationError, match="PeftModel"):
        make_trainer(get_peft_model(make_student(), _lora()), peft_config=_lora())


def test_adapters_train_under_checkpointing(make_trainer, by_step):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(peft_config=_lora(), lmbda=0.5, max_steps=4, activation_checkpointing=checkpointing)
        trainer.train()
        runs.append((by_step(trainer), by_step(trainer, "grad_norm")))
    for plain, checkpointed in zip(*runs, strict=True):
        assert plain == pytest.approx(checkpointed, rel=1e-5)
    assert all(norm > 0 for norm in runs[1][1].values())


def _with_head_adapter(make_student, **settings):
    torch.manual_seed(3)
    student = get_peft_model(make_student(tie_word_embeddings=False), _lora(["q_proj", "lm_head"], **settings))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # zero at the start, and then the gradient of A is zero too
            torch.nn.init.normal_(parameter, std=0.3)
    return student


def _loss_and_gradients(trainer, batch, fused):
    trainer.two_models.head_is_fused = fused
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_an_adapter_on_the_head_is_trained_in_the_fused_path(make_trainer, make_student, batch_of, dense, jsd_mean):
    trainer = make_trainer(_with_head_adapter(make_student), lmbda=0.0)
    batch = batch_of(trainer)
    fused, gradients = _loss_and_gradients(trainer, batch, None)
    assert trainer.two_models.head_is_fused is True
    plain, expected = _loss_and_gradients(trainer, batch, False)
    assert fused == pytest.approx(plain, rel=1e-5)
    assert fused == pytest.approx(
        jsd_mean(dense(trainer.model, trainer.teacher.model, trainer.train_dataset)), rel=1e-5
    )
    heads = [name for name in expected if "lm_head" in name]
    assert len(heads) == 2
    for name, value in expected.items():
        assert value.abs().sum() > 0, name
        assert torch.allclose(gradients[name], value, rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_a_head_adapter_that_is_no_matrix_product_takes_the_logits_path(
    make_trainer, make_student, batch_of, dense, jsd_mean, settings
):
    trainer = make_trainer(_with_head_adapter(make_student, **settings), lmbda=0.0)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert trainer.two_models.head_is_fused is False
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, trainer.train_dataset))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in trainer.model.named_parameters() if "lm_head.lora_" in name)


def test_a_head_trained_whole_beside_an_adapter(make_trainer, make_student, batch_of, tmp_path):
    """`modules_to_save` keeps a trained copy of the head; the frozen original must not be the one that is used."""
    student = get_peft_model(make_student(tie_word_embeddings=False), _lora(modules_to_save=["lm_head"]))
    trainer = make_trainer(student, lmbda=0.0)
    batch = batch_of(trainer)
    with torch.no_grad():
        head = next(p for name, p in student.named_parameters() if "modules_to_save" in name)
        head += 0.1 * torch.randn_like(head)
    fused, gradients = _loss_and_gradients(trainer, batch, None)
    assert trainer.two_models.head_is_fused is True
    plain, expected = _loss_and_gradients(trainer, batch, False)
    assert fused == pytest.approx(plain, rel=1e-5)
    assert sum("lm_head" in name for name in expected) == 1
    for name, value in expected.items():
        assert torch.allclose(gradients[name], value, rtol=1e-3, atol=1e-7), name


def test_evaluation_and_rollouts_use_the_adapter(make_trainer, make_student, dense, jsd_mean):
    student = _with_head_adapter(make_student)
    trainer = make_trainer(student, eval_dataset=addition_dataset(6, seed=5), lmbda=1.0)
    expected = jsd_mean(dense(student, trainer.teacher.model, trainer.eval_dataset))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_virtual_tokens_are_refused(make_trainer, make_student):
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ConfigurationError, match="prompt"):
        make_trainer(peft_config=config)
    with pytest.raises(ConfigurationError, match="prompt"):
        make_trainer(get_peft_model(copy.deepcopy(make_student()), config))


def test_an_adapter_can_teach(make_trainer, make_teacher, by_step):
    """A teacher that is a PeftModel is frozen whole, and its adapter counts."""
    teacher = get_peft_model(make_teacher(), _lora(["q_proj"]))
    trainer = make_trainer(teacher=teacher, lmbda=0.0, max_steps=2)
    trainer.train()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(loss > 0 for loss in by_step(trainer).values())
