"""The balance term of mixtures of experts, which a model adds to its own loss where its config asks for it.

    loss = … + router_aux_loss_coef · aux_loss,   aux_loss = E · Σ_e f_e · P_e   (Switch Transformers, arXiv 2101.03961)

with f_e the share of tokens that expert e of E gets and P_e its mean probability, over all layers; padding is left out
where there is a mask (packed rows have none).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .adapters import causal_lm_of

AUX_LOSS = "aux_loss"  # as transformers' outputs and TRL's logs call it


def balance_coefficient(model: nn.Module) -> float:
    """Return the factor of the balance term in the model's own loss, 0 where its config does not ask for the term.

    The config asks by `output_router_logits: true` and a `router_aux_loss_coef` above 0, as in transformers' `Trainer`.
    """
    causal_lm, config = causal_lm_of(model), _text_config(model)
    if not getattr(config, "output_router_logits", False):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the latter in JetMoe
    found = (getattr(owner, name, None) for owner in (causal_lm, config) for name in names)
    return float(next((value for value in found if value is not None), 0.0))


@contextlib.contextmanager
def without_router_logits(model: nn.Module) -> Iterator[None]:
    """Let no balance term be computed, within it.

    transformers computes it at each generated token, of one token and a mask of all those before it, and fails.
    """
    config = _text_config(model)
    before = getattr(config, "output_router_logits", False)
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(causal_lm_of(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
