"""Rows longer than a model's positions: refused where positions are looked up, told where they are rotary."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    BioGptConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from distill_trainers import models
from distill_trainers.doctor import Case, Launch
from distill_trainers.doctor.lengths import check_lengths
from distill_trainers.doctor.shapes import shape_of
from distill_trainers.exceptions import DatasetError
from distill_trainers.toy import addition_dataset, addition_rationales
from distill_trainers.trainers import GKDConfig

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
LEARNT = {
    "gpt2": lambda n: GPT2Config(n_positions=n, n_embd=16, n_layer=1, n_head=2),
    "gpt_bigcode": lambda n: GPTBigCodeConfig(n_positions=n, n_embd=16, n_layer=1, n_head=2),
    "gpt_neo": lambda n: GPTNeoConfig(
        max_position_embeddings=n, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    ),
    "opt": lambda n: OPTConfig(max_position_embeddings=n, word_embed_proj_dim=16, ffn_dim=16, **SMALL),
    "biogpt": lambda n: BioGptConfig(max_position_embeddings=n, intermediate_size=16, **SMALL),
}
ROTARY = {
    "llama": lambda n: LlamaConfig(max_position_embeddings=n, intermediate_size=16, **SMALL),
    "mistral": lambda n: MistralConfig(max_position_embeddings=n, intermediate_size=16, num_key_value_heads=2, **SMALL),
}


def built(make, positions, tokenizer, **more):
    config = make(positions)
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    return models.model_class(config).from_config(config, **more)


def longest_of(data):
    return max(len(row["prompt"]) + len(row["completion"]) + 1 for row in data)


@pytest.mark.parametrize("kind", LEARNT)
def test_rows_that_a_table_of_positions_does_not_reach_are_refused(make_trainer, make_teacher, tokenizer, kind):
    data = addition_dataset(24)
    longest = longest_of(data)
    model = built(LEARNT[kind], longest, tokenizer)
    trainer = make_trainer(model, make_teacher(), train=data, lmbda=0.0, max_steps=1)
    trainer.train()  # all of them fit
    model = built(LEARNT[kind], longest - 1, tokenizer)
    with pytest.raises(
        DatasetError,
        match=f"'train' has {longest} tokens, but the student was made for {longest - 1} positions and fails on what "
        f"lies beyond. Set `max_length: {longest - 1}`",
    ):
        make_trainer(model, make_teacher(), train=data, lmbda=0.0)
    make_trainer(model, make_teacher(), train=data, lmbda=0.0, max_length=longest - 1).train()


@pytest.mark.parametrize("kind", ROTARY)
def test_rows_beyond_rotary_positions_are_told(make_trainer, make_teacher, tokenizer, kind, caplog):
    data = addition_dataset(24)
    longest = longest_of(data)
    with caplog.at_level(logging.WARNING):
        make_trainer(built(ROTARY[kind], longest, tokenizer), make_teacher(), train=data, lmbda=0.0)
    assert "positions" not in caplog.text
    with caplog.at_level(logging.WARNING):
        make_trainer(built(ROTARY[kind], 4, tokenizer), make_teacher(), train=data, lmbda=0.0, max_steps=1).train()
    assert f"'train' has {longest} tokens, but the student was made for 4 positions and was never" in caplog.text
    assert "Set `max_length: 4`" in caplog.text and caplog.text.count("positions") == 1


@pytest.mark.parametrize("method", ["gkd", "minillm", "dpkd"])
def test_the_teacher_is_held_against_the_rows_too(make_trainer, tokenizer, method, caplog):
    teacher = built(LEARNT["gpt2"], 8, tokenizer)
    with pytest.raises(DatasetError, match="teacher was made for 8 positions and fails"):
        make_trainer(teacher=teacher, method=method)
    with caplog.at_level(logging.WARNING):
        make_trainer(teacher=built(ROTARY["llama"], 8, tokenizer), method=method)
    assert "teacher was made for 8 positions and was never trained on" in caplog.text


def test_models_given_by_name_are_refused_without_their_weights(make_trainer, tokenizer, tmp_path, monkeypatch):
    for role, positions in (("student", 8), ("teacher", 7)):
        built(LEARNT["gpt2"], positions, tokenizer).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    monkeypatch.setattr(models, "load_causal_lm", None)
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    with pytest.raises(DatasetError, match="student was made for 8"):
        make_trainer(student, teacher, lmbda=0.0)
    with pytest.raises(DatasetError, match="teacher was made for 7"):
        make_trainer(teacher=teacher, lmbda=0.0)


def test_rollouts_count_too(make_trainer, make_teacher, tokenizer):
    data = addition_dataset(24)
    prompt = max(len(row["prompt"]) for row in data)
    settings = {"train": data, "max_new_tokens": 12, "max_length": 40}
    model = built(LEARNT["gpt2"], prompt + 11, tokenizer)
    make_trainer(model, make_teacher(), lmbda=0.0, **settings)  # samples nothing
    with pytest.raises(DatasetError, match=f"{prompt + 12} tokens with a sampled completion .max_new_tokens=12"):
        make_trainer(model, make_teacher(), lmbda=1.0, **settings)
    make_trainer(
        built(LEARNT["gpt2"], prompt + 12, tokenizer), make_teacher(), lmbda=1.0, max_steps=1, **settings
    ).train()
    with pytest.raises(DatasetError, match="max_new_tokens=12"):
        make_trainer(model, make_teacher(), lmbda=0.0, eval_dataset=data, eval_measures=["agreement"], **settings)


def test_padding_evaluation_rows_streams_and_rationales(make_trainer, make_teacher, tokenizer):
    short, data = addition_dataset(400).filter(lambda row: len(row["prompt"]) == 4).take(4), addition_dataset(24)
    model = built(LEARNT["gpt2"], longest_of(short), tokenizer)
    make_trainer(model, make_teacher(), train=short, lmbda=0.0)
    with pytest.raises(DatasetError, match="'train'.*, 16 when padded, but the student"):
        make_trainer(model, make_teacher(), train=short, lmbda=0.0, pad_to_multiple_of=16)
    with pytest.raises(DatasetError, match="dataset 'eval' has"):
        make_trainer(model, make_teacher(), train=short, eval_dataset=data, lmbda=0.0)
    with pytest.raises(DatasetError, match="dataset 'hard' has"):
        make_trainer(model, make_teacher(), train=short, eval_dataset={"easy": short, "hard": data}, lmbda=0.0)
    with pytest.raises(DatasetError, match=r"stream 'train' may have 24 tokens \(`max_length`\)"):
        make_trainer(model, make_teacher(), train=short.to_iterable_dataset(), lmbda=0.0)
    asked = addition_rationales(4)
    trainer = make_trainer(method="rationale", train=asked)
    longest = max(len(ids) for row in trainer.train_dataset for ids in (row["input_ids"], row["other_input_ids"]))
    make_trainer(built(LEARNT["gpt2"], longest, tokenizer), method="rationale", train=asked)
    with pytest.raises(DatasetError, match=f"'train' has {longest} tokens"):
        make_trainer(built(LEARNT["gpt2"], longest - 1, tokenizer), method="rationale", train=asked)


@pytest.mark.parametrize("kind", [*LEARNT, *ROTARY])
def test_the_doctor_says_the_same(kind, tokenizer, tmp_path):
    config = (LEARNT | ROTARY)[kind](16)
    config.vocab_size = len(tokenizer)
    shape = shape_of(models.without_weights(config))
    assert (shape.context, shape.absolute_positions) == (16, kind in LEARNT)
    args = GKDConfig(output_dir=str(tmp_path), max_length=24, max_new_tokens=4, use_cpu=True)
    case = Case(args, Launch(on_cpu=True), "s", None, student_shape=shape, lengths=[20], prompt_lengths=[4])
    (found,) = check_lengths(case)
    words = models.beyond_positions("", "student", 16, absolute=kind in LEARNT)
    assert found.severity == "error" and found.what.endswith(words[0]) and found.remedy == words[1]


def test_positions_that_were_stretched_are_counted():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    assert models.positions_of(LlamaConfig(max_position_embeddings=32, rope_parameters=yarn)) == 128
    assert models.positions_of(LlamaConfig(max_position_embeddings=128, rope_parameters=yarn)) == 128
    assert models.positions_of(GPT2Config(n_positions=33)) == 33
