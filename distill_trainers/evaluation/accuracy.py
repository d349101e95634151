"""Accuracy on questions: greedy answers of a student, parsed and compared with references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..answers.formats import clean, find_format, parse_response
from ..answers.verify import verify_answer
from ..exceptions import DatasetError
from ..randomness import Stream
from ..rollouts import DecodeEngine, RolloutEngine, SamplingSettings
from ..rollouts.sampling import pad_left
from .intervals import Sums

Parse = Callable[[str], str | None]
FIRST_LINE = "first_line"


@dataclass(frozen=True)
class Question:
    """A question as token ids, and what is known about its answer."""

    prompt_ids: list[int]
    reference: str
    task: str = ""
    choices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What a student wrote for a question: its text, the answer parsed from it, its length in tokens, the verdict."""

    text: str
    answer: str | None
    tokens: int
    reason: str


def whole_text(text: str) -> str | None:
    """Return the first line of a text as its answer, for students that write nothing else."""
    return clean(text.strip().split("\n", 1)[0]) or None


def stated_answer(formats: Sequence[str] = ()) -> Parse:
    """Return the answer that a chain of thought ends in, in one of the given formats."""
    return lambda text: parse_response(text, formats).answer


def answer_parser(formats: Sequence[str] = ()) -> Parse:
    """Read the answer in one of `formats`; behind or without others, `first_line` takes the first line of the text.

    Raises:
        ConfigurationError: an unknown format.
    """
    named = [name for name in formats if name != FIRST_LINE]
    for name in named:
        find_format(name)
    if len(named) == len(formats):
        return stated_answer(named)
    return lambda text: (stated_answer(named)(text) if named else None) or whole_text(text)


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    sampling: SamplingSettings,
    *,
    stream: Stream | None = None,
    parse: Parse = whole_text,
    kind: str = "auto",
    batch_size: int = 32,
    engine: RolloutEngine | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> list[Answer]:
    """Answer this process's share; all processes run equally many batches, as a sharded model needs.

    Args:
        model: ready to generate (see `models.generating`).
        sampling: greedy (`temperature` 0), unless the accuracy of samples is wanted.
        stream: of the random numbers of samples; each question has its own within it.
        parse: the answer in a text.
        kind: how answers are compared, see `verify_answer`.

    Returns:
        answers to `questions[i]` for i = rank, rank + world, … in this order.
    """
    if not questions:
        raise DatasetError("Got no questions to answer; expected at least one row with a question and an answer.")
    engine = engine or DecodeEngine(tokenizer)
    places_of_rank = list(range(rank, len(questions), world))
    order = sorted(places_of_rank, key=lambda i: -len(questions[i].prompt_ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    turns = math.ceil(math.ceil(len(questions) / world) / batch_size)
    answers: dict[int, Answer] = {}
    for turn in tqdm(range(turns), desc="Answering", disable=not progress or rank != 0):
        places = batches[turn] if turn < len(batches) else [0]  # of no use, but others may wait for it
        prompts = [questions[place].prompt_ids for place in places]
        ids, mask = pad_left(prompts, sampling.pad_token_id, device)
        streams = None if stream is None else [stream.at(question=place) for place in places]
        completions = engine.generate(model, ids, mask, sampling, streams)
        if turn < len(batches):
            for place, completion in zip(places, completions, strict=True):
                answers[place] = judge(questions[place], completion, tokenizer, parse, kind)
    return [answers[place] for place in places_of_rank]


def accuracy_sums(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """Return what `accuracy_metrics` needs, as sums that may be added over processes."""
    sums: Counter[str] = Counter(questions=0, right=0, answered=0, tokens=0)
    for question, answer in zip(questions, answers, strict=True):
        right = answer.reason == "right"
        sums.update(questions=1, right=right, answered=answer.answer is not None, tokens=answer.tokens)
        if question.task:
            sums.update({f"questions/{question.task}": 1, f"right/{question.task}": right})
    return dict(sums)


def accuracy_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Return accuracy (share of questions; without an answer: wrong), answered, tokens_per_answer, and by task."""
    total = max(sums["questions"], 1)
    metrics = {
        "accuracy": sums["right"] / total,
        "answered": sums["answered"] / total,
        "tokens_per_answer": sums["tokens"] / total,
    }
    tasks = sorted(name.removeprefix("questions/") for name in sums if name.startswith("questions/"))
    if len(tasks) > 1:
        metrics |= {f"accuracy_{t}": sums.get(f"right/{t}", 0) / max(sums[f"questions/{t}"], 1) for t in tasks}
    return metrics


def accuracy_by_question(answers: Sequence[Answer]) -> dict[str, Sums]:
    """Score `accuracy`, `answered` and `tokens_per_answer` over questions."""
    ones = [1.0] * len(answers)
    return {
        "accuracy": Sums.of_means([float(answer.reason == "right") for answer in answers], ones),
        "answered": Sums.of_means([float(answer.answer is not None) for answer in answers], ones),
        "tokens_per_answer": Sums.of_means([float(answer.tokens) for answer in answers], ones),
    }


def judge(question: Question, completion: list[int], tokenizer: Any, parse: Parse, kind: str) -> Answer:
    """Tell what `completion` answers to `question`, and whether that is right."""
    text = tokenizer.decode(completion, skip_special_tokens=True)
    answer = parse(text)
    verdict = verify_answer(answer, question.reference, kind, question.choices or None)
    return Answer(text, answer, len(completion), verdict.reason)
