"""A student with a tokenizer of its own: how much of the gap to its teacher each way of learning closes.

    python benchmarks/cross_tokenizer.py --teacher runs/demo/teacher --seconds 180
    python benchmarks/cross_tokenizer.py --quick            # the same code on a toy, for the tests

The student is the teacher's body under another vocabulary: a byte-level BPE trained on text that every Python installs
(`pydoc_data`), on the prompts and on the teacher's answers to them. Each of its embedding rows begins as the mean of
the teacher's rows for the same bytes. All contenders train on the same answers of the teacher, with the same batch size
and learning rate, which falls to 0 as their equal CPU time runs out. They are judged by one code, on the teacher's
answers to held-out prompts: in bits per byte, and by how often both find the same next byte likeliest. Each contender
and seed is a process of its own, whose result is kept in the work folder: a run goes on from there.
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

from measuring import keep_settings, machine, write_results

PROMPTS = Path(__file__).parents[1] / "recipes" / "smollm2-135m"
CONTENDERS = {
    "ours": "ours: alm + next_byte, the default",
    "with_text": "ours, and the text (`lm_loss_weight: 1`)",
    "uld": "ours with `uld` alone",
    "gold": "TRL's GOLDTrainer, hybrid loss",
    "sft": "SFT on the teacher's answers",
}
MORE = {
    "at_one": "ours: alm at temperature 1 + next_byte",
    "alm": "ours: alm alone",
    "next_byte": "ours: next_byte alone",
    "overlap": "ours: alm + exact_overlap",
    "kept": "ours, the teacher's answers kept as they are met",
}
TERMS: dict[str, dict[str, float]] = {
    "uld": {"uld": 1.0},
    "alm": {"alm": 1.0},
    "next_byte": {"next_byte": 1.0},
    "overlap": {"alm": 1.0, "exact_overlap": 1.0},
}
SHORT = " Answer in one short sentence."
_T_2 = 4.303  # Student's t at 97.5 % with 2 degrees of freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="runs/demo/teacher", help="folder of an instruct model")
    parser.add_argument("--work", type=Path, default=Path("runs/cross_tokenizer"), help="folder for everything made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, *MORE], default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=180, help="of a processor, for each")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer; longer ones are left out")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the student")
    parser.add_argument("--train-rows", type=int, default=282, help="prompts to train on")
    parser.add_argument("--rows", type=int, default=48, help="prompts held out")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a toy model and a second")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.train_rows, options.rows, options.new_tokens, options.batch_size = 8, 4, 8, 2
        options.vocabulary, options.seconds = 300, 1
        options.teacher = str(options.work / "toy")
    if options.only:
        run(options.only[0], int(options.only[1]), options)
        return
    keep_settings(options)
    described = (
        f"{machine(options.threads)}\n\n{Path(options.teacher).name}: its body under {options.vocabulary} new tokens; "
        f"{options.seconds:.0f} CPU seconds each, batch {options.batch_size}, learning rate "
        f"{options.learning_rate:g} falling to 0, {options.train_rows} prompts, {options.rows} held out"
    )
    print(f"{described}\n", flush=True)
    names = "answers", "prepare", "start", "alignment"
    _, teacher, start, laid = (run_alone(name, 0, options) for name in names)
    share = (
        f"{1e3 * laid['aligning']:.1f} of {1e3 * laid['forward']:.0f} CPU ms ({laid['aligning'] / laid['forward']:.2%})"
    )
    print(f"Laying both tokenisations of a batch side by side, beside the teacher's forward of it: {share}\n")
    results = {"start": [start]}
    for seed in options.seeds:  # all contenders of a seed before the next one
        for name in options.contenders:
            results.setdefault(name, []).append(run_alone(name, seed, options))
    print(table(results, teacher))
    write_results(options.json, described, {"teacher": [teacher], **results})


def run_alone(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    out = options.work / f"{name}-{seed}.json"
    if not out.is_file():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name, str(seed)], check=True)
    found: dict[str, float] = json.loads(out.read_text())
    print(f"  {name}, seed {seed}: {found}", file=sys.stderr, flush=True)
    return found


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    if name == "answers":
        found = answer(options)
    elif name == "prepare":
        found = prepare(options)
    elif name == "alignment":
        found = alignment(options)
    else:
        found, student = {}, load(str(options.work / "student"))
        if name != "start":
            found, student = train(name, seed, options)
        found |= judge(student, options)
    (options.work / f"{name}-{seed}.json").write_text(json.dumps(found))


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def tokenizer_of(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ---- What all of them begin with ------------------------------------------------------------------------------------


def toy(options: argparse.Namespace) -> None:
    """A teacher of random weights that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from distill_trainers.toy import tiny_llama

    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tiny_llama(tokenizer, 32, 1, seed=0, max_position_embeddings=1024).save_pretrained(options.teacher)
    tokenizer.save_pretrained(options.teacher)


def answer(options: argparse.Namespace) -> dict[str, float]:
    """Let the teacher answer all prompts."""
    from datasets import Dataset

    from distill_trainers import GKDConfig, GKDTrainer

    if options.quick:
        toy(options)
    started = time.process_time()
    for part, most in (("train", options.train_rows), ("heldout", options.rows)):
        lines = (PROMPTS / f"prompts_{part}.jsonl").read_text(encoding="utf-8").splitlines()[:most]
        rows = [
            {"prompt": [{"role": "user", "content": json.loads(line)["prompt"][0]["content"] + SHORT}]}
            for line in lines
        ]
        args = GKDConfig(
            output_dir=str(options.work / "answers"),
            overwrite_output_dir=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_length=512,
            max_new_tokens=options.new_tokens,
            rollout_batch_size=32,
            temperature=1.0,
        )
        trainer = GKDTrainer(
            model=options.teacher, teacher_model=options.teacher, args=args, eval_dataset=Dataset.from_list(rows)
        )
        tokenizer = trainer.processing_class
        with open(options.work / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for row, told in zip(rows, trainer.get_eval_dataloader().dataset, strict=True):
                ids = told["input_ids"][told["prompt_length"] :]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                if text and (options.quick or (ids[-1] == tokenizer.eos_token_id and "\ufffd" not in text)):
                    completion = [{"role": "assistant", "content": text}]
                    file.write(json.dumps({**row, "completion": completion}) + "\n")
    return {"cpu_seconds": time.process_time() - started}


def answered(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (options.work / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def prepare(options: argparse.Namespace) -> dict[str, float]:
    """The student: a new vocabulary, and rows for it; what the teacher says of the held-out answers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    old, teacher = tokenizer_of(options.teacher), load(options.teacher)
    special = sorted(set(old.all_special_tokens))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=options.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(shipped_text(options), learner)
    new = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=old.eos_token, bos_token=old.bos_token, pad_token=old.pad_token
    )
    new.chat_template = old.chat_template
    pieces = old.backend_tokenizer.model
    rows = [
        [old.convert_tokens_to_ids(token)] if token in special else [piece.id for piece in pieces.tokenize(token)]
        for token in new.convert_ids_to_tokens(range(len(new)))
    ]
    embeddings = teacher.get_input_embeddings().weight.detach()
    anything = embeddings.mean(0)  # for bytes that the teacher's vocabulary lacks
    means = torch.stack([embeddings[ids].mean(0) if ids else anything for ids in rows])
    teacher.resize_token_embeddings(len(new), mean_resizing=False)
    teacher.get_input_embeddings().weight.data.copy_(means)
    for holder in (teacher.config, teacher.generation_config):
        holder.bos_token_id, holder.eos_token_id, holder.pad_token_id = (
            new.bos_token_id,
            new.eos_token_id,
            new.pad_token_id,
        )
    teacher.save_pretrained(options.work / "student")
    new.save_pretrained(options.work / "student")
    told = readings(load(options.teacher), old, options)
    torch.save(told, options.work / "teacher.pt")
    return {"tokens": len(new), "kept_whole": sum(len(ids) == 1 for ids in rows), **of_text(told)}


def shipped_text(options: argparse.Namespace) -> Any:
    from pydoc_data import topics

    for row in answered("train", options):
        for turn in [*row["prompt"], *row["completion"]]:
            yield turn["content"]
    yield from list(topics.topics.values())[: 4 if options.quick else None]


# ---- Training -------------------------------------------------------------------------------------------------------


def train(name: str, seed: int, options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """Train until the CPU time is over; loading and preparing rows do not count."""
    import transformers

    class Budget(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.began = 0.0

        @property
        def spent(self) -> float:
            return time.process_time() - self.began

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.process_time()

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            warm = min(1.0, (state.global_step + 1) / 3)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm * max(0.0, 1 - self.spent / options.seconds)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = self.spent + 0.5 * self.spent / state.global_step > options.seconds

    trainer, budget = build(name, seed, options), Budget()
    trainer.add_callback(budget)
    trainer.train()
    return {"steps": trainer.state.global_step, "cpu_seconds": budget.spent}, trainer.model


def build(name: str, seed: int, options: argparse.Namespace) -> Any:
    from datasets import Dataset

    folder = str(options.work / "student")
    settings: dict[str, Any] = {
        "output_dir": str(options.work / "runs" / f"{name}-{seed}"),
        "max_length": 512,  # longer than any row
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": 100_000,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
    rows = answered("train", options)
    given = {"model": load(folder), "processing_class": tokenizer_of(folder)}
    if name == "sft":
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**settings, activation_checkpointing=False)
        return SFTTrainer(**given, args=args, train_dataset=Dataset.from_list(rows))
    if name == "gold":
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        args = GOLDConfig(
            **settings,
            activation_checkpointing=False,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            use_uld_loss=True,
            uld_use_hybrid_loss=True,
            teacher_tokenizer_name_or_path=options.teacher,
        )
        messages = [{"messages": [*row["prompt"], *row["completion"]]} for row in rows]
        dataset = Dataset.from_list(messages)
        return GOLDTrainer(**given, teacher_model=load(options.teacher), args=args, train_dataset=dataset)
    from distill_trainers import GKDConfig, GKDTrainer

    args = GKDConfig(
        **settings,
        overwrite_output_dir=True,
        lmbda=0.0,
        divergence="forward_kl",
        teacher_tokenizer="own",
        cross_tokenizer=TERMS.get(name),
        alm_temperature=1.0 if name == "at_one" else None,
        lm_loss_weight=1.0 if name == "with_text" else 0.0,
        teacher_cache=str(options.work / "runs" / f"cache-{seed}") if name == "kept" else None,
        teacher_cache_kind="next_bytes" if name == "kept" else "hidden",
    )
    return GKDTrainer(**given, teacher_model=options.teacher, args=args, train_dataset=Dataset.from_list(rows))


def alignment(options: argparse.Namespace, batches: int = 5) -> dict[str, float]:
    """CPU seconds that a batch takes: the teacher's tokens of its text and where both begin one; its forward."""
    from itertools import islice

    from distill_trainers.data.views import ALIGNED_ENTRIES

    trainer, spent = build("ours", 0, options), {"aligning": 0.0, "forward": 0.0}
    for count, batch in enumerate(islice(trainer.get_train_dataloader(), 1 + batches)):
        given = {name: entry for name, entry in batch.items() if name not in ALIGNED_ENTRIES}
        began = time.process_time()
        aligned = trainer.two_models.completed(given)
        between = time.process_time()
        trainer.two_models.signal(aligned, aligned["labels"][:, 1:] != -100)
        if count:  # the first one reads the tokenizers
            spent["aligning"] += (between - began) / batches
            spent["forward"] += (time.process_time() - between) / batches
    return spent


# ---- Judging --------------------------------------------------------------------------------------------------------


def readings(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a model says of each held-out answer: of each token its bits, and the bytes and the end that come next."""
    import torch

    from distill_trainers.data.alignment import TokenBytes
    from distill_trainers.losses.cross_tokenizer import bucket_logps

    model.eval()
    spelled, told = TokenBytes.of(tokenizer), []
    first = spelled.first_bytes(model.get_output_embeddings().weight.shape[0])
    for row in answered("heldout", options):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        text = row["completion"][0]["content"]
        completion = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :].float()
            bits = -logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0] / 0.6931471805599453
            likeliest = bucket_logps(logits, first).argmax(-1)
        told.append({"ids": completion, "bits": bits, "next": likeliest, "bytes": len(text.encode())})
    return told


def of_text(told: list[dict[str, Any]]) -> dict[str, float]:
    return {"bits_per_byte": sum(float(row["bits"].sum()) for row in told) / sum(row["bytes"] for row in told)}


def judge(student: Any, options: argparse.Namespace) -> dict[str, float]:
    import torch

    from distill_trainers.data.alignment import TokenBytes, align

    ours, theirs = tokenizer_of(str(options.work / "student")), tokenizer_of(options.teacher)
    spelled = TokenBytes.of(ours), TokenBytes.of(theirs)
    told, taught = readings(student, ours, options), torch.load(options.work / "teacher.pt")
    agreed = places = 0
    for one, other in zip(told, taught, strict=True):
        chunks = align(one["ids"], other["ids"], *spelled)
        same = one["next"][chunks.student_starts] == other["next"][chunks.teacher_starts]
        agreed, places = agreed + int(same.sum()), places + len(same)
    return {**of_text(told), "next_byte_agreement": agreed / places}


def table(results: dict[str, list[dict[str, float]]], teacher: dict[str, float]) -> str:
    start = results["start"][0]
    lines = ["| | steps | bits per byte | of the gap | next byte alike | of the gap | CPU seconds |", "|" + "---|" * 7]
    alone = f"{start['bits_per_byte']:.3f} | | {start['next_byte_agreement']:.3f} | | |"
    lines += [f"| the teacher | | {teacher['bits_per_byte']:.3f} | | 1 | | |", f"| the student before | | {alone}"]
    goals = {"bits_per_byte": teacher["bits_per_byte"], "next_byte_agreement": 1.0}
    for name in [name for name in results if name != "start"]:
        runs, cells = results[name], [_spread([run["steps"] for run in results[name]], 0)]
        for score, goal in goals.items():
            closed = [100 * (run[score] - start[score]) / (goal - start[score]) for run in runs]
            cells += [_spread([run[score] for run in runs], 3), f"{_spread(closed, 1)} %"]
        cells.append(_spread([run["cpu_seconds"] for run in runs], 0))
        lines.append(f"| {({**CONTENDERS, **MORE})[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """Mean over seeds, with the half width of a 95 % interval where there are three."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {_T_2 * statistics.stdev(values) / 3**0.5:.{digits}f}" if len(values) == 3 else mean


if __name__ == "__main__":
    main()
