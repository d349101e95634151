"""Rationales: chains of thought as data. Prompts, parsing, verification, edit distance, pairs; no model, no torch."""

from ..answers.edit_distance import Edits, edit_distance, edits, key_tokens
from ..answers.formats import FORMATS, Parsed, parse_response
from ..answers.verify import ANSWER_KINDS, Verdict, majority_answer, verify_answer

__all__ = [
    "FORMATS",
    "ANSWER_KINDS",
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
