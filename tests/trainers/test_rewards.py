"""GKD and MiniLLM with rewards: the loss against its formula; what a run does with functions, groups and failures."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset

from distill_trainers.exceptions import ConfigurationError, DatasetError, RewardError
from distill_trainers.toy import addition_rows
from distill_trainers.trainers.lifecycle.passes import Watch, pass_at
from distill_trainers.trainers.rewarded.scoring import ADVANTAGE
from distill_trainers.trainers.rewarded.trainer import RewardStart

JOINT = {"lmbda": 1.0, "reward_schedule": "joint", "num_generations": 2, "eval_pass_rows": 0}


def digits(completions, **kwargs):
    """A reward that every text has its own share of."""
    return [sum(map(int, filter(str.isdigit, text))) / 10 for text in completions]


def one_step(trainer, rows):
    """Sample and score one batch as a training step does: the batch, and its loss with a graph."""
    collated = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    trainer.model.train()
    (batch,), count = trainer.get_batch_samples(iter([collated]), 1, torch.device("cpu"))
    return batch, trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def test_loss_is_the_formula(make_trainer, make_student, dense, tokenizer):
    settings = {**JOINT, "reward_weight": 0.7, "anchor_weight": 0.3, "divergence": "reverse_kl", "temperature": 1.5}
    trainer = make_trainer(make_student().double(), "double", reward_funcs=digits, **settings)
    batch, loss = one_step(trainer, [0, 0, 1, 1])
    texts = []
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    for row in rows:
        texts.append(
            tokenizer.decode(
                [i for i, t in zip(row["input_ids"], row["labels"], strict=True) if t != -100], skip_special_tokens=True
            )
        )
    rewards = digits(texts)
    assert len(set(rewards)) > 2
    advantages = [rewards[i] - rewards[i ^ 1] for i in range(4)]  # the other one of each pair
    per_token = torch.tensor(
        [a for a, row in zip(advantages, rows, strict=True) for t in row["labels"] if t != -100], dtype=torch.float64
    )
    found = dense(trainer.model, trainer.teacher.model, rows)
    kl = (found.q.exp() * (found.q - found.p)).sum(-1)
    expected = (-0.7 * per_token + 0.3 * kl).mean()  # at ratio 1 the value of the policy's term is -A
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # The gradient, by autograd through the whole model.
    model, total = trainer.model, 0.0
    found_gradient = gradients(trainer, loss)
    model.zero_grad()
    for row, advantage in zip(rows, advantages, strict=True):
        ids = torch.tensor([row["input_ids"]])
        trained = torch.tensor([t for t in range(1, ids.shape[1]) if row["labels"][t] != -100])
        logits = model(input_ids=ids).logits[0, trained - 1]
        with torch.no_grad():
            p = trainer.teacher.model(input_ids=ids).logits[0, trained - 1].log_softmax(-1)
        q, drawn = logits.log_softmax(-1), (logits / 1.5).log_softmax(-1)
        chosen = drawn.gather(-1, ids[0, trained][:, None]).sum()
        total = total + 0.3 * (q.exp() * (q - p)).sum() - 0.7 * advantage * chosen
    (total / len(per_token)).backward()
    expected_gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(found_gradient, expected_gradient, rtol=1e-5, atol=1e-9)


def constant(completions, **kwargs):
    return [0.3] * len(completions)


def nothing(completions, **kwargs):
    return [None] * len(completions)


FUTURE = {"divergence": "reverse_kl", "future_kl": True, "reward_funcs": nothing, **JOINT}


@pytest.mark.parametrize(
    "plain",
    [{"lmbda": 1.0, "num_generations": 2}, {"method": "minillm", "num_generations": 2}, FUTURE],
    ids=["gkd", "minillm", "future_kl"],
)
def test_constant_rewards_are_plain_distillation_bit_for_bit(make_trainer, plain):
    """With `future_kl`, which stands beside rewards alone, as with rewards that do not apply."""
    runs = []
    rewarded = {**plain, **JOINT, "reward_funcs": constant, "anchor_weight": 1.0}
    for settings in (rewarded, {**plain, "anchor_weight": 1.0} if "reward_funcs" in plain else plain):
        trainer = make_trainer(**settings)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_gkd_with_the_future_is_minillm(make_trainer, make_student):
    """Both are the exact gradient of E[R] - beta KL of whole sequences, on the same samples."""
    shared = {**JOINT, "reward_funcs": digits, "reward_weight": 0.5, "anchor_weight": 0.4}
    found = []
    for method, own in (
        ("gkd", {"divergence": "reverse_kl", "future_kl": True}),
        ("minillm", {"teacher_mix_alpha": 0.0, "length_normalization": False, "clip_range": None}),
    ):
        trainer = make_trainer(make_student().double(), "double", method=method, **shared, **own)
        batch, loss = one_step(trainer, [0, 0, 1, 1])
        found.append((batch["input_ids"], gradients(trainer, loss)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-8)
    assert found[0][1].abs().max() > 1e-3


def test_rewards_come_after_the_divergence(make_trainer, by_step):
    trainer = make_trainer(
        reward_funcs="exact",
        reward_answer_column="completion",
        num_generations=2,
        max_steps=4,
        lmbda=0.1,
        eval_pass_rows=0,
    )
    trainer.train()
    assert by_step(trainer, "reward_mean").keys() == {3, 4}  # reward_start: 0.5
    assert by_step(trainer, "divergence").keys() == {1, 2, 3, 4}
    assert by_step(trainer, "rollouts")[3] == by_step(trainer, "rollouts")[4] == 4  # whatever λ says


def test_rewards_that_never_begin_are_told(make_trainer, caplog):
    settings = {**JOINT, "reward_schedule": "after", "reward_start": 2.0}
    make_trainer(reward_funcs=["json"], max_steps=2, **settings).train()
    assert "reward_start: 2` with 2 steps: the run ends before its rewards begin" in caplog.text


@pytest.mark.parametrize(
    ("timeout", "number", "told"), [(600.0, 2, False), (600.0, 3, True), (1800.0, 1, True), (None, 1, True)]
)
def test_functions_that_other_processes_do_not_wait_for_are_told_of(make_trainer, caplog, timeout, number, told):
    functions = [digits, constant, nothing][:number]
    args = make_trainer(reward_funcs=[*functions, "json"], reward_timeout=timeout, **JOINT).args
    for world_size in (1, 2):
        seen = mock.Mock(wraps=args, world_size=world_size, ddp_timeout=1800, reward_timeout=timeout)
        seen.reward_names = args.reward_names
        RewardStart().on_train_begin(seen, mock.Mock(max_steps=2), None)
        found = f"Got {number} reward functions" in caplog.text and "ddp_timeout: 1800" in caplog.text
        assert found == (told and world_size == 2)


def test_minillm_logs_the_entropy_of_what_it_samples(make_trainer, by_step):
    trainer = make_trainer(method="minillm", reward_funcs=digits, max_steps=2, **JOINT)
    trainer.train()
    entropies = by_step(trainer, "entropy")
    assert entropies.keys() == {1, 2} and all(
        0 < value < math.log(len(trainer.processing_class)) for value in entropies.values()
    )


def test_settings_serve_another_trainer(make_trainer, make_student):
    """Those of a notebook's cell that is run again."""
    trainer = make_trainer(reward_funcs=digits, **JOINT)
    args = type(trainer.args)(output_dir=trainer.args.output_dir, use_cpu=True, **JOINT)
    for _ in range(2):
        again = type(trainer)(
            make_student(), make_student(), args, addition_rows(8), None, trainer.processing_class, reward_funcs=digits
        )
        assert again.args.reward_names == ["digits"] and args.reward_funcs is None


def test_functions_see_what_trl_would_give_them(make_trainer):
    seen = {}

    def look(prompts, completions, completion_ids, hint, trainer_state, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, hint=hint, more=kwargs)
        return [None] * len(prompts)

    rows = [{**row, "hint": i} for i, row in enumerate(addition_rows(8))]
    trainer = make_trainer(train=Dataset.from_list(rows), reward_funcs=look, reward_weights=[2.0], **JOINT)
    batch, loss = one_step(trainer, [0, 0, 5, 5])
    assert seen["prompts"] == [rows[i]["prompt"] for i in (0, 0, 5, 5)] and seen["hint"] == [0, 0, 5, 5]
    decode = trainer.processing_class.decode
    assert seen["completions"] == [decode(ids, skip_special_tokens=True) for ids in seen["ids"]]
    assert not batch[ADVANTAGE].any() and loss.isfinite(), "where nothing applies, there is no reward"


def test_conversations_are_given_as_messages(make_trainer, make_tokenizer, make_student):
    from distill_trainers.toy import tiny_llama

    seen = {}

    def look(prompts, completions, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.0] * len(prompts)

    tok = make_tokenizer()
    prompt = [{"role": "user", "content": "1+1"}]
    rows = [{"prompt": prompt, "answer": "2"}] * 4
    trainer = make_trainer(
        tiny_llama(tok, 32, 1, seed=1, max_position_embeddings=96),
        tiny_llama(tok, 32, 1, seed=2, max_position_embeddings=96),
        train=Dataset.from_list(rows),
        tok=tok,
        reward_funcs=look,
        max_length=96,
        **JOINT,
    )
    one_step(trainer, [0, 0, 1, 1])
    assert seen["prompts"] == [prompt] * 4 and seen["answer"] == ["2"] * 4
    assert all(turns[0]["role"] == "assistant" and len(turns) == 1 for turns in seen["completions"])


def test_a_function_that_fails_loses_nothing(make_trainer, by_step, tmp_path):
    calls = []

    def breaks(completions, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("the judge is away")
        return digits(completions)

    settings = {**JOINT, "max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    with pytest.raises(RewardError, match="'breaks' raised ConnectionError: the judge is away.*kept in .*checkpoint-2"):
        make_trainer(reward_funcs=breaks, **settings).train()
    resumed = make_trainer(reward_funcs=breaks, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(reward_funcs=digits, output_dir=str(tmp_path / "whole"), **{**settings, "save_strategy": "no"})
    whole.train()
    assert by_step(resumed) == by_step(whole)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda texts: [math.nan] * len(texts), r"gave 'nan' \(float\) for completion 1"),
        (lambda texts: [1e39] * len(texts), r"gave '1e\+39'"),
        (lambda texts: [1.0], "1 values for 4 completions"),
        (lambda texts: threading.Event().wait(5), "has not answered after 0.2 s"),
    ],
    ids=["nan", "huge", "count", "hangs"],
)
def test_what_a_function_gives_back_loses_nothing(make_trainer, bad, said):
    calls = []

    def judge(completions, **kwargs):
        calls.append(1)
        return digits(completions) if len(calls) == 1 else bad(completions)

    trainer = make_trainer(reward_funcs=judge, reward_timeout=0.2, max_steps=3, **JOINT)
    with pytest.raises(RewardError, match=f"'judge'.*{said}.*kept in .*checkpoint-1"):
        trainer.train()
    assert [Path(path).name for path in trainer.run_checkpoints] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_funcs": ["exact"], **JOINT}, "reward_answer_column: answer.*completion.*Name yours"),
        ({"reward_funcs": ["exact"], **JOINT, "num_generations": 1}, "num_generations: 1.*2 or more"),
        ({"reward_funcs": ["json"], **JOINT, "num_generations": 3}, "num_generations: 3.*4 rows.*multiple"),
        ({"reward_funcs": ["json"], **JOINT, "lmbda": 0.0}, "lmbda.*sampl"),
        ({"reward_funcs": ["json"], **JOINT, "top_p": 0.9}, "top_p: 0.9.*never drawn"),
        ({"reward_funcs": ["json"], **JOINT, "temperature": 0.0}, "temperature.*greedy"),
        ({"reward_funcs": ["json"], **JOINT, "reward_weights": [1.0, 2.0]}, "reward_weights.*each of the 1"),
        ({"reward_funcs": ["json"], **JOINT, "reward_weights": [math.nan]}, r"reward_weights: \[nan\].*finite"),
        (
            {"reward_funcs": ["json"], **JOINT, "reward_weights": [1e9]},
            r"reward_weights: \[1000000000.0\].*1e\+06",
        ),
        ({"reward_funcs": ["json"], **JOINT, "reward_timeout": 1e10}, "reward_timeout: 10000000000.0.*1000000"),
        ({"reward_funcs": ["json"], **JOINT, "advantage": "mean"}, "advantage: mean.*leave_one_out"),
        ({"reward_funcs": ["json"], **JOINT, "future_kl": True}, "divergence: jsd.*reverse_kl"),
        ({"reward_funcs": ["json"], **JOINT, "replay_buffer_size": 8}, "replay_buffer_size.*none"),
        ({"reward_funcs": ["no_such"], **JOINT}, "no_such.*module:function"),
        ({"reward_funcs": lambda completions, hint: [0.0], **JOINT}, "takes 'hint'.*Add the column"),
        ({"reward_funcs": ["json"], **JOINT, "reward_start": 3.0}, "reward_start: 3.0.*reward_schedule: after"),
        ({"reward_funcs": ["json"], **JOINT, "token_weighting_clip": 0.1}, "token_weighting_clip.*rlsd"),
        ({"reward_funcs": ["json"], **JOINT, "eval_pass_samples": 8}, "eval_pass_samples: 8.*eval_pass_rows"),
        ({"reward_funcs": ["json"], **JOINT, "reward_guard": "stop"}, "reward_guard: stop.*eval_pass_rows"),
        ({"reward_weight": 2.0}, "reward_weight: 2.0.*`reward_funcs` beside it"),
        (
            {"method": "minillm", "objective": "token", "reward_funcs": ["json"], "num_generations": 2},
            "objective: token.*gkd",
        ),
        ({"method": "dpkd", "reward_funcs": digits}, "reward_funcs.*argument of GKDTrainer and MiniLLMTrainer"),
    ],
)
def test_refusals(make_trainer, settings, said):
    with pytest.raises((ConfigurationError, TypeError), match=said):
        make_trainer(**settings)


def test_streams_have_no_groups(make_trainer):
    stream = Dataset.from_list(addition_rows(8)).to_iterable_dataset()
    with pytest.raises(DatasetError, match="stream with `num_generations: 2`"):
        make_trainer(train=stream, max_steps=2, **{**JOINT, "reward_funcs": ["json"]})


# ---- Held-out prompts -----------------------------------------------------------------------------------------------


def test_pass_at_k_counts_draws_without_putting_back():
    assert [pass_at(right, 4, 1) for right in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert pass_at(1, 4, 2) == pytest.approx(0.5) and pass_at(2, 4, 2) == pytest.approx(5 / 6)
    assert pass_at(0, 4, 4) == 0 and pass_at(1, 4, 4) == 1


def test_passes_are_counted_on_held_out_prompts(make_trainer, rows_for, tmp_path):
    trainer = make_trainer(
        eval_dataset=rows_for("gkd")(8, seed=9), **{**JOINT, "reward_funcs": ["format:^[0-9]"], "eval_pass_rows": 6}
    )
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_pass@1"] < 1 and metrics["eval_pass@1"] <= metrics["eval_pass@4"]
    assert trainer.evaluate()["eval_pass@1"] == metrics["eval_pass@1"], "from the same random numbers"
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 6


def test_the_watch_sees_rewards_rise_while_passes_fall():
    watch, found = Watch(), []
    for reward, passed in ((0.2, 0.5), (0.4, 0.6), (0.5, 0.55), (0.3, 0.2), (0.9, 0.3)):
        watch.total, watch.count = reward, 1
        found.append(watch.is_hacked(passed, 0.04))
    assert found == [False, False, False, False, True]


def test_the_watch_goes_by_the_last_rewards_that_were_logged():
    watch = Watch()
    assert not watch.is_hacked(0.5, 0.04) and watch.best is None, "rewards have not begun"
    watch.total, watch.count = 0.4, 2
    assert not watch.is_hacked(0.5, 0.04)
    assert not watch.is_hacked(0.8, 0.04)
    assert (watch.best, watch.reward) == (0.8, 0.2), "a best between two logs is one"
    watch.total, watch.count = 0.9, 1
    assert watch.is_hacked(0.6, 0.04) and watch.is_hacked(0.6, 0.04)


def test_rows_that_passes_cannot_read_end_the_run_as_in_training(make_trainer, rows_for, monkeypatch):
    trainer = make_trainer(eval_dataset=rows_for("gkd")(4), reward_funcs=["json"], **{**JOINT, "eval_pass_rows": 2})
    monkeypatch.setattr(trainer.rewards, "valued_by", mock.Mock(side_effect=DatasetError("no such row")))
    with pytest.raises(RewardError, match="held-out prompts were scored: no such row"):
        trainer.evaluate()


def test_a_hacked_reward_is_told_and_stops(make_trainer, rows_for, caplog):
    """A sign at the start is rewarded, a digit passes."""

    def sign(completions, **kwargs):
        return [float(text.startswith("+")) for text in completions]

    hacked = {"reward_funcs": sign, "eval_pass_func": "format:^[0-9]", "reward_guard": "stop", "anchor_weight": 0.0}
    trainer = make_trainer(
        eval_dataset=rows_for("gkd")(16, seed=9),
        max_steps=12,
        learning_rate=3e-2,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        eval_steps=3,
        **{**JOINT, **hacked, "eval_pass_rows": 16, "max_new_tokens": 2},
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [r.message for r in caplog.records if "Rewards rise while held-out pass@1 falls" in r.message]
    assert len(told) == 1
    assert trainer.state.global_step < 12
