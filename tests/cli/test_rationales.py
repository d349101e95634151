"""`distill-trainers rationales`: the stages on disk, one after the other and each alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset, load_from_disk

from distill_trainers.cli import main
from distill_trainers.cli.rationales import PipelineArguments, parse_arguments
from distill_trainers.storage import read_rows, write_rows

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def settings(tmp_path):
    """`settings(**changes)` writes a file of settings and returns its path."""

    def write(**changes):
        path = tmp_path / "rationales.yaml"
        path.write_text(yaml.safe_dump({"folder": str(tmp_path / "work"), **changes}))
        return str(path)

    return write


RESPONSES = [
    {"question": "2 + 3?", "answer": "5", "response": "2 + 3 = 5. The answer is 5."},
    {"question": "2 + 3?", "answer": "5", "response": "2 + 3 = 6. The answer is 6."},
    {"question": "1 + 1?", "answer": "2", "response": "1 + 1 = 2. The answer is 2.\n\nQ: 4 + 4?\nA: The answer is 8."},
    {"question": "9 - 1?", "answer": "8", "response": "Hm."},
]


def test_from_responses_to_pairs(settings, tmp_path, capsys):
    source = tmp_path / "mine.jsonl"
    write_rows(source, RESPONSES)
    config, work = settings(ask_for_pairs=False, save_as="dataset"), tmp_path / "work"
    assert main(["rationales", "parse", "--config", config, "--input", str(source)]) == 0
    assert "1 no answer" in capsys.readouterr().out
    assert main(["rationales", "verify", "--config", config]) == 0
    assert "2 right, 1 wrong, 1 no answer" in capsys.readouterr().out
    assert json.loads((work / "verify-report.json").read_text()) == {"no answer": 1, "right": 2, "rows": 4, "wrong": 1}
    right = load_from_disk(str(work / "verified_dataset"))
    assert right["rationale"] == ["2 + 3 = 5.", "1 + 1 = 2."] and right["answer"] == ["5", "2"]
    assert main(["rationales", "dual", "--config", config]) == 0
    (pair,) = read_rows(work / "dual.jsonl")
    assert (pair["rationale"], pair["wrong_rationale"]) == ("2 + 3 = 5.", "2 + 3 = 6.")
    assert len(read_rows(work / "sft.jsonl")) == 2
    capsys.readouterr()
    assert main(["rationales", "dual", "--config", config, "--inspect"]) == 0
    assert "2 + 3 = 6." in capsys.readouterr().out
    assert "<del> 6.</del>" in (work / "dual.html").read_text()


def test_a_stage_run_again_changes_nothing(settings, tmp_path):
    source = tmp_path / "mine.jsonl"
    write_rows(source, RESPONSES)
    config, work = settings(), tmp_path / "work"
    contents = []
    for _ in range(2):
        assert main(["rationales", "parse", "--config", config, "--input", str(source)]) == 0
        assert main(["rationales", "verify", "--config", config]) == 0
        contents.append([(work / name).read_bytes() for name in ("parsed.jsonl", "verified.jsonl", "wrong.jsonl")])
    assert contents[0] == contents[1]


def test_extract_from_a_local_model(settings, saved, tmp_path, capsys):
    source = tmp_path / "questions.jsonl"
    write_rows(source, [{"input": f"{n}+{n}=", "label": f"steps #### {2 * n}"} for n in range(1, 7)])
    config = settings(
        questions=str(source),
        column_mapping={"input": "question", "label": "answer"},
        reference_format="hash",
        teacher=saved.teacher,
        use_cpu=True,
        samples=2,
        max_new_tokens=6,
        shots=1,
        temperature=1.0,
    )
    status = main(["rationales", "extract", "--config", config])
    rows = read_rows(tmp_path / "work" / "responses.jsonl")
    report = json.loads((tmp_path / "work" / "extract-report.json").read_text())
    assert report["done"] == len(rows) and report["done"] + sum(report["failed"].values()) == 12
    assert status == (1 if report["failed"] else 0)
    assert rows[0]["answer"] == str(2 * int(rows[0]["question"].split("+")[0]))
    assert rows[0]["provenance"]["teacher"] == saved.teacher and rows[0]["provenance"]["sampling"]["temperature"] == 1.0
    main(["rationales", "extract", "--config", config])
    assert json.loads((tmp_path / "work" / "extract-report.json").read_text())["known"] == len(rows)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_a_launch_that_would_shard_the_teacher_is_refused(settings, saved, tmp_path, capsys, monkeypatch, kind):
    source = tmp_path / "questions.jsonl"
    write_rows(source, [{"question": "1+1"}])
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    config = settings(questions=str(source), teacher=saved.teacher, use_cpu=True)
    assert main(["rationales", "extract", "--config", config]) == 2
    assert "device_map: auto" in capsys.readouterr().err


def test_push(settings, tmp_path, hub):
    source = tmp_path / "mine.jsonl"
    write_rows(source, RESPONSES)
    config = settings(push_to_hub="me/chains", hub_private_repo=True)
    assert main(["rationales", "parse", "--config", config, "--input", str(source)]) == 0
    assert load_dataset("me/chains", split="train").num_rows == 4
    assert hub.repos[("datasets", "me/chains")].private


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("extrct", {}, "extract, parse, verify, dual"),
        ("parse", {"folder": ""}, "No folder"),
        ("parse", {"answer_fromats": ["hash"]}, "answer_formats"),
        ("parse", {"answer_formats": ["hsh"]}, "hash, boxed"),
        ("parse", {"answer_kind": "maths"}, "auto, number"),
        ("parse", {"samples": "many"}, "samples"),
        ("parse", {"samples": 2, "temperature": 0.0}, "same chain each time"),
        ("parse", {"save_as": "csv"}, "jsonl or dataset"),
        ("parse", {}, "Run the stage before"),
        ("extract", {}, "No questions"),
        ("dual", {}, "Run the stage before"),
    ],
)
def test_bad_settings(settings, capsys, stage, changes, message):
    assert main(["rationales", stage, "--config", settings(**changes)]) == 2
    assert message in capsys.readouterr().err


def test_a_teacher_is_named(settings, tmp_path, capsys):
    source = tmp_path / "questions.jsonl"
    write_rows(source, [{"question": "1+1"}])
    assert main(["rationales", "extract", "--config", settings(questions=str(source))]) == 2
    assert "No teacher" in capsys.readouterr().err


def test_help(capsys):
    assert main(["rationales"]) == 0
    assert all(stage in capsys.readouterr().out for stage in ("dual",))


def test_settings_have_help():
    assert all(f.metadata["help"].endswith((".", ")")) for f in fields(PipelineArguments))


@pytest.mark.skipif(not (SHARED / "svamp_rationales").is_dir(), reason="no ../shared/data/svamp_rationales")
def test_the_published_rationales_of_svamp(settings, tmp_path, capsys):
    folder = SHARED / "svamp_rationales"
    questions = [json.loads(line) for line in (folder / "svamp_train.json").read_text().splitlines()]
    chains = [text for part in (0, 1) for text in json.loads((folder / f"train_CoT_{part}.json").read_text())]
    rows = [
        {"question": q["input"], "answer": q["label"], "response": text}
        for q, text in zip(questions, chains, strict=True)
    ]
    write_rows(tmp_path / "svamp.jsonl", rows)
    config = settings(answer_formats=["answer_is"], answer_kind="number")
    assert main(["rationales", "parse", "--config", config, "--input", str(tmp_path / "svamp.jsonl")]) == 0
    assert main(["rationales", "verify", "--config", config]) == 0
    report = json.loads((tmp_path / "work" / "verify-report.json").read_text())
    assert report == SVAMP
    right = read_rows(tmp_path / "work" / "verified.jsonl")
    assert not any("Q:" in row["rationale"] or "answer is" in row["rationale"] for row in right)


# Those that are wrong were read: other numbers, other operations, unknowns (`some - 8`), two answers in one.
SVAMP = {"rows": 800, "right": 594, "wrong": 195, "no answer": 11}


def test_overrides(settings):
    args = parse_arguments(
        ["--config", settings(samples=3), "--temperature", "0.9", "--answer_formats", "hash", "boxed"]
    )
    assert (args.samples, args.temperature, args.answer_formats) == (3, 0.9, ["hash", "boxed"])


@pytest.mark.parametrize(("command", "stem"), [("parse", "responses"), ("verify", "parsed")])
@pytest.mark.parametrize("text", ["", '{"prompt": "a"}\n'])
def test_rows_that_a_stage_cannot_use_are_named_with_their_file(tmp_path, capsys, command, stem, text):
    (tmp_path / f"{stem}.jsonl").write_text(text)
    assert main(["rationales", command, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{stem}.jsonl" in error and ("expected at least one row" in error or "have the columns" in error)
