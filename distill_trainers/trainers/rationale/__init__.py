"""Rationale: its settings, its trainer, and what only it needs."""

from .config import RationaleConfig
from .trainer import RationaleTrainer
