"""The one format that evaluation writes and everything that shows results reads: dataclasses, and their JSON.

Numbers that are not finite are null. A reader must refuse a `version` it does not know; fields are only ever added
within a version, and a reader passes over those it does not know.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..exceptions import DatasetError
from ..redaction import hidden
from ..storage import write_file

FORMAT = "distill_trainers.evaluation"
VERSION = 1
FILE_NAME = "evaluation.json"

T = TypeVar("T")

FEWEST = 20  # prompts, below which nothing is said to be better or worse


@dataclass(frozen=True)
class Score:
    """A value and its confidence interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class GapClosed:
    """(student − baseline) / (teacher − baseline), 1 = all of the gap.

    Attributes:
        decided: whether baseline and teacher differ by more than their interval, on `FEWEST` prompts or more; else the
            share says little.
        prompts: that it was measured on; None where nobody counted.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    decided: bool = False
    prompts: int | None = None

    @property
    def is_of_few(self) -> bool:
        """Whether prompts are too few for a verdict: an interval of a handful is too narrow."""
        return self.prompts is not None and self.prompts < FEWEST


@dataclass
class MeasureScore:
    """One score of one model.

    Attributes:
        over: the name in `EvaluationResults.subsets` of the examples that it is a score over.
        per_prompt: by example of that subset; empty where a single example has no such score.
        per_seed: by sampling seed, where the score is of sampled text.
        difference: to the baseline, on the same prompts.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    over: str = ""
    per_prompt: list[float | None] = field(default_factory=list)
    per_seed: list[float | None] = field(default_factory=list)
    difference: Score | None = None
    gap_closed: GapClosed | None = None


@dataclass
class PositionCurve:
    """A divergence by position in the completion: entry t is the mean over all completions with more than t tokens.

    Attributes:
        measure: one of `AGREEMENT`.
        text: `reference`, or `student`: sampled by the model itself.
        count: completions that are that long.
    """

    measure: str
    text: str
    mean: list[float]
    low: list[float | None]
    high: list[float | None]
    count: list[int]


@dataclass
class Histogram:
    """Tokens per sampled completion: `counts[i]` lie in [`edges[i]`, `edges[i + 1]`), the last bin holds both ends."""

    edges: list[float]
    counts: list[int]


@dataclass
class CalibrationBin:
    """Next tokens whose likeliest guess has a probability in (`low`, `high`]."""

    low: float
    high: float
    tokens: int
    confidence: float | None
    accuracy: float | None


@dataclass
class Cost:
    """What a model costs to run, measured on greedy decoding of the same prompts to the same length.

    Attributes:
        tokens_per_second: new tokens of all rows together, in the fastest of several passes.
        weights_mib: of parameters and buffers.
        peak_mib: of device memory while decoding; None on a CPU, where nothing tells.
        speedup: tokens per second over the teacher's.
    """

    parameters: int
    weights_mib: float
    dtype: str
    device: str
    tokens_per_second: float
    batch_size: int
    new_tokens: int
    peak_mib: float | None = None
    speedup: float | None = None


@dataclass
class TopToken:
    token: str
    probability: float


@dataclass
class TokenComparison:
    """One completion, token by token, as student and teacher see it; all lists have its length.

    Attributes:
        text: `reference` or `student`.
        example: its place, as in `EvaluationResults.subsets`.
        student_top, teacher_top: both models' likeliest next tokens at each place.
    """

    model: str
    text: str
    example: int
    prompt: str
    tokens: list[str]
    kl: list[float]
    reverse_kl: list[float]
    jsd: list[float]
    student_probability: list[float]
    teacher_probability: list[float]
    student_top: list[list[TopToken]]
    teacher_top: list[list[TopToken]]


@dataclass
class Sample:
    """One prompt and what every model wrote for it.

    Attributes:
        index: place of the example, as in `EvaluationResults.subsets`.
        completions: by model, sampled with the first seed.
        greedy: by model, the greedy answer where accuracy was asked for.
        verdicts: by model, `right`, `wrong`, `no answer` or `undecided`.
    """

    index: int
    prompt: str
    references: list[str] = field(default_factory=list)
    answer: str | None = None
    completions: dict[str, str] = field(default_factory=dict)
    greedy: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


@dataclass
class ModelResults:
    """All that is known of one model.

    Attributes:
        source: the folder's name or Hub id it came from; never a path of this machine.
        exposure: ExAccErr by length, from 1 token on.
        notes: what was not measured of it, and why.
    """

    name: str
    role: str
    source: str
    fingerprint: str
    scores: dict[str, MeasureScore] = field(default_factory=dict)
    positions: list[PositionCurve] = field(default_factory=list)
    lengths: Histogram | None = None
    calibration: list[CalibrationBin] = field(default_factory=list)
    exposure: list[float | None] = field(default_factory=list)
    cost: Cost | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class MeasureInfo:
    """How to show a score: see `measures.Measure`."""

    title: str
    unit: str
    higher_is_better: bool | None
    paper: str = ""


@dataclass
class EvaluationResults:
    """One evaluation: models in the order teacher, baseline, students.

    Attributes:
        settings: as they were given, with their defaults.
        data: its name, `rows`, and `reference_text`: whose text was forced, `the data` or `the teacher`.
        subsets: places of examples by what was measured on them, see `MeasureScore.over`.
        measures: every score that occurs, by name, in the order of tables.
        notes: what was left out, and why.
        environment: versions and machine.
        created: UTC, ISO 8601.
    """

    models: list[ModelResults]
    measures: dict[str, MeasureInfo]
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    subsets: dict[str, list[int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    tokens: list[TokenComparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    created: str = ""
    format: str = FORMAT
    version: int = VERSION

    def model(self, name: str) -> ModelResults:
        """Return the results of a model by name."""
        return next(model for model in self.models if model.name == name)

    def of_role(self, role: str) -> list[ModelResults]:
        return [model for model in self.models if model.role == role]

    def to_json(self) -> str:
        told = _plain(self)
        told |= {name: hidden(told[name]) for name in ("settings", "data", "notes")}  # the rest are scores and texts
        return json.dumps(told, allow_nan=False, ensure_ascii=False)

    def save(self, folder: str | Path) -> Path:
        """Write `evaluation.json` into `folder`, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        remedy = "Free some space and start again: what was measured is kept."
        return write_file(Path(folder) / FILE_NAME, self.to_json(), "the results", remedy)

    @classmethod
    def from_json(cls, text: str, name: str = "the text") -> EvaluationResults:
        """Read results from what `to_json` wrote.

        Raises:
            DatasetError: it is something else, or of a version that is not known here.
        """
        try:
            read = json.loads(text)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{name} is no JSON: {error}. Expected a file `{FILE_NAME}`.") from error
        if not isinstance(read, dict) or read.get("format") != FORMAT:
            raise DatasetError(
                f"{name} holds no evaluation (format {read.get('format') if isinstance(read, dict) else None!r}, "
                f"expected {FORMAT!r}). Point to a file that `distill-trainers evaluate` wrote."
            )
        if read.get("version") != VERSION:
            raise DatasetError(
                f"{name} has version {read.get('version')} of the format; this release reads {VERSION}. "
                "Evaluate again, which costs nothing where its cache is kept."
            )
        try:
            return _build(cls, read)
        except (TypeError, KeyError) as error:
            raise DatasetError(f"{name} is damaged: {error}. Evaluate again.") from error

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResults:
        """Read results from a file, or from the folder that holds `evaluation.json`."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise DatasetError(f"There are no results at {str(path)!r}. Make them with `distill-trainers evaluate`.")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, and numbers as JSON has them, which knows no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _build(hint: Any, value: Any) -> Any:
    """`value` of JSON as the type that a field declares."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = [option for option in get_args(hint) if option is not type(None)]
    if is_dataclass(hint):
        hints = _hints(hint)  # type: ignore[arg-type]
        return hint(**{name: _build(hints[name], item) for name, item in value.items() if name in hints})  # type: ignore[operator]
    if get_origin(hint) is list:
        (of,) = get_args(hint)
        return list(value) if of in (str, int, float) else [_build(of, item) for item in value]
    if get_origin(hint) is dict:
        return {name: _build(get_args(hint)[1], item) for name, item in value.items()}
    return value


@cache
def _hints(of: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, worked out once: a report reads tens of thousands of objects."""
    hints = get_type_hints(of)
    return {entry.name: hints[entry.name] for entry in fields(of)}
