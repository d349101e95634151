"""Evaluate students beside their teacher and what they were before training.

distill-trainers evaluate --config evaluation.yaml
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError
from ..locks import holding
from ..recipe.parse import parse_settings
from ..settings import setting
from ..storage import check_folder, write_file
from . import report_errors, say, shows_usage

if TYPE_CHECKING:
    from ..evaluation import EvaluationResults, EvaluationSettings
    from ..evaluation.runner import Evaluation

_USAGE = """usage: distill-trainers evaluate --run RUN [--KEY VALUE]
       distill-trainers evaluate --config FILE [--KEY VALUE]
       distill-trainers evaluate --student RUN --teacher MODEL --baseline RUN/student_init --dataset FILE

Scores several students, what they were before training and their teacher on the same prompts, with intervals, and
tells how much of the gap each student has closed. Writes evaluation.json and evaluation.md into `output_dir`. What
models wrote and how they read it is kept in `cache_dir`: a second evaluation runs no model, one that was stopped goes
on. The settings are in docs/evaluation.md."""


@dataclass
class EvaluateArguments:
    """Models and data; how they are evaluated is in `EvaluationSettings`."""

    run: str | None = setting(
        None,
        "The folder of a finished run: its student, teacher, baseline and settings, on the rows that it held out. What "
        "is named besides comes first.",
    )
    student: str | None = setting(None, "The model to evaluate: a folder or Hub id.")
    students: dict[str, Any] | str | None = setting(None, "Several of them, by the name that tables give them (JSON).")
    teacher: str | None = setting(None, "Their teacher.")
    baseline: str | None = setting(None, "The student before training, from which the gap is counted.")
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "For from_pretrained of all models, such as {dtype: bfloat16} (JSON)."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "For from_pretrained of the teacher, in place of those (JSON)."
    )
    baseline_model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "For from_pretrained of the baseline, over those of all models (JSON)."
    )
    trust_remote_code: bool = setting(False, "Allow models that bring code of their own.")
    dataset: str | None = setting(None, "Data: a file, a folder or a Hub id. Required without `run`.")
    dataset_config: str | None = setting(None, "Configuration of a Hub dataset.")
    dataset_split: str = setting("test", "Split of a folder or Hub dataset.")
    column_mapping: dict[str, Any] | str | None = setting(
        None, "Rename columns, such as {instruction: prompt, output: completion} (JSON)."
    )
    output_dir: str = setting("runs/evaluation", "Where the results go; with `run`, in `evaluation` below it.")
    cache_dir: str | None = setting(None, "Where completions are kept; by default `<output_dir>/cache`.")
    use_cpu: bool = setting(False, "Run on the CPU.")
    dry_run: bool = setting(False, "Check everything and load no weights.")
    given = frozenset[str]()  # no setting itself: names of those that are not left to `run`

    def named_students(self) -> dict[str, str]:
        """Return the students by name.

        Raises:
            ConfigurationError: `student` and `students` at once, or a name without a model.
        """
        if self.student and self.students:
            raise ConfigurationError("The settings name both `student` and `students`. Keep one of them.")
        if self.student:
            return {"student": self.student}
        students = self.students or {}
        assert isinstance(students, dict)  # parsed by now
        wrong = [name for name, source in students.items() if not isinstance(source, str) or not source]
        if wrong:
            raise ConfigurationError(
                f"Got `students: {{{wrong[0]}: {students[wrong[0]]!r}}}`; expected a folder or Hub id for each name."
            )
        return dict(students)


def main(argv: Sequence[str]) -> int:
    """Parse, check, evaluate, save and print."""
    if shows_usage(argv, _USAGE) and not argv:
        return 0  # else all settings follow
    args, settings = parse_arguments(argv)
    evaluation = prepare_evaluation(args, settings)
    if args.dry_run:
        print(f"{', '.join(evaluation.workshop.metrics)} on {len(evaluation.examples.examples)} rows.")
        print("Everything that can be checked without weights is in order; nothing was evaluated.")
        return 0
    with holding(args.output_dir):
        from ..evaluation.tables import markdown

        results = evaluation.run()
        file = results.save(args.output_dir)
        remedy = "Free some space and start again: what was measured is kept."
        write_file(file.with_suffix(".md"), markdown(results), "the tables", remedy)
    print_results(results)
    say(f"Saved to {file} and {file.with_suffix('.md').name}.")
    return 0


def parse_arguments(argv: Sequence[str]) -> tuple[EvaluateArguments, EvaluationSettings]:
    """Parse settings from `--config` and the command line.

    Raises:
        ConfigurationError: unknown keys, values of the wrong type, or settings that cannot work.
    """
    from ..evaluation.settings import EvaluationSettings

    given: set[str] = set()

    def classes(file: dict[str, Any], argv: list[str]) -> tuple[type, type]:
        given.update(file, (a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")))
        return EvaluateArguments, EvaluationSettings

    args, settings = parse_settings(argv, classes, what="the file of settings", command="evaluate")
    args.given = frozenset(given)
    settings.check()
    return args, settings


def prepare_evaluation(args: EvaluateArguments, settings: EvaluationSettings) -> Evaluation:
    """Read configs, tokenizers and data, and see that all of it fits together. No weights are loaded.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: what has to be fixed.
    """
    from ..data import load_split
    from ..evaluation.runner import prepare

    if args.run:
        from .finished_run import take_up

        for note in take_up(args, settings):
            say(note)
    check_folder("output_dir", args.output_dir)
    if args.cache_dir is not None:
        check_folder("cache_dir", args.cache_dir, writable=not os.path.isdir(args.cache_dir))
    students = args.named_students()
    if not (students or args.teacher or args.baseline):
        raise ConfigurationError("The settings name no model; set `student`, `students`, `teacher` or `baseline`.")
    if not (args.dataset or args.run):
        raise ConfigurationError("The settings name no data; set `dataset` to a file, a folder or a Hub id.")
    if args.dataset:
        mapping: Any = args.column_mapping
        data = load_split(args.dataset, name=args.dataset_config, split=args.dataset_split, column_mapping=mapping)
        data_name = Path(args.dataset).name if os.path.exists(args.dataset) else args.dataset
    else:
        from .finished_run import held_out_rows

        data, data_name = held_out_rows(str(args.run)), f"held out by {next(iter(students))}"
    trusted = {"trust_remote_code": args.trust_remote_code}
    kwargs: Any = args.model_init_kwargs
    teacher_kwargs: Any = args.teacher_model_init_kwargs
    baseline_kwargs: Any = args.baseline_model_init_kwargs
    return prepare(
        students,
        data,
        settings=settings,
        teacher=args.teacher,
        baseline=args.baseline,
        cache_dir=args.cache_dir or str(Path(args.output_dir) / "cache"),
        model_init_kwargs={**trusted, **(kwargs or {})},
        teacher_model_init_kwargs=None if teacher_kwargs is None else {**trusted, **teacher_kwargs},
        baseline_model_init_kwargs=baseline_kwargs,
        use_cpu=args.use_cpu,
        data_name=data_name,
    )


def print_results(results: EvaluationResults) -> None:
    """Print the tables, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    from ..escaping import terminal
    from ..evaluation.tables import tables_of

    console = Console()
    for results_table in tables_of(results):
        table = Table(title=terminal(results_table.title, "italic"))
        for place, heading in enumerate(results_table.headings):
            table.add_column(terminal(heading), justify="right" if place else "left")
        for row in results_table.rows:
            table.add_row(*map(terminal, row))
        console.print(table)
    for note in results.notes:
        console.print(terminal(note))


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
