"""A folder that another run writes to: each command that would write there says so, and loads and writes nothing."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from distill_trainers import models
from distill_trainers.cli import main
from distill_trainers.cli.train import make_initial_student
from distill_trainers.exceptions import CheckpointError
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.storage import write_rows

HOLD = """
import sys
from distill_trainers.locks import holding
with holding(sys.argv[1], beside=sys.argv[2] == "beside"):
    print("holds", flush=True)
    sys.stdin.read()
"""
from_teacher = {"model_name_or_path": None, "student_init": {"from_teacher": True, "keep_layers": 1}}


@pytest.fixture
def in_use():
    """`in_use(path)`: another process writes there until the test ends."""
    started = []

    def start(path, how="inside"):
        command = [sys.executable, "-c", HOLD, str(path), how]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.communicate()


@pytest.fixture
def commands(recipe, tmp_path, saved):
    """Each command by its name, what it writes to, and how that is locked."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"prompt": "1+1=", "completion": "2"}])
    settings = {"student": saved.student, "dataset": str(rows), "output_dir": str(tmp_path / "scores"), "use_cpu": True}
    evaluation, stages = tmp_path / "evaluation.yaml", tmp_path / "stages.yaml"
    evaluation.write_text(yaml.safe_dump(settings))
    stages.write_text(yaml.safe_dump({"folder": str(tmp_path / "work"), "questions": str(rows), "use_cpu": True}))
    out, cache = str(tmp_path / "out"), ["--teacher_cache", str(tmp_path / "cache")]
    rationales = ["rationales", "extract", "--config", str(stages), "--teacher", saved.teacher]
    return SimpleNamespace(
        train=(lambda: ["train", "--config", recipe()], "out", "output_dir"),
        cache_teacher=(lambda: ["cache-teacher", "--config", recipe(lmbda=0.0), *cache], "out", "output_dir"),
        pairs=(lambda: ["pairs", "--config", recipe()], "out/pairs.jsonl", "pairs_file"),
        pairs_and_student=(lambda: ["pairs", "--config", recipe(**from_teacher)], "out", "output_dir"),
        evaluate=(lambda: ["evaluate", "--config", str(evaluation)], "scores", "output_dir"),
        rationales=(lambda: rationales, "work", "folder"),
        import_gguf=(lambda: ["import-gguf", "x.gguf", str(tmp_path / "model")], "model", "output_dir"),
        push=(lambda: ["push", out, "--repo", "me/it"], "out", "RUN"),
        report=(lambda: ["report", out], "out/report.html", "--output"),
    )


@pytest.mark.parametrize(
    "name",
    ["train", "cache_teacher", "pairs", "pairs_and_student", "evaluate", "rationales", "import_gguf", "push", "report"],
)
def test_every_command_that_writes_is_refused(commands, name, in_use, tmp_path, capsys, monkeypatch):
    if name in ("push", "report"):
        (tmp_path / "out").mkdir()
        for file in ("config.json", "model.safetensors", "trainer_state.json"):
            (tmp_path / "out" / file).write_text('{"log_history": [{"step": 1, "loss": 1.0}], "global_step": 1}')
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    argv, place, setting = getattr(commands, name)
    beside = name in ("pairs", "import_gguf", "report")
    owner = in_use(tmp_path / place, "beside" if beside else "inside")
    before = sorted(tmp_path.rglob("*"))
    assert main(argv()) == 2
    said = capsys.readouterr().err
    assert f"'{tmp_path / place}' is being written by process {owner.pid} on " in said, said
    assert f"Wait until it ends, stop it (`kill {owner.pid}` on " in said and f"set another `{setting}`" in said
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "recipe.yaml"] == [
        path for path in before if path.name != "recipe.yaml"
    ]


def test_a_run_can_be_reported_while_it_goes_on(make_trainer, in_use, tmp_path):
    make_trainer(max_steps=1, lmbda=0.0).train()
    in_use(tmp_path / "out")
    assert main(["report", str(tmp_path / "out"), "--no-plots"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_other_processes_of_a_launch_do_not_lock(in_use, tmp_path, monkeypatch):
    from distill_trainers.locks import holding_run

    in_use(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with holding_run(tmp_path):
        pass


# ---- Half-written folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["", "{", "[]", '{"teacher": "another"}'])
def test_a_student_whose_mark_is_torn_is_made_again(recipe, tmp_path, mark):
    folder = tmp_path / "out" / "student_init"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(mark)
    (folder / "model.safetensors").write_bytes(b"half")
    recipe = parse_recipe(["--config", recipe(**from_teacher)])
    make_initial_student(recipe, None)
    assert json.loads((folder / "manifest.json").read_text())["settings"]["keep_layers"] == 1
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_a_full_disk_under_the_student_leaves_the_one_before(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for step in (trainer.save_model, trainer.save_state):
        if step == trainer.save_state:
            monkeypatch.setattr("distill_trainers.trainers.lifecycle.thrift.RunState.save_to_json", full)
        else:
            monkeypatch.setattr(type(trainer.processing_class), "save_pretrained", full)
        with pytest.raises(CheckpointError, match="No space left.* MiB are free there"):
            step()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_pairs_are_shown_from_a_file_where_there_is_no_folder(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [])
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"folder": str(tmp_path / "work"), "input": str(tmp_path / "pairs.jsonl")}))
    assert main(["rationales", "dual", "--inspect", "--config", str(settings)]) == 0
    assert (tmp_path / "work" / "dual.html").is_file()
