"""A teacher that reads another prompt, through every method and place of a teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, DataCollatorWithPadding

from distill_trainers.data.views import teacher_inputs, viewed_row
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_rationales, addition_rows

HINTED = {"teacher_prompt": "{hint}{prompt}"}
HINT = "9+"


def rows(count=12, seed=0, hint=lambda i: HINT * (1 + i % 3), **more):
    """Problems of different lengths, each with a hint of its own length for the teacher."""
    return Dataset.from_list([{**row, "hint": hint(i), **more} for i, row in enumerate(addition_rows(count, seed))])


@pytest.fixture
def double(make_trainer, make_student, make_teacher):
    """A trainer of float64 models: rounding is nowhere near a fault."""

    def make(student=None, teacher="double", **settings):
        student = make_student(initializer_range=0.2).double() if student is None else student
        return make_trainer(student=student, teacher=teacher, **{"lmbda": 0.0, "divergence": "forward_kl", **settings})

    return make


def loss_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def naive(student, teacher, tokenizer, raw, ours):
    """Forward KL, a row at a time, from texts; and its gradient."""
    student = copy.deepcopy(student).train(False)
    student.zero_grad()
    terms = []
    for row, tokens in zip(raw, ours, strict=True):
        answer = tokens["input_ids"][tokens["prompt_length"] :]
        logps = []
        for model, prompt in ((teacher, row["hint"] + row["prompt"]), (student, row["prompt"])):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            logps.append(F.log_softmax(logits, -1))
        p, q = logps[0].detach(), logps[1]
        terms.append((p.exp() * (p - q)).sum(-1))
    loss = torch.cat(terms).mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def test_loss_and_gradient_are_those_of_the_definition(double, batch_of, tokenizer):
    raw = rows()
    trainer = double(train=raw, **HINTED)
    expected, gradient = naive(trainer.model, trainer.teacher.model, tokenizer, raw, trainer.train_dataset)
    loss, ours = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(ours, gradient, rtol=1e-7, atol=1e-9)
    plain, _ = loss_and_gradient(double(train=raw), batch_of(trainer, dataset=double(train=raw).train_dataset))
    assert abs(plain - expected) > 1e-3  # the hint matters to this teacher


def test_padding_order_and_accumulation_change_nothing(double, batch_of):
    trainer = double(train=rows(), **HINTED, pad_to_multiple_of=4)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    parts = [[7, 2, 11], [0], [5, 3, 1, 4, 6, 8, 9, 10]]
    counts = [int((batch_of(trainer, part)["labels"] != -100).sum()) for part in parts]
    found = [loss_and_gradient(trainer, batch_of(trainer, part)) for part in parts]
    shares = [count / sum(counts) for count in counts]
    assert sum(share * part[0] for share, part in zip(shares, found, strict=True)) == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(sum(s * part[1] for s, part in zip(shares, found, strict=True)), gradient)


def test_without_context_a_teacher_that_is_the_student_teaches_nothing(double, batch_of, make_student):
    student = make_student(initializer_range=0.2).double()
    for hint, is_zero in ((lambda i: HINT if i == 11 else "", True), (lambda i: HINT, False)):
        trainer = double(copy.deepcopy(student), copy.deepcopy(student), train=rows(hint=hint), **HINTED)
        loss, gradient = loss_and_gradient(trainer, batch_of(trainer, range(6)))
        assert (max(abs(loss), gradient.abs().max().item()) < 1e-12) is is_zero


def test_the_same_prompt_on_both_sides_is_plain_distillation_on_it(double, batch_of):
    long = [{**row, "prompt": row["hint"] + row["prompt"], "asked": row["prompt"]} for row in rows()]
    found = []
    for settings in ({}, {"teacher_prompt": "{hint}{asked}"}, {"teacher_prompt": "{prompt}"}):
        trainer = double(train=Dataset.from_list(long), **settings)
        found.append(loss_and_gradient(trainer, batch_of(trainer)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1])


def test_text_that_is_read_behind_the_completion_changes_nothing(double, batch_of):
    """Causality: a view goes on behind y with other attended tokens, as of another context, and y's loss stays."""
    trainer = double(train=rows(), **HINTED)
    batch = batch_of(trainer, [0, 2, 5])
    ends, found, read = batch["attention_mask"].sum(1), [], []
    for text in ([], [7, 8, 9], [3, 11, 4]):
        longer = {**batch, "labels": F.pad(batch["labels"], (0, len(text)), value=-100)}
        for name, behind in (("input_ids", text), ("attention_mask", [1] * len(text))):
            entry = torch.tensor(behind, dtype=torch.long)
            longer[name] = torch.stack(
                [torch.cat([row[:end], entry, row[end:]]) for row, end in zip(batch[name], ends, strict=True)]
            )
        found.append(loss_and_gradient(trainer, longer))
        read.append(teacher_inputs(longer, longer["labels"][:, 1:] != -100)[0])
    lengths = [int(inputs["attention_mask"].sum()) for inputs in read]
    assert lengths[1] == lengths[2] == lengths[0] + 9 and (read[1]["input_ids"] != read[2]["input_ids"]).sum() == 9
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-7, atol=1e-9)


def test_what_comes_after_the_completion_changes_nothing(double, batch_of):
    """Only the prompt side of a view matters: padding behind a row, and other rows, are not read."""
    trainer = double(train=rows(), **HINTED)
    alone, _ = loss_and_gradient(trainer, batch_of(trainer, [0]))
    batch = batch_of(trainer, [0, 2, 5])
    batch["labels"][1:] = -100
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    batch["teacher_prompt_ids"][batch["teacher_prompt_mask"] == 0] = 7
    assert loss_and_gradient(trainer, batch)[0] == pytest.approx(alone, rel=1e-9)


# ---- Every method asks about its teacher's own rows -----------------------------------------------------------------


class Asked:
    """Writes down what a teacher is asked, as text: what it reads, and what of it is predicted."""

    def __init__(self, trainer, tokenizer):
        self.questions = []
        ask = trainer.teacher.signal

        def signal(inputs, predicts, vocab_size):
            for ids, mask, trained in zip(inputs["input_ids"], inputs["attention_mask"].bool(), predicts, strict=True):
                predicted = tokenizer.decode(ids[1:][trained])
                if predicted:
                    self.questions.append((tokenizer.decode(ids[mask]), predicted))
            return ask(inputs, predicts, vocab_size)

        trainer.teacher.signal = signal


def pairs(count=12):
    answers = [str(int(row["completion"]) + 1) for row in rows(count)]
    kept = rows(count).remove_columns("completion").to_list()
    gold = [row["completion"] for row in rows(count)]
    return Dataset.from_list(
        [{**row, "chosen": a, "rejected": b} for row, a, b in zip(kept, gold, answers, strict=True)]
    )


METHODS = {
    "given": ("gkd", {"lmbda": 0.0}),
    "sampled": ("gkd", {"lmbda": 1.0}),
    "replayed": ("gkd", {"lmbda": 0.9, "replay_buffer_size": 8}),
    "written by the teacher": ("gkd", {"lmbda": 0.0, "seq_kd": True}),
    "minillm": ("minillm", {"teacher_mix_alpha": 0.0}),
    "minillm, sampled": ("minillm", {"teacher_mix_alpha": 0.0, "estimator": "sampled", "objective": "token"}),
    "minillm, cycles": ("minillm", {"teacher_mix_alpha": 0.0, "num_minibatches": 2, "num_inner_epochs": 2}),
    "minillm, hf": ("minillm", {"teacher_mix_alpha": 0.0, "rollout_engine": "hf"}),
    "dpkd": ("dpkd", {}),
    "dpkd, kept": ("dpkd", {"chosen": "dataset", "refresh_steps": 3, "replay_buffer_size": 8}),
    "dpkd, pairs": ("dpkd", {}),
    "dpkd, reference": ("dpkd", {"reference_logps_dir": True}),
}


SLOW = ("minillm, sampled", "minillm, hf", "dpkd", "dpkd, reference")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in METHODS])
def test_every_method_asks_the_teacher_on_its_own_view(name, make_trainer, tokenizer, tmp_path):
    method, settings = METHODS[name]
    if "reference_logps_dir" in settings:
        settings = {"reference_logps_dir": str(tmp_path / "logps")}
    data = pairs() if name in ("dpkd, pairs", "dpkd, reference") else rows()
    trainer = make_trainer(method=method, train=data, eval_dataset=data, max_steps=3, **HINTED, **settings)
    asked = Asked(trainer, tokenizer)
    trainer.train()
    trainer.evaluate()
    prompts = {row["prompt"]: row["hint"] for row in data}
    assert len(asked.questions) >= 12
    for text, predicted in asked.questions:
        prompt = text.removesuffix(predicted)
        assert prompt + predicted == text  # all of the completion, and nothing of either prompt
        own = next(p for p in sorted(prompts, key=len, reverse=True) if prompt == prompts[p] + p)
        assert own, text
    assert trainer.state.log_history[-1]["eval_kl"] > 0


@pytest.mark.parametrize("objective", ["step_by_step", "edit", "dual_chain"])
def test_both_tasks_of_a_rationale_have_their_view(make_trainer, tokenizer, objective):
    data = addition_rationales(8).map(lambda row, i: {"hint": "" if i == 3 else HINT}, with_indices=True)
    settings = {"distill_weight": 1.0, "innovation_weight": 0.0, "eval_accuracy": False, "imitation_weight": 1.0}
    settings = {name: value for name, value in settings.items() if objective != "step_by_step" or "n_w" not in name}
    trainer = make_trainer(method="rationale", objective=objective, train=data, max_steps=2, **settings, **HINTED)
    asked = Asked(trainer, tokenizer)
    trainer.train()
    begins = ("=", "+") if objective == "step_by_step" else ("",)
    prompts = {f"{row['hint']}{begin}{row['question']}=" for row in data for begin in begins}
    assert len(asked.questions) >= 8
    for text, predicted in asked.questions:
        if objective != "edit":  # of a wrong chain the key steps alone are trained
            assert text.removesuffix(predicted) in prompts
        assert any(text.startswith(prompt) for prompt in prompts)


def test_the_students_own_chains_have_the_view_of_their_question(make_trainer, tokenizer):
    data = addition_rationales(2).map(lambda row, i: {"hint": HINT * (i + 1)}, with_indices=True)
    settings = {"objective": "dual_chain", "distill_weight": 1.0, "innovation_samples": 1, "max_length": 60}
    trainer = make_trainer(method="rationale", train=data, per_device_train_batch_size=2, **settings, **HINTED)
    chains = [f"0=={row['answer']}" for row in data]
    ids = [[*tokenizer(chain, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for chain in chains]
    trainer.engine.generate = lambda *args: ids
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    (batch,) = trainer.rollout([batch])
    asked = Asked(trainer, tokenizer)
    trainer.compute_loss(trainer.model, batch)
    expected = [f"{row['hint']}{row['question']}={chain}<eos>" for row, chain in zip(data, chains, strict=True)]
    assert [text for text, _ in asked.questions[2:]] == expected


def test_the_teacher_writes_behind_its_own_prompt(make_trainer, tokenizer):
    trainer = make_trainer(train=rows(), lmbda=0.0, seq_kd=True, temperature=0.0, max_new_tokens=4, **HINTED)
    teacher = trainer.teacher.model
    for raw, row in zip(rows(), trainer.get_train_dataloader().dataset, strict=True):
        ids = tokenizer(raw["hint"] + raw["prompt"], add_special_tokens=False)["input_ids"]
        answer = []
        while len(answer) < 4 and tokenizer.eos_token_id not in answer:
            answer.append(int(teacher(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert row["input_ids"] == tokenizer(raw["prompt"], add_special_tokens=False)["input_ids"] + answer
        assert viewed_row(row)["input_ids"] == ids + answer


def test_the_student_as_it_was_reads_the_students_prompt(make_trainer, tokenizer):
    """As the reference of rewards it is no teacher: before training, every margin is 0."""
    trainer = make_trainer(method="dpkd", train=pairs(), reference="student", **HINTED)
    batch = trainer.score([trainer.data_collator([trainer.train_dataset[i] for i in range(4)])])[0]
    _, terms = trainer.token_terms(trainer.model, batch, trainer.distill_terms, {"preference": 1.0})
    assert terms["reward_margin"].abs().max() < 1e-5


# ---- Wherever the teacher is ----------------------------------------------------------------------------------------


def test_a_cache_knows_rows_by_what_the_teacher_reads(make_trainer, by_step, tmp_path, make_teacher):
    run = {"train": rows(), "max_steps": 4, "lmbda": 0.0, "eval_dataset": rows(6, seed=4)}
    live = make_trainer(**run, **HINTED)
    live.train()
    for placement, teacher in (("auto", make_teacher()), ("cached", None)):
        cached = make_trainer(
            teacher=teacher, teacher_cache=str(tmp_path / "cache"), teacher_placement=placement, **run, **HINTED
        )
        cached.train()
        assert by_step(cached) == pytest.approx(by_step(live), rel=1e-5)
        assert cached.evaluate()["eval_kl"] == pytest.approx(live.evaluate()["eval_kl"], rel=1e-4)
    other = {"teacher": None, "teacher_cache": str(tmp_path / "cache"), "teacher_placement": "cached"}
    with pytest.raises(ConfigurationError, match="12 of 12 different rows in the training rows are not in the teacher"):
        make_trainer(**run, **other, teacher_prompt="{prompt}{hint}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gkd", {"lmbda": 0.9, "replay_buffer_size": 8}),
        ("minillm", {"teacher_mix_alpha": 0.0, "num_minibatches": 2, "num_inner_epochs": 2}),
    ],
)
def test_kept_rollouts_keep_their_view_through_a_checkpoint(make_trainer, die_at, by_step, method, settings):
    run = {"method": method, "train": rows(24), "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **settings}
    whole = make_trainer(**run, **HINTED)
    whole.train()
    killed = make_trainer(**run, **HINTED, output_dir=f"{whole.args.output_dir}-killed", callbacks=[die_at(5)])
    with pytest.raises(die_at.error):
        killed.train()
    resumed = make_trainer(**run, **HINTED, output_dir=killed.args.output_dir)
    resumed.train(resume_from_checkpoint=True)
    assert {step: loss for step, loss in by_step(resumed).items() if step > 3} == {
        step: loss for step, loss in by_step(whole).items() if step > 3
    }


def test_measures_of_a_run_are_taken_on_the_view(make_trainer, tokenizer):
    data = rows(6)
    trainer = make_trainer(train=data, eval_dataset=data, eval_measures=["agreement"], lmbda=0.0, **HINTED)
    asked = Asked(trainer, tokenizer)
    assert trainer.evaluate()["eval_student_text_kl"] > 0
    own = [row["hint"] + row["prompt"] for row in data]
    assert asked.questions and all(text.removesuffix(new) in own for text, new in asked.questions)


# ---- What does not go together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_prompt": "hints"}, "no column hints"),
        ({"teacher_prompt": "{prompt}{hin}"}, "has no column hin"),
        ({"teacher_prompt": "{prompt"}, "which is no template"),
        ({"teacher_prompt": " "}, "expected text with a word in it"),
        ({**HINTED, "teacher_max_length": 10}, "Row 0 of dataset 'train': The teacher would read"),
        ({**HINTED, "teacher_too_long": "drop"}, "`teacher_max_length` beside it"),
        ({**HINTED, "teacher_too_long": "cut"}, "one of error, drop"),
        ({**HINTED, "packing": True}, "packed rows follow one another"),
        ({"method": "minillm", **HINTED}, "student and teacher write one text behind one prompt"),
        ({"method": "rationale", "train": "default", "teacher_system_prompt": "1"}, "without a teacher"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_models_are_loaded(make_trainer, monkeypatch, settings, message):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *args: pytest.fail("loaded"))
    settings = {"train": rows(), **settings}
    if settings.get("method", "gkd") == "gkd":
        settings["lmbda"] = 0.0
    with pytest.raises((ConfigurationError, DatasetError), match=message.replace("{", r"\{")):
        make_trainer(**settings)


def test_a_view_longer_than_the_teachers_positions_is_refused(make_trainer, make_teacher):
    from transformers import GPT2Config, GPT2LMHeadModel

    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=14, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(DatasetError, match="with its own prompt.*`teacher_max_length: 16` with `teacher_too_long"):
        make_trainer(teacher=teacher, train=rows(hint=lambda i: HINT * 5), lmbda=0.0, **HINTED)


def test_a_context_column_acts_by_itself(make_trainer, batch_of, caplog):
    data = rows().rename_column("hint", "privileged_context")
    found = [
        make_trainer(train=data, lmbda=0.0, **settings).train_dataset["teacher_prompt_ids"][:]
        for settings in ({}, {"teacher_prompt": "{privileged_context}\n\n{prompt}"})
    ]
    assert found[0] == found[1] and "the teacher reads it before the question" in caplog.text


def test_evaluation_rows_without_the_context_of_the_training_rows_are_told(make_trainer, caplog):
    """Their KL is the distance to another teacher than the one that is trained on."""
    data = rows().rename_column("hint", "privileged_context")
    plain = data.remove_columns("privileged_context")
    settings = {"train": data, "lmbda": 0.0}
    make_trainer(**settings, eval_dataset={"math": data, "code": data})
    assert "has no such column" not in caplog.text
    make_trainer(**settings, eval_dataset={"math": plain, "code": data, "more": plain.to_iterable_dataset()})
    assert "but none in math, more, which has no such column" in caplog.text


# ---- Collators of the user's ----------------------------------------------------------------------------------------


def test_collators_of_the_users_do_not_lose_the_view(double, batch_of, tokenizer):
    loss, gradient = loss_and_gradient(trainer := double(train=rows(), **HINTED), batch_of(trainer))
    pads_left = copy.deepcopy(tokenizer)
    pads_left.padding_side = "left"
    for collator in (DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(pads_left)):
        trainer = double(train=rows(), data_collator=collator, **HINTED)
        found, ours = loss_and_gradient(trainer, batch_of(trainer))
        assert found == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (DataCollatorWithFlattening(), "packs rows, so that nobody knows which prompt"),
        (lambda given: padded(list(reversed(given))), "gave other texts than the rows"),
        (
            lambda given: padded([{k: row[k][1:] for k in ("input_ids", "labels")} for row in given]),
            "cuts the beginning of rows",
        ),
        (
            lambda given: {**padded(given), "token_type_ids": torch.zeros_like(padded(given)["labels"])},
            "token_type_ids",
        ),
    ],
)
def test_collators_that_would_part_row_and_view_are_refused(make_trainer, batch_of, collator, message):
    from transformers import GPT2Config, GPT2LMHeadModel

    student = GPT2LMHeadModel(GPT2Config(vocab_size=14, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    trainer = make_trainer(student=student, train=rows(), lmbda=0.0, data_collator=collator, **HINTED)
    with pytest.raises((DatasetError, ConfigurationError), match=message):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def padded(given):
    names = {"input_ids": 0, "labels": -100}
    rows_of = {n: [torch.tensor(row[n]) for row in given] for n in names}
    batch = {
        n: torch.nn.utils.rnn.pad_sequence(v, batch_first=True, padding_value=names[n]) for n, v in rows_of.items()
    }
    lengths = torch.tensor([len(ids) for ids in rows_of["input_ids"]])
    return batch | {"attention_mask": (torch.arange(batch["labels"].shape[1]) < lengths[:, None]).long()}
