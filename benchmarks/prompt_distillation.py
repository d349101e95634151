"""A system prompt into the weights: what its own teacher leaves of the distance, and what else it moves.

    python benchmarks/prompt_distillation.py --model runs/demo/teacher --seeds 0 1 2
    python benchmarks/prompt_distillation.py --quick            # the same code on a toy, for the tests

The model with a system prompt teaches a LoRA adapter on itself that never sees it (`adapter_off`,
`teacher_system_prompt`), by the forward KL on answers that the teacher wrote once. SFT learns the same answers in as
many steps, with the same batches, learning rate and first adapter. Both are judged by the same code: on held-out
prompts, by KL(p(.|system, x) || q(.|x)) on the teacher's answers; on unrelated prompts (sums), by KL to the model
without a system prompt, on its own answers. What a run has found is kept in the work folder: it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import machine, write_results

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes" / "smollm2-135m"
UNRELATED = PROMPTS / "data" / "two_tasks.jsonl"
SYSTEM = (
    "You answer like a weather-beaten ship's captain. Keep every answer under three short sentences, and end it with "
    '"Aye."'
)
CONTENDERS = {"divergence": "forward KL to itself with the system prompt", "sft": "SFT on the same answers"}
_T_2 = 4.303  # Student's t at 97.5 % with 2 degrees of freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo/teacher", help="folder of an instruct model")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/prompt_distillation"), help="folder for everything made"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=48, help="held out, and unrelated ones")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a toy model and two steps")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rows, options.new_tokens, options.batch_size = 2, 2, 4, 2
    if options.only:
        run(options.only[0], int(options.only[1]), options)
        return
    settings = f"{options.steps} steps of {options.batch_size}, learning rate {options.learning_rate}, LoRA r 16"
    described = (
        f"{machine(options.threads)}\n\n{settings}, {options.new_tokens} new tokens, {options.rows} rows held out"
    )
    print(f"{described}\n", flush=True)
    run_alone("prepare", 0)
    results = {name: [run_alone(name, seed) for seed in options.seeds] for name in ("start", *CONTENDERS)}
    print(table(results))
    write_results(options.json, described, results)


def run_alone(name: str, seed: int) -> dict[str, float]:
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name, str(seed)], check=True)
    options = sys.argv[sys.argv.index("--work") + 1] if "--work" in sys.argv else "runs/prompt_distillation"
    found: dict[str, float] = json.loads((Path(options) / f"{name}-{seed}.json").read_text())
    print(f"  {name}, seed {seed}: {found}", file=sys.stderr, flush=True)
    return found


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    import torch
    import transformers

    out = options.work / f"{name}-{seed}.json"
    if out.is_file():
        return
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    options.work.mkdir(parents=True, exist_ok=True)
    found = prepare(options) if name == "prepare" else train(name, seed, options)
    out.write_text(json.dumps(found))


def prompts(file: Path, most: int | None = None) -> list[dict[str, Any]]:
    rows = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()[:most]]
    return [{"prompt": row if isinstance(row, list) else [{"role": "user", "content": row}]} for row in rows]


def toy(options: argparse.Namespace) -> None:
    """A model of random weights that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from distill_trainers.toy import tiny_llama

    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tiny_llama(tokenizer, 32, 1, seed=0, max_position_embeddings=1024).save_pretrained(options.work / "toy")
    tokenizer.save_pretrained(options.work / "toy")


def prepare(options: argparse.Namespace) -> dict[str, float]:
    """Let the model answer: with the system prompt all prompts, without it the unrelated ones."""
    if options.quick:
        toy(options)
    most = options.rows if options.quick else None
    started = time.process_time()
    for part, rows, system in (
        ("train", prompts(PROMPTS / "prompts_train.jsonl", most), SYSTEM),
        ("heldout", prompts(PROMPTS / "prompts_heldout.jsonl", options.rows), SYSTEM),
        ("unrelated", prompts(UNRELATED, options.rows), None),
    ):
        trainer = make_trainer(options, 0, eval_rows=rows, system=system)
        filled = trainer.get_eval_dataloader().dataset
        with open(options.work / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for row, told in zip(rows, filled, strict=True):
                ids = told["input_ids"][told["prompt_length"] :]
                answer = trainer.processing_class.decode(ids, skip_special_tokens=True)
                completion = [{"role": "assistant", "content": answer or "?"}]
                file.write(json.dumps({**row, "completion": completion}) + "\n")
    return {"cpu_seconds": time.process_time() - started}


def make_trainer(
    options: argparse.Namespace, seed: int, *, sft: bool = False, system: str | None = SYSTEM, **rows: Any
):
    """The model with a new adapter, taught by itself; `rows` are `train_rows`, `eval_rows` and `model`."""
    from datasets import Dataset
    from peft import LoraConfig

    from distill_trainers import GKDConfig, GKDTrainer

    class Sft(GKDTrainer):
        """Learns the answers alone; its divergence is measured still."""

        loss_weights = property(lambda self: {"lm_loss": 1.0})

    args = GKDConfig(
        output_dir=str(options.work / f"run-{seed}"),
        overwrite_output_dir=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        lmbda=0.0,
        divergence="forward_kl",
        lm_loss_weight=1.0 if sft else 0.0,
        teacher_placement="adapter_off",  # the model itself, also behind an adapter that has been trained
        teacher_system_prompt=system,
        max_length=384,
        max_new_tokens=options.new_tokens,
        temperature=1.0,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        logging_steps=8,
        save_strategy="no",
    )
    model = rows.get("model")
    folder = str(options.work / "toy") if options.quick else options.model
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return (Sft if sft else GKDTrainer)(
        model=folder if model is None else model,
        args=args,
        train_dataset=Dataset.from_list(rows["train_rows"]) if "train_rows" in rows else None,
        eval_dataset=Dataset.from_list(rows["eval_rows"]),
        peft_config=adapter if model is None else None,
    )


def answered(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (options.work / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train a contender (`start` trains nothing), and judge it."""
    held_out, unrelated = answered("heldout", options), answered("unrelated", options)
    trainer = make_trainer(options, seed, sft=name == "sft", train_rows=answered("train", options), eval_rows=held_out)
    found = {"cpu_seconds": 0.0}
    if name != "start":
        started = time.process_time()
        trainer.train()
        found["cpu_seconds"] = time.process_time() - started
    told = trainer.evaluate()
    found |= {"kl": told["eval_kl"], "perplexity": told["eval_perplexity"]}
    other = make_trainer(options, seed, system=None, eval_rows=unrelated, model=trainer.model)
    return {**found, "unrelated_kl": other.evaluate()["eval_kl"]}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    start = statistics.fmean(run["kl"] for run in results["start"])
    lines = ["| | held-out KL | closed | KL to the model on unrelated prompts | CPU seconds |", "|---|---|---|---|---|"]
    lines.append(f"| before | {start:.3f} | | {_spread(results['start'], 'unrelated_kl')} | |")
    for name, label in CONTENDERS.items():
        closed = [{"closed": 100 * (1 - run["kl"] / start)} for run in results[name]]
        cells = [_spread(results[name], "kl"), f"{_spread(closed, 'closed', 1)} %"]
        cells += [_spread(results[name], "unrelated_kl"), _spread(results[name], "cpu_seconds", 0)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(runs: list[dict[str, float]], key: str, digits: int = 3) -> str:
    """Mean over seeds, with the half width of a 95 % interval where there are three."""
    values = [run[key] for run in runs]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {_T_2 * statistics.stdev(values) / 3**0.5:.{digits}f}" if len(values) == 3 else mean


if __name__ == "__main__":
    main()
