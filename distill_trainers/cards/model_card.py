"""The README.md that goes with a distilled student: what it is, how good, how to repeat it, and under which terms."""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import models
from ..evaluation.results import FILE_NAME, EvaluationResults
from ..exceptions import DatasetError
from ..run_files import STUDENT_INIT_NAME, shown
from .licenses import Inherited, Licensed, inherit, licensed
from .scores import CardScores, scores_of_evaluation, scores_of_run

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..trainers.base import DistillTrainer

_BEGIN, _END = "<!-- scores -->", "<!-- end of scores -->"  # what `with_scores` puts others between
_PROJECT = "[distill_trainers](https://pypi.org/project/distill-trainers/)"
_PLOTS = {"loss.png": "Training loss by optimiser step", "agreement.png": "Held-out agreement with the teacher by step"}


def model_card(trainer: DistillTrainer, *, merged: bool = False, plots: Sequence[str] = ()) -> str:
    """Markdown with a YAML header: what was distilled from what, how, with which result, and whom to credit.

    Args:
        merged: of the student with its adapter merged into it.
        plots: paths beside the card.
    """
    from huggingface_hub import ModelCardData

    facts, args = trainer.recorder.facts(), trainer.args
    name = args.hub_model_id or "A distilled student"
    adapter = models.is_peft(trainer.model) and not merged
    base = _base(trainer)
    terms = inherited_terms(trainer)
    scores = _scores(trainer)
    on_hub = not models.looks_like_path(base) if base else False  # the Hub takes nothing else
    header = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[each for each in trainer.data_sources if not models.looks_like_path(each)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=None if models.is_encoder_decoder(trainer.model) else "text-generation",
        tags=["distill_trainers", "knowledge-distillation", trainer.method_name.lower()],
        model_name=name.rpartition("/")[2],
        eval_results=scores.index or None,
    )
    for key, value in terms.metadata().items():
        header[key] = value
    if on_hub:
        header["base_model_relation"] = "adapter" if adapter else "finetune"
    if not scores.index:
        header.pop("model_name")
    lines = [
        *("---", header.to_yaml(), "---", "", f"# {name}", ""),
        f"{'This adapter' if adapter else 'This model'} was distilled from {_source(trainer)} into {_student(trainer)} "
        f"with {trainer.method_name}, using {_PROJECT} {facts['versions'].get('distill-trainers', '(unreleased)')}.",
        "",
        *_usage(trainer, name if args.hub_model_id else "path/to/this/folder"),
        *("", "## Scores", "", _BEGIN, *scores.lines, _END, "", "## Training", ""),
        *_training(trainer, facts),
        *(line for file in plots for line in ("", f"![{_PLOTS.get(Path(file).name, Path(file).stem)}]({file})")),
        *("", "## How to reproduce", ""),
        *_reproduction(trainer, facts),
        *("", "## Limits", "", *_limits(trainer)),
        *("", "## Licence", "", *license_lines(terms)),
        *("", "## Method and citation", "", *_citation(trainer.paper)),
    ]
    return "\n".join(lines) + "\n"


def inherited_terms(trainer: DistillTrainer) -> Inherited:
    """Licences of teacher, initial weights and data, and what follows for the student."""
    from ..teachers import NoTeacher

    token = trainer.args.hub_token
    sources: list[Licensed] = []
    teacher = None if isinstance(trainer.teacher, NoTeacher) else trainer.teacher.name
    if teacher is not None:
        # A teacher in memory without a source goes by the name of its class.
        named = models.looks_like_path(teacher) or "/" in teacher
        sources.append(
            licensed("teacher", teacher if named else None, shown_as=None if named else teacher, token=token)
        )
    sources.append(licensed("student", _base(trainer), token=token))
    if not trainer.data_sources:
        sources.append(licensed("data", None))
    sources += [licensed("data", each, token=token) for each in trainer.data_sources]
    return inherit(sources, trainer.args.hub_model_id, trainer.args.card_license)


def with_scores(card: str, results: EvaluationResults, student: str) -> str:
    """A card with the scores of an evaluation in place of those it had.

    Raises:
        DatasetError: the student is not among the results, or the text is no card of this package.
    """
    from huggingface_hub import ModelCard

    scores = scores_of_evaluation(results, student)
    if scores is None or _BEGIN not in card or _END not in card:
        names = ", ".join(model.source for model in results.of_role("student")) or "none"
        raise DatasetError(
            f"The scores do not belong to this card: it is of {student!r}, they are of {names}. Evaluate this student, "
            "or leave them out."
        )
    head, _, rest = card.partition(_BEGIN)
    parsed = ModelCard("\n".join([head + _BEGIN, *scores.lines, _END + rest.partition(_END)[2]]))
    parsed.data["model_name"] = re.sub(r"^.*/", "", _title(card) or student)
    parsed.data["eval_results"] = scores.index
    return str(parsed)


def _title(card: str) -> str:
    found = re.search(r"^# (.+)$", card, re.MULTILINE)
    return found[1] if found else ""


def _scores(trainer: DistillTrainer) -> CardScores:
    folder = Path(trainer.args.output_dir)
    for place in (folder, folder / "evaluation"):
        if (place / FILE_NAME).is_file():
            try:
                found = scores_of_evaluation(EvaluationResults.load(place), folder.resolve().name)
            except DatasetError as error:
                logger.warning("The card gets the run's own scores: %s", error)
                continue
            if found is not None:
                return found
    # The log has what callbacks added to an evaluation.
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    metrics = {**logged, **trainer.last_eval_metrics}
    return scores_of_run(metrics, str(trainer.recorder.recipe.get("eval_dataset") or "held-out rows"))


def _base(trainer: DistillTrainer) -> str | None:
    """What the student was before training: the teacher, where it was made from it."""
    source = models.source_of(trainer.model)
    made = _made_from(source)
    return made["teacher"] if made else source


def _made_from(source: str | None) -> dict[str, Any] | None:
    """How a student was made from its teacher, if it was."""
    file = Path(source, f"{STUDENT_INIT_NAME}.json") if source else None
    if file is None or not file.is_file():
        return None
    made = json.loads(file.read_text(encoding="utf-8"))
    return made if made.get("teacher") else None


def _student(trainer: DistillTrainer) -> str:
    source = models.source_of(trainer.model)
    made = _made_from(source)
    if made is not None:
        kept = made.get("keep_layers")
        count = len(kept) if isinstance(kept, list) else kept
        return f"{count} of the layers of `{shown(made['teacher'])}`"
    return f"`{shown(source)}`" if source else f"a `{type(models.causal_lm_of(trainer.model)).__name__}`"


def _source(trainer: DistillTrainer) -> str:
    from ..teachers import NoTeacher

    if isinstance(trainer.teacher, NoTeacher):
        return "the text of its training data"
    return f"`{shown(trainer.teacher.name)}`"


def _usage(trainer: DistillTrainer, name: str) -> list[str]:
    if models.is_encoder_decoder(trainer.model):
        loads = ["from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", ""]
        code = [f'model = AutoModelForSeq2SeqLM.from_pretrained("{name}")']
        code += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    else:
        chats = bool(getattr(trainer.processing_class, "chat_template", None))
        prompt = '[{"role": "user", "content": "…"}]' if chats else '"…"'
        loads = ["from transformers import pipeline", ""]
        code = [f'generate = pipeline("text-generation", model="{name}")']
        code += [f'print(generate({prompt}, max_new_tokens=128)[0]["generated_text"])']
    return ["```python", *loads, *code, "```"]


def _training(trainer: DistillTrainer, facts: dict[str, Any]) -> list[str]:
    args, data = trainer.args, [f"`{shown(each)}`" for each in trainer.data_sources]
    train: Any = trainer.train_dataset
    rows = len(train) if hasattr(train, "__len__") else None
    sizes = [f"{models.num_parameters(trainer.model):,} parameters"]
    if models.is_peft(trainer.model):
        sizes.append(f"{models.num_parameters(trainer.model, trainable_only=True):,} of them trained, in an adapter")
    seconds = sum(float(each.get("train_runtime", 0)) for each in trainer.state.log_history)
    where = f"{facts['processes']} × {facts['device']}"
    lines = [
        f"- Data: {', '.join(data) or 'a dataset in memory'}" + (f", {rows:,} rows" if rows is not None else ""),
        f"- Student: {', '.join(sizes)}",
        f"- Optimiser steps: {trainer.state.global_step:,}, {trainer.state.epoch or 0:.2f} epochs",
        f"- Run on: {where}" + (f", {seconds:,.1f} s" if seconds else ""),
        *(f"- `{name}`: {value}" for name, value in _settings(trainer).items()),
    ]
    return lines if args.max_steps <= 0 or trainer.state.global_step >= args.max_steps else [
        *lines, "- Training was not finished when this card was written.",
    ]  # fmt: skip


def _settings(trainer: DistillTrainer) -> dict[str, Any]:
    """The method's own settings and the ones of the optimiser that decide a run."""
    args = trainer.args
    own = [name for name in type(args).__dataclass_fields__ if name in type(args).__dict__.get("__annotations__", {})]
    shared = ["learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "weight_decay"]
    shared += ["per_device_train_batch_size", "gradient_accumulation_steps", "kd_temperature", "temperature", "seed"]
    shared += ["teacher_cache_kind"] if args.teacher_cache else []
    shared += ["teacher_placement"] if args.teacher_placement != "auto" else []
    chosen = {name: getattr(args, name) for name in own + shared}
    plain = {name: getattr(value, "value", value) for name, value in chosen.items() if value is not None}
    return {name: shown(value) if isinstance(value, str) else value for name, value in plain.items()}


def _reproduction(trainer: DistillTrainer, facts: dict[str, Any]) -> list[str]:
    from ..trainers import METHODS

    named = [name for name, row in METHODS.items() if row and isinstance(trainer, row[1])]
    method = named[0] if named else trainer.method_name
    recipe = {"method": method, **facts["recipe"]}
    if "teacher_model_name_or_path" not in recipe and trainer.args.needs:
        recipe["teacher_model_name_or_path"] = facts["teacher"]
    if "student_init" not in recipe and "model_name_or_path" not in recipe:
        recipe["model_name_or_path"] = facts["student"]
    recipe["seed"] = trainer.args.seed
    recipe = {key: value for key, value in recipe.items() if not key.startswith(("hub_", "push_to_hub", "card_"))}
    versions = " ".join(
        f"{name}=={version.partition('+')[0]}" for name, version in facts["versions"].items() if name != "python"
    )
    command = "distill-trainers train --config recipe.yaml --output_dir student"
    if facts["processes"] > 1:
        command = f"accelerate launch --num_processes {facts['processes']} -m distill_trainers.cli.train"
        command += " --config recipe.yaml --output_dir student"
    return [
        f"With Python {facts['versions'].get('python', '3.11')}, and this as `recipe.yaml` (names without an owner are "
        "files or folders of the machine that it ran on):",
        "",
        *("```yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(), "```", ""),
        *("```bash", f"pip install {versions}", command, "```"),
    ]


def _limits(trainer: DistillTrainer) -> list[str]:
    from ..teachers import NoTeacher

    args = trainer.args
    lines = [f"- Trained on text of up to {args.max_length} tokens; longer text was not seen."]
    if not isinstance(trainer.teacher, NoTeacher):
        lines.append("- A student repeats its teacher's mistakes and biases, and adds its own where it is weaker.")
    lines.append("- Only what stands under Scores was measured. Safety was not evaluated.")
    if models.is_peft(trainer.model):
        lines.append("- It is trained as an adapter: what the base model cannot do, it mostly cannot do either.")
    return lines


def license_lines(terms: Inherited, what: str = "this model") -> list[str]:
    """Markdown: what each licence is, conflicts, what is unknown, and what follows."""
    lines = [f"- {each.role}: {each.name} — {each.license or 'unknown'}" for each in terms.sources]
    if terms.conflicts:
        lines += ["", f"**These licences conflict**, so none follows for {what}:", ""]
        lines += [f"- {each}" for each in terms.conflicts]
    if terms.unknown:
        lines += ["", f"Not known, and to be found out before {what} is used or passed on:", ""]
        lines += [f"- {each}" for each in terms.unknown]
    if terms.notes:
        lines += ["", *(f"- {each}" for each in terms.notes)]
    if terms.license:
        lines += ["", f"Licence of {what}: {terms.license}."]
    return [*lines, "", "Put together from cards by rule; this is no legal advice."]


def _citation(paper: dict[str, str]) -> list[str]:
    if not paper:
        return ["The method has no paper."]
    text = f"{paper['authors']}: *{paper['title']}* ({paper['year']}), "
    text += f"[arXiv:{paper['id']}](https://arxiv.org/abs/{paper['id']})."
    first = paper["authors"].partition(",")[0].lower().replace(" ", "")
    entry = f"""
        @misc{{{first}{paper["year"]}distillation,
          title = {{{paper["title"]}}},
          author = {{{" and ".join(paper["authors"].split(", "))}}},
          year = {{{paper["year"]}}},
          eprint = {{{paper["id"]}}},
          archivePrefix = {{arXiv}},
        }}"""
    return [text, "", "```bibtex", *textwrap.dedent(entry).strip().splitlines(), "```"]
