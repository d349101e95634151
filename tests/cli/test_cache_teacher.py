"""`distill-trainers cache-teacher`: fills a cache ahead of training, goes on where it stopped, tells what is in one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import distill_trainers.models as models
from distill_trainers.cli import main
from distill_trainers.teachers import CachedTeacher
from distill_trainers.teachers.cache.report import inspect_cache

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, saved):
    """`recipe(**changes)` writes a recipe with a teacher cache and returns its path."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(**changes):
        content = {
            "model_name_or_path": saved.student,
            "teacher_model_name_or_path": saved.teacher,
            "dataset": str(data),
            "eval_fraction": 4,
            "output_dir": str(tmp_path / "out"),
            "teacher_cache": str(tmp_path / "cache"),
            "lmbda": 0.0,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "max_length": 24,
            "max_new_tokens": 4,
            "save_strategy": "no",
            "use_cpu": True,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return str(path)

    return write


def only_students(monkeypatch, saved):
    load = models.load_causal_lm

    def check(name, **kwargs):
        assert name != saved.teacher, f"{name} was loaded"
        return load(name, **kwargs)

    monkeypatch.setattr(models, "load_causal_lm", check)


def test_fill_then_train_without_the_teacher(recipe, tmp_path, saved, monkeypatch, capsys):
    assert main(["cache-teacher", "--config", recipe()]) == 0
    printed = capsys.readouterr().out
    assert "24 of 24 rows were asked for" in printed and "holds 24 rows" in printed
    only_students(monkeypatch, saved)
    assert main(["cache-teacher", "--config", recipe()]) == 0
    assert "0 of 24 rows were asked for" in capsys.readouterr().out
    assert main(["train", "--config", recipe()]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_kl"] > 0


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_scores_are_those_of_a_run_with_the_live_teacher(recipe, tmp_path, kind):
    settings = {"divergence": "forward_kl", "eval_fraction": 12, "max_steps": 1}
    whole = {"teacher_cache_kind": kind, "teacher_cache_top_k": 999, "teacher_cache_draws": 20_000}
    scores = []
    for changes in ({"teacher_cache": None}, whole):
        assert main(["train", "--config", recipe(**settings, **changes)]) == 0
        scores.append(json.loads((tmp_path / "out" / "metrics.json").read_text())["eval_kl"])
    assert scores[1] == pytest.approx(scores[0], rel=0.03 if kind == "sampled" else 1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`teacher_cache_kind`: {kind}" in card


def test_prompts_alone_are_completed_and_cached(recipe, tmp_path, saved, monkeypatch):
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{a}+{b}="}) for a in range(4) for b in range(3)))
    path = recipe(dataset=str(data), seq_kd=True)
    assert main(["cache-teacher", "--config", path]) == 0
    assert len(CachedTeacher(tmp_path / "cache").cache) == 12
    only_students(monkeypatch, saved)
    assert main(["train", "--config", path]) == 0


def test_a_truncated_shard_is_removed_and_computed_anew(recipe, tmp_path, capsys):
    assert main(["cache-teacher", "--config", recipe()]) == 0
    (shard,) = (tmp_path / "cache").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-20])
    capsys.readouterr()
    assert main(["cache-teacher", "--inspect", str(tmp_path / "cache")]) == 1
    assert re.search(rf"damaged +{shard.name}: cannot be opened", capsys.readouterr().out)
    assert main(["cache-teacher", "--config", recipe()]) == 0
    printed = capsys.readouterr().out
    assert f"Removed the unreadable shard {shard.name}" in printed and "24 of 24 rows were asked" in printed
    assert main(["cache-teacher", "--inspect", str(tmp_path / "cache")]) == 0


def test_inspect_tells_what_is_there(recipe, tmp_path, saved, capsys):
    changes = {"teacher_cache_kind": "topk", "teacher_cache_top_k": 3}
    assert main(["cache-teacher", "--config", recipe(**changes)]) == 0
    (tmp_path / "cache" / ".shard-x.safetensors.0.tmp").write_bytes(b"half")
    capsys.readouterr()
    assert main(["cache-teacher", "--inspect", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    report = inspect_cache(tmp_path / "cache")
    assert 0 < report.retained_mass < 1 and report.rows == 24 and report.abandoned == 1
    for text in (
        saved.teacher,
        "topk",
        "top_k +3",
        "rows +24",
        f"{report.retained_mass:.4%}",
        "model.safetensors",
        "1 sh",
    ):
        assert re.search(text if "+" in text else re.escape(text), printed), text


def test_the_plan_says_what_is_missing(recipe, tmp_path, monkeypatch, capsys):
    plan = ["train", "--config", recipe(), "--dry_run", "true"]
    assert main(plan) == 0
    assert "24 rows" in capsys.readouterr().out and not (tmp_path / "cache").exists()
    assert main(["cache-teacher", "--config", recipe()]) == 0
    capsys.readouterr()
    assert main(plan) == 0
    printed = capsys.readouterr().out
    memory = re.search(r"Memory: teacher\W+([\d.]+) KiB", printed)
    assert "complete in" in printed and memory and float(memory[1]) < 10, printed  # the rows of a batch, no weights
    assert main(["train", "--config", recipe(seq_kd=True), "--dry_run", "true"]) == 0
    assert "has written its completions" in re.sub(r"\W+", " ", capsys.readouterr().out)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_cache": None}, "names no folder"),
        ({"streaming": True}, "stream cannot be cached ahead"),
        ({"lmbda": 1.0}, "never seen twice"),
    ],
)
def test_what_cannot_be_cached_is_explained(recipe, capsys, changes, message):
    assert main(["cache-teacher", "--config", recipe(**changes)]) == 2
    assert message in capsys.readouterr().err


def test_inspect_wants_a_folder_with_a_cache(tmp_path, capsys):
    assert main(["cache-teacher", "--inspect", str(tmp_path)]) == 2
    assert "There is no teacher cache" in capsys.readouterr().err
    assert main(["cache-teacher", "--inspect"]) == 2
    assert "expected `--inspect FOLDER`" in capsys.readouterr().err
    assert main(["cache-teacher"]) == 0 and "--inspect FOLDER" in capsys.readouterr().out


def launch(recipe, *more, config="cpu_ddp.yaml", port=29400):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / config), "--main_process_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [*command, "-m", "distill_trainers.cli.cache_teacher", "--config", recipe, *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_two_processes_share_the_work(recipe, tmp_path, saved, config, capsys):
    done = launch(recipe(), config=config, port=29400 + os.getpid() % 500)
    assert "24 of 24 rows were asked for" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    cached = CachedTeacher(tmp_path / "cache")
    assert len(cached.cache) == 24 and not cached.cache.damaged and cached.cache.num_shards == 2
    assert main(["train", "--config", recipe()]) == 0  # one process reads what two wrote
    with_cache = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert main(["train", "--config", recipe(teacher_cache=None)]) == 0
    without = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert with_cache["eval_kl"] == pytest.approx(without["eval_kl"], rel=1e-4)
