"""`distill-trainers evaluate --run FOLDER`: the rows, models and settings of a finished run."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset

from distill_trainers import hub, models
from distill_trainers.cli import main
from distill_trainers.cli.evaluate import parse_arguments, prepare_evaluation
from distill_trainers.cli.finished_run import _without_rejected, take_up
from distill_trainers.cli.train import build_trainer
from distill_trainers.data import train_eval_split
from distill_trainers.evaluation import EvaluationResults
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.toy import RATIONALE_PROMPTS, addition_rationales

SHORT = ["--use_cpu", "true", "--seeds", "1", "--bootstrap_samples", "20", "--metrics", "perplexity", "agreement"]


HELD_OUT = {"eval_fraction": 0.25, "seed": 7, "max_steps": 1}


@pytest.fixture
def finished(recipe, tmp_path, saved):
    """`finished(**changes)`: the folder of a run that holds rows out, whose student is as it was."""

    def finish(**changes):
        build_trainer(parse_recipe(["--config", recipe(**{**HELD_OUT, **changes})]))
        shutil.copytree(saved.student, tmp_path / "out", dirs_exist_ok=True)
        return tmp_path / "out"

    return finish


def taken_up(*options):
    """Arguments and settings of the command, with what a run gives."""
    args, settings = parse_arguments(options)
    take_up(args, settings)
    return args, settings


@pytest.fixture
def refusal(capsys, monkeypatch):
    """`refusal(folder, *options)`: the error line; no weights are loaded before it."""

    def message(folder, *options):
        with monkeypatch.context() as patch:
            patch.setattr(models, "load_causal_lm", None)
            assert main(["evaluate", "--run", str(folder), *SHORT, *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return message


def test_a_run_is_evaluated_on_what_it_held_out(recipe, tmp_path, saved):
    assert main(["train", "--config", recipe(**HELD_OUT, max_length=20)]) == 0
    folder = tmp_path / "out"
    args, settings = parse_arguments(["--run", str(folder), *SHORT])
    evaluation = prepare_evaluation(args, settings)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = train_eval_split(Dataset.from_list(rows), 0.25, 7)[1]
    assert [example.prompt_text for example in evaluation.examples.examples] == held_out["prompt"][:]
    assert (args.teacher, args.baseline, args.students) == (saved.teacher, saved.student, {"out": str(folder)})
    assert (settings.max_length, settings.max_new_tokens) == (20, 4)
    assert main(["evaluate", "--run", str(folder), *SHORT]) == 0
    results = EvaluationResults.load(folder / "evaluation")
    assert [m.role for m in results.models] == ["teacher", "baseline", "student"]
    assert results.data["name"] == "held out by out" and results.data["rows"] == len(held_out)
    assert "evaluate.json" not in hub.published_files(folder)


def test_what_is_named_comes_first(finished, tmp_path, saved):
    folder = finished()
    options = ["--teacher", saved.student, "--max_length", "512", "--output_dir", str(tmp_path / "e")]
    args, settings = taken_up("--run", str(folder), *options)
    assert (args.teacher, settings.max_length, args.output_dir) == (saved.student, 512, str(tmp_path / "e"))
    assert settings.max_new_tokens == 4
    file = tmp_path / "settings.yaml"
    file.write_text(f"run: {folder}\nmax_new_tokens: 3\nbaseline: {saved.teacher}\n")
    args, settings = taken_up("--config", str(file))
    assert (settings.max_new_tokens, args.baseline, args.teacher) == (3, saved.teacher, saved.teacher)
    data = tmp_path / "other.jsonl"
    data.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    args, settings = parse_arguments(["--run", str(folder), "--dataset", str(data), *SHORT])
    assert len(prepare_evaluation(args, settings).examples.examples) == 1


def test_renamed_columns_evaluation_files_and_pairs(finished, tmp_path):
    """Rows are read as the run read them."""
    rows = [{"q": f"{n}+1=", "a": str(n + 1), "rejected": "0"} for n in range(9)]
    for name in ("renamed", "held"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[: 8 if name == "renamed" else 9])))
    files = {"dataset": str(tmp_path / "renamed.jsonl"), "eval_dataset": str(tmp_path / "held.jsonl")}
    for method, mapping in (("gkd", {"q": "prompt", "a": "completion"}), ("dpkd", {"q": "prompt", "a": "chosen"})):
        folder = finished(method=method, eval_fraction=None, column_mapping=mapping, **files)
        args, settings = parse_arguments(["--run", str(folder), *SHORT])
        examples = prepare_evaluation(args, settings).examples.examples
        assert [(e.prompt_text, e.references) for e in examples] == [(row["q"], [row["a"]]) for row in rows]


def test_students_made_of_layers_have_their_baseline_in_the_run(finished):
    made = {"model_name_or_path": None, "student_init": {"from_teacher": True, "keep_layers": 1}}
    folder = finished(**made)
    args, settings = parse_arguments(["--run", str(folder), *SHORT])
    prepare_evaluation(args, settings)
    assert args.baseline == str(folder / "student_init")
    moved = folder.rename(folder.parent / "moved")
    assert taken_up("--run", str(moved))[0].baseline == str(moved / "student_init")


@pytest.mark.parametrize(("objective", "asked"), [("step_by_step", "label_prompt"), ("dual_chain", "chain_prompt")])
def test_questions_are_asked_as_they_were_finished(recipe, tmp_path, objective, asked):
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in addition_rationales(12)))
    settings = {**RATIONALE_PROMPTS, "objective": objective, "teacher_model_name_or_path": None, "max_length": 40}
    weights = {"innovation_weight": 0.0} if objective == "dual_chain" else {}
    path = recipe(method="rationale", dataset=str(data), eval_fraction=3, **settings, **weights)
    build_trainer(parse_recipe(["--config", path]))
    told = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert told["settings"]["question_prompt"] == RATIONALE_PROMPTS[asked] and told["rows"]["count"] == 3


def test_what_is_no_finished_run_is_refused(finished, refusal, tmp_path, saved):
    assert "which is not a folder; expected the `output_dir` of a run" in refusal(tmp_path / "nothing")
    assert "no evaluate.json that can be read" in refusal(saved.student)
    folder = finished()
    assert "`run`, and a student besides" in refusal(folder, "--student", saved.student)
    begun = tmp_path / "begun"
    (begun / "checkpoint-2").mkdir(parents=True)
    shutil.copy(folder / "evaluate.json", begun)
    assert "no finished student" in refusal(begun) and "checkpoint-2" in refusal(begun)
    for text, word in (("{", "can be read"), ("[]", "another version"), ('{"version": 99}', "another version")):
        (begun / "evaluate.json").write_text(text)
        assert word in refusal(begun)


def test_data_that_has_changed_is_refused(finished, refusal, tmp_path):
    folder = finished()
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + '\n{"prompt": "9+9=", "completion": "18"}')
    assert "no longer those that its data gives" in refusal(folder) and "train.jsonl" in refusal(folder)
    data.unlink()
    assert "no such file" in refusal(folder)


def test_the_baseline_is_of_the_revision_that_was_trained(finished, saved):
    """The other models are not: a student has none, and a teacher that is named besides is another one."""
    folder = finished(model_init_kwargs={"revision": "v1"}, teacher_model_init_kwargs={"revision": "v2"})
    args, settings = parse_arguments(["--run", str(folder), *SHORT])
    subjects = {subject.role: subject for subject in prepare_evaluation(args, settings).subjects}
    revisions = {role: subject._kwargs.get("revision") for role, subject in subjects.items()}
    assert revisions == {"teacher": "v2", "baseline": "v1", "student": None}
    others = taken_up("--run", str(folder), "--baseline", saved.teacher, "--teacher", saved.student)[0]
    assert others.baseline_model_init_kwargs is None and others.teacher_model_init_kwargs is None


def test_rows_that_the_run_did_not_cut_are_whole(recipe, tmp_path, saved):
    rows = [{"prompt": "1+" * 400 + f"{n}=", "completion": str(n)} for n in range(8)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = recipe(**HELD_OUT, dataset=str(tmp_path / "long.jsonl"))
    with open(path) as file:
        text = file.read().replace("max_length: 24", "max_length: null")
    with open(path, "w") as file:
        file.write(text)
    build_trainer(parse_recipe(["--config", path]))
    shutil.copytree(saved.student, tmp_path / "out", dirs_exist_ok=True)
    args, settings = parse_arguments(["--run", str(tmp_path / "out"), *SHORT])
    examples = prepare_evaluation(args, settings).examples.examples
    assert len(examples) == 2 and all(len(example.prompt_ids) == 802 for example in examples)


def test_no_secret_is_written_down(finished):
    secret, dtype = "hf_" + "a" * 34, {"dtype": "float32"}
    folder = finished(teacher_model_init_kwargs={"token": secret, **dtype}, model_init_kwargs={"token": secret})
    assert secret not in (folder / "evaluate.json").read_text()
    args, settings = parse_arguments(["--run", str(folder), *SHORT])
    told = take_up(args, settings)
    assert args.teacher_model_init_kwargs == dtype and args.baseline_model_init_kwargs is None
    wanted = [f"The run's {model} was loaded with ['token']" for model in ("teacher", "baseline")]
    assert [note.split(", which")[0] for note in told] == wanted


def test_a_run_that_held_nothing_out_needs_data(finished, refusal):
    assert "held out no rows" in refusal(finished(eval_fraction=None))


def test_a_teacher_behind_http_is_left_out_with_a_word(finished, capsys):
    folder = finished()
    file = folder / "evaluate.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "teacher": None, "teacher_is_a_server": True}))
    args, settings = parse_arguments(["--run", str(folder), "--metrics", "perplexity"])
    prepare_evaluation(args, settings)
    assert args.teacher is None and "teacher is a server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "is_baseline", "said"),
    [
        ({"self_teacher": "initial", "teacher_system_prompt": "Add."}, True, None),
        ({"teacher_placement": "adapter_off", "use_peft": True, "lora_target_modules": "all-linear"}, True, None),
        (
            {"self_teacher": "ema"},
            False,
            "The run's teacher (ema: the student's weights, averaged over",
        ),
        ({"extrapolate": {"reference": "initial"}}, False, "The run's teacher was composed (`extrapolate`)"),
        ({}, False, None),
    ],
    ids=["initial", "adapter_off", "ema", "extrapolate", "plain"],
)
def test_a_teacher_that_is_the_student_is_its_baseline_or_is_told(finished, saved, changes, is_baseline, said):
    own = changes.keys() & {"self_teacher", "teacher_placement"}
    folder = finished(**changes, **({"teacher_model_name_or_path": None} if own else {}))
    args, settings = parse_arguments(["--run", str(folder)])
    notes = take_up(args, settings)
    assert args.teacher == (args.baseline if is_baseline else None if own else saved.teacher)
    assert args.baseline == saved.student
    assert [note[: len(said)] for note in notes] == [said] if said else not notes
    prepare_evaluation(*parse_arguments(["--run", str(folder)]))  # one model in both roles
    args, settings = parse_arguments(["--run", str(folder), "--teacher", saved.teacher])
    assert not take_up(args, settings) and args.teacher == saved.teacher


def test_pairs_keep_what_belongs_to_their_prompts():
    rows = Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "tools": "[]"}])
    assert _without_rejected(rows)[:] == {"prompt": ["q"], "completion": ["a"], "system": ["s"], "tools": ["[]"]}
