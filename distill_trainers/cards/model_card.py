"""The README.md that goes with a distilled student: what it is, how good, how to repeat it, and under which terms."""

from __future__ import annotations

import html
import json
import logging
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import models
from ..escaping import code, fence, prose, visible
from ..evaluation.results import FILE_NAME, EvaluationResults
from ..exceptions import DatasetError
from ..installing import NAME, project_link, requirement
from ..manifest import sealed_settings
from ..redaction import redacted
from ..run_files import STUDENT_INIT_NAME, shown
from ..students import made_of
from .facts import CardFacts
from .licenses import Inherited, Licensed, inherit, licensed
from .scores import CardScores, scores_of_evaluation, scores_of_run

logger = logging.getLogger(__name__)

_BEGIN, _END = "<!-- scores -->", "<!-- end of scores -->"  # what `with_scores` puts others between
_PLOTS = {"loss.png": "Training loss by optimiser step", "agreement.png": "Held-out agreement with the teacher by step"}


def model_card(facts: CardFacts, *, merged: bool = False, plots: Sequence[str] = ()) -> str:
    """Write Markdown with a YAML header: what was distilled from what, how, with which result, credits.

    Args:
        merged: of the student with its adapter merged into it.
        plots: paths beside the card.
    """
    from huggingface_hub import ModelCardData

    record, name, wishes = facts.record, facts.title, facts.wishes
    adapter = facts.is_adapter and not merged
    base = shown(wishes.finetuned_from) if wishes.finetuned_from else _base(facts)
    terms = inherited_terms(facts)
    scores = _scores(facts)
    on_hub = not models.looks_like_path(base) if base else False  # the Hub takes nothing else
    data = [source for source in facts.data + wishes.datasets if not models.looks_like_path(source)]
    task = None if facts.is_encoder_decoder else "text-generation"
    tags = ["generated_from_trainer", "distill_trainers", "knowledge-distillation", record["method"].lower()]
    header = ModelCardData(
        language=wishes.language,
        base_model=base if on_hub else None,
        datasets=list(dict.fromkeys(data)) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=wishes.tasks[0] if wishes.tasks else task,
        tags=list(dict.fromkeys([*tags, *wishes.tags, *wishes.tasks[1:]])),
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
        *("---", header.to_yaml(), "---", "", f"# {prose(name)}", ""),
        f"{'This adapter' if adapter else 'This model'} was distilled from {_source(facts)} into {_student(facts)} "
        f"with {record['method']}, using {project_link()} {record['versions'].get(NAME, '(unreleased)')}.",
        "",
        *_usage(facts, facts.repository or "path/to/this/folder"),
        *("", "## Scores", "", _BEGIN, *scores.lines, _END, "", "## Training", ""),
        *_training(facts),
        *(line for file in plots for line in ("", f"![{_PLOTS.get(Path(file).name, prose(Path(file).stem))}]({file})")),
        *("", "## How to reproduce", ""),
        *_reproduction(facts),
        *("", "## Limits", "", *_limits(facts)),
        *("", "## Licence", "", *license_lines(terms)),
        *("", "## Method and citation", "", *_citation(record["paper"])),
    ]
    return redacted(visible("\n".join(lines))) + "\n"


def inherited_terms(facts: CardFacts) -> Inherited:
    """Find licences of teacher, initial weights and data, and what follows for the student."""
    token = facts.hub_token
    sources: list[Licensed] = []
    for teacher in facts.teachers or ([] if facts.teacher is None else [facts.teacher]):
        # A teacher in memory without a source goes by the name of its class.
        named = models.looks_like_path(teacher) or "/" in teacher
        sources.append(
            licensed("teacher", teacher if named else None, shown_as=None if named else teacher, token=token)
        )
    sources.append(licensed("student", _base(facts), token=token))
    if not facts.data:
        sources.append(licensed("data", None))
    sources += [licensed("data", source, token=token) for source in facts.data]
    return inherit(sources, facts.repository, facts.card_license)


def with_scores(card: str, results: EvaluationResults, student: str) -> str:
    """Put the scores of an evaluation into a card in place of those it had.

    Raises:
        DatasetError: the student is not among the results, or the text is no card of this package.
    """
    from huggingface_hub import ModelCard

    scores = scores_of_evaluation(results, student)
    begin, end = f"\n{_BEGIN}\n", f"\n{_END}\n"  # on lines of their own: a name may hold them too
    if scores is None or begin not in card or end not in card:
        names = ", ".join(model.source for model in results.of_role("student")) or "none"
        raise DatasetError(
            f"The scores do not belong to this card: it is of {student!r}, they are of {names}. Evaluate this student, "
            "or leave them out."
        )
    head, _, rest = card.partition(begin)
    parsed = ModelCard("\n".join([f"{head}\n{_BEGIN}", *scores.lines, f"{_END}\n{rest.partition(end)[2]}"]))
    parsed.data["model_name"] = re.sub(r"^.*/", "", _title(card) or student)
    parsed.data["eval_results"] = scores.index
    return str(parsed)


def _title(card: str) -> str:
    heading = re.search(r"^# (.+)$", card, re.MULTILINE)
    return html.unescape(re.sub(r"\\(.)", r"\1", heading[1])) if heading else ""


def _scores(facts: CardFacts) -> CardScores:
    for place in (facts.folder, facts.folder / "evaluation"):
        if (place / FILE_NAME).is_file():
            try:
                scores = scores_of_evaluation(EvaluationResults.load(place), facts.folder.resolve().name)
            except DatasetError as error:
                logger.warning("The card gets the run's own scores: %s", error)
                continue
            if scores is not None:
                return scores
    return scores_of_run(facts.metrics, str(facts.record["recipe"].get("eval_dataset") or "held-out rows"))


def _base(facts: CardFacts) -> str | None:
    """What the student was before training: the teacher, where it was made from it."""
    made = _made_from(facts.student)
    return made["teacher"] if made else facts.student


def _made_from(source: str | None) -> dict[str, Any] | None:
    """How a student was made from its teacher, if it was."""
    made = sealed_settings(source) if source and Path(source).name == STUDENT_INIT_NAME else {}
    return made if made.get("teacher") else None


def _student(facts: CardFacts) -> str:
    made = _made_from(facts.student)
    if made is not None:
        return made_of(made, code(shown(made["teacher"])))
    return code(shown(facts.student)) if facts.student else f"a {code(facts.student_class)}"


def _source(facts: CardFacts) -> str:
    return "the text of its training data" if facts.teacher is None else code(shown(facts.teacher))


def _usage(facts: CardFacts, name: str) -> list[str]:
    if facts.is_encoder_decoder:
        loads = ["from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", ""]
        lines = [f"model = AutoModelForSeq2SeqLM.from_pretrained({json.dumps(name)})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})"]
    else:
        prompt = '[{"role": "user", "content": "…"}]' if facts.chats else '"…"'
        loads = ["from transformers import pipeline", ""]
        loads = ["# integers: pip install torchao", *loads] if facts.settings.get("quantize_student") else loads
        lines = [f'generate = pipeline("text-generation", model={json.dumps(name)})']
        lines += [f'print(generate({prompt}, max_new_tokens=128)[0]["generated_text"])']
    return fence("\n".join([*loads, *lines]), "python")


def _training(facts: CardFacts) -> list[str]:
    record, data = facts.record, facts.data_names
    sizes = [f"{record['student_parameters']:,} parameters"]
    if facts.trained_parameters is not None:
        sizes.append(f"{facts.trained_parameters:,} of them trained, in an adapter")
    rows = f", {facts.rows:,} rows" if facts.rows is not None else ""
    seconds = f", {facts.seconds:,.1f} s" if facts.seconds else ""
    lines = [
        f"- Data: {', '.join(data) or 'a dataset in memory'}{rows}",
        f"- Student: {', '.join(sizes)}",
        f"- Optimiser steps: {facts.steps:,}, {facts.epochs:.2f} epochs",
        f"- Run on: {record['processes']} × {prose(record['device'])}{seconds}",
        *(f"- `{name}`: {prose(value)}" for name, value in facts.settings.items()),
    ]
    return lines if facts.is_finished else [*lines, "- Training was not finished when this card was written."]


def _reproduction(facts: CardFacts) -> list[str]:
    record, processes = facts.record, facts.record["processes"]
    versions = dict(record["versions"])
    python = versions.pop("python", "3.11")
    recipe = {"method": facts.recipe_method, **record["recipe"]}
    if not {"teacher_model_name_or_path", "teachers"} & recipe.keys() and facts.needs_teacher:
        recipe["teacher_model_name_or_path"] = record["teacher"]
    if "student_init" not in recipe and "model_name_or_path" not in recipe:
        recipe["model_name_or_path"] = record["student"]
    recipe["seed"] = facts.seed
    recipe = {key: value for key, value in recipe.items() if not key.startswith(("hub_", "push_to_hub", "card_"))}
    ours = versions.pop(NAME, "")
    packages = " ".join([requirement(ours), *(f"{name}=={text.partition('+')[0]}" for name, text in versions.items())])
    source = "" if requirement(ours) else f"# {NAME} {ours} came from a folder: pip install what you have of it\n"
    command = "distill-trainers train --config recipe.yaml --output_dir student"
    if processes > 1:
        command = f"accelerate launch --num_processes {processes} -m distill_trainers.cli.train"
        command += " --config recipe.yaml --output_dir student"
    return [
        f"With Python {python}, and this as `recipe.yaml` (names without an owner are "
        "files or folders of the machine that it ran on):",
        "",
        *(*fence(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(), "yaml"), ""),
        *fence(f"{source}pip install {packages.strip()}\n{command}", "bash"),
    ]


def _limits(facts: CardFacts) -> list[str]:
    lines = []
    if facts.max_length is not None:
        lines += [f"- Trained on text of up to {facts.max_length} tokens; longer text was not seen."]
    if facts.teacher is not None:
        lines.append("- A student repeats its teacher's mistakes and biases, and adds its own where it is weaker.")
    lines.append("- Only what stands under Scores was measured. Safety was not evaluated.")
    if facts.is_adapter:
        lines.append("- It is trained as an adapter: what the base model cannot do, it mostly cannot do either.")
    return lines


def license_lines(terms: Inherited, what: str = "this model") -> list[str]:
    """Write Markdown: what each licence is, conflicts, what is unknown, and what follows."""
    lines = [
        f"- {source.role}: {prose(source.name)} — {prose(source.license or 'unknown')}" for source in terms.sources
    ]
    if terms.conflicts:
        lines += ["", f"**These licences conflict**, so none follows for {what}:", ""]
        lines += [f"- {prose(line)}" for line in terms.conflicts]
    if terms.unknown:
        lines += ["", f"Not known, and to be found out before {what} is used or passed on:", ""]
        lines += [f"- {prose(line)}" for line in terms.unknown]
    if terms.notes:
        lines += ["", *(f"- {prose(line)}" for line in terms.notes)]
    if terms.license:
        lines += ["", f"Licence of {what}: {prose(terms.license)}."]
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
