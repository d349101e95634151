"""Vocabulary alignment, and what a teacher offers."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from distill_trainers.exceptions import ConfigurationError, VocabularyError
from distill_trainers.losses.reduction import trained_mask
from distill_trainers.signals import HiddenStates, Logits
from distill_trainers.teachers import LocalTeacher, Teacher, shared_vocabulary


def words(*tokens):
    backend = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=tokens[0], eos_token=tokens[1])


BASE = ("<pad>", "<eos>", "a", "b", "c")


def test_one_vocabulary_keeps_every_row():
    assert shared_vocabulary(words(*BASE), words(*BASE), 8, 8) is None


def test_padded_vocabularies_are_cut_to_the_defined_ids():
    assert shared_vocabulary(words(*BASE), words(*BASE), 8, 16) == 5
    assert shared_vocabulary(words(*BASE), words(*BASE), 16, 5) == 5


def test_different_tokens_of_one_id_are_refused_by_name():
    with pytest.raises(VocabularyError, match=r"2: 'a' / 'x'"):
        shared_vocabulary(words(*BASE), words("<pad>", "<eos>", "x", "b", "c"), 5, 5)


def test_unknown_tokenizer_needs_equal_rows():
    assert shared_vocabulary(words(*BASE), None, 5, 5) is None
    with pytest.raises(VocabularyError, match="tokenizer is unknown"):
        shared_vocabulary(words(*BASE), None, 5, 6)


def test_an_id_that_only_one_defines_is_warned_about(caplog):
    with caplog.at_level("WARNING"):
        assert shared_vocabulary(words(*BASE), words(*BASE, "d"), 5, 6) == 5
    assert "only one" in caplog.text


def test_a_teacher_says_what_it_cannot_do():
    class Silent(Teacher):
        provides = frozenset({"logprobs"})

        def prepare(self, accelerator): ...
        def signal(self, inputs, predicts, vocab_size): ...
        def fingerprint(self):
            return "none"

    with pytest.raises(ConfigurationError, match="distribution"):
        Silent().check(frozenset({"distribution"}), "GKDTrainer")


def test_hidden_states_and_logits_say_the_same(make_teacher):
    model = make_teacher()
    ids = torch.randint(2, 14, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    teacher, inputs = LocalTeacher(model), {"input_ids": ids, "attention_mask": mask}
    hidden = teacher.signal(inputs, trained_mask(labels), 12)
    teacher._fused = False
    logits = teacher.signal(inputs, trained_mask(labels), 12)
    assert isinstance(hidden, HiddenStates) and isinstance(logits, Logits)
    assert len(hidden) == len(logits) == int(trained_mask(labels).sum())
    with teacher.whole_head(hidden) as whole:
        torch.testing.assert_close(whole.chunk(slice(None)).logits, logits.chunk(slice(None)).logits)


def test_fingerprint_follows_weights_and_config(make_teacher):
    model = make_teacher()
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    prints = [LocalTeacher(m).fingerprint() for m in (model, same, other)]
    assert prints[0] == prints[1] != prints[2]
