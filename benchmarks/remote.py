"""Tokens per second through a teacher's server on loopback, beside the same teacher in this process.

    python benchmarks/remote.py --model FOLDER

Contenders take turns. Each is asked about all tokens of the same micro-batches: one after the other, or all of them
ahead and then one after the other, as a trainer does with an accumulation window. CPU seconds are those of both
processes. `--quick` makes a tiny teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

KINDS = ("hidden", "topk", "token_logprobs")


def micro_batches(vocabulary: int, options: Any) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.tokens)
    ids = [torch.randint(vocabulary, shape, generator=generator) for _ in range(options.batches)]
    predicts = torch.ones(options.rows, options.tokens - 1, dtype=torch.bool)
    return [({"input_ids": each, "attention_mask": torch.ones_like(each)}, predicts) for each in ids]


@contextmanager
def server(model: str, threads: int):
    """The address and process id of `serve-teacher` in a process of its own."""
    command = [sys.executable, "-m", "distill_trainers.cli", "serve-teacher", "--model", model, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving"), line
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Of a process and its threads so far; Linux alone tells."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(teacher: Any, batches: Any, ahead: bool) -> None:
    if ahead:
        with teacher.asking_ahead():
            for inputs, predicts in batches:
                teacher.signal(inputs, predicts, None)
    for inputs, predicts in batches:
        teacher.signal(inputs, predicts, None)


def measure(options: Any) -> dict[str, list[dict[str, float]]]:
    from distill_trainers.models import load_causal_lm
    from distill_trainers.teachers import LocalTeacher, RemoteTeacher
    from distill_trainers.teachers.remote import RemoteSettings

    torch.set_num_threads(options.threads)
    local = LocalTeacher(load_causal_lm(options.model, role="teacher"))
    batches = micro_batches(local.config.vocab_size, options)
    tokens = options.rows * options.tokens * options.batches
    with server(options.model, options.threads) as (address, pid):
        contenders: dict[str, tuple[Any, bool]] = {"local": (local, False)}
        for kind in KINDS:
            teacher = RemoteTeacher(address, RemoteSettings(kind))
            contenders |= {kind: (teacher, False), f"{kind}, ahead": (teacher, True)}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for turn in range(options.rounds + 1):
            print(f"round {turn} of {options.rounds}", file=sys.stderr, flush=True)
            names = list(contenders)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                before = time.process_time() + cpu_seconds(pid)
                start = time.monotonic()
                ask(contenders[name][0], batches, contenders[name][1])
                seconds = time.monotonic() - start
                used = time.process_time() + cpu_seconds(pid) - before
                if turn:  # the first round fetches the head and warms up
                    results[name].append({"tokens_per_second": tokens / seconds, "cpu_seconds": used})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="the teacher's folder")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batches", type=int, default=4, help="micro-batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--quick", action="store_true", help="a tiny teacher, to see that it runs")
    parser.add_argument("--json", default=None, help="file for all numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            from distill_trainers.toy import character_tokenizer, tiny_llama

            tokenizer = character_tokenizer()
            tiny_llama(tokenizer, 32, 2).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            options.model, options.tokens, options.batches, options.rounds = folder, 32, 2, 1
        if options.model is None:
            parser.error("expected --model FOLDER, or --quick")
        results = measure(options)
    if options.json:
        settings = {**vars(options), "model": Path(options.model).name, "json": None}
        Path(options.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    print("| teacher | tokens/s, median | lowest to highest | CPU s, median |\n|---|---|---|---|")
    for name, runs in results.items():
        speeds = sorted(run["tokens_per_second"] for run in runs)
        used = statistics.median(run["cpu_seconds"] for run in runs)
        print(f"| {name} | {statistics.median(speeds):,.0f} | {speeds[0]:,.0f} to {speeds[-1]:,.0f} | {used:.2f} |")


if __name__ == "__main__":
    main()
