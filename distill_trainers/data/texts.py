"""Text to token ids as the one text that it is: prompt and completion together, each special token once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_trainers.data.chat import turn_end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the greatest token id that a tokenizer defines; added ones may lie beyond its length."""
    return max(len(tokenizer), *(i + 1 for i in tokenizer.added_tokens_decoder), 1)


def special_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts before every text, such as BOS."""
    bare, full = _bare_ids("a", tokenizer), list(tokenizer("a")["input_ids"])
    if not bare:  # a vocabulary without the letter
        return full[: int(full[:1] == [tokenizer.bos_token_id])]
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase, begin: list[int] | None = None) -> list[int]:
    """Tokenise a text with the special tokens that begin one, but none that ends it.

    What the text brings of them is not put there again: `<s>Hi` gets no second BOS.

    Args:
        begin: what `special_beginning` returns, where many texts are tokenised.
    """
    return _begun(_bare_ids(text, tokenizer), special_beginning(tokenizer) if begin is None else begin)


def split_text(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, begin: list[int] | None = None
) -> tuple[list[int], list[int], int]:
    """Tokenise `prompt + completion` as one text that ends in EOS.

    Tokenised apart, a completion would get the space that some tokenizers put before every text, and the row would hold
    tokens that the tokenizer does not make of this text. A token that straddles the border belongs to the completion.

    Args:
        begin: what `special_beginning` returns, where many texts are tokenised.

    Returns:
        The ids of the prompt, as it has them alone, and of the completion (none where it is empty); and how many tokens
        of the prompt alone are not among the former.
    """
    from trl.data_utils import common_prefix_length

    begin = special_beginning(tokenizer) if begin is None else begin
    if not completion.strip():
        return text_ids(prompt, tokenizer, begin), [], 0
    both = tokenizer([prompt, prompt + completion], add_special_tokens=False)["input_ids"]
    alone, whole = (_begun(list(ids), begin) for ids in both)
    bos = tokenizer.bos_token
    brings_bos = bos and bos != tokenizer.eos_token and completion.startswith(bos)
    if brings_bos and alone[:1] == [tokenizer.bos_token_id]:  # the row has its own, at its beginning
        whole = text_ids(prompt + completion.removeprefix(bos), tokenizer, begin)
    start = common_prefix_length(alone, whole)
    return whole[:start], ended(whole[start:], tokenizer), len(alone) - start


def encoder_and_decoder_ids(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt for an encoder, and a completion for a decoder: as two texts, each with an end of its own."""
    prompt_ids = text_ids(prompt, tokenizer)
    if tokenizer(prompt)["input_ids"][-1:] == [tokenizer.eos_token_id]:
        prompt_ids = ended(prompt_ids, tokenizer)
    return prompt_ids, ended(_bare_ids(completion, tokenizer), tokenizer) if completion.strip() else []


def tell_straddled(lost: Sequence[int], name: str) -> None:
    """Log how many rows of the dataset `name` have tokens across the border of prompt and completion.

    Args:
        lost: of each row, the third of what `split_text` returns.
    """
    rows = sum(1 for count in lost if count)
    if rows:
        logger.warning(
            "Dataset %r, %d rows: in %d of them a token straddles the end of the prompt (which may end in a space). It "
            "belongs to the completion, and rollouts start before it. Let prompts end where a token does to avoid it.",
            name,
            len(lost),
            rows,
        )


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End ids in one EOS, or in the chat template's end of turn where they bring it.

    White space behind it goes, and so does a second one: generation would have stopped before.
    """
    eos = tokenizer.eos_token_id
    text_end = len(ids)
    while text_end and _ends_or_is_blank(ids[text_end - 1], tokenizer):
        text_end -= 1
    ends = [i for i in range(text_end, len(ids)) if _is_end(ids[i], tokenizer)]
    if ends:
        return ids[: ends[0] + 1]
    return ids if eos is None else [*ids, eos]


def _ends_or_is_blank(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    return _is_end(token_id, tokenizer) or not str(tokenizer.decode([token_id])).strip()


def _is_end(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    if token_id == tokenizer.eos_token_id:
        return True
    return token_id in tokenizer.added_tokens_decoder and token_id == turn_end_id(tokenizer)


def _begun(ids: list[int], begin: list[int]) -> list[int]:
    return ids if ids[: len(begin)] == begin else [*begin, *ids]


def _bare_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
