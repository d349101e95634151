"""Commands that are killed at any moment: the same command again ends as if nothing had been."""

import signal

import pytest

JOBS = (
    "off-policy",
    "on-policy",
    "minillm",
    "dpkd",
    "rationale",
    "seq_kd",
    "cache-teacher",
    "extract",
    "verify",
    "evaluate",
    "pairs",
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS = 10


def moment(chance, events, seconds, number):
    """A moment of the run: when it changes a file for the n-th time, or after so many seconds."""
    told = {"signal": int(chance.choice(SIGNALS))}
    if number % 4 == 3:
        return {"seconds": chance.uniform(0.1, 0.9) * seconds, **told}
    return {"event": chance.randint(1, events), **told}


def kill_and_go_on(lab, ledger, name, fault):
    """Disturb one run and start it again until it is done."""
    work = lab.new(name)
    first = lab.run(name, work, fault=fault)
    assert not first.late and "Traceback" not in first.text, f"{fault}: {first.text[-2000:]}"
    again = lab.again(name, work)
    assert again.code in lab.codes(name) and "Traceback" not in again.text, f"{fault}: {again.text[-2000:]}"
    same = lab.same(name, work)
    ledger(f"killed: {name}", "survived" if same else "silent")
    if not same:
        print(f"{name} {fault} (exit {first.code}): {lab.difference(name, work)}")
    lab.forget(work)


def test_a_taste_of_kills(quick_lab, ledger, chance):
    events = quick_lab.reference("verify")[1]
    for _ in range(2):
        kill_and_go_on(quick_lab, ledger, "verify", {"event": chance.randint(1, events), "signal": int(signal.SIGKILL)})


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_command_goes_on_as_if_nothing_had_been(lab, ledger, chance, share, name):
    _, events, seconds = lab.reference(name)
    for number in range(max(2, round(KILLS * share))):
        kill_and_go_on(lab, ledger, name, moment(chance, events, seconds, number))
