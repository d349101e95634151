"""`hidden_weight`: what is compared with what, exactly, in every way a student is trained, and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.students import prune, prune_layers
from distill_trainers.trainers.hidden_states import HiddenMatch, places_of

MATCHED = {"hidden_weight": 3.0, "lmbda": 0.0, "divergence": "forward_kl", "learning_rate": 0.0, "max_grad_norm": 0.0}


@pytest.fixture
def deep(make_teacher):
    """A teacher of five layers, whose student kept the layers 0, 2 and 3."""
    return make_teacher(num_hidden_layers=5)


@pytest.fixture
def cut(deep):
    return prune_layers(deep, [0, 2, 3])


def gradients(trainer):
    """The loss and the gradient of one step of `get_batch_samples` over all rows, as training takes it."""
    trainer.create_optimizer()
    trainer.model.train()
    iterator = iter(trainer.get_train_dataloader())
    batches, counts = trainer.get_batch_samples(iterator, trainer.args.gradient_accumulation_steps, trainer.args.device)
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol=1e-9):
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=rtol, atol=rtol * float(value.abs().max() + 1), msg=name)


def double(model):
    return copy.deepcopy(model).double()


def test_the_term_is_that_of_the_definition(make_trainer, deep, cut):
    """Value and gradient in float64 against hidden states as transformers gives them."""
    settings = {**MATCHED, "per_device_train_batch_size": 4, "max_steps": 1}
    plain = gradients(make_trainer(double(cut), double(deep), **{**settings, "hidden_weight": 0.0}))
    trainer = make_trainer(double(cut), double(deep), **settings)
    loss, grads = gradients(trainer)

    student, teacher = double(cut), double(deep)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    outputs = []
    for model, layers in ((student, (0, 1, 2)), (teacher, (1, 2, 4))):  # before 2, before 3, and the last
        kept = {}
        for index in layers:
            model.model.layers[index].register_forward_hook(lambda m, a, out, i=index, kept=kept: kept.update({i: out}))
        with torch.set_grad_enabled(model is student):
            model(**inputs)
        outputs.append([kept[index] for index in layers])
    trained = batch["labels"][:, 1:] != -100
    errors = [((h - t).square().sum(-1) / t.square().sum(-1))[:, :-1][trained] for h, t in zip(*outputs, strict=True)]
    expected = 3.0 * torch.stack(errors).mean()
    expected.backward()
    assert loss - plain[0] == pytest.approx(float(expected), rel=1e-5)  # the term is float32, as every sum of squares
    assert float(expected) > 0.01
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and name in grads:
            torch.testing.assert_close(grads[name] - plain[1][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_layers_before_the_first_that_went_are_the_teachers(make_trainer, deep, by_step):
    """The term is 0 for a student that has all layers, and there is nothing to learn from it."""
    trainer = make_trainer(copy.deepcopy(deep), deep, **MATCHED, max_steps=1)
    trainer.train()
    assert list(by_step(trainer, "hidden_mse").values()) == [0.0]
    assert places_of(prune_layers(deep, [0, 1, 4]).config, deep.config, None) == [0, 3, 4]
    assert places_of(prune_layers(deep, [1, 2, 4]).config, deep.config, None) == [1, 3, 4]
    assert places_of(deep.config, deep.config, None) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "ways",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"loss_chunk_mib": 0.0001},
        {"pad_to_multiple_of": 16},
    ],
    ids=lambda ways: next(iter(ways)),
)
def test_it_is_the_same_in_every_way(make_trainer, deep, cut, ways):
    settings = {**MATCHED, "per_device_train_batch_size": 4}
    expected = gradients(make_trainer(double(cut), double(deep), **settings))
    assert_same(gradients(make_trainer(double(cut), double(deep), **{**settings, **ways})), expected, rtol=1e-5)


def test_a_head_that_is_not_fused_and_layers_that_are_compiled(make_trainer, deep, cut):
    settings = {**MATCHED, "per_device_train_batch_size": 4}
    expected = gradients(make_trainer(copy.deepcopy(cut), deep, **settings))
    trainer = make_trainer(copy.deepcopy(cut), deep, **settings)
    trainer.two_models.head_is_fused = False
    assert_same(gradients(trainer), expected, rtol=1e-4)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert_same(gradients(make_trainer(copy.deepcopy(cut), deep, **settings, **compiled)), expected, rtol=1e-4)


def test_the_students_states_come_nearer(make_trainer, deep, cut, by_step, rows_for):
    """With the term, by more than without; an adapter learns it too, and evaluation counts the divergence alone."""
    settings = {**MATCHED, "hidden_weight": 30.0, "learning_rate": 2e-3, "max_steps": 12}
    settings["train"] = rows_for("gkd")(4)  # the same batch at each step
    trainer = make_trainer(copy.deepcopy(cut), deep, **settings)
    trainer.train()
    errors = list(by_step(trainer, "hidden_mse").values())
    assert errors[-1] < 0.8 * errors[0], errors
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = make_trainer(copy.deepcopy(cut), deep, peft_config=adapter, **settings)
    adapted.train()
    errors = list(by_step(adapted, "hidden_mse").values())
    assert errors[-1] < 0.95 * errors[0], errors
    rows = adapted.train_dataset.select(range(4))
    with_term = make_trainer(copy.deepcopy(cut), deep, eval_dataset=rows, **settings).evaluate()
    without = make_trainer(copy.deepcopy(cut), deep, eval_dataset=rows, **{**settings, "hidden_weight": 0.0}).evaluate()
    assert with_term["eval_loss"] == pytest.approx(without["eval_loss"], rel=1e-6)


def test_rows_with_a_view_of_the_teachers_own(make_trainer, deep, cut, by_step):
    """The teacher's places lie elsewhere; a view that is the student's own prompt changes nothing."""
    plain = make_trainer(copy.deepcopy(cut), deep, **MATCHED, max_steps=1)
    plain.train()
    viewed = make_trainer(copy.deepcopy(cut), deep, **MATCHED, max_steps=1, teacher_prompt="{prompt}")
    viewed.train()
    other = make_trainer(copy.deepcopy(cut), deep, **MATCHED, max_steps=1, teacher_prompt="1+2={prompt}")
    other.train()
    expected, same, changed = (by_step(t, "hidden_mse")[1] for t in (plain, viewed, other))
    assert same == pytest.approx(expected, rel=1e-5) and changed != pytest.approx(expected, rel=1e-3)


def test_a_student_remembers_its_layers(deep, tmp_path):
    """In its config, in a folder too; layers named by the user come first."""
    cut = prune_layers(deep, [0, 3])
    cut.save_pretrained(tmp_path)
    assert places_of(AutoConfig.from_pretrained(tmp_path), deep.config, None) == [2, 4]
    assert places_of(cut.config, deep.config, [1, 4]) == [1, 4]
    assert places_of(prune(deep, keep_layers=3).config, deep.config, None) == [1, 3, 4]  # 0, 2 and 4
    assert places_of(prune_layers(cut, [1]).config, cut.config, None) == [1]
    assert not hasattr(prune_layers(prune_layers(deep, [0, 3]), [0, 1]).config, "kept_layers")
    assert places_of(cut.config, cut.config, None) == [0, 1]  # as many layers: what it remembers is of another model
    assert not hasattr(prune_layers(prune_layers(deep, [0, 3]), [0, 1]).config, "kept_layers_of")


def test_layers_of_another_model_are_no_layers_of_the_teacher(make_teacher, deep):
    """A student remembers numbers, which mean other layers in a larger teacher, or in the first of two before it."""
    student = prune_layers(prune_layers(deep, [0, 1, 3, 4]), [0, 2])
    assert places_of(student.config, prune_layers(deep, [0, 1, 3, 4]).config, None) == [1, 3]
    for teacher in (deep, make_teacher(num_hidden_layers=6)):
        with pytest.raises(ConfigurationError, match="nothing says which"):
            places_of(student.config, teacher.config, None)


def test_layers_that_return_something_else(make_trainer, deep, cut):
    """As many numbers in another order are no hidden states of these tokens."""
    trainer = make_trainer(cut, deep, **MATCHED, per_device_train_batch_size=4)
    layer = deep.model.layers[1]  # before the trainer's own look at it
    layer.register_forward_hook(lambda module, args, output: output.transpose(0, 1))
    deep.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0].transpose(0, 1), *args[1:]))
    with pytest.raises(ConfigurationError, match="layers of the teacher that gave no hidden states"):
        gradients(trainer)


def test_states_are_let_go_of_as_they_are_compared():
    """The doctor counts the teacher's and the differences, not the student's besides (`doctor/memory.py`)."""
    student, teacher = {m: torch.ones(2, 3) for m in range(2)}, {place: torch.full((2, 3), 2.0) for place in (1, 4)}
    assert HiddenMatch([1, 4], 1.0).term(student, teacher).tolist() == [0.25, 0.25]
    assert not student and not teacher


def test_packed_rows_and_rationales_give_what_their_rows_give(make_trainer, deep, cut):
    """The term of all rows at once, packed; and of both tasks of a question."""
    settings = {**MATCHED, "divergence": "forward_kl", "per_device_train_batch_size": 4}
    packed = make_trainer(double(cut), double(deep), packing=True, **settings)
    batch = next(iter(packed.get_train_dataloader()))
    rows = make_trainer(double(cut), double(deep), **settings)
    found = packed.compute_loss(packed.model.train(), batch, True)[1]["hidden_mse"]
    assert "position_ids" in batch and found.mean() > 0.01
    ids = rows_of_batch(batch)
    expected = [rows.compute_loss(rows.model.train(), row, True)[1]["hidden_mse"] for row in ids]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=0)
    settings = {"hidden_weight": 3.0, "learning_rate": 0.0, "distill_weight": 1.0}
    trainer = make_trainer(double(cut), double(deep), method="rationale", **settings, per_device_train_batch_size=4)
    batch = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)[0][0]
    terms = trainer.compute_loss(trainer.model.train(), batch, True)[1]
    assert len(terms["hidden_mse"]) == (batch["labels"][:, 1:] != -100).sum() and len(batch["labels"]) == 8


def rows_of_batch(batch):
    """Each row of a packed batch as a batch of its own."""
    for ids, places, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
        starts = [*(places == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, stop in zip(starts, starts[1:], strict=False):
            row = {"input_ids": ids[None, start:stop], "labels": labels[None, start:stop]}
            yield {**row, "attention_mask": torch.ones_like(row["input_ids"])}


def test_what_was_kept_of_another_model_says_nothing(deep, make_teacher):
    """The numbers of a student of a student are the latter's, and a deeper model's layers are others."""
    twice = prune_layers(prune_layers(deep, [0, 2, 3]), [0, 2])
    for student, teacher, made_of in ((twice, deep, 3), (twice, make_teacher(num_hidden_layers=6), 3)):
        with pytest.raises(ConfigurationError, match=rf"2 layers \(made of a model of {made_of}\)"):
            places_of(student.config, teacher.config, None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"hidden_weight": 0.0, "hidden_layers": [0, 1, 2]}, "`hidden_weight` above 0 beside it"),
        ({"hidden_layers": [0, 1]}, "3 different layers of the teacher, ascending"),
        ({"hidden_layers": [0, 1, 5]}, "from 0 to 4"),
        ({"hidden_layers": [2, 1, 4]}, "ascending"),
        ({"hidden_layers": [-1, 1, 4]}, "from 0"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant: false"),
        ({"method": "minillm"}, "ahead of the steps"),
        ({"method": "dpkd"}, "whole answers"),
        ({"method": "rationale"}, "`distill_weight: 0` asks no teacher"),
        ({"hidden_layers": (0, 2, 4)}, r"\(0, 2, 4\), a tuple`; expected a list of whole numbers"),
    ],
)
def test_settings_that_compare_nothing(make_trainer, deep, cut, settings, expected):
    settings = {**MATCHED, **settings}
    if "method" in settings:
        settings = {k: v for k, v in settings.items() if k not in ("lmbda", "divergence")}
    with pytest.raises(ConfigurationError, match=expected):
        make_trainer(cut, deep, **settings)


def test_models_that_cannot_be_compared(make_trainer, make_student, make_teacher, deep, cut, tmp_path):
    with pytest.raises(ConfigurationError, match="one width"):
        make_trainer(make_student(), deep, **MATCHED)
    stranger = make_teacher(num_hidden_layers=3)
    with pytest.raises(ConfigurationError, match="nothing says which"):
        make_trainer(stranger, deep, **MATCHED)
    make_trainer(stranger, deep, **MATCHED, hidden_layers=[0, 2, 4])
    with pytest.raises(ConfigurationError, match="not at hand"):
        make_trainer(cut, deep, **MATCHED, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigurationError, match="not at hand"):
        make_trainer(cut, None, **MATCHED, self_teacher="initial")
    with pytest.raises(ConfigurationError, match="not at hand"):
        make_trainer(cut, {"a": deep, "b": copy.deepcopy(deep)}, **MATCHED)
