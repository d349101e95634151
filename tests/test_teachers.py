"""Vocabulary alignment, and what a teacher offers."""

import contextlib
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


@pytest.mark.parametrize("rows", [(5, 4), (4, 5), (4, 4)])
def test_an_id_without_a_row_is_refused(rows):
    with pytest.raises(VocabularyError, match=r"1 ids \(4: 'c'\)"):
        shared_vocabulary(words(*BASE), words(*BASE), *rows)


def test_a_padding_token_that_the_teacher_has_no_row_for_is_let_pass():
    """It is masked; not where it is also a token of texts, nor where the student itself has no row for it."""
    tok, theirs = words(*BASE, "<fill>"), words(*BASE)
    tok.pad_token = "<fill>"
    assert shared_vocabulary(tok, theirs, 6, 5) == 5
    assert shared_vocabulary(tok, theirs, 8, 5) == 5
    with pytest.raises(VocabularyError, match=r"pads with '<fill>', id 5, for which the student has no row"):
        shared_vocabulary(tok, theirs, 5, 5)
    tok.unk_token = "<fill>"
    with pytest.raises(VocabularyError, match=r"1 ids \(5: '<fill>'\)"):
        shared_vocabulary(tok, theirs, 6, 5)


def test_special_tokens_that_the_student_has_no_row_for_are_let_pass():
    """As in Gemma 3 1B; not where the student has one and the teacher has none, nor where it ends every row."""
    tok = words(*BASE)
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tok.get_vocab()["<image>"] == 5
    assert shared_vocabulary(tok, tok, 5, 5) is None
    assert shared_vocabulary(tok, tok, 5, 8) == 5
    with pytest.raises(VocabularyError, match="'<image>'"):
        shared_vocabulary(tok, tok, 6, 5)
    tok.eos_token = "<image>"
    with pytest.raises(VocabularyError, match="'<image>'"):
        shared_vocabulary(tok, tok, 5, 5)


def test_fingerprint_looks_at_weights_that_zero3_partitions_as_they_are_loaded(make_teacher, monkeypatch):
    weights = {}

    @contextlib.contextmanager
    def gathered(*parameters):
        for parameter in parameters:
            parameter.data = weights[parameter.ds_id]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    whole = LocalTeacher(make_teacher(seed=1)).fingerprint()
    monkeypatch.setattr("distill_trainers.models.whole_parameters", gathered)
    prints = []
    for seed in (1, 2, 1):
        model = make_teacher(seed=seed)
        for parameter in model.parameters():
            parameter.ds_id, parameter.ds_shape = len(weights), parameter.shape
            weights[parameter.ds_id] = parameter.data
            parameter.data = torch.empty(0)
        prints.append(LocalTeacher(model).fingerprint())
    assert whole == prints[0] == prints[2] != prints[1]


def test_fingerprint_follows_weights_and_config(make_teacher):
    model = make_teacher()
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    prints = [LocalTeacher(m).fingerprint() for m in (model, same, other)]
    assert prints[0] == prints[1] != prints[2]
