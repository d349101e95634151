"""The README.md that goes with a distilled student."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from ..trainers.base import DistillTrainer

_SCORES = {
    "loss": "Loss",
    "kl": "Forward KL to the teacher (nats/token)",
    "top1_agreement": "Top-1 agreement with the teacher",
    "accuracy": "Accuracy",
    "perplexity": "Perplexity",
    "teacher_perplexity": "Perplexity of the teacher",
}


def model_card(trainer: DistillTrainer) -> str:
    """Markdown with a YAML header: what was distilled from what, how, with which result, and whom to credit."""
    from ..models import looks_like_path, source_of

    base = source_of(trainer.model)
    student = _shown(base) if base else type(trainer.model).__name__
    header: dict[str, Any] = {
        "library_name": "peft" if hasattr(trainer.model, "peft_config") else "transformers",
        "tags": ["distill_trainers", "knowledge-distillation", trainer.method_name.lower()],
    }
    if base and not looks_like_path(base):  # the Hub takes nothing else
        header["base_model"] = base
    paper = trainer.paper
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {trainer.args.hub_model_id or 'A distilled student'}",
        "",
        f"This model was distilled from {_source(trainer)} into `{student}` with "
        f"{trainer.method_name}, using [distill_trainers](https://pypi.org/project/distill-trainers/) "
        f"{_version('distill-trainers')}.",
        "",
        "## Scores on the evaluation set",
        "",
        *_score_table(trainer.last_eval_metrics),
        "",
        "## Training",
        "",
        *(f"- `{name}`: {value}" for name, value in _settings(trainer).items()),
        f"- Optimiser steps: {trainer.state.global_step}",
        f"- transformers {_version('transformers')}, torch {_version('torch')}",
    ]
    if paper:
        lines += [
            "",
            "## Method",
            "",
            f"{paper['authors']}: *{paper['title']}* ({paper['year']}), "
            f"[arXiv:{paper['id']}](https://arxiv.org/abs/{paper['id']}).",
        ]
    return "\n".join(lines) + "\n"


def _source(trainer: DistillTrainer) -> str:
    from ..teachers import NoTeacher

    if isinstance(trainer.teacher, NoTeacher):
        return "the text of its training data"
    return f"`{_shown(trainer.teacher.name)}`"


def _shown(name: str) -> str:
    """A model's Hub id, or the name of its folder: where that lies is nobody's business."""
    from ..models import looks_like_path

    return Path(name).name if looks_like_path(name) else name


def _score_table(metrics: dict[str, float]) -> list[str]:
    """One column per evaluation set: `eval_loss` of the only one, `eval_<set>_loss` of several."""
    sets = [key.removesuffix("_tokens") for key in metrics if key.endswith("_tokens")]
    if not sets:
        return ["No evaluation was run."]
    heads = ["Value" if key == "eval" else key.removeprefix("eval_") for key in sets]
    rows = [
        [title, *(f"{metrics[f'{key}_{name}']:.4f}" for key in sets)]
        for name, title in _SCORES.items()
        if all(f"{key}_{name}" in metrics for key in sets)
    ]
    return [f"| {' | '.join(row)} |" for row in (["Measure", *heads], ["---"] * (len(sets) + 1), *rows)]


def _settings(trainer: DistillTrainer) -> dict[str, Any]:
    """The method's own settings and the ones of the optimiser that decide a run."""
    args = trainer.args
    own = [name for name in type(args).__dataclass_fields__ if name in type(args).__dict__.get("__annotations__", {})]
    shared = ["learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "weight_decay"]
    shared += ["per_device_train_batch_size", "gradient_accumulation_steps", "kd_temperature", "temperature", "seed"]
    shared += ["teacher_cache_kind"] if args.teacher_cache else []
    shared += ["teacher_placement"] if args.teacher_placement != "auto" else []
    chosen = {name: getattr(args, name) for name in own + shared}
    return {name: getattr(value, "value", value) for name, value in chosen.items() if value is not None}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unreleased)"
