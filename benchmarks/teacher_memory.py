"""What a teacher takes of each process's memory by placement: while it is loaded, afterwards, and over a forward.

    python benchmarks/teacher_memory.py                          # two CPU processes, a Llama of 318 MiB in float32
    python benchmarks/teacher_memory.py --placements zero3 fsdp2 --quick
    python benchmarks/teacher_memory.py --large                  # 1108 MiB

Each placement is a run of its own. On a CPU the figures are of /proc: private memory (RssAnon), and beside it what is
mapped from the checkpoint's files, which the system may drop and all processes of a machine share. Tensors get mappings
of their own (MALLOC_MMAP_THRESHOLD_), so that what is freed leaves the process at once, as it does on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measuring import machine, write_results

ROOT = Path(__file__).parents[1]
PLACEMENTS = ("replicate", "zero3", "zero3_offload", "fsdp2")
SIZE = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10}
SIZE |= {"num_attention_heads": 12, "num_key_value_heads": 12}
LARGE = {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 16}
QUICK = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
QUICK |= {"num_key_value_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--placements", nargs="+", default=[*PLACEMENTS], choices=PLACEMENTS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a toy, for the tests")
    parser.add_argument("--large", action="store_true", help="a Llama of 1108 MiB")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    described, results = machine(1), {}
    with tempfile.TemporaryDirectory() as folder:
        size = make_teacher(folder, SIZE | (QUICK if options.quick else LARGE if options.large else {}))
        for placement in options.placements:
            results[placement] = launched(placement, folder, options.processes)
    described += f" A teacher of {size:.0f} MiB in {options.processes} processes; MiB, the larger of all processes."
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def make_teacher(folder: str, size: dict[str, int]) -> float:
    """Save a Llama of random weights in shards of about a fifth; returns its MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False, max_position_embeddings=256))
    mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    model.save_pretrained(folder, max_shard_size=f"{max(1, int(mib / 5))}MB")
    return mib


def launched(placement: str, folder: str, processes: int) -> dict[str, float]:
    """The largest figure of all processes, by name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    script = [str(Path(__file__)), "--worker", placement, folder]
    done = subprocess.run([*command, *script], capture_output=True, text=True, env=environment, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{placement} failed:\n{done.stderr[-3000:]}")
    found = [json.loads(file.read_text()) for file in Path(folder).glob(f"{placement}.*.out")]
    return {name: max(each[name] for each in found) for name in found[0]}


def table(results: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(results.values())))
    lines = [f"| placement | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| `{p}` | {' | '.join(f'{found[n]:.0f}' for n in names)} |" for p, found in results.items()]
    return "\n".join(lines)


# ---- One process ----------------------------------------------------------------------------------------------------


def held() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0]: int(line[1]) / 1024 for line in lines if line and line[0] in ("RssAnon:", "RssFile:")}


class Peak:
    """The most private memory within it above `start`, looked at every 2 ms."""

    def __init__(self, start: float):
        self.start, self.most, self.ended = start, 0.0, False

    def __enter__(self) -> Peak:
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.ended:
            self.most = max(self.most, held()["RssAnon:"] - self.start)
            time.sleep(0.002)

    def __exit__(self, *exc: Any) -> None:
        self.ended = True
        self.watch.join()


def worker(placement: str, folder: str) -> None:
    """Load the teacher, ask it three times, and write what that took."""
    import torch
    from accelerate import Accelerator
    from transformers.models.llama import modeling_llama  # noqa: F401  # what is imported is nobody's weights

    from distill_trainers import models
    from distill_trainers.teachers import LocalTeacher

    accelerator = Accelerator(cpu=True)
    if placement.startswith("zero3"):
        import deepspeed

        deepspeed.init_distributed()
    start = held()
    with Peak(start["RssAnon:"]) as loading:
        with models.loading_placed(folder, placement, accelerator.device, {}) as kwargs:
            model = models.load_causal_lm(folder, role="teacher", **kwargs)
        teacher = LocalTeacher(model, placement=placement)
        del model
        teacher.prepare(accelerator)
    ids = torch.arange(4, 20).repeat(2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    predicts = torch.ones(2, 15, dtype=torch.bool)

    def ask() -> None:
        with teacher.whole_head(teacher.signal(inputs, predicts, None)) as signal:
            signal.chunk(slice(0, 4)).logps()

    ask()
    after = held()
    with Peak(after["RssAnon:"]) as asking:
        ask()
        ask()
    found = {
        "private, peak while loading": loading.most,
        "private, afterwards": after["RssAnon:"] - start["RssAnon:"],
        "mapped files, afterwards": after["RssFile:"] - start["RssFile:"],
        "private, more at the peak of a forward": asking.most,
    }
    Path(folder, f"{placement}.{accelerator.process_index}.out").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
