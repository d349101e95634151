"""Rows to tokens: what is trained, where the prompt ends, how completions end, and how rows are cut."""

import re

import pytest

from distill_trainers.data.rows import tokenize_row, truncate
from distill_trainers.exceptions import DatasetError

# A template that, like Gemma's, ends turns with a special token that is not the EOS.
FOREIGN_END = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_END = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Only the last turn keeps its mark, as with templates that drop the thinking of earlier turns.
REWRITES_HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought that the finished answer does not have.
OPENS_THOUGHT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_TURNS = [user("a"), assistant("bc"), user("d"), assistant("ef")]


def parts(row, tokenizer):
    """Prompt text, completion text, and the trained stretches of the row."""
    ids, labels, prompt_length = row["input_ids"], row["labels"], row["prompt_length"]
    assert len(ids) == len(labels) and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    trained = "".join("~" if label == -100 else tokenizer.decode([label]) for label in labels)
    stretches = [stretch for stretch in trained.split("~") if stretch]
    return tokenizer.decode(ids[:prompt_length]), tokenizer.decode(ids[prompt_length:]), stretches


def test_standard_prompt_completion_gets_eos_though_it_is_the_padding(tokenizer):
    row = tokenize_row({"prompt": "q?", "completion": "yes"}, tokenizer, dataset_type="prompt_completion")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert parts(row, tokenizer) == ("q?", "yes<|im_end|>", ["yes<|im_end|>"])
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id


def test_eos_is_not_doubled(tokenizer):
    row = tokenize_row({"prompt": "q", "completion": "a<|im_end|>"}, tokenizer, dataset_type="prompt_completion")
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_bos_belongs_to_the_prompt_alone(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    row = tokenize_row({"prompt": "q", "completion": "a"}, tokenizer, dataset_type="prompt_completion")
    assert parts(row, tokenizer)[:2] == ("<bos>q", "a<|im_end|>")


def test_prompts_alone_train_nothing(tokenizer):
    row = tokenize_row({"prompt": "why"}, tokenizer, dataset_type="prompt")
    assert parts(row, tokenizer) == ("why", "", [])
    row = tokenize_row({"prompt": [user("why")]}, tokenizer, dataset_type="prompt")
    assert parts(row, tokenizer) == ("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n", "", [])


def test_a_begun_answer_is_continued(tokenizer):
    row = tokenize_row({"prompt": [user("q"), assistant("It is")]}, tokenizer, dataset_type="prompt")
    assert parts(row, tokenizer)[0].endswith("<|im_start|>assistant\nIt is")


def test_text_is_trained_whole(tokenizer):
    row = tokenize_row({"text": "once"}, tokenizer, dataset_type="text")
    assert parts(row, tokenizer) == ("", "once<|im_end|>", ["once<|im_end|>"])


@pytest.mark.parametrize("completion", [[assistant("yes")], "yes"])
def test_conversational_completion_ends_at_its_end_of_turn(tokenizer, completion):
    row = tokenize_row({"prompt": [user("q")], "completion": completion}, tokenizer, dataset_type="prompt_completion")
    prompt, answer, trained = parts(row, tokenizer)
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "yes<|im_end|>" and trained == [answer]
    alone = tokenize_row({"prompt": [user("q")]}, tokenizer, dataset_type="prompt")
    assert row["input_ids"][: row["prompt_length"]] == alone["input_ids"]


def test_a_token_across_the_border_does_not_change_the_prompt(tokenizer):
    row = tokenize_row({"messages": [user("q"), assistant("\nyes")]}, tokenizer, dataset_type="messages")
    prompt, answer, _ = parts(row, tokenizer)
    assert prompt.endswith("assistant\n") and answer == "\nyes<|im_end|>"


def test_a_foreign_end_of_turn_stays_last(make_tokenizer):
    tokenizer = make_tokenizer(template=FOREIGN_END)
    row = tokenize_row({"messages": [user("q"), assistant("yes")]}, tokenizer, dataset_type="messages")
    assert parts(row, tokenizer)[1] == "yes<end_of_turn>"


def test_a_template_without_end_of_turn_gets_eos(make_tokenizer):
    tokenizer = make_tokenizer(template=NO_END)
    row = tokenize_row({"messages": [user("q"), assistant("yes")]}, tokenizer, dataset_type="messages")
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_messages_train_the_last_answer(tokenizer):
    for key in ("messages", "conversations"):
        row = tokenize_row({key: TWO_TURNS}, tokenizer, dataset_type="messages")
        prompt, answer, trained = parts(row, tokenizer)
        assert answer == "ef<|im_end|>" and trained == [answer]
        assert prompt.endswith("d<|im_end|>\n<|im_start|>assistant\n")


def test_turns_after_the_last_answer_are_left_out(tokenizer):
    row = tokenize_row({"messages": [*TWO_TURNS, user("thanks")]}, tokenizer, dataset_type="messages")
    assert parts(row, tokenizer)[1] == "ef<|im_end|>"


def test_messages_without_an_answer_are_a_prompt(tokenizer):
    row = tokenize_row({"messages": [user("q")]}, tokenizer, dataset_type="messages")
    assert row["prompt_length"] == len(row["input_ids"]) > 0


@pytest.mark.parametrize("template", [None, MARKED])
def test_every_answer_is_trained_where_asked(tokenizer, make_tokenizer, template):
    tokenizer = tokenizer if template is None else make_tokenizer(template=template)
    row = tokenize_row({"messages": TWO_TURNS}, tokenizer, dataset_type="messages", assistant_only_loss=True)
    last = tokenize_row({"messages": TWO_TURNS}, tokenizer, dataset_type="messages")
    assert parts(row, tokenizer)[2] == ["bc<|im_end|>", "ef<|im_end|>"]
    assert (row["input_ids"], row["prompt_length"]) == (last["input_ids"], last["prompt_length"])


def test_two_answers_in_a_row_are_two_turns(tokenizer):
    messages = [user("a"), assistant("b"), assistant("c")]
    row = tokenize_row({"messages": messages}, tokenizer, dataset_type="messages", assistant_only_loss=True)
    assert parts(row, tokenizer)[2] == ["b<|im_end|>", "c<|im_end|>"]


def test_trl_marks_the_turns_of_templates_that_it_knows(make_tokenizer):
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = make_tokenizer(template=qwen3_chat_template)
    row = tokenize_row({"messages": TWO_TURNS}, tokenizer, dataset_type="messages", assistant_only_loss=True)
    first, last = parts(row, tokenizer)[2]
    assert first.endswith("bc<|im_end|>") and last.endswith("ef<|im_end|>")


def test_unmarked_rewritten_history_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(template=REWRITES_HISTORY)
    tokenize_row({"messages": TWO_TURNS}, tokenizer, dataset_type="messages")
    with pytest.raises(DatasetError, match="cannot locate assistant turn 1.*assistant_only_loss to false"):
        tokenize_row({"messages": TWO_TURNS}, tokenizer, dataset_type="messages", assistant_only_loss=True)


def test_a_prompt_that_the_answer_changes_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(template=OPENS_THOUGHT)
    with pytest.raises(DatasetError, match="renders the prompt differently.*begin the answers with their thinking"):
        tokenize_row({"messages": [user("q"), assistant("a")]}, tokenizer, dataset_type="messages")


def test_what_tools_say_inside_a_completion_is_not_trained(tokenizer):
    completion = [assistant("call"), {"role": "tool", "content": "42"}, assistant("so 42")]
    row = tokenize_row({"prompt": [user("q")], "completion": completion}, tokenizer, dataset_type="prompt_completion")
    assert parts(row, tokenizer)[2] == ["call<|im_end|>", "so 42<|im_end|>"]


def test_template_settings_of_the_row_come_first(make_tokenizer):
    tokenizer = make_tokenizer(template="{{ mood }}{{ tools[0].name }}:{{ messages[0]['content'] }}")
    row = {"prompt": [user("q")], "chat_template_kwargs": {"mood": "row"}, "tools": '[{"name": "f"}]'}
    ids = tokenize_row(row, tokenizer, dataset_type="prompt", chat_template_kwargs={"mood": "given"})["input_ids"]
    assert tokenizer.decode(ids) == "rowf:q"


def test_conversations_need_a_template(make_tokenizer):
    with pytest.raises(DatasetError, match="no chat template"):
        tokenize_row({"prompt": [user("q")]}, make_tokenizer(template=None), dataset_type="prompt")


def test_refusals_of_the_template_are_passed_on(make_tokenizer):
    tokenizer = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DatasetError, match=r"\['user'\]: roles must alternate"):
        tokenize_row({"prompt": [user("q")]}, tokenizer, dataset_type="prompt")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": " "},
        {"prompt": "q", "completion": None},
        {"prompt": [user("q")], "completion": []},
        {"prompt": [user("q")], "completion": [assistant("")]},
    ],
)
def test_empty_completions_leave_a_prompt(tokenizer, row):
    tokenized = tokenize_row(row, tokenizer, dataset_type="prompt_completion")
    assert tokenized["prompt_length"] == len(tokenized["input_ids"]) > 0
    assert set(tokenized["labels"]) == {-100}


@pytest.mark.parametrize(
    ("row", "mask", "prompt_length"),
    [
        ({"input_ids": [5, 6, 7]}, [1, 1, 1], 0),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [0, 1, 1], 1),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, [0, 0, 1], 2),
        ({"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 0, 0, 1]}, [0, 1, 0, 0, 1], 4),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}, [0, 0, 0], 3),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "prompt_length": 0}, [0, 1, 1], 0),
        ({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]}, [0, 1, 1], 1),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]}, [0, 0, 1], 2),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "labels": [5, 6, -100]}, [0, 1, 0], 1),
    ],
)
def test_tokenised_rows_keep_their_masks(tokenizer, row, mask, prompt_length):
    tokenized = tokenize_row(row, tokenizer, dataset_type="tokenized")
    labels = [token if on else -100 for token, on in zip(row["input_ids"], mask, strict=True)]
    assert (tokenized["labels"], tokenized["prompt_length"]) == (labels, prompt_length)
    assert tokenized["input_ids"] == row["input_ids"]


def test_padding_of_tokenised_rows_is_taken_off_by_its_mask(tokenizer):
    row = {"input_ids": [0, 5, 0, -100], "attention_mask": [0, 1, 1, 0], "labels": [-100, -100, 0, -100]}
    tokenized = tokenize_row(row, tokenizer, dataset_type="tokenized")
    assert tokenized == {"input_ids": [5, 0], "labels": [-100, 0], "prompt_length": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6], "labels": [6, -100]}, "unshifted"),
        ({"input_ids": [5, 6], "loss_mask": [1]}, "2 input_ids but 1"),
        ({"input_ids": [5, -100]}, "ids from -100 to 5; expected 0 to 260"),
        ({"input_ids": [5, 261]}, "ids from 5 to 261; expected 0 to 260"),
        ({"input_ids": [5, 6], "loss_mask": [1], "completion_mask": [0, 1]}, "masks of \\[1, 2\\] values"),
        ({"input_ids": [5, 6], "prompt_length": 3}, "prompt_length is 3"),
    ],
)
def test_tokenised_rows_that_contradict_themselves_are_refused(tokenizer, row, message):
    with pytest.raises(DatasetError, match=message):
        tokenize_row(row, tokenizer, dataset_type="tokenized")


def test_values_of_the_wrong_kind_are_refused(tokenizer):
    with pytest.raises(DatasetError, match="'prompt' holds int"):
        tokenize_row({"prompt": 3, "completion": "a"}, tokenizer, dataset_type="prompt_completion")


def make_row(prompt_length, completion_length):
    """Prompt ids 0, 1, …; completion ids 100, 101, …"""
    return {
        "input_ids": [*range(prompt_length), *range(100, 100 + completion_length)],
        "labels": [-100] * prompt_length + [*range(100, 100 + completion_length)],
        "prompt_length": prompt_length,
    }


@pytest.mark.parametrize(
    ("prompt", "completion", "reserve", "kept_prompt", "kept_completion"),
    [
        (4, 4, 0, 4, 4),  # fits
        (20, 3, 0, 7, 3),  # the prompt makes room for the whole completion
        (20, 20, 0, 5, 5),  # both are long: half each
        (2, 20, 0, 2, 8),  # a short prompt stays whole
        (20, 1, 0, 9, 1),
        (0, 20, 0, 0, 10),  # text is cut at its end
        (20, 0, 0, 10, 0),  # a prompt alone
        (20, 0, 4, 6, 0),  # a prompt alone, with room for a rollout
        (9, 1, 4, 6, 1),  # a rollout from this prompt has to fit, too
    ],
)
def test_cuts(prompt, completion, reserve, kept_prompt, kept_completion):
    cut = truncate(make_row(prompt, completion), 10, reserve)
    ids = cut["input_ids"]
    assert ids == [*range(prompt - kept_prompt, prompt), *range(100, 100 + kept_completion)]
    assert cut["prompt_length"] == kept_prompt
    assert cut["labels"] == [-100] * kept_prompt + [*range(100, 100 + kept_completion)]


def test_bos_survives_the_cut():
    cut = truncate(make_row(20, 3), 10, bos_token_id=0)
    assert cut["input_ids"] == [0, *range(14, 20), 100, 101, 102] and cut["prompt_length"] == 7


def test_no_length_no_cut():
    row = make_row(20, 3)
    assert truncate(row, None) is row


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss_mask": 5}, "loss_mask is 5; expected a list"),
        ({"loss_mask": [0, 7, 1]}, "loss_mask has 7"),
        ({"loss_mask": [0.5, 1.0, 1.0]}, "loss_mask has 0.5"),
        ({"loss_mask": [0, 1]}, "3 input_ids but 2 mask values"),
        ({"labels": 5}, "labels are 5; expected a list"),
        ({"attention_mask": 5}, "attention_mask is 5"),
        ({"attention_mask": ["1", "0", "1"]}, "attention_mask has '1'"),  # the text 0 is true to Python
        ({"attention_mask": [1, 2, 2]}, "attention_mask has 2"),
        ({"prompt_length": "1"}, "prompt_length is '1'"),
        ({"prompt_length": 1.5}, "prompt_length is 1.5"),
        ({"prompt_length": -1}, "prompt_length is -1"),
        ({"input_ids": [1, 2, 10**6]}, "ids from 1 to 1000000"),
        ({"input_ids": [1, -1, 2]}, "ids from -1 to 2"),
    ],
)
def test_tokens_and_masks_that_are_none(make_tokenizer, changes, told):
    row = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], **changes}
    with pytest.raises(DatasetError, match=re.escape(told)):
        tokenize_row(row, make_tokenizer(), dataset_type="tokenized")
