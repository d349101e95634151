"""One trainer per method, all on the same path; `METHODS` maps a recipe's `method` to its config and trainer."""

from .base import DistillTrainer
from .config import DistillConfig
from .gkd import GKDConfig, GKDTrainer
from .rationale import RationaleTrainer
from .rationale_config import RationaleConfig

METHODS: dict[str, tuple[type[DistillConfig], type[DistillTrainer]]] = {
    "gkd": (GKDConfig, GKDTrainer),
    "rationale": (RationaleConfig, RationaleTrainer),
}

__all__ = [
    "METHODS",
    "DistillConfig",
    "DistillTrainer",
    "GKDConfig",
    "GKDTrainer",
    "RationaleConfig",
    "RationaleTrainer",
]
