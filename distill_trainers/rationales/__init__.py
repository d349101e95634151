"""Rationales: chains of thought as data. Prompts, parsing, verification, edit distance, pairs; no model, no torch."""

from .edit_distance import Edits, edit_distance, edits, key_tokens
from .formats import FORMATS, Parsed, parse_response
from .verify import KINDS, Verdict, majority_answer, verify_answer

__all__ = [
    "FORMATS",
    "KINDS",
    "Edits",
    "Parsed",
    "Verdict",
    "edit_distance",
    "edits",
    "key_tokens",
    "majority_answer",
    "parse_response",
    "verify_answer",
]
