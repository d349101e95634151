"""Train a student from a recipe.

accelerate launch [--config_file accelerate_configs/….yaml] -m distill_trainers.cli.train --config recipes/….yaml
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..exceptions import DatasetError
from ..hub import address_of, published_files
from ..locks import holding_run
from ..manifest import is_whole, write_manifest
from ..recipe.checks import check_recipe, refuse_to_start_over, student_identity
from ..recipe.parse import Recipe, parse_recipe
from ..storage import check_folder, write_file, writing, writing_folder
from . import report_errors, say, start_log
from .doctor import look_before
from .orphans import end_with_launcher

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Parse, check, train, evaluate, save."""
    start_log()
    end_with_launcher()
    recipe = parse_recipe(argv)
    if recipe.run.dry_run:
        from .plan import make_plan, print_plan

        print_plan(make_plan(recipe))
        return 0
    run(recipe)
    return 0


def build_trainer(recipe: Recipe, look: Callable[[Recipe, Any], None] | None = None) -> Any:
    """Build the recipe's trainer, ready to train. What can be refused without weights is refused before they load.

    Args:
        look: called with what the checks have read, before anything is loaded.
    """
    from transformers import EarlyStoppingCallback
    from trl import get_peft_config, get_quantization_config

    from ..trainers import METHODS
    from ..trainers.lifecycle.callbacks import InterruptCallback
    from ..trainers.lifecycle.recording import changed_settings
    from .finished_run import remember
    from .progress import ProgressReport

    settings, args = recipe.run, recipe.args
    checked = check_recipe(recipe)
    if look is not None:
        look(recipe, checked)
    student = recipe.model.model_name_or_path
    if student is None:
        student = str(make_initial_student(recipe, checked.ready.rows()[0]))
    args.model_init_kwargs = {**_model_init_kwargs(recipe.model), **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    args.disable_tqdm = True
    callbacks: list[Any] = [progress := ProgressReport()]
    if settings.early_stopping_patience:
        args.metric_for_best_model = args.metric_for_best_model or "eval_perplexity"
        args.greater_is_better = bool(args.greater_is_better)  # None means that less is better
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    data = checked.ready.given
    more = {} if data.text is None else {"pretraining_dataset": data.text}
    trainer = METHODS[settings.method][1](
        model=student,
        teacher_model=settings.teachers or settings.teacher_model_name_or_path,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        callbacks=callbacks,
        peft_config=get_peft_config(recipe.model),
        quantization_config=get_quantization_config(recipe.model),
        **more,
    )
    progress.terms = lambda: trainer.loss_weights
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # ProgressReport takes its place
    trainer.add_callback(InterruptCallback(trainer.teacher, trainer.accelerator))
    if args.should_save:
        remember(recipe, trainer.processing_class, data.evaluation)
    trainer.data_sources = [source for source in (settings.dataset, settings.pretraining_dataset) if source]
    trainer.recorder.recipe = changed_settings(settings) | changed_settings(recipe.model) | trainer.recorder.recipe
    return trainer


def run(recipe: Recipe) -> Any:
    """Train, evaluate, save and upload the recipe's student; return the trainer.

    Raises:
        ConfigurationError: among others, another process is writing to `output_dir`.
    """
    check_folder("output_dir", recipe.args.output_dir, writable=False)
    with holding_run(recipe.args.output_dir):
        return _run(recipe)


def _run(recipe: Recipe) -> Any:
    from .progress import stop_progress

    refuse_to_start_over(recipe.args)
    trainer = build_trainer(recipe, look_before if recipe.run.doctor else None)
    try:
        result = trainer.train(resume_from_checkpoint=recipe.args.resume_from_checkpoint)
        interrupted = any(getattr(c, "asked", False) for c in trainer.callback_handler.callbacks)
        metrics = dict(result.metrics)
        if trainer.eval_dataset is not None and not interrupted:
            metrics |= trainer.evaluate()
        _save(trainer, metrics)
        if interrupted and trainer.is_world_process_zero():
            print(f"Stopped at step {trainer.state.global_step}. Go on with `--resume_from_checkpoint true`.")
        if recipe.args.push_to_hub and not interrupted:
            trainer.push_to_hub()
            if trainer.is_world_process_zero():
                names = ", ".join(published_files(trainer.published_folder))
                address = address_of(trainer.hub_model_id)
                say(f"Uploaded {trainer.published_folder} to {address} . Files: {names}.")
    finally:
        stop_progress(trainer)
    return trainer


def _save(trainer: Any, metrics: dict[str, Any]) -> None:
    """The student, its card and its scores. Nothing is uploaded yet."""
    folder = Path(trainer.args.output_dir)
    remedy = "Checkpoints are as they were: free some space and go on with `--resume_from_checkpoint true`."
    with writing("the student", folder, remedy):
        trainer.save_model(_internal_call=True)
        trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    remedy = f"The student is in {folder}; free some space to have them beside it."
    write_file(folder / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True), "the scores", remedy)
    trainer.create_model_card()
    say(f"Saved the student to {folder} (scores in {folder / 'metrics.json'}).")


def make_initial_student(recipe: Recipe, rows: Any) -> Path:
    """Make the student from the teacher's weights, once: `<output_dir>/student_init`, an ordinary model folder.

    It is made on one process and read by all, so it also works where weights are sharded as they are loaded. What was
    measured, and what it keeps, is beside it.

    Args:
        rows: tokenised training data; some of it is what importance is measured on.
    """
    from accelerate import PartialState

    from ..run_files import STUDENT_INIT_NAME

    folder = Path(recipe.args.output_dir) / STUDENT_INIT_NAME
    identity = student_identity(recipe)
    with PartialState().main_process_first():
        if not is_whole(folder, identity):
            _make_student(recipe, rows, folder, identity)
    return folder


def _make_student(recipe: Recipe, rows: Any, folder: Path, identity: dict[str, Any]) -> None:
    from ..models import check_answers, load_causal_lm, load_tokenizer, num_parameters, whole_loading
    from ..students import CHOICE_NAME, StudentInit, take

    name, args = recipe.run.teacher_model_name_or_path, recipe.args
    init = StudentInit.from_dict(dict(recipe.run.student_init))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
    with whole_loading():
        teacher = load_causal_lm(name, role="teacher", **kwargs)  # type: ignore[arg-type]
    teacher.to(args.device)
    check_answers(teacher, f"The teacher {name!r}")
    batches = None
    if init.needs_text:
        batches = _importance_batches(recipe, teacher, tokenizer, rows, init.importance_batches)
    choice = init.choose(teacher, batches, progress=_print_layers, told=lambda tried: say(f"Tried {tried}"))
    student = take(teacher, choice, copy=False)  # nobody else has this teacher: both are never in memory
    remedy = "Free some space, or set another `output_dir`, and start again."
    with writing_folder(folder, "the student", remedy) as whole:
        student.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        write_file(whole / CHOICE_NAME, choice.to_json(), "what the student keeps", remedy)
        write_manifest(whole, identity)
    say(f"Made a student of {num_parameters(student):,} parameters in {folder}.")


def _importance_batches(recipe: Recipe, teacher: Any, tokenizer: Any, rows: Any, number: int) -> Any:
    """Batches of the first training rows; prompts alone are completed by the teacher, into the run's own store."""
    from torch.utils.data import DataLoader

    from ..data import DistillCollator
    from ..rollouts import Alone, complete_prompts
    from ..teachers import LocalTeacher
    from ..trainers.lifecycle.completions import (
        completion_settings,
        completion_store,
        prompts_to_complete,
        sampling_settings,
        teachers_text,
        with_completions,
    )

    args, size = recipe.args, 8
    dataset = rows.take(number * size)
    if not hasattr(dataset, "__len__"):
        from datasets import Dataset

        dataset = Dataset.from_list(list(dataset))
    if not len(dataset):
        raise DatasetError("The training data has no rows to measure on what matters.")
    prompts = prompts_to_complete(dataset, replace=False)
    if prompts:
        sampling = sampling_settings(args, teacher, tokenizer, None)
        settings = completion_settings(args, sampling, tokenizer, teachers_text(args))
        store = completion_store(args, settings, teacher=LocalTeacher(teacher).fingerprint())
        generating = contextlib.nullcontext(teacher.eval())
        completions = complete_prompts(prompts, generating, Alone(args.device), settings, store)
        dataset = with_completions(dataset, completions, replace=False)
    return DataLoader(dataset, batch_size=size, collate_fn=DistillCollator(tokenizer.pad_token_id))


def _print_layers(batch: int, layer: int) -> None:
    if layer == 1 or layer % 10 == 0:
        print(f"Measuring layers: batch {batch + 1}, layer {layer}", flush=True)


def _model_init_kwargs(model: Any) -> dict[str, Any]:
    chosen = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    if model.model_name_or_path is None or os.path.exists(model.model_name_or_path):
        chosen.pop("revision")
    return {name: value for name, value in chosen.items() if value is not None}


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
