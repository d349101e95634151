"""Configs of TRL, of transformers and of other methods as `args`: each changed setting is carried over or named."""

import json
import logging
import warnings
from dataclasses import MISSING, dataclass, fields

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from distill_trainers import DPKDConfig, GKDConfig, MiniLLMConfig, RationaleConfig
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.trainers.config import config_from_arguments

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl
    from trl.experimental import gkd as trl_gkd
    from trl.experimental import gold as trl_gold

TRL = [trl.SFTConfig, trl.DPOConfig, trl.DistillationConfig, trl_gkd.GKDConfig, trl_gold.GOLDConfig, trl.GRPOConfig]
PLAIN = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
BASE = {f.name for f in fields(TrainingArguments)}
# Values other than the default, where adding to it or turning it round gives none that TRL takes.
OTHER = {
    "loss_type": {"DPOConfig": ["hinge"], "SFTConfig": "dft", "GKDConfig": "dft", "GOLDConfig": "dft"},
    "pad_to_multiple_of": 8,
    "beta": 0.25,
    "lmbda": 0.25,
    "vllm_mode": "server",
    "truncation_mode": "keep_end",
    "packing_strategy": "wrapped",
    "teacher_model_init_kwargs": {"dtype": "bfloat16"},
    "top_p": 0.5,
    "min_p": 0.1,
    "temperature": 0.5,
}
# How a carried value looks here: what the field is called, and its value.
HERE = {
    "max_completion_length": ("max_new_tokens", None),
    "dataset_text_field": ("column_mapping", {"other": "text"}),
    "teacher_model_revision": ("teacher_model_init_kwargs", {"revision": "other"}),
    "use_vllm": ("rollout_engine", "vllm"),
    "precompute_ref_log_probs": ("reference_logps_dir", "out/reference_logps"),
    "shuffle_dataset": ("train_sampling_strategy", "sequential"),
    "loss_type": ("loss_type", "hinge"),
    "teacher_tokenizer_name_or_path": ("teacher_tokenizer", None),
    "use_uld_loss": ("teacher_tokenizer", "own"),
}
# Changed, they ask for what happens in any case.
NOTHING_TO_DO = {"completion_only_loss", "shuffle_dataset", "teacher_model_name_or_path"}
NOTHING_TO_DO |= {"generation_batch_size", "steps_per_generation"}


def target(theirs):
    return DPKDConfig if theirs is trl.DPOConfig else GKDConfig


def default_of(field):
    return field.default if field.default is not MISSING else field.default_factory()


def changed(cls, field):
    """Another value of a field than its default, of the same kind."""
    other = OTHER.get(field.name, MISSING)
    if isinstance(other, dict) and cls.__name__ in other:
        return other[cls.__name__]
    if other is not MISSING and not (isinstance(other, dict) and field.name == "loss_type"):
        return other
    default = default_of(field)
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1
    kinds = str(field.type)
    if default is None:
        return True if "bool" in kinds else 2 if "int" in kinds else 0.5 if "float" in kinds else _of_text(kinds)
    return "other" if isinstance(default, str) else ["other"]


def _of_text(kinds):
    return {"a": 1} if "dict" in kinds else ["other"] if "list" in kinds else "other"


CASES = [pytest.param(cls, f, id=f"{cls.__name__}-{f.name}") for cls in TRL for f in fields(cls) if f.name not in BASE]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls, field", CASES)
def test_every_changed_setting_of_trl_is_carried_over_or_named(cls, field, caplog):
    value = changed(cls, field)
    try:
        theirs = cls(**PLAIN | {field.name: value})
    except (ValueError, TypeError, ImportError) as error:
        pytest.skip(f"TRL itself refuses it: {error}")
    default = config_from_arguments(target(cls), cls(**PLAIN))
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING):
            ours = config_from_arguments(target(cls), theirs)
    except ConfigurationError as error:
        name = field.name.replace("use_transformers_paged", "use_transformers_continuous_batching")  # its older name
        assert f"`{name}: " in str(error) and "xpected" in str(error)
        return
    if f"`{field.name}: " in caplog.text or field.name in NOTHING_TO_DO and (field.name, value) != ("x", False):
        return
    if field.name.startswith("vllm_"):
        return  # of no effect without `use_vllm`; with it, see below
    name, expected = HERE.get(field.name, (field.name, value))
    expected = value if expected is None else expected
    assert getattr(ours, name) == expected and getattr(default, name) != expected


def test_what_a_distillation_config_says():
    theirs = trl.DistillationConfig(**PLAIN, temperature=0.7, max_completion_length=33, beta=0.0, top_k=5)
    ours = config_from_arguments(GKDConfig, theirs)
    assert (ours.lmbda, ours.temperature, ours.kd_temperature) == (1.0, 0.7, 0.7)
    assert (ours.max_new_tokens, ours.divergence, ours.beta, ours.top_k) == (33, "jsd", 0.0, 5)
    assert (ours.learning_rate, ours.disable_dropout) == (1e-6, False)


@pytest.mark.parametrize(
    ("theirs", "loss_type", "normalized"),
    [("sigmoid", "sigmoid", False), ("hinge", "hinge", False), ("sigmoid_norm", "sigmoid", True), ("ipo", "ipo", True)],
)
def test_what_a_dpo_config_says(theirs, loss_type, normalized):
    ours = config_from_arguments(DPKDConfig, trl.DPOConfig(**PLAIN, loss_type=theirs, beta=0.2))
    assert (ours.loss_type, ours.length_normalized, ours.lm_loss_weight) == (loss_type, normalized, 0.0)
    assert (ours.beta, ours.learning_rate) == (0.2, 1e-6)


@pytest.mark.parametrize("losses", [["sigmoid", "hinge"], ["robust"], ["sft"]])
def test_losses_of_dpo_that_are_not_here_are_named(losses):
    with pytest.raises(ConfigurationError, match="loss_type"):
        config_from_arguments(DPKDConfig, trl.DPOConfig(**PLAIN, loss_type=losses))


def test_vllm_of_trl_is_vllm_here():
    theirs = trl.DistillationConfig(
        **PLAIN, use_vllm=True, vllm_mode="server", vllm_server_port=9, vllm_group_port=51217
    )
    ours = config_from_arguments(GKDConfig, theirs)
    assert ours.rollout_engine == "vllm"
    assert ours.vllm_kwargs == {"mode": "server", "server_port": 9}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"mode": "token_truncate"}, ("truncate", None, 3.0)),
        ({"mode": "token_mask", "clip_min": 0.5, "clip_max": None}, ("mask", 0.5, None)),
        ({"mode": "token_mask", "correction": False}, ("none", None, 2.0)),
        ({}, ("none", None, 2.0)),
    ],
)
def test_the_correction_of_vllm_is_carried_over_token_by_token(theirs, ours):
    given = {f"vllm_importance_sampling_{name}": value for name, value in theirs.items()}
    config = config_from_arguments(GKDConfig, trl.GRPOConfig(**PLAIN, use_vllm=True, **given))
    found = config.sampler_correction, config.sampler_ratio_min, config.sampler_ratio_max
    assert found == ours and config.vllm_kwargs == {"mode": "colocate"}


@pytest.mark.parametrize("theirs", [{"mode": "sequence_truncate"}, {"clip_max": 5.0}])
def test_a_correction_of_whole_sequences_is_refused(theirs):
    """TRL's default mode is one, so bounds alone mean it."""
    given = {f"vllm_importance_sampling_{name}": value for name, value in theirs.items()}
    with pytest.raises(ConfigurationError, match="vllm_importance_sampling.*Instead: set `sampler_correction`"):
        config_from_arguments(GKDConfig, trl.GRPOConfig(**PLAIN, use_vllm=True, **given))


def test_a_packed_config_of_sft_packs_and_never_samples():
    ours = config_from_arguments(GKDConfig, trl.SFTConfig(**PLAIN, packing=True, max_length=24))
    assert (ours.packing, ours.max_length, ours.lmbda, ours.samples_completions) == (True, 24, 0.0, False)


def test_a_config_of_sft_does_not_vanish():
    theirs = trl.SFTConfig(**PLAIN, completion_only_loss=False, eos_token="<end>")
    with pytest.raises(ConfigurationError, match="`(completion_only_loss: False|eos_token: <end>)` in a SFTConfig"):
        config_from_arguments(GKDConfig, theirs)


def test_what_sft_and_gkd_train_alike_is_carried():
    theirs = trl.SFTConfig(
        **PLAIN, max_length=None, assistant_only_loss=True, chat_template_path=None, learning_rate=3e-4
    )
    ours = config_from_arguments(GKDConfig, theirs)
    assert (ours.max_length, ours.assistant_only_loss, ours.learning_rate) == (None, True, 3e-4)
    assert (ours.lr_scheduler_type, ours.weight_decay, ours.activation_checkpointing) == ("linear", 0.0, True)


@pytest.mark.parametrize(
    ("config_class", "args", "name"),
    [
        (DPKDConfig, GKDConfig(**PLAIN, beta=0.3), "beta"),
        (MiniLLMConfig, GKDConfig(**PLAIN, lmbda=0.0), "lmbda"),
        (GKDConfig, MiniLLMConfig(**PLAIN, num_inner_epochs=2), "num_inner_epochs"),
        (RationaleConfig, GKDConfig(**PLAIN, divergence="reverse_kl"), "divergence"),
        (GKDConfig, RationaleConfig(**PLAIN, alpha=0.5), "alpha"),
        (DPKDConfig, trl_gkd.GKDConfig(**PLAIN, beta=0.3), "beta"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_settings_of_another_method_do_not_come_under_their_name(config_class, args, name):
    """β of GKD is no β of DPKD."""
    with pytest.raises(ConfigurationError, match=f"`{name}: .*{config_class.__name__}"):
        config_from_arguments(config_class, args)


def test_what_all_methods_share_is_carried_between_them():
    ours = config_from_arguments(MiniLLMConfig, GKDConfig(**PLAIN, max_length=990, kd_temperature=1.0, top_k=0, seed=7))
    assert (ours.max_length, ours.seed) == (990, 7) and ours.lmbda == 1.0


def test_arguments_of_transformers_are_carried():
    ours = config_from_arguments(GKDConfig, TrainingArguments(**PLAIN, warmup_steps=3, label_names=["labels"]))
    assert (ours.warmup_steps, ours.learning_rate, ours.remove_unused_columns) == (3, 5e-5, False)
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        config_from_arguments(GKDConfig, TrainingArguments(**PLAIN, label_smoothing_factor=0.1))
    with pytest.raises(ConfigurationError, match="`predict_with_generate: True` in a Seq2SeqTrainingArguments"):
        config_from_arguments(GKDConfig, Seq2SeqTrainingArguments(**PLAIN, predict_with_generate=True))


@dataclass
class Own(TrainingArguments):
    data_path: str = "none"


def test_fields_of_ones_own_are_named_but_hinder_nothing(caplog):
    """A script's own dataclass has settings that no trainer reads."""
    ours = config_from_arguments(GKDConfig, Own(**PLAIN, data_path="rows.jsonl", max_steps=2))
    assert ours.max_steps == 2 and "`data_path: rows.jsonl` in a Own" in caplog.text


def test_a_carried_config_can_be_written_and_read_again():
    ours = config_from_arguments(GKDConfig, trl_gkd.GKDConfig(**PLAIN))
    assert json.loads(ours.to_json_string())["max_new_tokens"] == 128
