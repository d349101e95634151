"""The report: one file that needs nothing else, from the runs that were read."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.resources
from collections.abc import Callable, Sequence
from pathlib import Path

from ..storage import write_file
from .curves import curves
from .distributions import distributions
from .markup import Html, el
from .overview import comparison, cost, subtitle, what_was_run
from .result import result
from .runs import Run
from .samples import samples
from .score_tables import scores
from .tokens import tokens

FILE_NAME = "report.html"
# In the order of a reader's questions: what came of it, why, at what cost, how. A section without content is left out.
SECTIONS: dict[str, tuple[str, Callable[[Sequence[Run]], Html | None]]] = {
    "result": ("Result", result),
    "comparison": ("Comparison", comparison),
    "curves": ("Training", curves),
    "samples": ("Samples", samples),
    "scores": ("All scores", scores),
    "tokens": ("Tokens", tokens),
    "distributions": ("Distributions", distributions),
    "cost": ("Cost", cost),
    "runs": ("Settings", what_was_run),
}


def report_page(runs: Sequence[Run]) -> str:
    """Write the whole page as HTML."""
    shown = {name: builder for name, builder in SECTIONS.items() if name != "comparison" or len(runs) > 1}
    built = [(name, title, build(runs)) for name, (title, build) in shown.items()]
    body = [(name, title, content) for name, title, content in built if content is not None]
    names = ", ".join(run.name for run in runs)
    title = f"Distillation report: {names}"
    what = names if len(runs) > 1 else subtitle(runs[0])
    style, script = _asset("report.css"), _asset("report.js")
    # Whatever text the page shows, no other script than its own can run, and nothing can be fetched.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
    policy += "form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    links = el("ul", [el("li", el("a", short, href=f"#{name}")) for name, short, _ in body])
    page = el(
        "body",
        el("a", "To the content", href="#content", class_="skip"),
        el("header", el("h1", "Distillation report"), el("p", what), class_="top"),
        el("nav", links, aria_label="Sections"),
        el("main", [content for _, _, content in body], id="content"),
        el("footer", el("p", f"Written by distill-trainers, {now}.")),
        el("script", Html(script)),
    )
    return f"<!doctype html>\n{el('html', head, page, lang='en')}\n"


def write_report(runs: Sequence[Run], file: Path) -> Path:
    """Write the page to `file`, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    return write_file(file, report_page(runs), "the report", "Free some space, or set another `--output`.")


def _asset(name: str) -> str:
    return importlib.resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
