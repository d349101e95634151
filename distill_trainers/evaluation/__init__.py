"""Measures of a student, alone and against its teacher."""

from .accuracy import Question, accuracy_metrics, accuracy_sums, answer_questions
from .agreement import agreement_metrics, agreement_terms, comparison_terms
from .measures import MEASURES, METRICS, Measure, higher_is_better
from .results import EvaluationResults
from .runner import evaluate_models
from .settings import EvaluationSettings

__all__ = [
    "MEASURES",
    "METRICS",
    "EvaluationResults",
    "EvaluationSettings",
    "Measure",
    "Question",
    "accuracy_metrics",
    "accuracy_sums",
    "agreement_metrics",
    "agreement_terms",
    "answer_questions",
    "comparison_terms",
    "evaluate_models",
    "higher_is_better",
]
