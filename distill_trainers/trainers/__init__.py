"""One trainer per method, all on the same path; `METHODS` maps a recipe's `method` to its config and trainer."""

from .base import DistillTrainer
from .config import DistillConfig
from .gkd import GKDConfig, GKDTrainer
from .minillm import MiniLLMConfig, MiniLLMTrainer

METHODS: dict[str, tuple[type[DistillConfig], type[DistillTrainer]]] = {
    "gkd": (GKDConfig, GKDTrainer),
    "minillm": (MiniLLMConfig, MiniLLMTrainer),
}

__all__ = [
    "METHODS",
    "DistillConfig",
    "DistillTrainer",
    "GKDConfig",
    "GKDTrainer",
    "MiniLLMConfig",
    "MiniLLMTrainer",
]
