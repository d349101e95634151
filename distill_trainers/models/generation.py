"""The context in which a model generates, and where it ends."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..exceptions import ConfigurationError
from .adapters import causal_lm_of
from .compiling import uncompiled
from .experts import without_router_logits
from .inputs import extra_inputs
from .positions import looks_positions_up
from .probing import check_answers
from .quantizing import rounding_once

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


@contextlib.contextmanager
def generating(
    model: nn.Module, accelerator: Accelerator, gather: bool = True, who: str | None = "The student"
) -> Iterator[Any]:
    """Yield the unwrapped model, ready to generate: eval mode, KV cache on also under checkpointing.

    Args:
        gather: make weights whole for it in a ZeRO-3 launch; else they are gathered layer by layer at each token.
        who: the model is, for messages; None of one that is looked at elsewhere.

    Raises:
        ConfigurationError: see `check_can_generate` and `check_answers`.
    """
    from trl.models.utils import unwrap_model_for_generation

    check_can_generate(model)
    if who is not None:
        check_answers(model, who)
    was_training = model.training
    # Left on, TRL would switch checkpointing off and on again, and forget its settings.
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    model.eval()
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        # Compiled layers would be compiled anew for every kind of cache, and for the growing one of each layer.
        modes = uncompiled(), without_router_logits(model), torch.no_grad(), rounding_once(model)
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            with warnings.catch_warnings():  # TRL 1.16 asks by a name that transformers 5.23 has renamed
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                unwrapped = stack.enter_context(unwrap_model_for_generation(model, accelerator, gather))
            yield unwrapped
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        model.train(was_training)


def check_can_generate(model: nn.Module) -> None:
    """Refuse a model that is to write text and has no `generate`.

    Raises:
        ConfigurationError: what to do about it.
    """
    causal_lm = causal_lm_of(model)
    if not callable(getattr(causal_lm, "generate", None)):
        raise ConfigurationError(
            f"Got a {type(causal_lm).__name__}, which has no `generate`, where completions are to be sampled; expected "
            "a model that generates. Let its class inherit from `transformers.GenerationMixin`, or train on given "
            "completions (`lmbda: 0`, and no measures that sample)."
        )
    if _counts_positions_itself(causal_lm):
        raise ConfigurationError(
            f"Got a {type(causal_lm).__name__}, which counts the positions of its tokens by a rule of its own, where "
            "completions are to be sampled: behind prompts that are padded on the left it would write another text "
            "than the model's. Expected one that takes `position_ids` from 0, or knows positions by its "
            "`attention_mask`. Take another model, or train on given completions (`lmbda: 0`, and no measures that "
            "sample)."
        )


def _counts_positions_itself(causal_lm: Any) -> bool:
    """Tell whether neither mask nor `position_ids` say where a text begins.

    RoBERTa and its relatives count from behind the id of padding, BART and its relatives all places of a row. For both
    `generate` of transformers makes the mistake as well.
    """
    behind_padding = any(
        hasattr(module, "padding_idx") and isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
        for module in causal_lm.modules()
    )
    return behind_padding or ("position_ids" not in extra_inputs(causal_lm) and looks_positions_up(causal_lm))


def eos_ids(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a completion: the tokenizer's EOS and those of the generation config.

    Args:
        model: None where it runs elsewhere.
    """
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(of_tokenizer + ([] if model is None else generation_eos_ids(model))))


def generation_eos_ids(model: nn.Module) -> list[int]:
    """Return the tokens that end a completion by the model's generation config."""
    ids = getattr(getattr(causal_lm_of(model), "generation_config", None), "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
