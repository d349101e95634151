"""The page: whole, self-contained, readable by anyone, and proof against the text that it shows."""

import base64
import dataclasses
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from distill_trainers.cli import main
from distill_trainers.evaluation.results import TopToken
from distill_trainers.reporting.page import report_page
from distill_trainers.reporting.runs import Run, read_runs
from distill_trainers.reporting.tokens import LEVELS, level, shown_token

VOID = {"meta", "input", "br", "hr"}


class Page(HTMLParser):
    """Elements of a page in order, and its text; fails where tags do not match."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def of(self, *tags):
        return [(attrs, parents) for tag, attrs, parents in self.elements if tag in tags]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def page(run_folder, made_up):
    """`page(results, …)`: the parsed report of runs with these evaluations."""

    def make(*evaluations, **kwargs):
        folders = [run_folder(f"run-{i}", each, **kwargs) for i, each in enumerate(evaluations)]
        return Page(report_page(read_runs(folders)))

    return make


def test_it_shows_what_was_asked_for(page, made_up):
    results = made_up()
    shown = page(results)
    headings = [a["id"] for a, _ in shown.of("h2") if "id" in a]
    # What came of it, why, at what cost, how.
    assert headings == ["result", "curves", "samples", "scores", "tokens", "distributions", "cost", "runs"]
    for text in (
        "GKD", "12,345", "learning_rate: 0.001",  # what was run
        "Forward KL to the teacher", "90.0 s", "2,000", "2,048 MiB of the device", "2.0 Wh",
        "Somebody: A paper (2024), arXiv 2306.13649", "7,241,732,096", "6.98 x",
        "Divergence by position", "Tokens per completion", "Diversity by prompt", "Calibration of next tokens",
    ):  # fmt: skip
        assert text in shown.text, text
    student = results.model("student").scores["kl"]
    assert f"{student.value:.3f} [{student.low:.3f}, {student.high:.3f}]" in shown.text
    assert f"{100 * student.gap_closed.value:.0f} %" in shown.text
    assert shown.text.count("(not") == 0 and "missing" not in {a.get("class") for a, _ in shown.of("p")}
    for sample in results.samples:
        assert sample.prompt in shown.text and sample.completions["teacher"] in shown.text
    maps = [a for a, _ in shown.of("div") if a.get("class") == "map"]
    assert len(maps) == len(results.tokens)


def test_the_intervals_of_scores_and_their_verdict(page, made_up):
    results = made_up()
    scores = results.model("student").scores
    scores["kl"].difference = dataclasses.replace(scores["kl"].difference, low=-1.0, high=1.0)
    scores["rouge_l"].gap_closed = dataclasses.replace(scores["rouge_l"].gap_closed, decided=False)
    shown = page(results)
    assert "within noise" in shown.text and "better" in shown.text
    assert f"({100 * scores['rouge_l'].gap_closed.value:.0f} %)" in shown.text


def test_nothing_is_fetched(page, made_up):
    shown = page(made_up())
    for tag, attrs, _ in shown.elements:
        assert "src" not in attrs and "srcset" not in attrs and tag not in ("link", "iframe", "object", "img", "base")
        assert attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    for name in ("report.css", "report.js"):
        text = files("distill_trainers.reporting").joinpath("assets", name).read_text()
        assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch|XMLHttp|innerHTML|eval", text.replace("// ", ""))


def test_the_policy_lets_only_its_own_script_run(run_folder, made_up):
    html = report_page(read_runs([run_folder(results=made_up())]))
    (policy,) = [a["content"] for a, _ in Page(html).of("meta") if "http-equiv" in a]
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy


HOSTILE = "</script></details><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\u2066&amp;\x00\ud800"


def test_hostile_text_stays_text(run_folder, made_up):
    plain = made_up()
    results = made_up()
    for model in results.models:
        model.source = HOSTILE
        model.notes = [HOSTILE]
    results.data["name"] = HOSTILE
    results.notes = [HOSTILE]
    for info in results.measures.values():
        info.title += HOSTILE
    for sample in results.samples:
        sample.prompt = sample.answer = HOSTILE
        sample.references = [HOSTILE]
        sample.completions = {name: HOSTILE * 2000 for name in sample.completions}
    for text in results.tokens:
        text.prompt = HOSTILE
        text.tokens[3] = HOSTILE
        text.tokens[4] = "x" * 1_000_000
        text.student_top[3] = [TopToken(HOSTILE, 0.5)]
    folder = run_folder(results=plain)
    before = Page(report_page(read_runs([folder])))
    run = read_runs([folder])[0]
    run.evaluation, run.name = results, HOSTILE
    run.record["recipe"] = {HOSTILE: HOSTILE}
    run.record["method"] = run.record["versions"] = HOSTILE
    run.history = [{**entry, HOSTILE: 1.0} for entry in run.history]
    html = report_page([run])
    html.encode()  # no lone surrogates
    after = Page(html)
    assert len(after.of("script")) == len(before.of("script")) and not after.of("img")
    assert html.count("</script>") == len(after.of("script"))
    assert not set(html) & set("\u202e\u2066\x00") and "‹U+202E›" in html
    assert "x" * 100 not in html and "(+999,940)" in html
    for attrs, _ in after.of("script"):
        assert attrs in ({}, {"type": "application/json"})


def test_it_is_readable_by_a_screen_reader(page, made_up):
    for shown in (page(made_up(), made_up(seed=1)), page_of(made_up(students=2))):
        assert shown.of("html")[0][0]["lang"] == "en" and len(shown.of("h1")) == 1 and len(shown.of("main")) == 1
        levels = [int(tag[1]) for tag, _, _ in shown.elements if re.fullmatch(r"h\d", tag)]
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), "a level of headings is left out"
        ids = [a["id"] for _, a, _ in shown.elements if "id" in a]
        assert len(ids) == len(set(ids))
        for _, attrs, _ in shown.elements:
            for name in ("aria-labelledby", "for"):
                assert set(attrs.get(name, "").split()) <= set(ids)
            assert attrs.get("href", "#")[1:] in {*ids, ""}
        assert len(shown.of("caption")) == len(shown.of("table"))
        assert all(a.get("scope") in ("col", "row") for a, _ in shown.of("th"))
        for attrs, _ in shown.of("svg"):
            assert attrs.get("role") == "img" or attrs.get("aria-hidden") == "true"
        drawings = [a for a, _ in shown.of("svg") if a.get("role") == "img"]
        titles = [p for _, p in shown.of("title", "desc") if p[-1] == "svg"]
        assert drawings and len(titles) == 2 * len(drawings)
        for tag in ("input", "select"):
            assert all("label" in parents for _, parents in shown.of(tag))
        for attrs, _ in shown.of("div"):
            assert attrs.get("tabindex") is None or attrs.get("aria-label")


def test_every_text_is_one_stop_of_the_tab_key(page, made_up):
    results = made_up(tokens=6)
    shown = page(results)
    spans = [a for a, parents in shown.of("span") if a.get("class", "").startswith("k") and "ul" not in parents]
    assert len(spans) == sum(len(each.tokens) for each in results.tokens)
    assert sum(a.get("tabindex") == "0" for a in spans) == 6


def test_shades(page, made_up):
    assert [level(v) for v in (None, 0.0, 0.0494, 0.0496, 0.3, 0.7, 1.5, 2.0, 9.0)] == [0, 0, 0, 1, 2, 3, 4, 5, 5]
    assert level(0.69, "jsd") == 5
    script = files("distill_trainers.reporting").joinpath("assets", "report.js").read_text()
    for name, limits in LEVELS.items():  # the script has the same limits, in 1/1000 nats
        assert f"{name}: [{', '.join(map(str, limits))}]" in script
    results = made_up(tokens=1)
    shown = page(results)
    classes = [a["class"] for a, parents in shown.of("span") if "ul" not in parents and a.get("class", "")[:1] == "k"]
    assert classes == [f"k{level(value)}" for value in results.tokens[0].kl]


def test_tokens_that_cannot_be_seen_can():
    assert [shown_token(t) for t in (" ", "   ", "", "\n", "a\tb", " the")] == ["␣", "␣␣␣", "∅", "↵\n", "a→\tb", " the"]


def test_what_the_script_shows_of_a_token(run_folder, made_up):
    results = made_up(tokens=1)
    (compared,) = results.tokens
    html = report_page(read_runs([run_folder(results=results)]))
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])
    assert data["kl"] == [round(1000 * v) for v in compared.kl] and data["names"] == ["the student", "the teacher"]
    for side, tops in zip(data["top"], (compared.student_top, compared.teacher_top), strict=True):
        for place, top in zip(side, tops, strict=True):
            told = [(data["text"][place[i]], place[i + 1] / 1e4) for i in range(0, len(place), 2)]
            assert told == [(t.token, pytest.approx(t.probability, abs=1e-4)) for t in top]


# ---- What is missing ------------------------------------------------------------------------------------------------


def test_missing_parts_say_how_to_get_them(run_folder):
    shown = Page(report_page(read_runs([run_folder()])))
    assert "About 67 % of the gap to the teacher is closed. Forward KL to the teacher went from 1.800 to" in shown.text
    assert "by the log of the training; no intervals" in shown.text
    assert "Forward KL to the teacher nats/token, lower is better 1.800 0.600 0 67 %" in shown.text
    assert "Top-1 agreement with the teacher higher is better 30.0 % 30.0 % 100.0 % 0 %" in shown.text
    assert "Perplexity on the reference text lower is better 9.000 5.000 4.000 80 %" in shown.text
    (note,) = [p for p in re.findall(r"There is no evaluation.*? here too", shown.text)]  # once, not by section
    assert "evaluate --run RUN" in note and "evaluate --student RUN" in note
    assert not {"tokens", "distributions", "samples", "scores"} & {a.get("id") for a, _ in shown.of("h2")}
    assert "run: from 30 at optimiser step 0 to 30 at 40" in shown.text  # per cent in curves too
    assert "Started 2026-01-02 03:04 UTC" in shown.text
    bare = Page(report_page([Run("bare", metrics={"train_loss": 1.0})]))
    for text in (
        "left no run.json",
        "No log of a training",
        "Nothing was measured against",
    ):
        assert text in bare.text
    nothing_held_out = Run("r", history=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}])
    shown = Page(report_page([nothing_held_out]))
    assert "eval_fraction" in shown.text and "no finite numbers are left out of the curves: Loss (1)" in shown.text


def test_an_evaluation_without_teacher_or_baseline(page, made_up):
    results = made_up()
    results.models = results.of_role("student")
    model = results.models[0]
    model.positions, model.calibration, model.exposure, model.lengths, model.cost = [], [], [], None, None
    for each in model.scores.values():
        each.gap_closed = each.difference = None
    results.samples, results.tokens = [], []
    shown = page(results)
    assert "both teacher and baseline" in shown.text and "gap to the teacher is closed" not in shown.text
    assert shown.text.count("Not in this evaluation: it was made without") == 4


def test_energy_that_no_driver_counted(run_folder):
    (run,) = read_runs([run_folder()])
    run.sessions[0]["energy_joules"] = None
    assert "Energy was not counted" in Page(report_page([run])).text


def test_metrics_of_a_demo():
    scores = {
        "teacher": {"kl": 0.0, "parameters": 135_000_000},
        "student before": {"kl": 2.5},
        "student after": {"kl": 0.5},
    }
    run = Run("demo", metrics={"scores": scores}, samples=[{"prompt": "Why?", "teacher": "Because.", "student": "So."}])
    shown = Page(report_page([run]))
    assert "80 % of the gap to the teacher is closed" in shown.text
    assert "Forward KL to the teacher nats/token, lower is better 2.500 0.500 0" in shown.text
    assert "135 M" in shown.text and "Because." in shown.text and "Why?" in shown.text


def test_the_teacher_stands_beside_the_student_in_the_curves():
    history = [
        {"step": s, "eval_rouge_l": 10.0 + s, "eval_teacher_rouge_l": 30.0, "eval_gap_closed_rouge_l": 0.5}
        for s in (1, 2)
    ]
    shown = Page(report_page([Run("r", history=history)]))
    assert "Rouge-L eval_rouge_l" in shown.text and "r, its teacher" in shown.text
    assert "Gap closed at the end: 50 %" in shown.text and "Teacher: Rouge-L" not in shown.text
    assert "50 % of the gap to the teacher is closed. Rouge-L is" in shown.text
    assert "eval_gap_closed_rouge_l" not in shown.text  # the same curve on another scale
    assert "r, its teacher: from 30 at optimiser step 1 to 30 at 2" in shown.text


def test_numbers_that_an_evaluation_could_not_take(page, made_up):
    results = made_up()
    model = results.model("student")
    model.positions[0].mean[3] = model.positions[0].low[4] = None
    model.scores["kl"].value = model.scores["kl"].low = None
    results.tokens[0].kl[0] = None
    model.scores["rouge_l"].per_seed[0] = None
    assert "Forward KL to the teacher" in page(results).text


# ---- Several runs ---------------------------------------------------------------------------------------------------


def test_runs_are_compared(page, made_up):
    one, two = made_up(), made_up(seed=4)
    shown = page(one, two)
    assert "Runs compared" in shown.text and "differ in" not in shown.text
    values = [each.model("student").scores["kl"] for each in (one, two)]
    told = [f"{v.value:.3f} [{v.low:.3f}, {v.high:.3f}] {100 * v.gap_closed.value:.0f} % of the gap" for v in values]
    assert f"Forward KL to the teacher {' '.join(told)}" in shown.text
    best = max(range(2), key=lambda i: values[i].gap_closed.value)
    assert f"run-{best} closed the most of its gap" in shown.text and "their intervals overlap" in shown.text
    two.data["name"], two.settings["temperature"] = "other.jsonl", 0.5
    assert "These evaluations differ in data and settings" in page_of(two, one).text


def page_of(*evaluations):
    return Page(report_page([Run(f"run-{i}", evaluation=each) for i, each in enumerate(evaluations)]))


def test_settings_that_differ(run_folder):
    runs = read_runs([run_folder("a"), run_folder("b")])
    runs[1].record["recipe"] = {"learning_rate": 0.001, "divergence": "jsd"}
    shown = Page(report_page(runs))
    assert "lmbda 0.5 –" in shown.text and "divergence – jsd" in shown.text
    assert "Settings that differ (– is the default) a b lmbda" in shown.text.replace("  ", " ")


# ---- Looks ----------------------------------------------------------------------------------------------------------


def _luminance(colour):
    parts = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    linear = [
        (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for c in (int(parts[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_in_light_dark_and_print():
    """WCAG 2.2, AA: 4.5 of text (1.4.3), 3 of lines and marks (1.4.11)."""
    css = files("distill_trainers.reporting").joinpath("assets", "report.css").read_text()
    light, dark, paper = (
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\n *\}", css, re.S)
    )
    for colours in (light, {**light, **dark}, {**light, **paper}):
        text = [(t, b) for t in ("text", "quiet", "good", "bad") for b in ("page", "raised")]
        text += [("text", f"k{i}") for i in range(1, 5)] + [("k5-text", "k5"), ("text", "warn"), ("link", "page")]
        for front, back in text:
            assert _contrast(colours[front], colours[back]) >= 4.5, (front, back)
        for front, back in [(f"s{i}", b) for i in range(8) for b in ("raised", "page")] + [("focus", "page")]:
            assert _contrast(colours[front], colours[back]) >= 3, (front, back)


def test_print_and_dark_and_phone_have_their_rules():
    css = files("distill_trainers.reporting").joinpath("assets", "report.css").read_text()
    for media in ("print", "(prefers-color-scheme: dark)", "(max-width: 40rem)"):
        assert f"@media {media}" in css
    assert css.count("{") == css.count("}")


@pytest.mark.slow
def test_a_large_report_stays_small(page, made_up, run_folder):
    folder = run_folder(results=made_up(samples=200, tokens=200, length=128))
    html = report_page(read_runs([folder]))
    assert len(html.encode()) < 6 * 2**20
    opened = [a for a, _ in Page(html).of("details") if "open" in a]
    assert len(opened) < 12  # the others cost no layout


# ---- The command ----------------------------------------------------------------------------------------------------


def test_the_command(run_folder, made_up, capsys, tmp_path):
    first, second = run_folder("one", made_up()), run_folder("two")
    assert main(["report", str(first), str(second), "--output", str(tmp_path / "sub" / "both.html"), "--no-plots"]) == 0
    assert "both.html" in capsys.readouterr().out
    shown = Page((tmp_path / "sub/both.html").read_text(encoding="utf-8"))
    assert "one" in shown.text and "Runs compared" in shown.text
    assert main(["report", str(second), "--no-plots"]) == 0 and (second / "report.html").is_file()


def test_the_command_refuses(run_folder, capsys, tmp_path):
    folder = run_folder()
    for argv, status, told in (
        ([str(tmp_path / "nowhere")], 2, "There is no run at"),
        ([str(folder), "--evaluation", str(tmp_path / "none.json")], 2, "There are no results at"),
        ([str(folder), "--output", str(tmp_path)], 2, "which is a folder"),
    ):
        assert main(["report", *argv]) == status
        assert told in capsys.readouterr().err
    (folder / "trainer_state.json").write_text("{")
    assert main(["report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error and "Traceback" not in error


def test_plots_beside_it(run_folder, made_up, capsys):
    pytest.importorskip("matplotlib")
    folder = run_folder(results=made_up(students=2))
    assert main(["report", str(folder)]) == 0
    names = {path.name for path in (folder / "report_plots").iterdir()}
    stems = {"loss", "eval_kl", "eval_perplexity", "calibration", "gap_closed", "lengths"}
    stems |= {"kl_by_position_reference", "kl_by_position_student"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert "Forward KL to the teacher" in (folder / "report_plots/gap_closed.svg").read_text(encoding="utf-8")


def test_without_matplotlib_the_page_is_written(run_folder, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = run_folder()
    assert main(["report", str(folder)]) == 0
    assert "[plots]" in capsys.readouterr().out and (folder / "report.html").is_file()
    assert not (folder / "report_plots").exists()
