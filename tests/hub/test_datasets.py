"""Pairs and rationales on a Hub, over HTTP: from the commands that make them, and from files."""

from __future__ import annotations

import json

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from distill_trainers.cards.dataset_card import Writers, dataset_card, push_rows
from distill_trainers.cli import main
from distill_trainers.exceptions import DatasetError, HubError
from distill_trainers.storage import write_rows

PAIR = {
    "prompt": [{"role": "user", "content": "1+2="}],
    "chosen": [{"role": "assistant", "content": "3"}],
    "rejected": [{"role": "assistant", "content": "4"}],
    "provenance": {"teacher": "/home/someone/models/big", "student": "org/small", "seed": 0},
}
CHAIN = {
    "question": "1+2",
    "answer": "3",
    "rationale": "One and two are three.",
    "provenance": {"teacher": "big-model", "endpoint": "http://10.0.0.3:8000/v1", "sampling": {"top_p": 1.0}},
}


@pytest.mark.parametrize("row", [PAIR, CHAIN], ids=["pairs", "rationales"])
def test_rows_come_back_as_they_were(hub, row):
    rows = [{**row, "answer": str(i)} for i in range(5)]
    push_rows(rows, "me/rows", Writers())
    pulled = load_dataset("me/rows", split="train")
    assert len(pulled) == 5
    for name in row.keys() - {"provenance", "answer"}:
        assert pulled[2][name] == row[name]
    assert json.loads(pulled[2]["provenance"])["teacher"] in ("big", "big-model")
    sent = b"".join(hub.files("me/rows", kind="datasets").values())
    assert b"/home/someone" not in sent and b"10.0.0.3" not in sent


def test_a_card_says_where_rows_come_from(hub):
    hub.add("org/prompts", "---\nlicense: apache-2.0\n---\n", kind="datasets")
    hub.add("org/big", "---\nlicense: apache-2.0\n---\n")
    rows = [{**PAIR, "provenance": {"teacher": "org/big", "student": "org/big"}}]
    push_rows(rows, "me/pairs", Writers(data="org/prompts"), private=True)
    card = DatasetCard.load("me/pairs")
    assert card.data.license == "apache-2.0" and "`org/big`" in card.text and "`method: dpkd`" in card.text
    assert hub.repos[("datasets", "me/pairs")].private


def test_the_licence_of_a_served_teacher_is_unknown():
    card = dataset_card([CHAIN], "me/chains", Writers())
    assert "teacher: in memory — unknown" in card and "license" not in card.split("---")[1]


def test_rows_of_another_kind_are_refused():
    with pytest.raises(DatasetError, match=r"columns \['text'\]; expected pairs"):
        push_rows([{"text": "x"}], "me/rows", Writers())
    with pytest.raises(DatasetError, match="no rows"):
        push_rows([], "me/rows", Writers())


def test_an_upload_that_breaks_can_be_repeated(hub, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    write_rows(file, [PAIR] * 3)
    hub.breaks = 1000
    assert main(["push", str(file), "--repo", "me/pairs"]) == 1
    assert "goes on where this one stopped" in capsys.readouterr().err
    hub.breaks = 0
    assert main(["push", str(file), "--repo", "me/pairs"]) == 0
    assert len(load_dataset("me/pairs", split="train")) == 3


def test_a_wrong_token_says_what_to_do(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises((HubError, ValueError), match="does not accept the token.*hf auth login"):
        push_rows([PAIR], "me/pairs", Writers())
