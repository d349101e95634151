"""Measures of a student, alone and against its teacher."""

from .accuracy import Question, accuracy_metrics, accuracy_sums, answer_questions
from .agreement import agreement_metrics, agreement_terms

__all__ = [
    "Question",
    "accuracy_metrics",
    "accuracy_sums",
    "agreement_metrics",
    "agreement_terms",
    "answer_questions",
]
