"""Secrets planted wherever a recipe takes text, through every command: none is written, printed or uploaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from distill_trainers.cli import main

HUB_TOKEN = "hf_Zq01SecretCore01x9AbCdEf"
# By setting; each secret is unlike all others, so that a leak tells where it comes from.
PLANTED = {
    "hub_token": HUB_TOKEN,
    "run_name": "run-sk-proj-Zq02SecretCore02x9AbCdEf",
    "project": "https://x.example/p?token=Zq03SecretCore03x9",
    "trackio_space_id": "me/ghp_Zq04SecretCore04x9AbCdEf",
    "card_license": "glpat-Zq05SecretCore05x9AbCdEf",
    "chat_template_kwargs": {
        "api_key": "Zq08SecretCore08x9",
        "nested": [{"clientSecret": "Zq09SecretCore09x9"}, "Bearer Zq10SecretCore10x9"],
        "texts": ["password=Zq06SecretCore06x9", "-----BEGIN PRIVATE KEY-----\nZq07SecretCore07x9\n-----END"],
        "note": '{"token": "Zq11SecretCore11x9"}',
        "authorization": "Basic Zq22SecretCore22x9",
        "address": "x-amz-signature=Zq23SecretCore23x9",
        "pair": "--password Zq12SecretCore12x9",
    },
    "model_init_kwargs": {
        "token": "Zq13SecretCore13x9",
        "proxies": {"https": "http://me:Zq14SecretCore14x9@127.0.0.1:9", "http": "me:Zq15SecretCore15x9@127.0.0.1:9"},
    },
    "teacher_model_init_kwargs": {
        "token": "AKIAZQ16SECRETCORE16",
        "proxies": {"https": "http://Zq17SecretCore17x9%40@127.0.0.1:9", "http": "http://me:a/Zq18SecretCore18x9@h:9"},
    },
    "vllm_kwargs": {"server_base_url": "https://s3.example/?X-Amz-Signature=Zq24SecretCore24x9"},
    "hub_always_push": True,
    "trackio_bucket_id": "eyJhbGciOiJI.Zq25SecretCore25x9.c2ln",
}
# A recipe may not set these.
ENVIRONMENT = {
    "DISTILL_TEACHER_TOKEN": "Zq19SecretCore19x9",
    "WANDB_API_KEY": "Zq20SecretCore20x9",
    "MY_PASSWORD": "Zq21SecretCore21x9",
}
CORES = [f"Zq{i:02}SecretCore{i:02}x9" for i in range(1, 26) if i != 16] + ["ZQ16SECRETCORE16"]


def found_in(content: bytes) -> list[str]:
    return [core for core in CORES if core.encode() in content]


def test_each_secret_is_planted():
    text = json.dumps([PLANTED, ENVIRONMENT])
    assert all(core in text for core in CORES) and len(CORES) == 25


@pytest.fixture
def planted(recipe, hub, hub_server, tmp_path, monkeypatch):
    """A recipe with all of it, to be run in this process, beside a Hub that knows its token."""
    monkeypatch.delenv("HF_TOKEN")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(hub_server.TOKENS, HUB_TOKEN, hub_server.TOKENS["hf_writer"])
    changes = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "eval_fraction": 4}
    changes |= {
        "push_to_hub": True,
        "hub_model_id": "me/student",
        "hub_strategy": "all_checkpoints",
        "report_to": "none",
    }
    changes |= {"seq_kd": True, "lmbda": 0.0, "teacher_cache": str(tmp_path / "kept"), "temperature": 1.0}
    return recipe(**PLANTED, **changes)


def test_nothing_planted_is_written_printed_or_uploaded(planted, tmp_path, hub, capfd, saved):
    run = str(tmp_path / "out")
    commands = [
        ["doctor", "--config", planted, "--quick", "true"],
        ["doctor", "--config", planted, "--quick", "true", "--json", "true"],
        ["train", "--config", planted, "--dry_run", "true"],
        ["train", "--config", planted],
        ["evaluate", "--run", run, "--use_cpu", "true", "--metrics", "agreement", "--max_new_tokens", "4",
         "--max_length", "24", "--model_init_kwargs", json.dumps(PLANTED["model_init_kwargs"])],
        ["pairs", "--config", planted, "--pairs_repo", "me/pairs"],
        ["cache-teacher", "--inspect", str(tmp_path / "kept")],
        ["report", run, "--no-plots"],
    ]  # fmt: skip
    shown = b""
    for command in commands:
        status = main(command)
        printed = "".join(capfd.readouterr())
        assert status == 0 or "doctor" in command, (command, printed)
        assert not found_in(printed.encode()), command
        shown += printed.encode()
    assert b"Uploaded" in shown
    for file in [file for file in tmp_path.rglob("*") if file.is_file() and file != Path(planted)]:
        assert not found_in(file.read_bytes()) and not found_in(str(file).encode()), file
    for (_, name), repo in hub.repos.items():
        assert not found_in(" ".join(repo.messages).encode())
        for files in repo.commits.values():
            for path, file in files.items():
                assert not found_in(file.content), (name, path)
                assert "training_args" not in path
                assert path.endswith("trainer_state.json") or str(tmp_path).encode() not in file.content, (name, path)
                assert str(saved.root).encode() not in file.content, (name, path)
    assert any(path.startswith("checkpoint-2/optimizer") for path in hub.files("me/student"))
    assert not found_in(repr(load_dataset("me/pairs", split="train", token=HUB_TOKEN)[:]).encode())
    assert (tmp_path / "out" / "evaluate.json").stat().st_mode & 0o077 == 0


BROKEN = [
    ("hub_token", 1234567, "1234567"),
    ("hub_token", ["Zq01SecretCore01x9"], None),
    ("hub_token", {"x": "Zq01SecretCore01x9"}, None),
    ("hub_token", "Zq01SecretCore01x9 Zq02SecretCore02x9", None),
    ("model_init_kwargs", '{"token": "Zq03SecretCore03x9"', None),
    ("model_init_kwargs", ["http://me:Zq04SecretCore04x9@h"], None),
    ("learning_rate", "Bearer Zq05SecretCore05x9", None),
    ("teacher_model_name_or_path", "http://me:Zq06SecretCore06x9@127.0.0.1:9", None),
    ("teacher_model_name_or_path", "http://me:a/Zq07SecretCore07x9@127.0.0.1:9", None),
    ("teacher_model_name_or_path", "http://127.0.0.1:9/?token=Zq08SecretCore08x9", None),
    ("dataset", "https://me:Zq09SecretCore09x9@data.example/rows.jsonl", None),
    ("model_name_or_path", "https://Zq10SecretCore10x9@models.example/m", None),
    ("deepspeed", "/no/such/password=Zq11SecretCore11x9", None),
    ("rollout_engine", "hf_Zq12SecretCore12x9AbCd", None),
    ("resume_from_checkpoint", "token=Zq13SecretCore13x9", None),
    ("teacher_cache_kind", "glpat-Zq14SecretCore14x9", None),
    ("env", "MY_TOKEN=Zq15SecretCore15x9", None),
    ("student_init", {"from_teacher": "sk-Zq17SecretCore17x9AbCd"}, None),
    ("column_mapping", {"prompt": "xoxb-Zq18SecretCore18x9"}, None),
]


@pytest.mark.parametrize("name, value, word", BROKEN, ids=lambda value: str(value)[:20])
def test_refusals_quote_no_secret(recipe, capfd, name, value, word):
    """Values that are refused are quoted, and so are what libraries say of them."""
    file = Path(recipe(**{name: value}))
    assert main(["train", "--config", str(file), "--dry_run", "true"]) in (1, 2)
    printed = "".join(capfd.readouterr())
    assert "error:" in printed and not found_in(printed.encode()) and (word is None or word not in printed), printed


def test_a_recipe_that_is_no_yaml_is_quoted_without_its_token(recipe, capfd):
    file = Path(recipe())
    file.write_text(file.read_text() + 'hub_token: "Zq01SecretCore01x9\nother: [\n')
    assert main(["train", "--config", str(file)]) == 2
    assert not found_in("".join(capfd.readouterr()).encode())


def test_the_command_line_is_quoted_without_its_token(recipe, capfd):
    options = ["--max_steps", "x", "--hub_token", "Zq01SecretCore01x9", "Zq02SecretCore02x9"]
    assert main(["train", "--config", recipe(), *options]) == 2
    assert "Zq01SecretCore01x9" not in "".join(capfd.readouterr())


def test_files_are_as_open_as_the_user_has_it(recipe, tmp_path):
    """Settings may be read by whom the umask lets; what names places of this machine, by its owner alone."""
    assert main(["train", "--config", recipe()]) == 0
    probe = tmp_path / "probe"
    probe.touch()
    usual = probe.stat().st_mode & 0o777
    modes = {name: (tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("run.json", "evaluate.json")}
    assert modes == {"run.json": usual, "evaluate.json": 0o600}


def test_a_run_whose_settings_held_secrets_says_so_when_it_is_evaluated(recipe, tmp_path, capfd):
    settings = {"chat_template_kwargs": {"word": "password=Zq06SecretCore06x9"}, "eval_fraction": 4}
    settings["teacher_model_init_kwargs"] = {"token": "Zq13SecretCore13x9"}
    assert main(["train", "--config", recipe(**settings)]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "out"), "--use_cpu", "true", "--dry_run", "true"]) == 0
    printed = capfd.readouterr().out
    assert "stood in ['chat_template_kwargs'], which no file keeps" in printed and "loaded with ['token']" in printed


def test_a_served_teachers_address_and_homes_are_not_recorded(tmp_path, saved):
    from distill_trainers.recipe.parse import RecipeArguments
    from distill_trainers.trainers.lifecycle.recording import changed_settings

    settings = RecipeArguments(
        teacher_model_name_or_path="http://10.0.0.3:8000,http://10.0.0.4:8000",
        dataset="/home/anna smith/my data.jsonl",
        eval_dataset="s3://anna-bucket/rows.jsonl", pretraining_dataset="/home/anna",
    )  # fmt: skip
    told = yaml.safe_dump(changed_settings(settings))
    assert not any(word in told for word in ("10.0.0", "anna")), told
    assert "a served teacher" in told and "my data.jsonl" in told
