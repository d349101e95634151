"""Trains tiny students on rollouts of vLLM, one job after the other, and writes what vLLM and they say afterwards.

Usage: worker.py '{"folder": …, "report": …, "jobs": [{"method": "gkd", "vllm": {…}, …}]}', also under a launcher.
Colocated jobs of one student share one engine, since an engine takes most of a minute to start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from distill_trainers import models
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import DecodeEngine, SamplingSettings, vllm
from distill_trainers.rollouts.sampling import logits_processors, pad_left
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers import METHODS

PROMPTS = [[3, 4, 12, 5, 6, 13], [5, 12, 7, 13], [9, 9, 12, 3, 13], [2, 12, 2, 13]]
SETTINGS = {
    "use_cpu": True,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_length": 32,
    "max_new_tokens": 8,
    "learning_rate": 3e-3,
    "rollout_engine": "vllm",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}


def train(job, folder, engines):
    """Train one student; return losses, and the greedy texts of vLLM and of the student."""
    method, lora = job.get("method", "gkd"), job.get("lora")
    given = {"lora": lora or "merged", **job["vllm"]}
    if given["mode"] == "colocate":
        given |= {"enforce_eager": True, "max_num_seqs": 16}
    settings = SETTINGS | ({"lmbda": 1.0} if method == "gkd" else {"teacher_mix_alpha": 0.0}) | job.get("args", {})
    config_class, trainer_class = METHODS[method]
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    key = (job["student"], lora == "adapter")
    make = vllm.Colocated
    if key in engines:
        vllm.Colocated = lambda *given: engines[key]
    trainer = trainer_class(
        model=str(folder / job["student"]),
        teacher_model=job.get("teacher") or str(folder / "teacher"),
        args=config_class(output_dir=str(folder / "runs" / job["name"]), vllm_kwargs=given, **settings),
        train_dataset=addition_dataset(48),
        peft_config=peft_config,
    )
    vllm.Colocated = make
    engine = trainer.engine
    if given["mode"] == "colocate":
        engines[key] = engine.engine
    if job.get("stale") is not None:  # from that sync on, vLLM keeps what it has
        load = engine.engine.load
        engine.engine.load = lambda weights: load(weights) if engine._syncs < job["stale"] else list(weights) and None
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except Exception as error:  # noqa: BLE001  # it is what some jobs are for
        return {"error": f"{type(error).__name__}: {error}", "steps": trainer.state.global_step}
    finally:
        engine.engine.__dict__.pop("load", None)
    greedy = SamplingSettings(12, temperature=0.0, eos_token_ids=[1])
    drawn = SamplingSettings(12, temperature=0.7, top_p=0.9, eos_token_ids=[1])
    prompts = pad_left(PROMPTS, 0)
    streams = [Stream(0, Role.STUDENT, Purpose.ROLLOUT).at(row=row) for row in range(len(PROMPTS))]
    theirs = engine.generate(trainer.model_wrapped, *prompts, greedy)
    samples = [engine.generate(trainer.model_wrapped, *prompts, drawn, streams) for _ in range(2)]
    with models.generating(trainer.model_wrapped, trainer.accelerator) as model:
        ours = DecodeEngine(trainer.processing_class).generate(model, *prompts, greedy)
        gaps = [
            float((torch.tensor(told) - logps_of(model, prompt, ids, drawn, samples[0].processed)).abs().max())
            for prompt, ids, told in zip(PROMPTS, samples[0], samples[0].logps, strict=True)
        ]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "ratios": [
            entry[f"sampler_ratio{part}"]
            for entry in trainer.state.log_history
            for part in ("", "_p05", "_p95")
            if "sampler_ratio" in entry
        ],
        "theirs": list(theirs),
        "ours": list(ours),
        "samples": [list(texts) for texts in samples],
        "processed": samples[0].processed,
        "gap": max(gaps),
    }


def logps_of(model, prompt, ids, sampling, processed):
    """Log-probabilities of the tokens, at temperature 1 or as they are drawn by transformers' own processors."""
    text = torch.tensor([[*prompt, *ids]])
    scores = model(text).logits[0, len(prompt) - 1 : -1]
    if processed:
        scores = logits_processors(sampling)(text[:, : len(prompt)].expand(len(scores), -1), scores)
    return scores.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def main(told):
    folder, engines, report = Path(told["folder"]), {}, {}
    rank = int(os.environ.get("RANK", 0))
    for job in told["jobs"]:
        began = time.monotonic()
        report[job["name"]] = train(job, folder, engines)
        report[job["name"]]["seconds"] = time.monotonic() - began
    Path(f"{told['report']}.{rank}").write_text(json.dumps(report))
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # engines and gloo's threads would take their time, and now and then abort


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
