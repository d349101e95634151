"""A teacher behind HTTP with a tokenizer of its own is the local one."""

import copy

import pytest

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import tiny_llama

RUN = {"max_steps": 4, "gradient_accumulation_steps": 2, "teacher_tokenizer": "own"}


@pytest.mark.parametrize(
    ("method", "settings", "kind"),
    [
        pytest.param("gkd", {"lmbda": 0.5}, "hidden", marks=pytest.mark.slow),
        ("gkd", {"lmbda": 0.5}, "next_bytes"),
        ("gkd", {"lmbda": 0.5, "cross_tokenizer": {"alm": 1.0}}, "token_logprobs"),
        pytest.param(
            "minillm", {"estimator": "sampled", "teacher_mix_alpha": 0.0}, "token_logprobs", marks=pytest.mark.slow
        ),
        pytest.param("dpkd", {"chosen": "dataset"}, "token_logprobs", marks=pytest.mark.slow),
    ],
)
def test_a_served_teacher_is_the_local_one(make_trainer, by_step, serve, digits, make_student, method, settings, kind):
    run = {**RUN, "method": method, "teacher_processing_class": digits, **settings}
    teacher = tiny_llama(digits, 48, 2, seed=7, initializer_range=0.25)
    local = losses(make_trainer(make_student(), copy.deepcopy(teacher), **run), by_step)
    served = make_trainer(make_student(), serve(teacher, digits).url, **run, teacher_server_kind=kind)
    assert losses(served, by_step) == pytest.approx(local, rel=1e-6)


def losses(trainer, by_step):
    trainer.train()
    return by_step(trainer)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher_processing_class": None}, "nothing says what the tokenizer .* Name its folder"),
        ({"teacher_processing_class": "student"}, "the same ids stand for other tokens"),
        ({"teacher_server_kind": "topk"}, "needs the teacher's whole distribution"),
        ({"teacher_server_kind": "token_logprobs"}, "needs .'distribution'."),
        ({"teacher_server_kind": "next_bytes", "cross_tokenizer": {"uld": 1.0}}, "alm and next_byte.*kind: hidden"),
        ({"teacher_server_kind": "next_bytes", "teacher_processing_class": "another end"}, "other ends of a text"),
    ],
)
def test_a_server_that_cannot_tell_is_refused(make_trainer, serve, digits, tokenizer, settings, says):
    given = {"teacher_processing_class": digits, "lmbda": 0.0, **settings}
    if given["teacher_processing_class"] == "student":
        given["teacher_processing_class"] = tokenizer
    if given["teacher_processing_class"] == "another end":
        given["teacher_processing_class"] = copy.deepcopy(digits)
        given["teacher_processing_class"].eos_token = "+"
    with pytest.raises(ConfigurationError, match=says):
        make_trainer(teacher=serve(tiny_llama(digits, 48, 2), digits).url, **RUN, **given)
