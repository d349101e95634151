"""Completions that several processes write into one store."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from distill_trainers.rollouts import CompletionStore, SamplingSettings, complete_prompts
from distill_trainers.rollouts.store import prompt_key


class Echo:
    """An engine that takes no time."""

    def generate(self, model, ids, mask, sampling):
        return [[int(row[-1])] for row in ids]


class Late(CompletionStore):
    def load(self):
        time.sleep(0.3)
        return super().load()


@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_looks_late_leaves_nothing_out(tmp_path, late):
    """One that has written before the other has looked would leave it with a shorter list, and other batches."""
    prompts = {prompt_key([n]): [n] for n in range(16)}
    barrier, identity = threading.Barrier(2), {"model": "one"}
    stores = [(Late if rank == late else CompletionStore)(tmp_path, identity, rank) for rank in range(2)]

    def process(rank):
        complete_prompts(
            prompts,
            stores[rank],
            SamplingSettings(1, eos_token_ids=[0], pad_token_id=0),
            nullcontext(),
            seed=0,
            device=torch.device("cpu"),
            batch_size=2,
            world=2,
            rank=rank,
            engine=Echo(),
            progress=False,
            wait_for_everyone=barrier.wait,
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert CompletionStore(tmp_path, identity, 2).load() == {key: ids for key, ids in prompts.items()}
