"""The state of a long run: the text that transformers writes, without a copy of all logs."""

import tracemalloc

import pytest
from transformers import TrainerState

from distill_trainers.trainers.lifecycle.thrift import RunState, give_back_free_memory


@pytest.fixture
def state():
    state = TrainerState(global_step=7, max_steps=9, best_metric=float("inf"), stateful_callbacks={"one": {"args": {}}})
    logs = ({f"term_{k}": step / (k + 1) for k in range(12)} | {"step": step} for step in range(2000))
    state.log_history = [*logs, {"eval_loss": float("nan"), "names": ["ä", None], "step": 9}]
    return state


def _written(state, folder):
    state.save_to_json(str(folder / "state.json"))
    return (folder / "state.json").read_text(encoding="utf-8")


def test_it_writes_what_transformers_writes(state, tmp_path):
    assert _written(RunState.of(state), tmp_path) == _written(state, tmp_path)
    assert vars(RunState.load_from_json(str(tmp_path / "state.json"))).keys() == vars(state).keys()


def test_writing_takes_little_beside_the_logs(state, tmp_path):
    peaks = []
    for one in (state, RunState.of(state)):
        size = len(_written(one, tmp_path))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        one.save_to_json(str(tmp_path / "state.json"))
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
    assert peaks[0] > size > 10 * peaks[1]


def test_free_memory_can_be_given_back_again_and_again():
    give_back_free_memory()
    give_back_free_memory()


def test_a_run_has_that_state(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert isinstance(trainer.state, RunState)
