"""How two tokenizers split the same text, where the teacher reads its own ids of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..data.alignment import align
from ..data.labels import any_trained
from ..data.other_tokenizer import OtherTokenizer, trained_stretch
from ..data.views import OWN_COMPLETION
from ..exceptions import ConfigurationError
from .case import Case
from .findings import Finding, note, warning

_ROWS = 50
_SHOWN = 12  # tokens of the first row
_LITTLE = 0.5  # share of tokens, or of bytes, below which a loss sees too little of the text


def check_alignment(case: Case) -> Iterator[Finding]:
    """Tell how many chunks both tokenisations of the data share, and what of the text can be compared."""
    if case.tokenizer is None or case.teacher_tokenizer is None:
        return
    try:
        other = OtherTokenizer.of(case.tokenizer, case.teacher_tokenizer)
    except ConfigurationError as error:
        yield Finding.of_error("tokens", error)
        return
    rows = [row for row in islice(case.prepared or [], 10 * _ROWS) if OWN_COMPLETION in row]
    rows = [row for row in rows if any_trained(row["labels"][1:])][:_ROWS]
    if not rows:
        return
    tokens, theirs, chunks, size, comparable = 0, 0, 0, 0, 0
    shown = ""
    for row in rows:
        start, stop = trained_stretch(row["labels"], row["view_start"])
        sides = row["input_ids"][start:stop], row[OWN_COMPLETION]
        found = align(*sides, other.student.tokens, other.teacher.tokens)
        shown = shown or " and ".join(
            "|".join((token or b"<>").decode(errors="replace") for token in side.tokens.tokens(ids[:_SHOWN]))
            for side, ids in zip((other.student, other.teacher), sides, strict=True)
        )
        tokens, theirs, chunks = tokens + len(sides[0]), theirs + len(sides[1]), chunks + len(found)
        size, comparable = size + found.bytes, comparable + int(found.num_bytes[found.comparable].sum())
    yield note(
        "tokens",
        f"The completions of {len(rows)} rows ({size:,} bytes) are {tokens:,} tokens of the student "
        f"({size / max(1, tokens):.1f} bytes each) and {theirs:,} of the teacher ({size / max(1, theirs):.1f}), which "
        f"share {chunks:,} chunks; {comparable / max(1, size):.0%} of the text lies in chunks whose likelihoods can be "
        f"compared. The first begins {shown}.",
        "Nothing has to be done: each model reads the text in its own tokens (`teacher_tokenizer`).",
    )
    shares = {"tokens of the student begin where one of the teacher's does": chunks / max(1, tokens)}
    shares["of the text lies in chunks that can be compared"] = comparable / max(1, size)
    for what, share in shares.items():
        if share < _LITTLE:
            yield warning(
                "tokens",
                f"Only {share:.0%} {what}: the loss sees little of what the teacher says.",
                "Take a teacher that splits text more alike, or train on its text (`seq_kd: true`, `lm_loss_weight`).",
            )
