"""Clocks that jump, and files whose times lie."""

import os
import shutil
import signal

import pytest

DAY, YEAR = 86400, 365 * 86400


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on-policy", "cache-teacher", "extract", "evaluate"])
@pytest.mark.parametrize("seconds", [-DAY, YEAR])
def test_a_clock_that_jumps_changes_nothing(lab, ledger, chance, name, seconds):
    """Back by a day or on by a year, at any moment of a run that is killed later, and of what goes on from it."""
    _, events, _ = lab.reference(name)
    work = lab.new(name)
    jump = {"clock": [chance.randrange(60), seconds]}
    lab.run(name, work, fault={**jump, "event": chance.randint(events // 3, events), "signal": signal.SIGKILL})
    done = lab.again(name, work, fault={"clock": [chance.randrange(60), -seconds]})
    assert done.code in lab.codes(name) and "Traceback" not in done.text, done.text[-2000:]
    same = lab.same(name, work)
    ledger("clock that jumps", "survived" if same else "silent")
    assert same, lab.difference(name, work)
    lab.forget(work)


TIMES = {
    "equal": lambda step: 1e9,
    "backwards": lambda step: 1e9 - step,
    "in the future": lambda step: 4e9 + step,
    "of the beginning": lambda step: step,
}


@pytest.mark.slow
@pytest.mark.parametrize("times", TIMES)
def test_files_whose_times_lie_change_nothing(lab, ledger, times):
    """The newest checkpoint is chosen by the time of its state; whichever it is, the end is the same."""
    work = lab.new("on-policy")
    lab.run("on-policy", work, "--save_steps", "2", "--save_total_limit", "4", fault={"seconds": 3600, "signal": 9})
    shutil.rmtree(work / "out" / "checkpoint-8")
    for checkpoint in work.glob("out/checkpoint-*"):
        for file in [*checkpoint.iterdir(), checkpoint]:
            at = TIMES[times](int(checkpoint.name.split("-")[1]))
            os.utime(file, (at, at))
    done = lab.again("on-policy", work)
    assert done.code == 0, done.text[-2000:]
    same = lab.same("on-policy", work)
    ledger("times of files that lie", "survived" if same else "silent")
    assert same, lab.difference("on-policy", work)
    lab.forget(work)
