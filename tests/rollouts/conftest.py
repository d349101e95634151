"""Tiny models of several kinds, prompts of several lengths."""

from __future__ import annotations

import pytest
import torch
import transformers

COMMON = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
GROUPED = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "sliding mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "hybrid gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, sliding_window=5, attn_implementation="eager", tie_word_embeddings=False
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.fixture(scope="session")
def make_model():
    """`make_model(kind, seed)`: a random model in eval mode."""

    def make(kind="llama", seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()

    return make


@pytest.fixture(scope="session")
def config_of():
    """`config_of(sampling, rows)`: how transformers itself is told the same, for a head of so many rows."""

    def make(sampling, vocab_rows):
        settings = {}
        if sampling.suppress_from is not None and sampling.suppress_from < vocab_rows:
            settings["suppress_tokens"] = list(range(sampling.suppress_from, vocab_rows))
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            settings |= {"min_p": sampling.min_p} if sampling.min_p else {}
        return transformers.GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=sampling.eos_token_ids or None,
            pad_token_id=sampling.pad_token_id,
            repetition_penalty=float(sampling.repetition_penalty),
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            **settings,
        )

    return make


@pytest.fixture(scope="session")
def pad_left():
    """`pad_left(prompts)`: ids and mask `[B, P]`; the padding id is one that also stands in prompts."""

    def pad(prompts, pad_id=3):
        width = max(map(len, prompts)) + 2
        ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids), torch.tensor(mask)

    return pad


@pytest.fixture(scope="session")
def prompts():
    """24 prompts of 1 to 12 tokens."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 13, (24,), generator=draw).tolist()
    return [torch.randint(1, 24, (length,), generator=draw).tolist() for length in lengths]
