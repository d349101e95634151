"""The engines behind one interface."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from distill_trainers import GKDConfig
from distill_trainers.exceptions import ConfigurationError, UnlikeModelError
from distill_trainers.models import checkpoint_tensors
from distill_trainers.rollouts import DecodeEngine, HfEngine, SamplingSettings, build_engine, check_engine, local_engine
from distill_trainers.rollouts.base import check_room, completions_of
from distill_trainers.rollouts.stale import Read, refuse_stale
from distill_trainers.rollouts.vllm import check_version, request_fields
from distill_trainers.servers.openai import Written

BUILD = {"model": SimpleNamespace(name_or_path=""), "accelerator": None, "tokenizer": None, "max_length": 32}


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


# ---- vLLM: what needs no engine; the rest is in tests/vllm ----------------------------------------------------------


def test_every_setting_is_named_to_vllm():
    """What is left out, a server would take from the model's generation config."""
    plain = request_fields(SamplingSettings(3, 0.0, eos_token_ids=[1]), None, 24)
    assert plain == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 3,
        "stop_token_ids": [1],
        "logprobs": 0,
        "seed": None,
    }
    sampling = SamplingSettings(7, 0.7, 0.9, 11, [1, 9], suppress_from=22, min_p=0.1, stop_strings=["x"])
    fields = request_fields(sampling, 5, 24)
    changed = {"temperature": 0.7, "top_p": 0.9, "top_k": 11, "min_p": 0.1, "max_tokens": 7, "stop_token_ids": [1, 9]}
    more = {"seed": 5, "stop": ["x"], "include_stop_str_in_output": True, "logit_bias": {22: -100.0, 23: -100.0}}
    assert fields == {**plain, **changed, **more}
    with pytest.raises(ConfigurationError, match="no_repeat_ngram_size: 2"):
        request_fields(SamplingSettings(3, no_repeat_ngram_size=2), 5)
    with pytest.raises(ValueError, match="no streams"):
        request_fields(sampling, None)


def test_completions_carry_what_their_sampler_thought_of_them(make_model, pad_left):
    sampling = SamplingSettings(4, 0.0, eos_token_ids=[1])
    rows = [Written([4, 5, 1, 6], [-1.0, -2.0, -3.0, -4.0]), Written([8], [-0.5])]
    texts = completions_of(rows, sampling, processed=True)
    assert texts == [[4, 5, 1], [8]] and texts.logps == [[-1.0, -2.0, -3.0], [-0.5]] and texts.processed
    assert completions_of(rows, sampling).logps is None, "of a kind that nobody knows"
    assert completions_of([*rows, Written([2], None)], sampling, True).logps is None
    assert texts.drawn_logps(SamplingSettings(4, 0.7)) == texts.logps
    raw = completions_of(rows, sampling, processed=False)
    for same in (SamplingSettings(4, 1.0), SamplingSettings(4, 0.0, top_p=0.5)):
        assert raw.drawn_logps(same) == raw.logps
    for settings in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        assert raw.drawn_logps(SamplingSettings(4, **settings)) is None, "temperature and filters are not in them"


@pytest.mark.parametrize("engine", [DecodeEngine(batch_size=7), HfEngine(batch_size=7)], ids=["decode", "hf"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.2, "top_k": 7, "top_p": 0.8}], ids=str
)
@torch.no_grad()
def test_local_engines_tell_what_one_forward_over_the_text_tells(
    make_model, pad_left, prompts, streams, engine, settings
):
    """The distribution of each token that was drawn from, written out in float64, prompt by prompt."""
    model, sampling = make_model().double(), SamplingSettings(6, eos_token_ids=[1], **settings)
    texts = engine.generate(model, *pad_left(prompts), sampling, streams(len(prompts)))
    assert texts.processed and [len(row) for row in texts.logps] == [len(text) for text in texts]
    assert len({len(text) for text in texts}) > 1
    for prompt, text, told in zip(prompts, texts, texts.logps, strict=True):
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        for scores, token, logp in zip(logits / (sampling.temperature or 1.0), text, told, strict=True):
            probs = scores.softmax(-1)
            if sampling.top_k:
                probs = torch.where(probs >= probs.sort(descending=True).values[sampling.top_k - 1], probs, 0)
                probs = probs / probs.sum()
                above = (probs[None] > probs[:, None]).double() @ probs  # the mass of likelier ids
                probs = torch.where(above < sampling.top_p, probs, 0)
            assert logp == pytest.approx((probs[token] / probs.sum()).log().item(), abs=1e-5)


@pytest.mark.parametrize("step", [1e-1, 1e-3])
@pytest.mark.parametrize("rounding", [0.0, 1e-2])
def test_weights_of_an_earlier_step_are_found_however_small_the_steps(step, rounding):
    """What vLLM rounds otherwise is let pass; weights that stay are found once the student moved by more than that."""
    draw, texts = torch.Generator().manual_seed(0), [[1] * 8, [2] * 8]
    own = [-5 * torch.rand(2, 8, generator=draw)]
    for _ in range(200):
        own.append(own[-1] + step * torch.rand(2, 8, generator=draw))
    bias = rounding * torch.randn(2, 8, generator=draw)
    before = None
    for logps in (own[0], *own):  # the first is sent twice
        before = refuse_stale(Read(texts, logps + bias, logps), before)
    before = refuse_stale(Read(texts, own[0] + bias, own[0]))
    with pytest.raises(UnlikeModelError, match="weights of an earlier step|does not serve") as caught:
        for logps in own[: max(2, int(10 * rounding / step))]:
            before = refuse_stale(Read(texts, own[0] + bias, logps), before, tolerance=0.2)
    assert "of an earlier step" in str(caught.value)
    for other in (own[0] + 1, own[0] * float("nan")):
        with pytest.raises(UnlikeModelError, match="does not serve the student.*`tolerance`"):
            refuse_stale(Read(texts, other, own[0]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "serve"}, "mode.*serve.*colocate, server"),
        ({"mode": "server", "lora": "both"}, "lora.*both.*merged, adapter"),
        ({"mode": "server", "tolerance": 0}, r"tolerance.*in \(0, "),
        ({"mode": "server", "server_prot": 1}, "server_prot.*Did you mean 'server_port'"),
        ({"mode": "server", "gpu_memory_utilization": 0.3}, "gpu_memory_utilization.*started with its own options"),
        ({"mode": "server", "server_base_url": "ftp://a"}, "address of a rollout server"),
        ({"mode": "server", "server_base_url": "http://me:pw@a"}, "DISTILL_ROLLOUT_TOKEN"),
        ({"temperature": 0.5}, "not installed"),
    ],
)
def test_options_of_vllm_are_checked_before_anything_is_loaded(make_trainer, monkeypatch, given, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    monkeypatch.setattr("distill_trainers.trainers.student.load_student", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(lmbda=1.0, rollout_engine="vllm", vllm_kwargs=given)


@pytest.mark.parametrize(("version", "fits"), [("0.31.9", False), ("0.32.0+cpu", True), ("1.0", True), ("dev", True)])
def test_versions_of_vllm(version, fits):
    if fits:
        check_version(version, "here")
    else:
        with pytest.raises(ConfigurationError, match="vLLM 0.31.9 here; expected 0.32 or newer"):
            check_version(version, "here")


def test_prompts_that_vllm_would_cut_short_are_refused():
    check_room([[1] * 4, [1]], SamplingSettings(4), 8, "vLLM")
    check_room([[1] * 4], SamplingSettings(4), None, "vLLM")
    with pytest.raises(ConfigurationError, match="9 tokens.*vLLM takes 8.*max_model_len"):
        check_room([[1] * 5, [1]], SamplingSettings(4), 8, "vLLM")


def test_weights_have_the_names_of_a_checkpoint(make_student, make_model, tmp_path):
    """Those that `save_pretrained` writes: experts one by one, a shared weight once."""
    from safetensors.torch import load_file

    for number, model in enumerate((make_student(), make_model("qwen3"), mixture_of_experts())):
        model.save_pretrained(tmp_path / str(number))
        expected = load_file(tmp_path / str(number) / "model.safetensors")
        found = dict(checkpoint_tensors(type(model).from_pretrained(tmp_path / str(number))))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    tied = make_student(tie_word_embeddings=True)
    assert "lm_head.weight" in dict(checkpoint_tensors(tied, untied_head=True))


def mixture_of_experts():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=14, num_hidden_layers=2, num_local_experts=3, **sizes)
    return AutoModelForCausalLM.from_config(config)


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
