"""Prompts that make a teacher write chains of thought: few-shot, with the answer as a hint, and contrastive.

A prompt is a list of chat messages; `as_text` writes the same for a base model. `VERSION` goes into the provenance of
every response: a changed wording never passes for the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..answers.formats import question_text
from ..exceptions import DatasetError
from .exemplars import EXEMPLARS, Exemplar

VERSION = "1"

Message = dict[str, str]

_COT = "Solve the problem step by step. End with a sentence of the form: The answer is X."
_HINT = (
    "You are given a problem and its answer. Explain step by step how the answer is reached. End with: The answer is X."
)
_CONTRAST = (
    "You are given a problem and a correct solution. Write a solution in the same style that goes wrong in one key "
    "step and so reaches another answer. End with: The answer is X."
)


def exemplars_of(source: str | Sequence[Mapping[str, Any]] | None, count: int) -> list[Exemplar]:
    """Return the first `count` of a built-in set (by name), or of given ones.

    Raises:
        DatasetError: an unknown name, or an exemplar without question, rationale or answer.
    """
    if source is None or isinstance(source, str):
        if (source or "arithmetic") not in EXEMPLARS:
            raise DatasetError(
                f"Got exemplars {source!r}; expected one of {', '.join(EXEMPLARS)}, or a file of rows with question, "
                "rationale and answer."
            )
        return EXEMPLARS[source or "arithmetic"][:count]
    for number, row in enumerate(source):
        missing = [name for name in ("question", "rationale", "answer") if not row.get(name)]
        if missing:
            raise DatasetError(f"Exemplar {number} has no {' and no '.join(missing)}; every one needs all three.")
    return [dict(row) for row in source][:count]


def chain_text(rationale: str, answer: Any) -> str:
    """Write a chain of thought as prompts show it and models are asked to write it."""
    return f"{rationale.strip()} The answer is {answer}."


def cot_prompt(item: Mapping[str, Any], exemplars: Sequence[Exemplar]) -> list[Message]:
    """Ask by few-shot chain of thought (Wei et al., arXiv 2201.11903)."""
    shots = [(_asked(exemplar), chain_text(exemplar["rationale"], exemplar["answer"])) for exemplar in exemplars]
    return _conversation(_COT, shots, _asked(item))


def hint_prompt(item: Mapping[str, Any], exemplars: Sequence[Exemplar]) -> list[Message]:
    """Ask by the same exemplars, answer first (EDIT, arXiv 2405.19737): how D− becomes D−+."""
    shots = [(_hinted(exemplar), chain_text(exemplar["rationale"], exemplar["answer"])) for exemplar in exemplars]
    return _conversation(_HINT, shots, _hinted(item))


def contrastive_prompt(
    item: Mapping[str, Any], rationale: str, pairs: Sequence[Mapping[str, Any]], exemplars: Sequence[Exemplar]
) -> list[Message]:
    """Ask for a wrong version of a right chain (EDIT, arXiv 2405.19737): how D+ becomes D+−.

    Args:
        rationale: the right chain, its answer included.
        pairs: dual chains of the data itself (right and wrong text, each with its answer), which come first; they show
            the mistakes that this teacher makes.
        exemplars: fill up to their own number.
    """
    shots = [(_shown(pair, pair["right"]), pair["wrong"]) for pair in pairs[: len(exemplars)]]
    for exemplar in [row for row in exemplars if row.get("wrong_rationale")][: len(exemplars) - len(shots)]:
        right = chain_text(exemplar["rationale"], exemplar["answer"])
        shots.append((_shown(exemplar, right), chain_text(exemplar["wrong_rationale"], exemplar["wrong_answer"])))
    return _conversation(_CONTRAST, shots, _shown(item, rationale))


def as_text(messages: Sequence[Message]) -> str:
    """Write a prompt for a model without a chat template: `Q:` and `A:` in turn, up to where an answer begins."""
    parts = []
    for message in messages:
        mark = {"user": "Q: ", "assistant": "A: "}.get(message["role"], "")
        parts.append(mark + message["content"])
    return "\n\n".join(parts).replace("\n\nA: ", "\nA: ") + "\nA:"


def _conversation(task: str, shots: Sequence[tuple[str, str]], question: str) -> list[Message]:
    messages = [{"role": "system", "content": task}]
    for user, assistant in shots:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*messages, {"role": "user", "content": question}]


def _asked(item: Mapping[str, Any]) -> str:
    return question_text(item["question"], item.get("choices"))


def _hinted(item: Mapping[str, Any]) -> str:
    return f"{_asked(item)}\nHint: the answer is {item['answer']}."


def _shown(item: Mapping[str, Any], right: str) -> str:
    return f"{_asked(item)}\nCorrect solution: {right}"
