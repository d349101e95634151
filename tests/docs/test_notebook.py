"""The notebook: its cells run in order, and what is kept in it is text."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = DOCS / "notebooks/first_distillation.ipynb"


@pytest.fixture(scope="module")
def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_what_is_kept_is_short_text(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs and {output["output_type"] for output in outputs} == {"stream"}
    assert NOTEBOOK.stat().st_size < 20_000
    kept = "".join(line for output in outputs for line in output["text"])
    assert "of the gap closed" in kept and not re.search(r"/(home|tmp|work|root)/", kept)


def test_its_links_lead_somewhere(cells):
    text = "".join(line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\(([^)\s:]+)\)", text)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)
    for page in (DOCS / "README.md", DOCS.parent / "README.md"):
        assert "notebooks/first_distillation.ipynb" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_cells_run_in_order(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
    scores = {model.name: model.scores for model in names["results"].models}
    gap = scores["student"]["kl"].gap_closed
    assert gap.low > 0.7 and scores["student"]["accuracy"].value > scores["baseline"]["accuracy"].value + 0.3
    assert names["status"] == 0 and "of the gap to the teacher is closed" in (
        tmp_path / "runs/first/report.html"
    ).read_text(encoding="utf-8")
