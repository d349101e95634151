"""Measures of a student, alone and against its teacher."""

from .agreement import agreement_metrics, agreement_terms

__all__ = ["agreement_metrics", "agreement_terms"]
