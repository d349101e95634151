"""What a setting needs and is not installed is missed at once, in the same words by a run, a dry run and the doctor."""

import importlib.util
import json

import pytest
from transformers.training_args import OptimizerNames

from distill_trainers import GKDConfig, models
from distill_trainers.cli import main
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.trainers.given import packages

PLAIN = {"output_dir": "out", "use_cpu": True}
OF_TORCH = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(packages, "_is_there", lambda module: False)
    monkeypatch.setattr(packages, "get_available_reporting_integrations", list)


def test_every_optimiser_of_another_package_is_known(nothing_installed):
    for optimizer in OptimizerNames:
        args = GKDConfig(**PLAIN, report_to="none", optim=optimizer.value)
        if optimizer.value in OF_TORCH:
            packages.check_packages(args)
            continue
        with pytest.raises(
            ConfigurationError, match=f"`optim: {optimizer.value}`, but .* is not installed; `pip install"
        ):
            packages.check_packages(args)


@pytest.mark.parametrize("tracker", sorted(packages.INTEGRATION_TO_CALLBACK))
def test_every_tracker_is_missed(nothing_installed, tracker):
    with pytest.raises(ConfigurationError, match=f"`report_to: {tracker}`, but .* is not installed; `pip install"):
        packages.check_packages(GKDConfig(**PLAIN, report_to=tracker))


def test_a_tracker_that_nobody_knows_is_named():
    with pytest.raises(ConfigurationError, match="`report_to: wandbb`; expected any of"):
        packages.check_packages(GKDConfig(**PLAIN, report_to=["wandbb"]))


def test_all_trackers_are_those_that_are_installed():
    packages.check_packages(GKDConfig(**PLAIN, report_to="all"))
    packages.check_packages(GKDConfig(**PLAIN, report_to="none"))


@pytest.mark.parametrize("name", ["deepspeed", "use_liger_kernel"])
def test_other_packages(nothing_installed, name):
    with pytest.raises(ConfigurationError, match=f"`{name}: .* is not installed"):
        packages.check_packages(
            GKDConfig(**PLAIN, report_to="none", **{name: {"a": 1} if name == "deepspeed" else True})
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"report_to": "wandb"}, "`report_to: wandb`, but wandb is not installed; `pip install 'wandb'`"),
        ({"report_to": ["tensorboard"]}, "`report_to: tensorboard`"),
        ({"optim": "adamw_bnb_8bit"}, "`optim: adamw_bnb_8bit`, but bitsandbytes is not installed"),
        ({"use_liger_kernel": True}, "`use_liger_kernel: True`, but liger_kernel is not installed"),
        ({"rollout_engine": "vllm"}, "rollout_engine"),
    ],
    ids=str,
)
def test_a_run_a_dry_run_and_the_doctor_say_the_same(recipe, monkeypatch, capsys, changes, told):
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    package = told.partition("but ")[2].partition(" is")[0] or "vllm"
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    path, said = recipe(**changes), []
    for command in (["train"], ["train", "--dry_run", "true"], ["doctor", "--quick", "--json"]):
        assert main([command[0], "--config", path, *command[1:]]) == 2
        printed = capsys.readouterr()
        findings = json.loads(printed.out)["findings"] if command[0] == "doctor" else []
        said.append(" ".join([printed.err, *(f"{finding['what']} {finding['remedy']}" for finding in findings)]))
    assert all(told in text for text in said), said
