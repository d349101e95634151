"""How far k sampled answers to one question agree, and whether the most frequent of them is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..answers.verify import group_answers, majority_of, verify_answer
from .intervals import Sums


@dataclass(frozen=True)
class Agreed:
    """Of one question: the share of samples that give its most frequent answer, and whether the majority is right."""

    share: float
    right: bool


def agree(answers: Sequence[str | None], reference: str, kind: str = "auto", choices: Sequence[str] = ()) -> Agreed:
    """Vote: samples without an answer agree with nothing; a tie has no majority (Wang et al., 2203.11171).

    Args:
        answers: parsed from k samples, None where one gives none.
        kind: how answers are compared, see `verify_answer`.
    """
    groups = group_answers(answers, kind, choices or None)
    right = verify_answer(majority_of(groups), reference, kind, choices or None).right
    return Agreed(len(groups[0]) / len(answers) if groups else 0.0, right)


def consistency_sums(agreed: Sequence[Agreed]) -> dict[str, Sums]:
    """Return means over questions."""
    ones = [1.0] * len(agreed)
    return {
        "consistency": Sums.of_means([question.share for question in agreed], ones),
        "majority_accuracy": Sums.of_means([float(question.right) for question in agreed], ones),
    }
