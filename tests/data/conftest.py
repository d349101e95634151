"""The byte-level tokenizer in place of the character tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()
