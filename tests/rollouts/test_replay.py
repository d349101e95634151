"""The replay buffer and the schedule that raises λ."""

from __future__ import annotations

import json

import pytest
import torch

from distill_trainers import GKDConfig
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rollouts import AdaptiveProbability, ReplayBuffer
from distill_trainers.rollouts.replay import sampled_rows, scored_rows, with_rows
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.lifecycle.checkpoints import read_method_state, write_method_state

DRAW = {"seed": 1, "step": 2, "rank": 0}


def _rows(*numbers):
    return [([n, n + 1], [n] * (n % 4 + 1)) for n in numbers]


# ---- The buffer -----------------------------------------------------------------------------------------------------


def test_first_in_first_out():
    buffer = ReplayBuffer(5)
    buffer.push(_rows(1, 2, 3))
    assert list(buffer.rows) == _rows(1, 2, 3) and len(buffer) == 3
    buffer.push(_rows(4, 5, 6, 7))
    assert list(buffer.rows) == _rows(3, 4, 5, 6, 7)


def test_draws_are_of_seed_step_and_rank_and_cover_the_buffer():
    buffer = ReplayBuffer(10)
    buffer.push(_rows(*range(10)))
    drawn = buffer.sample(6, **DRAW)
    assert drawn == buffer.sample(6, **DRAW)
    assert len({prompt[0] for prompt, _ in drawn}) == 6, "no row twice"
    for other in ({"seed": 2}, {"step": 3}, {"rank": 1}):
        assert buffer.sample(6, **{**DRAW, **other}) != drawn
    counts = torch.zeros(10)
    for step in range(2000):
        for prompt, _ in buffer.sample(3, seed=0, step=step, rank=0):
            counts[prompt[0]] += 1
    assert (counts / 2000 - 0.3).abs().max() < 0.06  # 5 standard errors
    assert len(buffer.sample(25, **DRAW)) == 25, "more than there are: with repetition"


def test_state_comes_back_through_a_checkpoint(tmp_path):
    buffer = ReplayBuffer(6)
    for rows in ([], _rows(1, 2, 3), _rows(4, 5, 6, 7)):
        buffer.push(rows)
        write_method_state(tmp_path, {"replay": buffer.state_dict(), "lmbda": {"value": 0.5}, "other": 3})
        state = read_method_state(tmp_path)
        again, smaller = ReplayBuffer(6), ReplayBuffer(2)
        again.push(_rows(9))
        again.load_state_dict(state["replay"])
        assert list(again.rows) == list(buffer.rows)
        assert again.sample(4, **DRAW) == buffer.sample(4, **DRAW) if rows else len(again) == 0
        smaller.load_state_dict(state["replay"])
        assert list(smaller.rows) == list(buffer.rows)[-2:]
        assert state["lmbda"] == {"value": 0.5} and state["other"] == 3
    assert "ids" not in json.dumps(json.loads((tmp_path / "distill_state.json").read_text())), "tensors lie beside"


def test_what_samplers_thought_goes_with_rows_through_checkpoints_and_batches(make_trainer, batch_of, tmp_path):
    trainer = make_trainer(lmbda=1.0, max_new_tokens=6)
    batches = [batch_of(trainer, range(5)), batch_of(trainer, range(5, 8))]
    rolled = trainer.sample_completions(batches)
    rows = scored_rows(rolled)
    assert all(len(row) == 3 and len(row[2]) == len(row[1]) and max(row[2]) < 0 for row in rows)
    rows[6] = rows[6][:2]  # of a run that did not know
    buffer, again = ReplayBuffer(7), ReplayBuffer(7)
    buffer.push(rows)
    write_method_state(tmp_path, {"replay": buffer.state_dict()})
    again.load_state_dict(read_method_state(tmp_path)["replay"])
    assert list(again.rows) == rows[1:], "to the bit"
    filled = with_rows(batches, rows, 0)
    assert scored_rows(filled) == rows
    for name in ("token_sampler_logps", "token_sampled"):
        assert torch.equal(filled[0][name], rolled[0][name]), name
    assert torch.equal(filled[0]["token_sampled"], (filled[0]["labels"] != -100).float())
    assert filled[1]["token_sampled"].sum(1).bool().tolist() == [True, False, True]
    assert not filled[1]["token_sampler_logps"][filled[1]["token_sampled"] == 0].any()


def test_rows_go_into_batches_and_come_out(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0, max_new_tokens=6)
    batches = [batch_of(trainer, range(5)), batch_of(trainer, range(5, 8))]
    rolled = trainer.sample_completions(batches)
    rows = sampled_rows(rolled)
    assert [prompt for prompt, _ in rows] == [
        row["input_ids"][: row["prompt_length"]] for row in trainer.train_dataset.select(range(8))
    ]
    texts = [row[row != -100].tolist() for batch in rolled for row in batch["labels"]]
    assert [completion for _, completion in rows] == texts
    backwards = with_rows(batches, rows[::-1], 0)
    assert sampled_rows(backwards) == rows[::-1]
    assert [len(batch["labels"]) for batch in backwards] == [5, 3]
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(with_rows(batches, rows, 0)[1][name], rolled[1][name])


# ---- λ --------------------------------------------------------------------------------------------------------------


def test_lambda_rises_when_the_loss_did_not_fall():
    adaptive = AdaptiveProbability(0.75)
    values = []
    for loss in (2.0, 1.5, 1.5, 1.4, 1.6, 1.5, 1.7, float("nan")):
        adaptive.evaluated(loss)
        values.append(adaptive.value)
    assert values == pytest.approx([0.75, 0.75, 0.85, 0.85, 0.95, 0.95, 1.0, 1.0])
    again = AdaptiveProbability(0.0)
    again.load_state_dict(json.loads(json.dumps({**adaptive.state_dict(), "last_loss": 1.7})))
    again.evaluated(1.6)
    assert again.value == 1.0 and again.last_loss == 1.6


def test_fresh_replayed_and_given_text_have_their_shares(make_trainer, batch_of, monkeypatch):
    """u < λ(1−t/T) samples, u < λ replays; the shares of fresh text fall over the run."""
    trainer = make_trainer(lmbda=0.6, replay_buffer_size=8)
    batches, total = [batch_of(trainer, range(4))], 3000
    trainer.state.max_steps = total
    pushed = []
    monkeypatch.setattr(trainer, "sample_completions", lambda batches: pushed.append(1) or batches)
    kinds = []
    for step in range(total):
        trainer.state.global_step = step
        before = len(pushed)
        rolled = trainer.rollout(batches)
        fresh = len(pushed) > before
        kinds.append("fresh" if fresh else "given" if rolled is batches else "replayed")
        assert trainer.on_policy_step == (kinds[-1] != "given")
    thirds = [kinds[i : i + total // 3] for i in range(0, total, total // 3)]
    for index, part in enumerate(thirds):
        assert part.count("given") / len(part) == pytest.approx(0.4, abs=0.08)  # 5 standard errors
        assert part.count("fresh") / len(part) == pytest.approx(0.6 * (5 - 2 * index) / 6, abs=0.08)
    assert len(trainer.replay) == 8


def test_processes_agree_on_what_a_step_does_but_not_on_its_rows(make_trainer, batch_of, monkeypatch):
    kinds, rows = {}, {}
    for rank in (0, 1):
        trainer = make_trainer(lmbda=0.7, replay_buffer_size=32)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        trainer.state.max_steps = 30
        trainer.replay.push(_rows(*range(1, 12)))
        monkeypatch.setattr(trainer, "sample_completions", lambda batches: list(batches))
        batches = [batch_of(trainer, range(4))]
        for step in range(30):
            trainer.state.global_step = step
            rolled = trainer.rollout(batches)
            kinds[rank, step] = rolled is batches, rolled[0] is batches[0]
            if not kinds[rank, step][1]:
                rows[rank, step] = rolled[0]["input_ids"].tolist()
    assert all(kinds[0, step] == kinds[1, step] for step in range(30))
    replayed = [step for rank, step in rows if rank == 0]
    assert 3 < len(replayed) < 25 and any(rows[0, step] != rows[1, step] for step in replayed)


# ---- In a trainer ---------------------------------------------------------------------------------------------------

RUN = {
    "seed": 58,
    "lmbda": 0.2,
    "replay_buffer_size": 16,
    "adaptive_rollouts": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 14,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "learning_rate": 0.0,  # no evaluation is better than the one before, and a loss is a fingerprint of its rows
}


def test_a_killed_run_resumes_exactly(make_trainer, make_student, by_step, die_at, tmp_path):
    """Buffer, λ and the loss it is compared with come back; the draws follow from seed and step."""
    data = {"eval_dataset": addition_dataset(8, seed=3)}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **data, **RUN)
    kinds, inner = [], whole.rollout

    def watch(batches):
        rolled = inner(batches)
        own_prompts = rolled[0]["prompt_ids"] is batches[0]["prompt_ids"]
        kinds.append("given" if rolled is batches else "fresh" if own_prompts else "replayed")
        return rolled

    whole.rollout = watch
    whole.train()
    assert set(kinds[:10]) == set(kinds[10:]) == {"given", "fresh", "replayed"}, "before and after the checkpoint"
    broken = {**RUN, **data, "output_dir": str(tmp_path / "broken")}
    with pytest.raises(die_at.error):
        make_trainer(callbacks=[die_at(12)], **broken).train()
    resumed = make_trainer(make_student(seed=99), **broken)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "broken" / "checkpoint-10" / "distill_state.safetensors").is_file()
    for name in ("loss", "grad_norm", "rollouts", "lmbda"):
        assert by_step(resumed, name) == by_step(whole, name)
    rises = [max(0, step // 2 - 1) for step in range(14)]  # the first of an evaluation every 2 steps only sets the mark
    assert list(by_step(whole, "lmbda").values()) == pytest.approx([0.2 + 0.1 * rise for rise in rises])
    assert list(resumed.replay.rows) == list(whole.replay.rows)


def test_accumulation_changes_no_row_of_a_replayed_run(make_trainer, make_student, make_teacher, by_step):
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            make_student().double(),
            make_teacher().double(),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=8,
            lmbda=1.0,
            replay_buffer_size=24,
        )
        trainer.train()
        runs.append(([by_step(trainer, name) for name in ("loss", "rollouts")], list(trainer.replay.rows)))
    (one, rows), (four, other_rows) = runs
    assert rows == other_rows and one[1] == four[1]
    assert set(one[1].values()) == {0.0, 8.0}, "fresh and replayed steps belong to this test"
    assert one[0] == pytest.approx(four[0], rel=1e-5)


def test_evaluations_outside_training_leave_lambda_alone(make_trainer):
    trainer = make_trainer(eval_dataset=addition_dataset(8, seed=3), **{**RUN, "lmbda": 0.0, "max_steps": 1})
    for _ in range(3):
        trainer.evaluate()
    assert trainer.lmbda.value == 0.0 and trainer.lmbda.last_loss is None


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"replay_buffer_size": -1}, "replay_buffer_size: -1"),
        ({"replay_buffer_size": 7, "per_device_train_batch_size": 8}, "at least the 8 rows"),
        ({"replay_buffer_size": 100, "lmbda": 0.0}, "lmbda above 0"),
        ({"adaptive_rollouts": True}, "eval_strategy"),
        ({"adaptive_rollouts": True, "eval_strategy": "steps", "eval_steps": 1, "lmbda": 1.0}, "lmbda below 1"),
        (
            {"adaptive_rollouts": True, "eval_strategy": "epoch", "lmbda": 0.0, "max_length": 8, "max_new_tokens": 8},
            "max_new_tokens: 8",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, named):
    with pytest.raises(ConfigurationError, match=named):
        GKDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_several_evaluation_sets_do_not_say_when_lambda_rises(make_trainer):
    two = {"a": addition_dataset(4, seed=3), "b": addition_dataset(4, seed=4)}
    with pytest.raises(ConfigurationError, match="2 eval datasets"):
        make_trainer(eval_dataset=two, **RUN)
