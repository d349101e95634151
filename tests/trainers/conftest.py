"""A toy whose texts can be enumerated."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def toy():
    """A tokenizer of three tokens (padding, EOS and "a"), and a function for models of it in float64, by seed."""
    backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

    def make(seed):
        # Llama's norm rounds to float32, and its gradients with it.
        sizes = {"vocab_size": 3, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "eos_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.6)).double().eval()

    return tokenizer, make
