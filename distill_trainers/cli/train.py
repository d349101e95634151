"""Train a student from a recipe.

accelerate launch [--config_file accelerate_configs/….yaml] -m distill_trainers.cli.train --config recipes/….yaml
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..exceptions import DatasetError
from . import report_errors
from .recipe import Recipe, parse_recipe

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Parse, check, train, evaluate, save."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    recipe = parse_recipe(argv)
    if recipe.run.dry_run:
        from .plan import make_plan, print_plan

        print_plan(make_plan(recipe, *load_datasets(recipe)))
        return 0
    run(recipe)
    return 0


def load_datasets(recipe: Recipe) -> tuple[Any, Any]:
    """Training and evaluation rows as the recipe names them."""
    from ..data import load_split, train_eval_split

    settings = recipe.run
    train = load_split(
        settings.dataset,  # type: ignore[arg-type]
        name=settings.dataset_config,
        split=settings.dataset_split,
        streaming=settings.streaming,
    )
    evaluation = None
    if settings.eval_dataset:
        evaluation = load_split(settings.eval_dataset, name=settings.dataset_config, split=settings.eval_split)
    elif settings.eval_fraction:
        held_out = settings.eval_fraction if settings.eval_fraction < 1 else int(settings.eval_fraction)
        train, evaluation = train_eval_split(train, held_out, recipe.args.seed)
    if settings.max_train_samples:
        train = train.take(settings.max_train_samples)
    return train, evaluation


def build_trainer(recipe: Recipe) -> Any:
    """The recipe's trainer, ready to train. Datasets are read before any weights."""
    from transformers import EarlyStoppingCallback
    from trl import get_peft_config, get_quantization_config

    from ..models import check_model_source
    from ..trainers import METHODS
    from ..trainers.callbacks import InterruptCallback
    from .progress import ProgressReport

    settings, args = recipe.run, recipe.args
    check_model_source(settings.teacher_model_name_or_path, "teacher")  # type: ignore[arg-type]
    if recipe.model.model_name_or_path:
        check_model_source(recipe.model.model_name_or_path, "student")
    train, evaluation = load_datasets(recipe)
    student = recipe.model.model_name_or_path or str(make_initial_student(recipe, train))
    args.model_init_kwargs = {**_model_init_kwargs(recipe.model), **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    args.disable_tqdm = True
    callbacks: list[Any] = [ProgressReport()]
    if settings.early_stopping_patience:
        args.metric_for_best_model = args.metric_for_best_model or "eval_perplexity"
        args.greater_is_better = bool(args.greater_is_better)  # None means that less is better
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer = METHODS[settings.method][1](
        model=student,
        teacher_model=settings.teacher_model_name_or_path,  # type: ignore[arg-type]
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=callbacks,
        peft_config=get_peft_config(recipe.model),
        quantization_config=get_quantization_config(recipe.model),
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # ProgressReport takes its place
    trainer.add_callback(InterruptCallback(trainer))
    return trainer


def run(recipe: Recipe) -> Any:
    """Train and save the recipe's student; returns the trainer."""
    trainer = build_trainer(recipe)
    args = recipe.args
    resume: str | bool | None = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    result = trainer.train(resume_from_checkpoint=resume)
    stopped_early = any(getattr(c, "asked", False) for c in trainer.callback_handler.callbacks)
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None and not stopped_early:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        file = Path(args.output_dir) / "metrics.json"
        file.write_text(json.dumps(metrics, indent=2, sort_keys=True))
        if stopped_early:
            print(f"Stopped at step {trainer.state.global_step}. Go on with `--resume_from_checkpoint true`.")
        else:
            print(f"Saved the student to {args.output_dir} (scores in {file}).")
    if args.push_to_hub and not stopped_early:
        trainer.push_to_hub()
    return trainer


def make_initial_student(recipe: Recipe, train_dataset: Any) -> Path:
    """Make the student from the teacher's layers, once: `<output_dir>/student_init`, an ordinary model folder.

    It is made on one process and read by all, so it also works where weights are sharded as they are loaded.
    """
    from accelerate import PartialState

    folder = Path(recipe.args.output_dir) / "student_init"
    marker = folder / "student_init.json"
    wanted = {"teacher": recipe.run.teacher_model_name_or_path, **recipe.run.student_init}  # type: ignore[dict-item]
    with PartialState().main_process_first():
        if not (marker.is_file() and json.loads(marker.read_text()) == wanted):
            _make_student(recipe, train_dataset, folder)
            marker.write_text(json.dumps(wanted))
    return folder


def _make_student(recipe: Recipe, train_dataset: Any, folder: Path) -> None:
    from ..models import load_causal_lm, load_tokenizer, whole_loading
    from ..students import StudentInit

    name, args = recipe.run.teacher_model_name_or_path, recipe.args
    init = StudentInit.from_dict(dict(recipe.run.student_init))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
    with whole_loading():
        teacher = load_causal_lm(name, role="teacher", **kwargs)  # type: ignore[arg-type]
    teacher.to(args.device)
    batches = _importance_batches(recipe, teacher, tokenizer, train_dataset) if init.strategy == "importance" else None
    student = init.build(teacher, batches, progress=_print_layers)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _importance_batches(recipe: Recipe, teacher: Any, tokenizer: Any, train_dataset: Any) -> Any:
    """A few batches of training text; prompts alone are completed by the teacher, into the run's own store."""
    from torch.utils.data import DataLoader

    from ..data import DistillCollator, prepare_dataset
    from ..students import StudentInit
    from ..teachers import LocalTeacher
    from ..trainers.completions import (
        complete_prompts,
        completion_store,
        prompts_to_complete,
        sampling_settings,
        with_completions,
    )

    args, size = recipe.args, 8
    rows = StudentInit.from_dict(dict(recipe.run.student_init)).importance_batches * size  # type: ignore[arg-type]
    dataset = train_dataset.take(rows)
    if not hasattr(dataset, "__len__"):
        from datasets import Dataset

        dataset = Dataset.from_list(list(dataset))
    if not len(dataset):
        raise DatasetError("The training data has no rows to measure layers on.")
    dataset = prepare_dataset(
        dataset,
        tokenizer,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        column_mapping=args.column_mapping,  # type: ignore[arg-type]
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
        needs="either",
    )
    prompts = prompts_to_complete(dataset, replace=False)
    if prompts:
        sampling = sampling_settings(args, teacher, tokenizer, None)
        store = completion_store(args, LocalTeacher(teacher), sampling)
        context = contextlib.nullcontext(teacher.eval())
        how = {"seed": args.seed, "device": args.device, "batch_size": args.rollout_batch_size}
        complete_prompts(prompts, store, sampling, context, **how)  # type: ignore[arg-type]
        dataset = with_completions(dataset, store.load(), replace=False)
    return DataLoader(dataset, batch_size=size, collate_fn=DistillCollator(tokenizer.pad_token_id))


def _print_layers(batch: int, layer: int) -> None:
    if layer == 1 or layer % 10 == 0:
        print(f"Measuring layers: batch {batch + 1}, layer {layer}", flush=True)


def _model_init_kwargs(model: Any) -> dict[str, Any]:
    chosen = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    if model.model_name_or_path is None or Path(model.model_name_or_path).exists():
        chosen.pop("revision")
    return {name: value for name, value in chosen.items() if value is not None}


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
