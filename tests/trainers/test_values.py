"""Every setting of every config with None and with numbers that are none: it works as in TRL, or is named."""

import json
import math
import re
from dataclasses import MISSING, fields
from typing import get_type_hints

import numpy as np
import pytest
import torch
from datasets import Dataset

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.trainers import METHODS

CONFIGS = [pair[0] for pair in METHODS.values()]
PLAIN = {"output_dir": "out", "use_cpu": True, "report_to": "none"}
EVERY = [pytest.param(cls, f.name, id=f"{cls.__name__}-{f.name}") for cls in CONFIGS for f in fields(cls) if f.init]
HINTS = {cls: get_type_hints(cls) for cls in CONFIGS}
NUMBERS = {int, float, int | None, float | None}
EVERY_NUMBER = [case for case in EVERY if HINTS[case.values[0]][case.values[1]] in NUMBERS]
MAY_BE_NEGATIVE = {"max_steps", "local_rank", "wrong_floor"}
MAY_BE_INFINITE = {"max_grad_norm", "wrong_floor", "guard_limit", "teacher_server_patience"}


def taken(cls, name, value):
    """Whether a value is taken; if it is refused, the setting is named."""
    try:
        cls(**PLAIN | {name: value})
    except ConfigurationError as error:
        assert re.search(rf"\b{name}\b", str(error)), str(error)
        return False
    return True


def default_of(cls, name):
    return next(f.default if f.default is not MISSING else f.default_factory() for f in fields(cls) if f.name == name)


def test_there_are_settings_to_walk():
    assert len(EVERY) > 600 and len(EVERY_NUMBER) > 200


@pytest.mark.parametrize("cls, name", EVERY)
def test_none_works_or_is_named(cls, name):
    assert taken(cls, name, None) or default_of(cls, name) is not None


@pytest.mark.parametrize("cls, name", EVERY_NUMBER)
def test_what_is_no_number_is_named(cls, name):
    assert not taken(cls, name, math.nan)
    assert not taken(cls, name, "many")
    assert not taken(cls, name, [1])
    assert not taken(cls, name, True)


@pytest.mark.parametrize("cls, name", [case for case in EVERY_NUMBER if case.values[1] not in MAY_BE_INFINITE])
def test_infinity_is_named(cls, name):
    assert not taken(cls, name, math.inf) and not taken(cls, name, -math.inf)


@pytest.mark.parametrize("cls, name", [case for case in EVERY_NUMBER if case.values[1] not in MAY_BE_NEGATIVE])
def test_negative_numbers_are_named(cls, name):
    assert not taken(cls, name, -1 if int in (HINTS[cls][name], *getattr(HINTS[cls][name], "__args__", ())) else -0.5)


@pytest.mark.parametrize("cls", CONFIGS)
def test_filters_of_sampling_are_off_at_none_as_in_transformers(cls):
    none = dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"))
    args = cls(**PLAIN, **none)
    assert {name: getattr(args, name) for name in none} == {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


@pytest.mark.parametrize("method", METHODS)
def test_without_max_length_rows_are_trained_uncut(make_trainer, method):
    """A row far longer than the default of 1024 tokens keeps each of them."""
    prompt, completion = "1+" * 900 + "1=", "2" * 700
    rows = {"gkd": {"prompt": prompt, "completion": completion}, "minillm": {"prompt": prompt}}
    rows["dpkd"] = {"prompt": prompt, "chosen": completion, "rejected": "3" * 650}
    rows["rationale"] = {"question": prompt, "rationale": completion, "answer": "2"}
    plain = {"max_length": None, "max_new_tokens": 4, "lmbda": 0.0} if method == "gkd" else {"max_length": None}
    trainer = make_trainer(method=method, train=Dataset.from_list([rows[method]] * 4), max_steps=1, **plain)
    row = trainer.train_dataset[0]
    longest = max(len(value) for value in row.values() if isinstance(value, list))
    assert longest >= len(prompt) + (len(completion) if method != "minillm" else 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("column_mapping", "question"), ("model_init_kwargs", "dtype"), ("vllm_kwargs", ["mode"]), ("stop_strings", "x")],
)
def test_texts_and_lists_in_place_of_mappings_are_named(name, value):
    assert not any(taken(cls, name, value) for cls in CONFIGS)


@pytest.mark.parametrize("value", ["0.7", None, True])
def test_weights_of_teachers_are_numbers(value):
    with pytest.raises(ConfigurationError, match="teacher_weights: .*expected a mapping of names to numbers, such as"):
        METHODS["gkd"][0](**PLAIN, teacher_mix="geometric", teacher_weights={"math": value})


@pytest.mark.parametrize("name", ["bf16", "push_to_hub", "seq_kd", "disable_dropout", "load_best_model_at_end"])
def test_a_word_is_no_switch(name):
    """Python takes "false" for true."""
    cls = METHODS["gkd"][0]
    assert not taken(cls, name, "false")


def test_numbers_of_numpy_and_paths_are_taken(tmp_path):
    cls = METHODS["gkd"][0]
    args = cls(**PLAIN, max_length=np.int64(640), lmbda=np.float32(0.5), completions_dir=tmp_path / "kept")
    assert args.max_length == 640 and args.completions_dir == str(tmp_path / "kept")
    args = cls(**PLAIN, max_length=np.int64(640), extrapolate={"reference": "initial", "scale": np.float32(1.5)})
    kept = json.loads(args.to_json_string())  # as trackers and `run.json` have it
    assert kept["max_length"] == 640 and kept["extrapolate"] == {"reference": "initial", "scale": 1.5}
    assert taken(cls, "lmbda", 1) and not taken(cls, "max_length", torch.tensor(3)) and not taken(cls, "max_steps", 2.5)


def test_trls_name_of_the_longest_completion():
    cls = METHODS["gkd"][0]
    assert cls(**PLAIN, max_completion_length=7).max_new_tokens == 7
    with pytest.raises(ConfigurationError, match="max_completion_length: 7"):
        cls(**PLAIN, max_completion_length=7, max_new_tokens=8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rat": 1.0}, "Did you mean 'learning_rate'"),
        ({"completion_only_loss": False}, "give whole texts as `text`"),
        ({"max_seq_length": 64}, "TRL's name of 'max_length'"),
        ({"eos_token": "x", "use_vllm": True}, "'use_vllm': That is a setting of TRL"),
    ],
)
def test_an_argument_that_is_none_is_named(given, said):
    with pytest.raises(ConfigurationError) as error:
        METHODS["gkd"][0](**PLAIN, **given)
    assert said in str(error.value) and all(name in str(error.value) for name in given)
