"""Real answers, token by token: how far apart the two models are at each, and what either would have written there."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from ..escaping import visible
from ..evaluation.results import EvaluationResults, TokenComparison, TopToken
from ..evaluation.tables import number
from .distributions import TEXTS
from .markup import Html, data_script, el, escaped, join, missing, section, shortened, table
from .runs import Run

# Where one shade ends and the next begins, in 1/1000 nats as the page's script has its values; the divergence of Jensen
# and Shannon is at most ln 2 = 0.693 nats.
LEVELS = {
    "kl": (50, 200, 500, 1000, 2000),
    "reverse_kl": (50, 200, 500, 1000, 2000),
    "jsd": (10, 50, 100, 200, 400),
}
_TITLES = {"kl": "Forward KL", "reverse_kl": "Reverse KL", "jsd": "Jensen-Shannon"}
_LONGEST = 60  # characters of a token
_LONGEST_PROMPT = 2000
_MOST = 5  # places in the table below a text
_OPEN = 2  # texts that are unfolded from the start
_UNSEEN = {" ": "␣", "\t": "→", "": "∅"}


def tokens(runs: Sequence[Run]) -> Html | None:
    """Draw a heat map for each text that was compared; None without an evaluation."""
    if all(run.evaluation is None for run in runs):
        return None
    maps: list[Any] = []
    for run in runs:
        if run.evaluation is not None and run.evaluation.tokens:
            maps.append(el("h3", run.name) if len(runs) > 1 else None)
            maps += [heat_map(compared, opened=i < _OPEN) for i, compared in enumerate(_in_order(run.evaluation))]
    if not maps:
        return section("tokens", "Token by token", missing(
            "Texts token by token need an evaluation with a teacher, the metric ", el("code", "agreement"), " and ",
            el("code", "token_samples"), " above 0."))  # fmt: skip
    legend = (
        "The stronger the shade and the line below a token, the further apart are student and teacher in what they "
        "expect at its place. Point at a token to see what both would have written; or go to a text with Tab, and "
        "through it with the arrow keys."
    )
    controls = el(
        "form",
        el("label", "Shade by ", el("select", [el("option", t, value=n) for n, t in _TITLES.items()], id="shade")),
        el("button", "Unfold all", type="button", data_fold="maps", value="open"),
        el("button", "Fold all", type="button", data_fold="maps"),
        class_="filter",
        hidden=True,
    )
    card = el("div", id="token", role="status", hidden=True)
    return section("tokens", "Token by token", el("p", legend), controls, _key(), el("div", maps, id="maps"), card)


def _in_order(results: EvaluationResults) -> list[TokenComparison]:
    """Texts of the students before those of what they were before."""
    before = {model.name for model in results.of_role("baseline")}
    return sorted(results.tokens, key=lambda compared: compared.model in before)


def _key() -> Html:
    """What the shades mean, by the measure that they are of."""
    keys = []
    for name, limits in LEVELS.items():
        nats = [f"{limit / 1000:g}" for limit in limits]
        ranges = [f"below {nats[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(nats)), f"above {nats[-1]}"]
        entries = [el("li", el("span", text, class_=f"k{level}")) for level, text in enumerate(ranges)]
        keys.append(el("ul", el("li", f"{_TITLES[name]}, nats:"), entries, class_="key", data_shade=name,
                       hidden=name != "kl"))  # fmt: skip
    return join(keys)


def level(value: float | None, measure: str = "kl") -> int:
    """Return the shade of a divergence in nats, 0 to 5."""
    return 0 if value is None else bisect.bisect_right(LEVELS[measure], round(1000 * value))


def shown_token(token: str) -> str:
    """Write a token so that it can be read: white space alone, tabs and line ends made visible, long ones cut."""
    if token in _UNSEEN:
        return _UNSEEN[token]
    token = visible(token)
    if token.strip(" ") == "":
        return "␣" * len(token)
    return shortened(token, _LONGEST).replace("\t", "→\t").replace("\n", "↵\n")


def name_of(model: str) -> str:
    """Name a model as the tables do, with the word that says what it is."""
    return {"baseline": "the student before", "student": "the student"}.get(model, model)


def heat_map(compared: TokenComparison, *, opened: bool) -> Html:
    """Draw one text: its tokens shaded, where the models part most, and the data for the page's script."""
    values = [value for value in compared.kl if value is not None]
    summary = f"mean forward KL {number(sum(values) / len(values))}" if values else "no tokens"
    name = name_of(compared.model)
    text = TEXTS.get(compared.text, compared.text)
    title = f"Row {compared.example}, " + (f"written by {name}" if compared.text == "student" else f"{text}, {name}")
    spans = "".join(
        f'<span class="k{level(value)}"{_FIRST if i == 0 else ""}>{escaped(shown_token(token))}</span>'
        for i, (token, value) in enumerate(zip(compared.tokens, compared.kl, strict=False))
    )
    return el(
        "details",
        el("summary", title, el("small", f"{len(compared.tokens)} tokens, {summary}")),
        el("p", el("b", "Prompt "), shortened(compared.prompt, _LONGEST_PROMPT), class_="text", dir="auto"),
        el("div", Html(spans), class_="map", role="group", dir="auto", aria_label=f"Tokens of {title}"),
        _most_apart(compared),
        data_script(_data(compared)),
        open=opened,
    )


_FIRST = ' tabindex="0"'


def _most_apart(compared: TokenComparison) -> Html | None:
    places = sorted(range(len(compared.kl)), key=lambda i: -(compared.kl[i] or 0.0))[:_MOST]
    rows = [
        [
            f"{i + 1}",
            el("bdi", shown_token(compared.tokens[i])),
            number(compared.kl[i]),
            _likeliest(compared.student_top, i),
            _likeliest(compared.teacher_top, i),
        ]
        for i in places
        if i < len(compared.tokens)
    ]
    heads = ["place", "token", "forward KL", f"{name_of(compared.model)} expects", "the teacher expects"]
    return table("Where they part most", heads, rows, numbers=False, kind="narrow") if rows else None


def _likeliest(tops: list[list[TopToken]], place: int) -> Any:
    if place >= len(tops) or not tops[place]:
        return "–"
    best = tops[place][0]
    return join([el("bdi", shown_token(best.token)), f" {100 * best.probability:.1f} %"])


def _data(compared: TokenComparison) -> dict[str, Any]:
    """What the script shows of each token, small: texts once, probabilities in 1/10 000, divergences in 1/1000 nats."""
    texts: dict[str, int] = {}

    def name(token: str) -> int:
        return texts.setdefault(shown_token(token), len(texts))

    def tops(places: list[list[TopToken]]) -> list[list[int]]:
        return [[part for top in row for part in (name(top.token), _ints([top.probability], 1e4)[0])] for row in places]

    return {
        "kl": _ints(compared.kl, 1e3),
        "reverse_kl": _ints(compared.reverse_kl, 1e3),
        "jsd": _ints(compared.jsd, 1e3),
        "p": [_ints(compared.student_probability, 1e4), _ints(compared.teacher_probability, 1e4)],
        "top": [tops(compared.student_top), tops(compared.teacher_top)],
        "text": list(texts),
        "names": [name_of(compared.model), "the teacher"],
    }


def _ints(values: Sequence[float | None], scale: float) -> list[int]:
    return [-1 if value is None else max(round(value * scale), 0) for value in values]
