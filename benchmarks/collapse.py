"""Where preference distillation ends where all expectations are sums: the plot of docs/methods/dpkd.md.

    python benchmarks/collapse.py --plot docs/methods/collapse.svg

One prompt, responses of one token out of three, a teacher p and a student that begins at s. The student's output matrix
is trained on `DPKDTrainer.compute_loss`, on all pairs of responses in exact proportion. With rejected responses fixed
at samples of s the optimum is q ∝ p·(p/s)^(1/β); sampled anew from the student it is p.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPT = "1+2="
TOKENS = "345"
TEACHER = (3, 2, 1)  # sixths
START = (1, 2, 3)
PARTS = 6
NEVER = -60.0  # logit of all other tokens


def toy_model(tokenizer: Any, shares: Any, seed: int) -> Any:
    """A tiny Llama in float64 whose next token after the prompt has probabilities proportional to `shares`."""
    from distill_trainers.toy import tiny_llama

    model = tiny_llama(tokenizer, 16, 1, seed=seed, tie_word_embeddings=False).double()
    set_distribution(model, tokenizer, torch.as_tensor(shares, dtype=torch.float64))
    return model


@torch.no_grad()
def set_distribution(model: Any, tokenizer: Any, shares: Tensor) -> None:
    """Choose the output matrix such that the next token after the prompt has these probabilities."""
    hidden = model.model(input_ids=torch.tensor([tokenizer(PROMPT).input_ids])).last_hidden_state[0, -1]
    logits = torch.full((len(tokenizer),), NEVER, dtype=torch.float64)
    logits[tokenizer.convert_tokens_to_ids(list(TOKENS))] = (shares / shares.sum()).log()
    model.lm_head.weight.copy_(torch.outer(logits, hidden) / hidden.square().sum())


@torch.no_grad()
def distribution(model: Any, tokenizer: Any) -> Tensor:
    """Probabilities of the three responses."""
    logits = model(input_ids=torch.tensor([tokenizer(PROMPT).input_ids])).logits[0, -1].double()
    return logits.softmax(-1)[tokenizer.convert_tokens_to_ids(list(TOKENS))]


def batch_of_pairs(trainer: Any, chosen: Any, rejected: Any) -> dict[str, Tensor]:
    """All pairs of responses, as often as their counts say."""
    tokenizer = trainer.processing_class
    prompt, ids = tokenizer(PROMPT).input_ids, tokenizer.convert_tokens_to_ids(list(TOKENS))
    rows = []
    for (w, many), (l, often) in product(enumerate(chosen), enumerate(rejected)):
        row = {"input_ids": [*prompt, ids[w]], "labels": [-100] * len(prompt) + [ids[w]], "prompt_length": len(prompt)}
        rows += [{**row, "rejected_ids": [ids[l]], "rejected_labels": [ids[l]]}] * (many * often)
    return trainer.data_collator(rows)


def toy_trainer(folder: str, teacher: Any = TEACHER, start: Any = START, **settings: Any) -> Any:
    """A `DPKDTrainer` of the two toys; without `lm_loss_weight` the preference loss alone."""
    from datasets import Dataset
    from transformers.utils import logging as transformers_logging

    from distill_trainers import DPKDConfig, DPKDTrainer
    from distill_trainers.toy import character_tokenizer

    transformers_logging.set_verbosity_error()
    tokenizer = character_tokenizer()
    own = {"lm_loss_weight": 0.0, "max_length": 8, "max_new_tokens": 1, **settings}
    args = DPKDConfig(output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, **own)
    models = toy_model(tokenizer, start, 1), toy_model(tokenizer, teacher, 2)
    rows = Dataset.from_list([{"prompt": PROMPT}] * 4)
    trainer = DPKDTrainer(*models, args, rows, processing_class=tokenizer)
    trainer.model.train()
    return trainer


def descend(trainer: Any, steps: int, learning_rate: float, *, on_policy: bool, draws: int = 24) -> list[Tensor]:
    """Train the output matrix; returns the student's distribution at each step.

    Args:
        on_policy: rejected responses are `draws` samples of the student as it is; else they stay at START.
    """
    tokenizer, weight = trainer.processing_class, trainer.model.lm_head.weight
    optimizer, generator = torch.optim.Adam([weight], lr=learning_rate), torch.Generator().manual_seed(0)
    path = [distribution(trainer.model, tokenizer)]
    for _ in range(steps):
        rejected = START
        if on_policy:
            drawn = torch.multinomial(path[-1], draws, replacement=True, generator=generator)
            rejected = torch.bincount(drawn, minlength=len(TOKENS)).tolist()
        optimizer.zero_grad()
        trainer.compute_loss(trainer.model, batch_of_pairs(trainer, TEACHER, rejected)).backward()
        optimizer.step()
        path.append(distribution(trainer.model, tokenizer))
    return path


def optimum(beta: float) -> Tensor:
    """p·(p/s)^(1/β), normalised."""
    p, s = (torch.tensor(counts, dtype=torch.float64) / PARTS for counts in (TEACHER, START))
    return (p.log() + (p.log() - s.log()) / beta).softmax(-1)


def kl_to(path: list[Tensor], target: Tensor) -> list[float]:
    """KL(target‖q) along the path, in nats."""
    return [float((torch.xlogy(target, target) - target * q.log()).sum()) for q in path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="write the plot here (needs matplotlib)")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--quick", action="store_true", help="few steps: only shows that it runs")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    teacher = torch.tensor(TEACHER, dtype=torch.float64) / PARTS
    ways = {
        "fixed y_l, β = 0.1, no anchor": ({"beta": 0.1}, False),
        "fixed y_l, β = 0.1, λ = 1": ({"beta": 0.1, "lm_loss_weight": 1.0}, False),
        "fixed y_l, β = 1, no anchor": ({"beta": 1.0}, False),
        "y_l anew, β = 1, no anchor": ({"beta": 1.0}, True),
        "y_l anew, β = 1, λ = 1 (defaults)": ({"beta": 1.0, "lm_loss_weight": 1.0}, True),
    }
    steps, curves = 20 if options.quick else options.steps, {}
    for title, (settings, on_policy) in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            path = descend(toy_trainer(folder, **settings), steps, 0.03, on_policy=on_policy)
        curves[title] = kl_to(path, teacher)
        final = ", ".join(f"{q:.3f}" for q in path[-1].tolist())
        print(f"{title:<36} KL(p‖q) {curves[title][0]:.3f} → {curves[title][-1]:.3f}   q = {final}")
    print("p =", [round(v, 3) for v in teacher.tolist()], " p·(p/s)^10 =", [round(v, 6) for v in optimum(0.1).tolist()])
    if options.plot:
        plot(curves, options.plot)


def plot(curves: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for title, values in curves.items():
        axis.plot(values, label=title, linewidth=1.5)
    axis.set(xlabel="step", ylabel="KL(p‖q), nats", yscale="log", title="Three responses, teacher p, student from s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
