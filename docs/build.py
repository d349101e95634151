"""The whole documentation as HTML: `python docs/build.py [FOLDER]`, by default into build/docs.

Pages are copied as they lie in the repository, so that links between them, and to recipes, are the same here and on
GitHub; the API reference is written beside them. Any warning is an error: a link that leads nowhere, a page that no
contents name, a block that cannot be read.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from reference import reference_pages

from distill_trainers.installing import pip_install

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
COPIED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "recipes", "accelerate_configs", "benchmarks")
CONTENTS = """
```{toctree}
:hidden:
:caption: %s

%s
```
"""

# Servers and people open this one; Sphinx names its own after the page.
INDEX = '<!DOCTYPE html><meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">Documentation</a>'


def main(argv: list[str]) -> int:
    """Write `source`, the copied pages, and `html` into the folder; the exit status is Sphinx's."""
    try:
        from sphinx.cmd.build import main as sphinx
    except ImportError:
        print(f"error: Sphinx is not installed: {pip_install('docs')}.", file=sys.stderr)
        return 2
    folder = Path(argv[0]).resolve() if argv else ROOT / "build/docs"
    source = folder / "source"
    copy_pages(source)
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(DOCS), "-d", str(folder / "doctrees")]
    status = sphinx([*options, str(source), str(folder / "html")])
    if status == 0:
        (folder / "html" / "index.html").write_text(INDEX, encoding="utf-8")
        print(f"Wrote {folder / 'html' / 'index.html'}")
    return status


def copy_pages(source: Path) -> None:
    """Everything that pages link to, the API reference, and contents in the first page."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    api = source / "docs/api"
    api.mkdir()
    for name, text in reference_pages().items():
        (api / name).write_text(text, encoding="utf-8")
    with (source / "README.md").open("a", encoding="utf-8") as first:
        for caption, pages in contents(source).items():
            first.write(CONTENTS % (caption, "\n".join(pages)))


def contents(source: Path) -> dict[str, list[str]]:
    """Pages under their captions: those of docs/ as its index names them, then all others."""
    index = (source / "docs/README.md").read_text(encoding="utf-8")
    named = [f"docs/{page}" for page in dict.fromkeys(re.findall(r"^\| \[[^]]*\]\(([^)]+)\.md\)", index, re.MULTILINE))]
    others = {str(path.relative_to(source).with_suffix("")) for path in source.rglob("*.md")} - {"README", *named}
    api = sorted(page for page in others if page.startswith("docs/api/"))
    project = sorted(page for page in others if "/" not in page)
    recipes = sorted(others - {*api, *project, "docs/README"})
    return {"Documentation": ["docs/README", *named], "API": api, "Recipes": recipes, "Project": project}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
