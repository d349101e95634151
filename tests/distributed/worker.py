"""One process of a distributed run: trains tiny students (by GKD unless told otherwise) and writes what is compared.

Usage: accelerate launch --config_file … worker.py '[{"output": …, "args": {…}}, …]'
"""

import json
import math
import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainerCallback

from distill_trainers.exceptions import CheckpointError, RewardError, TeacherServerError
from distill_trainers.servers.endpoints import Again
from distill_trainers.students import prune_layers
from distill_trainers.toy import (
    RATIONALE_PROMPTS,
    addition_dataset,
    addition_rationales,
    addition_rows,
    character_tokenizer,
    tiny_llama,
)
from distill_trainers.trainers import METHODS


class Dies(TrainerCallback):
    """Every process ends at the beginning of optimiser step `step` (from 0), as if it had been killed."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os._exit(0)


def die_saving(step):
    """The second process ends while it writes its part of the checkpoint of `step`."""
    write = Trainer._save_rng_state

    def half_write(self, output_dir):
        if self.args.process_index == 1 and self.state.global_step == step:
            os.makedirs(output_dir, exist_ok=True)
            (Path(output_dir) / "rng_state_1.pth").touch()
            os._exit(0)
        write(self, output_dir)

    Trainer._save_rng_state = half_write


class LosesTeacher(TrainerCallback):
    """From the step after `step` on, the second process gets no answer of its teacher's server; the others do."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            never = Future()
            never.set_exception(Again("lost"))
            self.trainer.teacher.servers.submit = lambda call: never


def failing_reward(how, rank):
    """A reward of text; from its third call on the second process fails, the other one does not."""
    calls = []

    def judge(completions, **kwargs):
        calls.append(1)
        values = [len(text) / 4 for text in completions]
        if rank != 1 or len(calls) < 3:
            return values
        if how == "raises":
            raise ConnectionError("the judge is away")
        if how == "hangs":
            threading.Event().wait()
        return {"nan": [math.nan] * len(values), "count": values[1:]}.get(how, values)

    return judge


class GradNorms(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs, step=state.global_step))


def mixture_of_experts(**asks):
    """A student whose config may ask for the loss that balances its experts."""
    torch.manual_seed(1)
    asks = {"num_local_experts": 4, **asks}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=14, num_hidden_layers=2, pad_token_id=0, eos_token_id=1, **sizes, **asks)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pairs(count):
    """Right answers over wrong ones of one to three digits."""
    rows = enumerate(addition_rows(count))
    return Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "7" * (1 + i % 3)} for i, r in rows]
    )


def main(jobs):
    for job in jobs:
        Path(job["output"]).mkdir(parents=True, exist_ok=True)
        try:
            train(job)
        except Exception as error:
            if len(jobs) == 1:
                raise
            told = {"error": f"{type(error).__name__}: {error}"}
            (Path(job["output"]) / "report.json").write_text(json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own exit, after all the work is done


def train(job):
    output = Path(job["output"])
    tokenizer = character_tokenizer()
    settings = {
        "use_cpu": True,
        "max_length": 32,
        "max_new_tokens": 4,
        "logging_steps": 1,
        "learning_rate": 2.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        **(RATIONALE_PROMPTS if job.get("method") == "rationale" else {}),
        **{n: v.replace("{output}", str(output)) if isinstance(v, str) else v for n, v in job["args"].items()},
    }
    config_class, trainer_class = METHODS[job.get("method", "gkd")]
    rows = addition_rationales if job.get("method") == "rationale" else addition_dataset
    args = config_class(output_dir=str(output / "run"), **settings)
    width = job.get("teacher_mlp", 128)
    teacher = tiny_llama(tokenizer, 64, 2, seed=0, tie_word_embeddings=False, intermediate_size=width)
    teacher = job.get("teacher", teacher)  # the address of a server that has the same one
    train_rows, eval_rows = pairs(48) if job.get("pairs") else rows(48), rows(13, seed=7)
    more = {}
    if job.get("digits"):  # it reads two digits as one token
        sys.path.insert(0, str(Path(__file__).parents[1]))  # before the conftest of this folder
        from conftest import digits_tokenizer

        more["teacher_processing_class"] = digits_tokenizer()
        teacher = tiny_llama(more["teacher_processing_class"], 64, 2, seed=0, tie_word_embeddings=False)
    if job.get("several"):  # many a micro-batch of a process has no row of the second
        other = tiny_llama(tokenizer, 48, 2, seed=5, tie_word_embeddings=False)
        teacher = {"math": teacher, "code": other}
        train_rows, eval_rows = (
            part.add_column("teacher", ["code" if i % 3 == 0 else "math" for i in range(len(part))])
            for part in (train_rows, eval_rows)
        )
    if (job.get("method") == "rationale" and not job.get("digits")) or settings.get("self_teacher"):
        teacher = None
    student = job.get("student") or tiny_llama(tokenizer, 32, 2, seed=1, attention_dropout=job.get("dropout", 0.0))
    if job.get("pruned"):  # the teacher's second layer alone
        student = prune_layers(teacher, [1])
    if job.get("experts"):
        student = mixture_of_experts(**job["experts"])
    peft_config = None
    if job.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if job.get("text"):
        more["pretraining_dataset"] = Dataset.from_list([{"text": f"{n}+1={n + 1}"} for n in range(10, 21)])
    if job.get("reward_fails"):
        more["reward_funcs"] = failing_reward(job["reward_fails"], args.process_index)
    recorder = GradNorms()
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,  # does not divide by the batch: duplicates must not count
        processing_class=tokenizer,
        callbacks=[recorder],
        peft_config=peft_config,
        **more,
    )
    if job.get("dies"):
        trainer.add_callback(Dies(job["dies"]))
    if job.get("dies_saving"):
        die_saving(job["dies_saving"])
    if job.get("loses_teacher"):
        losing = LosesTeacher(job["loses_teacher"])
        losing.trainer = trainer
        trainer.add_callback(losing)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except RewardError as error:
        told = {"error": str(error), "seconds": time.monotonic() - started}
        (output / f"ended-{args.process_index}.json").write_text(json.dumps(told))
        return
    except CheckpointError as error:  # a process died while it wrote its part
        print(error, flush=True)
        os._exit(0 if job.get("dies_saving") else 1)
    except TeacherServerError as error:
        print(error, flush=True)
        os._exit(0 if job.get("loses_teacher") else 1)
    scores = trainer.evaluate()
    trainer.save_model(str(output / "student"))
    if args.merge_adapter:
        trainer.save_model()
    if trainer.is_world_process_zero():
        body = getattr(trainer.teacher, "model", teacher)
        weights = () if body is None or isinstance(body, str | dict) else body.named_parameters()
        kept_whole = sum(p.numel() for n, p in weights if "mlp" in n)
        report = {"logs": recorder.logs, "eval": scores, "teacher_mlp_kept_whole": kept_whole}
        report["student_is_sharded"] = any(hasattr(p, "full_tensor") for p in trainer.model.parameters())
        (output / "report.json").write_text(json.dumps(report, default=float))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
