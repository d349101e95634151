"""DPKD: its settings, its trainer, and what only it needs."""

from .config import DPKDConfig
from .trainer import DPKDTrainer
