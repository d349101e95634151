"""Datasets of any layout to batches of prompts and completions."""

from distill_trainers.data.collator import DistillCollator, replace_completions, unpadded_prompts
from distill_trainers.data.formats import DatasetType, apply_column_mapping, detect_dataset_type
from distill_trainers.data.loading import load_split, train_eval_split
from distill_trainers.data.pairs import PairCollator, join_pairs, prepare_pairs
from distill_trainers.data.tokenization import prepare_dataset, tokenize_row, truncate

__all__ = [
    "DatasetType",
    "DistillCollator",
    "PairCollator",
    "apply_column_mapping",
    "detect_dataset_type",
    "join_pairs",
    "load_split",
    "prepare_dataset",
    "prepare_pairs",
    "replace_completions",
    "tokenize_row",
    "train_eval_split",
    "truncate",
    "unpadded_prompts",
]
