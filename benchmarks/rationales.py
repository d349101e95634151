"""Do rationales help a small student? The same student, data, and number of updates, with them and without.

`--task addition`: two-digit sums with their steps, and a random student of 47,000 parameters. `--task svamp`: word
problems with the chains of PaLM 540B that were published with Distilling Step-by-Step (arXiv 2305.02301), cut at the
next question, parsed, and dropped where the answer is wrong; students write an arithmetic expression. In both the label
task alone is scored, on questions that no run trains on.

    python benchmarks/rationales.py --task addition --train 500 --steps 800 --batch-size 32 --learning-rate 3e-3
    python benchmarks/rationales.py --task svamp --student FOLDER --train 200 --steps 100 --bf16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

from distill_trainers import RationaleConfig, RationaleTrainer
from distill_trainers.models import load_causal_lm, load_tokenizer
from distill_trainers.rationales import parse_response, verify_answer
from distill_trainers.students import make_student
from distill_trainers.toy import ADAM_BETA2, RATIONALE_PROMPTS, addition_rationales, character_tokenizer, tiny_llama

SPLIT_SEED = 0
ADDITION = {**RATIONALE_PROMPTS, "max_length": 40, "max_new_tokens": 5, "weight_decay": 0.1, "adam_beta2": ADAM_BETA2}


def read_svamp(folder: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Questions with expressions as answers, with a rationale where PaLM's was right; and what became of the chains."""
    lines = (folder / "svamp_train.json").read_text().splitlines()
    chains = [text for part in range(2) for text in json.loads((folder / f"train_CoT_{part}.json").read_text())]
    rows, counts = [], Counter[str]()
    for line, chain in zip(lines, chains, strict=True):
        row = json.loads(line)
        parsed = parse_response(chain, ["answer_is"])
        reason = verify_answer(parsed.answer, row["label"], "number").reason
        counts[reason] += 1
        kept = parsed.rationale if reason == "right" else ""
        rows.append({"question": row["input"].replace("\n", " "), "answer": row["label"], "rationale": kept})
    return rows, counts


def read_addition(count: int) -> dict[str, Dataset]:
    """`count` sums with their steps to learn from, and the same 1000 others for any count."""
    rows = addition_rationales(2500, seed=5)
    if not 1 <= count <= 1500:
        raise SystemExit(f"Got --train {count}; expected 1 to 1500 sums.")
    return {"train": rows.select(range(count)), "test": rows.select(range(1500, 2500))}


def train(rows: dict[str, Dataset], student: Any, tokenizer: Any, weight: float, seed: int, options: Any) -> dict:
    args = RationaleConfig(
        output_dir=str(options.out),
        rationale_weight=weight,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=16,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 10),
        answer_kind="number",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
        bf16=options.bf16,
        disable_tqdm=True,
        **(
            ADDITION
            if options.task == "addition"
            else {"max_length": 256, "max_new_tokens": 24, "prompt_style": "text", "weight_decay": 1e-4}
        ),
    )
    trainer = RationaleTrainer(student, None, args, rows["train"], rows["test"], processing_class=tokenizer)
    started = time.process_time()
    trainer.train()
    spent = time.process_time() - started
    scores = trainer.evaluate()
    return {
        "rationale_weight": weight,
        "seed": seed,
        "train_cpu_s": round(spent, 1),
        **{name: scores[f"eval_{name}"] for name in ("accuracy", "label", "tokens_per_answer", "answered")},
    }


def split_svamp(options: Any) -> dict[str, Dataset]:
    if not options.data.is_dir():
        raise SystemExit(f"There is no folder {options.data}; it should hold svamp_train.json and train_CoT_*.json.")
    rows, counts = read_svamp(options.data)
    print(f"{len(rows)} chains: {dict(counts)}", flush=True)
    halves = dict(Dataset.from_list(rows).train_test_split(options.test, seed=SPLIT_SEED))
    if options.train:
        halves["train"] = halves["train"].select(range(options.train))
    return halves


def make_model(options: Any, seed: int) -> tuple[Any, Any]:
    if options.task == "addition":
        tokenizer = character_tokenizer()
        return tiny_llama(tokenizer, 48, 2, seed=seed), tokenizer
    if options.student is None:
        raise SystemExit("Name the student of svamp with --student.")
    student = load_causal_lm(options.student, dtype="float32")
    if options.layers and options.layers < student.config.num_hidden_layers:
        student = make_student(student, options.layers)
    return student, load_tokenizer(options.student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("addition", "svamp"), default="svamp")
    parser.add_argument("--train", type=int, help="questions to learn from; by default 500 sums, or all of svamp")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/svamp_rationales"))
    parser.add_argument("--student", help="folder or Hub id of a causal LM, for svamp")
    parser.add_argument("--layers", type=int, default=None, help="keep so many of its layers, evenly spaced")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0], help="λ; 0 is labels alone")
    parser.add_argument("--test", type=int, default=200, help="questions held out")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/svamp"))
    options = parser.parse_args()
    halves = read_addition(options.train or 500) if options.task == "addition" else split_svamp(options)
    results = []
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for weight in options.weights:
            student, tokenizer = make_model(options, seed)
            results.append(train(halves, student, tokenizer, weight, seed, options))
            print(json.dumps(results[-1]), flush=True)
            (options.out / f"{options.task}.jsonl").open("a").write(json.dumps(results[-1]) + "\n")
    for weight in options.weights:
        found = [result["accuracy"] for result in results if result["rationale_weight"] == weight]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"λ = {weight}: accuracy {statistics.mean(found):.3f} ± {spread:.3f} over {len(found)} seeds")


if __name__ == "__main__":
    main()
