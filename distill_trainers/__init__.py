"""distill_trainers: train small language models on what large ones know.

Shape suffixes used in the package: B rows of a batch, T positions, N trained tokens, n tokens of a chunk, D hidden
size, V vocabulary, P prompt positions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "GKDConfig": "trainers.gkd",
    "GKDTrainer": "trainers.gkd",
    "MiniLLMConfig": "trainers.minillm",
    "MiniLLMTrainer": "trainers.minillm",
    "DPKDConfig": "trainers.dpkd",
    "DPKDTrainer": "trainers.dpkd",
    "RationaleConfig": "trainers.rationale",
    "RationaleTrainer": "trainers.rationale",
    "RewardSettings": "trainers.rewarded.settings",
    "RewardedTrainer": "trainers.rewarded.trainer",
    "DistillConfig": "trainers.config",
    "DistillTrainer": "trainers.base",
    "CachedTeacher": "teachers",
    "LocalTeacher": "teachers",
    "Teacher": "teachers",
    "make_student": "students",
    "prune": "students",
    "import_gguf": "gguf",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .gguf import import_gguf
    from .students import make_student, prune
    from .teachers import CachedTeacher, LocalTeacher, Teacher
    from .trainers.base import DistillTrainer
    from .trainers.config import DistillConfig
    from .trainers.dpkd import DPKDConfig, DPKDTrainer
    from .trainers.gkd import GKDConfig, GKDTrainer
    from .trainers.minillm import MiniLLMConfig, MiniLLMTrainer
    from .trainers.rationale import RationaleConfig, RationaleTrainer
    from .trainers.rewarded.settings import RewardSettings
    from .trainers.rewarded.trainer import RewardedTrainer


def __getattr__(name: str) -> Any:
    """Import on first use: the package itself imports in milliseconds."""
    if name not in _EXPORTS:
        if "Train" in name or "Conf" in name:
            from .trl_names import class_instead

            # Not an AttributeError: `from … import` puts words of its own in place of those.
            raise ImportError(f"{__name__} has no {name}. {class_instead(name, __all__)}", name=__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
