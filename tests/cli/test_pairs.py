"""The builder of pairs: what it writes, what it leaves out, how it goes on after a kill, what can be trained on it."""

from __future__ import annotations

import copy
import json

import pytest

from distill_trainers import models
from distill_trainers.cli import main
from distill_trainers.data import load_split
from distill_trainers.data.pairs import prepare_pairs
from distill_trainers.rollouts import CompletionStore


@pytest.fixture
def builder(recipe, tmp_path):
    """`builder(**changes)` runs the command and returns its exit status; changes to the recipe by name."""

    def run(*options, rows=None, **changes):
        if rows is not None:
            data = tmp_path / "prompts.jsonl"
            data.write_text("\n".join(map(json.dumps, rows)))
            changes["dataset"] = str(data)
        config = recipe(**{"pairs_file": str(tmp_path / "pairs.jsonl"), **changes})
        return main(["pairs", "--config", config, *options])

    return run


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def test_pairs_are_written_with_their_provenance(builder, tmp_path, saved, capsys):
    rows = [{"prompt": f"{a}+{a}="} for a in range(9)] + [{"prompt": "1+1="}, {"prompt": "9" * 60}]
    assert builder(rows=rows, method="dpkd", seed=3) == 0
    found = read(tmp_path)
    said = capsys.readouterr().out
    assert (
        f"{len(found)} pairs" in said and "1 prompts that came twice" in said and "1 prompts that are empty or" in said
    )
    assert 0 < len(found) <= 9 and len({row["prompt"] for row in found}) == len(found)
    for row in found:
        assert row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"]
        origin = row["provenance"]
        assert (origin["teacher"], origin["student"], origin["seed"]) == (saved.teacher, saved.student, 3)
        assert 0 < origin["chosen_tokens"] <= 4 and isinstance(origin["rejected_finished"], bool)


def test_conversations_stay_conversations(builder, tmp_path, saved, monkeypatch, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(models, "load_tokenizer", lambda *a, **k: chat)
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+1="}, {"role": "assistant", "content": "7"}]} for a in range(5)
    ]
    assert builder(rows=rows) == 0
    for row in read(tmp_path):
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2


def test_what_belongs_to_a_prompt_is_written_beside_it(builder, tmp_path, monkeypatch, tokenizer):
    """Without its tools and system message the file would be trained on with other prompts than were answered."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{{ mode }}{% if tools %}{{ tools[0].function.name }}{{ tools[0].function.strict }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(models, "load_tokenizer", lambda *a, **k: chat)
    rows = [
        {
            "messages": [{"role": "user", "content": f"{a}+1="}],
            "system": "=",
            "tools": [{"type": "function", "function": {"name": str(a)} | ({"strict": 1} if a else {})}],
            "chat_template_kwargs": {"mode": "+"},
        }
        for a in range(5)
    ]
    assert builder(rows=rows) == 0
    pairs = load_split(str(tmp_path / "pairs.jsonl"))
    assert len(pairs) == len(read(tmp_path)) > 0
    for row, pair in zip(prepare_pairs(pairs, chat, max_length=99), pairs, strict=True):
        (message,) = pair["prompt"]
        a = message["content"][0]
        assert chat.decode(row["input_ids"][: row["prompt_length"]]) == f"+{a}{1 if a != '0' else ''}={a}+1="


def test_a_killed_builder_goes_on(builder, tmp_path, monkeypatch):
    """What was answered is not asked again, and the file is that of an undisturbed run."""
    rows = [{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)]
    settings = {"rows": rows, "rollout_batch_size": 5}
    assert builder(**settings, pairs_file=str(tmp_path / "whole.jsonl")) == 0
    append, done = CompletionStore.append, []

    def dies(self, completions):
        if len(done) == 7:  # of five batches each: in the middle of the student's
            raise KeyboardInterrupt
        done.append(1)
        append(self, completions)

    monkeypatch.setattr(CompletionStore, "append", dies)
    assert builder(**settings) == 130
    assert not (tmp_path / "pairs.jsonl").exists()
    again = []
    monkeypatch.setattr(CompletionStore, "append", lambda self, pairs: (again.append(1), append(self, pairs)))
    assert builder(**settings) == 0
    assert len(again) == 10 - 7
    assert (tmp_path / "pairs.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_builder_killed_after_the_last_answer_goes_on(builder, tmp_path, monkeypatch):
    """All answers were there, but not what tells whether they are finished: the same command failed ever after."""
    rows = [{"prompt": f"{a}+{b}="} for a in range(3) for b in range(3)]
    append = CompletionStore.append

    def dies(self, completions):
        append(self, completions)
        raise KeyboardInterrupt

    monkeypatch.setattr(CompletionStore, "append", dies)
    assert builder(rows=rows, rollout_batch_size=9) == 130  # the teacher's are there
    assert builder(rows=rows, rollout_batch_size=9) == 130  # the student's too
    loads = []
    load = CompletionStore.load
    monkeypatch.setattr(CompletionStore, "load", lambda self: loads.append(1) or load(self))
    assert builder(rows=rows, rollout_batch_size=9) == 0 and read(tmp_path)
    assert len(loads) <= 4, "the files of all answers are read once or twice, not once per prompt"


def test_whether_a_response_is_finished_is_told_by_the_model_that_wrote_it(builder, tmp_path, saved, make_student):
    """Another student in between, which ends by another token, must not pass for the first one."""
    from transformers import AutoTokenizer

    other = make_student(seed=3)
    other.generation_config.eos_token_id = [1, 5]
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(saved.student).save_pretrained(tmp_path / "other")
    rows = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    assert builder(rows=rows) == 0
    first = read(tmp_path)
    assert builder(rows=rows, model_name_or_path=str(tmp_path / "other")) == 0
    ends = {file.read_text() for file in (tmp_path / "pairs.jsonl.parts").glob("*/ends/part-*")}
    assert any("[1, 5]" in text for text in ends) and len(ends) > 1
    assert builder(rows=rows) == 0
    assert read(tmp_path) == first


def test_a_wrong_answer_of_the_teacher_is_never_chosen(builder, tmp_path, capsys):
    """The teacher's weights are random, so few answers are right; more attempts find more of them."""
    found = {}
    rows = [{"prompt": f"{a}+{b}=", "answer": f"{a}+{b} is so much\n#### {a + b}"} for a in range(5) for b in range(4)]
    for attempts in (1, 30):
        options = ["--verify", "final_number", "--attempts", str(attempts)]
        status = builder(*options, rows=rows, pairs_file=str(tmp_path / "pairs.jsonl"))
        found[attempts] = read(tmp_path) if status == 0 else []
        for row in found[attempts]:
            a, b = row["prompt"].rstrip("=").split("+")
            digits = row["chosen"].replace("+", " ").replace("=", " ").split()
            assert int(digits[-1]) == int(a) + int(b)
            assert row["provenance"]["verified"] == "final_number"
            assert isinstance(row["provenance"]["rejected_is_right"], bool)
    assert len(found[30]) > len(found[1])


def test_unfinished_responses_can_be_left_out(builder, tmp_path):
    rows = [{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)]
    assert builder(rows=rows) == 0
    everything = read(tmp_path)
    assert builder("--keep_unfinished", "false", rows=rows) == 0
    finished = [r for r in everything if r["provenance"]["chosen_finished"] and r["provenance"]["rejected_finished"]]
    assert read(tmp_path) == finished and 0 < len(finished) < len(everything)


@pytest.mark.parametrize(
    "options, rows, named",
    [
        (["--verify", "exact"], None, "verify: exact"),
        (["--attempts", "3"], None, "attempts: 3"),
        (["--attempts", "3", "--verify", "final_number", "--temperature", "0"], None, "same answer"),
        (["--verify", "final_number"], [{"prompt": "1+1="}], "no column 'answer'"),
        (["--verify", "final_number"], [{"prompt": "1+1=", "answer": "two"}], "no number"),
        ([], [{"text": "once upon a time"}], "text"),
        (["--pair_file", "x"], None, "pairs_file"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(builder, capsys, monkeypatch, options, rows, named):
    from distill_trainers import models

    monkeypatch.setattr(models, "load_causal_lm", None)
    assert builder(*options, rows=rows) == 2
    assert named in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(builder, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    assert builder(method="dpkd", teacher_tokenizer="own") == 2
    assert "which writes both responses in one tokenizer" in " ".join(capsys.readouterr().err.split())


def test_the_pairs_can_be_trained_on(builder, make_trainer, saved, tmp_path):
    rows = [{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)]
    assert builder(rows=rows) == 0
    train = load_split(str(tmp_path / "pairs.jsonl"))
    trainer = make_trainer(saved.student, saved.teacher, train, method="dpkd", max_steps=2)
    assert not trainer.requirements.samples_completions and len(trainer.train_dataset) == len(train)
    trainer.train()


@pytest.mark.parametrize("name", ["a" * 230, "x/" * 3000 + "a", "~nobody-here/a", "train.jsonl", "."])
def test_a_file_for_pairs_that_cannot_be_is_refused_before_anything_is_written(builder, tmp_path, capsys, name):
    """That of the dataset among them, which would be overwritten."""
    file = name if name[0] == "~" else str(tmp_path / name)
    before = (tmp_path / "train.jsonl").read_text()
    assert builder(pairs_file=file) == 2
    assert "Got `pairs_file: " in (told := capsys.readouterr().err) and len(told) < 400
    assert (tmp_path / "train.jsonl").read_text() == before
