"""Draw the figures of docs/ that show kept results; no model is run.

python benchmarks/figures.py        # docs/figures/equal_time.svg, of results/epyc-2-cores/methods.json
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/epyc-2-cores/methods.json"
FIGURE = ROOT / "docs/figures/equal_time.svg"
START, TEACHER = "the student at the start", "the teacher"
WIDTH, LEFT, RIGHT, TOP, ROW = 820, 340, 60, 64, 26
STYLE = """
    .page { fill: #ffffff; } .grid { stroke: #d5dae2; } .before { stroke: #8a93a3; stroke-dasharray: 5 4; }
    text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1b1e24; }
    .small { font-size: 12px; fill: #454c58; } .interval { stroke-width: 2; }
    .ours { stroke: #0060a8; fill: #0060a8; } .theirs { stroke: #b04a00; fill: #b04a00; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #14171c; } .grid { stroke: #3a414c; } text { fill: #e8eaee; } .small { fill: #b9c0cb; }
      .ours { stroke: #6bb7ff; fill: #6bb7ff; } .theirs { stroke: #ffa15c; fill: #ffa15c; }
    }"""


def equal_time(results: dict[str, Any]) -> str:
    """Return the SVG: KL to the teacher after equal CPU time, nearest first, with intervals over prompts."""
    before = results[START]["scores"]["kl"]["value"]
    rows = {name: found for name, found in results.items() if name not in (START, TEACHER)}
    rows = dict(sorted(rows.items(), key=lambda row: row[1]["scores"]["kl"]["value"]))
    scores = [found["scores"]["kl"] for found in rows.values()]
    least, most = min(s["low"] for s in scores) - 0.05, max(s["high"] for s in scores) + 0.05
    height = TOP + ROW * len(rows) + 66
    bottom = TOP + ROW * len(rows)

    def x(value: float) -> str:
        return f"{LEFT + (value - least) / (most - least) * (WIDTH - LEFT - RIGHT):.1f}"

    told = "; ".join(f"{name} {found['scores']['kl']['value']:.2f}" for name, found in rows.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t d">',
        '  <title id="t">How near each method comes to its teacher in equal time</title>',
        f'  <desc id="d">KL to the teacher, before training {before:.2f}; afterwards: {escape(told)}.</desc>',
        f"  <style>{STYLE}\n  </style>",
        f'  <rect class="page" width="{WIDTH}" height="{height}"/>',
        '  <text class="small" x="20" y="26">KL(p‖q) on 37 held-out prompts after 150 s of CPU time, nats</text>',
    ]
    for tenth in range(int(least * 10) + 1, int(most * 10) + 1, 2):
        value = tenth / 10
        parts.append(f'  <line class="grid" x1="{x(value)}" y1="{TOP - 12}" x2="{x(value)}" y2="{bottom}"/>')
        parts.append(f'  <text class="small" x="{x(value)}" y="{bottom + 18}" text-anchor="middle">{value:.1f}</text>')
    parts.append(f'  <line class="before" x1="{x(before)}" y1="{TOP - 12}" x2="{x(before)}" y2="{bottom}"/>')
    parts.append(f'  <text class="small" x="{x(before)}" y="{TOP - 18}" text-anchor="middle">before</text>')
    for place, (name, found) in enumerate(rows.items()):
        y, score = TOP + ROW * place + 8, found["scores"]["kl"]
        kind = "theirs" if "TRL" in name else "ours"
        parts.append(f'  <text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        line = f'x1="{x(score["low"])}" y1="{y}" x2="{x(score["high"])}" y2="{y}"'
        parts.append(f'  <line class="interval {kind}" {line}/>')
        for at in (x(score["least"]), x(score["most"])):
            parts.append(f'  <line class="{kind}" x1="{at}" y1="{y - 7}" x2="{at}" y2="{y + 7}"/>')
        if kind == "ours":
            parts.append(f'  <circle class="ours" cx="{x(score["value"])}" cy="{y}" r="4"/>')
        else:
            parts.append(
                f'  <rect class="theirs" x="{float(x(score["value"])) - 4:.1f}" y="{y - 4}" width="8" height="8"/>'
            )
    note = (
        "Line: 95 % over prompts; ticks: both seeds. Round: trainers of this project; square: TRL's. 0 is the teacher."
    )
    parts.append(f'  <text class="small" x="20" y="{bottom + 46}">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    FIGURE.write_text(equal_time(json.loads(RESULTS.read_text(encoding="utf-8"))["results"]), encoding="utf-8")
    print(f"Written: {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
