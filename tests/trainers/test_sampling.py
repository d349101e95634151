"""Rollouts inside a training step and the teacher's own completions: one generation, whole windows, nothing lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_dataset, addition_rows, character_tokenizer

CPU = torch.device("cpu")

# ---- Rollouts -------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_after_rollouts(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0, max_new_tokens=7)
    batches = [batch_of(trainer, rows) for rows in (range(4), range(4, 8), range(8, 9))]
    before = sum((batch["labels"] != -100).sum() for batch in batches)
    rolled, count = trainer.get_batch_samples(iter(batches), 3, CPU)
    metrics = trainer.metrics.read(trainer.accelerator)
    trained = sum((batch["labels"] != -100).sum() for batch in rolled)
    assert count == trained == metrics["completion_length"] * metrics["rollouts"]
    assert count != before


CYCLES = {"method": "minillm", "teacher_mix_alpha": 0.0, "num_minibatches": 2, "num_inner_epochs": 2}


@pytest.mark.parametrize("empty", ["all", "every second"])
@pytest.mark.parametrize("settings", [{}, {"replay_buffer_size": 16}, CYCLES], ids=["fresh", "replay", "cycles"])
def test_rollouts_that_produce_nothing_are_survived(make_trainer, by_step, monkeypatch, settings, empty):
    """No token, not even EOS, in one step; the steps before and after are as ever."""
    last = 9 if settings is CYCLES else 4  # a cycle has four steps
    trainer = make_trainer(lmbda=1.0, max_steps=last, rollout_engine="hf", **settings)
    generate, sampled = trainer.engine.generate, []

    def nothing(*args):
        rows = generate(*args)
        sampled.append(trainer.state.global_step)
        return rows if len(sampled) != 2 else [[] if empty == "all" or i % 2 else row for i, row in enumerate(rows)]

    monkeypatch.setattr(trainer.engine, "generate", nothing)
    trainer.train()
    losses, tokens, step = by_step(trainer), by_step(trainer, "trained_tokens"), sampled[1] + 1
    assert len(losses) == last and all(map(math.isfinite, losses.values())), losses
    assert all(bool(torch.isfinite(weight).all()) for weight in trainer.model.parameters())
    assert (tokens[step] == 0) == (losses[step] == 0) == (empty == "all") and min(tokens[1], tokens[last]) > 0


def test_rollouts_follow_the_prompt_and_are_trained_whole(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0)
    rows = [trainer.train_dataset[i] for i in range(8)]
    (batch,), _ = trainer.get_batch_samples(iter([batch_of(trainer, range(8))]), 1, CPU)
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1], "trimmed to the longest row"
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        start, end = row["prompt_length"], mask.sum()
        assert ids[:start].tolist() == row["input_ids"][:start]
        assert (labels[:start] == -100).all() and (labels[end:] == -100).all()
        assert torch.equal(labels[start:end], ids[start:end]) and end > start


def test_one_call_of_generate_serves_the_whole_window_with_a_cache_under_checkpointing(make_trainer, make_student):
    """Without a KV cache every new token would run the whole sequence again."""
    student = make_student()
    trainer = make_trainer(
        student,
        lmbda=1.0,
        rollout_engine="hf",
        max_steps=2,
        gradient_accumulation_steps=3,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"every_n_layers": 2},
        max_new_tokens=6,
    )
    inner, calls, widths, generating = student.generate, [], [], []

    def generate(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        assert not student.training and not torch.is_grad_enabled()
        generating.append(True)
        try:
            return inner(*args, **kwargs)
        finally:
            generating.pop()

    def spy(module, args, kwargs):
        if generating:
            ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            widths.append(ids.shape[1])

    student.generate = generate
    student.model.register_forward_pre_hook(spy, with_kwargs=True)
    runs = [0, 0]
    for index, layer in enumerate(student.model.layers):

        def count(module, args, index=index):
            runs[index] += module.training

        layer.input_layernorm.register_forward_pre_hook(count)
    trainer.train()
    assert calls == [12, 12]
    assert sorted(set(widths))[0] == 1 and sum(width > 1 for width in widths) == len(calls)
    assert runs == [2 * 6, 6], "of 6 micro-batches each checkpointed layer runs twice, after rollouts as before"


def test_checkpointing_changes_no_loss(make_trainer, by_step):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(lmbda=0.5, max_steps=4, activation_checkpointing=checkpointing)
        trainer.train()
        runs.append(by_step(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


@pytest.mark.parametrize(
    ("size", "split"),
    [(2, False), (1, False), (4, True)],
    ids=["rows", "more rows than the setting", "batches that processes share"],
)
def test_random_numbers_of_a_row_are_those_of_its_place_in_the_step(make_trainer, batch_of, monkeypatch, size, split):
    """Whichever process has it: they take turns with batches, or with parts of them."""
    trainer = make_trainer(lmbda=1.0, per_device_train_batch_size=size, accelerator_config={"split_batches": split})
    generate = trainer.engine.generate

    def named(batches, world=1, rank=0):
        names = []

        def listened(model, ids, mask, sampling, streams):
            names.extend(stream.number for stream in streams)
            return generate(model, ids, mask, sampling, streams)

        monkeypatch.setattr(type(trainer.accelerator), "num_processes", world)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        trainer.sample_completions([batch_of(trainer, rows) for rows in batches], listened)
        return names

    pairs = [range(start, start + 2) for start in (0, 2, 4, 6)]
    alone = named([range(4), range(4, 8)] if split else pairs)
    first, second = named(pairs[::2], 2, 0), named(pairs[1::2], 2, 1)
    assert [*first[:2], *second[:2], *first[2:], *second[2:]] == alone
    assert len(set(alone)) == 8


def test_rollout_batches_bound_one_call(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0, rollout_engine="hf", rollout_batch_size=5)
    calls, inner = [], trainer.model.generate

    def generate(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        return inner(*args, **kwargs)

    trainer.model.generate = generate
    trainer.get_batch_samples(iter([batch_of(trainer, range(8)), batch_of(trainer, range(8, 12))]), 2, CPU)
    assert calls == [5, 5, 2]


def test_eos_of_a_rollout_is_kept_where_it_is_also_the_padding(make_trainer, batch_of, monkeypatch):
    tok = character_tokenizer()
    tok.pad_token = tok.eos_token
    trainer = make_trainer(tok=tok, lmbda=1.0, rollout_engine="hf")
    eos = tok.eos_token_id
    answers = [[5, 6, eos, eos], [eos] * 4, [4, 4, 4, 4]]
    tokens = iter(torch.tensor(answers).T)
    monkeypatch.setattr("distill_trainers.rollouts.hf.draw_tokens", lambda scores, uniforms: next(tokens))
    (batch,), count = trainer.get_batch_samples(iter([batch_of(trainer, range(3))]), 1, CPU)
    trained = [labels[labels != -100].tolist() for labels in batch["labels"]]
    assert trained == [[5, 6, eos], [eos], [4, 4, 4, 4]]
    assert count == 8


def _greedy(model, prompt, steps, eos):
    """Greedy continuation, one whole unpadded forward for each token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("sizes, multiple", [((5,), 16), ((1, 2, 2), None), ((1, 1, 1, 1, 1), None)], ids=str)
def test_temperature_0_is_greedy_and_left_padding_changes_nothing(
    make_trainer, make_student, tokenizer, sizes, multiple
):
    """Prompts of several lengths, in one batch or in several of a window: each gets what it would get alone."""
    student = make_student(initializer_range=0.2)
    rows = [{"prompt": prompt} for prompt in ("7+8=", "37+58=", "1+22=", "+", "99+99=4+4=")]
    settings = {"lmbda": 1.0, "temperature": 0.0, "pad_to_multiple_of": multiple, "max_new_tokens": 6}
    trainer = make_trainer(student, train=Dataset.from_list(rows), **settings)
    tokenized = iter(trainer.train_dataset)
    batches = [trainer.data_collator([next(tokenized) for _ in range(size)]) for size in sizes]
    assert len({batch["prompt_ids"].shape[1] for batch in batches}) > 1 or multiple
    rolled, _ = trainer.get_batch_samples(iter(batches), len(batches), CPU)
    student.eval()
    answers = set()
    for row, labels in zip(rows, [row for batch in rolled for row in batch["labels"]], strict=True):
        expected = _greedy(student, tokenizer(row["prompt"])["input_ids"], 6, tokenizer.eos_token_id)
        assert labels[labels != -100].tolist() == expected
        answers.add(tuple(expected))
    assert len(answers) > 1, "one answer to everything would prove nothing"


@pytest.mark.parametrize("engine", ["decode", "hf"])
def test_samples_follow_the_students_distribution(make_trainer, make_student, tokenizer, engine):
    """First sampled tokens of many equal prompts against softmax(logits / temperature); no filter sneaks in."""
    student = make_student(initializer_range=0.3)
    prompts = Dataset.from_list([{"prompt": "7+8="}] * 2000)
    # a generation config that filters, as many checkpoints ship one
    student.generation_config.top_k, student.generation_config.temperature = 2, 0.1
    student.generation_config.do_sample = True
    student.generation_config.repetition_penalty, student.generation_config.min_p = 50.0, 0.3
    settings = {"lmbda": 1.0, "temperature": 1.5, "max_new_tokens": 1, "rollout_engine": engine}
    trainer = make_trainer(student, train=prompts, **settings)
    batch = trainer.data_collator([trainer.train_dataset[0]] * 2000)
    (rolled,), _ = trainer.get_batch_samples(iter([batch]), 1, CPU)
    first = rolled["labels"][:, 4]
    found = torch.bincount(first, minlength=14) / 2000
    logits = student.eval()(input_ids=batch["prompt_ids"][:1]).logits[0, -1]
    assert torch.allclose(found, F.softmax(logits / 1.5, dim=-1), atol=0.06)  # 5 standard errors


@pytest.mark.parametrize("replay", [0, 4])
def test_rollouts_are_padded_to_the_multiple_as_well(make_trainer, replay):
    trainer = make_trainer(lmbda=1.0, pad_to_multiple_of=16, replay_buffer_size=replay, max_steps=4)
    widths, inner = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        widths.append(inputs["input_ids"].shape[1])
        return inner(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert widths == [16] * 4


def test_training_on_prompts_alone(make_trainer, by_step):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in addition_rows(12)])
    trainer = make_trainer(train=prompts, lmbda=1.0, max_steps=3)
    trainer.train()
    assert all(loss > 0 for loss in by_step(trainer).values())
    with pytest.raises(DatasetError, match="lmbda=1"):
        make_trainer(train=prompts, lmbda=0.5)


def test_off_policy_training_never_generates(make_trainer, monkeypatch):
    trainer = make_trainer(lmbda=0.0)

    def refuse(*args, **kwargs):
        raise AssertionError("generated")

    monkeypatch.setattr("distill_trainers.rollouts.engines.decode_completions", refuse)
    trainer.model.generate = trainer.teacher.model.generate = refuse
    trainer.train()
    assert trainer.state.global_step == 3


# ---- The teacher's own completions ----------------------------------------------------------------------------------


def _spied_teacher(make_teacher):
    teacher, prompts = make_teacher(), []
    inner = teacher.generate

    def generate(*args, **kwargs):
        prompts.extend(
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        )
        return inner(*args, **kwargs)

    teacher.generate = generate
    return teacher, prompts


def test_seq_kd_trains_on_the_teachers_text(make_trainer, make_teacher, tokenizer):
    teacher, prompts = _spied_teacher(make_teacher)
    settings = {"seq_kd": True, "lmbda": 0.0, "temperature": 0.0, "rollout_engine": "hf"}
    trainer = make_trainer(teacher=teacher, num_train_epochs=2, **settings)
    trainer.train()
    assert len(prompts) == len(set(prompts)) == 24, "each prompt once, over all epochs"
    for row in trainer.train_dataset:
        prompt, completion = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        assert completion == _greedy(teacher, prompt, 4, tokenizer.eos_token_id)
        assert row["labels"] == [-100] * len(prompt) + completion


def test_seq_kd_reads_what_is_on_disk_also_after_a_killed_writer(
    make_trainer, make_teacher, make_student, by_step, tmp_path
):
    settings = {"seq_kd": True, "lmbda": 0.0, "completions_dir": str(tmp_path / "kept"), "rollout_engine": "hf"}
    settings["max_steps"] = 1
    teacher, prompts = _spied_teacher(make_teacher)
    first = make_trainer(teacher=teacher, **settings)
    first.train()
    (kept,) = Path(tmp_path / "kept").rglob("part-*.jsonl")
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 24
    kept.write_text("".join(lines[:-3]) + lines[-3][:20])  # killed while it wrote the third last
    for expected in (3, 0):
        teacher, prompts = _spied_teacher(make_teacher)
        again = make_trainer(teacher=teacher, **settings)
        again.train()
        assert len(prompts) == expected
        assert all(json.loads(line) for line in kept.read_text().splitlines() if line != lines[-3][:20])
    shuffled = addition_dataset(24).shuffle(seed=3)
    teacher, prompts = _spied_teacher(make_teacher)
    other = make_trainer(teacher=teacher, train=shuffled, **settings)
    other.train()
    assert prompts == [], "found by content, whatever the order"
    texts = [
        {tuple(row["input_ids"][: row["prompt_length"]]): row["input_ids"] for row in run.train_dataset}
        for run in (again, other)
    ]
    assert texts[0] == texts[1]


def test_seq_kd_of_another_teacher_or_setting_generates_anew(make_trainer, make_teacher, tmp_path):
    settings = {"seq_kd": True, "lmbda": 0.0, "completions_dir": str(tmp_path / "kept")}
    settings |= {"max_steps": 1, "rollout_engine": "hf"}
    for change in ({}, {"temperature": 0.5}, {"max_new_tokens": 3}):
        teacher, prompts = _spied_teacher(make_teacher)
        make_trainer(teacher=teacher, **{**settings, **change}).train()
        assert len(prompts) == 24, change
    teacher, prompts = _spied_teacher(lambda: make_teacher(seed=8))
    make_trainer(teacher=teacher, **settings).train()
    assert len(prompts) == 24


def test_seq_kd_refuses_streams(make_trainer):
    with pytest.raises(ConfigurationError, match="iterable"):
        make_trainer(train=addition_dataset(8).to_iterable_dataset(), seq_kd=True, lmbda=0.0)
