"""Packed rows: losses and gradients of the same rows one by one, with every teacher; refused where they cannot be."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, DataCollatorWithFlattening
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from distill_trainers import models
from distill_trainers.data import DistillCollator
from distill_trainers.data.packing import pack, padding_share, rows_of_packed
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_dataset

TINY = {
    "vocab_size": 14,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": 14, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
ARCHITECTURES = {
    "llama": TINY,
    "qwen2": TINY,
    "qwen3": TINY,
    "mistral": {**TINY, "sliding_window": 3},  # narrower than a row
    "gemma2": {**TINY, "sliding_window": 3, "query_pre_attn_scalar": 8},
    "gemma3_text": {**TINY, "sliding_window": 3, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "gpt2": {**GPT2, "eos_token_id": 1, "initializer_range": 0.3},
}
FOR_MAMBA = {"vocab_size": 14, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "initializer_range": 0.3}


def build(kind, seed=1, attention="sdpa", dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES.get(kind, {}), **settings})
    config._attn_implementation = attention
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype)


def loss_and_grads(trainer, rows):
    """The mean over all tokens of `rows`, and its gradient."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows]))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def packed_rows(trainer):
    return trainer.get_train_dataloader().dataset


def one_by_one(trainer, rows):
    """The same, from every row alone: no padding, no mask, no other row near it."""
    trainer.model.zero_grad()
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    total = 0.0
    for row, count in zip(rows, counts, strict=True):
        batch = DistillCollator(0)([row])
        loss = trainer.compute_loss(trainer.model, batch) * (count / sum(counts))
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


# ---- Equal to unpacked rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attention"),
    # Eager masks are of one kind, whatever the model; Gemma 2 has no other attention.
    [("llama", "eager"), *((kind, "eager" if kind == "gemma2" else "sdpa") for kind in ARCHITECTURES)],
)
def test_losses_and_gradients_are_those_of_rows_alone(make_trainer, kind, attention):
    student, teacher = build(kind, 1, attention), build(kind, 2, attention)
    trainer = make_trainer(student=student, teacher=teacher, lmbda=0.0, packing=True, max_length=48)
    rows = list(trainer.train_dataset)
    packed = list(packed_rows(trainer))
    assert len(packed) < len(rows) / 2 and max(len(row["seq_lengths"]) for row in packed) > 2
    (loss, grads), (expected, expected_grads) = loss_and_grads(trainer, packed), one_by_one(trainer, rows)
    assert loss == pytest.approx(expected, rel=1e-5)  # models normalise in float32
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6 * expected_grads.abs().max().item())


def test_every_row_is_in_one_packed_row(make_trainer):
    trainer = make_trainer(lmbda=0.0, packing=True)
    rows = sorted((row["input_ids"], row["labels"]) for row in trainer.train_dataset)
    packed = packed_rows(trainer)
    found = [(row["input_ids"], row["labels"]) for bin_ in packed for row in rows_of_packed(bin_)]
    assert sorted(found) == rows
    assert all(len(row["input_ids"]) == row["length"] == sum(row["seq_lengths"]) <= 24 for row in packed)
    assert trainer.get_train_dataloader().dataset is packed, "packed once"


def test_nothing_predicts_the_first_token_of_a_row(make_trainer):
    """Rows of plain text train all tokens but their first."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 1]}, {"input_ids": [8, 9, 1]}] * 4)
    trainer = make_trainer(train=rows, lmbda=0.0, packing=True, pad_to_multiple_of=16)
    batch = trainer.data_collator(list(packed_rows(trainer)))
    assert (batch["labels"] != -100).sum() == 4 * (3 + 2)
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all() and batch["labels"].shape[1] == 32


def test_a_run_with_accumulation_counts_as_rows_do(make_trainer, by_step, dense, jsd_mean):
    """The first step's loss is the mean over the tokens of both micro-batches, and tokens are counted."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(lmbda=0.0, packing=True, eval_dataset=addition_dataset(5, seed=3), **settings)
    packed = packed_rows(trainer)
    order = list(iter(trainer._get_train_sampler()))[:4]
    rows = [row for number in order for row in rows_of_packed(packed[number])]
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, rows))
    whole = make_trainer(lmbda=0.0, eval_dataset=addition_dataset(5, seed=3)).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6), "evaluation is not packed"
    trainer.train()
    assert by_step(trainer)[1] == pytest.approx(expected, rel=1e-5)
    assert by_step(trainer, "trained_tokens")[1] == sum(label != -100 for row in rows for label in row["labels"])


def test_the_teachers_completions_are_packed_once_they_are_written(make_trainer):
    trainer = make_trainer(lmbda=0.0, seq_kd=True, temperature=0.0, packing=True)
    unpacked = make_trainer(lmbda=0.0, seq_kd=True, temperature=0.0)
    rows = unpacked.get_train_dataloader().dataset
    found = [row["input_ids"] for bin_ in packed_rows(trainer) for row in rows_of_packed(bin_)]
    assert sorted(found) == sorted(row["input_ids"] for row in rows)
    trainer.train()


def test_a_stream_is_packed(make_trainer):
    trainer = make_trainer(train=addition_dataset(24).to_iterable_dataset(), lmbda=0.0, packing=True, max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() > len(batch["input_ids"])
    trainer.train()


@pytest.mark.parametrize("settings", [{"lm_loss_weight": 0.5}, {"divergence": "taid"}, {"kd_temperature": 2.0}])
def test_terms_of_gkd(make_trainer, settings):
    trainer = make_trainer(student=build("llama", 1), teacher=build("llama", 2), lmbda=0.0, packing=True, **settings)
    rows = list(trainer.train_dataset)
    (loss, grads), (expected, _) = loss_and_grads(trainer, list(packed_rows(trainer))), one_by_one(trainer, rows)
    assert loss == pytest.approx(expected, rel=1e-6) and grads.isfinite().all()


def test_a_head_that_is_not_fused(make_trainer, monkeypatch):
    """Plain logits: a forward that would make a cache, with which transformers takes packed rows for one text."""
    monkeypatch.setattr(models, "head_is_fusable", lambda model: False)
    trainer = make_trainer(student=build("llama", 1), teacher=build("llama", 2), lmbda=0.0, packing=True)
    rows = list(trainer.train_dataset)
    (loss, grads), (expected, alone) = loss_and_grads(trainer, list(packed_rows(trainer))), one_by_one(trainer, rows)
    assert not trainer.two_models.head_is_fused and loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grads, alone, rtol=1e-4, atol=1e-6 * alone.abs().max().item())


def test_flash_kernels_get_one_long_row(make_trainer, monkeypatch):
    """They find packed rows in a batch of one only; without the kernels here, the shapes and the loss are looked at."""
    from distill_trainers.models import inputs

    trainer = make_trainer(lmbda=0.0, packing=True)
    rows, expected = list(packed_rows(trainer)), loss_and_grads(trainer, packed_rows(trainer))
    shapes, forward = [], trainer.model.model.forward

    def seen(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model.model, "forward", seen)
    original = inputs.for_kernels

    def as_flash(causal_lm, given):
        fake = copy.copy(causal_lm.config)
        fake._attn_implementation_internal = "flash_attention_2"
        return original(type("Model", (), {"config": fake}), given)

    monkeypatch.setattr("distill_trainers.models.forward.for_kernels", as_flash)
    found = loss_and_grads(trainer, rows)
    width = max(len(row["input_ids"]) for row in rows)
    assert shapes == [(1, len(rows) * width)] and found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


# ---- Every teacher --------------------------------------------------------------------------------------------------


def test_the_student_without_its_adapter_as_teacher(make_trainer):
    settings = {"teacher": None, "teacher_placement": "adapter_off", "lmbda": 0.0, "packing": True}
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(student=build("llama", 1), peft_config=adapter, **settings)
    rows = list(trainer.train_dataset)
    (loss, grads), (expected, alone) = loss_and_grads(trainer, list(packed_rows(trainer))), one_by_one(trainer, rows)
    assert loss == pytest.approx(expected, rel=1e-6) and loss > 0
    torch.testing.assert_close(grads, alone, rtol=1e-4, atol=1e-6 * alone.abs().max().item())


@pytest.mark.parametrize(("kind", "first"), [("hidden", True), ("topk", False)])
def test_a_cache_knows_packed_rows_one_by_one(make_trainer, by_step, tmp_path, kind, first):
    """Filled by a packed run, read by one without packing and without the teacher, and the other way round."""
    run = {"lmbda": 0.0, "divergence": "forward_kl", "max_steps": -1, "num_train_epochs": 1}
    second, folder = not first, str(tmp_path / "cache")
    keep = {"teacher_cache": folder, "teacher_cache_kind": kind}
    keep |= {"teacher_cache_top_k": 14} if kind == "topk" else {}
    live = make_trainer(packing=first, **run)
    filling = make_trainer(packing=first, **run, **keep)
    live.train()
    filling.train()
    assert by_step(filling) == pytest.approx(by_step(live), rel=1e-4)
    reading = make_trainer(teacher=None, packing=second, teacher_placement="cached", teacher_cache=folder, **run)
    expected = make_trainer(packing=second, **run)
    reading.train()
    expected.train()
    assert by_step(reading) == pytest.approx(by_step(expected), rel=1e-4) and len(by_step(reading)) > 1


def test_a_cache_knows_the_rows_of_a_users_flat_batches(make_trainer, by_step, tmp_path):
    settings = {"lmbda": 0.0, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 6}
    make_trainer(teacher_cache=str(tmp_path / "cache"), **settings).train()
    from_cache = {"teacher": None, "teacher_placement": "cached", "teacher_cache": str(tmp_path / "cache")}
    reading = make_trainer(data_collator=DataCollatorWithFlattening(), **from_cache, **settings)
    live = make_trainer(**settings)
    for trainer in (reading, live):
        trainer.train()
    assert by_step(reading) == pytest.approx(by_step(live), rel=1e-4) and len(by_step(live)) == 4


def test_a_cache_is_filled_ahead_for_packed_rows(make_trainer, tmp_path):
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    trainer = make_trainer(lmbda=0.0, packing=True, teacher_cache=str(tmp_path / "cache"))
    different = len({tuple(row["input_ids"]) for row in trainer.train_dataset})
    assert fill_cache(trainer)["computed"] == different == 24
    again = make_trainer(lmbda=0.0, teacher=None, teacher_placement="cached", teacher_cache=str(tmp_path / "cache"))
    assert again.train().training_loss > 0


# ---- Batches that others packed (T2) --------------------------------------------------------------------------------


def in_one_row(mask):
    """A user's collator: all rows in one, told by `position_ids`, with or without a mask."""

    def collate(rows):
        batch = {name: torch.tensor([sum((row[name] for row in rows), [])]) for name in ("input_ids", "labels")}
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        ones = {"attention_mask": torch.ones_like(batch["input_ids"])} if mask else {}
        return {**batch, "position_ids": torch.tensor([positions]), **ones}

    return collate


COLLATORS = {"with a mask": in_one_row(True), "without": in_one_row(False), "flattening": DataCollatorWithFlattening()}


@pytest.mark.parametrize("name", COLLATORS)
def test_position_ids_of_a_users_batch_reach_student_and_teacher(make_trainer, name):
    students = {"student": build("llama", 1), "teacher": build("llama", 2), "lmbda": 0.0}
    data = addition_dataset(5, seed=3)
    trainer = make_trainer(data_collator=COLLATORS[name], eval_dataset=data, **students)
    rows = [trainer.train_dataset[i] for i in range(5)]
    (loss, grads), (expected, alone) = loss_and_grads(trainer, rows), one_by_one(trainer, rows)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grads, alone, rtol=1e-4, atol=1e-6 * alone.abs().max().item())
    usual = make_trainer(eval_dataset=data, **{**students, "student": build("llama", 1)}).evaluate()
    found = trainer.evaluate()
    for metric in ("eval_loss", "eval_kl", "eval_tokens", "eval_perplexity"):
        assert found[metric] == pytest.approx(usual[metric], rel=1e-6)


def with_entries(**entries):
    """Usual batches with entries `[B, T]` made from the mask."""

    def collate(rows):
        batch = DistillCollator(0)(rows)
        return batch | {name: make(batch["attention_mask"]) for name, make in entries.items()}

    return collate


def test_token_type_ids_reach_both_models(make_trainer):
    """GPT-2 adds an embedding for them, so the loss is that of models that got them."""
    types = with_entries(token_type_ids=lambda mask: mask.cumsum(1) % 2 + 3)
    trainer = make_trainer(student=build("gpt2", 1), teacher=build("gpt2", 2), lmbda=0.0, data_collator=types)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids")}
    p, q = (model(**inputs).logits[0].log_softmax(-1) for model in (trainer.teacher.model, trainer.model))
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    values = 0.5 * (p.exp() * (p - m)).sum(-1) + 0.5 * (q.exp() * (q - m)).sum(-1)
    expected = values[:-1][batch["labels"][0, 1:] != -100].mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-6)
    del batch["token_type_ids"]
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(expected, rel=1e-2)


def test_position_ids_that_do_not_start_anew_act_as_well(make_trainer):
    """GPT-2's positions are absolute: rows that begin at 7 are other rows."""
    moved = with_entries(position_ids=lambda mask: mask.cumsum(1) + 6)
    settings = {"student": build("gpt2", 1), "teacher": build("gpt2", 2), "lmbda": 0.0}
    trainer = make_trainer(data_collator=moved, **settings)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    loss = trainer.compute_loss(trainer.model, batch).item()
    for model in (trainer.model, trainer.teacher.model):
        with torch.no_grad():
            model.transformer.wpe.weight[: 64 - 7] = model.transformer.wpe.weight[7:].clone()
    del batch["position_ids"]
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss, rel=1e-6)


# ---- What cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_models_that_mix_packed_rows_are_refused_by_name(make_trainer, who):
    """Mamba has a state, and no positions."""
    mamba = build("mamba", 3, "eager", torch.float32, **FOR_MAMBA)
    pair = {"student": build("llama", 1, dtype=torch.float32), "teacher": build("llama", 2, dtype=torch.float32)}
    trainer = make_trainer(**{**pair, who: mamba}, lmbda=0.0, packing=True)
    with pytest.raises(ConfigurationError, match=f"(?s)the {who}.*MambaForCausalLM"):
        trainer.train()


def test_an_attention_that_ignores_positions_is_found_out(make_trainer, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    trainer = make_trainer(lmbda=0.0, packing=True)
    with pytest.raises(ConfigurationError, match="the student .LlamaForCausalLM, attention 'sdpa'. does not keep them"):
        trainer.train()


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        ("gkd", {"lmbda": 0.5}, "samples completions for single prompts"),
        ("gkd", {"lmbda": 0.0, "adaptive_rollouts": True, "eval_strategy": "steps"}, "samples completions"),
        ("minillm", {}, "the loss weighs whole rows"),
        ("dpkd", {}, "compares the two of each pair"),
        ("rationale", {}, "two tasks"),
    ],
)
def test_methods_that_need_single_rows_refuse_packing(make_trainer, method, settings, why):
    with pytest.raises(ConfigurationError, match=rf"`packing: true` with \w+Trainer, where .*{why}"):
        make_trainer(method=method, packing=True, eval_dataset=addition_dataset(4), **settings)


def test_a_teacher_without_the_argument_is_refused(make_trainer):
    types = with_entries(token_type_ids=torch.zeros_like)
    trainer = make_trainer(student=build("gpt2", 1, dtype=torch.float32), lmbda=0.0, data_collator=types)
    with pytest.raises(ConfigurationError, match=r"\['token_type_ids'\]; expected only what the teacher takes"):
        trainer.train()


@pytest.mark.parametrize("entry", ["position_ids", "token_type_ids"])
def test_a_cache_refuses_what_it_cannot_tell_apart(make_trainer, tmp_path, entry):
    odd = with_entries(**{entry: lambda mask: mask.cumsum(1) + 6 if entry == "position_ids" else mask})
    pair = {"student": build("gpt2", 1, dtype=torch.float32), "teacher": build("gpt2", 2, dtype=torch.float32)}
    trainer = make_trainer(**pair, lmbda=0.0, data_collator=odd, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigurationError, match=rf"\['{entry}'\].*knows a row by its ids alone"):
        trainer.train()


def test_a_users_collator_beside_packing_is_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="`packing: true` makes the batches itself"):
        make_trainer(lmbda=0.0, packing=True, data_collator=DataCollatorWithFlattening())


def test_flattened_batches_for_rollouts_are_refused(make_trainer):
    trainer = make_trainer(lmbda=1.0, data_collator=DataCollatorWithFlattening())
    with pytest.raises(DatasetError, match="packs rows"):
        trainer.train()


# ---- What is said ---------------------------------------------------------------------------------------------------


def test_the_padding_saved_is_told(caplog):
    """Rows of 6 and 2 tokens: 8 of 12 tokens of a batch of two; packed to 8, none is padding."""
    rows = [{"input_ids": [3] * n, "labels": [3] * n, "length": n} for n in (6, 2) * 4]
    packed = pack(Dataset.from_list(rows), 8, 2)
    assert len(packed) == 4 and padding_share([6, 2] * 4, 2) == pytest.approx(1 / 3)
    assert "Packed 8 rows into 4" in caplog.text and "2.0 times" in caplog.text
    assert "0 % of the batches are padding instead of 33 %" in caplog.text


def test_a_card_counts_rows_and_not_packed_ones(make_trainer):
    from distill_trainers.data.packing import count_rows

    trainer = make_trainer(lmbda=0.0, packing=True)
    packed = packed_rows(trainer)
    assert len(packed) < count_rows(packed) == 24 == count_rows(addition_dataset(24))
    assert count_rows(addition_dataset(24).to_iterable_dataset()) is None


def test_terms_of_whole_rows_refuse_packed_ones(make_trainer):
    """A method of one's own, whose rows would all be one."""
    trainer = make_trainer(lmbda=0.0, data_collator=DataCollatorWithFlattening())
    trainer.has_row_terms = True
    with pytest.raises(ConfigurationError, match="terms of whole rows"):
        trainer.train()


def test_what_a_packed_run_saves_is_compared(make_trainer, tmp_path, caplog):
    trainer = make_trainer(lmbda=0.0, packing=True, max_steps=1)
    trainer.train()
    with caplog.at_level("INFO"):
        trainer.save_model(str(tmp_path / "saved"))
    assert "answers as the trained one" in caplog.text
