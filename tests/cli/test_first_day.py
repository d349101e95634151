"""The first day of somebody who knows TRL: what commands say, show and take before anything is understood."""

import json
import logging
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields, make_dataclass
from types import SimpleNamespace

import pytest

import distill_trainers
from distill_trainers import MiniLLMConfig, models, reachable
from distill_trainers.cli import main
from distill_trainers.cli.command_line import import_modules, quiet_libraries, with_config
from distill_trainers.data import load_split
from distill_trainers.doctor.printing import gib, lasting
from distill_trainers.evaluation.cost import measure_cost
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.recipe.help import _owner
from distill_trainers.trainers import METHODS
from distill_trainers.trl_names import TRAINERS

# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("doctr", "doctor"), ("eval", "evaluate")])
def test_a_misspelt_command_is_guessed(typed, meant, capsys):
    assert main([typed]) == 2
    assert f"Did you mean `distill-trainers {meant}`?" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_is_told(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"distill-trainers {distill_trainers.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["a.yaml", "--lmbda", "0"], ["--config", "a.yaml", "--lmbda", "0"]),
        (["extract", "a.yml"], ["extract", "--config", "a.yml"]),
        (["--lmbda", "0", "a.yaml"], ["--lmbda", "0", "--config", "a.yaml"]),
        (["--lmbda=0", "a.yaml"], ["--lmbda=0", "--config", "a.yaml"]),
        (["--quick", "a.yaml"], ["--quick", "--config", "a.yaml"]),
        (["--dry_run", "a.yaml"], ["--dry_run", "--config", "a.yaml"]),
        (["--bf16", "a.yaml"], ["--bf16", "--config", "a.yaml"]),
        (["--no_doctor", "a.yaml"], ["--no_doctor", "--config", "a.yaml"]),
        (["--quick", "true", "a.yaml"], ["--quick", "true", "--config", "a.yaml"]),
        (["-o", "x.yaml"], ["-o", "x.yaml"]),
        (["--launch", "zero3.yaml", "a.yaml"], ["--launch", "zero3.yaml", "--config", "a.yaml"]),
        (["--launch", "zero3.yaml", "--config", "a.yaml"], ["--launch", "zero3.yaml", "--config", "a.yaml"]),
        (["--config=a.yaml"], ["--config=a.yaml"]),
        ([], []),
    ],
    ids=str,
)
def test_a_recipe_needs_no_option(typed, read):
    assert with_config(typed) == read


def test_help_is_in_groups_and_names_each_setting_once(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--method", "minillm", "--help"])
    shown = capsys.readouterr().out
    titles = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert titles[:4] == ["general", "doctor", "MiniLLMConfig", "the recipe"] and titles[-1] == "examples"
    options = re.findall(r"^  (--\w+)", shown.partition("\nexamples:")[0], re.MULTILINE)
    assert len(options) == len(set(options)) and {f"--{field.name}" for field in fields(MiniLLMConfig)} <= {*options}
    assert "--gpus" in shown.partition("MiniLLMConfig:")[0]


def test_help_of_evaluate_has_all_settings(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert re.search(r"^  --no_repeat_ngram_size ", shown, re.MULTILINE)


def test_the_owner_of_a_setting_is_found_without_annotations():
    """As in Python 3.14, whose classes keep them elsewhere."""
    base = make_dataclass("Base", [("rank", int, 1)])
    child = make_dataclass("Child", [("rank", int, 2), ("alpha", int, 3)], bases=(base,))
    del base.__annotations__, child.__annotations__
    assert _owner(child, "rank") is base and _owner(child, "alpha") is child


def test_help_may_be_cut_off():
    code = "import sys; from distill_trainers.cli import main; sys.exit(main(['push', '--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()  # as `| head -0` does
        assert command.stderr.read() == b"" and command.wait() == 0


def test_libraries_are_quiet_and_the_rest_is_heard(caplog):
    quiet_libraries()
    noise = {"torchao": "Failed to load %s: %s", "DeepSpeed": "Setting accelerator to CPU. If you have GPU"}
    with caplog.at_level(logging.WARNING):
        for name, words in noise.items():
            logging.getLogger(name).setLevel(logging.WARNING)  # as they do when they are imported
            logging.getLogger(name).propagate = True
            logging.getLogger(name).warning(words, *["x"] * words.count("%s"))
            logging.getLogger(name).warning("something else")
    heard = {(record.name, record.getMessage()) for record in caplog.records}  # twice, where a handler is DeepSpeed's
    assert heard == {(name, "something else") for name in noise}


# ---- A method of one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    """A module with a method, in the folder where commands are started."""
    (tmp_path / "halved_kd.py").write_text(
        "from distill_trainers import GKDConfig, GKDTrainer\n"
        "from distill_trainers.trainers import METHODS\n"
        "METHODS['halved'] = (GKDConfig, GKDTrainer)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "halved_kd"
    METHODS.pop("halved", None)
    sys.modules.pop("halved_kd", None)


def test_a_module_with_a_method_is_imported_by_every_command(own_method, recipe, capsys):
    path = recipe(method="halved", lmbda=0.0)
    assert main(["doctor", "--import", own_method, "--config", path, "--quick"]) == 0
    assert main(["train", f"--import={own_method}", path, "--dry_run", "true"]) == 0
    METHODS.pop("halved")
    assert main(["train", path, "--dry_run", "true"]) == 2
    assert "method: halved" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--import"], ["--import", "there_is_none"]], ids=str)
def test_a_module_that_cannot_be_imported_is_refused(words, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigurationError, match="Got `--import"):
        import_modules(words)


def test_no_recipe_imports_a_module(recipe, capsys):
    assert main(["train", recipe(**{"import": "os"})]) == 2
    assert "Unknown key 'import' in the recipe" in capsys.readouterr().err


# ---- What is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        ("dpkd", ["preference", "lm_loss", "nll_chosen", "nll_rejected", "reward_margin"]),
        ("minillm", ["single", "long", "reward", "sequence_kl", "completion_length"]),
        ("gkd", ["divergence", "lm_loss"]),
    ],
)
def test_the_console_has_every_term_and_what_the_page_says_to_watch(method, shown, recipe, capsys):
    more = {"lmbda": 0.0, "lm_loss_weight": 0.5} if method == "gkd" else {}
    assert main(["train", recipe(method=method, max_steps=1, **more)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train step 1/1"))
    assert all(f"  {name} " in line for name in shown), line


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MiB"), (2**10, "1.0 KiB"), (2**20, "1.0 MiB"), (77_808 * 2**20, "75.98 GiB")]
)
def test_sizes_have_the_unit_that_tells_something(size, text):
    assert gib(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "0.012 s"), (75, "75 s"), (600, "10 min"), (7200, "2.0 h"), (86400 * 3, "72.0 h")]
)
def test_times_have_the_unit_that_tells_something(seconds, text):
    assert lasting(seconds) == text


def test_speed_is_that_of_the_fastest_pass(make_student, tokenizer, monkeypatch):
    """What else runs on the machine slows a pass down, and never up."""
    import torch

    clock = iter([0.0, 5.0, 5.0, 5.5, 5.5, 7.5])  # of this module alone: other threads look at the process's own
    clock_of_it = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("distill_trainers.evaluation.cost.time", clock_of_it)
    engine = SimpleNamespace(generate=lambda model, ids, mask, sampling: [[1, 2]] * len(ids))
    sampling = SimpleNamespace(pad_token_id=tokenizer.pad_token_id, max_new_tokens=2)
    cost = measure_cost(make_student(), engine, [[1], [2]], sampling, torch.device("cpu"))
    assert cost.tokens_per_second == 4 / 0.5


# ---- Stages that keep nothing ---------------------------------------------------------------------------------------


def test_stages_name_their_files_and_warn_where_nothing_is_left(tmp_path, capsys):
    rows = [{"question": "1+1?", "answer": "2", "response": text, "key": text} for text in ("Hm.", "The answer is 3.")]
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = tmp_path / "stages.yaml"
    settings.write_text(f"folder: {tmp_path}\nask_for_pairs: false\n")
    for stage, files in {"parse": ["parsed"], "verify": ["verified", "wrong"], "dual": ["dual", "sft"]}.items():
        assert main(["rationales", stage, str(settings)]) == 0
        said = capsys.readouterr()
        assert all(str(tmp_path / f"{name}.jsonl") in said.out for name in files)
        warned = {"verify": "None of the 2 responses was kept (", "dual": "there are no pairs"}
        assert warned.get(stage, "") in said.err and ("warning: " in said.err) is (stage in warned)


# ---- Names that are not there ---------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """The Hub may be asked, and nobody answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(reachable, "_asked", {})


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda: models.load_config("org/nonesuch", "teacher"), ConfigurationError),
        (lambda: models.load_causal_lm("nonesuch", role="teacher"), ConfigurationError),
        (lambda: models.tokenizer_of("org/nonesuch", "teacher"), ConfigurationError),
        (lambda: models.load_tokenizer("org/nonesuch"), OSError),
        (lambda: load_split("org/nonesuch"), DatasetError),
    ],
    ids=["config", "model", "its tokenizer", "tokenizer", "data"],
)
def test_without_a_network_a_name_is_refused_at_once(no_network, ask, error):
    started = time.monotonic()
    with pytest.raises(error, match="nothing of it was fetched before, and http://127.0.0.1:9 does not answer"):
        ask()
    assert time.monotonic() - started < 10  # the Hub's client tries for a minute


def test_what_was_fetched_before_is_not_refused(no_network, tmp_path):
    (tmp_path / "models--org--there").mkdir()
    assert reachable.why_out_of_reach("org/there", cache_dir=tmp_path) == ""
    assert reachable.why_out_of_reach("org/there", "dataset", cache_dir=tmp_path)


def test_readers_of_datasets_are_no_names_of_the_hub(no_network, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert load_split("json", data_files=str(tmp_path / "rows.jsonl"))[0] == {"text": "a"}


def test_a_dataset_that_was_prepared_before_is_not_refused(no_network, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "org___my_set/default/0.0.0/abc").mkdir(parents=True)
    assert reachable.why_out_of_reach("org/MySet", "dataset") == ""
    assert reachable.why_out_of_reach("org/other", "dataset")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert reachable.why_out_of_reach("org/other", "dataset") == ""


def test_a_network_that_comes_back_is_noticed(no_network, monkeypatch):
    answers = iter(["refused", "", "refused"])
    monkeypatch.setattr(reachable, "_refusal", lambda endpoint: next(answers))
    assert reachable.why_out_of_reach("org/it") and reachable.why_out_of_reach("org/it")
    monkeypatch.setattr(reachable, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 60))
    assert reachable.why_out_of_reach("org/it") == reachable.why_out_of_reach("org/it") == ""


@pytest.mark.parametrize(
    ("environment", "settings", "is_refused"),
    [
        ({"no_proxy": "localhost"}, {}, True),
        ({"http_proxy": "http://proxy:1"}, {}, False),
        ({"all_proxy": "http://proxy:1"}, {}, False),
        ({"http_proxy": "http://proxy:1", "no_proxy": "127.0.0.1"}, {}, True),
        ({}, {"proxies": {"http": "http://proxy:1"}}, False),
    ],
    ids=str,
)
def test_proxies_have_their_own_ways(no_network, monkeypatch, environment, settings, is_refused):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("urllib.request.getproxies", urllib.request.getproxies_environment)
    assert bool(reachable.why_out_of_reach("org/it", **settings)) is is_refused
    assert models.which_files(settings).items() >= settings.items()  # from there it reaches configs and tokenizers


@pytest.mark.parametrize("name", [f"{kind}{what}" for kind in TRAINERS for what in ("Trainer", "Config")])
def test_names_of_trl_have_a_hint(name):
    with pytest.raises(ImportError, match=rf"no {name}\. That is TRL's; what it does here is `\w+Trainer`"):
        exec(f"from distill_trainers import {name}")


@pytest.mark.parametrize(
    ("name", "hint"), [("GKDTrainr", "Did you mean GKDTrainer"), ("KTOTrainer", "What is here: DPKDTrainer, ")]
)
def test_other_names_have_a_hint_too(name, hint):
    with pytest.raises(ImportError, match=hint):
        exec(f"from distill_trainers import {name}")


def test_evaluations_tell_what_passes(capsys):
    from types import SimpleNamespace

    from distill_trainers.cli.progress import ProgressReport

    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)
    logs = {"eval_loss": 1.0, "eval_kl": 0.5, "eval_pass@1": 0.25, "eval_pass@8": 0.75}
    ProgressReport().on_log(None, state, None, logs=logs)
    assert "kl 0.5  pass@1 0.25  pass@8 0.75" in capsys.readouterr().out
