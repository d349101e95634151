"""The engines behind one interface; vLLM stands in as an object that notes what it is given."""

from __future__ import annotations

import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch

from distill_trainers import GKDConfig
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rollouts import (
    DecodeEngine,
    HfEngine,
    SamplingSettings,
    VllmEngine,
    build_engine,
    check_engine,
    local_engine,
)

BUILD = {"model": SimpleNamespace(name_or_path=""), "accelerator": None, "tokenizer": None, "max_length": 32}


class FakeVllm:
    """TRL's VLLMGeneration: what it was built with, and with which settings and weights each call ran."""

    built: list[FakeVllm] = []

    tensor_parallel_size = 1

    def __init__(self, model, accelerator, processing_class, **options):
        self.accelerator = accelerator
        self.model, self.processing_class, self.options = model, processing_class, options
        self.calls, self.weights, self.answers = [], None, None
        FakeVllm.built.append(self)

    def sync_weights(self):
        self.weights = next(self.model.parameters()).detach().clone()

    def generate(self, prompts, images, num_generations):
        assert images is None and num_generations == 1 and self.weights is not None
        assert torch.equal(self.weights, next(self.model.parameters())), "stale weights"
        settings = {name: value for name, value in vars(self).items() if name in FakeVllm.settings}
        self.calls.append((prompts, settings, self.weights))
        answers = self.answers or [[4, 5, 1, 6]] * len(prompts)
        return prompts, answers, None, None

    settings = {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("max_completion_length", "logprobs", "generation_kwargs"),
    }


@pytest.fixture
def vllm(monkeypatch):
    """Makes vLLM look installed, and TRL's class a fake."""
    import trl.generation.vllm_generation as module  # asks itself whether vLLM is there

    find, FakeVllm.built = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name if name == "vllm" else find(name, *a))
    monkeypatch.setattr(FakeVllm.__init__, "__signature__", inspect.signature(module.VLLMGeneration.__init__), False)
    monkeypatch.setattr(module, "VLLMGeneration", FakeVllm)
    return FakeVllm


# ---- Choosing -------------------------------------------------------------------------------------------------------


def test_engines_by_name():
    assert type(build_engine("decode", **BUILD)) is DecodeEngine
    assert type(build_engine("hf", **BUILD)) is HfEngine
    assert type(local_engine("vllm", None)) is DecodeEngine, "a teacher is not in vLLM"
    with pytest.raises(ConfigurationError, match="decode, hf, vllm"):
        check_engine("VLLM")


def test_the_config_refuses_unknown_engines_and_settings(tmp_path):
    for settings, named in (
        ({"rollout_engine": "tgi"}, "rollout_engine: tgi"),
        ({"min_p": 1.0}, "min_p: 1.0"),
        ({"min_p": -0.1}, "min_p: -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            GKDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_missing_vllm_is_refused_before_anything_is_loaded(make_trainer, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    monkeypatch.setattr("distill_trainers.trainers.student.load_student", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match="vLLM is not installed.*rollout_engine: decode"):
        make_trainer(rollout_engine="vllm", lmbda=1.0)


def test_a_run_that_never_samples_needs_no_engine(make_trainer):
    make_trainer(rollout_engine="vllm", lmbda=0.0, max_steps=1).train()


def test_both_local_engines_draw_the_same_texts(make_model, pad_left, prompts, streams):
    """All settings on, whatever the batches, by the same random numbers."""
    sampling = SamplingSettings(
        8, 1.4, top_k=9, top_p=0.9, eos_token_ids=[1], min_p=0.02, repetition_penalty=1.3, no_repeat_ngram_size=3
    )
    runs = []
    for engine in (DecodeEngine(), HfEngine(), HfEngine(batch_size=5), HfEngine(batch_size=1)):
        runs.append(engine.generate(make_model(), *pad_left(prompts), sampling, streams(len(prompts))))
    assert runs[1:] == runs[:1] * 3 and len(set(map(tuple, runs[0]))) > 12


# ---- In a trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine, calls", [("decode", 0), ("hf", 2)])
def test_the_trainer_uses_the_engine_of_its_config(make_trainer, by_step, engine, calls):
    trainer = make_trainer(
        lmbda=1.0, rollout_engine=engine, max_steps=2, min_p=0.05, repetition_penalty=1.1, rollout_batch_size=None
    )
    assert trainer.sampling.min_p == 0.05 and trainer.sampling.repetition_penalty == 1.1
    seen, inner = [], trainer.model.generate
    trainer.model.generate = lambda **kwargs: seen.append(1) or inner(**kwargs)
    trainer.train()
    assert len(seen) == calls and by_step(trainer, "rollouts") == {1: 4.0, 2: 4.0}


def test_one_decode_serves_the_whole_window_with_a_cache_under_checkpointing(make_trainer, make_student):
    student = make_student()
    trainer = make_trainer(
        student,
        lmbda=1.0,
        max_steps=2,
        gradient_accumulation_steps=3,
        activation_checkpointing=True,
        max_new_tokens=6,
    )
    seen = []

    def spy(module, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            assert not student.training and not torch.is_grad_enabled()
            seen.append((len(kwargs["input_ids"]), kwargs["past_key_values"].get_seq_length()))
            assert kwargs["input_ids"].shape[1] == 1 or not seen[-1][1]

    student.model.register_forward_pre_hook(spy, with_kwargs=True)
    trainer.train()
    assert sum(rows for rows, past in seen if not past) == 2 * 12, "every prompt once"
    assert sum(past > 0 for _, past in seen) <= 2 * 5 and student.training


def test_what_is_sampled_does_not_depend_on_rollout_batches(make_trainer, batch_of):
    windows = []
    for size in (None, 5):
        trainer = make_trainer(lmbda=1.0, rollout_batch_size=size, max_new_tokens=8)
        windows.append(trainer.rollout([batch_of(trainer, range(8)), batch_of(trainer, range(8, 12))]))
    for one, other in zip(*windows, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def test_vllm_gets_prompts_settings_and_weights(make_model, pad_left, vllm):
    model = make_model()
    generation = vllm(model, SimpleNamespace(process_index=0), "tokenizer")
    engine = VllmEngine(generation, vocab_rows=24)
    generation.answers = [[4, 5, 1, 6], [8, 8], [9]]
    sampling = SamplingSettings(
        7,
        temperature=0.7,
        top_p=0.9,
        top_k=11,
        eos_token_ids=[1, 9],
        suppress_from=22,
        min_p=0.1,
        repetition_penalty=1.2,
        stop_strings=["x"],
    )
    prompts = [[3, 4, 3], [5], [6, 7]]  # the padding id is text, too
    assert engine.generate(model, *pad_left(prompts), sampling) == [[4, 5, 1], [8, 8], [9]]
    ((given, settings, _),) = generation.calls
    assert given == prompts
    assert settings == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "max_completion_length": 7,
        "logprobs": None,
        "generation_kwargs": {
            "stop_token_ids": [1, 9],
            "stop": ["x"],
            "include_stop_str_in_output": True,
            "logit_bias": {22: -100.0, 23: -100.0},
        },
    }
    assert not engine.runs_the_model
    engine.generate(model, *pad_left(prompts), SamplingSettings(3, eos_token_ids=[1]))
    assert generation.calls[1][1]["generation_kwargs"] == {"stop_token_ids": [1]}


def test_vllm_draws_anew_at_each_step_and_leaves_the_random_state(make_model, pad_left, vllm, streams):
    """As it does in this process: from torch's own state. Processes that share one model must draw alike."""
    states = []
    for rank, shared in ((0, 1), (0, 1), (1, 1), (0, 2), (1, 2)):
        generation = vllm(make_model(), SimpleNamespace(process_index=rank), "tokenizer")
        generation.tensor_parallel_size = shared
        inner, drawn = generation.generate, []
        generation.generate = lambda **given: drawn.append(torch.rand(3).tolist()) or inner(**given)  # noqa: B023
        before = torch.get_rng_state()
        for step in (1, 2):
            rows = streams(2, step=step, rank=rank)
            VllmEngine(generation, 24).generate(make_model(), *pad_left([[4], [5]]), SamplingSettings(3), rows)
        assert torch.equal(torch.get_rng_state(), before) and drawn[0] != drawn[1]
        states.append(drawn)
    assert states[0] == states[1] == states[3] == states[4] != states[2]


def test_our_names_of_vllms_settings_are_trls():
    """The fake can only be trusted if the real class has these attributes and arguments."""
    from trl.generation.vllm_generation import VLLMGeneration

    source = inspect.getsource(VLLMGeneration)
    names = FakeVllm.settings | {"accelerator", "tensor_parallel_size"}
    assert all(f"self.{name} = " in source and f"self.{name}" in source for name in names)
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    known = inspect.signature(VLLMGeneration.__init__).parameters
    assert {"mode", "max_model_length", "max_num_seqs", "server_port", "processing_class"} <= known.keys()


def test_a_trainer_with_vllm(make_trainer, saved, vllm):
    """One call per step, each with the weights that the step before left; rollouts are vLLM's."""
    trainer = make_trainer(
        saved.student,
        saved.teacher,
        lmbda=1.0,
        rollout_engine="vllm",
        rollout_batch_size=6,
        gradient_accumulation_steps=2,
        max_new_tokens=5,
        temperature=0.5,
        vllm_kwargs='{"mode": "server", "server_port": 1234}',
    )
    (generation,) = vllm.built
    assert generation.model is trainer.model and generation.processing_class is trainer.processing_class
    options = {"mode": "server", "server_port": 1234, "max_model_length": 24, "max_num_seqs": 6}
    assert generation.options == options
    windows, inner = [], trainer.rollout
    trainer.rollout = lambda batches: windows.append(inner(batches)) or windows[-1]
    trainer.train()
    assert len(generation.calls) == 3 and all(len(prompts) == 8 for prompts, _, _ in generation.calls)
    first, second, third = (weights for _, _, weights in generation.calls)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    for batch in (batch for window in windows for batch in window):
        assert all(row[row != -100].tolist() == [4, 5, 1] for row in batch["labels"])
    assert generation.calls[0][1]["temperature"] == 0.5


def test_options_of_vllm_are_checked_by_name(make_trainer, saved, vllm):
    for options, message in (
        ({"server_prot": 1}, "vllm_kwargs.*server_port"),
        ({"temperature": 0.5}, "temperature.*vllm_kwargs"),  # a setting of its own
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_trainer(saved.student, lmbda=1.0, rollout_engine="vllm", vllm_kwargs=options)
    assert not vllm.built


def test_a_student_made_in_memory_cannot_be_loaded_by_vllm(make_trainer, vllm):
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        make_trainer(lmbda=1.0, rollout_engine="vllm")
    make_trainer(lmbda=1.0, rollout_engine="vllm", vllm_kwargs={"mode": "server"})
    assert len(vllm.built) == 1


def test_recipes_name_engine_and_filters(tmp_path):
    import yaml

    from distill_trainers.recipe.parse import parse_recipe

    given = {"stop_strings": ["\n\n", "User:"], "min_p": 0.05, "repetition_penalty": 1.1, "rollout_engine": "hf"}
    given |= {"vllm_kwargs": {"mode": "server", "server_port": 8001}, "replay_buffer_size": 1000}
    file = tmp_path / "recipe.yaml"
    models = {"teacher_model_name_or_path": "a", "model_name_or_path": "b", "dataset": "rows.jsonl"}
    file.write_text(yaml.safe_dump({**models, **given, "output_dir": str(tmp_path), "use_cpu": True}))
    args = parse_recipe(["--config", str(file)]).args
    assert {name: getattr(args, name) for name in given} == given
    args = parse_recipe(
        ["--config", str(file), "--stop_strings", "x", "y", "--vllm_kwargs", '{"mode": "colocate"}']
    ).args
    assert args.stop_strings == ["x", "y"] and args.vllm_kwargs == {"mode": "colocate"}


def test_no_ngram_occurs_twice_where_that_is_asked_for(make_model, prompts, pad_left):
    """By both local engines alike; a setting that is off leaves no trace in what identifies kept completions."""
    model, (ids, mask) = make_model(), pad_left([prompt for prompt in prompts if len(set(prompt)) == len(prompt)][:6])
    plain = SamplingSettings(16, 0.0, pad_token_id=3)
    strict = SamplingSettings(16, 0.0, pad_token_id=3, no_repeat_ngram_size=2)
    texts = {}
    for settings in (plain, strict):
        for engine in (DecodeEngine(), HfEngine()):
            texts[settings.no_repeat_ngram_size, type(engine)] = engine.generate(model, ids, mask, settings)
    assert texts[2, DecodeEngine] == texts[2, HfEngine]

    def repeats(rows):
        return [len(pairs) - len(set(pairs)) for pairs in (list(zip(row, row[1:], strict=False)) for row in rows)]

    assert not any(repeats(texts[2, DecodeEngine])) and any(repeats(texts[0, DecodeEngine]))
    assert "no_repeat_ngram_size" not in plain.as_dict() and strict.as_dict()["no_repeat_ngram_size"] == 2
