"""Teachers that are adapters on one base, whose weights are in memory once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import models
from .self_teacher import AdapterOff

if TYPE_CHECKING:
    from accelerate import Accelerator


class SharedBase:
    """A frozen base model with adapters, which answers with one of them at a time.

    Args:
        model: the base, whole on each process.
        name: of the base, for messages.
        adapters: folders or Hub ids of PEFT adapters on it.
        placement: where `prepare` puts it.

    Raises:
        ConfigurationError: an adapter cannot be read, is not whole, or does not fit.
    """

    def __init__(self, model: nn.Module, name: str, adapters: list[str], placement: str = "replicate"):
        self.name, self.placement = name, "replicate" if placement == "auto" else placement
        self._adapters = {source: f"adapter_{k}" for k, source in enumerate(dict.fromkeys(adapters))}
        named = {adapter: source for source, adapter in self._adapters.items()}
        model = models.with_frozen_adapters(models.compiled_by_layer(model), named)
        self.model = models.install_token_forward(model)
        self.model.requires_grad_(False)
        self.model.eval()
        self._is_prepared = False

    def prepare(self, accelerator: Accelerator) -> None:
        """Place it, once for all its adapters."""
        if not self._is_prepared:
            self.model = models.prepare_frozen(self.model, accelerator, self.placement)
            self._is_prepared = True

    def teacher(self, adapter: str | None = None) -> AdapterTeacher:
        """Return the teacher that is one of its adapters, or the base alone."""
        return AdapterTeacher(self, None if adapter is None else self._adapters[adapter], adapter or self.name)


class AdapterTeacher(AdapterOff):
    """One adapter of a `SharedBase`, or the base without any: nothing more in memory."""

    _is_looked_at = True

    def __init__(self, base: SharedBase, adapter: str | None, name: str):
        super().__init__(_current(base), adapter)
        self.base, self.name, self.placement = base, name, base.placement

    def prepare(self, accelerator: Any) -> None:
        """Place the base, unless another adapter of it has."""
        super().prepare(accelerator)
        self.base.prepare(accelerator)


def _current(base: SharedBase) -> Callable[[], nn.Module]:
    return lambda: base.model
