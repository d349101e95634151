"""All pages and code blocks of the documentation, and a folder in which their examples find the models they name.

A test that takes `page` runs for every page, one that takes `<language>_block` for every code block of that language.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config

from distill_trainers.toy import tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [
    ROOT / "accelerate_configs/README.md",
    ROOT / "benchmarks/README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("recipes/*/README.md")),
]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
LANGUAGES = ("python", "bash", "yaml", "json", "diff", "")  # how each is checked is said in test_blocks.py


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in FENCE.finditer(text)]


def pytest_generate_tests(metafunc):
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    for name in metafunc.fixturenames:
        if name.endswith("_block"):
            language = name.removesuffix("_block").replace("plain", "")
            found = [block for page in PAGES for block in blocks_of(page) if block.language == language]
            metafunc.parametrize(name, found, ids=lambda block: block.where)


@pytest.fixture(scope="session")
def blocks():
    """`blocks(page)`: the fenced blocks of a page."""
    return blocks_of


@pytest.fixture(scope="session")
def languages():
    return LANGUAGES


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token per byte, with ChatML's template: any text, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


ANSWERED = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]} for i in range(8)
]
DATA = {
    "trl-lib/Capybara": ANSWERED,
    "my-org/prompts": [{"prompt": row["messages"][:1]} for row in ANSWERED],
    "my-org/answers": ANSWERED,
    "my-org/preferences": [{"prompt": f"{i} is", "chosen": " good", "rejected": " bad"} for i in range(8)],
    "data": [{"prompt": f"{i} is", "completion": " good"} for i in range(8)],
}
STUDENTS = ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "my-org/small", "runs/gkd")
TEACHERS = ("Qwen/Qwen2.5-7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "my-org/large", "runs/gkd/student_init")


@pytest.fixture
def world(tmp_path, monkeypatch, byte_tokenizer):
    """The working directory of an example: what it names by Hub id lies there as a folder, tiny."""
    for seed, (names, width) in enumerate([(STUDENTS, 16), (TEACHERS, 32)]):
        model = tiny_llama(byte_tokenizer, width, 1, seed=seed, max_position_embeddings=2048, tie_word_embeddings=False)
        with torch.no_grad():  # a number that all hidden states share, and that the head takes for the end: short texts
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.lm_head.weight[byte_tokenizer.eos_token_id, 0] = 1.0
        for name in names:
            model.save_pretrained(tmp_path / name)
            byte_tokenizer.save_pretrained(tmp_path / name)
    for name, rows in DATA.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    if not torch.cuda.is_available():  # examples are written for GPUs; CPUs have bf16 too, but have to ask for it
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
