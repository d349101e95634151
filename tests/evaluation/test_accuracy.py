"""Accuracy by itself: parsing, verdicts, lengths, and shares of several processes."""

from __future__ import annotations

import dataclasses

import pytest

from distill_trainers.evaluation import Question, accuracy_metrics, accuracy_sums, answer_questions
from distill_trainers.evaluation.accuracy import stated_answer, whole_text
from distill_trainers.exceptions import DatasetError
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import SamplingSettings

SAMPLING = SamplingSettings(8, 0.0, eos_token_ids=[1], pad_token_id=0)


class Echo:
    """Answers a prompt `ab=` with its digits turned round; remembers how many prompts came together."""

    def __init__(self, tokenizer):
        self.tokenizer, self.sizes = tokenizer, []

    def generate(self, model, prompt_ids, prompt_mask, sampling, streams=None):
        self.sizes.append(len(prompt_ids))
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        return [[*prompt[-2::-1], 1] for prompt in prompts]


def questions(tokenizer, texts=("12", "34", "5", "678", "90", "11", "23")):
    return [
        Question(
            tokenizer(f"{text}=").input_ids,
            text[::-1] if len(text) != 2 else text,
            "long" if len(text) > 2 else "short",
        )
        for text in texts
    ]


def scores(tokenizer, asked, **how):
    answers = answer_questions(None, tokenizer, asked, SAMPLING, engine=Echo(tokenizer), **how)
    return answers, accuracy_metrics(accuracy_sums(asked[how.get("rank", 0) :: how.get("world", 1)], answers))


def test_accuracy_and_length(tokenizer):
    asked = questions(tokenizer)
    answers, found = scores(tokenizer, asked, batch_size=3)
    right = [text in ("5", "678", "11") for text in "12 34 5 678 90 11 23".split()]
    assert [answer.reason == "right" for answer in answers] == right
    assert found["accuracy"] == 3 / 7 and found["answered"] == 1.0
    assert found["tokens_per_answer"] == (14 + 7) / 7
    assert found["accuracy_long"] == 1.0 and found["accuracy_short"] == 2 / 6


def test_one_task_has_no_score_of_its_own(tokenizer):
    _, found = scores(tokenizer, questions(tokenizer, ["12", "5"]))
    assert found.keys() == {"accuracy", "answered", "tokens_per_answer"}


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_questions_and_run_equally_many_batches(tokenizer, world):
    asked, engines, sums = questions(tokenizer), [], {}
    for rank in range(world):
        engines.append(Echo(tokenizer))
        how = {"rank": rank, "world": world, "batch_size": 2, "engine": engines[-1]}
        answers = answer_questions(None, tokenizer, asked, SAMPLING, **how)
        for name, value in accuracy_sums(asked[rank::world], answers).items():
            sums[name] = sums.get(name, 0) + value
    assert len({len(engine.sizes) for engine in engines}) == 1
    assert accuracy_metrics(sums) == scores(tokenizer, asked)[1]


def test_sampled_answers_depend_on_no_batch_and_no_process(tokenizer, make_teacher):
    sampled, asked = dataclasses.replace(SAMPLING, temperature=1.0), questions(tokenizer)
    stream, model = Stream(3, Role.STUDENT, Purpose.SCORED), make_teacher().eval()
    whole = answer_questions(model, tokenizer, asked, sampled, stream=stream)
    assert answer_questions(model, tokenizer, asked, sampled, stream=stream, batch_size=2) == whole
    shares = [answer_questions(model, tokenizer, asked, sampled, stream=stream, rank=r, world=2) for r in (0, 1)]
    assert [shares[place % 2][place // 2] for place in range(len(asked))] == whole
    assert answer_questions(model, tokenizer, asked, sampled, stream=stream.at(sample=1)) != whole
    with pytest.raises(ValueError, match="no streams"):
        answer_questions(model, tokenizer, asked, sampled)


def test_no_answer_counts_as_wrong(tokenizer):
    _, found = scores(tokenizer, questions(tokenizer), parse=stated_answer(["hash"]))
    assert found["accuracy"] == found["answered"] == 0.0


def test_parsers():
    assert whole_text(" 42. \nQ: more") == "42" and whole_text("  ") is None
    assert stated_answer()("2 + 2 = 4. The answer is 4.") == "4" and stated_answer()("4") is None


def test_no_questions(tokenizer):
    with pytest.raises(DatasetError, match="no questions"):
        answer_questions(None, tokenizer, [], SAMPLING)
