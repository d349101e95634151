"""The teacher's own view of a row: what is rendered, what of it is joined with the completion, and what is refused."""

import json
from functools import partial

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from distill_trainers.data import DistillCollator, prepare_dataset, prepare_pairs, replace_completions
from distill_trainers.data.teacher_prompts import TeacherPrompts, filled, names_in, renamed
from distill_trainers.data.views import kept_view, teacher_inputs, viewed_row
from distill_trainers.exceptions import ConfigurationError, DatasetError, NoUsableRowsError
from distill_trainers.losses.reduction import trained_mask

CHAT = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
LONGER = [*CHAT, {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "3"}]


@pytest.fixture
def tok(make_tokenizer):
    return make_tokenizer()


def prepared(tok, rows, prompts, **settings):
    return prepare_dataset(Dataset.from_list(rows), tok, teacher_prompts=prompts, **{"max_length": 200, **settings})


def texts(tok, row):
    """What both read, and what is trained of it."""
    return [tok.decode(row["input_ids"]), tok.decode([token for token in row["labels"] if token != -100])]


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


OPENED = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "prompts", "prompt"),
    [
        ({"messages": CHAT}, {"system": "Be kind."}, turn("system", "Be kind.") + turn("user", "Two?")),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]},
            {"system": "Be kind."},
            turn("system", "Be kind.\n\nBe brief.") + turn("user", "Two?"),
        ),
        (
            {"messages": CHAT, "system": "Be brief."},
            {"system": "Be kind."},
            turn("system", "Be kind.\n\nBe brief.") + turn("user", "Two?"),
        ),
        ({"messages": CHAT, "h": "one more"}, {"prompt": "{prompt} ({h})"}, turn("user", "Two? (one more)")),
        ({"messages": CHAT, "h": 7}, {"prompt": "{{{h}}} {prompt}"}, turn("user", "{7} Two?")),
        ({"messages": CHAT, "h": 2.0}, {"prompt": "{h} {prompt}"}, turn("user", "2 Two?")),  # as CSV files give it
        ({"messages": CHAT, "h": 2.5}, {"prompt": "{h} {prompt}"}, turn("user", "2.5 Two?")),
        (
            {"messages": CHAT, "h": float("nan")},
            {"prompt": "{h} {prompt}", "system": "S"},
            turn("system", "S") + turn("user", "Two?"),
        ),
        ({"messages": CHAT, "h": "{prompt}"}, {"prompt": "{h}"}, turn("user", "{prompt}")),
        ({"messages": CHAT, "h": "How many?"}, {"prompt": "h"}, turn("user", "How many?")),
        (
            {"messages": CHAT, "h": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]},
            {"prompt": "h", "system": "T"},
            turn("system", "T\n\nS") + turn("user", "Q"),
        ),
        ({"messages": CHAT, "privileged_context": "A hint"}, {}, turn("user", "A hint\n\nTwo?")),
        (
            {"messages": CHAT, "privileged_context": [{"role": "user", "content": "A hint"}]},
            {"prompt": "{prompt} {privileged_context}"},
            turn("user", "Two? A hint"),
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:], "h": "x"},
            {"prompt": "{h}{prompt}", "system": "S"},
            turn("system", "S") + turn("user", "xTwo?"),
        ),
    ],
)
def test_the_teachers_prompt_is_rendered_and_the_completion_is_the_same(tok, row, prompts, prompt):
    (row,) = prepared(tok, [row], TeacherPrompts(**prompts))
    view = viewed_row(row)
    assert texts(tok, view) == [f"{prompt}{OPENED}2<|im_end|>", "2<|im_end|>"]
    assert row["teacher_length"] == len(view["input_ids"])
    assert view["input_ids"][view["prompt_length"] :] == row["input_ids"][row["prompt_length"] :]


def test_text_stays_text(tok):
    rows = [{"prompt": "1+1=", "completion": "2", "h": "two"}, {"prompt": "1+2=", "completion": "3", "h": ""}]
    views = [texts(tok, viewed_row(row))[0] for row in prepared(tok, rows, TeacherPrompts("Add.", "{h}: {prompt}"))]
    assert views == ["Add.\n\ntwo: 1+1=2<|im_end|>", "Add.\n\n1+2=3<|im_end|>"]


def test_a_row_without_context_has_the_students_prompt_and_is_counted(tok, caplog):
    rows = [{"messages": CHAT, "h": text} for text in ("a", None, " ")]
    first, *others = prepared(tok, rows, TeacherPrompts(prompt="{h} {prompt}"))
    assert texts(tok, viewed_row(first))[0] != tok.decode(first["input_ids"])
    assert all(viewed_row(row)["input_ids"] == row["input_ids"] for row in others)
    assert "3 rows: 2 have nothing in 'h', which `teacher_prompt` names, so that 2 have a teacher" in caplog.text


def test_columns_without_any_value_are_named_and_refused(tok, caplog):
    rows = [{"messages": CHAT, "h": None, "k": text} for text in ("a", "", None)]
    with pytest.raises(NoUsableRowsError, match="3 rows .*'train', of which 3 have nothing in 'h', 2 .* in 'k'"):
        prepared(tok, rows, TeacherPrompts(prompt="{h}{k}{prompt}"))
    with pytest.raises(NoUsableRowsError, match="3 have nothing in 'h': in none of them"):
        prepared(tok, rows, TeacherPrompts(prompt="h"))
    prepared(tok, rows, TeacherPrompts("S", prompt="h"))  # a system prompt is something of the teacher's own
    prepared(tok, rows, TeacherPrompts(prompt="h"), name="eval")  # scored against a teacher without a context
    assert "Dataset 'eval', 3 rows: 3 have nothing in 'h'" in caplog.text


@pytest.mark.parametrize("all_turns", [False, True])
def test_earlier_turns_that_are_trained_are_the_completion_side(tok, all_turns):
    """The view stands for the first prompt alone; what follows is joined token by token."""
    (row,) = prepared(
        tok, [{"messages": LONGER, "h": "!"}], TeacherPrompts("S", "{prompt}{h}"), assistant_only_loss=all_turns
    )
    said, trained = texts(tok, viewed_row(row))
    asked = [turn("user", f"Two?{'!' * all_turns}"), turn("user", f"Three?{'!' * (not all_turns)}")]
    assert said == turn("system", "S") + asked[0] + f"{OPENED}2<|im_end|>\n" + asked[1] + f"{OPENED}3<|im_end|>"
    assert trained == ("2<|im_end|>" * all_turns) + "3<|im_end|>"
    assert row["view_start"] == (len(tok.encode(turn("user", "Two?") + OPENED)) if all_turns else row["prompt_length"])


def test_a_cut_prompt_is_the_students_loss_alone(tok, caplog):
    """What the student loses behind the teacher's prompt becomes part of it: the teacher reads all."""
    rows = [{"messages": LONGER}]
    whole, cut = (
        prepared(tok, rows, TeacherPrompts("S"), assistant_only_loss=True, max_length=n)[0] for n in (500, 20)
    )
    assert len(cut["input_ids"]) == 20 < len(whole["input_ids"]) and cut["view_start"] == 0
    assert viewed_row(cut)["input_ids"] == viewed_row(whole)["input_ids"]
    assert "cut the beginning of 1 prompts" in caplog.text


def test_a_cut_row_without_context_is_the_same_for_both(tok):
    for settings in ({}, {"assistant_only_loss": True}):
        rows = [{"messages": LONGER, "h": None}, {"messages": LONGER, "h": "x"}]
        row = prepared(tok, rows, TeacherPrompts(prompt="{h}{prompt}"), max_length=20, **settings)[0]
        assert viewed_row(row)["input_ids"][-20:] == row["input_ids"]
        if not settings:
            assert viewed_row(row)["input_ids"] == row["input_ids"]


def test_begin_of_text_stays_in_front_of_a_cut_row():
    row = {"input_ids": [9, 1, 2, 3, 4, 5], "teacher_prompt_ids": [9, 7], "view_start": 2}
    assert kept_view(row, 1, 4) == {"teacher_prompt_ids": [9, 7, 2, 3], "view_start": 1}
    assert kept_view(row, 1, 2) == {"teacher_prompt_ids": [9, 7], "view_start": 1}
    assert kept_view(row, 0, 1) == {"teacher_prompt_ids": [9, 7], "view_start": 1}


def test_a_token_across_the_border_is_not_read_twice(tok):
    """Two newlines are one token here: the completion has it, so neither prompt may end in the first of them."""
    rows = [{"prompt": "a\n", "completion": "\nb", "h": "c"}]
    (row,) = prepared(tok, rows, TeacherPrompts(prompt="{h}{prompt}"))
    assert texts(tok, viewed_row(row))[0] == "ca\n\nb<|im_end|>"
    (row,) = prepared(tok, rows, TeacherPrompts(prompt="{prompt}{h}"))
    assert texts(tok, viewed_row(row))[0] == "a\nc\n\nb<|im_end|>"


def test_names_before_column_mapping_are_known(tok):
    rows = [{"question": "1+1=", "answer": "2", "hint": "two"}]
    mapping = {"question": "prompt", "answer": "completion"}
    for template in ("{question} {hint}", "{prompt} {hint}"):
        (row,) = prepared(tok, rows, TeacherPrompts(prompt=template), column_mapping=mapping)
        assert texts(tok, viewed_row(row))[0] == "1+1= two2<|im_end|>"
    (row,) = prepared(tok, rows, TeacherPrompts(), column_mapping={**mapping, "hint": "privileged_context"})
    assert texts(tok, viewed_row(row))[0] == "two\n\n1+1=2<|im_end|>"


def test_the_teachers_own_chat_template(tok, make_tokenizer):
    other = make_tokenizer(template="{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}>")
    (row,) = prepared(tok, [{"messages": CHAT}], TeacherPrompts("S", tokenizer=other))
    assert texts(tok, viewed_row(row))[0] == "[system] S [user] Two? >2<|im_end|>"


def test_token_ids_of_the_teachers_own(tok):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "other": [1, 2, 3]}]
    (row,) = prepared(tok, rows, TeacherPrompts(prompt="other"))
    assert viewed_row(row)["input_ids"] == [1, 2, 3, 7, 8] and viewed_row(row)["labels"] == [-100] * 3 + [7, 8]


def test_columns_of_classes_are_read_by_name(tok):
    """Else a teacher would read the number of a class, which is what such a column holds."""
    rows = [{"prompt": "Q", "completion": "A", "kind": kind} for kind in ("sum", None)]
    classes = Features(
        {"prompt": Value("string"), "completion": Value("string"), "kind": ClassLabel(names=["-", "sum"])}
    )
    dataset = Dataset.from_list(rows, features=classes)
    for data in (dataset, dataset.to_iterable_dataset()):
        view, other = prepare_dataset(
            data, tok, max_length=99, teacher_prompts=TeacherPrompts(prompt="{kind}:{prompt}")
        )
        assert (
            texts(tok, viewed_row(view))[0] == "sum:QA<|im_end|>"
            and viewed_row(other)["input_ids"] == other["input_ids"]
        )
    routed = prepare_dataset(dataset.select([0]), tok, max_length=99, teachers=["sum", "-"], teacher_column="kind")
    assert routed["teacher_index"][:] == [0]
    pairs = dataset.rename_column("completion", "chosen").add_column("rejected", ["B", "B"])
    (row, _) = prepare_pairs(pairs, tok, max_length=99, teacher_prompts=TeacherPrompts(prompt="{kind}:{prompt}"))
    assert tok.decode(row["teacher_prompt_ids"]) == "sum:Q"


def test_what_a_table_adds_to_messages_is_not_read_by_the_teacher_either(make_tokenizer):
    """Arrow gives all calls of a column the same arguments, null where there were none."""
    call = lambda name: {"type": "function", "function": {"name": "f", "arguments": {name: 1}}}  # noqa: E731
    said = lambda name: [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call(name)]}]  # noqa: E731
    rows = [{"prompt": "Q", "completion": "A", "h": said(name)} for name in "ab"]
    shown = "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
    tok = make_tokenizer(template=f"{{% for m in messages %}}{shown}{{% endfor %}}")
    data = Dataset.from_list(rows)
    assert data[0]["h"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    found = [tok.decode(row["teacher_prompt_ids"]) for row in prepared(tok, rows, TeacherPrompts(prompt="h"))]
    calls = [json.loads(text.removeprefix("Two?"))[0]["function"] for text in found]
    assert [of_row["arguments"] for of_row in calls] == [{"a": 1}, {"b": 1}]


def test_a_context_that_the_first_row_of_a_stream_lacks_is_told(tok):
    layouts = {
        prepare_dataset: {"prompt": "Q", "completion": "A"},
        prepare_pairs: {"prompt": "Q", "chosen": "A", "rejected": "B"},
    }
    for prepare, plain in layouts.items():
        rows = [plain, {**plain, "privileged_context": "C"}]
        run = partial(prepare, tokenizer=tok, max_length=99, teacher_prompts=TeacherPrompts())
        found = list(run(IterableDataset.from_generator(lambda rows=rows: iter(rows[::-1]))))
        assert [tok.decode(row["teacher_prompt_ids"]) for row in found] == ["C\n\nQ", "Q"]
        with pytest.raises(
            DatasetError, match="Row 1 of dataset 'train'.*which the first row lacks.*null where it has"
        ):
            list(run(IterableDataset.from_generator(lambda rows=rows: iter(rows))))


def test_nothing_is_asked_for(tok):
    assert "view_start" not in prepared(tok, [{"messages": CHAT}], TeacherPrompts()).column_names


def test_both_responses_of_a_pair_follow_the_teachers_prompt(tok):
    rows = [{"prompt": "Q ", "chosen": "right", "rejected": "no", "privileged_context": "C"}]
    (row,) = prepare_pairs(Dataset.from_list(rows), tok, max_length=30, teacher_prompts=TeacherPrompts())
    assert tok.decode(row["teacher_prompt_ids"]) == "C\n\nQ " and row["view_start"] == row["prompt_length"] == 2
    assert row["teacher_length"] == len("C\n\nQ right") + 1 - 1  # two newlines are one token


def test_pairs_without_context_are_counted_too(tok, caplog):
    pairs = [{"prompt": "Q", "chosen": "A", "rejected": "B", "h": text} for text in ("x", None, "")]
    run = partial(prepare_pairs, tokenizer=tok, max_length=30, teacher_prompts=TeacherPrompts(prompt="{h}{prompt}"))
    assert "lacks" not in run(Dataset.from_list(pairs)).column_names
    assert "3 rows: 2 have nothing in 'h'" in caplog.text
    with pytest.raises(NoUsableRowsError, match="2 rows in dataset 'train', of which 2 have nothing in 'h'"):
        run(Dataset.from_list(pairs[1:]))


# ---- Too long, or not to be had -------------------------------------------------------------------------------------


def test_a_row_too_long_for_the_teacher_is_refused_or_counted(tok, caplog):
    rows = [{"prompt": "1+1=", "completion": "2", "h": "x" * length} for length in (1, 30)]
    limited = TeacherPrompts(prompt="{h}{prompt}", max_length=20)
    with pytest.raises(
        DatasetError, match=r"Row 1 of dataset 'train': The teacher would read 36 tokens \(34 of its own"
    ):
        prepared(tok, rows, limited)
    with pytest.raises(DatasetError, match="leaves no room for a completion"):
        prepared(tok, rows[1:], limited)
    dropping = TeacherPrompts(prompt="{h}{prompt}", max_length=20, drops_long=True)
    assert len(prepared(tok, rows, dropping)) == 1
    assert "1 rows dropped (1 teacher's row longer than teacher_max_length=20; the first is row 1)" in caplog.text
    with pytest.raises(NoUsableRowsError, match="longer than teacher_max_length"):
        prepared(tok, rows[1:], dropping)
    # With completions to come the row is as long as it may become.
    with pytest.raises(DatasetError, match="Row 0 .* would read 25 tokens"):
        prepared(tok, rows[:1], limited, max_new_tokens=20, needs="prompt")


def test_a_pair_too_long_for_the_teacher(tok, caplog):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "h": "x" * length} for length in (1, 30)]
    limited = {"prompt": "{h}{prompt}", "max_length": 20}
    with pytest.raises(DatasetError, match="Row 1 of dataset 'train': The teacher would read 33 tokens"):
        prepare_pairs(Dataset.from_list(rows), tok, max_length=9, teacher_prompts=TeacherPrompts(**limited))
    dropping = TeacherPrompts(**limited, drops_long=True)
    assert len(prepare_pairs(Dataset.from_list(rows), tok, max_length=9, teacher_prompts=dropping)) == 1
    assert "1 × teacher's row longer than teacher_max_length" in caplog.text


@pytest.mark.parametrize(
    ("row", "prompts", "error", "message"),
    [
        ({"messages": CHAT}, {"prompt": "hint"}, ConfigurationError, "no column hint; expected a column's name, or a"),
        ({"messages": CHAT}, {"prompt": "{prompt} {hint}"}, ConfigurationError, "dataset 'train' has no column hint"),
        ({"messages": CHAT}, {"prompt": "prompt"}, ConfigurationError, "no column prompt"),
        ({"messages": CHAT}, {"prompt": "{prompt"}, ConfigurationError, "which is no template"),
        ({"messages": CHAT}, {"prompt": "{}"}, ConfigurationError, "names no column"),
        ({"messages": CHAT}, {"prompt": "{prompt!r}"}, ConfigurationError, "names no column"),
        ({"messages": CHAT}, {"prompt": "{prompt.__class__}"}, ConfigurationError, "no column prompt.__class__"),
        (
            {"messages": CHAT, "privileged_context": "c", "h": "x"},
            {"prompt": "{h}{prompt}"},
            DatasetError,
            "no place for it. Put {privileged_context} into the template",
        ),
        ({"messages": CHAT}, {"max_length": 2}, ConfigurationError, "`teacher_max_length: 2`, but of dataset 'train'"),
        ({"text": "a"}, {"system": "S"}, ConfigurationError, "plain text, which has no prompt"),
        ({"input_ids": [1, 2]}, {"system": "S"}, ConfigurationError, "holds token ids"),
        ({"input_ids": [1, 2], "h": "x"}, {"prompt": "h"}, DatasetError, "expected a list of token ids"),
        (
            {"input_ids": [1, 2], "h": [1, 999]},
            {"prompt": "h"},
            DatasetError,
            "Row 0 .*token id 999; expected ids from 0",
        ),
        ({"input_ids": [1, 2], "h": [-1]}, {"prompt": "h"}, DatasetError, "Row 0 .*token id -1; expected ids from 0"),
        (
            {"messages": CHAT},
            {"system": "S", "why_not": "it cannot be"},
            ConfigurationError,
            "where it cannot be. Leave",
        ),
        ({"messages": CHAT, "h": [1]}, {"prompt": "{h}"}, DatasetError, "Row 0 .*'h' holds list"),
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "a"}], "h": "x"},
            {"prompt": "h"},
            DatasetError,
            "there is no user's message",
        ),
    ],
)
def test_views_that_cannot_be_had(tok, row, prompts, error, message):
    with pytest.raises(error, match=message.replace("{", r"\{").replace("}", r"\}")):
        prepared(tok, [row], TeacherPrompts(**prompts), needs="either")


def test_a_template_that_takes_no_system_prompt(make_tokenizer):
    strict = make_tokenizer(
        template="{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}|{% endfor %}"
    )
    with pytest.raises(DatasetError, match="Row 0 .*The teacher's prompt cannot be rendered: .*no system"):
        prepared(strict, [{"messages": CHAT}], TeacherPrompts("S"))


def test_templates_are_names_in_braces():
    assert names_in("{a}, {b c}: {{x}}") == {"a", "b c"}
    assert filled("{a}{{{a}}}", {"a": "{b}"}) == "{b}{{b}}"
    assert renamed("{{{a}}} {b}", {"a": "x"}) == "{{{x}}} {b}" and renamed("a", {"a": "x"}) == "x"


# ---- Batches --------------------------------------------------------------------------------------------------------


def test_the_teachers_batch_is_each_row_by_itself():
    """Whatever the padding, the teacher's rows are prompt and shared tokens, and predict the very same tokens."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    ids_of = lambda n: torch.randint(1, 90, (n,), generator=generator).tolist()  # noqa: E731
    for multiple in (None, 8):
        rows = []
        for _ in range(7):
            prompt, answer, start = ids_of(draw(1, 6)), ids_of(draw(0, 5)), 0
            start = draw(0, len(prompt) + 1)
            labels = [-100] * len(prompt) + [t if draw(0, 4) else -100 for t in answer]
            rows.append({"input_ids": prompt + answer, "labels": labels, "prompt_length": len(prompt)})
            rows[-1] |= {"teacher_prompt_ids": ids_of(draw(1, 9)), "view_start": start}
        batch = DistillCollator(0, multiple, with_prompts=True)(rows)
        for case in (batch, replace_completions(batch, [ids_of(draw(0, 5)) for _ in rows], 0)):
            predicts = trained_mask(case["labels"])
            inputs, viewed = teacher_inputs(case, predicts)
            assert torch.equal(inputs["input_ids"][:, 1:][viewed], case["input_ids"][:, 1:][predicts])
            for b, row in enumerate(rows):
                length = int(case["attention_mask"][b].sum())
                own = row["teacher_prompt_ids"] + case["input_ids"][b, row["view_start"] : length].tolist()
                assert inputs["input_ids"][b][inputs["attention_mask"][b].bool()].tolist() == own
                assert viewed[b].sum() == predicts[b].sum()


def test_trained_tokens_that_the_teacher_does_not_share_are_refused():
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "prompt_length": 1}
    batch = DistillCollator(0)([{**row, "teacher_prompt_ids": [4], "view_start": 2}])
    with pytest.raises(DatasetError, match="2 trained tokens, of which the teacher's view holds 1"):
        teacher_inputs(batch, trained_mask(batch["labels"]))
    with pytest.raises(DatasetError, match="2 rows of which 1 have a teacher's prompt"):
        DistillCollator(0)([row, {**row, "teacher_prompt_ids": [4], "view_start": 1}])
