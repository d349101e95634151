"""MiniLLM: its settings, its trainer, and what only it needs."""

from .config import MiniLLMConfig
from .trainer import MiniLLMTrainer
