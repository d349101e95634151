"""Runs with other data collators, and with a padding token that the teacher does not know, equal those without."""

import pytest
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_dataset, character_tokenizer

RUN = {"max_steps": 2, "gradient_accumulation_steps": 2}


def eos_is_pad():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def left():
    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


COLLATORS = {
    "seq2seq": DataCollatorForSeq2Seq(left()),
    "language modelling": DataCollatorForLanguageModeling(eos_is_pad(), mlm=False),
    "with padding": DataCollatorWithPadding(character_tokenizer()),
    "TRL": TRLCollator(0),
    "TRL, positions": TRLCollator(0, return_position_ids=True),
    "TRL, flat": TRLCollator(0, padding_free=True),
    "flattening": DataCollatorWithFlattening(),
}
OWN = {}  # by `lmbda`, what a run with the collator of its own said
SAMPLING = ["seq2seq", "language modelling", "with padding", "TRL", "TRL, positions"]


def gpt2(seed):
    """Absolute positions: padding on the left would move every token."""
    set_seed(seed)
    sizes = {"vocab_size": 14, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=1, eos_token_id=1, pad_token_id=0))


def run(make_trainer, by_step, **settings):
    data = addition_dataset(6, seed=3)
    trainer = make_trainer(student=gpt2(1), teacher=gpt2(2), eval_dataset=data, **RUN, **settings)
    trainer.train()
    return [*by_step(trainer).values(), *by_step(trainer, "trained_tokens").values(), *trainer.evaluate().values()][:7]


@pytest.mark.parametrize(("name", "lmbda"), [*((name, 0.0) for name in COLLATORS), *((name, 1.0) for name in SAMPLING)])
def test_a_run_is_that_of_the_own_collator(make_trainer, by_step, name, lmbda):
    if lmbda not in OWN:
        OWN[lmbda] = run(make_trainer, by_step, lmbda=lmbda)
    expected = OWN[lmbda]
    found = run(make_trainer, by_step, lmbda=lmbda, data_collator=COLLATORS[name])
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 7


@pytest.mark.parametrize("method", ["dpkd", "rationale"])
def test_methods_whose_rows_are_more_than_a_text_refuse_others(make_trainer, method):
    with pytest.raises(ConfigurationError, match="DataCollatorForSeq2Seq; expected none, or a .*Collator"):
        make_trainer(method=method, data_collator=COLLATORS["seq2seq"])


@pytest.mark.parametrize("method", ["minillm", "gkd"])
def test_methods_that_sample_take_them(make_trainer, by_step, method):
    first = make_trainer(method=method, max_steps=1)
    second = make_trainer(method=method, max_steps=1, data_collator=COLLATORS["seq2seq"])
    for trainer in (first, second):
        trainer.train()
    assert by_step(second) == pytest.approx(by_step(first), rel=1e-4)


# ---- A padding token that only the student knows (M5) ----------------------------------------------------------------


def padded_otherwise():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    assert tokenizer.pad_token_id == 14
    return tokenizer


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.0},
        {"lmbda": 0.0, "data_collator": DataCollatorForSeq2Seq(padded_otherwise())},
        {"lmbda": 0.0, "packing": True},
        {"lmbda": 1.0},
        {"lmbda": 1.0, "rollout_engine": "hf"},
        {"lmbda": 0.0, "seq_kd": True, "rollout_engine": "hf"},
        {"method": "minillm", "teacher_mix_alpha": 0.2},
        {"method": "dpkd"},
    ],
)
def test_the_padding_token_makes_no_difference(make_trainer, make_student, make_teacher, by_step, settings):
    """The same student pads with a token of row 14, which the teacher lacks, or with one that both know."""
    runs = []
    for tokenizer in (character_tokenizer(), padded_otherwise()):
        student = make_student(vocab_size=15, pad_token_id=tokenizer.pad_token_id)
        known = {"teacher_processing_class": character_tokenizer(), "tok": tokenizer}
        if "data_collator" in settings and tokenizer.pad_token_id != 14:
            known["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
        student.model.embed_tokens.padding_idx = None  # whose gradient is none
        with_weights = make_student(vocab_size=15)
        student.load_state_dict(with_weights.state_dict())
        trainer = make_trainer(student=student, teacher=make_teacher(), max_steps=2, **{**settings, **known})
        assert trainer.vocab_size == 14
        trainer.train()
        runs.append(by_step(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4) and len(runs[0]) == 2


def test_the_padding_token_in_a_text_is_refused(make_trainer, make_student, make_teacher):
    rows = Dataset.from_list([{"prompt": "1+1=", "completion": "<fill>2"}] * 8)
    trainer = make_trainer(
        student=make_student(vocab_size=15),
        teacher=make_teacher(),
        train=rows,
        lmbda=0.0,
        tok=padded_otherwise(),
        teacher_processing_class=character_tokenizer(),
    )
    with pytest.raises(DatasetError, match="expected ids from 0 to 13, which both models know"):
        trainer.train()
