"""Two real processes (gloo) share the questions of an extraction, before and after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rationales.local_model import LocalTextModel
from distill_trainers.rationales.stages import extract
from distill_trainers.rollouts import CompletionSettings, SamplingSettings
from distill_trainers.storage import RecordStore
from distill_trainers.toy import character_tokenizer, tiny_llama

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = """
import json, os, sys
import torch.distributed as dist
from accelerate import Accelerator
from distill_trainers.toy import character_tokenizer, tiny_llama
from distill_trainers.storage import RecordStore
from distill_trainers.rationales.stages import extract
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import CompletionSettings, SamplingSettings
from distill_trainers.rationales.local_model import LocalTextModel

accelerator, tokenizer = Accelerator(cpu=True), character_tokenizer()
rank = accelerator.process_index
stream = Stream(0, Role.TEACHER, Purpose.RATIONALE)
settings = CompletionSettings(SamplingSettings(6, 1.0, eos_token_ids=[1], pad_token_id=0), stream, 3)
model = tiny_llama(tokenizer, 32, 2, seed=7, initializer_range=0.25).eval()
teacher = LocalTextModel(model, tokenizer, settings, accelerator, name="t", style="text")
questions = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 60, 5)]
rows, asked = extract(questions, teacher, RecordStore(sys.argv[1] + "/store", rank))
report = {"rows": [row["key"] for row in rows], "done": asked.done, "known": asked.known}
report |= {"failed": asked.failed.total(), "processes": accelerator.num_processes}
with open(f"{sys.argv[1]}/{rank}.json", "w") as out:
    json.dump(report, out)
dist.barrier()
os._exit(0)
"""


def launch(folder):
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_ddp.yaml")]
    done = subprocess.run(
        [*command, str(worker), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def alone(folder):
    """Answer the same questions in this process, all in one batch."""
    stream, tokenizer = Stream(0, Role.TEACHER, Purpose.RATIONALE), character_tokenizer()
    settings = CompletionSettings(SamplingSettings(6, 1.0, eos_token_ids=[1], pad_token_id=0), stream, 50)
    model = tiny_llama(tokenizer, 32, 2, seed=7, initializer_range=0.25).eval()
    teacher = LocalTextModel(model, tokenizer, settings, Accelerator(cpu=True), name="t", style="text")
    questions = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 60, 5)]
    rows, _ = extract(questions, teacher, RecordStore(folder / "alone"))
    return {row["key"]: row["response"] for row in rows}


def test_processes_share_questions(tmp_path):
    reports = launch(tmp_path)
    assert all(report["processes"] == 2 and report["done"] > 0 for report in reports)
    assert sum(report["done"] + report["failed"] for report in reports) == 12
    lines = [line for part in (tmp_path / "store").glob("part-*") for line in part.read_text().splitlines()]
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == sum(report["done"] for report in reports)
    assert reports[0]["rows"] == reports[1]["rows"] and set(reports[0]["rows"]) == set(keys)
    part = tmp_path / "store" / "part-00001.jsonl"
    part.write_text("\n".join(part.read_text().splitlines()[:1]) + '\n{"key": "to')  # killed in the midst of a line
    texts = {key: row["response"] for key, row in RecordStore(tmp_path / "store").load().items()}
    again = launch(tmp_path)
    whole = {key: row["response"] for key, row in RecordStore(tmp_path / "store").load().items()}
    assert texts.items() <= whole.items() and whole == alone(tmp_path), "another world, other batches: the same texts"
    assert all(report["known"] == reports[0]["done"] + 1 for report in again)
    assert set(again[0]["rows"]) >= set(keys)
