"""GKD: the loss and its settings, the λ draw, rollouts, the teacher's own completions."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from distill_trainers import GKDConfig
from distill_trainers.data.addition import addition_dataset, addition_rows, character_tokenizer
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.losses import DIVERGENCES
from distill_trainers.rollouts import draws_on_policy

CPU = torch.device("cpu")

# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_loss(make_trainer, make_teacher, batch_of, divergence):
    teacher = make_teacher()
    trainer = make_trainer(copy.deepcopy(teacher), teacher, lmbda=0.0, divergence=divergence)
    batch = batch_of(trainer)
    assert abs(trainer.compute_loss(trainer.model, batch).item()) < 1e-6
    # and another student has one
    other = make_trainer(teacher=teacher, lmbda=0.0, divergence=divergence)
    assert other.compute_loss(other.model, batch).item() > 1e-3


def _jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


REFERENCES = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(-1),
    "jsd": lambda p, q: _jsd(p, q, 0.3),
    "skew_forward_kl": lambda p, q: (p * (p / (0.2 * p + 0.8 * q)).log()).sum(-1),
    "skew_reverse_kl": lambda p, q: (q * (q / (0.8 * p + 0.2 * q)).log()).sum(-1),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
}
PARAMETERS = {"jsd": {"beta": 0.3}, "skew_forward_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}}


@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("divergence", REFERENCES)
def test_loss_at_a_temperature(make_trainer, batch_of, dense, divergence, tau, tau_squared):
    """Both models at τ; τ² only where asked for. The sampling temperature plays no part."""
    settings = {"kd_temperature": tau, "tau_squared": tau_squared, "temperature": 0.3, **PARAMETERS.get(divergence, {})}
    trainer = make_trainer(lmbda=0.0, divergence=divergence, **settings)
    found = dense(trainer.model, trainer.teacher.model, [trainer.train_dataset[i] for i in range(6)], temperature=tau)
    expected = REFERENCES[divergence](found.p.exp(), found.q.exp()).mean().item() * (tau**2 if tau_squared else 1)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(6)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_lm_loss_is_added_at_temperature_1(make_trainer, batch_of, dense, by_step):
    settings = {"lmbda": 0.0, "divergence": "forward_kl", "kd_temperature": 2.0, "lm_loss_weight": 0.25}
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=6, train=addition_dataset(6), **settings)
    rows = list(trainer.train_dataset)
    soft = dense(trainer.model, trainer.teacher.model, rows, temperature=2.0)
    hard = dense(trainer.model, trainer.teacher.model, rows)
    kl = (soft.p.exp() * (soft.p - soft.q)).sum(-1).mean().item()
    nll = -hard.q.gather(1, hard.labels[:, None]).mean().item()
    trainer.train()
    assert by_step(trainer)[1] == pytest.approx(kl + 0.25 * nll, rel=1e-5)
    assert by_step(trainer, "divergence")[1] == pytest.approx(kl, rel=1e-5)
    assert by_step(trainer, "lm_loss")[1] == pytest.approx(nll, rel=1e-5)


# ---- Accumulation and λ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_accumulation_changes_nothing(make_trainer, make_student, make_teacher, by_step, lmbda):
    """In float64, where AdamW does not blow rounding up; logs are float32."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            make_student().double(),
            make_teacher().double(),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            lmbda=lmbda,
        )
        trainer.train()
        names = ("loss", "grad_norm", "trained_tokens", "rollouts")
        runs.append(([by_step(trainer, name) for name in names], trainer.model.state_dict()))
    (one, weights), (four, other_weights) = runs
    for a, b in zip(one, four, strict=True):
        assert len(a) == (0 if lmbda == 0 and a is one[3] else 6)
        assert a == pytest.approx(b, rel=1e-5)
    if lmbda == 0.5:
        assert set(one[3].values()) == {0.0, 8.0}, "steps of both kinds belong to this test"
    for name, value in weights.items():
        assert torch.allclose(value, other_weights[name], rtol=1e-7, atol=1e-9), name


def test_lambda_is_a_probability_drawn_from_seed_and_step():
    draws = [draws_on_policy(0.3, 42, step) for step in range(4000)]
    assert sum(draws) / 4000 == pytest.approx(0.3, abs=0.03)
    assert draws == [draws_on_policy(0.3, 42, step) for step in range(4000)]
    assert draws != [draws_on_policy(0.3, 43, step) for step in range(4000)]
    assert not any(draws_on_policy(0.0, 42, step) for step in range(1000))
    assert all(draws_on_policy(1.0, 42, step) for step in range(1000))
    # a larger λ only adds steps: runs of different λ can be compared
    assert all(draws_on_policy(0.6, 42, step) for step in range(4000) if draws[step])


def test_processes_agree_on_the_draw_but_not_on_the_samples(make_trainer, batch_of, monkeypatch):
    """On-policy on one process and not on another is a deadlock under ZeRO-3."""
    trainer = make_trainer(lmbda=0.5)
    batch, seen = batch_of(trainer), {}
    for rank in (0, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        torch.manual_seed(rank)  # whatever a process did before
        for step in range(12):
            trainer.state.global_step = step
            rolled = trainer.rollout([batch])
            seen[rank, step] = None if rolled[0] is batch else rolled[0]["input_ids"].tolist()
    sampled = [step for step in range(12) if seen[0, step] is not None]
    assert 0 < len(sampled) < 12
    assert sampled == [step for step in range(12) if seen[1, step] is not None]
    assert all(seen[0, step] != seen[1, step] for step in sampled)
    assert len({str(seen[0, step]) for step in sampled}) == len(sampled), "every step draws anew"


def test_rollouts_leave_the_random_state_as_it_was(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0)
    state = torch.random.get_rng_state()
    trainer.rollout([batch_of(trainer)])
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- Rollouts -------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_after_rollouts(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0, max_new_tokens=7)
    batches = [batch_of(trainer, rows) for rows in (range(4), range(4, 8), range(8, 9))]
    before = sum((batch["labels"] != -100).sum() for batch in batches)
    rolled, count = trainer.get_batch_samples(iter(batches), 3, CPU)
    generated = trainer._sums["rollout_tokens"]
    assert count == generated == sum((batch["labels"] != -100).sum() for batch in rolled)
    assert count != before


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


def test_rollout_batches_bound_one_call(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0, rollout_batch_size=5)
    calls, inner = [], trainer.model.generate

    def generate(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        return inner(*args, **kwargs)

    trainer.model.generate = generate
    trainer.get_batch_samples(iter([batch_of(trainer, range(8)), batch_of(trainer, range(8, 12))]), 2, CPU)
    assert calls == [5, 5, 2]


def test_eos_of_a_rollout_is_kept_where_it_is_also_the_padding(make_trainer, batch_of):
    tok = character_tokenizer()
    tok.pad_token = tok.eos_token
    trainer = make_trainer(tok=tok, lmbda=1.0)
    eos = tok.eos_token_id
    answers = [[5, 6, eos, eos, eos], [eos] * 5, [4, 4, 4, 4, 4]]

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)

    trainer.model.generate = generate
    (batch,), count = trainer.get_batch_samples(iter([batch_of(trainer, range(3))]), 1, CPU)
    trained = [labels[labels != -100].tolist() for labels in batch["labels"]]
    assert trained == [[5, 6, eos], [eos], [4, 4, 4, 4, 4]]
    assert count == 9


def _greedy(model, prompt, steps, eos):
    """Greedy continuation, one whole unpadded forward for each token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def test_temperature_0_is_greedy_and_left_padding_changes_nothing(make_trainer, make_student, tokenizer):
    """Prompts of several lengths in one batch: each gets what it would get alone."""
    student = make_student(initializer_range=0.2)
    rows = [{"prompt": prompt} for prompt in ("7+8=", "37+58=", "1+22=", "+", "99+99=4+4=")]
    trainer = make_trainer(
        student, train=Dataset.from_list(rows), lmbda=1.0, temperature=0.0, pad_to_multiple_of=16, max_new_tokens=6
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["prompt_ids"].shape == (5, 16)
    (rolled,), _ = trainer.get_batch_samples(iter([batch]), 1, CPU)
    student.eval()
    answers = set()
    for row, labels in zip(rows, rolled["labels"], strict=True):
        expected = _greedy(student, tokenizer(row["prompt"])["input_ids"], 6, tokenizer.eos_token_id)
        assert labels[labels != -100].tolist() == expected
        answers.add(tuple(expected))
    assert len(answers) > 1, "one answer to everything would prove nothing"


def test_samples_follow_the_students_distribution(make_trainer, make_student, tokenizer):
    """First sampled tokens of many equal prompts against softmax(logits / temperature); no filter sneaks in."""
    student = make_student(initializer_range=0.3)
    prompts = Dataset.from_list([{"prompt": "7+8="}] * 2000)
    # a generation config that filters, as many checkpoints ship one
    student.generation_config.top_k, student.generation_config.temperature = 2, 0.1
    student.generation_config.do_sample = True
    trainer = make_trainer(student, train=prompts, lmbda=1.0, temperature=1.5, max_new_tokens=1)
    batch = trainer.data_collator([trainer.train_dataset[0]] * 2000)
    (rolled,), _ = trainer.get_batch_samples(iter([batch]), 1, CPU)
    first = rolled["labels"][:, 4]
    found = torch.bincount(first, minlength=14) / 2000
    logits = student.eval()(input_ids=batch["prompt_ids"][:1]).logits[0, -1]
    assert torch.allclose(found, F.softmax(logits / 1.5, dim=-1), atol=0.04)


def test_training_on_prompts_alone(make_trainer, by_step):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in addition_rows(12)])
    trainer = make_trainer(train=prompts, lmbda=1.0, max_steps=3)
    trainer.train()
    assert all(loss > 0 for loss in by_step(trainer).values())
    with pytest.raises(DatasetError, match="lmbda=1"):
        make_trainer(train=prompts, lmbda=0.5)


def test_off_policy_training_never_generates(make_trainer):
    trainer = make_trainer(lmbda=0.0)

    def refuse(*args, **kwargs):
        raise AssertionError("generated")

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
    trainer = make_trainer(teacher=teacher, seq_kd=True, lmbda=0.0, temperature=0.0, num_train_epochs=2)
    trainer.train()
    assert len(prompts) == len(set(prompts)) == 24, "each prompt once, over all epochs"
    for row in trainer.train_dataset:
        prompt, completion = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        assert completion == _greedy(teacher, prompt, 4, tokenizer.eos_token_id)
        assert row["loss_mask"] == [0] * len(prompt) + [1] * len(completion)


def test_seq_kd_reads_what_is_on_disk_also_after_a_killed_writer(
    make_trainer, make_teacher, make_student, by_step, tmp_path
):
    settings = {"seq_kd": True, "lmbda": 0.0, "completions_dir": str(tmp_path / "kept")}
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
    settings = {"seq_kd": True, "lmbda": 0.0, "completions_dir": str(tmp_path / "kept"), "max_steps": 1}
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


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"temperature": -0.5}, "temperature: -0.5"),
        ({"kd_temperature": 0.0}, "kd_temperature: 0.0"),
        ({"kd_temperature": -1.0}, "kd_temperature: -1.0"),
        ({"kd_temperature": math.nan}, "kd_temperature: nan"),
        ({"lmbda": 1.5}, "lmbda: 1.5"),
        ({"lmbda": -0.1}, "lmbda: -0.1"),
        ({"lmbda": math.nan}, "lmbda: nan"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_k": -1}, "top_k: -1"),
        ({"max_length": 1}, "max_length: 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_length": 32, "max_new_tokens": 32}, "max_new_tokens: 32"),
        ({"lm_loss_weight": -1.0}, "lm_loss_weight: -1.0"),
        ({"loss_chunk_mib": 0.0}, "loss_chunk_mib: 0.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1"),
        ({"remove_unused_columns": True}, "remove_unused_columns: True"),
        ({"use_liger_kernel": True}, "use_liger_kernel: True"),
        ({"seq_kd": True, "lmbda": 1.0}, "seq_kd: True"),
        ({"divergence": "kl"}, "'kl'"),
        ({"divergence": "jsd", "beta": 1.5}, "beta"),
        ({"divergence": "forward_kl", "beta": 0.5}, "beta"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, settings, named):
    with pytest.raises(ConfigurationError) as caught:
        GKDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert named in str(caught.value)
    assert any(word in str(caught.value) for word in ("expected", "Choose", "choose", "Expected"))


def test_a_window_as_long_as_the_limit_is_fine_without_rollouts(tmp_path):
    assert GKDConfig(output_dir=str(tmp_path), use_cpu=True, lmbda=0.0, max_length=32, max_new_tokens=128)


def test_off_policy_rows_keep_the_whole_limit(make_trainer):
    """Room for new tokens is kept only where new tokens come."""
    row = [{"prompt": "12+34=" * 3, "completion": "46"}]
    trainer = make_trainer(train=Dataset.from_list(row), lmbda=0.0, max_length=21, max_new_tokens=16)
    assert trainer.train_dataset[0]["prompt_length"] == 18
    trainer = make_trainer(train=Dataset.from_list(row), lmbda=0.5, max_length=21, max_new_tokens=16)
    assert trainer.train_dataset[0]["prompt_length"] == 5
