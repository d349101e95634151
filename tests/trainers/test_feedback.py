"""Feedback on the student's own attempts: which rows get it, what their teacher reads, and what the loss then is."""

import copy

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, SequentialSampler

from distill_trainers.data.feedback import FeedbackTemplate
from distill_trainers.data.teacher_prompts import TeacherPrompts
from distill_trainers.data.tokenization import prepare_dataset
from distill_trainers.data.views import view_of
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.recipe.checks import optimiser_steps
from distill_trainers.toy import addition_rows
from distill_trainers.trainers.gkd.feedback import judged
from distill_trainers.trainers.lifecycle.order import RepeatedSampler

TEMPLATE = "{attempt}={answer}+{prompt}"
PROMPTS = ["1+1=", "2+30=", "1+1=", "40+4="]


def rows(prompts=PROMPTS):
    return Dataset.from_list([{"prompt": p, "answer": str(sum(map(int, p[:-1].split("+"))))} for p in prompts])


@pytest.fixture
def attempted(make_trainer, make_student, tokenizer, batch_of):
    """`attempted(texts, …)`: a trainer of float64 models, and its batches after a rollout that sampled these texts."""

    def make(texts, train=None, parts=None, **settings):
        train = rows() if train is None else train
        settings = {"lmbda": 1.0, "divergence": "forward_kl", "feedback": TEMPLATE, **settings}
        student = make_student(initializer_range=0.2).double()
        trainer = make_trainer(student=student, teacher="double", train=train, **settings)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        trainer.engine.generate = lambda *args: ids
        return trainer, trainer.rollout([batch_of(trainer, part) for part in parts or [range(len(texts))]])

    return make


def read_by_teacher(batch, tokenizer):
    prompts = zip(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"].bool(), strict=True)
    return [tokenizer.decode(ids[mask]) for ids, mask in prompts]


def loss_and_gradient(trainer, batches):
    trainer.model.zero_grad()
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    loss = sum(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in batches)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("when_right", ["drop", "keep"])
def test_wrong_attempts_get_feedback_and_right_ones_do_not(attempted, tokenizer, when_right):
    trainer, (batch,) = attempted(["2", "33", "", "44"], feedback_right=when_right, pad_to_multiple_of=4)
    # The paragraph has no place for an attempt without text: that row's teacher reads what the student does.
    assert read_by_teacher(batch, tokenizer) == ["1+1=", "33=32+2+30=", "1+1=", "40+4="]
    trained = (batch["labels"] != -100).sum(1).tolist()
    assert trained == ([2, 3, 1, 3] if when_right == "keep" else [0, 3, 0, 0])
    assert "feedback" not in batch and batch["view_start"].tolist() == [4, 5, 4, 5]
    logged = trainer.metrics.read(trainer.accelerator)
    assert {name: logged[name] for name in logged if "attempts" in name} == {
        "attempts_right": 0.5,
        "attempts_undecided": 0.0,
        "attempts_with_feedback": 0.25,
        "attempts_with_right_sample": 0.0,
        "attempts_too_long": 0.0,
    }
    assert logged["trained_rows"] == (4 if when_right == "keep" else 1)


def test_loss_and_gradient_are_those_of_a_view_made_by_hand(attempted, make_trainer, batch_of, make_student):
    texts = ["3", "32", "4", "1"]
    trainer, batches = attempted(texts)
    wrong = [{**row, "completion": text} for row, text in zip(rows(), texts, strict=True) if text != row["answer"]]
    given = make_trainer(
        student=copy.deepcopy(trainer.model),
        teacher="double",
        train=Dataset.from_list(wrong),
        lmbda=0.0,
        divergence="forward_kl",
        teacher_prompt="{completion}={answer}+{prompt}",
    )
    expected, gradient = loss_and_gradient(given, [batch_of(given)])
    loss, ours = loss_and_gradient(trainer, batches)
    assert loss == pytest.approx(expected, rel=1e-9) and expected > 1e-2
    torch.testing.assert_close(ours, gradient, rtol=1e-7, atol=1e-9)


def test_accumulation_changes_nothing(attempted):
    """Neither the loss nor which right sample is found: it may come from another micro-batch."""
    texts, settings = ["3", "32", "2", "1"], {"feedback": "{right}={attempt}+{prompt}"}
    trainer, whole = attempted(texts, **settings)
    loss, gradient = loss_and_gradient(trainer, whole)
    _, parts = attempted(texts, parts=[[0, 1], [2, 3]], **settings)
    assert [int((part["labels"] != -100).sum()) for part in parts] == [2, 0]
    found, ours = loss_and_gradient(trainer, parts)
    assert found == pytest.approx(loss, rel=1e-9) and loss > 1e-2
    torch.testing.assert_close(ours, gradient)


def test_a_right_sample_is_of_the_same_prompt(attempted, tokenizer):
    template = "{prompt}\n\n{right}"
    _, (batch,) = attempted(["3", "33", "2", "44"], feedback=template)
    told = [text.replace("<pad>", "|") for text in read_by_teacher(batch, tokenizer)]  # the toy knows no empty lines
    # Row 1 is wrong, too, but nobody was right about it, so that nothing is left to tell.
    assert told == ["1+1=|2", "2+30=", "1+1=", "40+4="]
    assert (batch["labels"] != -100).any(1).tolist() == [True, False, False, False]


def test_a_right_sample_of_another_process_serves(attempted, tokenizer, monkeypatch):
    ids = tuple(tokenizer("2+30=", add_special_tokens=False)["input_ids"])
    elsewhere = [((ids, "2+30=", "32"), "32"), ((ids, "2+30=", "33"), "33")]  # the latter is to another answer
    monkeypatch.setattr("distill_trainers.trainers.gkd.feedback.gather_object", lambda own: elsewhere + own)
    _, (batch,) = attempted(["2", "33", "2", "44"], feedback="{right}={prompt}")
    assert read_by_teacher(batch, tokenizer)[1] == "32=2+30="


@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length"])
def test_a_step_samples_each_of_its_prompts_so_often(make_trainer, tokenizer, order):
    settings = {"train": rows([f"{a}+1=" for a in range(1, 7)]), "feedback": "{right}={prompt}", "lmbda": 1.0}
    settings |= {"num_generations": 2, "train_sampling_strategy": order, "max_steps": -1, "num_train_epochs": 2}
    trainer = make_trainer(**settings, per_device_train_batch_size=4)
    told, sampled = [], trainer.sample_completions

    def remembered(batches):
        told.extend(tokenizer.decode(ids) for batch in batches for ids in batch["prompt_ids"])
        return sampled(batches)

    trainer.sample_completions = remembered
    trainer.train()
    assert trainer.state.global_step == optimiser_steps(trainer.args, 6) == 6
    first, second = told[::2], told[1::2]
    assert first == second and len(set(first[:6])) == 6 and sorted(first[:6]) == sorted(first[6:])
    assert (first[:6] == first[6:]) == (order == "sequential")


def test_a_group_stays_in_one_step_of_all_processes():
    batches = BatchSampler(RepeatedSampler(SequentialSampler(range(6)), 4), 2, drop_last=False)
    shards = [BatchSamplerShard(batches, num_processes=2, process_index=rank) for rank in range(2)]
    steps = [sorted(sum(parts, [])) for parts in zip(*shards, strict=True)]
    assert steps == [[row] * 4 for row in range(6)]


def test_a_step_in_which_all_are_right_trains_nothing(attempted):
    trainer, batches = attempted(["2"] * 4, train=rows(["1+1="] * 4))
    loss, gradient = loss_and_gradient(trainer, batches)
    assert loss == 0 and not gradient.any()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(log["loss"] == log["trained_rows"] == 0 for log in trainer.state.log_history if "loss" in log)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("when_right", ["drop", "keep"])
def test_rows_too_long_for_the_teacher_are_left_out_and_counted(attempted, tokenizer, when_right):
    settings = {"teacher_max_length": 12, "teacher_too_long": "drop", "feedback_right": when_right}
    trainer, (batch,) = attempted(["3", "333", "4", "1"], **settings)
    assert (batch["labels"] != -100).any(1).tolist() == [True, False, True, True]
    assert read_by_teacher(batch, tokenizer)[1] == "2+30="  # it does not read what would be too long, either
    logged = trainer.metrics.read(trainer.accelerator)
    assert (logged["attempts_too_long"], logged["attempts_with_feedback"], logged["trained_rows"]) == (0.25, 0.75, 3)


def test_given_completions_are_nobodys_attempt(make_trainer, batch_of):
    data = Dataset.from_list([{**row, "answer": row["completion"]} for row in addition_rows(8)])
    trainer = make_trainer(train=data, eval_dataset=data, lmbda=0.5, feedback=TEMPLATE, max_steps=4)
    trainer.train()
    sampled = [log["rollouts"] > 0 for log in trainer.state.log_history if "rollouts" in log]
    assert {"attempts_right" in log for log in trainer.state.log_history if log.get("rollouts") == 0} == {False}
    assert set(sampled) == {True, False} and trainer.evaluate()["eval_kl"] > 0


def test_a_conversation_is_what_the_chat_template_would_have_rendered(make_tokenizer):
    """Id for id the prompt that the same text has as a template over the row's columns."""
    from distill_trainers.data.feedback import FeedbackRows, feedback_ids

    tokenizer = make_tokenizer(bos=True)
    asked = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "0+1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "1+1?\n\n"},
    ]
    for prompt in (asked, "1+1?\n"):
        row = {
            "prompt": prompt,
            "completion": "\n2" if isinstance(prompt, str) else None,
            "answer": 2,
            "attempt": "\n3",
        }
        data = Dataset.from_list(
            [row if isinstance(prompt, str) else {k: row[k] for k in ("prompt", "answer", "attempt")}]
        )
        text = "{prompt}{attempt}{answer}\n\n{prompt}"
        settings = {"max_length": None, "needs": "prompt"}
        viewed = prepare_dataset(data, tokenizer, teacher_prompts=TeacherPrompts(prompt=text), **settings)[0]
        ours = FeedbackRows(FeedbackTemplate(text), "answer")
        known = prepare_dataset(data, tokenizer, feedback=ours, **settings)[0]
        question = known["feedback"]["question"]
        said = FeedbackTemplate(text).filled({"prompt": question, "attempt": "\n3", "answer": "2", "right": ""})
        expected = viewed["teacher_prompt_ids"]
        if isinstance(prompt, str):  # the newline that the completion's first token took in is not asked, anywhere
            assert question == "1+1?" and tokenizer.decode(feedback_ids(known["feedback"], said, tokenizer)) == (
                "<bos>1+1?\n32\n\n1+1?"
            )
        else:
            assert feedback_ids(known["feedback"], said, tokenizer) == expected
        assert known["teacher_length"] >= len(expected) - 4


def test_a_run_goes_on_exactly(make_trainer, die_at, by_step):
    run = {"train": rows(PROMPTS * 3), "lmbda": 1.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run |= {"feedback": "{right}{attempt}={prompt}\n\n{answer}", "self_teacher": "ema", "teacher": None}
    run |= {"num_generations": 2}
    whole = make_trainer(**run)
    whole.train()
    killed = make_trainer(**run, output_dir=f"{whole.args.output_dir}-killed", callbacks=[die_at(3)])
    with pytest.raises(die_at.error):
        killed.train()
    resumed = make_trainer(**run, output_dir=killed.args.output_dir)
    resumed.train(resume_from_checkpoint=True)
    late = {step: loss for step, loss in by_step(whole).items() if step > 2}
    assert {step: loss for step, loss in by_step(resumed).items() if step > 2} == late and all(late.values())


def test_a_live_teacher_that_reads_feedback_teaches(make_trainer, batch_of, caplog):
    """Without feedback it says what the student says, of which a warning would tell."""
    settings = {"train": rows(), "teacher": None, "self_teacher": "live", "lmbda": 1.0, "feedback": TEMPLATE}
    trainer = make_trainer(**settings, feedback_right="keep")
    batches = trainer.rollout([batch_of(trainer)])
    plain = [{name: entry for name, entry in batch.items() if name not in view_of(batch)} for batch in batches]
    assert loss_and_gradient(trainer, batches)[0] > 1e-3 > abs(loss_and_gradient(trainer, plain)[0])
    assert "the loss of distillation stays 0" not in caplog.text
    make_trainer(**{**settings, "feedback": None, "teacher_prompt": "{answer}{prompt}"})
    assert "the loss of distillation stays 0" not in caplog.text
    make_trainer(**{**settings, "feedback": None})
    assert "the loss of distillation stays 0" in caplog.text


@pytest.mark.parametrize(
    ("text", "answer", "settings", "reason"),
    [
        ("3 + 4 = 7, so 7 apples", "7", {}, "right"),
        ("It is 7. The answer is 8.", "7", {}, "wrong"),
        ("I know not", "7", {}, "no answer"),
        ("", "7", {}, "no answer"),
        ("so 12\n#### 12", "3 * 4 = 12\n#### 12", {}, "right"),
        ("12", "3 * 4 = 12\n#### 12", {"kind": "exact"}, "right"),
        ("(b) Rome", "B", {"kind": "choice"}, "right"),
        ("Rome", "B", {"choices": ["Paris", "Rome"]}, "right"),
        ("Paris.\nAnd so on", "paris", {}, "right"),
        ("7 <a>8</a>", "8", {"formats": [r"regex:<a>(\d+)"]}, "right"),
        ("8", "8", {"formats": ["boxed"]}, "no answer"),
    ],
)
def test_responses_are_judged_by_what_they_state(text, answer, settings, reason):
    assert judged(text, answer, **settings) == reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 0.0}, "`lmbda: 0` never samples"),
        ({"feedback": "{attempt}"}, "has no place for {prompt}"),
        ({"feedback": "{prompt} again"}, "has no place for feedback"),
        ({"feedback": "{prompt}{hint}"}, "names {hint}"),
        ({"feedback": "{prompt}{attempt"}, "`feedback: .*which is no template"),
        ({"feedback": None, "feedback_right": "keep"}, "`feedback` beside it"),
        ({"feedback_right": "both"}, "one of drop, keep"),
        ({"feedback_kind": "digits"}, "one of auto, number"),
        ({"feedback_formats": ["digits"]}, "Got the answer format 'digits'"),
        ({"num_generations": 3}, "num_generations: 3` with [48] rows in a step"),
        ({"num_generations": 2, "train": rows().to_iterable_dataset(), "max_steps": 1}, "stream with `num_gen"),
        ({"replay_buffer_size": 8}, "none with `replay_buffer_size`"),
        ({"teacher_system_prompt": "1"}, "which writes the teacher's prompt itself"),
        ({"teacher_prompt": "{prompt}1"}, "which writes the teacher's prompt itself"),
        ({"teacher_max_length": 20}, "it can be left out and counted"),
        ({"packing": True}, "every step samples completions"),
        ({"feedback_answer_column": "solution"}, "feedback_answer_column: solution"),
        ({"train": rows().add_column("privileged_context", ["1"] * 4)}, "'privileged_context', too"),
        ({"train": Dataset.from_list([{"prompt": "1+1=", "answer": a} for a in ("2", " ")])}, "Row 1 .*no answer in"),
        ({"train": rows().add_column("choices", ["A"] * 4)}, "Row 0 .*Column 'choices' holds 'A'"),
        ({"train": Dataset.from_list([{"input_ids": [1, 2], "answer": "2"}])}, "token ids"),
        ({"teacher": {"a": "x", "b": "y"}}, "attempts of one teacher's rows"),
        ({"method": "minillm"}, "feedback"),
    ],
)
def test_what_cannot_work_is_refused_before_models_are_loaded(make_trainer, monkeypatch, settings, message):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *args: pytest.fail("loaded"))
    settings = {"train": rows(), "lmbda": 1.0, "feedback": TEMPLATE, **settings}
    if settings.get("method"):
        del settings["lmbda"]
    with pytest.raises((ConfigurationError, DatasetError), match=message.replace("{", r"\{")):
        make_trainer(**settings)


def test_a_collator_of_the_users_is_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="with `feedback`, which needs texts of each row"):
        make_trainer(train=rows(), lmbda=1.0, feedback=TEMPLATE, data_collator=lambda rows: {})
