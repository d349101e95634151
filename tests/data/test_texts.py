"""Strings are tokenised as the one text that they are, by every kind of tokenizer and in every layout of rows."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from distill_trainers.cli.pairs import _prompts
from distill_trainers.data.pairs import prepare_pairs, rejected_row
from distill_trainers.data.rationales import RationaleTemplates, RationaleTokenizer, prepare_rationales
from distill_trainers.data.rows import tokenize_row
from distill_trainers.data.tokenization import prepare_dataset
from distill_trainers.evaluation.examples import read_examples
from distill_trainers.evaluation.settings import EvaluationSettings

CORPUS = [
    "2+2=4 3+4=7",
    "Question: what is it?\nAnswer: hello world\n\nAnswer: hello",
    "unhappy happy un :\n\n a b",
] * 5
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def _fast(model, trainer, pre, *, normalizer=None, single=None, **names):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.Metaspace() if isinstance(pre, pre_tokenizers.Metaspace) else decoders.ByteLevel()
    known = names or {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<|im_end|>", *known.values()]])
    if single:
        ids = [(part, backend.token_to_id(part)) for part in single.split() if part != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **known)


def _byte_bpe(*, prefix=False, single=None):
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return _fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=prefix), single=single)


def _metaspace_bpe(scheme, single="<s> $A"):
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL)
    model = models.BPE(unk_token="<unk>", fuse_unk=True)
    return _fast(model, trainer, pre_tokenizers.Metaspace(prepend_scheme=scheme), single=single)


def _unigram():
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    return _fast(models.Unigram(), trainer, pre_tokenizers.Metaspace(), single="$A </s>")


def _word_piece():
    names = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
    }
    trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=list(names.values()))
    pre, lower = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return _fast(models.WordPiece(unk_token="[UNK]"), trainer, pre, normalizer=lower, single="[CLS] $A [SEP]", **names)


class SlowTokenizer(PreTrainedTokenizer):
    """Characters, of which two newlines and `=4` are one token; no offsets."""

    def __init__(self, **kwargs):
        symbols = ["<unk>", "</s>", "\n\n", "=4", *sorted(set("".join(CORPUS)))]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        super().__init__(unk_token="<unk>", eos_token="</s>", pad_token="<unk>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **kwargs):
        symbols = []
        while text:
            size = 2 if text[:2] in self.ids else 1
            symbols.append(text[:size])
            text = text[size:]
        return symbols

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.ids)[index]


KINDS = {
    "byte BPE": _byte_bpe,
    "byte BPE with a space before": lambda: _byte_bpe(prefix=True, single="<s> $A </s>"),
    "byte BPE that adds BOS": lambda: _byte_bpe(single="<s> $A"),
    "Metaspace, always": lambda: _metaspace_bpe("always"),
    "Metaspace, first": lambda: _metaspace_bpe("first"),
    "Metaspace, never": lambda: _metaspace_bpe("never", single="<s> $A </s>"),
    "Unigram that adds EOS": _unigram,
    "WordPiece": _word_piece,
    "slow": SlowTokenizer,
    "slow bytes that add EOS": ByT5Tokenizer,
}
TEXTS = [
    ("2+2=", "4"),
    ("Question: what is it?\nAnswer: ", "hello world"),
    ("Question: what is it?\nAnswer:", " hello world"),
    ("Answer:\n", "\nhello"),
    ("un", "happy"),
    ("a", "b"),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]()


def whole_ids(tokenizer, text):
    """The tokenizer's own ids of a text, with EOS in place of what it puts behind."""
    ids = tokenizer(text)["input_ids"]
    if ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids = ids[:-1]
    return [*ids, tokenizer.eos_token_id]


def own_beginning(tokenizer, prompt, ids):
    """How many of `ids` the prompt has alone."""
    alone = whole_ids(tokenizer, prompt)[:-1]
    return next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))


@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_a_prompt_and_its_completion_are_one_text(kind, prompt, completion):
    row = tokenize_row({"prompt": prompt, "completion": completion}, kind, dataset_type="prompt_completion")
    right = whole_ids(kind, prompt + completion)
    assert row["input_ids"] == right
    assert row["prompt_length"] == own_beginning(kind, prompt, right)
    assert row["labels"] == [-100] * row["prompt_length"] + right[row["prompt_length"] :]


def test_llama_2_trains_the_answer_without_a_space():
    tokenizer = _metaspace_bpe("always")
    row = tokenize_row({"prompt": "a", "completion": "b"}, tokenizer, dataset_type="prompt_completion")
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["<s>", "▁a", "b", "</s>"]


@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_pairs_are_two_texts_with_one_beginning(kind, prompt, completion):
    rows = Dataset.from_list([{"prompt": prompt, "chosen": completion, "rejected": "is it"}])
    (pair,) = prepare_pairs(rows, kind, max_length=200)
    chosen, rejected = whole_ids(kind, prompt + completion), whole_ids(kind, prompt + "is it")
    assert pair["input_ids"] == chosen and rejected_row(pair)["input_ids"] == rejected
    start = min(own_beginning(kind, prompt, ids) for ids in (chosen, rejected))
    assert pair["prompt_length"] == start
    assert pair["labels"] == [-100] * start + chosen[start:]
    assert rejected_row(pair)["labels"] == [-100] * start + rejected[start:]


@pytest.mark.parametrize("objective", ["step_by_step", "edit", "dual_chain"])
def test_rationales_are_one_text_with_their_question(kind, objective):
    names = ("label_prompt", "rationale_prompt", "chain_prompt")
    templates = RationaleTemplates.of(
        "text", kind, **dict.fromkeys(names, "{question}="), chain_completion="{rationale}={answer}"
    )
    work = RationaleTokenizer(kind, templates, objective)
    row = {"question": "2+2", "answer": "4", "rationale": "it", "wrong_rationale": "un", "wrong_answer": "7"}
    example = work.example(row)
    texts = {
        "step_by_step": ("2+2=4", "2+2=it"),
        "edit": ("2+2=it=4", "2+2=un=7"),
        "dual_chain": ("2+2=it=4", None),
    }[objective]
    for sequence, text in zip((example["first"], example["other"]), texts, strict=True):
        if text is not None:
            assert sequence["input_ids"] == whole_ids(kind, text)
            assert sequence["prompt_length"] == own_beginning(kind, "2+2=", sequence["input_ids"])


def test_an_encoder_and_a_decoder_read_two_texts():
    tokenizer = ByT5Tokenizer()
    work = RationaleTokenizer(tokenizer, RationaleTemplates.of("text", tokenizer), "step_by_step", separate=True)
    for end in ("", "</s>", "</s>\n"):
        first = work.example({"question": "q", "answer": f"4{end}", "rationale": ""})["first"]
        start = first["prompt_length"]
        assert first["input_ids"][:start] == tokenizer("predict: q\n")["input_ids"]
        assert first["input_ids"][start:] == tokenizer("4")["input_ids"]


def test_plain_text_is_as_the_tokenizer_has_it(kind):
    row = tokenize_row({"text": "un happy"}, kind, dataset_type="text")
    assert row["input_ids"] == whole_ids(kind, "un happy")


def test_prompts_do_not_end(kind):
    row = tokenize_row({"prompt": "2+2="}, kind, dataset_type="prompt")
    assert row["input_ids"] == whole_ids(kind, "2+2=")[:-1]


def test_evaluation_reads_the_ids_that_training_reads(kind):
    rows = [{"prompt": "2+2=", "completion": "4"}]
    (example,) = read_examples(rows, kind, EvaluationSettings())
    row = tokenize_row(rows[0], kind, dataset_type="prompt_completion")
    assert [*example.prompt_ids, *example.completion_ids] == row["input_ids"] == whole_ids(kind, "2+2=4")
    assert len(example.prompt_ids) == row["prompt_length"]


def test_straddled_borders_are_counted_once(tokenizer, caplog):
    rows = [
        {"prompt": "q\n", "completion": "\na"},
        {"prompt": "q", "completion": "\n\na"},
        {"prompt": "q", "completion": "a"},
    ]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "z"} for r in rows]
    asked = [{"question": "q", "answer": text, "rationale": "r"} for text in ("a", "b")]
    templates = RationaleTemplates.of("text", tokenizer, label_prompt="{question}\n", rationale_prompt="{question}:")
    with caplog.at_level(logging.WARNING):
        prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=16, name="mine")
        prepare_pairs(Dataset.from_list(pairs), tokenizer, max_length=16, name="pairs")
        prepare_rationales(Dataset.from_list(asked), RationaleTokenizer(tokenizer, templates, "step_by_step"))
    mine, of_pairs = [record.getMessage() for record in caplog.records]
    assert "'mine', 3 rows: in 1 of them a token straddles" in mine and "'pairs', 3 rows: in 1 of them" in of_pairs


def test_a_prompt_within_the_first_token_of_its_completion_is_dropped_and_told(tokenizer, caplog):
    rows = Dataset.from_list([{"prompt": "\n", "completion": "\na"}, {"prompt": "q", "completion": "a"}])
    with caplog.at_level(logging.WARNING):
        (row,) = prepare_dataset(rows, tokenizer, max_length=16, needs="both")
    assert tokenizer.decode(row["input_ids"]) == "qa<|im_end|>"
    assert "part of its completion's first token; the first is row 0" in caplog.text


def test_responses_to_a_prompt_follow_the_whole_of_it(tokenizer):
    """The builder of pairs writes the prompt down as it was, so its responses must not begin within it."""
    data = Dataset.from_list([{"prompt": "q\n", "completion": "\na"}])
    args = SimpleNamespace(column_mapping=None, chat_template_kwargs=None, max_new_tokens=4, row_limit=16)
    ready = SimpleNamespace(given=SimpleNamespace(train=data), pair=SimpleNamespace(tokenizer=tokenizer))
    settings = SimpleNamespace(verify="none")
    (prompt,) = _prompts(SimpleNamespace(ready=ready), SimpleNamespace(args=args), settings, Counter()).values()
    assert tokenizer.decode(prompt.ids) == "q\n"


# ---- Special tokens once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, make in KINDS.items() if make().bos_token])
def test_a_text_that_brings_bos_gets_no_second_one(name):
    tokenizer = KINDS[name]()
    bos, adds = tokenizer.bos_token_id, tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    rows = {
        "prompt": {"prompt": "<s>un"},
        "prompt_completion": {"prompt": "<s>un", "completion": "happy"},
        "text": {"text": "<s>unhappy"},
    }
    for layout, row in rows.items():
        ids = tokenize_row(row, tokenizer, dataset_type=layout)["input_ids"]
        assert ids[0] == bos and ids.count(bos) == 1, layout
        bare = tokenizer("".join(row.values()), add_special_tokens=False)["input_ids"]
        assert ids == (bare if layout == "prompt" else [*bare, tokenizer.eos_token_id])
    inside = tokenize_row({"prompt": "un", "completion": "<s>happy"}, tokenizer, dataset_type="prompt_completion")
    if adds:
        assert inside["input_ids"] == whole_ids(tokenizer, "unhappy")
    else:  # nobody but the text puts it there
        assert inside["input_ids"] == whole_ids(tokenizer, "un<s>happy")


def test_bos_of_pairs_and_rationales_stands_once():
    tokenizer = _metaspace_bpe("first")
    bos = tokenizer.bos_token_id
    (pair,) = prepare_pairs(
        Dataset.from_list([{"prompt": "<s>un", "chosen": "happy", "rejected": "<s>it"}]), tokenizer, max_length=99
    )
    assert pair["input_ids"].count(bos) == 1 and pair["rejected_ids"].count(bos) == 0
    templates = RationaleTemplates.of("text", tokenizer, label_prompt="<s>{question}")
    first = RationaleTokenizer(tokenizer, templates, "step_by_step").example(
        {"question": "un", "answer": "happy", "rationale": "it"}
    )["first"]
    assert first["input_ids"].count(bos) == 1


@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s> ", "</s></s>\n", "</s>\n</s>\n"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "WordPiece"])
def test_an_answer_that_brings_eos_gets_no_second_one(name, end):
    tokenizer = KINDS[name]()
    right = whole_ids(tokenizer, "un happy")
    row = {"prompt": "un", "completion": f" happy{end}"}
    assert tokenize_row(row, tokenizer, dataset_type="prompt_completion")["input_ids"] == right
    assert tokenize_row({"text": f"un happy{end}"}, tokenizer, dataset_type="text")["input_ids"] == right
    pair = {"prompt": "un", "chosen": f" happy{end}", "rejected": f" it{end}"}
    (pair,) = prepare_pairs(Dataset.from_list([pair]), tokenizer, max_length=99)
    assert pair["input_ids"] == right and rejected_row(pair)["input_ids"] == whole_ids(tokenizer, "un it")


def test_the_end_of_turn_of_the_template_ends_an_answer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<end_of_turn>"  # as a base model's, whose template ends turns in another token
    for end in ("<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<end_of_turn>"):
        row = tokenize_row({"prompt": "q", "completion": f"a{end}"}, tokenizer, dataset_type="prompt_completion")
        assert tokenizer.decode(row["input_ids"]) == "qa<|im_end|>"


def test_eos_inside_a_text_and_space_at_its_end_stay(tokenizer):
    for text in ("a<|im_end|>b", "a \n", "a\n<|im_end|>"):
        row = tokenize_row({"prompt": "q", "completion": text}, tokenizer, dataset_type="prompt_completion")
        assert tokenizer.decode(row["input_ids"]) == "q" + text.removesuffix("<|im_end|>") + "<|im_end|>"


def test_tokenised_rows_are_left_as_they_are(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    ids = [tokenizer.bos_token_id, tokenizer.bos_token_id, 5, tokenizer.eos_token_id, tokenizer.eos_token_id]
    assert tokenize_row({"input_ids": ids}, tokenizer, dataset_type="tokenized")["input_ids"] == ids
