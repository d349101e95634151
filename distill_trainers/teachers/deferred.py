"""A local teacher that is loaded when it is first asked, and may leave the memory in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .local import LocalTeacher

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class DeferredTeacher(LocalTeacher):
    """Everything that a `LocalTeacher` is, for runs that have most of its answers already.

    Args:
        load: gives the model; called at the first question, and again after `release`.
        config: of the model, known without its weights.
        name: for logs and the model card.
        placement: as of `LocalTeacher`.
    """

    def __init__(self, load: Callable[[], nn.Module], config: Any, name: str, placement: str = "auto"):
        self.name = name
        self.placement = placement
        self._config = config
        self._load = load
        self._live: LocalTeacher | None = None
        self._accelerator: Accelerator | None = None
        self._fused: bool | None = None

    @property
    def config(self) -> Any:
        return self._config

    @property
    def is_live(self) -> bool:
        """Whether the model is in memory."""
        return self._live is not None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read only
        return self._whole().model

    def _whole(self) -> LocalTeacher:
        if self._live is None:
            logger.info("Loading the teacher %s.", self.name)
            self._live = LocalTeacher(self._load(), self.name, self.placement)
            if self._accelerator is not None:
                self._live.prepare(self._accelerator)
        return self._live

    def prepare(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        if self._live is not None:
            self._live.prepare(accelerator)

    def release(self) -> None:
        """Let the model go until it is asked again."""
        self._live = None

    def fingerprint(self) -> str:
        return self._whole().fingerprint()
