"""Rollouts from a model that FSDP2 shards over two real processes (gloo), without accelerate between."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.distributed

WORKER = """
import copy, datetime, json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from distill_trainers import models
from distill_trainers.toy import character_tokenizer, tiny_llama
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import DecodeEngine, Mixture, SamplingSettings, decode_completions, decode_scored

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank = dist.get_rank()
whole = tiny_llama(character_tokenizer(), 32, 2, seed=1, initializer_range=0.25).eval()
other = tiny_llama(character_tokenizer(), 48, 2, seed=2, initializer_range=0.25).eval()
mesh = init_device_mesh("cpu", (2,))

def shard(model):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

sharded = shard(whole)
prompts = torch.tensor([[3, 4, 12, 5, 13], [7, 12, 7, 13, 2], [2, 2, 9, 9, 4]]) - rank
sampling = SamplingSettings(20, temperature=0.0, eos_token_ids=[1, 5, 9] if rank else list(range(14)))
engine, mask = DecodeEngine(), torch.ones_like(prompts)
report = {"in_step": models.must_stay_in_step(sharded), "whole_in_step": models.must_stay_in_step(whole)}
report["found"] = [engine.generate(sharded, prompts, mask, sampling) for _ in range(2)]
report["expected"] = decode_completions(whole, prompts, mask, sampling)
report["mixed"] = []
for student, teacher in ((sharded, shard(other)), (whole, other)):
    sampling = SamplingSettings(20, eos_token_ids=sampling.eos_token_ids)
    mixture = Mixture(teacher, 0.4, Stream(5, Role.RUN, Purpose.MIXTURE))
    rows = [Stream(5, Role.STUDENT, Purpose.ROLLOUT).at(batch=rank, row=row) for row in range(3)]
    found = decode_scored(student, prompts, mask, sampling, streams=rows, mixture=mixture)
    report["mixed"].append([[each.ids for each in found], [each.logps.tolist() for each in found]])
dist.barrier()  # nobody is left waiting in a forward
with open(f"{sys.argv[1]}/{rank}.json", "w") as out:
    json.dump(report, out)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_a_process_whose_rows_have_ended_keeps_step_with_the_others(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(worker), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for report in (first, second):
        assert report["in_step"] and not report["whole_in_step"]
        assert report["found"] == [report["expected"]] * 2
        (ids, logps), (whole_ids, whole_logps) = report["mixed"]  # in step with the other process, the loop itself
        assert ids == whole_ids
        for row, whole_row in zip(logps, whole_logps, strict=True):
            assert torch.allclose(torch.tensor(row), torch.tensor(whole_row), atol=1e-4)
    assert {len(text) for text in first["expected"]} == {1} and max(map(len, second["expected"])) > 3
