"""One trainer per method, all on the same path; `METHODS` maps a recipe's `method` to its config and trainer."""

from .base import DistillTrainer
from .config import DistillConfig
from .dpkd import DPKDConfig, DPKDTrainer
from .gkd import GKDConfig, GKDTrainer
from .minillm import MiniLLMConfig, MiniLLMTrainer
from .protocol import METHODS
from .rationale import RationaleConfig, RationaleTrainer

METHODS["gkd"] = (GKDConfig, GKDTrainer)
METHODS["minillm"] = (MiniLLMConfig, MiniLLMTrainer)
METHODS["dpkd"] = (DPKDConfig, DPKDTrainer)
METHODS["rationale"] = (RationaleConfig, RationaleTrainer)
