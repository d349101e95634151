"""docs/from_trl.md names settings of TRL and of this package: both sides have them, with the defaults it tells."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import Trainer, TrainerCallback

from distill_trainers import DPKDConfig, GKDConfig, GKDTrainer
from distill_trainers.recipe.parse import RecipeArguments
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.given.fields import ARGUMENTS
from distill_trainers.trl_names import METRICS, with_trl_metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl
    from trl.experimental import gkd as trl_gkd
    from trl.experimental import sdft, sdpo

PACKAGE = Path(__file__).parents[2] / "distill_trainers"
PAGE = (Path(__file__).parents[2] / "docs/from_trl.md").read_text(encoding="utf-8")
THEIRS = {
    "GKD": trl_gkd.GKDConfig,
    "Distillation": trl.DistillationConfig,
    "SFT": trl.SFTConfig,
    "DPO": trl.DPOConfig,
}


def _defaults(*classes):
    return {f.name: f.default for cls in classes for f in fields(cls)}


def _rows(title):
    table = re.split(r"\n\|[-|]+\|\n", PAGE[PAGE.index(title) :])[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


@pytest.mark.parametrize("row", _rows("## Names"), ids=lambda row: f"{row[0]} {row[1]}")
def test_names_exist_on_both_sides(row):
    theirs, trainers, here, remark = (*row, "")[:4]
    names = re.findall(r"`(\w+)`", theirs)
    classes = THEIRS.values() if trainers == "all" else [THEIRS[name] for name in trainers.split(", ")]
    for cls in classes:
        assert not set(names) - set(_defaults(cls)), cls.__name__
    ours = names if here == "the same" else re.findall(r"`(\w+)(?:: \w+)?`", here)
    known = _defaults(GKDConfig, DPKDConfig) if trainers != "DPO" else _defaults(DPKDConfig)
    assert ours and not set(ours) - set(known)
    if told := re.search(r"default (\S+), not ([\d.]+)", remark):
        default = known[ours[0]]
        assert default == yaml.safe_load(told[1]) and _defaults(*classes)[names[0]] == yaml.safe_load(told[2])


def test_names_of_sdft_exist_on_both_sides():
    from trl.experimental.sdft import SDFTConfig

    for theirs, here, _ in _rows("## SDFTTrainer")[1:]:
        assert set(re.findall(r"`(\w+)`", theirs)) <= set(_defaults(SDFTConfig))
        assert set(re.findall(r"`(\w+)`", here)) <= set(_defaults(GKDConfig))


@pytest.mark.parametrize("row", _rows("## Moving a recipe"), ids=lambda row: row[0])
def test_keys_of_recipes_exist_on_both_sides(row):
    theirs, here = row
    if theirs.startswith("the command") or theirs.startswith("`accelerate_config"):
        return
    assert set(re.findall(r"`(\w+)`", theirs)) <= set(_defaults(trl.ScriptArguments, trl.DistillationConfig))
    ours = re.findall(r"`(\w+)(?:`|:)", here)
    assert ours and set(ours) <= set(_defaults(RecipeArguments, GKDConfig))


def test_each_argument_of_other_trainers_has_a_row():
    theirs = {"Trainer": Trainer, "SFT": trl.SFTTrainer, "GKD": trl_gkd.GKDTrainer, "DPO": trl.DPOTrainer}
    theirs["Distillation"] = trl.DistillationTrainer
    taken = {name: set(inspect.signature(cls.__init__).parameters) - {"self"} for name, cls in theirs.items()}
    ours = set(inspect.signature(GKDTrainer.__init__).parameters)
    listed = set()
    for names, trainers, here in _rows("## Arguments and methods"):
        found = set(re.findall(r"`(\w+)`", names))
        listed |= found
        for trainer in theirs if trainers == "all" else trainers.split(", "):
            assert found & taken[trainer], (found, trainer)
        assert here.startswith("refused") != (found <= ours), found
    assert set().union(*taken.values()) == listed


def _between(name):
    block = PAGE.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.strip().splitlines()[2:]]


def test_the_table_of_defaults_names_each_that_differs():
    """Held against objects, whose defaults `__post_init__` may have filled in, and not against the fields."""
    told = {(name, trainer) for name, trainers, *_ in _between("defaults") for trainer in trainers.split(", ")}
    plain = {"output_dir": "out", "use_cpu": True}
    for title, cls in THEIRS.items():
        theirs, ours = cls(**plain, bf16=False), (DPKDConfig if title == "DPO" else GKDConfig)(**plain)
        for name in (
            "learning_rate",
            "lr_scheduler_type",
            "weight_decay",
            "warmup_steps",
            "logging_steps",
            "max_length",
        ):
            differs = getattr(theirs, name, getattr(ours, name)) != getattr(ours, name)
            assert ((f"`{name}`", title) in told) is differs, (name, title)
    assert ("`learning_rate`", "Distillation") in told and ("`learning_rate`", "DPO") not in told


def test_the_table_of_arguments_names_what_does_not_act():
    told = {name.strip("`"): does for name, does, _ in _between("arguments")}
    assert told["label_smoothing_factor"] == "refused" and told["use_cache"] == "ignored"
    assert all(told.get(name) == a.does for name, a in ARGUMENTS.items() if a.does != "acts")


def test_metrics_are_logged_on_both_sides():
    theirs = {"SFT": trl.SFTTrainer, "DPO": trl.DPOTrainer, "GRPO": trl.GRPOTrainer}
    theirs |= {"Distillation": trl.DistillationTrainer, "SDFT": sdft.SDFTTrainer, "SDPO": sdpo.SDPOTrainer}
    sources = {name: inspect.getsource(sys.modules[cls.__module__]) for name, cls in theirs.items()}
    ours = "".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    both, told = {}, {name: set() for name in sources}
    for names, trainers, here, remark in _rows("## Metrics"):
        names, found = re.findall(r"`([\w/]+)`", names), re.findall(r"`([\w/]+)`", here)
        for name in names:
            quoted = re.compile(rf'f?"{name.replace("NAME", r"[{][a-z_]+[}]")}"')
            assert all(quoted.search(sources[trainer]) for trainer in trainers.split(", ")), name
        for trainer in trainers.split(", "):
            told[trainer] |= set(names)
        for name in found:
            ends = re.sub(r"^eval_|_p\d\d$", "", name)
            assert f'"{ends}"' in ours or f"{name}=" in ours or "NAME" in name, name
        if remark.startswith("both"):
            both |= dict(zip(found, names, strict=True))
    for trainer in ("SFT", "DPO", "GRPO", "Distillation"):
        logged = re.findall(r'_metrics\[[^]]+\]\[f?"([^"]+)"\]', sources[trainer])
        assert {re.sub("{[a-z_]+}", "NAME", name) for name in logged} == told[trainer], trainer
    assert both.pop("rewards/NAME") == "rewards/NAME/mean" and both == METRICS


def test_trackers_get_both_names_and_the_log_one(make_trainer):
    given = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            given.append(dict(logs))

    trainer = make_trainer(lmbda=1.0, max_steps=1, logging_steps=1, callbacks=[Tracker()])
    trainer.train()
    log = next(logs for logs in trainer.state.log_history if "completion_length" in logs)
    assert given[0]["completions/mean_length"] == given[0]["completion_length"] == log["completion_length"]
    assert "completions/mean_length" not in log


def test_a_metric_that_has_the_name_keeps_it():
    logs = {"reward": -1.0, "reward_mean": 0.5, "rewards/exact": 0.25, "eval_reward_margin": 2.0}
    theirs = {"rewards/exact/mean": 0.25, "eval_rewards/margins": 2.0}
    assert with_trl_metrics(logs) == logs | theirs


def test_what_has_no_counterpart_is_there():
    listed = PAGE[PAGE.index("Without a counterpart") :].split("\n\n")[0]
    known = set(_defaults(*THEIRS.values()))
    for trainer in (trl.SFTTrainer, trl.DPOTrainer):
        known |= set(inspect.signature(trainer.__init__).parameters)
    names = set(re.findall(r"`([a-z_]+)`", listed))
    assert len(names) >= 6 and names <= known


def test_a_config_of_trl_is_taken(make_student, make_teacher, tokenizer, tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    theirs = trl_gkd.GKDConfig(**settings, lmbda=0.25, beta=0.1, temperature=0.7, max_new_tokens=5)
    trainer = GKDTrainer(make_student(), make_teacher(), theirs, addition_dataset(8), processing_class=tokenizer)
    args = trainer.args
    assert (args.lmbda, args.beta, args.temperature, args.max_new_tokens) == (0.25, 0.1, 0.7, 5)
    assert args.divergence == "jsd" and args.kd_temperature == 1.0


def test_the_two_recipes_say_the_same():
    theirs, ours = (yaml.safe_load(code) for code in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    renamed = {
        "dataset_name": "dataset",
        "dataset_train_split": "dataset_split",
        "max_completion_length": "max_new_tokens",
    }
    moved = {renamed.get(name, name): value for name, value in theirs.items() if name != "beta"}
    assert theirs["beta"] == 1.0 and ours["divergence"] == "reverse_kl" and ours["lmbda"] == 1.0
    assert moved.items() <= ours.items()
