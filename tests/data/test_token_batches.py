"""Batches of at most so many tokens: every row once, none too long, as many for each process, the same ones again."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainers.data.packing import padding_share
from distill_trainers.data.token_batches import TokenBatches

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(LENGTHS, st.floats(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_every_row_is_in_one_batch_and_none_is_too_long(lengths, times, processes, accumulated, seed):
    budget = int(max(lengths) * times)
    plan = TokenBatches(lengths, budget, processes, accumulated)
    epochs = [plan.drawn(np.random.default_rng(seed + epoch)) for epoch in range(2)]
    for batches in epochs:
        assert len(batches) == len(plan), "transformers asks for the number once, and takes it for every epoch's"
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert all(0 < len(batch) * max(lengths[row] for row in batch) <= budget for batch in batches)
    assert TokenBatches(lengths, budget, processes, accumulated).drawn(np.random.default_rng(seed)) == epochs[0]
    if len(lengths) >= 2 * processes * accumulated:
        assert len(plan) % processes == 0
    if len(plan) % processes == 0:
        ranks = [list(BatchSamplerShard(_Batches(epochs[0]), processes, rank)) for rank in range(processes)]
        assert {len(batches) for batches in ranks} == {len(plan) // processes}
        shared = [batch for turn in zip(*ranks, strict=True) for batch in turn]
        assert shared == epochs[0], "none is read twice to make processes even"


class _Batches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def skewed(rows=600, seed=0):
    """As those of chats: many short rows, few long ones."""
    draw = np.random.default_rng(seed)
    return np.clip((draw.lognormal(0, 0.8, rows) * 64).astype(int), 8, 384).tolist()


def test_batches_have_little_padding_and_steps_are_alike():
    lengths = skewed()
    plan = TokenBatches(lengths, 1024, processes=2, accumulated=4)
    batches = plan.drawn(np.random.default_rng(0))
    assert padding_share(lengths, 8) > 0.5  # in the order of the rows
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert 1 - sum(lengths) / sum(padded) < 0.06 and len(batches) % 8 == 0
    real = np.array([sum(lengths[row] for row in batch) for batch in batches])
    assert real.reshape(-1, 8).sum(1).std() < 0.06 * real.reshape(-1, 8).sum(1).mean()
    for turn in range(0, len(batches), 2):  # processes that wait for each other have like lengths
        first, second = (max(lengths[row] for row in batches[turn + rank]) for rank in range(2))
        assert abs(first - second) <= 0.3 * max(first, second)


def test_epochs_and_seeds_have_batches_of_their_own():
    plan = TokenBatches(skewed(), 1024)
    drawn = [{tuple(sorted(batch)) for batch in plan.drawn(np.random.default_rng(seed))} for seed in range(2)]
    assert len(drawn[0] & drawn[1]) < len(plan) / 3, "most rows have other neighbours, and not only another turn"


def test_the_last_batches_are_no_smaller_than_the_others():
    """13 batches of 8 rows would be one step of 8 and one of 5: 16 batches of 6 or 7 are two equal ones."""
    plan = TokenBatches([10] * 100, 80, processes=2, accumulated=4)
    assert len(plan) == 16 and {len(batch) for batch in plan.drawn(np.random.default_rng(0))} == {6, 7}


def test_a_row_beyond_the_budget_is_not_cut():
    with pytest.raises(ValueError, match="Got 2 rows for batches of 9 tokens; expected some, none longer"):
        TokenBatches([4, 10], 9)
