"""The doctor finds what was planted, says nothing of a healthy recipe, and refuses long runs that would fail."""

import copy
import json
from collections import namedtuple
from types import SimpleNamespace

import pytest

from distill_trainers import models
from distill_trainers.cli import main
from distill_trainers.doctor import Launch, precision, room, teacher
from distill_trainers.doctor.printing import print_first_row
from distill_trainers.doctor.reading import case_of
from distill_trainers.models.precision import Products
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.teachers import LocalTeacher

CHAT = "{% for m in messages %}{{ '=' if m['role'] == 'user' else '' }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
OTHER_CHAT = (
    "{% for m in messages %}{{ '+' if m['role'] == 'user' else '' }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['content'] }}{{ '<pad>' }}{% endfor %}"


@pytest.fixture
def diagnose(capsys):
    """`diagnose(path, *options)`: exit status and the JSON that the doctor prints."""

    def run(path, *options):
        capsys.readouterr()
        status = main(["doctor", "--config", path, "--quick", "--json", *options])
        printed = capsys.readouterr()
        assert printed.out, printed.err
        return status, json.loads(printed.out)

    return run


@pytest.fixture
def pair(tmp_path, make_student, make_teacher, tokenizer):
    """`pair(student={...}, teacher={...})` saves two models; `template`, `eos` and `stops` are of the tokenizer."""

    def save(**roles):
        saved = {}
        for role, make in (("student", make_student), ("teacher", make_teacher)):
            changes = dict(roles.get(role, {}))
            tok = copy.deepcopy(tokenizer)
            tok.chat_template = changes.pop("template", None)
            tok.eos_token = changes.pop("eos", tok.eos_token)
            stops = changes.pop("stops", tok.eos_token_id)
            model = make(**changes)
            model.generation_config.eos_token_id = stops
            model.save_pretrained(tmp_path / role)
            tok.save_pretrained(tmp_path / role)
            saved["model_name_or_path" if role == "student" else "teacher_model_name_or_path"] = str(tmp_path / role)
        return saved

    return save


@pytest.fixture
def conversations(tmp_path):
    file = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(4)
        for b in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def serious(report):
    return [f for f in report["findings"] if f["severity"] != "note"]


@pytest.mark.parametrize("method", ["gkd", "dpkd", "minillm"])
def test_a_healthy_recipe_is_not_remarked_upon(recipe, pair, diagnose, method):
    status, report = diagnose(recipe(method=method, **pair()), "--strict")
    assert (status, report["findings"]) == (0, [])
    assert report["memory"]["peak"] > 0 and report["steps"] == 3 and report["operations_per_step"] > 0


def test_a_healthy_recipe_of_conversations(recipe, pair, diagnose, conversations):
    both = {"template": CHAT}
    path = recipe(**pair(student=both, teacher=both), dataset=conversations)
    status, report = diagnose(path, "--strict")
    assert (status, report["findings"]) == (0, [])


def test_the_first_row_is_shown_with_what_is_trained(recipe, pair, diagnose, conversations, capsys):
    both = {"template": CHAT}
    path = recipe(**pair(student=both, teacher=both), dataset=conversations)
    _, report = diagnose(path)
    # The held-out rows are drawn from the same file, so any of them may be the first.
    (prompt, answer) = report["first_row"]
    assert not prompt["trained"] and answer["trained"]
    a, b = prompt["text"].lstrip("=").split("=")[0].split("+")
    assert (prompt["text"], answer["text"]) == (f"={a}+{b}=<eos>", f"{int(a) + int(b)}<eos>")
    main(["doctor", "--config", path, "--quick"])
    assert f"{prompt['text']}⟦{answer['text']}⟧" in capsys.readouterr().out


def test_the_first_row_is_shown_as_both_read_it(recipe, pair, diagnose, conversations, capsys):
    both = {"template": CHAT}
    path = recipe(**pair(student=both, teacher=both), dataset=conversations, teacher_prompt="9+9+{prompt}", lmbda=0.0)
    status, report = diagnose(path)
    (asked, answer), (own, same) = report["first_row"], report["teacher_row"]
    assert status == 0 and same == answer and answer["trained"] and not own["trained"]
    assert own["text"] == asked["text"].replace("=", "=9+9+", 1)
    main(["doctor", "--config", path, "--quick"])
    shown = capsys.readouterr().out
    assert "the student reads" in shown and "the teacher reads" in shown
    (line,) = [line for line in shown.splitlines() if f"⟦{answer['text']}⟧" in line]
    assert line.index(asked["text"]) < line.index(own["text"])
    status, report = diagnose(recipe(**pair(), teacher_prompt="{hint}{prompt}"))
    assert status == 2 and any("has no column hint" in finding["what"] for finding in report["findings"])


def test_a_row_gives_no_orders_to_the_terminal():
    from rich.console import Console

    console = Console(record=True, width=200)
    row = [("a\x1b[2J", False), ("b\u202e", True)]
    for view in ([], row):
        print_first_row(SimpleNamespace(case=SimpleNamespace(first_row=row, teacher_row=view)), console)
        assert console.export_text().count("a‹U+001B›[2J⟦b‹U+202E›⟧") == 1 + bool(view)


def test_every_fault_of_the_data_is_told_in_the_words_of_a_run(recipe, pair, diagnose, tmp_path):
    asked = {"role": "user", "content": "1+2="}
    answered = {"role": "assistant", "content": "3"}
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{1"}}]
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, answered]},
        {"messages": [asked, {**answered, "weight": 3}]},
        {"messages": [asked, {**answered, "weight": 4}]},
        {"messages": [asked, {**answered, "tool_calls": calls}]},
        {"messages": [asked, {**answered, "reasoning_content": "12"}]},
        {"messages": [asked, answered], "tools": "[{"},
    ]
    file = tmp_path / "faults.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"tools": None, **row} for row in rows])))
    both = {"template": CHAT}
    status, report = diagnose(recipe(**pair(student=both, teacher=both), dataset=str(file), eval_fraction=None))
    told = [finding["what"] for finding in serious(report)]
    words = [
        "part of type 'image'",
        "weight=3",
        "arguments is no JSON",
        "loses the thinking of message 1",
        "'tools' is no",
    ]
    assert status == 2 and len(told) == len(words)
    for number, (word, what) in enumerate(zip(words, told, strict=True)):
        assert word in what and f"Row {(0, 1, 3, 4, 5)[number]} of dataset 'train'" in what


# Fault: what the models are made with, settings of the recipe, free bytes per byte of the peak; then the exit status
# and the severity, concern and words of the one finding that tells.
ONE = {"template": CHAT}
FAULTS = {
    "nothing": ({}, {}, None, 0, None),
    "template differs": (
        {"student": ONE, "teacher": {"template": OTHER_CHAT}},
        {"dataset": "conversations"},
        None,
        0,
        ("warning", "tokens", ["chat templates differ", "from token 0 on", "'='", "'+'"]),
    ),
    "vocabulary padded": (
        {"teacher": {"vocab_size": 32}},
        {},
        None,
        0,
        ("note", "tokens", ["the teacher's 32", "vocabulary is padded"]),
    ),
    "vocabulary padded by too little": (
        {"teacher": {"vocab_size": 10}},
        {},
        None,
        2,
        ("error", "tokens", ["for which a model has no row", "teacher 10"]),
    ),
    "wrong special token": (
        {"student": {"eos": "<pad>"}},
        {},
        None,
        0,
        ("warning", "tokens", ["end of text is '<pad>'", "to the teacher"]),
    ),
    "wrong stop": ({"student": {"stops": 5}}, {}, None, 0, ("warning", "tokens", ["end at", "no special token"])),
    "too little memory": ({}, {}, 0.5, 2, ("error", "memory", ["A step takes about"])),
    "stale cache": (
        {},
        {"lmbda": 0.0, "teacher_cache": "cache"},
        None,
        2,
        ("error", "teacher", ["model.safetensors has changed"]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found_and_nothing_else(
    recipe, pair, diagnose, conversations, tmp_path, make_teacher, monkeypatch, fault
):
    """The healthy recipe, and the same with one thing wrong: one finding, of the right severity, with a remedy."""
    roles, settings, room_for_peak, status, expected = FAULTS[fault]
    places = {"conversations": conversations, "cache": str(tmp_path / "cache")}
    path = recipe(**pair(**roles), **{name: places.get(value, value) for name, value in settings.items()})
    if "teacher_cache" in settings:
        assert main(["cache-teacher", "--config", path]) == 0
        fresh, report = diagnose(path)
        assert (fresh, report["findings"]) == (0, []), "a fresh cache is healthy"
        make_teacher(seed=9).save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    if room_for_peak:
        free = room._IMPORTS + room_for_peak * diagnose(path)[1]["memory"]["peak"]
        monkeypatch.setattr(room, "host_memory", lambda: free)
    found_status, report = diagnose(path)
    assert found_status == status
    told = [(f["severity"], f["concern"]) for f in report["findings"]]
    assert told == ([] if expected is None else [expected[:2]]), report["findings"]
    if expected is not None:
        (found,) = report["findings"]
        assert all(word in found["what"] for word in expected[2]) and found["remedy"], found
        strict = 2 if expected[0] == "error" else 1 if expected[0] == "warning" else 0
        assert diagnose(path, "--strict")[0] == strict


@pytest.mark.parametrize(
    ("roles", "chat", "severity", "words"),
    [
        ({"student": {"template": CHAT}}, True, "warning", ["no chat template"]),
        (
            {"student": {"template": NO_END}, "teacher": {"template": NO_END}},
            True,
            "warning",
            ["ends an answer with '<pad>'", "stops at"],
        ),
        ({"student": {"vocab_size": 10}}, False, "error", ["for which a model has no row", "student has 10"]),
        ({"student": {"stops": 999}}, False, "warning", ["id 999", "no row"]),
        ({"student": {"max_position_embeddings": 16}}, False, "error", ["24 tokens", "student was made for 16"]),
        ({"teacher": {"max_position_embeddings": 16}}, False, "error", ["teacher was made for 16"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_planted_fault_of_the_models_is_found(recipe, pair, diagnose, conversations, roles, chat, severity, words):
    more = {"dataset": conversations} if chat else {}
    status, report = diagnose(recipe(**pair(**roles), **more))
    (found, *_) = [f for f in serious(report) if all(word in f["what"] for word in words)]
    assert found["severity"] == severity and found["remedy"]
    assert len({f["what"] for f in report["findings"]}) == len(report["findings"]), "each is told once"
    assert status == (2 if severity == "error" else 0)
    if severity == "warning":
        assert {f["severity"] for f in serious(report)} == {"warning"}
        assert diagnose(recipe(**pair(**roles), **more), "--strict")[0] == 1


def test_another_vocabulary_is_shown_token_by_token(recipe, pair, tmp_path, tokenizer, diagnose):
    changed = pair()
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    file.write_text(json.dumps(content))
    status, report = diagnose(recipe(**changed))
    (found,) = [f for f in serious(report) if "different tokenizers" in f["what"]]
    assert status == 2 and "'3' / '4'" in found["what"]


def test_two_tokenizers_are_laid_beside_each_other(recipe, pair, tmp_path, diagnose, digits):
    """How both split the data, in numbers and in the first row; little that is shared is a warning."""
    from distill_trainers.toy import tiny_llama

    rows = tmp_path / "long.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{i}+", "completion": "1234"}) for i in range(24)))
    changed = {**pair(), "teacher_tokenizer": "own", "lmbda": 0.0, "dataset": str(rows)}
    tiny_llama(digits, 48, 2).save_pretrained(tmp_path / "teacher")
    digits.save_pretrained(tmp_path / "teacher")
    status, report = diagnose(recipe(**changed))
    told = [f["what"] for f in report["findings"] if "share" in f["what"]]
    assert status == 0 and len(told) == 1
    assert "24 rows (96 bytes) are 120 tokens of the student (0.8 bytes each) and 72 of the teacher (1.3)" in told[0]
    assert "The first begins 1|2|3|4|<> and 12|34|<>." in told[0]


@pytest.mark.slow
def test_a_cache_of_its_next_bytes_is_filled_read_and_compared(recipe, pair, tmp_path, capsys, monkeypatch, digits):
    from distill_trainers.toy import tiny_llama

    kept = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": "next_bytes"}
    path = recipe(**pair(), **kept, teacher_tokenizer="own", lmbda=0.0, max_steps=1)
    model = tiny_llama(digits, 48, 2, seed=7, initializer_range=0.25)
    model.save_pretrained(tmp_path / "teacher")
    digits.save_pretrained(tmp_path / "teacher")
    assert main(["cache-teacher", "--config", path]) == 0
    assert main(["cache-teacher", "--inspect", kept["teacher_cache"]]) == 0
    assert "next_bytes" in capsys.readouterr().out
    assert main(["doctor", "--config", path]) == 0 and "apart" not in capsys.readouterr().out
    other = LocalTeacher(tiny_llama(digits, 48, 2, seed=8, initializer_range=0.25))
    with monkeypatch.context() as changed:
        changed.setattr(LocalTeacher, "loaded", lambda *a: other)
        assert main(["doctor", "--config", path]) == 2 and "nats per token" in capsys.readouterr().out
    monkeypatch.setattr(LocalTeacher, "loaded", lambda *a: pytest.fail("the teacher was loaded"))
    assert main(["train", "--config", path]) == 0


def test_a_teacher_that_splits_text_differently_is_shown_at_the_first_token(recipe, pair, tmp_path, diagnose):
    changed = pair()
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "="}, "content": "+"}
    file.write_text(json.dumps(content))
    status, report = diagnose(recipe(**changed))
    (found,) = serious(report)
    assert "row 0" in found["what"] or "probe" in found["what"]
    assert "'='" in found["what"] and "'+'" in found["what"]


def test_rows_that_are_cut_are_counted(recipe, diagnose, pair):
    status, report = diagnose(recipe(**pair(), max_length=5, max_new_tokens=2, lmbda=0.0))
    assert any("lose their end" in f["what"] and "max_length: 5" in f["what"] for f in serious(report))


def test_too_little_memory_is_an_error_that_names_what_fits(recipe, pair, diagnose, monkeypatch):
    path = recipe(**pair(), per_device_train_batch_size=24)
    _, report = diagnose(path)
    need = report["memory"]["peak"]
    monkeypatch.setattr(room, "host_memory", lambda: room._IMPORTS + need / 1.5)
    status, report = diagnose(path)
    (found,) = serious(report)
    assert status == 2 and found["concern"] == "memory" and "per_device_train_batch_size: 1" in found["remedy"]
    monkeypatch.setattr(room, "host_memory", lambda: room._IMPORTS + need / 1.05)
    assert diagnose(path)[0] == 0, "tight, but it may go well"
    assert diagnose(path, "--strict")[0] == 1


def test_batches_counted_in_tokens_are_judged_by_them(recipe, pair, diagnose):
    """As many tokens as 24 rows of `max_length` have take as much memory; a longer row is a finding."""
    rows = diagnose(recipe(**pair(), per_device_train_batch_size=24, max_steps=-1))[1]
    counted = {"per_device_train_batch_size": None, "max_steps": -1}
    tokens = diagnose(recipe(**pair(), **counted, per_device_train_tokens=24 * 24))[1]
    assert tokens["memory"]["peak"] == rows["memory"]["peak"] and tokens["steps"] == rows["steps"]
    status, report = diagnose(recipe(**pair(), **counted, per_device_train_tokens=4, lmbda=0.0))
    assert status == 2 and any(
        "`per_device_train_tokens: 4`, but the longest row" in f["what"] for f in serious(report)
    )


def test_a_full_disk_is_an_error(recipe, pair, diagnose, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12 - 10**5, 10**5))
    status, report = diagnose(recipe(**pair(), save_strategy="steps", save_steps=1))
    (found,) = serious(report)
    assert status == 2 and found["concern"] == "disk" and "3 checkpoints" in found["what"]
    assert "save_total_limit" in found["remedy"]


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_a_cache_is_compared_with_the_live_teacher(recipe, pair, tmp_path, capsys, monkeypatch, make_teacher, kind):
    path = recipe(**pair(), lmbda=0.0, teacher_cache=str(tmp_path / "cache"), teacher_cache_kind=kind, **_sparse(kind))
    assert main(["cache-teacher", "--config", path]) == 0
    assert main(["doctor", "--config", path, "--strict"]) == 0
    assert "Nothing wrong" in capsys.readouterr().out
    case, _ = case_of(parse_recipe(["--config", path]), Launch(on_cpu=True))
    with monkeypatch.context() as rounded:  # as eight bits do on a real vocabulary
        rounded.setattr(teacher, "disagreement", lambda *a: 0.01)
        assert len(list(teacher.check_answers(case))) == (kind != "topk")
    other = LocalTeacher(make_teacher(seed=8))
    monkeypatch.setattr(LocalTeacher, "loaded", lambda *a: other)
    assert main(["doctor", "--config", path]) == 2
    assert "nats per token apart" in " ".join(capsys.readouterr().out.split())


def test_a_remote_teacher_is_compared_with_the_local_one(recipe, pair, make_teacher):
    case, found = case_of(parse_recipe(["--config", recipe(**pair())]), Launch(on_cpu=True))
    assert not found
    for seed, count in ((7, 0), (8, 1)):
        served = LocalTeacher(make_teacher(seed=seed), name="http://127.0.0.1:8000")
        assert len(list(teacher.check_answers(case, served))) == count


def _sparse(kind):
    few = {"teacher_cache_top_k": 6} if kind == "topk" else {}  # not all ids: in eight bits
    return {} if kind == "hidden" else {"divergence": "forward_kl", **few}


def test_everything_that_is_wrong_is_found_at_once(recipe, pair, diagnose):
    roles = {"student": {"vocab_size": 10, "max_position_embeddings": 16}, "teacher": {"max_position_embeddings": 16}}
    status, report = diagnose(recipe(**pair(**roles), dataset="no/such/file.jsonl"))
    assert status == 2 and {"tokens", "lengths", "recipe"} <= {f["concern"] for f in serious(report)}
    assert [f["severity"] for f in report["findings"]] == sorted(f["severity"] for f in report["findings"])
    assert len({f["what"] for f in report["findings"]}) == len(report["findings"]), "each is told once"


# ---- Launches and hardware ------------------------------------------------------------------------------------------


def test_memory_on_gpus_that_are_not_here(recipe, pair, capsys):
    path = recipe(**pair(), bf16=True)
    assert main(["doctor", "--config", path, "--gpus", "8x80", "--tflops", "400"]) == 0
    printed = capsys.readouterr().out
    assert "8 of 80 GB" in printed and "quantized-4bit" in printed and "400 · 10¹²/s" in printed


def test_the_launch_is_read(recipe, pair, diagnose):
    path = recipe(**pair())
    _, one = diagnose(path)
    _, two = diagnose(path, "--launch", "accelerate_configs/cpu_zero3.yaml")
    assert two["launch"]["strategy"] == two["placement"] == "zero3" and two["launch"]["processes"] == 2
    assert two["memory"]["held"]["teacher"] == one["memory"]["held"]["teacher"] / 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "eight"], "8x80"),
        (["--gpus", "0x80"], "8x80"),
        (["--tflops", "400"], "without `gpus`"),
        (["--launch", "accelerate_configs/zero4.yaml"], "zero3.yaml"),
        (["--launch", "pyproject.toml"], "launch configuration"),
        (["--architectures", "no/such/folder"], "owner--name.json"),
    ],
)
def test_bad_options_are_refused(recipe, pair, capsys, options, words):
    assert main(["doctor", "--config", recipe(**pair()), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_launch_in_another_precision_is_remarked_upon(recipe, pair, diagnose):
    _, report = diagnose(recipe(**pair()), "--launch", "accelerate_configs/ddp.yaml")
    assert any("mixed precision 'no'" in f["what"] and "bf16" in f["what"] for f in serious(report))


@pytest.mark.parametrize(
    ("products", "bf16", "remedy"),
    [
        (Products(62, 9), True, "Set `bf16: false`, or `bf16: auto`."),
        (Products(150, 83), True, "Set `bf16: false`, or `bf16: auto`."),
        (Products(100, 300), True, None),
        (Products(100, 110), True, None),
        (Products(100, 110), False, None),
        (Products(62, 9), False, None),
        (Products(100, 300), False, "Set `bf16: true`, or `bf16: auto`."),
    ],
)
def test_the_slower_precision_of_a_processor_is_remarked_upon(
    recipe, pair, diagnose, monkeypatch, products, bf16, remedy
):
    monkeypatch.setattr(precision, "products_of", lambda config: products)
    _, report = diagnose(recipe(**pair(), bf16=bf16))
    remedies = [f["remedy"] for f in report["findings"] if "multiplies" in f["what"]]
    assert len(remedies) == (remedy is not None) and all(text.startswith(remedy) for text in remedies)


# ---- Before a run ---------------------------------------------------------------------------------------------------


class Loaded(BaseException):
    pass


def test_a_long_run_is_looked_at_before_it_loads_anything(recipe, pair, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(models, "load_causal_lm", load)
    changed = pair(student={"max_position_embeddings": 16})
    path = recipe(**changed, max_steps=100)
    assert main(["train", "--config", path]) == 2
    printed = capsys.readouterr().err
    assert "made for 16 positions" in printed and "--no_doctor" in printed and "max_length: 16" in printed
    for options in (["--no_doctor"], ["--doctor", "false"], ["--max_steps", "3"]):
        with pytest.raises(Loaded):
            main(["train", "--config", path, *options])
    with pytest.raises(Loaded):
        main(["train", "--config", recipe(**pair(), max_steps=100)])
    assert "error" not in capsys.readouterr().err


def test_a_local_teacher_is_compared_with_a_served_one_only(recipe, pair, capsys):
    assert main(["doctor", "--config", recipe(**pair()), "--local_teacher", "somewhere"]) == 2
    assert "expected the address of a server" in capsys.readouterr().err


def test_a_healthy_recipe_of_pairs_is_healthy(recipe, pair, tmp_path, diagnose):
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(5) for b in range(4)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    status, diagnosis = diagnose(recipe(**pair(), method="dpkd", dataset=str(data)))
    assert status == 0 and not [finding for finding in diagnosis["findings"] if finding["severity"] == "error"]


def test_rows_that_the_doctor_did_not_look_at_may_be_good(recipe, pair, tmp_path, diagnose):
    """It looks at the first 200: that none of them trains says nothing of the others."""
    data = tmp_path / "late.jsonl"
    data.write_text("\n".join(map(json.dumps, [{"text": ""}] * 250 + [{"text": "1+1=2"}] * 20)))
    assert diagnose(recipe(**pair(), lmbda=0.0, dataset=str(data)))[0] == 0
    data.write_text("\n".join(map(json.dumps, [{"text": ""}] * 150)))
    status, diagnosis = diagnose(recipe(**pair(), lmbda=0.0, dataset=str(data)))
    assert status == 2 and "None of the 150 rows" in diagnosis["findings"][0]["what"]
