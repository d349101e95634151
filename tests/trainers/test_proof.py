"""What is merged and saved answers as what was trained, or nobody is told that it does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from distill_trainers import models
from distill_trainers.exceptions import ConfigurationError, UnlikeModelError
from distill_trainers.models.merging import largest_gap, logits_gap

IDS = torch.tensor([[4, 5, 12, 6, 13], [9, 3, 2, 7, 1]])
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def lora(*targets, **settings):
    return LoraConfig(**{**LORA, "target_modules": list(targets) or ["q_proj"], **settings})


ADAPTERS = {
    "head": lora("q_proj", "lm_head"),
    "head alone": lora("lm_head"),
    "embedding": lora("q_proj", "embed_tokens"),
    "both": lora("lm_head", "embed_tokens"),
    "both, tied": lora("embed_tokens", "lm_head", ensure_weight_tying=True),
    "DoRA on the head": lora("q_proj", "lm_head", use_dora=True),
    "rsLoRA on the head": lora("lm_head", use_rslora=True),
    "whole head": lora(modules_to_save=["lm_head"]),
    "whole embedding": lora(modules_to_save=["embed_tokens"]),
    "whole embedding, tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "some tokens": lora(trainable_token_indices=[4, 5]),
    "all linear": LoraConfig(**LORA, target_modules="all-linear"),
    "DoRA": lora("q_proj", "down_proj", use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
}
STAY_TIED = {"both, tied", "whole embedding, tied", "some tokens", "all linear", "DoRA", "IA3", "VeRA"}


def moved(model, std=0.3):
    """An adapted model whose trainable weights are somewhere else than at the start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_model_answers_as_the_adapted_one_also_when_it_is_loaded(make_student, tmp_path, name, tied):
    if "tied" in name and not tied:
        return
    student = moved(get_peft_model(make_student(tie_word_embeddings=tied), copy.deepcopy(ADAPTERS[name]))).eval()
    before, expected = student.get_base_model().get_input_embeddings(), student(IDS).logits
    merged = models.merged_copy(student)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(student(IDS).logits, expected), "the trained one is as it was"
    assert student.get_base_model().get_input_embeddings() is before
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.tie_word_embeddings is (tied and name in STAY_TIED)


@pytest.mark.parametrize("name", ["head", "embedding", "DoRA on the head"])
def test_the_folder_of_an_adapter_is_merged_as_it_was_trained(saved, tmp_path, name):
    """As `evaluate` does with it."""
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    adapted = moved(get_peft_model(base, copy.deepcopy(ADAPTERS[name]))).eval()
    adapted.save_pretrained(tmp_path)
    merged = models.load_merged_adapter(str(tmp_path))
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_folder_of_an_adapter_that_cannot_be_merged_is_refused(saved, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    moved(get_peft_model(base, lora("q_proj", lora_bias=True))).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="q_proj has no bias"):
        models.load_merged_adapter(str(tmp_path))


# ---- Before and at the end of a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lora("q_proj", lora_bias=True), r"layers.0.self_attn.q_proj has no bias.*lora_bias"),
        (lora("q_proj", "lm_head", trainable_token_indices={"embed_tokens": [4]}), "lm_head carries.*trained tokens"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_before_training(make_trainer, config, named):
    make_trainer(peft_config=copy.deepcopy(config))
    with pytest.raises(ConfigurationError, match=named):
        make_trainer(peft_config=copy.deepcopy(config), merge_adapter=True)


@pytest.mark.parametrize("name", ["head", "whole embedding", "some tokens", "DoRA"])
def test_a_run_saves_a_merged_student_with_the_trained_logits(make_trainer, tmp_path, name):
    trainer = make_trainer(peft_config=copy.deepcopy(ADAPTERS[name]), merge_adapter=True, learning_rate=3e-2)
    trainer.train()
    trainer.save_model()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    torch.testing.assert_close(merged(IDS).logits, trainer.model.eval()(IDS).logits, rtol=1e-3, atol=1e-4)


def spoil(monkeypatch, cls, change):
    """Let what `cls` saves be another model than the one in memory."""
    save = cls.save_pretrained

    def saving(self, *args, **kwargs):
        weight = change(self)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.01)
        try:
            return save(self, *args, **{**kwargs, "state_dict": None})
        finally:
            weight.data.copy_(kept)

    monkeypatch.setattr(cls, "save_pretrained", saving)


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_a_saved_model_that_answers_otherwise_ends_the_run_by_name(make_trainer, monkeypatch, tmp_path, folder):
    trainer = make_trainer()
    trainer.train()
    where = str(tmp_path / (folder or "out"))
    spoil(monkeypatch, type(trainer.model), lambda model: model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(UnlikeModelError, match=rf"{where}.*its logits differ by.*at most 0.0001.*verify_saved: false"):
        trainer.save_model(folder and where)
    trainer.args.verify_saved = False
    trainer.save_model(folder and where)


def test_a_model_that_runs_on_gpus_alone_is_not_compared(make_trainer, monkeypatch, caplog):
    """A kernel that reads no memory of the CPU ends no run."""
    trainer = make_trainer()
    trainer.train()
    logits_of = models.logits_of

    def on_gpus(model, inputs, **settings):
        if model is not trainer.model:
            raise ValueError("Pointer argument cannot be accessed from Triton")
        return logits_of(model, inputs, **settings)

    monkeypatch.setattr(models, "logits_of", on_gpus)
    trainer.save_model()
    assert "is not compared with what was trained: it does not run on the CPU (ValueError: Pointer" in caplog.text


def test_an_adapter_whose_model_runs_on_gpus_alone_is_merged_uncompared(make_student, monkeypatch, caplog):
    student = moved(get_peft_model(make_student(), lora("q_proj", "lm_head"))).eval()
    expected, forward = student(IDS).logits, type(student.get_base_model()).forward

    def on_gpus(*args, **kwargs):
        raise ValueError("Pointer argument cannot be accessed from Triton")

    monkeypatch.setattr(type(student.get_base_model()), "forward", on_gpus)
    merged = models.merged_copy(student)
    assert "merged, but not compared before and after: the model does not run here: Pointer argument" in caplog.text
    monkeypatch.setattr(type(student.get_base_model()), "forward", forward)
    assert logits_gap(merged(IDS).logits.flatten(0, 1), expected.flatten(0, 1)) < 1e-5


def test_checkpoints_are_not_loaded_again(make_trainer, monkeypatch):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    monkeypatch.setattr(trainer.proof, "check", lambda folder: pytest.fail("a checkpoint was loaded"))
    trainer.train()


def test_an_adapter_is_loaded_on_its_base(make_trainer, saved, monkeypatch, caplog):
    """On a base with a name it is compared; on one made in memory it cannot be, and the log says so."""
    caplog.set_level("INFO", logger="distill_trainers")
    trainer = make_trainer(peft_config=lora("q_proj", "lm_head"))
    trainer.train()
    trainer.save_model()
    assert "made in memory and has no name" in caplog.text
    named = make_trainer(saved.student, peft_config=lora("q_proj", "lm_head"))
    named.train()
    named.save_model()
    assert "answers as the trained one" in caplog.text
    spoil(monkeypatch, PeftModel, lambda model: model.get_base_model().lm_head.lora_B["default"].weight)
    with torch.no_grad():
        named.model.get_base_model().lm_head.lora_B["default"].weight.mul_(100)
    with pytest.raises(UnlikeModelError, match="does not answer as what was trained"):
        named.save_model()


def test_a_merge_that_goes_wrong_is_told_and_keeps_the_adapter(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(peft_config=lora("q_proj", "lm_head"), merge_adapter=True, learning_rate=3e-2)
    trainer.train()
    monkeypatch.setattr("distill_trainers.models.merging._untie", lambda model: False)  # the fault that was
    with pytest.raises(UnlikeModelError, match="The student's adapter, merged into its base.*differ by.*is saved"):
        trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and not (tmp_path / "out" / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_narrow_weights_is_no_fault(make_student, dtype):
    student = moved(
        get_peft_model(make_student().to(dtype), lora("q_proj", "lm_head"), autocast_adapter_dtype=False), 0.1
    )
    expected = student.eval()(IDS).logits
    gap = logits_gap(models.merged_copy(student)(IDS).logits.flatten(0, 1), expected.flatten(0, 1))
    assert 0 < gap < largest_gap(dtype) / 3


def test_bfloat16_autocast_is_not_rounding_of_the_weights(make_trainer, tmp_path):
    trainer = make_trainer(bf16=True)
    trainer.train()
    trainer.save_model()
    assert trainer.model.dtype == torch.float32


def test_rounding_of_a_gpu_s_training_is_not_that_of_the_weights(make_student):
    """TF32 is left out while logits are compared, and what was set comes back."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has other names for it")
    student, seen = make_student(), []
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [place.fp32_precision for place in places]
    student.register_forward_hook(lambda *_: seen.extend(place.fp32_precision for place in places))
    try:
        for place in places:
            place.fp32_precision = "tf32"
        models.logits_of(student, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
        assert seen == ["ieee"] * 3 and all(place.fp32_precision == "tf32" for place in places)
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_what_counts_as_a_difference():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert logits_gap(logits + torch.arange(5.0)[:, None], logits) < 1e-6
    assert logits_gap(1.1 * logits, logits) == pytest.approx(0.1, rel=1e-4)
    masked = logits.clone()
    masked[:, 2] = -torch.inf
    assert logits_gap(masked, masked) == 0 and logits_gap(masked, logits) > 1
    assert logits_gap(logits * torch.nan, logits) == float("inf") == logits_gap(logits[:, :6], logits)
    assert [largest_gap(d) for d in (torch.float32, torch.bfloat16)] == pytest.approx([1e-4, 0.078], rel=0.01)
