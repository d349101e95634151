"""One trainer per method, all on the same path; `METHODS` maps a recipe's `method` to its config and trainer."""

from .base import DistillTrainer
from .config import DistillConfig
from .dpkd import DPKDConfig, DPKDTrainer
from .gkd import GKDConfig, GKDTrainer
from .minillm import MiniLLMConfig, MiniLLMTrainer
from .rationale import RationaleConfig, RationaleTrainer

METHODS: dict[str, tuple[type[DistillConfig], type[DistillTrainer]]] = {
    "gkd": (GKDConfig, GKDTrainer),
    "minillm": (MiniLLMConfig, MiniLLMTrainer),
    "dpkd": (DPKDConfig, DPKDTrainer),
    "rationale": (RationaleConfig, RationaleTrainer),
}
