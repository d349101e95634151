"""Fused head and full logits give one loss and one gradient, whatever a model does to its logits; vocabularies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, PhiConfig

from distill_trainers.exceptions import VocabularyError
from distill_trainers.toy import CHARACTERS, character_tokenizer

SHARED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": (None, {}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}),
    "gemma2 soft cap": (Gemma2Config, {**SHARED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "granite logits_scaling": (GraniteConfig, {**SHARED, "logits_scaling": 4.0}),
    "cohere logit_scale": (CohereConfig, {**SHARED, "logit_scale": 0.25}),
    "phi head bias": (PhiConfig, SHARED),
}


def _model(make_student, architecture, seed, vocab_size=14):
    config_class, settings = ARCHITECTURES[architecture]
    if config_class is None:
        return make_student(seed=seed, vocab_size=vocab_size, initializer_range=0.2)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(vocab_size=vocab_size, **settings), dtype=torch.float32)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def _reference(student, teacher, batch, vocab_size=None):
    """Mean JSD from the models' own logits, with autograd; `vocab_size` cuts padding ids off both."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trained = batch["labels"][:, 1:] != -100
    q = F.log_softmax(student(**inputs).logits[:, :-1][trained][:, :vocab_size].double(), dim=-1)
    with torch.no_grad():
        p = F.log_softmax(teacher(**inputs).logits[:, :-1][trained][:, :vocab_size].double(), dim=-1)
    m = (0.5 * (p.exp() + q.exp())).log()
    return (0.5 * p.exp() * (p - m) + 0.5 * q.exp() * (q - m)).sum(-1).mean()


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5 * scale.item()), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_and_logits_paths_equal_the_models_own_logits(make_trainer, make_student, batch_of, architecture):
    student, teacher = (_model(make_student, architecture, seed) for seed in (1, 2))
    own_student, own_teacher = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    trainer = make_trainer(student, teacher, lmbda=0.0)
    batch = batch_of(trainer, range(8))
    loss = _reference(own_student, own_teacher, batch)
    loss.backward()
    expected = _gradients(own_student)
    assert loss.item() > 1e-3
    for student_fused, teacher_fused in ((None, None), (False, None), (None, False), (False, False)):
        trainer.two_models.head_is_fused, trainer.teacher._fused = student_fused, teacher_fused
        student.zero_grad()
        found = trainer.compute_loss(student, batch)
        taken = trainer.two_models.head_is_fused
        assert taken is (student_fused is None), "the fused head must be taken where it can be"
        assert trainer.teacher._fused is (teacher_fused is None)
        found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        _assert_equal_gradients(_gradients(student), expected)


def test_changes_to_logits_that_nobody_knows_of_take_the_logits_path(make_trainer, make_student, batch_of):
    """A model with an unheard-of scale: found out by comparing, not by name."""
    student = make_student(initializer_range=0.2)
    inner = student.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits * 1.5 + torch.arange(14.0)
        return output

    student.forward = forward
    trainer = make_trainer(student, lmbda=0.0)
    batch = batch_of(trainer, range(8))
    loss = trainer.compute_loss(trainer.model, batch)
    assert trainer.two_models.head_is_fused is False
    assert loss.item() == pytest.approx(_reference(student, trainer.teacher.model, batch).item(), rel=1e-5)


def test_a_backbone_that_the_class_does_not_name_takes_the_logits_path(
    make_trainer, make_student, make_teacher, batch_of
):
    student, teacher = make_student(), make_teacher()
    student.base_model_prefix = teacher.base_model_prefix = "nowhere"
    trainer = make_trainer(student, teacher, lmbda=0.0)
    batch = batch_of(trainer, range(8))
    loss = trainer.compute_loss(trainer.model, batch)
    assert trainer.two_models.head_is_fused is trainer.teacher._fused is False
    assert loss.item() == pytest.approx(_reference(student, teacher, batch).item(), rel=1e-5)


@pytest.mark.parametrize("mib", [64.0, 1e-4])
def test_the_chunk_budget_changes_nothing(make_trainer, batch_of, mib):
    trainer = make_trainer(lmbda=0.0, loss_chunk_mib=mib)
    batch = batch_of(trainer, range(12))
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(_reference(trainer.model, trainer.teacher.model, batch).item(), rel=1e-5)


# ---- Vocabularies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(14, 20), (20, 14), (20, 16)], ids=str)
@pytest.mark.parametrize("fused", [None, False])
def test_padded_vocabularies_of_one_tokenizer_just_work(
    make_trainer, make_student, make_teacher, batch_of, rows, fused
):
    """Padding ids leave both softmaxes; filling the smaller one up with logit 0 would give them probability."""
    student, teacher = make_student(vocab_size=rows[0]), make_teacher(vocab_size=rows[1])
    trainer = make_trainer(student, teacher, teacher_processing_class=character_tokenizer(), lmbda=0.0)
    trainer.two_models.head_is_fused = trainer.teacher._fused = fused
    batch = batch_of(trainer, range(8))
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    found = _gradients(student)
    student.zero_grad()
    expected = _reference(student, teacher, batch, vocab_size=14)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    _assert_equal_gradients(found, _gradients(student))


def test_rollouts_never_sample_ids_that_no_token_has(make_trainer, make_student, batch_of):
    """A student of 40 rows and 14 tokens: untrained rows would be sampled two times in three."""
    trainer = make_trainer(
        make_student(vocab_size=40), teacher_processing_class=character_tokenizer(), lmbda=1.0, max_new_tokens=8
    )
    batches, _ = trainer.get_batch_samples(iter([batch_of(trainer)]), 1, torch.device("cpu"))
    sampled = batches[0]["input_ids"][batches[0]["labels"] != -100]
    assert len(sampled) > 50
    assert sampled.max() < 14


def _other_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *reversed(CHARACTERS)])}
    inner = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def test_a_teacher_with_another_tokenizer_is_refused(make_trainer, make_teacher):
    with pytest.raises(VocabularyError, match="different tokenizers"):
        make_trainer(teacher_processing_class=_other_tokenizer())
    with pytest.raises(VocabularyError, match="different tokenizers"):  # whatever the row counts
        make_trainer(teacher=make_teacher(vocab_size=20), teacher_processing_class=_other_tokenizer())


def test_a_teacher_by_name_with_another_tokenizer_is_refused_before_weights_load(saved, tmp_path, monkeypatch):
    from distill_trainers import GKDConfig, GKDTrainer, models
    from distill_trainers.toy import addition_dataset

    teacher = tmp_path / "teacher"
    AutoModelForCausalLM.from_pretrained(saved.teacher).save_pretrained(teacher)
    _other_tokenizer().save_pretrained(teacher)

    def refuse(*args, **kwargs):
        raise AssertionError("loaded weights")

    monkeypatch.setattr(models, "load_causal_lm", refuse)
    with pytest.raises(VocabularyError, match="different tokenizers"):
        GKDTrainer(saved.student, str(teacher), GKDConfig(str(tmp_path), use_cpu=True), addition_dataset(4))


def test_unknown_rows_of_an_unknown_tokenizer_are_refused(make_trainer, make_teacher):
    with pytest.raises(VocabularyError, match="20"):
        make_trainer(teacher=make_teacher(vocab_size=20))
