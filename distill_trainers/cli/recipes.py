"""Put the recipes and the launch settings that the documentation names into a folder, for those without a clone."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..exceptions import ConfigurationError
from ..storage import check_folder, writing_folder
from . import report_errors, say

FOLDERS = ("recipes", "accelerate_configs")
_PACKAGE = Path(__file__).parents[1]


def make_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(prog="distill-trainers recipes", description=__doc__)
    parser.add_argument("folder", nargs="?", default=".", help="where they go (%(default)s)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Copy both folders; what is there already is left alone, and refused."""
    folder = Path(os.path.expanduser(make_parser().parse_args(list(argv)).folder))
    check_folder("folder", folder)
    there = [str(folder / name) for name in FOLDERS if (folder / name).exists()]
    if there:
        raise ConfigurationError(
            f"Got a folder with {' and '.join(there)}; expected one without, since nothing is replaced. Name another "
            "folder, or rename what is there."
        )
    with ExitStack() as both:  # or none: where the second cannot be written, the first goes again
        for name in FOLDERS:
            writing = writing_folder(folder / name, f"the {name}", "Free some space, or name another folder.")
            shutil.copytree(source_of(name), both.enter_context(writing), dirs_exist_ok=True)
    say(f"Copied {' and '.join(FOLDERS)} to {folder}. Start from there: recipes name their data as recipes/….")
    return 0


def source_of(name: str) -> Path:
    """Find one of the folders: in the installed package, or beside it in a clone."""
    return next(place / name for place in (_PACKAGE, _PACKAGE.parent) if (place / name).is_dir())


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
