"""What came of it, first: how much of the gap to the teacher was closed; before, after, teacher; size and speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..evaluation.measures import MEASURES
from ..evaluation.results import FEWEST, EvaluationResults, GapClosed, ModelResults
from ..evaluation.tables import number, share_of_gap
from .charts import share_bar
from .markup import Html, el, join, missing, section, stacked, table
from .overview import titled, unlike
from .runs import Run, is_number
from .score_tables import how_to_evaluate

# In this order, after what the run itself was chosen by.
FIRST = ("kl", "accuracy", "pass@1", "top1_agreement", "next_byte_agreement", "bits_per_byte", "rouge_l",
          "student_text_kl", "perplexity")  # fmt: skip
_ANSWERS = ("accuracy", "pass@1")  # what rewards and rationales are for
_MOST = 5
_NO_GAP = 1e-6  # by rounding alone, as of a teacher that is the student
# What the teacher has of itself; the log and the demo do not say.
_OF_THE_TEACHER = dict.fromkeys(("kl", "reverse_kl", "jsd"), 0.0)
_OF_THE_TEACHER |= dict.fromkeys(("top1_agreement", "acceptance", "next_byte_agreement"), 1.0)


@dataclass(frozen=True)
class Line:
    """One score of one student; None where nobody took it.

    Attributes:
        dataset: the evaluation set, of several.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool | None
    before: float | None
    after: float | None
    teacher: float | None
    gap: GapClosed | None
    dataset: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What lines of two students have in common that may be compared."""
        return self.name, self.dataset

    @property
    def was_ahead(self) -> bool:
        """Whether the student scored better than its teacher before training: there was no gap to close."""
        if self.gap is None or not self.gap.decided or self.before is None or self.teacher is None:
            return False
        ahead = self.before - self.teacher
        return self.higher_is_better is not None and (ahead > 0 if self.higher_is_better else ahead < 0)

    @property
    def closed(self) -> GapClosed | None:
        """How much of the gap was closed, where there was one."""
        return None if self.was_ahead else self.gap

    def shown(self, value: float | None) -> str:
        return "0" if value == 0 else number(value, self.unit).replace(" %", "\u00a0%")

    @property
    def direction(self) -> str:
        return {True: "higher is better", False: "lower is better", None: ""}[self.higher_is_better]

    @property
    def spoken_unit(self) -> str:
        return "" if self.unit in ("", "share") else self.unit


@dataclass
class Outcome:
    """What is known of one student.

    Attributes:
        student: its name among those of the page.
        where: what it was measured on.
        in_log: whether it was the training itself that measured, without intervals.
        sizes: rows of the table below the scores: title, before, after, teacher, beside the teacher.
    """

    student: str
    where: str
    in_log: bool = False
    lines: list[Line] = field(default_factory=list)
    sizes: list[list[Any]] = field(default_factory=list)

    def line(self, key: tuple[str, str]) -> Line | None:
        return next((line for line in self.lines if line.key == key), None)


def result(runs: Sequence[Run]) -> Html:
    """Say in a sentence and a table what came of each run, and what was not measured."""
    outcomes = [outcome for run in runs for outcome in outcomes_of(run)]
    measured = [outcome for outcome in outcomes if outcome.lines]
    parts: list[Any] = []
    if len(measured) == 1:
        parts += [el("p", _sentence(measured[0].lines), class_="lead"), _table(measured[0])]
    elif measured:
        parts += _side_by_side(measured)
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    if differing := unlike(evaluations):
        parts.append(missing(f"These evaluations differ in {differing}: compare their scores with care, or evaluate "
                             "all students together with ", el("code", "students"), "."))  # fmt: skip
    return section("result", "Result", parts, _what_is_missing(runs, measured))


# ---- What is known of each student ----------------------------------------------------------------------------------


def outcomes_of(run: Run) -> list[Outcome]:
    """Return the students of its evaluation; else the one that the demo measured, or that its log tells of."""
    if run.evaluation is not None:
        students = run.evaluation.of_role("student")
        return [_of_evaluation(run, run.evaluation, model, students) for model in students]
    if isinstance(run.metrics.get("scores"), dict):
        return [_of_demo(run, run.metrics["scores"])]
    return [_of_log(run)]


def _wanted(run: Run, known: Iterable[str]) -> list[str]:
    """Which of the `known` measures are shown first: what the run was chosen by, then by what it is for."""
    recipe = run.record.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    own = str(recipe.get("metric_for_best_model", "")).removeprefix("eval_")
    for_answers = recipe.get("reward_funcs") or run.record.get("method") == "Rationale"
    names = list(known)
    order = dict.fromkeys([own, *(_ANSWERS if for_answers else ()), *FIRST])
    chosen = [name for stem in order for name in names if name == stem or name.startswith(f"{stem}/")]
    # Two that say the same: the log has the teacher's perplexity, an evaluation its bits per byte too.
    of_tokens = "teacher_perplexity" in names and "shared_borders" not in names
    same = {"next_byte_agreement": "top1_agreement"}
    same |= {"bits_per_byte": "perplexity"} if of_tokens else {"perplexity": "bits_per_byte"}
    chosen = [name for name in chosen if name == own or same.get(name.partition("/")[0]) not in names]
    return chosen[:_MOST]


def _of_evaluation(
    run: Run, results: EvaluationResults, model: ModelResults, students: Sequence[ModelResults]
) -> Outcome:
    before, teacher = (next(iter(results.of_role(role)), None) for role in ("baseline", "teacher"))
    name = run.name if len(students) == 1 else f"{run.name}: {model.name}"
    outcome = Outcome(name, f"{results.data.get('rows', 0):,} rows ({results.data.get('name', 'the data')})")

    def value(of: ModelResults | None, measure: str) -> float | None:
        return of.scores[measure].value if of is not None and measure in of.scores else None

    for measure in _wanted(run, (n for n, s in model.scores.items() if s.value is not None and n in results.measures)):
        info = results.measures[measure]
        values = (value(before, measure), value(model, measure), value(teacher, measure))
        gap = model.scores[measure].gap_closed
        outcome.lines.append(Line(measure, info.title, info.unit, info.higher_is_better, *values, gap))
    # What tells nothing of the gap comes after what does, whatever it is.
    outcome.lines.sort(key=lambda line: not (line.closed and line.closed.decided))
    if model.cost is not None:
        costs = [of.cost if of is not None else None for of in (before, model, teacher)]
        sizes = [_size(cost.parameters if cost else None) for cost in costs]
        speeds = [number(cost.tokens_per_second if cost else None, "tokens") for cost in costs]
        smaller: Any = ""
        if costs[2] is not None and costs[2].parameters:
            smaller = _beside(f"{100 * model.cost.parameters / costs[2].parameters:.3g}\u00a0%", "of the teacher's")
        faster = _beside(f"{model.cost.speedup:.2f}\u00a0x", "the teacher's") if model.cost.speedup else ""
        outcome.sizes += [["Parameters", *sizes, smaller], ["Decoding (tokens/s)", *speeds, faster]]
    return outcome


def _size(parameters: int | None) -> str:
    """Write a number of parameters as people say it, so that four fit on a phone."""
    if not parameters:
        return "–"
    for limit, letter in ((1e9, "B"), (1e6, "M")):
        if parameters >= limit:
            return f"{parameters / limit:.4g}\u00a0{letter}"
    return f"{parameters:,}"


def _beside(value: str, whose: str) -> Html:
    return join([value, el("small", whose, class_="interval")])


def _of_demo(run: Run, scores: dict[str, Any]) -> Outcome:
    """`scores` of metrics.json, measures by model: the `teacher`, the student before and, last, after."""
    models = {
        name: {measure: value for measure, value in values.items() if is_number(value)}
        for name, values in scores.items()
        if isinstance(values, dict)
    }
    teacher = models.pop("teacher", {})
    students = list(models.values()) or [{}]
    known = [students[0] if len(students) > 1 else {}, students[-1], teacher]
    outcome = Outcome(run.name, "the demo's held-out prompts; no intervals", in_log=True)
    for measure in _wanted(run, students[-1]):
        before, after, reached = (model.get(measure) for model in known)
        outcome.lines.append(_plain_line(measure, before, after, reached))
    for title, name, tell in (
        ("Parameters", "parameters", _size),
        ("Decoding (tokens/s)", "tokens_per_second", lambda value: number(value, "tokens")),
    ):
        values = [model.get(name) for model in known]
        if any(values):
            outcome.sizes.append([title, *map(tell, values), ""])
    return outcome


def _of_log(run: Run) -> Outcome:
    """What the run's own evaluations said before its first step and at its end."""
    outcome = Outcome(run.name, "held-out rows, by the log of the training; no intervals", in_log=True)
    logged = {name.removeprefix("eval_"): run.curve(name) for name in run.logged() if name.startswith("eval_")}
    named = [name.removesuffix("_tokens") for name in logged if name.endswith("_tokens")]
    sets = [f"{name}_" for name in named if f"{name}_loss" in logged] or [""]
    for each in sets:  # of evaluation data, if there are several
        of_set = {name.removeprefix(each): curve for name, curve in logged.items() if name.startswith(each)}
        for name in _wanted(run, of_set)[: max(1, _MOST // len(sets))]:
            curve, of_teacher = of_set[name], of_set.get(f"teacher_{name}")
            before = curve[0][1] if curve[0][0] == 0 else None
            reached = of_teacher[-1][1] if of_teacher else None
            step, after = _of_what_is_left(run, f"eval_{each}{name}", f"eval_{each}loss")
            line = _plain_line(name, before, after, reached, each.removesuffix("_"))
            closed = [share for at, share in of_set.get(f"gap_closed_{name}", []) if at == step > 0]
            if closed and line.gap is None:  # the run knows what it began with, where the log does not
                line = replace(line, gap=GapClosed(closed[-1], decided=True))
            if step == _kept_step(run, f"eval_{each}{name}"):
                outcome.where = f"held-out rows at step {step}, the student that was kept, by the log; no intervals"
            outcome.lines.append(line)
    parameters = run.record.get("student_parameters")
    if outcome.lines and isinstance(parameters, int):
        outcome.sizes.append(["Parameters", "–", _size(parameters), "–", ""])
    return outcome


def _kept_step(run: Run, name: str) -> int | None:
    """The step whose student took the place of the last one, unless that was scored itself once it was back."""
    recipe = run.record.get("recipe")
    if not run.best_step or not isinstance(recipe, dict) or not recipe.get("load_best_model_at_end"):
        return None
    end = next((place for place, entry in enumerate(run.history) if "train_runtime" in entry), None)
    return None if end is None or any(name in entry for entry in run.history[end:]) else run.best_step


def _of_what_is_left(run: Run, name: str, loss: str) -> tuple[int, float | None]:
    """The step of the student that a run has left, and its score; None where no evaluation came after training began.

    NaN where that evaluation lost it: a score that is not finite is not in the log, but then the loss is neither.
    """
    kept = _kept_step(run, name)
    for entry in reversed(run.history):
        if kept is not None and entry["step"] > kept:
            continue
        if name in entry or not is_number(entry.get(loss, 0)):
            value, step = entry.get(name), int(entry["step"])
            return step, None if step == 0 else value if isinstance(value, int | float) else math.nan
    return 0, None


def _plain_line(name: str, before: float | None, after: float | None, teacher: float | None, dataset: str = "") -> Line:
    """Make a line of values that came without intervals; of one of several evaluation sets or teachers, named."""
    stem, _, expert = name.partition("/")
    measure = MEASURES.get(stem)
    teacher = _OF_THE_TEACHER.get(stem) if teacher is None else teacher
    gap = None
    known = None if before is None or after is None or teacher is None else (after - before, teacher - before)
    if known is not None and math.isfinite(known[0]) and abs(known[1]) > _NO_GAP:
        gap = GapClosed(known[0] / known[1], decided=True)
    title = ", ".join(filter(None, [titled(stem), dataset, expert]))
    unit, higher = (measure.unit, measure.higher_is_better) if measure else _unit_and_direction(stem)
    return Line(name, title, unit, higher, before, after, teacher, gap, dataset)


def _unit_and_direction(stem: str) -> tuple[str, bool | None]:
    """Tell what is known of a logged score that is no measure; a user's own may go either way."""
    if stem.startswith(("pass@", "gap_closed_")):
        return "share", True
    return "", False if stem.endswith(("loss", "divergence")) else None


# ---- How it is said -------------------------------------------------------------------------------------------------


def _sentence(lines: Sequence[Line]) -> Html:
    """Say by the first line what came of it, without more than is known."""
    line = lines[0]
    name, unit = line.title, line.spoken_unit
    went = [name, " is "] if line.before is None else [name, f" went from {line.shown(line.before)} to "]
    known = [f"teacher: {line.shown(line.teacher)}" if line.teacher is not None else "", line.direction]
    told = "; ".join(filter(None, known))
    if line.after is None:
        went, end = [name, " is ", line.shown(line.before)], " before training, and was not measured since"
    else:
        went, end = [*went, line.shown(line.after)], ""
    values = join([*went, f" {unit}" if unit else "", end, f" ({told})." if told else "."])
    verdict = _AHEAD if line.was_ahead else _verdict(line.gap)
    return join([el("b", verdict), " ", values]) if verdict else values


_AHEAD = "Before training the student scored better than its teacher: there was no gap to close."


def _verdict(gap: GapClosed | None) -> str:
    if gap is None or gap.value is None:
        return ""
    share = share_of_gap(gap).replace(" %", "\u00a0%")
    if gap.is_of_few:
        return (
            f"{gap.prompts} prompts are too few for a verdict, which takes {FEWEST}: {share} of the gap to the teacher."
        )
    if not gap.decided:
        return "Before training the student differed from its teacher by no more than noise: there was no gap to close."
    low, high = (gap.value if bound is None else bound for bound in (gap.low, gap.high))
    if low <= 0 <= high:
        return f"No change that can be told from noise ({share} of the gap to the teacher)."
    if gap.value < 0:
        return f"The student moved away from its teacher ({share} of the gap)."
    if low > 1:
        return f"The student passed its teacher ({share} of the gap)."
    about = "About " if gap.low is None else ""
    return f"{about}{share} of the gap to the teacher is closed."


_HEADS = ("", "before", "after", "teacher", "gap closed")


def _cells(line: Line) -> list[Any]:
    share = line.closed.value if line.closed is not None and line.closed.decided else None
    closed = join([stacked(share_of_gap(line.closed)), share_bar(share) if share is not None else None])
    return [*(line.shown(value) for value in (line.before, line.after, line.teacher)), closed]


def _table(outcome: Outcome) -> Html:
    rows = []
    for line in outcome.lines:
        note = ", ".join(filter(None, [line.spoken_unit, line.direction]))
        rows.append([join([line.title, el("small", note) if note else None]), *_cells(line)])
    return table(f"Measured on {outcome.where}", _HEADS, [*rows, *outcome.sizes], kind="result")


def _side_by_side(outcomes: Sequence[Outcome]) -> list[Any]:
    """One score of all students: the one that most of them have, of these the first."""
    keys = list(dict.fromkeys(line.key for outcome in outcomes for line in outcome.lines))
    most = max(keys, key=lambda key: sum(outcome.line(key) is not None for outcome in outcomes))
    lines = [(outcome, outcome.line(most)) for outcome in outcomes]
    known = [(outcome, line) for outcome, line in lines if line is not None]
    first = known[0][1]
    rows = []
    for outcome, line in lines:
        cells = _cells(line) if line is not None else ["–"] * (len(_HEADS) - 1)
        rows.append([join([outcome.student, el("small", outcome.where)]), *cells])
    note = ", ".join(filter(None, [first.spoken_unit, first.direction]))
    caption = f"{first.title} ({note})" if note else first.title
    return [el("p", _nearest(known), class_="lead"), table(caption, _HEADS, rows, kind="result")]


def _nearest(known: Sequence[tuple[Outcome, Line]]) -> Html:
    """Name the student that closed most of its gap, and whether the next is clearly behind."""
    if len(known) == 1:
        return join([f"No two students have a score of the same kind; {known[0][0].student} has {known[0][1].title}."])
    closed = [(outcome, line.closed) for outcome, line in known if line.closed and line.closed.decided]
    closed.sort(key=lambda pair: -(pair[1].value or 0.0))
    if len(closed) < 2:
        return join([f"{len(known)} students by {known[0][1].title}; how much of the gap each closed is not known."])
    (best, gap), (second, other) = closed[:2]
    shares = [share_of_gap(each).replace(" %", "\u00a0%") for each in (gap, other)]
    if gap.low is None or other.high is None:
        surely = "whether by more than noise is not known"
    else:
        surely = "their intervals overlap" if gap.low <= other.high else "their intervals do not overlap"
    return join([el("b", f"{best.student} closed the most of its gap to the teacher: {shares[0]}."),
                 f" Next comes {second.student} with {shares[1]}; {surely}."])  # fmt: skip


# ---- What is missing ------------------------------------------------------------------------------------------------


def _what_is_missing(runs: Sequence[Run], measured: Sequence[Outcome]) -> list[Html]:
    """Say what the page would show with an evaluation, once, and how to have it."""
    notes = []
    bare = [run for run in runs if run.evaluation is None]
    if bare:
        who = "" if len(runs) == 1 else f" of {', '.join(run.name for run in bare)}"
        nothing = [run for run in bare if not any(outcome.lines for outcome in outcomes_of(run))]
        if nothing:
            whose = f" of {', '.join(run.name for run in nothing)}" if len(runs) > 1 else ""
            notes.append(missing(f"Nothing was measured against the teacher{whose}."))
        notes.append(missing(f"There is no evaluation{who} yet. ", how_to_evaluate(), " Then intervals, texts token by "
                             "token, samples, distributions, size and speed are here too."))  # fmt: skip
    for outcome in measured:
        line = outcome.lines[0]
        if line.gap is not None:
            continue
        if not outcome.in_log:
            notes.append(missing("How much of the gap was closed is told where the evaluation has both ",
                                 el("code", "teacher"), " and ", el("code", "baseline"),
                                 ", the student before training."))  # fmt: skip
        elif line.before is None:
            notes.append(missing(f"How {outcome.student} scored before training is not in its log; with ",
                                 el("code", "eval_on_start: true"), " it is."))  # fmt: skip
    return list(dict.fromkeys(notes))
