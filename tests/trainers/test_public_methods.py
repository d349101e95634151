"""The public methods of `transformers.Trainer`: each works, or refuses with a sentence; a new one cannot slip by."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_dataset, addition_rationales, addition_rows
from distill_trainers.trainers import METHODS


def _step(trainer):
    """The batches of one optimiser step, as training takes them."""
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    return batches[0]


def _trained(trainer):
    trainer.train()
    return trainer


def _callbacks(trainer):
    class Mine(TrainerCallback):
        pass

    trainer.add_callback(Mine)
    mine = trainer.pop_callback(Mine)
    trainer.add_callback(mine)
    trainer.remove_callback(Mine)
    return isinstance(mine, Mine) and not any(isinstance(c, Mine) for c in trainer.callback_handler.callbacks)


def _with_optimizer(trainer):
    trainer.create_optimizer_and_scheduler(3)
    return trainer


def _logged(trainer):
    trainer.log({"loss": 1.0, "mine": 2.0}, start_time=0.0)
    return trainer.state.log_history[-1]["mine"] == 2.0


def _file(trainer, name, write):
    write(trainer)
    return (Path(trainer.args.output_dir) / name).is_file()


# What each must do, as a question whose answer is yes; REFUSED are those that raise.
WORKS = {
    "add_callback": _callbacks,
    "pop_callback": _callbacks,
    "remove_callback": _callbacks,
    "autocast_smart_context_manager": lambda t: hasattr(t.autocast_smart_context_manager(), "__enter__"),
    "call_model_init": "tests/trainers/test_model_init.py",
    "compute_loss": lambda t: torch.isfinite(t.compute_loss(t.model, _step(t))),
    "compute_loss_context_manager": lambda t: hasattr(t.compute_loss_context_manager(), "__enter__"),
    "create_accelerator_and_postprocess": lambda t: t.create_accelerator_and_postprocess() is None and t.accelerator,
    "create_model_card": lambda t: _file(t, "README.md", lambda t: t.create_model_card()),
    "create_optimizer": lambda t: t.create_optimizer() is t.optimizer,
    "create_optimizer_and_scheduler": lambda t: _with_optimizer(t).lr_scheduler is not None,
    "create_scheduler": lambda t: t.create_scheduler(3, t.create_optimizer()) is not None,
    "end": lambda t: t.end() is None,
    "evaluate": lambda t: "eval_loss" in t.evaluate(),
    "evaluation_loop": lambda t: t.evaluation_loop(t.get_eval_dataloader(), "Evaluation").metrics["eval_loss"] > 0,
    "floating_point_ops": lambda t: t.floating_point_ops(_step(t)) > 0,
    "get_batch_samples": lambda t: "labels" in _step(t),
    "get_cp_size": lambda t: t.get_cp_size() == 1,
    "get_decay_parameter_names": lambda t: t.get_decay_parameter_names(t.model),
    "get_eval_dataloader": lambda t: len(t.get_eval_dataloader().dataset) == 8,
    "get_learning_rates": lambda t: _with_optimizer(t).get_learning_rates()[0] == t.args.learning_rate,
    "get_num_trainable_parameters": lambda t: t.get_num_trainable_parameters() == t.model.num_parameters(),
    "get_optimizer_cls_and_kwargs": lambda t: issubclass(
        t.get_optimizer_cls_and_kwargs(t.args)[0], torch.optim.Optimizer
    ),
    "get_optimizer_group": lambda t: _with_optimizer(t).get_optimizer_group(),
    "get_sp_size": lambda t: t.get_sp_size() == 1,
    "get_test_dataloader": lambda t: len(t.get_test_dataloader(t.eval_dataset).dataset) == 8,
    "get_total_train_batch_size": lambda t: t.get_total_train_batch_size(t.args) == 4,
    "get_tp_size": lambda t: t.get_tp_size() == 1,
    "get_train_dataloader": lambda t: len(t.get_train_dataloader().dataset) == 24,
    "hyperparameter_search": "tests/trainers/test_model_init.py",
    "init_hf_repo": "tests/hub/test_students.py",
    "is_local_process_zero": lambda t: t.is_local_process_zero(),
    "is_world_process_zero": lambda t: t.is_world_process_zero(),
    "log": _logged,
    "log_metrics": lambda t: t.log_metrics("eval", {"eval_loss": 1.0}) is None,
    "loss_is_scaled_for_ga": lambda t: t.loss_is_scaled_for_ga,
    "metrics_format": lambda t: type(t).metrics_format({"eval_runtime": 1.0}),
    "num_examples": lambda t: t.num_examples(t.get_train_dataloader()) == 24,
    "predict": lambda t: t.predict(t.eval_dataset).metrics["test_loss"] > 0,
    "prediction_step": lambda t: len(t.prediction_step(t.model, _step(t), prediction_loss_only=False)) == 3,
    "push_to_hub": "tests/hub/test_students.py",
    "save_metrics": lambda t: _file(t, "eval_results.json", lambda t: t.save_metrics("eval", {"eval_loss": 1.0})),
    "save_model": lambda t: _file(t, "config.json", lambda t: t.save_model()),
    "save_state": lambda t: _file(t, "trainer_state.json", lambda t: t.save_state()),
    "set_initial_training_values": lambda t: t.set_initial_training_values(t.args, t.get_train_dataloader()),
    "store_flos": lambda t: t.store_flos() is None,
    "train": lambda t: t.train().global_step == 3,
    "training_step": lambda t: torch.isfinite(t.training_step(t.model, _step(t))),
}


def test_each_public_method_of_trainer_has_a_row():
    public = {name for name in dir(Trainer) if not name.startswith("_")}
    assert public == WORKS.keys()


def test_what_other_tests_try_is_tried_there():
    root = Path(__file__).parents[2]
    for name, place in WORKS.items():
        if isinstance(place, str):
            assert (root / place).is_file(), name


@pytest.mark.parametrize("name", [name for name, row in WORKS.items() if not isinstance(row, str)])
def test_public_methods_work_when_called_by_hand(make_trainer, name):
    trainer = make_trainer(eval_dataset=addition_dataset(8, seed=5))
    assert WORKS[name](trainer)


@pytest.mark.parametrize("name", ["compute_loss", "training_step", "prediction_step"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "gkd"])
def test_the_path_of_each_method_can_be_walked_by_hand(make_trainer, rows_for, method, name):
    trainer = make_trainer(method=method, eval_dataset=rows_for(method)(8, seed=5))
    assert WORKS[name](trainer)


@pytest.mark.parametrize("settings", [{"method": "minillm"}, {"method": "dpkd"}])
def test_a_batch_that_is_no_steps_batch_is_named(make_trainer, settings):
    trainer = make_trainer(**settings)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(DatasetError, match="Got a batch without `token_.*get_batch_samples"):
        trainer.training_step(trainer.model, batch)


@pytest.mark.parametrize("name", ["create_model_card", "predict", "evaluate", "log", "save_model", "prediction_step"])
def test_methods_take_the_parameters_of_trainer(name):
    for trainer in {trainer for _, trainer in METHODS.values()}:
        ours = inspect.signature(getattr(trainer, name)).parameters
        if any(p.kind == p.VAR_KEYWORD for p in ours.values()):
            continue
        theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert list(ours)[: len(theirs)] == theirs


# ---- Rows that come after construction ------------------------------------------------------------------------------

# What the code tells apart: rows of prompts, of pairs and of rationales, there at once or as they come.
each_layout = pytest.mark.parametrize(
    "method, stream", [("gkd", False), ("gkd", True), ("dpkd", True), ("rationale", False)]
)


@each_layout
def test_raw_rows_are_predicted_as_they_are_evaluated(make_trainer, rows_for, method, stream):
    rows = rows_for(method)(6, seed=5)
    trainer = make_trainer(method=method, eval_dataset=rows)
    expected = trainer.evaluate()
    output = trainer.predict(rows.to_iterable_dataset() if stream else rows)
    again = trainer.evaluate(rows)
    for name in ("loss", "perplexity", "tokens"):
        right = pytest.approx(expected[f"eval_{name}"], rel=1e-6)
        assert output.metrics[f"test_{name}"] == right and again[f"eval_{name}"] == right
    assert output.predictions.shape[:2] == output.label_ids.shape and len(output.label_ids) == 6


def test_rows_that_come_later_may_be_a_list(make_trainer, by_step):
    rows = addition_rows(12, seed=4)
    expected, trainer = make_trainer(train=Dataset.from_list(rows), max_steps=2), make_trainer(max_steps=2)
    expected.train()
    trainer.train_dataset = rows
    trainer.train()
    assert by_step(trainer) == by_step(expected)
    assert trainer.predict(rows).metrics["test_loss"] == trainer.evaluate(Dataset.from_list(rows))["eval_loss"]


def _replaced(rows):
    rows[:] = addition_rows(6, seed=6)


def _edited(rows):
    for row, new in zip(rows, addition_rows(6, seed=6), strict=True):
        row.update(new)


@pytest.mark.parametrize("change, kind", [(_replaced, list), (_edited, list), (_edited, tuple)])
def test_rows_that_change_in_place_are_read_again(make_trainer, change, kind):
    trainer, rows = make_trainer(), kind(addition_rows(6, seed=5))
    before = trainer.evaluate(rows)["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == before
    change(rows)
    right = trainer.evaluate(addition_dataset(6, seed=6))["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == trainer.predict(rows).metrics["test_loss"] == right != before


def test_a_format_that_comes_later_is_read(make_trainer):
    trainer, rows = make_trainer(), addition_dataset(6, seed=5)
    other = {row["prompt"]: new for row, new in zip(rows, addition_rows(6, seed=6), strict=True)}
    trainer.evaluate(rows)
    columns = ("prompt", "completion")
    rows.set_transform(lambda batch: {name: [other[prompt][name] for prompt in batch["prompt"]] for name in columns})
    assert trainer.evaluate(rows)["eval_loss"] == trainer.evaluate(addition_dataset(6, seed=6))["eval_loss"]


@pytest.mark.parametrize("call", [lambda t: t.evaluate(), lambda t: t.predict(None), lambda t: t.get_eval_dataloader()])
def test_no_rows_are_named(make_trainer, call):
    with pytest.raises(DatasetError, match="Got no rows to evaluate|Got None as the rows"):
        call(make_trainer())


def test_predictions_are_the_logits_of_the_rows(make_trainer):
    trainer = make_trainer()
    output = trainer.predict(addition_dataset(3, seed=5))
    rows = trainer.prepared(addition_dataset(3, seed=5), "test")
    for k, row in enumerate(rows):
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy()
        np.testing.assert_allclose(output.predictions[k, : len(logits)], logits, rtol=1e-4, atol=1e-5)


def test_predictions_are_in_the_order_of_the_rows(make_trainer):
    rows = addition_dataset(12, seed=5)
    expected = make_trainer().predict(rows)
    output = make_trainer(train_sampling_strategy="group_by_length", per_device_eval_batch_size=4).predict(rows)
    assert (output.label_ids == expected.label_ids).all()
    np.testing.assert_allclose(output.predictions[:, :5], expected.predictions[:, :5], rtol=1e-4, atol=1e-5)


def test_what_is_no_callback_is_refused_whenever_it_comes(make_trainer):
    for wrong in (3, {}, print, PrinterCallback().on_log):
        with pytest.raises(ConfigurationError, match=r"as `add_callback\(\)`; expected a list of TrainerCallbacks"):
            make_trainer().add_callback(wrong)


def test_the_loss_alone_is_predicted_where_that_is_asked_for(make_trainer):
    output = make_trainer(prediction_loss_only=True).predict(addition_dataset(3))
    assert output.predictions is None and output.metrics["test_loss"] > 0


def test_a_dictionary_of_raw_rows_is_evaluated_by_name(make_trainer):
    trainer = make_trainer(eval_dataset=addition_dataset(4, seed=9))
    sets = {"a": addition_dataset(6, seed=5), "b": addition_dataset(6, seed=6).to_iterable_dataset()}
    scores = trainer.evaluate(sets)
    for name, rows in sets.items():
        assert scores[f"eval_{name}_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-6)
    trainer.eval_dataset = sets
    assert trainer.evaluate()["eval_a_loss"] == scores["eval_a_loss"]
    with pytest.raises(DatasetError, match="no evaluation set called 'c'; expected one of .'a', 'b'"):
        trainer.evaluate("c")


@each_layout
def test_training_rows_may_be_put_in_later(make_trainer, rows_for, by_step, method, stream):
    """The right value: the run of a trainer that was given them at once."""
    rows = rows_for(method)(12, seed=4)
    rows = rows.to_iterable_dataset() if stream else rows
    settings = {"method": method, "max_steps": 2}
    if method == "dpkd" and stream:
        settings["chosen"] = "dataset"
    expected = make_trainer(train=rows, **settings)
    expected.train()
    trainer = make_trainer(**settings)
    trainer.train_dataset = rows
    trainer.train()
    assert by_step(trainer) == by_step(expected)


def test_training_rows_put_in_later_get_the_teachers_completions(make_trainer, by_step, tmp_path):
    rows = addition_dataset(12, seed=4).remove_columns("completion")
    expected = make_trainer(train=rows, seq_kd=True, max_steps=2, lmbda=0.0)
    expected.train()
    trainer = make_trainer(seq_kd=True, max_steps=2, lmbda=0.0)
    trainer.train_dataset = rows
    trainer.train()
    assert by_step(trainer) == by_step(expected)


@pytest.mark.parametrize("rows", ["rows.jsonl", 3, print])
def test_what_is_no_dataset_is_refused_whenever_it_comes(make_trainer, rows):
    trainer = make_trainer()
    with pytest.raises(DatasetError, match="expected datasets.Dataset"):
        trainer.predict(rows)
    trainer.train_dataset = rows
    with pytest.raises(DatasetError, match="expected datasets.Dataset"):
        trainer.train()


def test_rows_that_come_later_are_held_against_a_models_positions(make_trainer, make_student, caplog):
    trainer = make_trainer(make_student(max_position_embeddings=10))
    caplog.clear()
    trainer.evaluate(Dataset.from_list([{"prompt": "1+2=" * 4, "completion": "3"}] * 4))
    assert "positions" in caplog.text


def test_training_rows_of_another_layout_are_refused(make_trainer):
    pairs = Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8)
    trainer = make_trainer(method="dpkd")
    trainer.train_dataset = pairs
    with pytest.raises(DatasetError, match="of another layout than the trainer was made with"):
        trainer.train()


def test_rationales_are_no_rows_for_gkd(make_trainer):
    with pytest.raises(DatasetError, match="only the method `rationale` reads"):
        make_trainer().predict(addition_rationales(4))


# ---- The card -------------------------------------------------------------------------------------------------------


def _header(trainer):
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(card.split("---")[1]), card


def test_the_card_says_what_its_caller_wants(make_trainer):
    trainer = make_trainer(max_steps=1, eval_dataset=addition_dataset(4))
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(
        language="en",
        license="mit",
        tags="sums",
        model_name="Adder",
        finetuned_from="org/base",
        tasks=["text2text-generation", "maths"],
        dataset_tags="org/sums",
        dataset="Sums",
        dataset_args="two digits",
    )
    trainer.create_model_card()  # as at a later checkpoint: it says so still
    header, card = _header(trainer)
    assert header["language"] == "en" and header["license"] == "mit" and header["base_model"] == "org/base"
    assert {"sums", "maths", "distill_trainers"} <= set(header["tags"]) and header["datasets"] == ["org/sums"]
    assert header["pipeline_tag"] == "text2text-generation" and header["model-index"][0]["name"] == "Adder"
    assert "\n# Adder\n" in card and "- Data: Sums (two digits)" in card


def test_the_card_takes_the_words_of_trl(make_trainer):
    trainer = make_trainer(hub_model_id="me/student")
    trainer.create_model_card(model_name="student", dataset_name="org/rows", tags=["trl", "trl"])
    header, card = _header(trainer)
    assert header["datasets"] == ["org/rows"] and header["tags"].count("trl") == 1
    assert "\n# me/student\n" in card, "push_to_hub passes the last part of the repository as a name"


def test_lists_and_languages(make_trainer):
    trainer = make_trainer()
    trainer.create_model_card(
        language=["en", "de"], dataset=["A", "B"], dataset_args=["x"], dataset_tags=["o/a", "o/b"]
    )
    header, card = _header(trainer)
    assert header["language"] == ["en", "de"] and header["datasets"] == ["o/a", "o/b"]
    assert "- Data: A (x), B" in card


def test_a_printer_can_be_removed(make_trainer):
    trainer = make_trainer()
    trainer.remove_callback(PrinterCallback)
    assert not any(isinstance(callback, PrinterCallback) for callback in trainer.callback_handler.callbacks)


def test_a_search_without_students_is_refused_by_name(make_trainer):
    with pytest.raises(ConfigurationError, match="model_init=function"):
        make_trainer(method="minillm").hyperparameter_search(n_trials=1)


def test_the_card_of_tuples_is_read_by_the_hub(make_trainer):
    trainer = make_trainer()
    trainer.create_model_card(language=("en", "de"), tags=("a", "b"), dataset_tags={"o/a"}, dataset=("A",))
    header, card = _header(trainer)
    assert header["language"] == ["en", "de"] and header["datasets"] == ["o/a"] and {"a", "b"} <= set(header["tags"])


@pytest.mark.parametrize(
    "wish",
    [{"finetuned_from": ["a/b"]}, {"language": 3}, {"tags": [1]}, {"dataset_args": {"a": 1}}, {"license": ["x"]}],
)
def test_what_is_no_text_is_refused_on_a_card(make_trainer, wish):
    with pytest.raises(ConfigurationError, match=f"Got `{next(iter(wish))}=.* expected a text"):
        make_trainer().create_model_card(**wish)
