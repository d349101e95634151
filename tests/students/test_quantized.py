"""A student of integers: what it computes with in training is what its folder holds, bit for bit."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from distill_trainers import models
from distill_trainers.cards.model_card import model_card
from distill_trainers.exceptions import CheckpointError, ConfigurationError
from distill_trainers.models import quantizing
from distill_trainers.models.quantizing import FakeQuantizedLinear, restored, rounded
from distill_trainers.students import prune
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.given.quantized import refuse_sharded
from distill_trainers.trainers.lifecycle import proof
from tests.students.models import build

torchao = pytest.importorskip("torchao", reason="quantised students need torchao")
IDS = torch.tensor([[4, 5, 12, 6, 13], [9, 3, 2, 7, 1]])
INT4 = {"quantize_student": "int4", "lmbda": 0.0}
LORA = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}


def weight_of_every_sign():
    """Groups of 8 of mixed signs, all positive, all negative, of one value, of zeros, and far apart."""
    torch.manual_seed(2)
    mixed = torch.randn(4, 8)
    return torch.stack([*mixed, mixed[0].abs(), -mixed[1].abs(), torch.full((8,), 0.3), torch.zeros(8)]).view(4, 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_those_of_torchao_and_stand_for_the_same(bits):
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    weight = weight_of_every_sign()
    values, scale, zero = rounded(weight, bits, 8)
    theirs = IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, 8), getattr(torch, f"int{bits}"), mapping_type=MappingType.ASYMMETRIC
    )
    assert torch.equal(values.to(torch.int8), theirs.qdata) and values.min() == -(2 ** (bits - 1))
    assert torch.equal(scale, theirs.scale) and torch.equal(zero.to(torch.int8), theirs.zero_point)
    assert torch.equal(restored(values, scale, zero), theirs.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_is_clipped(bits):
    weight = weight_of_every_sign().double()
    off = (restored(*rounded(weight, bits, 8)) - weight).abs().view(4, 2, 8)
    scale = rounded(weight, bits, 8)[1].unsqueeze(-1)
    assert (off <= scale * (1 + 1e-9)).all()  # half a step, and half of one for the place of 0


def test_value_and_straight_through_gradient_are_those_of_a_naive_loop():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 3).double()
    rows, slope = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    expected = torch.zeros(3, 8, dtype=torch.float64)
    for out in range(3):
        for start in (0, 4):
            group = layer.weight.detach()[out, start : start + 4].tolist()
            low, high = min(0.0, *group), max(0.0, *group)
            step = (high - low) / 15
            zero = min(7, max(-8, -8 - round(low / step)))
            for place, weight in enumerate(group):
                integer = min(7, max(-8, round(weight / step) + zero))
                expected[out, start + place] = (integer - zero) * step
    bias = layer.bias.detach()
    holder = models.causal_lm_of(torch.nn.Sequential(layer))
    models.fake_quantize(holder, "int4", 4)
    answers = layer(rows)
    torch.testing.assert_close(answers, rows @ expected.T + bias, rtol=1e-12, atol=1e-12)
    (answers * slope).sum().backward()
    torch.testing.assert_close(layer.weight.grad, slope.T @ rows.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, slope @ expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, slope.sum(0), rtol=1e-12, atol=1e-12)


def test_quantisers_off_the_student_is_its_teacher(make_trainer, make_teacher, batch_of):
    trainer = make_trainer(make_teacher(), quantize_group_size=16, **INT4)
    batch, model = batch_of(trainer, range(4)), trainer.model
    assert trainer.compute_loss(model, batch) > 1e-3
    with models.without_rounding(model):
        loss = trainer.compute_loss(model, batch)
        loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-5
    make_trainer(model, lmbda=0.0)
    assert not models.is_fake_quantized(model)
    assert torch.equal(model(IDS).logits, make_teacher()(IDS).logits)


def test_what_is_rounded(make_student):
    student = make_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    models.fake_quantize(student, "int8", 32)
    layers = {name for name, module in student.named_modules() if isinstance(module, FakeQuantizedLinear)}
    assert len(layers) == 2 * 7 and type(student.lm_head) is torch.nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_weights_are_rounded_once_only_while_they_stay(make_student, monkeypatch):
    student, counted = make_student(), []
    models.fake_quantize(student, "int4", 32)
    monkeypatch.setattr(quantizing, "rounded", lambda *given: counted.append(1) or rounded(*given))
    expected = student(IDS).logits
    with models.rounding_once(student), models.rounding_once(student):
        counted.clear()
        assert torch.equal(student(IDS).logits, expected) and not counted
        with models.without_rounding(student):
            assert not torch.equal(student(IDS).logits, expected)
    student.model.layers[0].mlp.up_proj.weight.data.mul_(2)  # as an optimiser that bumps no version
    assert not torch.equal(student(IDS).logits, expected) and len(counted) == 14


def generated(model):
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gkd", {"quantize_student": "int4", "lmbda": 0.5}),
        pytest.param(
            "gkd",
            {"quantize_student": "int8", "quantize_group_size": 16, "lmbda": 0.0, "activation_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("minillm", {"quantize_student": "int4"}, marks=pytest.mark.slow),
        pytest.param("dpkd", {"quantize_student": "int4", "reference": "student"}, marks=pytest.mark.slow),
        pytest.param("rationale", {"quantize_student": "int4"}, marks=pytest.mark.slow),
    ],
)
def test_plain_transformers_loads_what_was_trained(make_trainer, make_student, tmp_path, caplog, method, settings):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-2}
    trainer = make_trainer(make_student(tie_word_embeddings=method != "gkd"), method=method, **settings, **saved)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    with caplog.at_level("INFO", logger=proof.__name__):
        trainer.save_model()
    assert "answers as the trained one" in caplog.text
    student = trainer.model.eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [(n, m) for n, m in student.named_modules() if isinstance(m, FakeQuantizedLinear)]
    assert len(layers) == 14 and any(not torch.equal(m.weight, start[f"{n}.weight"]) for n, m in layers)
    for name, layer in layers:
        integers = loaded.get_submodule(name).weight
        assert integers.qdata.dtype == torch.int8 and torch.equal(integers.dequantize(), layer.used_weight())
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    assert torch.equal(generated(loaded), generated(student))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in student.state_dict().items())
    assert "# integers: pip install torchao" in model_card(trainer.card_facts())
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "quantization_config" in json.loads((tmp_path / "elsewhere" / "config.json").read_text())


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(make_trainer, die_at, tmp_path):
    settings = {**INT4, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    whole = make_trainer(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    with pytest.raises(die_at.error):
        make_trainer(**settings, callbacks=[die_at(1)]).train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    other = make_trainer(**{**settings, "quantize_student": "int8"})
    with pytest.raises(CheckpointError, match="quantize_student: 'int4', now 'int8'"):
        other.train(resume_from_checkpoint=True)


def test_an_adapter_lies_on_a_base_of_integers(make_trainer, make_student, tmp_path, caplog):
    base = make_student()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(**LORA, modules_to_save=["lm_head"])
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-2}
    trainer = make_trainer(base, peft_config=config, **saved, **INT4)
    trainer.train()
    student = trainer.model.eval()
    with caplog.at_level("INFO", logger=proof.__name__):
        trainer.save_model()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    with loaded.disable_adapter(), student.disable_adapter():
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    assert loaded.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.qdata.dtype == torch.int8
    assert torch.equal(student.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight,
                       before["model.layers.1.mlp.up_proj.weight"])  # fmt: skip
    told = json.loads((tmp_path / "out" / "checkpoint-2" / "adapter_config.json").read_text())
    assert "quantized_base" not in str(told["base_model_name_or_path"]), "it is resumed on the weights to round"
    assert trainer.model.peft_config["default"].base_model_name_or_path == told["base_model_name_or_path"]


def test_a_student_that_teaches_itself_is_not_rounded(make_trainer, make_student):
    def kl_of(**settings):
        rows = {"lmbda": 0.0, "quantize_student": "int4", **settings}
        data = {"train": addition_dataset(8), "eval_dataset": addition_dataset(8)}
        return make_trainer(make_student(initializer_range=0.2), **data, **rows).evaluate()["eval_kl"]

    original = kl_of(teacher=make_student(initializer_range=0.2))
    adapter = peft.LoraConfig(**LORA)
    assert original > 1e-3
    for settings in (
        {"teacher": None, "self_teacher": "initial", "lm_loss_weight": 1.0},
        {"teacher": None, "teacher_placement": "adapter_off", "peft_config": adapter, "lm_loss_weight": 1.0},
    ):
        assert kl_of(**settings) == pytest.approx(original, rel=1e-5)


def test_the_size_that_a_dry_run_says_is_that_of_the_folder(make_student, tmp_path):
    student = make_student()
    told = models.quantized_sizes(student, 32)
    assert told["float32"] == 4 * student.num_parameters() and told["layers"] == 14
    models.fake_quantize(student, "int4", 32)
    models.integer_copy(student).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == told["integers"]


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quantize_student": "int3"}, "quantize_student: int3`; expected none or one of int8, int4"),
        ({"quantize_group_size": 32}, "quantize_group_size: 32`; expected a `quantize_student`"),
        (
            {**INT4, "quantize_group_size": 24},
            "quantize_group_size: 24`, which does not divide .*, 32.*as 32",
        ),
        ({**INT4, "quantize_group_size": 1}, "quantize_group_size"),
        ({**INT4, "merge_adapter": True}, "merge_adapter: true` with `quantize_student: int4"),
        ({**INT4, "lmbda": 1.0, "rollout_engine": "vllm"}, "rollout_engine: vllm` with `quantize_student: int4"),
        ({**INT4, "peft_config": peft.LoraConfig(**LORA, use_dora=True)}, "adapter LoRA with `use_dora`"),
        ({**INT4, "peft_config": peft.LoraConfig(**LORA, init_lora_weights="pissa")}, "init_lora_weights: pissa"),
        ({**INT4, "peft_config": peft.VeraConfig(r=2, target_modules=["q_proj"])}, "adapter VERA"),
    ],
)
def test_settings_that_cannot_work(make_trainer, settings, expected):
    with pytest.raises(ConfigurationError, match=expected):
        make_trainer(**settings)


def test_students_that_cannot_be_quantised(make_trainer, make_student, tokenizer, tmp_path):
    t5 = T5Config(vocab_size=14, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0)
    with pytest.raises(ConfigurationError, match="quantize_student: int4` with an encoder-decoder"):
        make_trainer(T5ForConditionalGeneration(t5), method="rationale", quantize_student="int4")
    for student, expected in (
        (make_student().bfloat16(), "a student in bfloat16; expected float32"),
        (build("gpt2"), "GPT2LMHeadModel, most of whose weights are not those of linear layers"),
        (build("mixtral"), "MixtralForCausalLM, most of whose weights are not"),
    ):
        with pytest.raises(ConfigurationError, match=f"quantize_student: int4` with .*{expected}"):
            make_trainer(student, **INT4)


def test_what_is_quantised_already_is_neither_quantised_nor_pruned(make_trainer, make_student, tokenizer, tmp_path):
    student = make_student()
    models.fake_quantize(student, "int4", 32)
    models.integer_copy(student).save_pretrained(tmp_path / "integers")
    tokenizer.save_pretrained(tmp_path / "integers")
    with pytest.raises(ConfigurationError, match="quantize_student: int8` with a student that is quantised already"):
        make_trainer(str(tmp_path / "integers"), quantize_student="int8")
    halves = models.load_causal_lm(str(tmp_path / "integers"), dtype="bfloat16")
    assert halves(IDS).logits.dtype == halves.model.layers[0].mlp.up_proj.weight.scale.dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match="quantised model, whose layers cannot be trained"):
        prune(AutoModelForCausalLM.from_pretrained(tmp_path / "integers"), keep_layers=1)


def test_without_torchao_nothing_is_loaded(make_trainer, monkeypatch):
    from distill_trainers.trainers.given import packages

    monkeypatch.setattr(packages, "_is_there", lambda module: module != "torchao")
    with pytest.raises(ConfigurationError, match=r"quantize_student: int4`, but torchao .*pip install .*\[quantize\]"):
        make_trainer("no/such-model", **INT4)


def test_shards_are_refused():
    args = SimpleNamespace(quantize_student="int4")
    for kind in ("DEEPSPEED", "FSDP"):
        with pytest.raises(ConfigurationError, match=f"quantize_student: int4` under {kind}"):
            refuse_sharded(args, SimpleNamespace(distributed_type=kind))
    refuse_sharded(args, SimpleNamespace(distributed_type="MULTI_CPU"))
