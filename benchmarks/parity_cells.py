"""One process of a launch of `parity.py`: trains each method with each teacher for two steps and writes what came out.

accelerate launch --config_file accelerate_configs/cpu_zero3.yaml benchmarks/parity_cells.py '{"folder": …}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from parity import CACHES, METHODS, TEACHERS

ROWS, STEPS = 8, 2


def main(job: dict[str, Any]) -> None:
    """All cells of the job; the file is written anew after each, so that a crash loses one."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for teacher in job["teachers"]:
        for method in job["methods"]:
            found.setdefault(teacher, {})[method] = cell(job, teacher, method)
            if int(os.environ.get("RANK", "0")) == 0:
                Path(job["out"]).write_text(json.dumps(found))
                print(teacher, method, found[teacher][method], flush=True)
    leave()


def leave() -> None:
    """End this process when all have done their work; gloo's threads now and then abort the interpreter's own exit."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def cell(job: dict[str, Any], teacher: str, method: str) -> dict[str, Any]:
    """Losses and gradient norms of the optimiser steps, or why there are none."""
    from distill_trainers.exceptions import ConfigurationError

    settings = dict(TEACHERS[teacher])
    try:
        if cache := settings.get("teacher_cache"):
            settings |= CACHES[cache]
            view = {"teacher_prompt": settings["teacher_prompt"]} if "teacher_prompt" in settings else {}
            settings["teacher_cache"] = str(fill(job, method, cache, view))
        if "several" in settings:
            settings["several"] = {name: member(job, method, settings, name) for name in settings["several"]}
        trainer = build(job, method, settings)
        losses, norms = recorded(trainer)
        trainer.train()
    except ConfigurationError as error:
        return {"refused": str(error)}
    trainer.teacher.close()
    return {"loss": losses, "grad_norm": norms}


def member(job: dict[str, Any], method: str, settings: dict[str, Any], name: str) -> Any:
    """One of two teachers, each where it is: `a` is the teacher, `b` the student's base."""
    model, place = {"a": "teacher", "b": "student"}[name], settings.get("away", {}).get(name)
    if place == "cached":
        return {"teacher_placement": place, "teacher_cache": str(fill(job, method, "hidden", {}, model))}
    if place == "remote":
        hidden = {"teacher_placement": place, "teacher_server_kind": "hidden"}
        return {"teacher_model_name_or_path": job["server"], **hidden}
    return str(Path(job["folder"]) / model)


def fill(job: dict[str, Any], method: str, cache: str, view: dict[str, Any], model: str = "teacher") -> Path:
    """The folder of a full cache, made by the processes of this launch with a whole teacher."""
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    name = "_".join((job["launch"], method, cache, model, *view)).replace(" ", "_")
    folder = Path(job["folder"]) / "caches" / name
    settings = {**CACHES[cache], **view, "teacher_cache": str(folder), "teacher_placement": "replicate"}
    trainer = build(job, method, settings, model)
    fill_cache(trainer)
    trainer.accelerator.wait_for_everyone()
    return folder


def build(job: dict[str, Any], method: str, settings: dict[str, Any], model: str = "") -> Any:
    """A trainer; `model` is the folder of its teacher, by default the larger one, or the base of an adapter."""
    from distill_trainers.toy import RATIONALE_PROMPTS
    from distill_trainers.trainers import METHODS as TRAINERS

    settings, folder = dict(settings), Path(job["folder"])
    lora, dora = settings.pop("lora", False), settings.pop("dora", False)
    several = settings.pop("several", None)
    for name in ("like", "away"):
        settings.pop(name, None)
    placement = settings.setdefault("teacher_placement", "auto")
    if placement == "device_map":  # the launch's processes must not share one device by accident
        here = int(os.environ.get("LOCAL_RANK", "0")) if job["gpu"] else "cpu"
        settings["teacher_model_init_kwargs"] = {"device_map": {"": here}}
    name, own = METHODS[method]
    config_class, trainer_class = TRAINERS[name]
    args = config_class(
        **{
            "output_dir": str(folder / "run"),
            "use_cpu": not job["gpu"],
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", "1")),
            "max_length": 32,
            "max_new_tokens": 4,
            "temperature": 0.0,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **(RATIONALE_PROMPTS if name == "rationale" else {}),
            **own,
            **settings,
        }
    )
    student: Any = str(folder / "student")
    if lora:
        student = adapted(folder, "dora" if dora else "lora")
    model = model or ("student" if lora and "extrapolate" not in settings else "teacher")
    teacher = str(folder / model)
    given: Any = {"adapter_off": None, "cached": None, "remote": job["server"]}.get(placement, teacher)
    if "self_teacher" in settings:
        given = None
    is_routed = several is not None and not args.composes_teachers
    return trainer_class(student, several or given, args, rows(name, is_routed), processing_class=tokenizer(folder))


def adapted(folder: Path, adapter: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    return PeftModel.from_pretrained(base, folder / adapter, is_trainable=True)


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "student")


def rows(method: str, is_routed: bool) -> Any:
    """Rows of a method's layout; each has one of several teachers."""
    made = rows_of(method)
    return made.add_column("teacher", ["ab"[i % 3 == 0] for i in range(len(made))]) if is_routed else made


def rows_of(method: str) -> Any:
    from datasets import Dataset

    from distill_trainers.toy import addition_dataset, addition_rationales, addition_rows

    if method == "rationale":
        return addition_rationales(ROWS * STEPS)
    if method == "dpkd":
        answers = enumerate(addition_rows(ROWS * STEPS))
        pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "7" * (1 + i % 3)} for i, r in answers]
        return Dataset.from_list(pairs)
    return addition_dataset(ROWS * STEPS)


def recorded(trainer: Any) -> tuple[list[float], list[float]]:
    """Lists that the trainer is going to fill: what its steps come to, unrounded."""
    losses: list[float] = []
    norms: list[float] = []
    after_step, grad_norm = trainer.after_step, trainer._get_grad_norm

    def keep_loss(loss: float) -> None:
        losses.append(float(loss))
        after_step(loss)

    def keep_norm(*args: Any, **kwargs: Any) -> Any:
        norm = grad_norm(*args, **kwargs)
        norms.append(float(norm))
        return norm

    trainer.after_step, trainer._get_grad_norm = keep_loss, keep_norm
    return losses, norms


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
