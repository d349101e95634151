"""The training path: what is counted, masked, run in which mode, and what evaluation reports."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from distill_trainers import GKDConfig, GKDTrainer
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.models import recomputes_activations
from distill_trainers.teachers import LocalTeacher
from distill_trainers.toy import addition_dataset, addition_rows, character_tokenizer
from distill_trainers.trainers import METHODS

# ---- Counting and accumulation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, accumulation", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_logged_loss_is_the_mean_over_the_windows_tokens(
    make_trainer, dense, jsd_mean, by_step, batch_size, accumulation
):
    trainer = make_trainer(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        lmbda=0.0,
        train_sampling_strategy="sequential",
    )
    rows = [trainer.train_dataset[i] for i in range(8)]
    assert len({row["length"] for row in rows}) > 1, "rows of one length cannot tell a token mean from a batch mean"
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, rows))
    trainer.train()
    assert by_step(trainer)[1] == pytest.approx(expected, rel=1e-5)
    assert by_step(trainer, "divergence")[1] == pytest.approx(expected, rel=1e-5)
    assert by_step(trainer, "trained_tokens")[1] == sum(label != -100 for row in rows for label in row["labels"])


def test_a_last_window_of_fewer_micro_batches_is_a_mean_as_well(make_trainer, dense, jsd_mean, by_step):
    trainer = make_trainer(
        train=addition_dataset(10),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        lmbda=0.0,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
    )
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, [trainer.train_dataset[i] for i in (8, 9)]))
    trainer.train()
    assert by_step(trainer)[2] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_accumulation_gives_one_result_whatever_the_order(make_trainer, by_step, strategy):
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy=strategy,
            lmbda=0.0,
        )
        trainer.train()
        runs.append(by_step(trainer))
    if strategy == "random":
        assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert len(runs[0]) == len(runs[1]) == 3


def test_a_stream_whose_last_window_is_cut_short_leaves_no_gradient_behind(make_trainer, by_step):
    """5 micro-batches of a stream in windows of 2: the odd one must not leak into the next epoch's first step."""
    norms = {}
    for rows in (10, 8):
        stream = addition_dataset(rows).to_iterable_dataset()
        trainer = make_trainer(
            train=stream,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            lmbda=0.0,
            learning_rate=0.0,
        )
        trainer.train()
        norms[rows] = by_step(trainer, "grad_norm")
    assert norms[10][3] == pytest.approx(norms[10][1], rel=1e-5), "epoch 2 starts with the same rows as epoch 1"
    assert norms[10] == pytest.approx(norms[8], rel=1e-5)


def _synchronisations(run) -> int:
    """How often this package reads a tensor's value into Python while `run()` lasts."""
    calls = 0
    patched = {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__float__", "__int__", "__bool__")}

    def counting(original):
        def call(self, *args, **kwargs):
            nonlocal calls
            calls += sys._getframe(1).f_globals["__name__"].startswith("distill_trainers")
            return original(self, *args, **kwargs)

        return call

    try:
        for name, original in patched.items():
            setattr(torch.Tensor, name, counting(original))
        run()
    finally:
        for name, original in patched.items():
            setattr(torch.Tensor, name, original)
    return calls


def test_no_micro_step_reads_a_value_from_the_device(make_trainer):
    """As many synchronisations with 4 micro-batches a step as with 1."""
    counts = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            lmbda=0.0,
            logging_strategy="no",
        )
        inner = trainer.training_step
        counts.append(0)

        def training_step(*args, inner=inner, **kwargs):
            loss = None

            def run():
                nonlocal loss
                loss = inner(*args, **kwargs)

            counts[-1] += _synchronisations(run)
            return loss

        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)  # the head is checked once, on the first batch
        trainer.training_step = training_step
        trainer.train()
    assert counts == [0, 0]


# ---- Padding and prompts --------------------------------------------------------------------------------------------


def test_columns_of_padding_never_change_loss_or_gradient(make_trainer, batch_of):
    trainer = make_trainer(lmbda=0.0)
    batch = batch_of(trainer, range(6))
    wider = {}
    for name, fill in (("input_ids", 5), ("attention_mask", 0), ("labels", -100)):  # 5 is an ordinary token
        wider[name] = torch.nn.functional.pad(batch[name], (0, 7), value=fill)
    garbage = copy.deepcopy(batch)
    garbage["input_ids"][batch["attention_mask"] == 0] = 9
    results = []
    for each in (batch, wider, garbage):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, each)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert torch.allclose(gradient, results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"pad_to_multiple_of": 8}, {"pad_to_multiple_of": 64}])
def test_loss_is_that_of_unpadded_rows(make_trainer, batch_of, dense, jsd_mean, settings):
    trainer = make_trainer(lmbda=0.0, **settings)
    rows = [trainer.train_dataset[i] for i in range(8)]
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, rows))
    batch = batch_of(trainer, range(8))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_row_does_not_depend_on_its_neighbours(make_trainer, batch_of):
    trainer = make_trainer(lmbda=0.0)
    per_row = [trainer.compute_loss(trainer.model, batch_of(trainer, [i]), num_items_in_batch=1) for i in range(6)]
    together = trainer.compute_loss(trainer.model, batch_of(trainer, range(6)), num_items_in_batch=1)
    assert together.item() == pytest.approx(sum(loss.item() for loss in per_row), rel=1e-5)


def test_prompt_tokens_are_context_and_never_targets(make_trainer, batch_of, dense, jsd_mean):
    """A trained prompt token would change the mean; a label on position 0, which nothing predicts, changes nothing."""
    trainer = make_trainer(lmbda=0.0)
    batch = batch_of(trainer, range(4))
    loss = trainer.compute_loss(trainer.model, batch).item()
    first = copy.deepcopy(batch)
    first["labels"][:, 0] = first["input_ids"][:, 0]
    assert trainer.compute_loss(trainer.model, first).item() == loss
    rows = [dict(trainer.train_dataset[i]) for i in range(4)]
    for row in rows:
        assert row["labels"] == [-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :]
    with_prompts = [{**row, "labels": row["input_ids"]} for row in rows]
    assert loss == pytest.approx(jsd_mean(dense(trainer.model, trainer.teacher.model, rows)), rel=1e-5)
    assert loss != pytest.approx(jsd_mean(dense(trainer.model, trainer.teacher.model, with_prompts)), rel=1e-3)


@pytest.fixture
def pad_is_eos():
    tok = character_tokenizer()
    tok.pad_token = tok.eos_token
    assert tok.pad_token_id == tok.eos_token_id
    return tok


def test_eos_is_trained_where_it_is_also_the_padding(make_trainer, batch_of, dense, jsd_mean, pad_is_eos):
    trainer = make_trainer(tok=pad_is_eos, lmbda=0.0)
    rows = addition_rows(6)
    batch = batch_of(trainer, range(6))
    for labels, row in zip(batch["labels"], rows, strict=True):
        trained = labels[labels != -100].tolist()
        assert trained == [*pad_is_eos(row["completion"])["input_ids"], pad_is_eos.eos_token_id]
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, [trainer.train_dataset[i] for i in range(6)]))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_masks_come_from_lengths_and_never_from_ids(make_trainer, batch_of, dense, jsd_mean, tokenizer):
    """Rows that contain the pad token as an ordinary token, in prompt and completion."""
    pad = tokenizer.pad_token_id
    rows = Dataset.from_list(
        [
            {"input_ids": [pad, 3, 4, pad, 5, 1], "labels": [-100] * 3 + [pad, 5, 1], "prompt_length": 3},
            {"input_ids": [6, pad, 7, pad], "labels": [-100, -100, 7, pad], "prompt_length": 2},
        ]
    )
    trainer = make_trainer(train=rows, lmbda=0.0)
    batch = batch_of(trainer)
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert (batch["labels"] != -100).sum() == 5
    expected = jsd_mean(dense(trainer.model, trainer.teacher.model, rows))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


# ---- Modes of the models --------------------------------------------------------------------------------------------


def test_bf16_autocast_reaches_the_students_backbone(make_trainer, by_step, make_student):
    student, seen = make_student(), {"train": set(), "eval": set()}
    trainer = make_trainer(student, bf16=True, lmbda=0.5, seed=1, eval_dataset=addition_dataset(8, seed=3))

    def spy(module, inputs, output):
        if trainer.model.training or trainer._eval_rows is not None:
            seen["train" if trainer.model.training else "eval"].add(output.dtype)

    student.model.layers[0].mlp.down_proj.register_forward_hook(spy)
    trainer.train()
    trainer.evaluate()
    assert seen["train"] == {torch.bfloat16}
    assert seen["eval"] == {torch.bfloat16}
    assert all(torch.isfinite(torch.tensor(loss)) for loss in by_step(trainer).values())
    assert {p.dtype for p in student.parameters()} == {torch.float32}, "master weights stay in float32"


def test_bf16_loss_is_near_the_float32_one(make_trainer, by_step):
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(bf16=bf16, lmbda=0.0, max_steps=1)
        trainer.train()
        losses.append(by_step(trainer)[1])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_teacher_is_frozen_in_eval_mode_and_unchanged(make_trainer, make_teacher):
    teacher = make_teacher(attention_dropout=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    modes = []
    teacher.model.layers[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer = make_trainer(teacher=teacher, lmbda=0.5)
    trainer.train()
    assert modes and not any(modes)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_vocabularies_are_never_resized(make_trainer, make_student, make_teacher):
    student, teacher = make_student(), make_teacher(vocab_size=20)
    trainer = make_trainer(student, teacher, teacher_processing_class=character_tokenizer(), max_steps=1)
    trainer.train()
    assert student.lm_head.weight.shape[0] == student.config.vocab_size == 14
    assert teacher.lm_head.weight.shape[0] == teacher.config.vocab_size == 20


@pytest.mark.parametrize("disable, different", [(True, False), (False, True)])
def test_dropout_is_off_unless_asked_for(make_trainer, make_student, batch_of, disable, different):
    """Llama's attention dropout is a float and no module; both kinds must be found."""
    trainer = make_trainer(make_student(attention_dropout=0.5), lmbda=0.0, disable_dropout=disable)
    trainer.model.train()
    losses = {trainer.compute_loss(trainer.model, batch_of(trainer)).item() for _ in range(4)}
    assert (len(losses) > 1) == different


# ---- What the constructor takes -------------------------------------------------------------------------------------


def test_models_by_name_without_arguments_or_tokenizer(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = GKDTrainer(saved.student, saved.teacher, train_dataset=addition_dataset(4))
    assert isinstance(trainer.args, GKDConfig)
    assert trainer.processing_class.decode([5]) == "3"
    assert trainer.teacher.name == saved.teacher
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item() > 0


def test_plain_training_arguments_are_carried_over(saved, tmp_path, by_step):
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=7e-4, per_device_train_batch_size=2, use_cpu=True, report_to="none"
    )
    trainer = GKDTrainer(saved.student, saved.teacher, args, addition_dataset(8))
    assert isinstance(trainer.args, GKDConfig)
    assert trainer.args.learning_rate == 7e-4
    assert trainer.args.remove_unused_columns is False
    trainer.args.max_new_tokens = 4
    trainer.train()
    assert trainer.state.global_step == 2


def test_streams_are_trained_on(make_trainer, by_step):
    stream = addition_dataset(24).to_iterable_dataset()
    trainer = make_trainer(train=stream, max_steps=4, lmbda=0.5, gradient_accumulation_steps=2)
    trainer.train()
    assert len(by_step(trainer)) == 4


def test_one_model_cannot_be_student_and_teacher_at_once(make_trainer, make_student):
    model = make_student()
    with pytest.raises(ConfigurationError, match="same"):
        make_trainer(model, model)


def test_an_adapter_cannot_learn_from_the_base_it_is_on(make_trainer, make_student):
    """Freezing the teacher would freeze the adapter, which lies inside it."""
    base = make_student()
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for teacher in (base, LocalTeacher(base)):
        with pytest.raises(ConfigurationError, match="share .* parameters"):
            make_trainer(student, teacher)


def test_activation_checkpointing_is_found_by_either_name():
    """transformers 5.19 has only the older one."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert recomputes_activations(SimpleNamespace(**{name: True}))
        assert not recomputes_activations(SimpleNamespace(**{name: False}))


def test_a_teacher_whose_tokenizer_is_unknown_is_warned_about(make_trainer, make_teacher, tokenizer, caplog):
    for teacher in (make_teacher(), LocalTeacher(make_teacher())):
        caplog.clear()
        make_trainer(teacher=teacher)
        assert "tokenizer could not be compared" in caplog.text
    caplog.clear()
    make_trainer(teacher_processing_class=tokenizer)
    assert "tokenizer could not be compared" not in caplog.text


@pytest.mark.parametrize("dataset", [None, "no rows", "columns", "texts"])
def test_datasets_that_cannot_be_trained_on_are_refused(make_trainer, dataset):
    train = {
        None: None,
        "no rows": Dataset.from_dict({"prompt": [], "completion": []}),
        "columns": {"prompt": ["1+1="], "completion": ["2"]},
        "texts": ["1+1=2"],
    }[dataset]
    with pytest.raises(DatasetError):
        make_trainer(train=train)


def test_a_missing_model_is_refused_by_role(saved, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="teacher"):
        GKDTrainer(saved.student, str(saved.root / "nowhere"), GKDConfig(str(tmp_path)), addition_dataset(4))
    with pytest.raises(ConfigurationError, match="student"):
        GKDTrainer(None, saved.teacher, GKDConfig(str(tmp_path)), addition_dataset(4))


def test_evaluation_without_a_set_is_refused(make_trainer):
    with pytest.raises(DatasetError, match="eval_dataset"):
        make_trainer(eval_strategy="steps", eval_steps=1)


class TwoTasks(GKDTrainer):
    """Two terms over two kinds of tokens, one of which is a mean over rows."""

    loss_weights = {"odd": 1.0, "rows": 0.5}
    loss_divisors = {"odd": "token_odd", "rows": "token_first"}

    def score(self, batches):
        for batch in batches:
            trained = batch["labels"] != -100
            batch["token_odd"] = (batch["labels"] % 2 == 1) & trained
            batch["token_first"] = trained & (trained.cumsum(1) == 1)
        return batches

    def distill_terms(self, student, teacher, tokens):
        nll = -student.logps(1.0).gather(-1, tokens["labels"].unsqueeze(-1)).squeeze(-1)
        return {"odd": nll * tokens["token_odd"], "rows": nll, "plain": nll}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_terms_may_have_divisors_of_their_own(make_trainer, dense, by_step, monkeypatch, accumulation):
    monkeypatch.setitem(METHODS, "gkd", (METHODS["gkd"][0], TwoTasks))
    sizes = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    rows = addition_dataset(6)
    trainer = make_trainer(lmbda=0.0, max_steps=1, train=rows, eval_dataset=rows, **sizes)
    found = dense(trainer.model, trainer.teacher.model, [trainer.train_dataset[i] for i in range(6)])
    nll = -found.q.gather(-1, found.labels.unsqueeze(-1)).squeeze(-1)
    odd = nll[found.labels % 2 == 1].mean().item()
    trainer.train()
    assert by_step(trainer, "odd")[1] == pytest.approx(odd, rel=1e-5)
    assert by_step(trainer, "rows")[1] == pytest.approx(nll.sum().item() / 6, rel=1e-5)
    assert by_step(trainer, "plain")[1] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert by_step(trainer)[1] == pytest.approx(odd + 0.5 * nll.sum().item() / 6, rel=1e-5)


def test_entries_keep_their_digits_under_deepspeed(make_trainer, batch_of, monkeypatch):
    """transformers casts every float of a batch to the dtype of DeepSpeed's engine."""
    trainer = make_trainer()
    engine = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", engine)
    batch = {**batch_of(trainer, range(4)), "token_logps": torch.tensor([[-7.01, -3.003]])}
    assert Trainer._prepare_input(trainer, batch["token_logps"]).dtype == torch.bfloat16
    assert torch.equal(trainer._prepare_inputs(batch)["token_logps"], batch["token_logps"])
