"""Dual chains of thought: a right and a wrong chain for one question that differ in key steps (EDIT, arXiv 2405.19737).

D+ and D− are the teacher's right and wrong chains; D−+ are right chains for the questions of D−, written with the
answer as a hint; D+− are wrong versions of the chains of D+.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..answers.edit_distance import edit_distance
from ..storage import Record
from .prompts import chain_text


@dataclass(frozen=True)
class Chains:
    """The chains of one question, by how they were judged."""

    question: Record
    right: list[Record]
    wrong: list[Record]


def by_question(right: Sequence[Record], wrong: Sequence[Record]) -> list[Chains]:
    """Group chains by question (its text and its choices), in order of appearance."""
    groups: dict[tuple[str, ...], Chains] = {}
    for rows, name in ((right, "right"), (wrong, "wrong")):
        for row in rows:
            key = (row["question"], *(row.get("choices") or ()))
            getattr(groups.setdefault(key, Chains(row, [], [])), name).append(row)
    return list(groups.values())


def pair(right: Mapping[str, Any], wrong: Mapping[str, Any], source: str) -> Record:
    """Make a row of the layout `rationale` with its wrong twin.

    Args:
        right, wrong: rows with `rationale` and `parsed_answer`.
        source: where both come from, such as `D+/D-`.
    """
    shared = {name: right[name] for name in ("question", "choices", "answer", "task", "id") if right.get(name)}
    row = shared | {
        "rationale": right["rationale"],
        "wrong_rationale": wrong["rationale"],
        "wrong_answer": wrong.get("parsed_answer") or "",
        "source": source,
    }
    row["word_edits"] = edit_distance(*_ids(row["rationale"], row["wrong_rationale"]))
    row["provenance"] = {"right": right.get("provenance"), "wrong": wrong.get("provenance")}
    return row


def closest(rights: Sequence[Record], wrong: Record) -> Record:
    """Return the right chain with the fewest word edits: the fewer differ, the more each of them is a key step."""
    return min(rights, key=lambda row: edit_distance(*_ids(row["rationale"], wrong["rationale"])))


def as_exemplar(row: Mapping[str, Any]) -> dict[str, Any]:
    """Show a pair as `contrastive_prompt` takes it."""
    shown = {"question": row["question"], "choices": row.get("choices")}
    shown["right"] = chain_text(row["rationale"], row["answer"])
    return shown | {"wrong": chain_text(row["wrong_rationale"], row["wrong_answer"])}


def _ids(first: str, second: str) -> tuple[list[int], list[int]]:
    numbers: dict[str, int] = {}
    one, two = ([numbers.setdefault(word, len(numbers)) for word in text.split()] for text in (first, second))
    return one, two
