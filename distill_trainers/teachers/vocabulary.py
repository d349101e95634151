"""Does the same id mean the same token to student and teacher?"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..exceptions import VocabularyError
from ..servers.openai import PROBE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, student_rows: int, teacher_rows: int
) -> int | None:
    """Count the ids that stay in the softmax of both models; None to keep every row.

    Padded vocabularies of one tokenizer (such as 151936 and 152064 rows) just work: ids that no tokenizer defines
    leave both softmaxes, rather than getting a made-up logit.

    Args:
        student, teacher: the tokenizers; None if the teacher's is unknown, then only the row counts are compared.
        student_rows, teacher_rows: rows of the output heads.

    Raises:
        VocabularyError: an id that both define stands for different tokens, a model has no row for an id of the
            student's tokenizer, or nothing tells what the rows mean.
    """
    _check_rows(student, student_rows, teacher_rows)
    if teacher is None:
        if student_rows != teacher_rows:
            raise VocabularyError(
                f"The student's head has {student_rows} rows and the teacher's {teacher_rows}, and the teacher's "
                "tokenizer is unknown, so the ids cannot be matched. Pass the teacher as a folder or Hub id with its "
                "tokenizer, or `teacher_processing_class=…`."
            )
        return None
    if teacher is not student:
        _check_same_tokens(student, teacher)
    if student_rows == teacher_rows:
        return None
    defined = max(max(student.get_vocab().values()), max(teacher.get_vocab().values())) + 1
    return min(defined, student_rows, teacher_rows)


def _check_rows(student: PreTrainedTokenizerBase, student_rows: int, teacher_rows: int) -> None:
    """Refuse ids that would be looked up in an embedding which ends before them.

    Special tokens beyond the student's own rows are let pass: text models are published with the tokenizer of their
    multimodal relatives (Gemma 3 1B: 262144 rows, and an image token of that id), and no text becomes one of them. So
    is a padding token that the teacher alone has no row for: padding is masked, and the teacher gets another id.
    """
    pad, others = student.pad_token_id, (student.eos_token_id, student.bos_token_id, student.unk_token_id)
    if pad is not None and pad >= student_rows and pad not in others:
        raise VocabularyError(
            f"The student's tokenizer pads with {student.pad_token!r}, id {pad}, for which the student has no row (it "
            f"has {student_rows}): what is saved could not be loaded again. Set `tokenizer.pad_token = "
            "tokenizer.eos_token` (padding is masked, so EOS is still trained), or `resize_token_embeddings`."
        )
    used = {student.pad_token_id, student.eos_token_id, student.bos_token_id}
    special = {i for i, token in student.added_tokens_decoder.items() if token.special and i >= student_rows} - used
    rows = min(student_rows, teacher_rows)
    special |= {pad} - set(others)
    lost = {i: token for token, i in student.get_vocab().items() if i >= rows and i not in special}
    if lost:
        shown = ", ".join(f"{i}: {lost[i]!r}" for i in sorted(lost)[:5])
        raise VocabularyError(
            f"The student's tokenizer has {len(lost)} ids ({shown}) for which a model has no row: the student has "
            f"{student_rows}, the teacher {teacher_rows}. Use a tokenizer without them, or `resize_token_embeddings` "
            "of the model that lacks them and train those rows first."
        )


def _check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    student_tokens = {i: token for token, i in student.get_vocab().items()}
    teacher_tokens = {i: token for token, i in teacher.get_vocab().items()}
    shared = student_tokens.keys() & teacher_tokens.keys()
    differing = sorted(i for i in shared if student_tokens[i] != teacher_tokens[i])
    if differing:
        shown = ", ".join(f"{i}: {student_tokens[i]!r} / {teacher_tokens[i]!r}" for i in differing[:5])
        raise VocabularyError(
            f"Student and teacher use different tokenizers: {len(differing)} of {len(shared)} shared ids stand for "
            f"different tokens (id: student / teacher: {shown}). A token-level divergence needs one vocabulary: set "
            "`teacher_tokenizer: own`, with which each reads the text in its own tokens, or choose a teacher of the "
            "student's family."
        )
    only = len(student_tokens.keys() ^ teacher_tokens.keys())
    if only:
        logger.warning(
            "%d ids are defined by only one of the two tokenizers; all %d ids that both define agree.",
            only,
            len(shared),
        )
    if student.encode(PROBE) != teacher.encode(PROBE):
        logger.warning(
            "Student and teacher share their vocabulary but split text differently, so the teacher will read the "
            "student's tokens in a form it rarely saw. Use the teacher's tokenizer for both if you can."
        )
