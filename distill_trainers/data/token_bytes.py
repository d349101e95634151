"""Which bytes each token of a tokenizer stands for, and at which places of a text no token of it may cross."""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..exceptions import ConfigurationError
from .chat import turn_end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, SPECIAL = 256, 257  # buckets of first bytes beside 0-255: `losses/cross_tokenizer.py`
END_BYTE = b"\xfd"  # stands for an end of text among bytes; never part of UTF-8

# What a tokenizer may lose, each shown by a text. One with a token that the vocabulary does not know tells nothing.
_SHOWS = {
    "upper case": "aB",
    "spaces between words": "a b",
    "runs of spaces": "a  b",
    "line breaks": "a\n\nb",
    "tabs": "a\tb",
    "accents": "\u00e9",
}

_CACHE: weakref.WeakKeyDictionary[Any, tuple[Any, TokenBytes]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """Which bytes each id of a tokenizer stands for.

    Attributes:
        spelled: by id, the bytes of a token within a text; None for special and unknown tokens, and for ids without a
            token.
        ends: ids that end a text: EOS, and what ends a turn of the chat template.
        adds_space: whether the tokenizer puts a space before a text, which decoding takes away.
        backend: a `tokenizers.Tokenizer` that cuts and pads nothing, and takes names of special tokens for text.
    """

    spelled: tuple[bytes | None, ...]
    ends: frozenset[int]
    adds_space: bool
    backend: Any = field(repr=False)
    stops: frozenset[int] = frozenset()  # further ids that end what a model writes; `next_byte` has them as special

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer") -> TokenBytes:
        """Read a tokenizer; the same one is read once.

        Args:
            name: whose it is, for errors.

        Raises:
            ConfigurationError: what the tokenizer loses of a text, or that nothing tells what its tokens spell.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigurationError(
                f"Got a {type(tokenizer).__name__} for {name}; expected a tokenizer with a tokenizer.json, which tells "
                "the bytes of its tokens. Load it with `use_fast=True`, or train on the teacher's text (`seq_kd`)."
            )
        ends = frozenset({tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None})
        state = (len(tokenizer), ends, frozenset(tokenizer.all_special_ids))
        known = _CACHE.get(tokenizer)
        if known is None or known[0] != state:
            known = (state, _read(backend, ends, state[2], name))
            _CACHE[tokenizer] = known
        return known[1]

    @classmethod
    def of_readable(cls, tokenizer: Any) -> TokenBytes | None:
        """Read a tokenizer whose tokens spell the text; None for one that loses some of it, or that cannot be read."""
        try:
            return cls.of(tokenizer)
        except ConfigurationError:
            return None

    def __len__(self) -> int:
        return len(self.spelled)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what follows from the rest: `datasets` knows work that is done by the bytes of its arguments."""
        return {name: getattr(self, name) for name in ("spelled", "ends", "adds_space", "backend", "stops")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # no part of what `tokenizers` writes of one

    def stopping_at(self, ids: Iterable[int]) -> TokenBytes:
        """Return it for a model whose text ends at these ids, too, as a generation config may say; words end none."""
        more = frozenset(i for i in ids if self.tokens([i]) == [None]) - self.ends - self.stops
        return dataclasses.replace(self, stops=self.stops | more) if more else self

    def is_end(self, token: int) -> bool:
        """Tell whether an id ends a text."""
        return token in self.ends or token in self.stops

    def tokens(self, ids: Iterable[int]) -> list[bytes | None]:
        """Return the bytes of each token; None for special ones and for ids that the tokenizer does not define."""
        count = len(self.spelled)
        return [self.spelled[i] if 0 <= i < count else None for i in ids]

    def text(self, ids: Iterable[int], *, goes_on: bool = False) -> bytes:
        """Return the bytes of the text that the ids spell; special tokens spell nothing.

        Args:
            goes_on: the ids go on a text, so that their first space is part of it, and not the tokenizer's.
        """
        text = b"".join(token or b"" for token in self.tokens(ids))
        return text[1:] if self.adds_space and not goes_on and text[:1] == b" " else text

    @functools.cached_property
    def num_bytes(self) -> Tensor:
        """Bytes of each token, int64 `[V]`; 0 for special ones."""
        return torch.tensor([len(token or b"") for token in self.spelled])

    def first_bytes(self, rows: int | None = None) -> Tensor:
        """Return the bucket of each id by its first byte, int64 `[V]`: 0-255, `END`, or `SPECIAL` for all others.

        Args:
            rows: of the model's head; those beyond the tokenizer are special. None: as many as the tokenizer has.
        """
        buckets = [token[0] if token else SPECIAL for token in self.spelled]
        for end in self.ends:
            buckets[end : end + 1] = [END] if end < len(buckets) else []
        missing = 0 if rows is None else rows - len(buckets)
        return torch.tensor((buckets + [SPECIAL] * max(0, missing))[: rows if rows is not None else len(buckets)])

    @functools.cached_property
    def crossable(self) -> NDArray[np.bool_]:
        """Whether any token holds byte a followed by byte b, bool `[256, 256]`."""
        held = np.zeros((256, 256), bool)
        known = [token for token in self.spelled if token]
        values = np.frombuffer(b"".join(known), np.uint8)
        within = np.ones(len(values), bool)
        within[np.cumsum([len(token) for token in known], dtype=np.int64) - 1] = False  # no pair begins at a last byte
        held[values[:-1][within[:-1]], values[1:][within[:-1]]] = True
        return held

    def safe_borders(self, text: bytes) -> NDArray[np.bool_]:
        """Tell of each position in a text, bool `[bytes + 1]`, whether no token may cross it.

        Its end is safe only behind an end-of-text token: otherwise the text may go on.
        """
        values = np.frombuffer(text, np.uint8)
        safe = np.ones(len(text) + 1, bool)
        safe[1:-1] = ~self.crossable[values[:-1], values[1:]] if len(text) else True
        safe[self._pre_token_ends(text)] = True
        safe[-1] = text[-1:] == END_BYTE or not text
        return safe

    def _pre_token_ends(self, text: bytes) -> NDArray[np.int64]:
        """Positions at which the tokenizer cuts a text before its model sees it; none if it normalises it first."""
        if self.backend.pre_tokenizer is None or not text:
            return np.zeros(0, np.int64)
        characters, sizes = characters_of(text)
        normalizer = self.backend.normalizer
        if normalizer is not None and normalizer.normalize_str(characters) != characters:
            return np.zeros(0, np.int64)
        ends = np.array([end for _, (_, end) in self.backend.pre_tokenizer.pre_tokenize_str(characters)], np.int64)
        return np.concatenate([[0], np.cumsum(sizes)])[ends[ends <= len(sizes)]]


def characters_of(text: bytes) -> tuple[str, NDArray[np.int64]]:
    """A text of bytes, and of how many each of its characters is made: what is no UTF-8 becomes U+FFFD byte by byte."""
    if text.isascii():
        return text.decode(), np.ones(len(text), np.int64)
    decoded = text.decode("utf-8", "surrogateescape")
    points = np.frombuffer(decoded.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_bare = (points >= 0xDC80) & (points <= 0xDCFF)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    if is_bare.any():
        decoded = "".join("\ufffd" if bare else c for c, bare in zip(decoded, is_bare.tolist(), strict=True))
    return decoded, np.where(is_bare, 1, sizes)


# ---- Reading a tokenizer --------------------------------------------------------------------------------------------


def _read(backend: Any, ends: frozenset[int], special_ids: frozenset[int], name: str) -> TokenBytes:
    config = json.loads(backend.to_str())
    steps = _flat(config.get("decoder"), "decoders")
    spell = _speller(config, steps)
    added = {token["id"]: token for token in config["added_tokens"]}
    vocab = backend.get_vocab(with_added_tokens=True)
    spelled: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
    unknown = config["model"].get("unk_token")
    unknown_id = config["model"].get("unk_id") if unknown is None else vocab.get(unknown)
    for token, i in vocab.items():
        if i in added:
            spelled[i] = None if added[i]["special"] else added[i]["content"].encode()
        else:
            spelled[i] = spell(token)
    for i in {*special_ids, *ends, *([] if unknown_id is None else [unknown_id])}:
        if i < len(spelled):
            spelled[i] = None
    plain = type(backend).from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    found = TokenBytes(tuple(spelled), ends, _adds_space(config, steps), plain)
    _refuse_losses(found, name)
    return found


def _flat(node: Any, of: str) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder, one after another."""
    if node is None:
        return []
    return [step for part in node[of] for step in _flat(part, of)] if node["type"] == "Sequence" else [node]


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte: itself where it is printable, else from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _speller(config: dict[str, Any], steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """Return the function from a token of the model's vocabulary to its bytes, as the decoder has them."""
    kinds = {step["type"] for step in steps}
    pre_tokens = _flat(config.get("pre_tokenizer"), "pretokenizers")
    alphabet = _byte_alphabet()
    model = config["model"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    replaced = [(s["pattern"].get("String"), s["content"]) for s in steps if s["type"] == "Replace"]
    replaced += [(s["replacement"], " ") for s in [*steps, *pre_tokens] if s["type"] == "Metaspace"]
    replaced = [(old, new) for old, new in replaced if old]
    falls_back = bool(model.get("byte_fallback")) or "ByteFallback" in kinds
    is_byte_level = "ByteLevel" in kinds or any(step["type"] == "ByteLevel" for step in pre_tokens)

    def spell(token: str) -> bytes:
        token = token.removeprefix(prefix) if prefix else token
        token = token.removesuffix(suffix) if suffix else token
        if falls_back and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            return bytes([int(token[3:5], 16)])
        if is_byte_level and all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode("utf-8", "surrogatepass")

    return spell


def _adds_space(config: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether encoding puts a space before a text."""
    for step in [*_flat(config.get("pre_tokenizer"), "pretokenizers"), *steps]:
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
        if step["type"] == "Strip" and step["content"] == " " and step["start"] > 0:
            return True
    normalizers = _flat(config.get("normalizer"), "normalizers")
    pre_tokens = _flat(config.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in pre_tokens
    )


def _refuse_losses(tokenizer: TokenBytes, name: str) -> None:
    lost = []
    for what, text in _SHOWS.items():
        spelled = tokenizer.tokens(tokenizer.backend.encode(text, add_special_tokens=False).ids)
        if None in spelled:
            continue
        joined = b"".join(token or b"" for token in spelled)
        if text.encode() not in (joined, joined[1:] if tokenizer.adds_space else joined):
            lost.append(what)
    if lost:
        raise ConfigurationError(
            f"The tokenizer of {name} loses {', '.join(lost)} of a text, so its tokens cannot be laid beside those of "
            "another tokenizer; expected one whose tokens spell the text. Take a model with such a tokenizer, or train "
            "on the teacher's text (`seq_kd: true`), which needs no alignment."
        )


def shared_ids(student: TokenBytes, teacher: TokenBytes) -> tuple[Tensor, Tensor]:
    """Return the ids `[S]` of both whose tokens are the same bytes, each id once; special tokens are none of them."""
    theirs = {token: i for i, token in reversed(list(enumerate(teacher.spelled))) if token}
    ours = {token: i for i, token in reversed(list(enumerate(student.spelled))) if token}
    pairs = [(i, theirs[token]) for token, i in ours.items() if token in theirs]
    both = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()
