"""Sizes of a model, read from the model on the meta device: its layers are built, its weights never are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import models


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on. Counts are of parameters, widths of units.

    Attributes:
        trainable: parameters that get a gradient: all, or an adapter's.
        layer: parameters of the largest decoder layer.
        linear: weights of linear layers but the head: what quantisation makes small.
        head: parameters of the output head, `[V, D]`; the same as the embedding's where `tied`.
        hidden, vocab: D and V.
        attended, kept: units of all query heads, and of the key heads, of one layer.
        intermediate: units between the linear layers of an MLP.
        gated: whether the MLP has a gate (SwiGLU and its like).
        norms_queries: whether queries and keys are normalised.
        absolute_positions: whether positions are looked up in a table, which ends.
        context: positions that the model was made for; None if it does not say.
    """

    parameters: int
    trainable: int
    layers: int
    layer: int
    linear: int
    head: int
    tied: bool
    hidden: int
    vocab: int
    attended: int
    kept: int
    intermediate: int
    gated: bool
    norms_queries: bool = False
    head_trains: bool = True
    absolute_positions: bool = False
    context: int | None = None

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding that are not the head's."""
        return 0 if self.tied else self.vocab * self.hidden


def shape_of(model: nn.Module) -> ModelShape:
    """Read the sizes of a causal LM (or of a PeftModel around one), on whatever device it is."""
    causal_lm: Any = models.causal_lm_of(model)
    text = causal_lm.config.get_text_config(decoder=True)
    embedding = causal_lm.get_input_embeddings()
    embedded = getattr(embedding, "base_layer", embedding).weight
    head = models.head_module_of(causal_lm)
    head = embedding if head is None else head  # of the same size, where the model does not name its head
    weight: Any = getattr(head, "base_layer", head).weight
    stacks = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    stack = max(stacks, key=models.num_parameters, default=nn.ModuleList())
    layers = int(text.num_hidden_layers)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    names = {name.rpartition(".")[2] for name, _ in causal_lm.named_modules()}
    linear = sum(m.weight.numel() for m in causal_lm.modules() if _is_linear(m) and m.weight is not weight)
    return ModelShape(
        parameters=models.num_parameters(model),
        trainable=models.num_parameters(model, trainable_only=True),
        layers=layers,
        layer=max((models.num_parameters(layer) for layer in stack), default=0),
        linear=linear,
        head=weight.numel(),
        tied=weight is embedded,
        hidden=int(text.hidden_size),
        vocab=int(weight.shape[0]),
        attended=heads * width,
        kept=int(getattr(text, "num_key_value_heads", None) or heads) * width,
        intermediate=_intermediate(text),
        gated=bool({"gate_proj", "gate_up_proj", "wi_0"} & names),
        norms_queries="q_norm" in names,
        head_trains=any(p.requires_grad for p in head.parameters()),
        absolute_positions=models.looks_positions_up(causal_lm),
        context=models.positions_of(causal_lm.config),
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2 calls its linear layers that


def _intermediate(text: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim", "d_ff"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 4 * int(text.hidden_size)
