"""One step of every method under every launch and placement of the teacher: are loss and gradient the same?

    python benchmarks/parity.py                         # two CPU processes with gloo; writes the tables to the screen
    python benchmarks/parity.py --gpu                   # the same on two GPUs (accelerate_configs without `cpu_`)
    python benchmarks/parity.py --launches single zero3 --teachers replicated zero3 --methods "GKD off-policy"
    python benchmarks/parity.py --json parity.json --markdown docs/parity.md     # keeps figures, puts tables on a page

Tiny float32 models, plain SGD, greedy rollouts, so that nothing depends on which process has a row. Each cell is the
largest relative difference, over two optimiser steps, of the loss and of the norm of the student's gradient to a single
process with a whole teacher: the second step has the first one's gradient in its weights. The exit status is 1 if a
launch fails, or a cell differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import machine

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("parity_cells.py")
EXACT = 1e-5  # 25 times the most that rounding gave
VOCABULARY = 14
# Name of a launch: its file in accelerate_configs, and what the tables call it.
LAUNCHES: dict[str, tuple[str | None, str]] = {
    "single": (None, "single"),
    "ddp": ("ddp.yaml", "DDP × 2"),
    "zero2": ("zero2.yaml", "ZeRO-2 × 2"),
    "zero3": ("zero3.yaml", "ZeRO-3 × 2"),
    "zero3_offload": ("zero3_offload.yaml", "ZeRO-3, offloaded × 2"),
    "fsdp2": ("fsdp2.yaml", "FSDP2 × 2"),
}
_TOPK = {"teacher_server_kind": "topk", "teacher_placement": "remote"}
_VIEW = {"teacher_prompt": "1+{prompt}", "like": "view, replicated"}
_TWO = {"several": "ab", "like": "two by row, replicated"}
_MIX = {"several": "ab", "teacher_mix": "geometric", "like": "two mixed, replicated"}
_BEYOND = {"extrapolate": {"reference": "initial", "scale": 1.25}, "like": "extrapolated, replicated"}
_FROM_COPY = {"several": "ab", "extrapolate": {"reference": "b", "scale": 1.25}}  # b: the student's base, named
# Name of a teacher: settings of the run. Each is compared with the teacher that it is `like`, in a single process; by
# default with a whole one of the same answers, and those with an adapter with a copy of the student's base.
TEACHERS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher_placement": "replicate"},
    "zero3": {"teacher_placement": "zero3"},
    "zero3_offload": {"teacher_placement": "zero3_offload"},
    "fsdp2": {"teacher_placement": "fsdp2"},
    "device_map": {"teacher_placement": "device_map"},
    "cached hidden": {"teacher_placement": "cached", "teacher_cache": "hidden"},
    "remote hidden": {"teacher_placement": "remote", "teacher_server_kind": "hidden"},
    "cached top-k + tail, k = V": {"teacher_placement": "cached", "teacher_cache": "top-k, all"},
    "remote top-k + tail, k = V": {**_TOPK, "teacher_server_top_k": VOCABULARY},
    "cached top-k + tail, k = V/2": {"teacher_placement": "cached", "teacher_cache": "top-k, half"},
    "remote top-k + tail, k = V/2": {**_TOPK, "teacher_server_top_k": VOCABULARY // 2},
    "LoRA, teacher a copy": {"teacher_placement": "replicate", "lora": True},
    "LoRA, adapter off": {"teacher_placement": "adapter_off", "lora": True},
    "DoRA, teacher a copy": {"teacher_placement": "replicate", "lora": True, "dora": True},
    "DoRA, adapter off": {"teacher_placement": "adapter_off", "lora": True, "dora": True},
    "view, replicated": {**_VIEW, "teacher_placement": "replicate"},
    "view, zero3": {**_VIEW, "teacher_placement": "zero3"},
    "view, fsdp2": {**_VIEW, "teacher_placement": "fsdp2"},
    "view, cached hidden": {**_VIEW, "teacher_placement": "cached", "teacher_cache": "hidden"},
    "view, remote hidden": {**_VIEW, "teacher_placement": "remote", "teacher_server_kind": "hidden"},
    "itself at first, view": {**_VIEW, "self_teacher": "initial", "like": "itself at first, view"},
    "itself at first, view, replicated": {
        **{**_VIEW, "self_teacher": "initial", "teacher_placement": "replicate"},
        "like": "itself at first, view",
    },
    "itself averaged, view": {
        **_VIEW,
        "self_teacher": "ema",
        "self_teacher_decay": 0.5,
        "like": "itself averaged, view",
    },
    "itself as it is, view": {**_VIEW, "self_teacher": "live", "like": "itself as it is, view"},
    "LoRA, a copy, view": {**_VIEW, "teacher_placement": "replicate", "lora": True, "like": "LoRA, a copy, view"},
    "LoRA, adapter off, view": {
        **{**_VIEW, "teacher_placement": "adapter_off", "lora": True},
        "like": "LoRA, a copy, view",
    },
    "LoRA, itself at first, view": {
        **{**_VIEW, "self_teacher": "initial", "lora": True},
        "like": "LoRA, itself at first, view",
    },
    "LoRA, itself averaged, view": {
        **{**_VIEW, "self_teacher": "ema", "self_teacher_decay": 0.5, "lora": True},
        "like": "LoRA, itself averaged, view",
    },
    "LoRA, itself as it is, view": {
        **{**_VIEW, "self_teacher": "live", "lora": True},
        "like": "LoRA, itself as it is, view",
    },
    "two by row, replicated": {**_TWO, "teacher_placement": "replicate"},
    "two by row, zero3": {**_TWO, "teacher_placement": "zero3"},
    "two by row, fsdp2": {**_TWO, "teacher_placement": "fsdp2"},
    "two by row, cached": {**_TWO, "away": {"a": "cached", "b": "cached"}},
    "two by row, one remote": {**_TWO, "teacher_placement": "replicate", "away": {"a": "remote"}},
    "two mixed, replicated": {**_MIX, "teacher_placement": "replicate"},
    "two mixed, zero3": {**_MIX, "teacher_placement": "zero3"},
    "two mixed, fsdp2": {**_MIX, "teacher_placement": "fsdp2"},
    "two mixed, cached": {**_MIX, "away": {"a": "cached", "b": "cached"}},
    "two mixed, one remote": {**_MIX, "teacher_placement": "replicate", "away": {"a": "remote"}},
    "extrapolated, replicated": {**_BEYOND, "teacher_placement": "replicate"},
    "extrapolated, zero3": {**_BEYOND, "teacher_placement": "zero3"},
    "extrapolated, fsdp2": {**_BEYOND, "teacher_placement": "fsdp2"},
    "extrapolated, cached": {**_BEYOND, "several": "a", "away": {"a": "cached"}},
    "extrapolated, remote": {**_BEYOND, "teacher_placement": "remote", "teacher_server_kind": "hidden"},
    "extrapolated from a copy": {**_FROM_COPY, "teacher_placement": "replicate", "like": "extrapolated, replicated"},
    "LoRA, extrapolated": {
        **{**_BEYOND, "teacher_placement": "replicate", "lora": True},
        "like": "LoRA, extrapolated",
    },
}
CACHES: dict[str, dict[str, Any]] = {
    "hidden": {"teacher_cache_kind": "hidden"},
    "top-k, all": {"teacher_cache_kind": "topk", "teacher_cache_top_k": VOCABULARY},
    "top-k, half": {
        "teacher_cache_kind": "topk",
        "teacher_cache_top_k": VOCABULARY // 2,
        "teacher_cache_dtype": "float32",
    },
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GKD off-policy": ("gkd", {"lmbda": 0.0, "divergence": "forward_kl"}),
    "GKD on-policy": ("gkd", {"lmbda": 1.0}),
    "MiniLLM": ("minillm", {"lmbda": 1.0, "teacher_mix_alpha": 0.0, "temperature": 1e-6, "learning_rate": 0.05}),
    "DPKD": ("dpkd", {}),
    "Rationale": ("rationale", {"distill_weight": 0.5, "max_length": 48, "max_new_tokens": 20}),
}
MARKS = ("<!-- tables of benchmarks/parity.py -->", "<!-- end of the tables -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", nargs="+", default=[*LAUNCHES], choices=LAUNCHES)
    parser.add_argument("--teachers", nargs="+", default=[*TEACHERS], choices=TEACHERS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--gpu", action="store_true", help="two GPUs instead of two CPU processes")
    parser.add_argument("--json", type=Path, help="write every figure here; a file that is there is added to")
    parser.add_argument("--markdown", type=Path, help="put the tables between the marks of this page")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one launch")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())["results"]
    described = machine(1, "cuda" if options.gpu else "cpu")
    ended = True
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for launch in options.launches:
            done, well = run(launch, Path(folder), options)
            ended &= well
            for teacher, methods in done.items():
                found.setdefault(launch, {}).setdefault(teacher, {}).update(methods)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps({"machine": described, "results": found}, indent=1) + "\n")
    text = f"{datetime.date.today()}. {described}\n\n{tables(found)}"
    print(text)
    if options.markdown:
        put(text, options.markdown)
    wrong = beyond(found)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong) or not ended)


def make_models(folder: Path) -> None:
    """A teacher and a student of random weights, and two adapters on the student that change what it says."""
    import torch
    from peft import LoraConfig, get_peft_model

    from distill_trainers.toy import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer()
    assert len(tokenizer) == VOCABULARY
    models = {
        "teacher": tiny_llama(tokenizer, 64, 2, seed=0, tie_word_embeddings=False),
        "student": tiny_llama(tokenizer, 32, 2, seed=1),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("lora", "dora"):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", use_dora=name == "dora", task_type="CAUSAL_LM")
        student = get_peft_model(tiny_llama(tokenizer, 32, 2, seed=1), config)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        student.save_pretrained(folder / name)


# ---- Processes ------------------------------------------------------------------------------------------------------


def run(launch: str, folder: Path, options: Any) -> tuple[dict[str, Any], bool]:
    """All cells of one launch, from one start of its processes, and whether it came to its end."""
    config, shown = LAUNCHES[launch]
    out, log = folder / f"{launch}.json", folder / f"{launch}.log"
    command = [sys.executable]
    if config:
        file = ROOT / "accelerate_configs" / (config if options.gpu else f"cpu_{config}")
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
        command += ["--mixed_precision", "no", "--main_process_port", str(29500 + os.getpid() % 400)]
    with served(folder, options) as address, log.open("w") as written:
        job = {"folder": str(folder), "out": str(out), "gpu": options.gpu, "server": address}
        job |= {"launch": launch, "teachers": options.teachers, "methods": options.methods}
        process = subprocess.Popen(
            [*command, str(WORKER), json.dumps(job)],
            env=environment(options),
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=options.timeout)
        except subprocess.TimeoutExpired:
            status = f"no end after {options.timeout} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the workers too, which outlive their launcher
    if status:
        print(f"{shown} failed ({status}); what it had done is kept:\n{log.read_text()[-9000:]}", file=sys.stderr)
    return json.loads(out.read_text()) if out.exists() else {}, not status


@contextlib.contextmanager
def served(folder: Path, options: Any) -> Iterator[str | None]:
    """The address of the teacher, served by a process of its own while within; None if no teacher is remote."""
    if not any(
        "remote" in (TEACHERS[t].get("teacher_placement"), *TEACHERS[t].get("away", {}).values())
        for t in options.teachers
    ):
        yield None
        return
    command = [sys.executable, "-m", "distill_trainers.cli", "serve-teacher", "--model", str(folder / "teacher")]
    command += ["--port", "0", "--device", "cuda:0" if options.gpu else "cpu"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment(options), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        if "Serving" not in said:
            raise SystemExit(f"The teacher's server did not start:\n{(folder / 'server.log').read_text()[-3000:]}")
        yield said.split()[-1]
    finally:
        server.kill()
        server.communicate()


def environment(options: Any) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not options.gpu:
        own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


# ---- The tables -----------------------------------------------------------------------------------------------------


def reference_of(teacher: str) -> str:
    """The teacher of the single process that a teacher is compared with."""
    settings = TEACHERS[teacher]
    if "like" in settings:
        return str(settings["like"])
    if settings.get("lora"):
        return "DoRA, teacher a copy" if settings.get("dora") else "LoRA, teacher a copy"
    return "remote top-k + tail, k = V/2" if teacher.endswith("k = V/2") else "replicated"


def differences(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference of the losses and of the gradient norms."""
    pairs = [zip(one[name], two[name], strict=True) for name in ("loss", "grad_norm")]
    loss, norm = (max(abs(a - b) / abs(a) for a, b in pair) for pair in pairs)
    return loss, norm


def compared(found: dict[str, Any], launch: str, teacher: str, method: str) -> tuple[float, float] | None:
    """Differences of a cell to its reference; None if either is not there."""
    mine = found.get(launch, {}).get(teacher, {}).get(method, {})
    expected = found.get("single", {}).get(reference_of(teacher), {}).get(method, {})
    return differences(expected, mine) if "loss" in mine and "loss" in expected else None


def beyond(found: dict[str, Any]) -> list[str]:
    """What differs from its reference by more than it may."""
    every = [(launch, t, m) for launch, teachers in found.items() for t, cells in teachers.items() for m in cells]
    return [
        f"{launch}, {teacher}, {method}: loss and norm differ by {off[0]:.0e} and {off[1]:.0e}"
        for launch, teacher, method in every
        if (off := compared(found, launch, teacher, method)) and not max(off) <= EXACT
    ]


def tables(found: dict[str, Any]) -> str:
    """Markdown: the references, the largest differences of all methods, and a table of every cell for each launch."""
    methods = [name for name in METHODS if any(name in cells for t in found.values() for cells in t.values())]
    launches = [name for name in LAUNCHES if name in found]
    teachers = [name for name in TEACHERS if any(name in found[launch] for launch in launches)]
    references = [name for name in teachers if name == reference_of(name)]
    parts = ["**References**: loss and gradient norm of the first step, in a single process."]
    parts += [rows_of("teacher", methods, {t: [value(found, t, m) for m in methods] for t in references})]
    parts += ["**All launches**: the largest difference of loss or gradient norm, over all methods that run."]
    widest = {teacher: [largest(found, launch, teacher, methods) for launch in launches] for teacher in teachers}
    parts += [rows_of("teacher", [LAUNCHES[name][1] for name in launches], widest)]
    for launch in launches:
        cells = {t: [show(found, launch, t, m) for m in methods] for t in teachers if t in found[launch]}
        parts += [f"**{LAUNCHES[launch][1]}**: difference of the loss, and of the gradient norm."]
        parts += [rows_of("teacher", methods, cells)]
    return "\n\n".join(parts)


def rows_of(corner: str, columns: list[str], cells: dict[str, list[str]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())])


def value(found: dict[str, Any], teacher: str, method: str) -> str:
    cell = found.get("single", {}).get(teacher, {}).get(method, {})
    return f"{cell['loss'][0]:.6f}, {cell['grad_norm'][0]:.6f}" if "loss" in cell else "—"


def largest(found: dict[str, Any], launch: str, teacher: str, methods: list[str]) -> str:
    if launch == "single" and teacher == reference_of(teacher):
        return "reference"
    every = [off for method in methods if (off := compared(found, launch, teacher, method))]
    return f"{max(map(max, every)):.0e}" if every else "—"


def show(found: dict[str, Any], launch: str, teacher: str, method: str) -> str:
    if "refused" in found[launch][teacher].get(method, {"refused": ""}):
        return "—"
    if launch == "single" and teacher == reference_of(teacher):
        return "reference"
    off = compared(found, launch, teacher, method)
    return "no reference" if off is None else "{:.0e}, {:.0e}".format(*off)


def put(text: str, page: Path) -> None:
    """Replace what is between the marks of a page."""
    start, end = map(re.escape, MARKS)
    written, count = re.subn(f"(?s){start}.*{end}", lambda _: f"{MARKS[0]}\n\n{text}\n\n{MARKS[1]}", page.read_text())
    if count != 1:
        raise SystemExit(f"{page} has no place for the tables: a line {MARKS[0]!r}, and {MARKS[1]!r} below it.")
    page.write_text(written)


if __name__ == "__main__":
    sys.exit(main())
