"""GKD: its settings, its trainer, and what only it needs."""

from .config import GKDConfig
from .trainer import GKDTrainer
