"""Tiny random models of every architecture whose widths can be cut."""

from __future__ import annotations

import pytest
import torch
import transformers

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**BASE, "head_dim": 8}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
MIXTURE = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 48}
GPT2 |= {name: BASE[name] for name in ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")}

# By name: class without its ending, settings.
MODELS = {
    "llama": ("Llama", BASE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", BASE | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", BASE | {"sliding_window": 4}),
    "qwen2": ("Qwen2", BASE | {**SLIDING, "use_sliding_window": True, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", BASE | {"head_dim": 16}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA | {**SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", GEMMA | {**SLIDING, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2LMHead", GPT2),
    "phi": ("Phi", BASE | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", BASE | {"partial_rotary_factor": 1.0}),
    "mixtral": ("Mixtral", BASE | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", BASE | {**MIXTURE, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3Moe", BASE | MIXTURE),
}
DENSE = [name for name in MODELS if name not in ("mixtral", "qwen2-moe", "qwen3-moe")]
QUICK = ("llama", "gpt2", "gemma3", "phi3", "qwen3-moe")  # one of each kind; the others are slow ones
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS]
WITHOUT_A_MEAN = [each for each in EVERY if each.values[0] not in ("gpt2", "phi")]


def build(name: str):
    """A model whose every weight is drawn, norms and biases too."""
    kind, settings = MODELS[name]
    config_name = {"GPT2LMHead": "GPT2Config", "Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(transformers, config_name)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model" if kind.endswith("LMHead") else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def text_batch(seed: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return {"input_ids": ids, "attention_mask": mask if left else mask.flip(1)}
