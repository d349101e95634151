"""The prompts that the recipes of SmolLM2 train on and are judged by: whole rows, none twice, none on both sides."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "recipes/smollm2-135m"
TRAIN = {"prompts_train.jsonl": 282, "prompts_demo_train.jsonl": 1450}  # and how many there are at least


def _prompts(name):
    rows = [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert set(row) == {"prompt", "topic"} and row["topic"].strip()
        (message,) = row["prompt"]
        assert message["role"] == "user" and set(message) == {"role", "content"}
        assert message["content"] == message["content"].strip() != ""
    return [row["prompt"][0]["content"] for row in rows]


def _words(text):
    return re.findall(r"[\w']+", text.lower())


def _four_grams(text):
    words = _words(text)
    return set(zip(words, words[1:], words[2:], words[3:], strict=False))


@pytest.mark.parametrize("name", TRAIN)
def test_prompts_to_train_on_share_nothing_with_those_held_out(name):
    prompts, held_out = _prompts(name), _prompts("prompts_heldout.jsonl")
    assert len(prompts) >= TRAIN[name] and len(held_out) == 48
    seen = set().union(*map(_four_grams, held_out))
    assert [prompt for prompt in prompts if _four_grams(prompt) & seen] == []
    judged = [set(_words(prompt)) for prompt in held_out]
    for prompt in prompts:  # those of three words have no 4-gram
        words = set(_words(prompt))
        assert max(len(words & other) / len(words | other) for other in judged) <= 0.5, prompt


def test_no_prompt_to_train_on_comes_twice():
    """The same words in another order are the same prompt, too."""
    bags = Counter(" ".join(sorted(_words(prompt))) for name in TRAIN for prompt in _prompts(name))
    assert [words for words, times in bags.items() if times > 1] == []
