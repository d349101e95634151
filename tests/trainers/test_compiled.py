"""Compiled students and teachers train as uncompiled ones do, and are compiled once for all layers and lengths."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from distill_trainers import models
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rollouts.engines import local_engine
from distill_trainers.teachers.local import LocalTeacher

BY_CONFIG = {"torch_compile": True, "torch_compile_backend": "eager"}


class Graphs:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test compiles for itself; what TrainingArguments leave in the environment ends with it."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}", raising=False)
    torch._dynamo.reset()
    counters.clear()


def lora():
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def run(trainer):
    trainer.train()
    logs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return logs, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


WAYS = {
    "torch.compile": lambda model, graphs: torch.compile(model, backend=graphs, dynamic=True),
    "model.compile": lambda model, graphs: model.compile(backend=graphs, dynamic=True) or model,
    "in its own way": lambda model, graphs: model.compile(backend=graphs, dynamic=True, fullgraph=True) or model,
    "compile_regions": lambda model, graphs: compile_regions(model, backend=graphs, dynamic=True),
    "backbone.compile": lambda model, graphs: model.model.compile(backend=graphs, dynamic=True) or model,
    "head.compile": lambda model, graphs: model.lm_head.compile(backend=graphs) or model,
}


UNCOMPILED = []  # what the run without is


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_comes_compiled_trains_as_it_would_uncompiled(make_trainer, make_student, way):
    graphs, settings = Graphs(), {"lmbda": 0.0, "max_steps": 5}
    if not UNCOMPILED:
        UNCOMPILED.append(run(make_trainer(make_student(num_hidden_layers=4), **settings)))
    trainer = make_trainer(WAYS[way](make_student(num_hidden_layers=4), graphs), **settings)
    assert_same(run(trainer), UNCOMPILED[0])
    # One graph for all layers and lengths; accelerate compiles embeddings and the norm as well. The loss runs in the
    # head's call, which must not be compiled.
    assert graphs.count == {"compile_regions": 3, "head.compile": 0}.get(way, 1)


def test_an_adapter_model_that_comes_compiled(make_trainer, make_student):
    def student():
        torch.manual_seed(0)
        return get_peft_model(make_student(), lora())

    graphs = Graphs()
    expected = run(make_trainer(student(), lmbda=0.0))
    compiled = torch.compile(student(), backend=graphs, dynamic=True)
    assert_same(run(make_trainer(compiled, lmbda=0.0)), expected)
    assert graphs.count == 2, "what enters the first layer needs no gradient"


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 1.0, "eval_strategy": "steps", "eval_steps": 2},
        {"lmbda": 0.0, "activation_checkpointing": True, "gradient_accumulation_steps": 2, "peft_config": lora},
    ],
    ids=["rollouts, evaluation", "checkpointing, adapter, accumulation"],
)
def test_torch_compile_gives_the_losses_of_a_run_without_it(make_trainer, make_student, rows_for, settings):
    def made(**more):
        given = {**settings, "peft_config": settings["peft_config"]()} if "peft_config" in settings else settings
        return make_trainer(make_student(), eval_dataset=rows_for("gkd")(6, seed=5), max_steps=3, **given, **more)

    plain = made()
    expected = run(plain)
    trainer = made(**BY_CONFIG)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ, "it would compile whatever this process trains next"
    assert_same(run(trainer), expected)
    assert 2 <= counters["stats"]["unique_graphs"] <= 4, "one or two for each model"
    assert all(layer._compiled_call_impl is not None for layer in trainer.teacher.model.model.layers)
    losses = [[row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_launch_may_ask_for_it(make_trainer, make_student, monkeypatch):
    """As `accelerate launch --dynamo_backend eager` does."""
    expected = run(make_trainer(make_student(), lmbda=0.0))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert_same(run(make_trainer(make_student(), lmbda=0.0)), expected)
    assert counters["stats"]["unique_graphs"] >= 1


def test_nothing_is_compiled_while_sampling(make_trainer, make_student, batch_of):
    trainer = make_trainer(make_student(), lmbda=1.0, **BY_CONFIG)
    for engine in ("decode", "hf"):
        trainer.engine = local_engine(engine, trainer.processing_class)
        trainer.get_batch_samples(iter([batch_of(trainer, range(4))]), 1, torch.device("cpu"))
    assert not counters["stats"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "LocalTeacher"])
def test_a_teacher_that_comes_compiled_says_the_same(make_trainer, make_student, make_teacher, wrapped):
    graphs = Graphs()
    expected = run(make_trainer(make_student(), make_teacher(), lmbda=0.0))
    teacher = torch.compile(make_teacher(), backend=graphs, dynamic=True)
    teacher = LocalTeacher(teacher, "the teacher") if wrapped else teacher
    assert_same(run(make_trainer(make_student(), teacher, lmbda=0.0)), expected)
    assert graphs.count == 1


def test_layers_whose_states_are_read_may_be_compiled(make_trainer, make_teacher, rows_for, by_step):
    """Evaluation, which reads none, comes first: code that was compiled then would not see hooks that came later."""
    settings = {"lmbda": 0.0, "max_steps": 2, "hidden_weight": 2.0, "eval_strategy": "steps", "eval_on_start": True}
    settings |= {"eval_steps": 1, "eval_dataset": rows_for("gkd")(4)}
    plain, compiled = (
        make_trainer(make_teacher(seed=3), make_teacher(), **settings, **more) for more in ({}, BY_CONFIG)
    )
    expected = run(plain)
    assert_same(run(compiled), expected)
    for name in ("hidden_mse", "eval_loss"):
        assert by_step(compiled, name) == pytest.approx(by_step(plain, name), rel=1e-5)


def test_a_compiled_run_goes_on_where_it_stopped(make_trainer, make_student, tmp_path):
    settings = {"lmbda": 0.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_student(), **settings, output_dir=str(tmp_path / "run"), **BY_CONFIG)
    expected = run(whole)
    resumed = make_trainer(make_student(seed=9), **settings, output_dir=str(tmp_path / "run"), **BY_CONFIG)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in expected[1].items())
    saved = type(whole.model).from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert saved.state_dict().keys() == expected[1].keys(), "names as of an uncompiled model"
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in expected[1].items())


@pytest.mark.parametrize(
    "settings",
    [{"torch_compile_backend": "inducter"}, {"torch_compile": True, "torch_compile_mode": "fastest"}],
    ids=["backend", "mode"],
)
def test_a_compiler_that_does_not_exist_is_named(make_trainer, monkeypatch, settings):
    def refuse(*args, **kwargs):
        raise AssertionError("got past the check")

    monkeypatch.setattr("distill_trainers.trainers.base.load_student", refuse)
    name, value = list(settings.items())[-1]
    with pytest.raises(ConfigurationError, match=f"Got `{name}: {value}`; expected one of"):
        make_trainer(**settings)


def test_a_backend_that_fails_is_a_sentence(make_trainer, make_student):
    def fails(graph, inputs):
        raise RuntimeError("No working C++ compiler found in PATH")

    trainer = make_trainer(torch.compile(make_student(), backend=fails), lmbda=0.0)
    with pytest.raises(ConfigurationError, match=r"LlamaDecoderLayer cannot be compiled: .*No working C\+\+ compiler"):
        trainer.train()


def test_a_version_of_torch_that_hides_the_compiler_is_named(make_student):
    model = make_student()
    model._compiled_call_impl = lambda *args: None
    with pytest.raises(ConfigurationError, match="Pass it uncompiled, and set `torch_compile: true`"):
        models.compiled_by_layer(model)


def test_layers_of_two_models_do_not_share_the_limit_on_variants(make_trainer, make_student):
    """Torch counts the variants of a function; the ninth runs uncompiled."""
    graphs = Graphs()
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in range(3):
            model = torch.compile(make_student(intermediate_size=32 + width), backend=graphs, dynamic=True)
            model = models.compiled_by_layer(model)
            model.model(torch.ones(2, 5, dtype=torch.long), use_cache=False)
    assert graphs.count == 3


@pytest.mark.slow
def test_inductor_trains_in_bfloat16_autocast_and_float32(make_trainer, make_student):
    for settings in ({}, {"bf16": True}):
        settings = {"lmbda": 0.5, "max_steps": 4, **settings}
        expected = run(make_trainer(make_student(), **settings))
        found = run(make_trainer(make_student(), **settings, torch_compile=True, torch_compile_mode="default"))
        assert found[0] == pytest.approx(expected[0], rel=5e-2 if "bf16" in settings else 1e-4)
