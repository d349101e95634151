"""Charts draw what they are given, where it belongs, and say it in words."""

import re

import pytest

from distill_trainers.reporting.charts import (
    Scale,
    Series,
    histogram_chart,
    interval_chart,
    legend,
    line_chart,
    nice_ticks,
    short,
    thinned,
)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3, 17), (1e-7, 3e-7), (0.41, 0.43), (5, 5), (0, 0), (-2, -2), (1e9, 7e12), (0, 128)]
)
def test_ticks_enclose_the_data_in_equal_round_steps(low, high):
    ticks = nice_ticks(low, high)
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:.2e}"[0] in "125"


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (None, "–"), (0.5, "0.5"), (0.00005, "5e-5"), (1234, "1234"), (12345, "12.35k"), (-2.5e9, "-2.5G")],
)
def test_short_numbers(value, shown):
    assert short(value) == shown


def test_scales():
    scale = Scale(0, 10, 100, 300)
    assert [scale(v) for v in (0, 5, 10)] == [100, 200, 300]
    assert scale(1e9) < 310  # what lies outside of the axes is not drawn far off


def test_thinning_keeps_ends_and_peaks():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[4321] = (4321.0, 9.0)
    points[77] = (77.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 402 and {points[0], points[77], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:50]) == points[:50]


def test_a_line_goes_through_its_points():
    chart = line_chart([Series("a", [(0, 0), (5, 1), (10, 2)])], title="T", x_label="step", y_label="nats")
    (line,) = re.findall(r'<polyline points="([^"]*)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert x0 < x1 < x2 and y0 > y1 > y2 and x1 == pytest.approx((x0 + x2) / 2) and y1 == pytest.approx((y0 + y2) / 2)
    assert "nats by step. a: from 0 at step 0 to 2 at 10, lowest 0, highest 2." in chart
    assert re.search(r'role="img" aria-labelledby="(drawing-\d+)-t \1-d"', chart) and "<title" in chart


def test_lines_differ_in_more_than_colour():
    drawn = [Series(f"s{i}", [(0, i), (1, i + 1)], i) for i in range(8)]
    chart = line_chart(drawn, title="T", x_label="x", y_label="y")
    dashes = re.findall(r"<polyline [^>]*?(?:stroke-dasharray=\"([\d ]+)\")?>", chart)
    assert len(dashes) == 8 == len(set(dashes))
    assert legend([("a", 0), ("b", 1)]).count("<li>") == 2 and legend([("a", 0)]) is None


def test_steps_have_no_halves():
    chart = line_chart([Series("a", [(1, 0), (2, 10), (3, 20)])], title="T", x_label="token", y_label="nats")
    assert ">1.5<" not in chart and ">2<" in chart


def test_nothing_to_draw_is_said():
    assert "There is nothing to draw." in line_chart([Series("a", [])], title="T", x_label="x", y_label="y")


def test_intervals_and_their_text():
    rows = [("before", 1, 0.2, 0.1, 0.3, "0.2"), ("after", 2, 0.8, None, None, "0.8")]
    chart = interval_chart(rows, title="T", x_label="share")
    assert "before 0.2, interval 0.1 to 0.3; after 0.8." in chart
    assert len(re.findall(r'<line [^>]*class="line s1"', chart)) == 3 and 'class="line s2"' not in chart


def test_bars_are_shares():
    chart = histogram_chart([0, 1, 2, 3], [1, 3, 0], title="T", x_label="tokens", style=0, most=100)
    tall = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert len(tall) == 2 and tall[1] == pytest.approx(3 * tall[0], rel=0.02)
    assert "4 values of tokens; most, 3, between 1 and 2." in chart
