"""Rows that a teacher wrote, on the Hub: without paths of this machine, with a card that says where they come from."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..escaping import code, fence, prose, visible
from ..exceptions import DatasetError
from ..installing import project_link
from ..rationales.records import dataset_of
from ..redaction import redacted
from ..run_files import plain
from ..storage import write_file, writing
from .licenses import Licensed, inherit, licensed
from .model_card import license_lines

_COLUMNS = {
    "prompt": "what was asked: text, or messages",
    "chosen": "the teacher's response",
    "rejected": "the student's response",
    "question": "what was asked",
    "answer": "the right answer, where it is known",
    "response": "the teacher's text as it came",
    "rationale": "the chain of thought",
    "predicted": "the answer that the text comes to",
    "label": "the answer to learn",
    "right": "a chain that comes to the right answer",
    "wrong": "one that does not",
    "provenance": "who wrote it and how, as JSON",
}


@dataclass(frozen=True)
class Writers:
    """Whose text it is, for licences: folders or Hub ids; None takes what the rows say.

    Attributes:
        data: where prompts or questions come from.
        student: who wrote the rejected sides of pairs.
    """

    teacher: str | None = None
    data: str | None = None
    student: str | None = None


def kind_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return `pairs` or `rationales`.

    Raises:
        DatasetError: they are neither.
    """
    names = set().union(*(row.keys() for row in rows))
    if {"prompt", "chosen", "rejected"} <= names:
        return "pairs"
    if "question" in names:
        return "rationales"
    raise DatasetError(
        f"The rows have the columns {sorted(names)}; expected pairs (prompt, chosen, rejected) or rationales (question "
        "and others), as `distill-trainers pairs` and `rationales` write them."
    )


def push_rows(
    rows: Sequence[dict[str, Any]], repo_id: str, writers: Writers, *, token: str | None = None, **options: Any
) -> str:
    """Upload pairs or rationales as a dataset with a card; return its address.

    Args:
        options: `private` and `revision`, see `hub.upload`.

    Raises:
        DatasetError: they are neither, or there are none.
        ConfigurationError, HubError: see `hub.upload`.
    """
    if not rows:
        raise DatasetError("There are no rows to upload.")
    writers = _completed(writers, rows)
    # Provenance may name paths and addresses of this machine.
    cleaned = [{k: plain(v) if k == "provenance" else v for k, v in row.items()} for row in rows]
    card = dataset_card(cleaned, repo_id, writers, token)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data", "train-00000-of-00001.parquet")
        remedy = "Free some space, or set TMPDIR to a folder that has some."
        write_file(Path(folder, "README.md"), card, "the dataset to upload", remedy)
        with writing("the dataset to upload", Path(folder), remedy):
            data.parent.mkdir()
            dataset_of(cleaned).to_parquet(str(data))
        only = ["README.md", data.relative_to(folder).as_posix()]
        message = f"{len(rows):,} rows"
        return hub.upload(folder, repo_id, repo_type="dataset", message=message, token=token, only=only, **options)


def _completed(writers: Writers, rows: Sequence[Mapping[str, Any]]) -> Writers:
    """Those that are missing from the first row with a provenance; a served model has no card of its name."""
    provenance: Any = next((row["provenance"] for row in rows if isinstance(row.get("provenance"), Mapping)), {})
    provenance = provenance.get("right") or provenance  # of dual chains
    teacher = None if "endpoint" in provenance else provenance.get("teacher")
    return Writers(writers.teacher or teacher, writers.data, writers.student or provenance.get("student"))


def dataset_card(rows: Sequence[Mapping[str, Any]], repo_id: str, writers: Writers, token: str | None = None) -> str:
    """Write Markdown with a YAML header: what the rows are, who wrote them, and under which terms."""
    from huggingface_hub import DatasetCardData

    kind = kind_of(rows)
    sources: list[Licensed] = [licensed("data", writers.data, token=token)]
    sources.append(licensed("teacher", writers.teacher, token=token))
    if kind == "pairs":
        sources.append(licensed("student", writers.student, token=token))
    terms = inherit(sources)
    teachers = Counter(name for row in rows for name in _teachers(row.get("provenance")))
    header = DatasetCardData(
        tags=["distill_trainers", "synthetic", "preference" if kind == "pairs" else "chain-of-thought"],
        task_categories=["text-generation"],
        annotations_creators=["machine-generated"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    for key, value in terms.metadata().items():
        header[key] = value
    what = "preference pairs: a teacher's response over a student's" if kind == "pairs" else "chains of thought"
    names = list(dict.fromkeys(name for row in rows for name in row))
    use = "`method: dpkd`" if kind == "pairs" else "`method: rationale`"
    lines = [
        *("---", header.to_yaml(), "---", "", f"# {prose(repo_id)}", ""),
        f"{len(rows):,} {what}, written by {', '.join(code(name) for name in sorted(teachers)) or 'a teacher'}. Made "
        f"with {project_link()}; nobody has read all of it.",
        "",
        *fence(
            f'from datasets import load_dataset\n\nrows = load_dataset({json.dumps(repo_id)}, split="train")', "python"
        ),
        "",
        f"{code(f'dataset: {repo_id}')} in a recipe with {use} trains on it.",
        *("", "## Columns", "", "| column | |", "| --- | --- |"),
        *(f"| {code(name)} | {_COLUMNS.get(name, '')} |" for name in names),
        *("", "## Licence", "", *license_lines(terms, "this dataset")),
    ]
    return redacted(visible("\n".join(lines))) + "\n"


def _teachers(provenance: Any) -> set[str]:
    if not isinstance(provenance, Mapping):
        return set()
    names = {provenance["teacher"]} if isinstance(provenance.get("teacher"), str) else set()
    return names.union(*(_teachers(part) for part in provenance.values()))
