"""`model_init_kwargs` and `teacher_model_init_kwargs`: what `from_pretrained` takes, as people spell it."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig, LlamaForCausalLM

from distill_trainers import GKDConfig, GKDTrainer, models
from distill_trainers.evaluation.runner import make_subjects
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rollouts import SamplingSettings, decode_completions
from distill_trainers.toy import addition_dataset


@pytest.fixture
def make_named(saved, tmp_path):
    """Factory of a trainer of two models by name."""

    def make(student=None, teacher=None, *, model=None, **settings):
        args = GKDConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            report_to="none",
            max_length=24,
            max_steps=1,
            lmbda=0.0,
            save_strategy="no",
            model_init_kwargs=student,
            teacher_model_init_kwargs=teacher,
            **settings,
        )
        return GKDTrainer(model or saved.student, saved.teacher, args, addition_dataset(8))

    return make


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16, "torch.bfloat16", "float64"])
def test_dtypes_act_by_either_name(make_named, name, value):
    right = torch.float64 if value == "float64" else torch.bfloat16
    trainer = make_named({name: value}, {name: value})
    assert trainer.model.dtype == trainer.teacher.model.dtype == right
    assert trainer.args.model_init_kwargs.keys() == {"dtype"}, "all that follows reads one spelling"


def test_auto_is_the_dtype_of_the_checkpoint(make_named, saved, make_student, tokenizer, tmp_path):
    folder = tmp_path / "half"
    make_student().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert make_named({"torch_dtype": "auto"}, model=str(folder)).model.dtype == torch.bfloat16
    assert make_named(model=str(folder)).model.dtype == torch.float32, "a student is trained in float32 by default"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "quantization_config", "attn_implementation", "device_map"])
def test_none_is_as_if_left_out(make_named, name):
    trainer = make_named({name: None}, {name: None})
    assert trainer.model.dtype == torch.float32 and not trainer.args.model_init_kwargs


def test_none_is_left_out_for_models_in_memory_too(make_trainer):
    settings = {"model_init_kwargs": {"quantization_config": None}, "teacher_model_init_kwargs": {"dtype": None}}
    make_trainer(**settings, max_steps=1).train()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "kwargs, words",
    [
        (
            {"dtype": "float16", "torch_dtype": "float32"},
            "both `dtype: float16` and its older name",
        ),
        ({"torch_dtype": "bf16"}, "Got dtype 'bf16'"),
        ({"dtype": 16}, "Got dtype 16"),
    ],
)
def test_dtypes_that_cannot_be_meant_are_refused_before_anything_loads(make_named, monkeypatch, role, kwargs, words):
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    setting = "model_init_kwargs" if role == "student" else "teacher_model_init_kwargs"
    with pytest.raises(ConfigurationError, match=f"`{setting}`") as error:
        make_named(**{role: kwargs})
    assert words in str(error.value)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_two_dtypes_that_are_the_same_are_one(make_named, role):
    assert make_named(**{role: {"dtype": torch.float16, "torch_dtype": "float16"}})


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_argument_that_nobody_takes_is_named(make_named, role):
    with pytest.raises(ConfigurationError, match=f"neither `from_pretrained` nor the {role}'s class takes"):
        make_named(**{role: {"attention": "eager"}})


@pytest.mark.parametrize(
    "kwargs, read, right",
    [
        ({"attn_implementation": "eager"}, lambda model: model.config._attn_implementation, "eager"),
        ({"use_cache": False}, lambda model: model.config.use_cache, False),
        ({"device_map": {"": "cpu"}}, lambda model: model.device, "cpu"),
        ({"attention_dropout": 0.5}, lambda model: model.config.attention_dropout, 0.5),
    ],
    ids=lambda value: str(value)[:24],
)
def test_other_arguments_act(make_named, kwargs, read, right):
    trainer = make_named(dict(kwargs), dict(kwargs))
    trainer.train()
    model = trainer.teacher.model
    assert str(read(trainer.model)) == str(right) and str(read(model)) == str(right)


def test_low_cpu_mem_usage_is_taken_or_named(make_named):
    try:
        make_named({"low_cpu_mem_usage": True}).train()
    except ConfigurationError as error:
        assert "low_cpu_mem_usage" in str(error)


def test_rollouts_use_the_cache_whatever_the_config_says(make_named):
    """`use_cache=False`, which TRL's scripts pass under checkpointing, is for the training forward."""
    calls = []
    trainer = make_named({"use_cache": False})
    forward = trainer.model.model.forward

    def spy(*args, **kwargs):
        calls.append(kwargs.get("use_cache"))
        return forward(*args, **kwargs)

    trainer.model.model.forward = spy
    prompt = torch.tensor([[1, 2, 3]])
    decode_completions(trainer.model, prompt, torch.ones_like(prompt), SamplingSettings(3, temperature=0.0), None)
    assert calls and all(calls)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_an_evaluation_takes_the_same_spellings(saved, name):
    kwargs = {name: "bfloat16", "quantization_config": None}
    (student,) = make_subjects({"student": saved.student}, None, None, kwargs, None)
    assert student._load().dtype == torch.bfloat16


@pytest.fixture
def subfolder(saved, tmp_path):
    """The student one folder below, as `subfolder` names it."""
    shutil.copytree(saved.student, tmp_path / "repo/inner")
    (tmp_path / "repo/config.json").write_text('{"model_type": "gpt2", "vocab_size": 3}')
    return str(tmp_path / "repo")


@pytest.mark.parametrize("name", ["revision", "trust_remote_code", "token"])
def test_config_and_tokenizer_are_read_from_the_same_files_as_the_weights(make_named, monkeypatch, saved, name):
    """Else a revision's weights would be read with the config and the tokenizer of another."""
    from transformers import AutoConfig, AutoTokenizer

    seen = {}

    def spy(kind):
        original = kind.from_pretrained

        def call(source, *args, **kwargs):
            seen.setdefault((kind.__name__, source), []).append(kwargs.get(name))
            return original(source, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", call)

    for kind in (AutoConfig, AutoTokenizer):
        spy(kind)
    values = {"revision": ("main", "v2"), "trust_remote_code": (True, True), "token": ("a", "b")}[name]
    make_named({name: values[0]}, {name: values[1]})
    for source, value in ((saved.student, values[0]), (saved.teacher, values[1])):
        for kind in ("AutoConfig", "AutoTokenizer"):
            assert seen[kind, source] and set(seen[kind, source]) == {value}, (kind, source)


def test_a_subfolder_is_read_whole(make_named, subfolder):
    trainer = make_named({"subfolder": "inner"}, model=subfolder)
    assert type(trainer.model).__name__ == "LlamaForCausalLM"
    assert len(trainer.processing_class) == trainer.model.config.vocab_size


def test_a_quantization_among_the_arguments_reaches_the_student(make_named, monkeypatch):
    """TRL's scripts write it there. What quantises is not installed everywhere, so what is asked for is looked at."""
    asked, load = [], LlamaForCausalLM.from_pretrained

    def from_pretrained(name, **kwargs):
        asked.append(kwargs.pop("quantization_config", None))
        return load(name, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    make_named({"quantization_config": four_bits}, {"quantization_config": {"load_in_8bit": True, "quant_method": "x"}})
    assert asked == [four_bits, {"load_in_8bit": True, "quant_method": "x"}]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"attn_implementation": "fast"}, 'attn_implementation="fast"'),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"variant": "fp16"}, "no file named model.fp16.safetensors"),
        ({"dtype": torch.int8}, "not a floating-point dtype"),
    ],
)
def test_what_a_library_refuses_is_told_with_its_setting(make_named, role, kwargs, words):
    setting = {"student": "model_init_kwargs", "teacher": "teacher_model_init_kwargs"}[role]
    with pytest.raises(ConfigurationError) as error:
        make_named(**{role: kwargs})
    text = str(error.value)
    assert words in text and f"The {role} model" in text and f"`{setting}`" in text and next(iter(kwargs)) in text


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_size_that_the_files_do_not_have_is_refused(make_named, role):
    with pytest.raises(ConfigurationError, match=rf"The {role} model .*embed_tokens.weight: \[14, \d+\], not \[20,"):
        make_named(**{role: {"vocab_size": 20, "ignore_mismatched_sizes": True}})


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kwargs", ["auto", {1: 2}, {"output_loading_info": True}, ["dtype"]])
def test_what_is_no_argument_of_a_model_is_refused(make_named, role, kwargs):
    with pytest.raises(ConfigurationError, match="model_init_kwargs"):
        make_named(**{role: kwargs})


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("form", ["value", "config"])
def test_positions_that_are_overridden_are_those_that_rows_are_held_against(make_named, saved, caplog, role, form):
    kwargs = {"max_position_embeddings": 5}
    if form == "config":
        kwargs = {"config": AutoConfig.from_pretrained(getattr(saved, role), **kwargs)}
    make_named(**{role: kwargs})
    assert "positions" in caplog.text and role in caplog.text
