"""What the axes of an architecture's weights stand for: which of them shrink with the width of what.

A weight is known by its role, its name without the layer's number. A `Linear` stores `[out, in]`, GPT-2 `[in, out]`.
What is not in these tables is refused by name: nothing is cut by guessing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..exceptions import ConfigurationError

HIDDEN = "hidden"  # channels of the residual stream
UNITS = "units"  # inner units of a feed-forward layer
GATED_UNITS = "gate and up"  # two blocks of units in one weight
HEADS = "query heads"  # times head_dim
GROUPS = "key-value heads"  # times head_dim
FUSED_HEADS = "query, key and value heads"
EXPERTS = "experts"
OWN = "own"  # vocabulary, positions, head_dim: kept whole

_IN_A_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Family:
    """The weights of one architecture.

    Args:
        axes: by role, what each axis of a weight is; a bias has the axis of what its product gives.
        norms: roles of norms over hidden channels.
        units_read_by: the product whose input are a feed-forward layer's units; none in a mixture.
        heads_read_by: the product whose input are the outputs of all heads.
        router: what gives the weights of experts.
        gain_offset: what a norm adds to its weight (Gemma: 1).
        scales_embedding: embeddings are multiplied by the root of the width (Gemma).
        centres: norms subtract the mean over channels (LayerNorm).
        width_is_heads: the width is heads times head_dim, and its config has no head_dim (GPT-2).
        output_axis: of a stored product.
        names: settings that its config calls otherwise.
    """

    axes: Mapping[str, tuple[str, ...]]
    norms: frozenset[str]
    units_read_by: str = "mlp.down_proj"
    heads_read_by: str = "self_attn.o_proj"
    router: str = ""
    gain_offset: float = 0.0
    scales_embedding: bool = False
    centres: bool = False
    width_is_heads: bool = False
    output_axis: int = 0
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def writers(self) -> frozenset[str]:
        """Roles of what adds to the residual stream; a mixture as a whole."""
        return frozenset({"embed_tokens", "wte", "wpe", self.heads_read_by, self.units_read_by or "mlp"})

    def axes_of(self, name: str, dims: int) -> tuple[int | None, str, tuple[str, ...]]:
        """Return layer, role and axes of the parameter of this name.

        Raises:
            ConfigurationError: the table does not know it.
        """
        layer, role = place_of(name.removesuffix(".weight").removesuffix(".bias"))
        axes = (HIDDEN,) if role in self.norms else self.axes.get(role)
        if axes is not None and name.endswith(".bias"):
            axes = (axes[self.output_axis],)
        if axes is None or len(axes) != dims:
            raise ConfigurationError(
                f"Got a model with the weight {name!r}, which its architecture as we know it does not have; expected "
                "the one of transformers. Its width cannot be cut; keep its width, or use a ready-made student."
            )
        return layer, role, axes


def place_of(name: str) -> tuple[int | None, str]:
    """Return the layer that a module is in, if it is in one, and its role."""
    inside = _IN_A_LAYER.search(name)
    return (int(inside[1]), inside[2]) if inside else (None, name.rpartition(".")[2])


def family_of(config: Any) -> Family:
    """Return the table of a model's architecture.

    Raises:
        ConfigurationError: there is none.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigurationError(
            f"Got a model of the architecture {config.model_type!r}, whose weights are not known here; expected one of "
            f"{', '.join(sorted(FAMILIES))}. Keep its width and choose layers alone (`keep_layers`), or use a "
            "ready-made student."
        )
    return family


_ENDS = {"embed_tokens": (OWN, HIDDEN), "lm_head": (OWN, HIDDEN)}
_ATTENTION = {
    "self_attn.q_proj": (HEADS, HIDDEN),
    "self_attn.k_proj": (GROUPS, HIDDEN),
    "self_attn.v_proj": (GROUPS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS),
}
_HEAD_NORMS = {"self_attn.q_norm": (OWN,), "self_attn.k_norm": (OWN,)}
_GATED = {"mlp.gate_proj": (UNITS, HIDDEN), "mlp.up_proj": (UNITS, HIDDEN), "mlp.down_proj": (HIDDEN, UNITS)}
_MIXTURE = {
    "mlp.gate": (EXPERTS, HIDDEN),
    "mlp.experts.gate_up_proj": (EXPERTS, OWN, HIDDEN),
    "mlp.experts.down_proj": (EXPERTS, HIDDEN, OWN),
}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": (OWN, HIDDEN),
    "mlp.shared_expert.up_proj": (OWN, HIDDEN),
    "mlp.shared_expert.down_proj": (HIDDEN, OWN),
    "mlp.shared_expert_gate": (OWN, HIDDEN),
}
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "norm"})
_FOUR_NORMS = _NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}

_LLAMA = Family({**_ENDS, **_ATTENTION, **_GATED}, _NORMS)
_QWEN3 = Family({**_ENDS, **_ATTENTION, **_HEAD_NORMS, **_GATED}, _NORMS)
_MIXTRAL = Family(
    {**_ENDS, **_ATTENTION, **_MIXTURE},
    _NORMS,
    units_read_by="",
    router="mlp.gate",
    names={"num_experts": "num_local_experts"},
)
_QWEN2_MOE = Family({**_ENDS, **_ATTENTION, **_MIXTURE, **_SHARED_EXPERT}, _NORMS, units_read_by="", router="mlp.gate")
_QWEN3_MOE = Family({**_ENDS, **_ATTENTION, **_HEAD_NORMS, **_MIXTURE}, _NORMS, units_read_by="", router="mlp.gate")
_GEMMA = Family({**_ENDS, **_ATTENTION, **_GATED}, _NORMS, gain_offset=1.0, scales_embedding=True)
_GEMMA2 = Family({**_ENDS, **_ATTENTION, **_GATED}, _FOUR_NORMS, gain_offset=1.0, scales_embedding=True)
_GEMMA3 = Family({**_ENDS, **_ATTENTION, **_HEAD_NORMS, **_GATED}, _FOUR_NORMS, gain_offset=1.0, scales_embedding=True)
_GPT2 = Family(
    {
        "wte": (OWN, HIDDEN),
        "wpe": (OWN, HIDDEN),
        "lm_head": (OWN, HIDDEN),
        "attn.c_attn": (HIDDEN, FUSED_HEADS),
        "attn.c_proj": (HEADS, HIDDEN),
        "mlp.c_fc": (HIDDEN, UNITS),
        "mlp.c_proj": (UNITS, HIDDEN),
    },
    frozenset({"ln_1", "ln_2", "ln_f"}),
    units_read_by="mlp.c_proj",
    heads_read_by="attn.c_proj",
    centres=True,
    width_is_heads=True,
    output_axis=-1,
    names={"intermediate_size": "n_inner"},
)
_PHI = Family(
    {
        **_ENDS,
        **{role: axes for role, axes in _ATTENTION.items() if axes[0] != HIDDEN},
        "self_attn.dense": (HIDDEN, HEADS),
        "self_attn.q_layernorm": (OWN,),
        "self_attn.k_layernorm": (OWN,),
        "mlp.fc1": (UNITS, HIDDEN),
        "mlp.fc2": (HIDDEN, UNITS),
    },
    frozenset({"input_layernorm", "final_layernorm"}),
    units_read_by="mlp.fc2",
    heads_read_by="self_attn.dense",
    centres=True,
)
_PHI3 = Family(
    {
        **_ENDS,
        "self_attn.qkv_proj": (FUSED_HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS),
        "mlp.gate_up_proj": (GATED_UNITS, HIDDEN),
        "mlp.down_proj": (HIDDEN, UNITS),
    },
    _NORMS,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "phi": _PHI,
    "phi3": _PHI3,
}
