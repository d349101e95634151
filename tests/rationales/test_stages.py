"""Parse, verify, dual: what is kept, what is dropped and why, and pairs with their key steps."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from distill_trainers.exceptions import DatasetError
from distill_trainers.rationales.exemplars import EXEMPLARS
from distill_trainers.rationales.prompts import as_text, contrastive_prompt, cot_prompt, exemplars_of, hint_prompt
from distill_trainers.rationales.records import Response, dataset_of
from distill_trainers.rationales.show import html_page, marked, terminal_lines
from distill_trainers.rationales.stages import dual, extract, parse, verify
from distill_trainers.storage import RecordStore, read_rows, write_rows


class Told:
    """A teacher that answers by a function of the prompt's kind and the question."""

    def __init__(self, tell):
        self.tell, self.asked = tell, []

    def identity(self):
        return {"teacher": "told"}

    def complete(self, requests):
        for request in requests:
            self.asked.append(request)
            yield Response(request.key, self.tell(request.messages), "stop", 3, 2)


def responses(*texts, question="What is 2 + 3?", answer="5", **more):
    return [{"question": question, "answer": answer, "response": text, **more} for text in texts]


GOOD = "2 + 3 = 5. The answer is 5."
BAD = "2 + 3 = 6. The answer is 6."


def test_verify_keeps_right_chains_and_counts_the_others():
    rows = parse(responses(GOOD, BAD, GOOD, "Hm.", "The answer is 5."))
    found = verify(rows)
    assert [row["rationale"] for row in found.right] == ["2 + 3 = 5."]
    assert [row["parsed_answer"] for row in found.wrong] == ["6"]
    assert found.counts == {"right": 1, "wrong": 1, "duplicate": 1, "no answer": 1, "no rationale": 1}
    assert sum(found.counts.values()) == len(rows)


def test_majority_where_nobody_knows():
    rows = parse(responses(GOOD, "I add. The answer is 5.0.", BAD, answer=None))
    rows += parse(responses(GOOD, BAD, question="other", answer=None))
    found = verify(rows)
    assert [row["answer"] for row in found.right] == ["5", "5"] and found.right[0]["verified_by"] == "vote"
    assert found.counts == {"right": 2, "wrong": 1, "no majority": 2}


def test_one_sample_is_no_vote():
    """It agrees with itself, whatever it says."""
    found = verify(parse(responses(BAD, answer=None)))
    assert not found.right and found.counts == {"no majority": 1}
    found = verify(parse(responses(BAD, "Hm.", answer=None)), majority_share=0.4)
    assert not found.right and found.counts == {"no majority": 2}


def test_verdicts_are_kept(tmp_path, monkeypatch):
    rows = parse(responses(GOOD, BAD))
    first = verify(rows, store=RecordStore(tmp_path))
    monkeypatch.setattr("distill_trainers.rationales.stages.verify_answer", lambda *a: pytest.fail("judged again"))
    assert verify(rows, store=RecordStore(tmp_path)) == first


def test_choices_are_parsed_as_such():
    rows = responses("Milk is cold there. The answer is (B).", question="Where?", answer="fridge")
    found = verify(parse([{**rows[0], "choices": ["shelf", "fridge"]}]))
    assert found.counts == {"right": 1} and found.right[0]["verified_by"] == "choice"


def test_prompts_hold_what_they_should():
    shots = exemplars_of("arithmetic", 2)
    item = {"question": "What is 2 + 3?", "answer": "5"}
    cot, hint = cot_prompt(item, shots), hint_prompt(item, shots)
    assert [m["role"] for m in cot] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "5" not in cot[-1]["content"].replace("2 + 3", "") and "the answer is 5" in hint[-1]["content"]
    pair = {"question": "q1", "right": "r1", "wrong": "w1"}
    contrast = contrastive_prompt(item, GOOD, [pair], shots)
    assert [m["content"] for m in contrast[1:3]] == ["q1\nCorrect solution: r1", "w1"] and len(contrast) == 6
    text = as_text(cot)
    assert text.count("\nA:") == 3 and text.endswith("Q: What is 2 + 3?\nA:")
    chosen = cot_prompt({"question": "Where?", "choices": ["a", "b"]}, exemplars_of("choice", 1))
    assert chosen[-1]["content"] == "Where?\n(A) a\n(B) b"


@pytest.mark.parametrize("name", EXEMPLARS)
def test_exemplars_are_right_and_their_wrong_versions_wrong(name):
    for row in EXEMPLARS[name]:
        for rationale, answer, verdict in (
            ("rationale", "answer", "right"),
            ("wrong_rationale", "wrong_answer", "wrong"),
        ):
            text = f"{row[rationale]} The answer is {row[answer]}."
            found = verify(parse([{**row, "response": text}]))
            assert found.counts == {verdict: 1}, row["question"]
        if name == "arithmetic":  # the last number of the steps is the answer
            assert row["rationale"].rstrip(".").replace(" metres", "").split()[-1] == row["answer"]


def test_exemplars_must_be_whole():
    with pytest.raises(DatasetError, match="no rationale and no answer"):
        exemplars_of([{"question": "q"}], 3)
    with pytest.raises(DatasetError, match="arithmetic, choice"):
        exemplars_of("arithmetics", 3)


def test_dual_pairs_what_is_there_and_asks_for_the_rest(tmp_path):
    both = parse(responses(GOOD, BAD))
    only_wrong = parse(responses("7 - 1 = 5. The answer is 5.", question="What is 7 - 1?", answer="6"))
    only_right = parse(responses("1 + 1 = 2. The answer is 2.", question="What is 1 + 1?", answer="2"))
    found = verify(both + only_wrong + only_right)

    def tell(messages):
        last = messages[-1]["content"]
        if "Hint" in last:
            assert "7 - 1" in last and "the answer is 6" in last
            return "7 - 1 = 6. The answer is 6."
        assert "Correct solution: 1 + 1 = 2. The answer is 2." in last
        assert any("2 + 3 = 6." in message["content"] for message in messages)  # the data's own pair as an example
        return "1 + 1 = 3. The answer is 3."

    teacher = Told(tell)
    shots = exemplars_of("arithmetic", 2)
    made = dual(found.right, found.wrong, teacher, RecordStore(tmp_path), exemplars=shots)
    assert {row["source"]: (row["rationale"], row["wrong_rationale"]) for row in made.pairs} == {
        "D+/D-": ("2 + 3 = 5.", "2 + 3 = 6."),
        "D-+/D-": ("7 - 1 = 6.", "7 - 1 = 5."),
        "D+/D+-": ("1 + 1 = 2.", "1 + 1 = 3."),
    }
    assert all(row["word_edits"] == 1 for row in made.pairs) and len(made.right) == 3
    assert len(teacher.asked) == 2
    again = dual(
        found.right, found.wrong, Told(lambda m: pytest.fail("asked again")), RecordStore(tmp_path), exemplars=shots
    )
    assert again.pairs == made.pairs
    alone = dual(found.right, found.wrong, None, RecordStore(tmp_path / "none"))
    assert [row["source"] for row in alone.pairs] == ["D+/D-"]


def test_what_a_teacher_gets_wrong_makes_no_pair(tmp_path):
    rows = verify(parse(responses(BAD)))
    made = dual(rows.right, rows.wrong, Told(lambda m: BAD), RecordStore(tmp_path))
    assert not made.pairs and made.counts == {"hint: wrong": 1}


def test_key_steps_are_marked_and_text_is_escaped():
    row = {
        "question": "Is 1 < 2 <script>?",
        "answer": "5",
        "rationale": "2 + 3 = 5 [bold]<b>",
        "wrong_rationale": "2 + 3 = 6 [bold]<b>",
        "source": "D+/D-",
    }
    right, wrong = marked(row)
    assert [piece for piece, key in right if key] == [" 5"] and [piece for piece, key in wrong if key] == [" 6"]
    assert "".join(piece for piece, _ in right) == row["rationale"]
    asked, plus, minus = terminal_lines(row)
    assert "[bold green] 5[/]" in plus and "[bold red] 6[/]" in minus and r"\[bold]<b>" in plus
    page = html_page([row])
    assert "<ins> 5</ins>" in page and "<del> 6</del>" in page and "<script>" not in page and "&lt;b&gt;" in page
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

    Reader().feed(page)
    assert "b" in tags and "script" not in tags


def test_rows_on_disk(tmp_path):
    rows = [{"key": "a", "question": "é", "provenance": {"t": 1}}, {"key": "b", "question": "\ud800", "extra": None}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows and not list(tmp_path.glob("*.tmp"))
    data = dataset_of(rows)
    RecordStore(tmp_path / "store").append(rows)
    assert RecordStore(tmp_path / "store").load() == {row["key"]: row for row in rows}
    assert json.loads(data[0]["provenance"]) == {"t": 1} and data["extra"] == [None, None]
    hostile = {"question": "a\u2028b\u0085c\x0bd"}  # each of them a line of its own to str.splitlines
    (tmp_path / "mine.jsonl").write_text("\ufeff" + json.dumps(hostile, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_rows(tmp_path / "mine.jsonl") == [hostile]
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(DatasetError, match="not in UTF-8"):
        read_rows(tmp_path / "latin.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b"')
    with pytest.raises(DatasetError, match="Line 2"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DatasetError, match="no file"):
        read_rows(tmp_path / "none.jsonl")


def test_missing_columns_are_named(tmp_path):
    with pytest.raises(DatasetError, match="no question"):
        extract([{"prompt": "x"}], Told(str), RecordStore(tmp_path))
    with pytest.raises(DatasetError, match="no response"):
        parse([{"question": "x"}])
    with pytest.raises(DatasetError, match="no responses"):
        parse([])
