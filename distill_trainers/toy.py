"""Two-digit addition with a character tokenizer: a real task, learnt from scratch in seconds.

The whole task is 10 000 prompts such as `37+58=` with completions such as `95`. It is the convergence gate of the
tests and the three-minute proof of the command line.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHARACTERS = "0123456789+="
# Carrying is learnt in a sudden drop of the loss. Wide initial weights and a second moment that forgets sooner bring
# the drop early whatever the seed: with the usual 0.02 and 0.999 the student of 800 steps stands at 17 %.
ADAM_BETA2 = 0.98
INITIALIZER_RANGE = 0.1


def character_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer of one token per character, with `<pad>` and `<eos>`."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int = 128, layers: int = 4, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Make a Llama of random weights: 128 wide and 4 deep is the task's teacher, 48 by 2 its student."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": INITIALIZER_RANGE,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def addition_rows(count: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Make `count` different problems (all 10 000 by default) with right answers, in an order fixed by `seed`."""
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in _shuffled_pairs(seed)[:count]]


@functools.cache
def _shuffled_pairs(seed: int) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    return pairs


# How questions with written-out steps are put to a model that knows no letters.
RATIONALE_PROMPTS: dict[str, Any] = {
    "label_prompt": "={question}=",
    "rationale_prompt": "+{question}=",
    "chain_prompt": "{question}=",
    "chain_completion": "{rationale}=={answer}",
    "answer_formats": [r"regex:==(\d+)"],
}


def addition_rationales(count: int | None = None, seed: int = 0) -> Dataset:
    """Write problems with their steps, digit by digit, and with a slip in one: 7+8=15=3+5+1=9 for 37+58."""
    from datasets import Dataset

    return Dataset.from_list([_with_steps(row["prompt"].rstrip("=")) for row in addition_rows(count, seed)])


def _with_steps(question: str) -> dict[str, str]:
    (a, b), (c, d) = (divmod(int(number), 10) for number in question.split("+"))

    def steps(units: int, carry: int) -> tuple[str, str]:
        tens = a + c + carry
        return f"{b}+{d}={units}={a}+{c}+{carry}={tens}", str(10 * tens + units % 10)

    rationale, answer = steps(b + d, (b + d) // 10)
    wrong_rationale, wrong_answer = steps(b + d, 1 - (b + d) // 10)
    task = "carry" if b + d > 9 else "plain"
    return {
        "question": question,
        "answer": answer,
        "rationale": rationale,
        "wrong_rationale": wrong_rationale,
        "wrong_answer": wrong_answer,
        "task": task,
    }


def addition_dataset(count: int | None = None, seed: int = 0) -> Dataset:
    """Return `addition_rows` as a prompt-completion dataset."""
    from datasets import Dataset

    return Dataset.from_list(addition_rows(count, seed))


def fit_on_gold(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    output_dir: str = "runs/addition",
) -> None:
    """Train by cross-entropy on right answers: how the task's teacher learns, and its students' baseline."""
    from datasets import Dataset
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from .data.collator import DistillCollator
    from .data.tokenization import prepare_dataset

    args = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.1,
        adam_beta2=ADAM_BETA2,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    data = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=32)
    collator = DistillCollator(tokenizer.pad_token_id)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.no_grad()
def addition_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> float:
    """Measure the share of problems answered rightly by greedy decoding."""
    was_training = model.training
    model.eval()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, return_token_type_ids=False)
    tokenizer.padding_side = side
    output = model.generate(**batch.to(model.device), max_new_tokens=5, do_sample=False)
    model.train(was_training)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a.replace(" ", "") == row["completion"] for a, row in zip(answers, rows, strict=True)) / len(rows)
