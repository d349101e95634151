"""What the models wrote for the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.results import EvaluationResults, Sample
from .markup import Html, el, missing, section, shortened
from .runs import Run
from .score_tables import heading, in_order

_LONGEST = 4000  # characters of a text
_SHORT = 70  # characters of a prompt in the title of a card
_OPEN = 5  # cards that are unfolded from the start
_SIGNS = {"right": "✓", "wrong": "✗"}


def samples(runs: Sequence[Run]) -> Html | None:
    """Show a card for each prompt; None where no run has an evaluation or left samples."""
    if not any(run.evaluation is not None or run.samples for run in runs):
        return None
    cards: list[Any] = []
    tag = "h3" if len(runs) == 1 else "h4"
    for run in runs:
        if run.evaluation is not None and run.evaluation.samples:
            shown = [_card(sample, run.evaluation, tag, i < _OPEN) for i, sample in enumerate(run.evaluation.samples)]
        elif run.samples:
            shown = [_logged_card(sample, i, tag) for i, sample in enumerate(run.samples, 1)]
        else:
            continue
        cards += [el("h3", run.name) if len(runs) > 1 else None, *shown]
    if not cards:
        return section("samples", "Samples", missing("Samples need an evaluation with prompts, and ",
                       el("code", "shown_samples"), " above 0."))  # fmt: skip
    return section("samples", "Samples", _filter(), el("div", cards, class_="cards", id="cards"))


def _filter() -> Html:
    """Asks which cards are shown; of use with the page's script only, so hidden without it."""
    verdicts = [el("option", verdict, value=verdict) for verdict in ("right", "wrong", "no answer", "undecided")]
    return el(
        "form",
        el("label", "Only those with the text ", el("input", type="search", id="wanted-text")),
        el(
            "label",
            "Answered by any model ",
            el("select", el("option", "as it may be", value=""), verdicts, id="verdict"),
        ),
        el("button", "Unfold all", type="button", data_fold="cards", value="open"),
        el("button", "Fold all", type="button", data_fold="cards"),
        el("output", id="shown-cards", for_="wanted-text verdict"),
        class_="filter",
        role="search",
        aria_label="Samples",
        hidden=True,
    )


def _card(sample: Sample, results: EvaluationResults, tag: str, opened: bool) -> Html:
    models = in_order(results)
    written = [_text(heading(m), sample.completions[m.name]) for m in models if m.name in sample.completions]
    greedy = [
        _text(f"{heading(model)}, greedy", sample.greedy[model.name], sample.verdicts.get(model.name))
        for model in models
        if model.name in sample.greedy
    ]
    references = [_text("Reference", reference) for reference in sample.references[:3]]
    answer = _text("Right answer", sample.answer) if sample.answer is not None else None
    return _folded(
        tag,
        f"Row {sample.index}",
        sample.prompt,
        opened,
        el("div", _text("Prompt", sample.prompt), answer, references, class_="given"),
        el("div", written, class_="side"),
        el("div", greedy, class_="side") if greedy else None,
        data_verdicts=" ".join(sorted({verdict.replace(" ", "-") for verdict in sample.verdicts.values()})),
    )


def _logged_card(sample: dict[str, Any], number: int, tag: str) -> Html:
    """What the training itself wrote down: the prompt, and text by who wrote it."""
    texts = [_text(name, text) for name, text in sample.items() if name != "prompt" and isinstance(text, str) and text]
    text = str(sample.get("prompt", ""))
    prompt = el("div", _text("Prompt", text), class_="given")
    return _folded(tag, f"Prompt {number}", text, number <= _OPEN, prompt, el("div", texts, class_="side"))


def _folded(tag: str, title: str, prompt: str, opened: bool, *children: Any, **attributes: Any) -> Html:
    """A card that can be folded to its title and the end of its prompt, which is what tells prompts apart."""
    end = " ".join(prompt.split())
    short = el("small", el("bdi", end if len(end) <= _SHORT else f"…{end[-_SHORT:]}"))
    summary = el("summary", el(tag, title), short)
    return el("details", summary, children, class_="card", open=opened, **attributes)


def _text(title: str, text: str, verdict: str | None = None) -> Html:
    sign = (
        el("small", f"{_SIGNS.get(verdict, '–')} {verdict}", class_=f"verdict {verdict.split()[0]}")
        if verdict
        else None
    )
    shown = shortened(text, _LONGEST) if text else Html("<i>empty</i>")
    return el("div", el("p", title, " ", sign, class_="who"), el("p", shown, class_="text", dir="auto"))
