"""`use_liger_kernel`: the student gets Liger's norms, RoPE and MLP, and keeps the forward that the loss runs in."""

import sys
import types

import pytest

from distill_trainers import GKDConfig
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.trainers.given import packages

PLAIN = {"output_dir": "out", "use_cpu": True, "report_to": "none", "use_liger_kernel": True}
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.fixture
def liger(monkeypatch):
    """A stand-in with the interface of Liger, whose kernels run on GPUs only: it notes what it is asked for."""
    asked = []
    module = types.ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = lambda model, **kernels: asked.append((model, kernels))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(packages, "_is_there", lambda module: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return asked


@pytest.mark.parametrize("given", [None, {"rope": False}, {"fused_linear_cross_entropy": False}])
def test_its_kernels_are_on_and_its_losses_off(liger, make_trainer, by_step, given):
    trainer = make_trainer(lmbda=0.5, use_liger_kernel=True, liger_kernel_config=given)
    trainer.train()
    ((model, kernels),) = liger
    assert model is trainer.model and kernels == LOSSES | ({"rope": False} if "rope" in str(given) else {})
    plain = make_trainer(lmbda=0.5)
    plain.train()
    assert by_step(trainer) == by_step(plain)  # the stand-in changes nothing, and nothing else was changed


@pytest.mark.parametrize("name", LOSSES)
def test_its_losses_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"liger_kernel_config.{name}: True`; expected false"):
        GKDConfig(**PLAIN, liger_kernel_config={name: True})
    with pytest.raises(ConfigurationError, match='liger_kernel_config: "no"`; expected a mapping'):
        GKDConfig(**PLAIN, liger_kernel_config="no")


def test_on_a_cpu_it_is_refused_before_the_student_is_loaded(liger, make_trainer, saved, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigurationError, match="`use_liger_kernel: True` on a CPU; expected a GPU"):
        make_trainer(student=saved.student, lmbda=0.0, use_liger_kernel=True)


def test_the_real_one_leaves_the_forward_alone(make_trainer, monkeypatch):
    """Where it is installed: modules are Liger's, and the student's own forward is that of a run without it."""
    pytest.importorskip("liger_kernel.transformers")
    from transformers.integrations.liger import apply_liger_kernel

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    trainer = make_trainer(lmbda=0.0, use_liger_kernel=True)
    forward = trainer.model.forward
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    assert trainer.model.forward == forward
    assert "liger_kernel" in trainer.model.model.norm.forward.__module__
