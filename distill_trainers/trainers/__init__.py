"""One trainer per method, all on the same path; `METHODS` maps a recipe's `method` to its config and trainer."""

from .base import DistillTrainer
from .config import DistillConfig
from .gkd import GKDConfig, GKDTrainer

METHODS: dict[str, tuple[type[DistillConfig], type[DistillTrainer]]] = {"gkd": (GKDConfig, GKDTrainer)}

__all__ = ["METHODS", "DistillConfig", "DistillTrainer", "GKDConfig", "GKDTrainer"]
