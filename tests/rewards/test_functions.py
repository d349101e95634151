"""Reward functions of users: how they are named and called, and what becomes of those that do not behave."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from distill_trainers.exceptions import ConfigurationError, RewardError
from distill_trainers.rewards import REWARDS, check_names, named, reward_functions, reward_values
from distill_trainers.rewards.calling import totals

TOLD = {"prompts": ["a", "b"], "completions": ["x", "yy"], "completion_ids": [[1], [2, 3]], "level": [4, 5]}


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch):
    monkeypatch.setattr("distill_trainers.rewards.functions.REWARDS", dict(REWARDS))


def values(function, seconds=5.0, told=TOLD, count=2):
    (found,) = reward_functions(named(function))
    return reward_values(found, told, count, seconds)


def test_functions_get_what_they_take():
    def by_level(completions, level):
        return [len(text) * number for text, number in zip(completions, level, strict=True)]

    def all_of_it(prompts, completions, **kwargs):
        assert kwargs.keys() == {"completion_ids", "level"}
        return [1.0] * len(prompts)

    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    class Judge:
        def __call__(self, completion_ids, optional=3):
            return np.array([len(ids) for ids in completion_ids])

    assert values(by_level) == [4, 10]
    assert values(all_of_it) == [1, 1]
    assert values(later) == values(later, seconds=None) == [1, 2]
    assert values(Judge()) == [1, 2]
    assert values(lambda completions: torch.tensor([0.5, 1.5])) == [0.5, 1.5]
    assert values(lambda completions: [None, np.float32(2)]) == [None, 2]
    assert values(lambda completions: [True, False]) == [1, 0]


def test_what_a_function_changes_the_next_one_does_not_see():
    def tidy(completions, level):
        for turns in completions:
            turns[0]["content"] = "tidied"
        level.clear()
        return [0.0, 0.0]

    told = {**TOLD, "level": [4, 5], "completions": [[{"content": "x"}], [{"content": "yy"}]]}
    assert values(tidy, told=told) == [0, 0]
    assert told["completions"][1][0]["content"] == "yy" and told["level"] == [4, 5]


def test_names_of_functions():
    def exact(completions):
        return [0.0, 0.0]

    names = named([exact, "exact", lambda completions: [], lambda completions: []])
    assert names == ["exact_2", "exact", "<lambda>", "<lambda>_2"]
    check_names(names, trusts_code=False)
    with_settings = ["length:5", "length:6"]
    assert [f.name for f in reward_functions([*names, *with_settings])] == [*names, "length", "length_2"]


def test_functions_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shout(completions, **kw):\n    return [float(c.isupper()) for c in completions]\n"
    )
    with pytest.raises(ConfigurationError, match="my_rewards:shout.*trust_remote_code: true"):
        check_names(["my_rewards:shout"], trusts_code=False)
    check_names(["my_rewards:shout"], trusts_code=True)
    with pytest.raises(ConfigurationError, match="cannot be imported.*ModuleNotFoundError.*PYTHONPATH"):
        reward_functions(["my_rewards:shout"])
    monkeypatch.syspath_prepend(tmp_path)
    (function,) = reward_functions(["my_rewards:shout"])
    assert reward_values(function, {"completions": ["A", "b"]}, 2, 5.0) == [1, 0]
    with pytest.raises(ConfigurationError, match="my_rewards:whisper.*AttributeError"):
        reward_functions(["my_rewards:whisper"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "at least one"),
        (["exact", "exact"], "more than once"),
        (["OpenAssistant/reward-model"], "Reward models are not loaded by name"),
        (["exactly"], "final_number"),
        (["length:0"], "number of tokens"),
    ],
)
def test_refused_names(names, said):
    with pytest.raises(ConfigurationError, match=said):
        check_names(names, trusts_code=True)


def test_a_reward_model_is_refused():
    with pytest.raises(ConfigurationError, match="Linear.*Wrap a reward model"):
        named([torch.nn.Linear(1, 1)])
    with pytest.raises(ConfigurationError, match="int among"):
        named(3)


def raises(completions, **kwargs):
    raise KeyError("no such thing")


async def cancelled(completions):
    raise asyncio.CancelledError("by its client")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, "'raises' raised KeyError: 'no such thing'"),
        (lambda completions: sys.exit(3), "'<lambda>' raised SystemExit: 3"),
        (cancelled, "'cancelled' raised CancelledError: by its client"),
        (lambda completions: [1.0, math.nan], "gave 'nan' \\(float\\) for completion 2"),
        (lambda completions: [math.inf, 1.0], "'inf'"),
        (
            lambda completions: [1.0, 1e39],
            "'1e\\+39' \\(float\\) for completion 2; expected.*1e\\+30",
        ),
        (lambda completions: ["good", 1.0], "'good' \\(str\\) for completion 1"),
        (lambda completions: None, "gave back nothing \\(None\\); expected a list of 2 numbers"),
        (lambda completions: 1.0, "a float"),
        (lambda completions: [1.0], "1 values for 2 completions"),
        (lambda completions: [[1.0], [2.0]], "'\\[1.0\\]'"),
        (lambda completions: [torch.ones(2), torch.ones(2)], "Tensor\\) for completion 1"),
        (lambda completions: [1.0, 10**400], "\\(int\\) for completion 2"),
        (lambda completions, difficulty: [1.0, 2.0], "'difficulty'.*completion_ids, completions, level, prompts"),
    ],
)
@pytest.mark.parametrize("seconds", [5.0, None])
def test_what_does_not_behave_is_named(function, said, seconds):
    with pytest.raises(RewardError, match=said):
        values(function, seconds)


def test_a_function_that_hangs_ends_at_its_time():
    release = threading.Event()
    with pytest.raises(RewardError, match="'<lambda>' has not answered after 0.1 s.*reward_timeout"):
        values(lambda completions: release.wait(60), seconds=0.1)
    release.set()


def test_a_function_that_hangs_does_not_keep_the_program():
    code = (
        "import time\nfrom distill_trainers.rewards import *\n"
        "(f,) = reward_functions(named(lambda completions: time.sleep(600)))\n"
        "try:\n    reward_values(f, {'completions': []}, 0, 0.05)\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "RewardError", done.stderr[-500:]


def test_a_function_stays_on_the_gpu_of_its_process(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append((device, threading.current_thread())))
    assert values(lambda completions: [1.0, 2.0], 5.0) == [1.0, 2.0]
    assert [device for device, _ in found] == [3] and found[0][1] is not threading.current_thread()


def test_one_that_wants_the_main_thread_is_told_how():
    import signal

    def alarmed(completions):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match="reward_timeout: null"):
        values(alarmed)
    assert values(alarmed, seconds=None) == [0, 0]


def test_one_that_is_async_in_a_notebook_is_told_how():
    async def later(completions):
        return [0.0, 0.0]

    async def cell():
        with pytest.raises(RewardError, match="'later' raised RuntimeError.*set `reward_timeout` to seconds"):
            values(later, seconds=None)
        assert values(later) == [0, 0]

    asyncio.run(cell())


def test_totals_leave_out_what_does_not_apply():
    assert totals([[1.0, None, None], [0.5, 2.0, None]], [1.0, 2.0]) == [2.0, 4.0, None]


def test_rows_that_json_cannot_hold_are_named():
    from datetime import date

    from distill_trainers.data.reward_rows import RewardRows, read_row
    from distill_trainers.exceptions import DatasetError

    rows = RewardRows((("answer", "reward_answer_column"),))
    with pytest.raises(ConfigurationError, match="reward_answer_column: answer.*\\['prompt'\\]"):
        rows.reading(["prompt"], None, "train")
    mapped = rows.reading(["prompt", "completion"], {"answer": "completion"}, "train")
    assert read_row(mapped.written({"prompt": "q", "completion": "a"}, "q")) == (
        "q",
        {"completion": "a", "answer": "a"},
    )
    for nothing in (None, math.nan, " "):
        with pytest.raises(DatasetError, match="no answer in the column 'answer'"):
            mapped.written({"prompt": "q", "completion": nothing}, "q")
    asked = RewardRows(taken=(("level", "by_level"), ("hint", "by_hint")))
    with pytest.raises(ConfigurationError, match="'by_hint' takes 'hint'.*'train'.*\\['difficulty'\\]"):
        asked.reading(["prompt", "difficulty"], {"level": "difficulty"}, "train")
    with pytest.raises(DatasetError, match="'when'.*not JSON serializable"):
        mapped.written({"completion": "a", "when": date(2020, 1, 1)}, None)
    assert json.loads(mapped.written({"completion": "é"}, None)) == {
        "prompt": None,
        "columns": {"completion": "é", "answer": "é"},
    }
