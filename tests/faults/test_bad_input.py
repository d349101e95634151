"""Wrong values in every setting, and recipes with damage: refused in one sentence, or taken as they were given.

No model is loaded, and no exception but the package's own may leave. `FAULTS_SEED=7 pytest -m "" …` tries others.
"""

import enum
import json
import math
import os
import random
import re
import threading
import types
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from distill_trainers.cli import main, rationale_settings
from distill_trainers.cli.doctor import DoctorArguments
from distill_trainers.cli.evaluate import EvaluateArguments
from distill_trainers.cli.pairs import PairArguments
from distill_trainers.evaluation import EvaluationSettings
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.recipe.parse import RecipeArguments, parse_recipe
from distill_trainers.recipe.reading import read_settings
from distill_trainers.trainers import METHODS
from distill_trainers.value_types import check_settings

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("FAULTS_SEED", "0"))
PLAIN = {"output_dir": "out", "use_cpu": True, "report_to": "none"}
CONFIGS = {cls.__name__: cls for cls, _ in METHODS.values()}
OTHERS = {
    cls.__name__: cls
    for cls in (
        EvaluationSettings,
        rationale_settings.PipelineArguments,
        RecipeArguments,
        EvaluateArguments,
        PairArguments,
        DoctorArguments,
    )
}
# Settings whose value is turned into another one that says the same, or stands in another setting.
TURNED = {
    "self_teacher",  # true is `initial`
    "max_completion_length",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "accelerator_config",
    "fsdp",
    "fsdp_config",
    "report_to",
    "debug",
    "include_num_input_tokens_seen",
    "dataloader_pin_memory",
    "disable_tqdm",
    "do_eval",
    "torch_compile",
}
ANY = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 10**5000, 0.5, -0.5, 1.5, 1e39, -1e308, math.nan, math.inf,
    -math.inf, "", " ", "abc", "1", "nan", "true", "a\0b", "\x1b[31m", "é", "\ud800", "x" * 5000, "{", "{}", "[1]",
    [], [1], ["a"], [None], ["a\0b"], {}, {"a": 1}, {1: 2}, {"a": math.nan}, {"a": {"b": ["\0"]}}, (), b"x", 1j,
]  # fmt: skip


def parts_of(hint):
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def wrong_values(cls, field):
    """Values that a field of this type and these bounds cannot take."""
    kinds = {get_origin(part) or part for part in parts_of(HINTS[cls][field.name])}
    if kinds & {str}:
        wrong = ["a\0b", "\ud800", [1], {1: 2}, b"x"]
        wrong += [{"a": {"b": math.nan}}, {"a": [1e39]}] if dict in kinds else []
        return [*wrong, '{"a": NaN}'] if dict in kinds and cls in CONFIGS.values() else wrong
    wrong = ["many", "1", [1], b"x"]
    if kinds & {int, float}:
        wrong += [True, math.nan, 10**400, 1e39, -1e39]
        bounds = field.metadata.get("bounds")
        for end, beyond in (
            ((bounds.least, -1), (bounds.above, 0), (bounds.most, 1), (bounds.below, 0)) if bounds else ()
        ):
            wrong += [] if end is None else [end + beyond]
    if kinds & {int}:
        wrong += [0.5, 2**63]
    if kinds & {list}:
        wrong = ["many", [1, None], {}, b"x", ["\0"], True, [math.nan], [0.5, math.inf]]
    return wrong


HINTS = {cls: get_type_hints(cls) for cls in (*CONFIGS.values(), *OTHERS.values())}


def made(cls, values):
    """The settings with these values, checked as its command checks them."""
    if cls in CONFIGS.values():
        return cls(**PLAIN | values)
    settings = cls(**{"folder": "out"} | values if cls is rationale_settings.PipelineArguments else values)
    if hasattr(settings, "check"):
        settings.check()
    else:
        check_settings(settings)
    return settings


def is_sentence(text):
    return len(text) < 1500 and "\n" not in text.strip() and not re.search(r"Traceback|0x[0-9a-f]{8}", text)


def same(given, used):
    used = used.value if isinstance(used, enum.Enum) else used
    if isinstance(given, str) and isinstance(used, (dict, list)):
        return json.loads(given) == used
    return used == given or used == os.path.expanduser(str(given)) or (given in (None, "") and not used)


def outcome(cls, values):
    """`refused`, or `survived` where every value is in use as it was given; else it is silent, with the reason."""
    try:
        settings = made(cls, values)
    except ConfigurationError as error:
        named = any(re.search(rf"\b{name}\b", str(error)) for name in values) or "transformers cannot" in str(error)
        others = {"max_new_tokens"} if "max_completion_length" in values else set()
        named = named or any(name in str(error) for name in others | {"answer format", "Divergence"})
        return "refused" if named and is_sentence(str(error)) else f"unclear: {error}"
    for name, value in values.items():
        default = next(f.default for f in fields(cls) if f.name == name)
        fine = name in TURNED or same(value, getattr(settings, name)) or (value is None and default is not MISSING)
        if not fine:
            return f"silent: {name}={value!r} became {getattr(settings, name)!r}"
    return "survived"


def own_fields(cls, known=frozenset()):
    return [field for field in fields(cls) if field.init and field.name not in known]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No file of these settings lands in the tree, no variable stays, nothing is loaded."""
    from transformers import AutoModelForCausalLM

    from distill_trainers import models

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_causal_lm", load)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


SHARED = {field.name for field in fields(CONFIGS["GKDConfig"])}  # walked once, with GKD's own
WALKED = [(cls, own_fields(cls, () if name == "GKDConfig" else SHARED)) for name, cls in CONFIGS.items()]
WALKED += [(cls, own_fields(cls)) for cls in OTHERS.values()]


@pytest.mark.parametrize(("cls", "walked"), WALKED, ids=[cls.__name__ for cls, _ in WALKED])
def test_what_no_setting_can_be_is_refused_by_name(cls, walked, ledger):
    unclear, tried = [], 0
    for field in walked:
        for value in wrong_values(cls, field):
            tried += 1
            came = outcome(cls, {field.name: value})
            if came != "refused":
                unclear.append((field.name, repr(value)[:40], came[:300]))
    assert not unclear, unclear[:20]
    ledger("wrong values of settings", "refused", tried)


def test_no_setting_of_seconds_is_longer_than_threads_can_wait():
    walked = {field.name: field for cls, found in WALKED for field in found}
    seconds = {name for name, field in walked.items() if str(field.metadata.get("help")).startswith("Seconds ")}
    assert {"reward_timeout", "teacher_server_timeout", "timeout"} <= seconds
    for name in seconds - {"teacher_server_patience"}:  # it is compared, and may be infinite
        most = walked[name].metadata["bounds"].most
        assert most is not None and most <= threading.TIMEOUT_MAX, name


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "walked"), WALKED, ids=[cls.__name__ for cls, _ in WALKED])
def test_anything_at_all_is_refused_or_used(cls, walked, ledger):
    wrong = []
    for field in walked:
        for value in ANY:
            came = outcome(cls, {field.name: value})
            if came in ("refused", "survived"):
                ledger("any value in any setting", came)
            else:
                wrong.append((field.name, repr(value)[:40], came[:300]))
    assert not wrong, (len(wrong), wrong[:20])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_adapter", "x" * 5000),
        ("divergence", "x" * 5000),
        ("accelerator_config", {"x" * 5000: 1}),
        ("accelerator_config", {"x" * 5000: 1, "y" * 5000: 1}),
    ],
)
def test_a_long_value_is_not_repeated_whole(name, value, ledger):
    """An error is read on a screen: it shows the beginning of what it got."""
    assert outcome(CONFIGS["GKDConfig"], {name: value}) == "refused"
    ledger("wrong values of settings", "refused")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.floats(-2, 2),
    st.text(max_size=8),
    st.sampled_from(["steps", "no", "epoch", "cosine", "adamw_torch", "nan", "-1", "1e400", "\0", "../..", "{}"]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), SCALARS, max_size=2),
)


def draw_many(number):
    @seed(SEED)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def draw(counts, data):
        cls = data.draw(st.sampled_from([*CONFIGS.values(), *OTHERS.values()]))
        names = data.draw(
            st.lists(st.sampled_from(own_fields(cls)), min_size=1, max_size=3, unique_by=lambda f: f.name)
        )
        values = {field.name: data.draw(VALUES, label=field.name) for field in names}
        came = outcome(cls, values)
        # With several settings the one that is named may be a third, which does not go with them.
        assert came in ("refused", "survived") or (came.startswith("unclear") and len(values) > 1), (values, came)
        counts.append("refused" if came != "survived" else came)

    return draw


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_drawn_values_are_refused_or_used(number, ledger):
    print(f"FAULTS_SEED={SEED}")
    counts = []
    draw_many(number)(counts)
    for came in ("refused", "survived"):
        ledger("drawn values of settings", came, counts.count(came))


# ---- Recipes --------------------------------------------------------------------------------------------------------

RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "method:" in path.read_text(encoding="utf-8")
)  # fmt: skip
INSERTED = [
    b"\0", b"\t", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\r", b": ", b"- ", b"&a ", b"*a ", b"!!python/name:os.system ",
    b"[", b"{", b"'", b'"', b"\n---\n", b"#", b"| ", b"-", b"9" * 400, b".nan", b"1e400", b"true", b"no", b"~", b"0o17",
    b"1:30", b"2024-01-01", b"\xf0\x9f\x98\x80",
]  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to three random changes of a file."""
    for _ in range(chance.randint(1, 3)):
        place, lines, put = chance.randrange(len(data) + 1), data.split(b"\n"), chance.choice(INSERTED)
        line = chance.randrange(len(lines))
        name, colon, _ = lines[line].partition(b":")
        changes = [
            data[:place] + put + data[place:],
            data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :],
            data[:place],
            data[:place] + data[place + chance.randrange(1, 30) :],
            b"\n".join([*lines[:line], lines[line], *lines[line:]]),
            b"\n".join([*lines[:line], name + colon + b" " + put, *lines[line + 1 :]]),
        ]
        data = chance.choice(changes) or data
    return data


def recipe_outcome(path: Path, capsys) -> str:
    """What comes of a damaged recipe; one that is taken is used as it is written."""
    try:
        recipe = parse_recipe(["--config", str(path)])
    except ConfigurationError as error:
        return "refused" if is_sentence(" ".join(str(error).split())) else f"unclear: {error}"
    written = read_settings(path, "The recipe")
    places = (recipe.args, recipe.run, recipe.model)
    for name, value in written.items():
        holder = next((place for place in places if hasattr(place, name)), None)
        if holder is None or name in TURNED or isinstance(value, (dict, list)):
            continue
        used = getattr(holder, name)
        used = used.value if isinstance(used, enum.Enum) else used
        if not (used == value or str(used).lower() == str(value).lower() or as_number(value) == as_number(used)):
            if not (value is None or same(value, used) or isinstance(used, bool) or isinstance(used, list)):
                return f"silent: {name}: {value!r} became {used!r}"
    return "survived"


def as_number(value):
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@pytest.mark.parametrize("number", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_recipes_are_refused_or_used_as_they_are(number, tmp_path, ledger, capsys):
    chance = random.Random(SEED)
    print(f"FAULTS_SEED={SEED}")
    wrong = []
    for i in range(number):
        source = chance.choice(RECIPES)
        path = tmp_path / f"{i}.yaml"
        path.write_bytes(damaged(source.read_bytes(), chance))
        came = recipe_outcome(path, capsys)
        if came in ("refused", "survived"):
            ledger("damaged recipes", came)
        else:
            wrong.append((source.name, i, came[:300]))
    assert not wrong, wrong


@pytest.mark.parametrize(
    "bad", [b"", b"\0", b"[1]", b"a: &a [*a]\n", b"\xff\xfe", b"max_steps: .nan\n", b"learning_rate: 1e400\n"]
)
def test_a_command_ends_with_2_and_one_line(bad, tmp_path, capsys, ledger):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(bad)
    for command in ("train", "doctor", "cache-teacher", "pairs", "evaluate"):
        assert main([command, "--config", str(path)]) == 2
        printed = capsys.readouterr()
        (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in printed.err + printed.out and is_sentence(line)
        ledger("damaged recipes", "refused")
