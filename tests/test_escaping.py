"""Hostile names where they are shown: none is read as markup, HTML, YAML or an order to a terminal."""

from __future__ import annotations

import io

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from distill_trainers.cards.model_card import model_card, with_scores
from distill_trainers.escaping import code, fence, one_line, prose, terminal, visible
from distill_trainers.evaluation.results import EvaluationResults, MeasureInfo, MeasureScore, ModelResults, Sample
from distill_trainers.evaluation.tables import markdown

HOSTILE = [
    "[/bold]",
    "[bold red]x[/]",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egpj.exe",
    "a`b``c",
    "a|b",
    "two\nlines\n---\nlicense: mit",
    "<script>alert(1)</script><!-- scores --><!-- end of scores -->",
    "[click](javascript:x)",
    "![i](http://x/y.png)",
    "# heading",
    "- item",
    "key: value # comment",
    "*bold* _it_ ~~s~~",
    "\\",
    "trailing\\",
    "```\nfence",
    "&lt;",
    "{{ jinja }} %s {0}",
]
hostile = pytest.mark.parametrize("name", HOSTILE)


def rendered(text):
    """What a reader of Markdown sees, as plain text; raw HTML is passed on, and so found."""
    commonmark = pytest.importorskip("markdown_it")
    return commonmark.MarkdownIt("commonmark").enable("table").render(text)


@hostile
def test_a_terminal_is_given_no_orders(name):
    out = io.StringIO()
    table = Table("", title=terminal(name))
    table.add_row(terminal(name))
    Console(file=out, force_terminal=True, color_system=None, width=200).print(table, terminal(name))
    assert visible(name).split("\n")[0] in out.getvalue() and "\x1b]" not in out.getvalue()


@hostile
@pytest.mark.parametrize("write", [prose, code])
def test_markdown_is_text_on_one_line(name, write):
    page = rendered(f"before {write(name)} after\n\n| a | b |\n| --- | --- |\n| {write(name)} | z |\n\n{write(name)}\n")
    assert "\n" not in write(name) and "<script" not in page and "<!--" not in page
    for tag in ("<a ", "<img", "<h1", "<li", "<em>", "<strong>", "<pre>"):
        assert tag not in page
    assert page.count("<td>") == 2 and page.count("<p>") == 2
    import html

    shown = html.unescape(page.replace("<code>", "").replace("</code>", ""))
    assert shown.count(one_line(name)) == 3


@hostile
def test_a_fence_ends_where_it_should(name):
    lines = fence(f"x: {name}", "yaml")
    page = rendered("\n".join([*lines, "", "after"]))
    assert page.count("<pre>") == 1 and page.endswith("<p>after</p>\n")


@hostile
def test_a_card_holds_whatever_names_there_are(make_trainer, name):
    trainer = make_trainer(chat_template_kwargs={"word": name})
    trainer.teacher.name = name
    trainer.model.config._name_or_path = name
    trainer.data_sources = [name]
    trainer._wishes = type(trainer._wishes)(model_name=name, dataset_names=[name], tags=[name], language=name)
    card = model_card(trainer.card_facts())
    header, body = card[4:].split("\n---\n", 1)
    header = yaml.safe_load(header)
    assert header["library_name"] == "transformers" and "license" not in header
    assert "\x1b" not in card and "\u202e" not in card
    page = rendered(body)
    assert "<script" not in page
    assert page.count("<h1>") == 1 and page.count("<h2>") == 6 and '<a href="javascript' not in page
    results = EvaluationResults(
        [ModelResults(name, "student", name, "f", {"kl": MeasureScore(1.0)})],
        {"kl": MeasureInfo("KL", "", False)}, {}, {"name": name, "rows": 1}, notes=[name],
        samples=[Sample(0, name, completions={name: name})],
    )  # fmt: skip
    again = with_scores(with_scores(card, results, name), results, name)
    assert again.count("\n<!-- scores -->\n") == again.count("\n<!-- end of scores -->\n") == 1
    told = markdown(results)
    assert "<script" not in told and "\x1b" not in told and rendered(told).count("<h2>") == 3


@hostile
def test_evaluations_and_chains_are_printed_as_text(name, capsys):
    from distill_trainers.cli.evaluate import print_results
    from distill_trainers.rationales.show import html_page, terminal_lines

    print_results(EvaluationResults([ModelResults(name, "student", name, "f", {"kl": MeasureScore(1.0)})],
                                    {"kl": MeasureInfo("KL", "", False)}, notes=[name]))  # fmt: skip
    row = {"question": name, "answer": name, "rationale": name, "wrong_rationale": f"{name} x", "source": name}
    for line in terminal_lines(row):
        Console().print(line)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed
    page = html_page([row])
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
