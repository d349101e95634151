"""One process of a launch that trains adapters of several kinds, one after the other, and writes their first two steps.

Usage: accelerate launch --config_file … adapters.py '{"folder": …, "out": …, "cells": [...]}'
"""

import json
import os
import sys
from pathlib import Path

import torch

from distill_trainers import GKDConfig, GKDTrainer
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_dataset, character_tokenizer, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from parity_cells import leave, recorded  # noqa: E402

ROWS, STEPS = 8, 2
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def make_models(folder: Path) -> None:
    """A teacher, a student's base, another adapter on that base, and the two of them merged into one model."""
    from peft import get_peft_model

    tokenizer = character_tokenizer()
    for name, seed in (("teacher", 0), ("student", 1)):
        # Layers of 64 units and more: a block of bitsandbytes' 4 bits.
        model = tiny_llama(tokenizer, 64, 2, seed=seed, intermediate_size=128, initializer_range=0.1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    adapted = get_peft_model(model, peft_config("LoRA"))
    set_adapter(adapted, seed=5)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")


def peft_config(kind: str):
    import peft

    common = {"target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    kinds = {
        "LoRA": (peft.LoraConfig, {"r": 4}),
        "DoRA": (peft.LoraConfig, {"r": 4, "use_dora": True}),
        "IA3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}),
        "VeRA": (peft.VeraConfig, {"r": 4}),
        "LoHa": (peft.LoHaConfig, {"r": 4}),
        "LoKr": (peft.LoKrConfig, {"r": 4}),
    }
    config, settings = kinds[kind]
    return config(**common, **settings)


def set_adapter(model: torch.nn.Module, seed: int = 3) -> None:
    """The same trained-looking adapter in every launch, whatever random numbers its making drew."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            data = parameter.data
            drawn = "magnitude" not in name and not bool((data == data.flatten()[0]).all())
            noise = 0.1 * torch.randn(data.shape, generator=generator)
            data.copy_(noise if drawn else data + noise)


def cell(job: dict, name: str) -> dict[str, list[float]]:
    """Losses and gradient norms of two steps, unrounded."""
    folder = Path(job["folder"])
    kind, _, teacher = name.partition(", ")
    source = {"": "teacher", "a copy of its base": "student", "a merged copy": "merged"}.get(teacher)
    settings: dict = {"teacher_placement": "replicate" if source else "adapter_off"}
    if teacher == "another adapter":
        settings["teacher_adapter"] = str(folder / "adapter")
    quantised = None
    if kind == "QLoRA":
        from transformers import BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    args = GKDConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // int(os.environ.get("WORLD_SIZE", "1")),
        lmbda=0.0,
        divergence="forward_kl",
        max_length=32,
        max_new_tokens=4,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = GKDTrainer(
        str(folder / "student"),
        None if source is None else str(folder / source),
        args,
        addition_dataset(ROWS * STEPS),
        processing_class=character_tokenizer(),
        peft_config=peft_config(kind.removeprefix("Q")),
        quantization_config=quantised,
    )
    set_adapter(trainer.model)
    losses, norms = recorded(trainer)
    trainer.train()
    return {"loss": losses, "grad_norm": norms}


def main(job: dict) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in job["cells"]:
        try:
            found[name] = cell(job, name)
        except ConfigurationError as error:
            found[name] = {"refused": str(error)}
        if int(os.environ.get("RANK", "0")) == 0:
            print(name, found[name], flush=True)
            Path(job["out"]).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
