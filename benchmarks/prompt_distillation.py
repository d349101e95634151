"""Instructions into the weights: what a model as its own teacher leaves of the distance, and what else it moves.

    python benchmarks/prompt_distillation.py --model runs/demo/teacher --seeds 0 1 2
    python benchmarks/prompt_distillation.py --what concise --steps 12 --new-tokens 64
    python benchmarks/prompt_distillation.py --quick            # the same code on a toy, for the tests

The model with instructions teaches a LoRA adapter on itself that never sees them (`adapter_off` with
`teacher_system_prompt` or `teacher_prompt`). SFT learns answers that the teacher wrote, in as many steps of as many
rows, with the same learning rate and first adapter. Both are judged by the same code, on two sets of held-out answers:

- `told`, written by the teacher: KL(p(.|instructions, x) || q(.|x)), of which a part is closed;
- `plain`, written by the model without instructions: KL to that model, and perplexity. With `--what captain` they
  are of unrelated prompts (sums), with `concise` of the same held-out prompts: the long answers.

`captain` learns a manner, by the forward KL on the teacher's answers. `concise` learns to be short, by the reverse KL
on its own text (CRISP, arXiv 2603.05433), and is also judged by the length of new answers to held-out prompts. What a
run has found is kept in the work folder: it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import keep_settings, machine, write_results

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes" / "smollm2-135m"
HELD_OUT, UNRELATED = PROMPTS / "prompts_heldout.jsonl", PROMPTS / "data" / "two_tasks.jsonl"
CONTENDERS = ("divergence", "sft")
_T_2 = 4.303  # Student's t at 97.5 % with 2 degrees of freedom


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        view: settings of what the teacher reads.
        told: a name of the teacher's contender.
        plain: file of the prompts that are answered without instructions.
        settings: of the teacher's contender.
        lengths: whether those of new answers are measured.
    """

    view: dict[str, str]
    told: str
    plain: Path
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: bool = False


TASKS = {
    "captain": Task(
        {
            "teacher_system_prompt": "You answer like a weather-beaten ship's captain. Keep every answer under three "
            'short sentences, and end it with "Aye."'
        },
        "forward KL to itself with the system prompt",
        UNRELATED,
        {"divergence": "forward_kl", "lmbda": 0.0},
    ),
    "concise": Task(
        {"teacher_prompt": "{prompt}\n\nAnswer in one short sentence."},
        "reverse KL to itself, told to be short, on its own text",
        HELD_OUT,
        {"divergence": "reverse_kl", "lmbda": 1.0},
        lengths=True,
    ),
}


def main() -> None:
    parser = parser_of(__doc__, work=Path("runs/prompt_distillation"), rows=32)
    parser.add_argument("--what", choices=TASKS, default="captain")
    parser.add_argument("--prompts", type=int, default=96, help="the first of the training prompts")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.prompts, options.rows, options.new_tokens, options.batch_size = 2, 2, 2, 4, 2
        options.model = str(options.work / "toy")
    if options.only:
        kept(options.only[0], int(options.only[1]), options, run)
        return
    keep_settings(options)
    settings = f"{options.steps} steps of {options.batch_size}, learning rate {options.learning_rate}, LoRA r 16"
    rows = f"{options.prompts} prompts, {options.rows} held out, {options.new_tokens} new tokens"
    described = f"{machine(options.threads)}\n\n{settings}, {rows}"
    print(f"{described}\n", flush=True)
    alone(__file__, "prepare", 0, options.work)
    results = {"start": [alone(__file__, "start", 0, options.work)]}  # a new adapter changes nothing at any seed
    for name in CONTENDERS:
        results[name] = [alone(__file__, name, seed, options.work) for seed in options.seeds]
    print(table(results, TASKS[options.what]))
    write_results(options.json, described, results)


def parser_of(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a benchmark in which an instruct model teaches adapters on itself."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="runs/demo/teacher", help="folder of an instruct model")
    parser.add_argument("--work", type=Path, help="folder for everything made (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a toy model and two steps")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def alone(script: str, name: str, seed: int, work: Path) -> dict[str, float]:
    """Run one part of a script in a process of its own, and return what it has found."""
    subprocess.run([sys.executable, script, *sys.argv[1:], "--only", name, str(seed)], check=True)
    found: dict[str, float] = json.loads((work / f"{name}-{seed}.json").read_text())
    print(f"  {name}, seed {seed}: {found}", file=sys.stderr, flush=True)
    return found


def kept(name: str, seed: int, options: argparse.Namespace, compute: Callable[..., dict[str, float]]) -> None:
    """Write what a part finds into the work folder, where it is not there yet."""
    import torch
    import transformers

    out = options.work / f"{name}-{seed}.json"
    if out.is_file():
        return
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    options.work.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(compute(name, seed, options)))


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    return prepare(options) if name == "prepare" else train(name, seed, options)


def prompts(file: Path, most: int) -> list[dict[str, Any]]:
    rows = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()[:most]]
    return [{"prompt": row if isinstance(row, list) else [{"role": "user", "content": row}]} for row in rows]


def bytes_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def toy(folder: Path) -> None:
    """A model of random weights that reads bytes."""
    from distill_trainers.toy import tiny_llama

    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tiny_llama(tokenizer, 32, 1, seed=0, max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(options: argparse.Namespace) -> dict[str, float]:
    """Let the model answer: training and held-out prompts with instructions, others without."""
    if options.quick:
        toy(options.work / "toy")
    task, started = TASKS[options.what], time.process_time()
    for part, rows, view in (
        ("train", prompts(PROMPTS / "prompts_train.jsonl", options.prompts), task.view),
        ("told", prompts(HELD_OUT, options.rows), task.view),
        ("plain", prompts(task.plain, options.rows), {}),
    ):
        trainer = make_trainer(options, 0, eval_rows=rows, **view)
        filled = trainer.get_eval_dataloader().dataset
        with open(options.work / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for row, told in zip(rows, filled, strict=True):
                ids = told["input_ids"][told["prompt_length"] :]
                answer = trainer.processing_class.decode(ids, skip_special_tokens=True)
                completion = [{"role": "assistant", "content": answer or "?"}]
                file.write(json.dumps({**row, "completion": completion}) + "\n")
    return {"cpu_seconds": time.process_time() - started}


def make_trainer(
    options: argparse.Namespace,
    seed: int,
    *,
    eval_rows: Sequence[Any],
    train_rows: Sequence[Any] | None = None,
    model: Any = None,
    sft: bool = False,
    **settings: Any,
) -> Any:
    """The model with a new adapter (or `model`), taught by itself as it is without one."""
    from datasets import Dataset
    from peft import LoraConfig

    from distill_trainers import GKDConfig, GKDTrainer

    class Sft(GKDTrainer):
        """Learns the answers alone; its divergence is measured still."""

        loss_weights = property(lambda self: {"lm_loss": 1.0})

    own: dict[str, Any] = {"divergence": "forward_kl", "lmbda": 0.0}
    args = GKDConfig(
        output_dir=str(options.work / f"run-{seed}"),
        overwrite_output_dir=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        lm_loss_weight=1.0 if sft else 0.0,
        teacher_placement="adapter_off",  # the model itself, also behind an adapter that has been trained
        max_length=384,
        max_new_tokens=options.new_tokens,
        temperature=1.0,
        rollout_batch_size=32,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=4,
        save_strategy="no",
        **{**own, **settings},
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return (Sft if sft else GKDTrainer)(
        model=options.model if model is None else model,
        args=args,
        train_dataset=None if train_rows is None else Dataset.from_list(list(train_rows)),
        eval_dataset=Dataset.from_list(list(eval_rows)),
        peft_config=adapter if model is None else None,
    )


def answered(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (options.work / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train a contender (`start` trains nothing), and judge it."""
    task, rows = TASKS[options.what], answered("train", options)
    settings = {} if name == "sft" else task.settings
    if settings.get("lmbda") == 1.0:
        rows = [{"prompt": row["prompt"]} for row in rows]
    told = answered("told", options)
    trainer = make_trainer(options, seed, eval_rows=told, train_rows=rows, sft=name == "sft", **task.view, **settings)
    found = {"cpu_seconds": 0.0}
    if name != "start":
        started = time.process_time()
        trainer.train()
        found["cpu_seconds"] = time.process_time() - started
    found |= judged(trainer.model, "told", task.view, seed, options)
    return found | judged(trainer.model, "plain", {}, seed, options)


def judged(model: Any, part: str, view: dict[str, str], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """KL to the teacher and perplexity on the held-out answers `part`; of `plain` ones perhaps lengths, too."""
    lengths = part == "plain" and TASKS[options.what].lengths
    measures: dict[str, Any] = {"eval_measures": ["diversity"], "eval_measures_rows": options.rows} if lengths else {}
    judge = make_trainer(options, seed, eval_rows=answered(part, options), model=model, **view, **measures)
    scores = judge.evaluate()
    found = {f"{part}_kl": scores["eval_kl"], f"{part}_perplexity": scores["eval_perplexity"]}
    if lengths:  # the teacher of plain answers is the model itself
        found |= {"tokens": scores["eval_completion_tokens"], "ended": scores["eval_ended"]}
    return found


def table(results: dict[str, list[dict[str, float]]], task: Task) -> str:
    start = results["start"][0]
    columns = {"told_kl": ("KL, told", 3), "plain_kl": ("KL, plain", 3), "plain_perplexity": ("perplexity, plain", 2)}
    if task.lengths:
        columns |= {"tokens": ("tokens an answer", 1), "ended": ("ended", 2)}
    names = [title for title, _ in columns.values()]
    lines = [f"| | {' | '.join(names)} | closed | CPU seconds |", "|---" * (len(columns) + 3) + "|"]
    lines.append(f"| before | {' | '.join(f'{start[key]:.{digits}f}' for key, (_, digits) in columns.items())} | | |")
    for name in CONTENDERS:
        runs = results[name]
        cells = [spread([run[key] for run in runs], digits) for key, (_, digits) in columns.items()]
        closed = spread([100 * (1 - run["told_kl"] / start["told_kl"]) for run in runs], 1)
        label = task.told if name == "divergence" else "SFT on the teacher's answers"
        lines.append(f"| {label} | {' | '.join(cells)} | {closed} % | {spread([r['cpu_seconds'] for r in runs], 0)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds, with the half width of a 95 % interval where there are three."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {_T_2 * statistics.stdev(values) / 3**0.5:.{digits}f}" if len(values) == 3 else mean


if __name__ == "__main__":
    main()
