"""Our decode loop beside `generate` of transformers, at skewed lengths, in one run.

    python benchmarks/rollouts.py                         # a Llama of 256 x 4 with 49152 tokens, 32 prompts
    python benchmarks/rollouts.py --model FOLDER          # a real model, on prompts of the recipe
    python benchmarks/rollouts.py --quick                 # the same code on a toy, for the tests
    python benchmarks/rollouts.py --device cuda --json results.json

Every measurement is a process of its own and the engines take turns. With random weights a completion ends after each
token with probability 4 / new tokens, so lengths are skewed as in practice: most are short, few reach the limit. All
engines sample one law from the same seeds; tokens per second count what is kept, up to the EOS. The middle engine is
ours with dropping switched off, which tells what comes from dropping and what from a cache that grows in place.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from measuring import Meter, in_turns, machine, medians, write_results

ENGINES = {"hf": "transformers: generate", "keep": "ours, finished rows kept", "decode": "ours"}
FULL = {"vocab": 49152, "hidden": 256, "layers": 4, "rows": 32, "prompt": 128, "new_tokens": 128, "calls": 3}
QUICK = {"vocab": 512, "hidden": 32, "layers": 1, "rows": 8, "prompt": 16, "new_tokens": 16, "calls": 2}
PROMPTS = Path(__file__).parents[1] / "recipes" / "smollm2-135m" / "prompts_train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model and one round")
    parser.add_argument("--model", help="folder of a real model with its tokenizer")
    parser.add_argument("--dtype", default="float32", help="of the model's weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=None, help="processes per engine (3; quick: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rows", type=int, default=None, help="prompts of one window")
    parser.add_argument("--new-tokens", type=int, default=None, help="longest completion")
    parser.add_argument("--calls", type=int, default=None, help="windows of one process, after one that warms up")
    parser.add_argument("--end-at", default="", help="with --model: text whose tokens end a completion, too, such as .")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--only", choices=list(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    rounds = options.rounds or (1 if options.quick else 3)
    results = in_turns(__file__, list(ENGINES), rounds)
    described = f"{machine(options.threads, options.device)}\n\n{settings_line(options, rounds)}"
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def size_of(options: argparse.Namespace) -> dict[str, int]:
    size = dict(QUICK if options.quick else FULL)
    return size | {k: v for k in ("rows", "new_tokens", "calls") if (v := getattr(options, k))}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Sample several windows in this process, after one that warms up."""
    import torch
    import transformers

    from distill_trainers.randomness import Purpose, Role, Stream
    from distill_trainers.rollouts import DecodeEngine, HfEngine
    from distill_trainers.rollouts.decode import loop as decode

    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    if name == "keep":
        decode._WORTH_DROPPING = 2.0
    size, device = size_of(options), torch.device(options.device)
    model, ids, mask, sampling = workload(options, size)
    model, ids, mask = model.to(device).eval(), ids.to(device), mask.to(device)
    engine = HfEngine() if name == "hf" else DecodeEngine()
    meter, seconds, cpu, kept, longest = Meter(options.device), [], [], [], []
    for call in range(size["calls"] + 1):
        before = meter.now()
        stream = Stream(0, Role.STUDENT, Purpose.ROLLOUT).at(step=call)
        streams = [stream.at(row=row) for row in range(len(ids))]
        lengths = [len(text) for text in engine.generate(model, ids, mask, sampling, streams)]
        after = meter.now()
        seconds.append(after[0] - before[0])
        cpu.append(after[1] - before[1])
        kept.append(sum(lengths))
        longest.append(max(lengths))
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens_per_second": sum(kept[1:]) / sum(seconds[1:]),
        "tokens_per_cpu_second": sum(kept[1:]) / sum(cpu[1:]),
        "tokens": statistics.median(kept[1:]),
        "longest": statistics.median(longest[1:]),
        "extra_mib": meter.extra_mib(),
    }


def workload(options: argparse.Namespace, size: dict[str, int]) -> tuple[Any, Any, Any, Any]:
    """Model, left-padded prompts and their mask, sampling settings."""
    import torch

    from distill_trainers import models
    from distill_trainers.rollouts import SamplingSettings

    chosen = {"temperature": options.temperature, "top_p": options.top_p}
    if options.model:
        model = models.load_causal_lm(options.model, dtype=options.dtype)
        tokenizer = models.load_tokenizer(options.model)
        prompts = real_prompts(tokenizer, size["rows"])
        sampling = SamplingSettings(
            size["new_tokens"],
            eos_token_ids=models.eos_ids(model, tokenizer) + tokenizer(options.end_at)["input_ids"],
            pad_token_id=tokenizer.pad_token_id,
            **chosen,
        )
    else:
        model = random_llama(size).to(getattr(torch, options.dtype))
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(size["prompt"] // 4, size["prompt"] + 1, (size["rows"],), generator=draw).tolist()
        prompts = [torch.randint(size["vocab"], (length,), generator=draw).tolist() for length in lengths]
        ends = list(range(size["vocab"] * 4 // size["new_tokens"]))
        sampling = SamplingSettings(size["new_tokens"], eos_token_ids=ends, pad_token_id=0, **chosen)
    width = max(map(len, prompts))
    ids = [[sampling.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return model, torch.tensor(ids), torch.tensor(mask), sampling


def random_llama(size: dict[str, int]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size["vocab"],
            hidden_size=size["hidden"],
            intermediate_size=2 * size["hidden"],
            num_hidden_layers=size["layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=size["prompt"] + size["new_tokens"],
            tie_word_embeddings=True,
        )
    )


def real_prompts(tokenizer: Any, rows: int) -> list[list[int]]:
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:rows]]
    prompts = [line["prompt"] for line in lines]
    turns = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in prompts]
    if tokenizer.chat_template is None:
        return [tokenizer(turn[-1]["content"])["input_ids"] for turn in turns]
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=True)["input_ids"] for t in turns]


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the processes, the range of times, and ratios to `generate`."""
    middle = medians(results)
    lines = [
        "| engine | s per window (range) | kept tokens per s | × generate | per CPU s | × generate | extra peak MiB "
        "| kept tokens | longest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, got in middle.items():
        seconds = [run["seconds"] for run in results[name]]
        ratios = {key: got[key] / middle["hf"][key] for key in ("tokens_per_second", "tokens_per_cpu_second")}
        lines.append(
            f"| {ENGINES[name]} | {got['seconds']:.3f} ({min(seconds):.3f}–{max(seconds):.3f}) "
            f"| {got['tokens_per_second']:.0f} | {ratios['tokens_per_second']:.2f} "
            f"| {got['tokens_per_cpu_second']:.0f} | {ratios['tokens_per_cpu_second']:.2f} "
            f"| {got['extra_mib']:.0f} | {got['tokens']:.0f} | {got['longest']:.0f} |"
        )
    return "\n".join(lines)


def settings_line(options: argparse.Namespace, rounds: int) -> str:
    size = size_of(options)
    if options.model:
        what = Path(options.model).name + (f", ending at {options.end_at!r}" if options.end_at else "")
    else:
        what = f"Llama {size['hidden']} x {size['layers']}, {size['vocab']} tokens, random weights"
    return (
        f"{what}, {options.dtype}, {options.device}; {size['rows']} prompts, at most {size['new_tokens']} new tokens, "
        f"temperature {options.temperature}, top_p {options.top_p}; median of {size['calls']} windows after one, then "
        f"over {rounds} process(es) that take turns."
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
