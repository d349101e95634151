"""What a teacher with a tokenizer of its own reads of a row: its own form, special tokens by role, all its bytes."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_trainers.data.other_tokenizer import OtherTokenizer
from distill_trainers.data.views import ALIGNED_ENTRIES
from distill_trainers.toy import tiny_llama

# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_each_reads_a_conversation_in_its_own_form(make_tokenizer, make_trainer):
    """Prompt, completion and end of turn: each by its own template; nothing of the student's markers is text."""
    student, teacher = make_tokenizer(), make_tokenizer(
        bos=True,
        template="{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )  # fmt: skip
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "Hé\n\n"}, {"role": "assistant", "content": "Ja é"}]}] * 4
    )
    trainer = make_trainer(
        tiny_llama(student, 32, 2), tiny_llama(teacher, 32, 2), rows, tok=student, max_length=60,
        teacher_tokenizer="own", teacher_processing_class=teacher, lmbda=0.0,
    )  # fmt: skip
    row = trainer.train_dataset[0]
    assert teacher.decode(row["teacher_prompt_ids"]) == "<bos>[user]Hé\n\n<end_of_turn>[assistant]"
    assert teacher.decode(row["teacher_completion_ids"]) == "Ja é<end_of_turn>"
    batch = trainer.data_collator([row])
    assert batch["token_chunk"][0, row["view_start"] :].tolist() == [1, 2, 3, 4, 5, 6]
    trainer.train()


# ---- Special tokens have roles ---------------------------------------------------------------------------------------

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def of_roles(make_tokenizer):
    """A student that ends all text with `<|im_end|>`, and a teacher with BOS that ends a turn otherwise than a text."""
    student, teacher = make_tokenizer(), make_tokenizer(bos=True, template=TURNS)
    teacher.eos_token = "<|im_start|>"
    return student, teacher


CHATS = "<|im_start|>assistant\n", "<bos>[user]a<end_of_turn>[assistant]"


@pytest.mark.parametrize(
    ("prompts", "written", "read", "comparable"),
    [
        (("a", "a"), "b<|im_end|>", "b<|im_start|>", [1, 1]),  # the end of a text, whatever its name
        (CHATS, "b<|im_end|>", "b<end_of_turn>", [1, 1]),  # of a turn, where that is no EOS
        (CHATS, "b", "b", [0]),  # it may go on
        (CHATS, "b<end_of_turn>", "b<end_of_turn>", [1, 0]),  # another EOS of the student's: its text has ended
        (CHATS, "b<bos>c<|im_end|>", "bc<end_of_turn>", [1, 0, 1, 1]),  # BOS is no text, and nothing that is read
        (CHATS, "<bos>b", "b", [0, 0]),
        (CHATS, "<|im_end|>", "<end_of_turn>", [1]),
    ],
)
def test_special_tokens_are_read_by_their_role(of_roles, prompts, written, read, comparable):
    student, teacher = of_roles
    spell = lambda tok, text: tok(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    other = OtherTokenizer.of(student, teacher).ended_by(student=spell(student, "<|im_end|><end_of_turn>b"))
    asked, prompt = spell(student, prompts[0]), spell(teacher, prompts[1])
    own = spell(student, written)
    assert teacher.decode(other.completion(own, prompt, asked)) == read
    row = {"input_ids": asked + own, "labels": [-100] * len(asked) + own}
    batch = {name: torch.tensor([ids]) for name, ids in row.items()} | {"view_start": torch.tensor([len(asked)])}
    batch |= {"teacher_prompt_ids": torch.tensor([prompt]), "teacher_prompt_mask": torch.ones(1, len(prompt))}
    found = other.added_to(batch)
    assert found["token_comparable"][0, len(asked) :].tolist() == comparable
    if written.endswith(">"):  # an end stands beside an end
        assert found["token_chunk"][0, -1] == found["teacher_chunk"][0, -1] > 0


def test_any_eos_of_the_generation_config_ends_a_text(of_roles, make_trainer, batch_of, monkeypatch):
    """Of a student that samples, and of a teacher that writes; the end of a text is one event of the next byte."""
    student, teacher = of_roles
    models = [tiny_llama(tok, 32, 2) for tok in of_roles]
    models[0].generation_config.eos_token_id = student.convert_tokens_to_ids(["<|im_end|>", "<end_of_turn>"])
    models[1].generation_config.eos_token_id = teacher.convert_tokens_to_ids(["<end_of_turn>", "<|im_end|>"])
    ids = lambda tok, text: tok(text, add_special_tokens=False)["input_ids"]  # noqa: E731

    def written(prompts, *args, **kwargs):
        return dict.fromkeys(prompts, ids(teacher, "no<|im_end|>"))

    monkeypatch.setattr("distill_trainers.trainers.lifecycle.completions.complete_prompts", written)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 4)
    run = {"tok": student, "teacher_tokenizer": "own", "teacher_processing_class": teacher, "seq_kd": True}
    trainer = make_trainer(*models, rows, **run, lmbda=0.5)
    trainer.get_train_dataloader()
    assert student.decode(trainer.train_dataset[0]["input_ids"]) == "ano<|im_end|>"
    batch = batch_of(trainer, [0])
    for name in ("input_ids", "labels"):
        batch[name][0, -1] = student.convert_tokens_to_ids("<end_of_turn>")
    kept = {name: entry for name, entry in batch.items() if name not in ALIGNED_ENTRIES}
    found = trainer.two_models.completed(kept)
    assert teacher.decode(found["teacher_completion_ids"][0]) == "no<|im_start|>"
    ends = [side.tokens.first_bytes().tolist().count(256) for side in (vars(trainer.two_models.other).values())]
    assert ends == [1, 2]  # the same in caches and on servers, which know no generation config


def test_text_that_is_cut_within_a_character_is_counted(make_tokenizer, make_trainer, batch_of, by_step):
    tokenizer = make_tokenizer()
    rows = Dataset.from_list([{"prompt": "a", "completion": "bé"}] * 4)  # of two bytes, two tokens here
    run = {"tok": tokenizer, "teacher_tokenizer": "own", "teacher_processing_class": make_tokenizer(), "lmbda": 0.0}
    for length, cut, text in ((4, 0, "bé"), (3, 1, "b")):
        trainer = make_trainer(
            tiny_llama(tokenizer, 32, 2), tiny_llama(tokenizer, 32, 2), rows, **run, max_length=length
        )
        batch = batch_of(trainer, [0])
        assert batch["token_cut"].sum() == cut
        assert tokenizer.decode(batch["teacher_completion_ids"][0]) == text
        # The text may go on: what it ends with has no likelihood of its own.
        assert batch["token_comparable"][0, -1] == 0
        trainer.train()
        assert set(by_step(trainer, "cut_characters").values()) == {4.0 * cut}


def test_bytes_that_are_no_text_are_read_all_the_same(make_tokenizer, make_trainer, by_step):
    """A student of random weights writes bytes at random, which the teacher reads as characters that stand for none."""
    tokenizer = make_tokenizer()
    models = (tiny_llama(tokenizer, 32, 2, seed=seed, initializer_range=0.02) for seed in (1, 2))
    run = {"tok": tokenizer, "teacher_tokenizer": "own", "teacher_processing_class": make_tokenizer(), "lmbda": 1.0}
    trainer = make_trainer(*models, Dataset.from_list([{"prompt": "a"}] * 8), **run, max_new_tokens=12)
    trainer.train()
    shares = by_step(trainer, "shared_borders").values()
    assert all(torch.tensor(list(by_step(trainer).values())).isfinite()) and all(0 < share < 1 for share in shares)


# ---- Spaces ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spaced():
    """SentencePiece's way to begin a text with a space, in a few letters."""
    symbols = ["▁", *"ab[]IUNST/\n"]
    backend = Tokenizer(
        models.BPE({s: i for i, s in enumerate([*symbols, "<unk>", "▁b"])}, [("▁", "b")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def inst_template(space):
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
        f"{{% else %}}{space}{{{{ m['content'] }}}}</s>{{% endif %}}{{% endfor %}}"
    )


def test_the_space_that_a_template_writes_before_answers_is_the_teachers(make_tokenizer, spaced):
    """As Llama 2 has it; a template that writes none, and plain text, get none."""
    teacher, student = spaced, make_tokenizer()
    for space in (" ", ""):
        teacher.chat_template = inst_template(space)
        other = OtherTokenizer.of(student, teacher)
        prompt = teacher("[INST]a[/INST]", add_special_tokens=False)["input_ids"]
        ids = other.completion(student("b", add_special_tokens=False)["input_ids"], prompt)
        assert teacher.convert_ids_to_tokens(ids) == (["▁b"] if space else ["b"])
        plain = other.completion(student("b", add_special_tokens=False)["input_ids"], prompt[:3])
        assert teacher.convert_ids_to_tokens(plain) == ["b"]


def test_a_space_behind_text_is_text_and_one_that_the_template_writes_is_not(make_tokenizer, spaced):
    """A SentencePiece student that goes on `a` with ` b` has written a space, which the teacher must read."""
    bytewise = make_tokenizer()
    ids = lambda text: spaced(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    answer = spaced.convert_tokens_to_ids(["▁b"])
    for space, read in ((" ", "b"), ("", " b")):
        spaced.chat_template = inst_template(space)
        as_student, as_teacher = OtherTokenizer.of(spaced, bytewise), OtherTokenizer.of(bytewise, spaced)
        for prompt, expected in (("", "b"), ("a", " b"), ("a</s>", "b"), ("[INST]a[/INST]", read)):
            assert bytewise.decode(as_student.completion(answer, [], ids(prompt))) == expected, prompt
            assert bytewise.decode(as_teacher.answer(answer, [], ids(prompt))) == expected, prompt
        back = as_student.answer(bytewise("b", add_special_tokens=False)["input_ids"], ids("[INST]a[/INST]"))
        assert spaced.convert_ids_to_tokens(back) == (["▁b"] if space else ["b"])
