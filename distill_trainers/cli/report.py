"""One HTML file that shows what a run did.

distill-trainers report RUN [RUN …]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..installing import pip_install
from . import report_errors, say


def make_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(
        prog="distill-trainers report",
        description="Write what runs did into one HTML file that needs no network, and plots for papers beside it.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or an evaluation.json")
    parser.add_argument("--output", help="the file to write; by default report.html in the first run's folder")
    parser.add_argument("--evaluation", help="an evaluation to show with the first run, in place of its own")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG and SVG files")
    return parser


def main(argv: Sequence[str]) -> int:
    """Read the runs, write the page, and the plots beside it."""
    from ..exceptions import ConfigurationError
    from ..locks import holding
    from ..reporting.page import FILE_NAME, write_report
    from ..reporting.plots import plot_runs
    from ..reporting.runs import read_runs

    options = make_parser().parse_args(list(argv))
    runs = read_runs(options.runs, options.evaluation)
    first = Path(options.runs[0])
    file = Path(options.output) if options.output else (first if first.is_dir() else first.parent) / FILE_NAME
    if file.is_dir():
        raise ConfigurationError(
            f"Got `--output {options.output}`, which is a folder; expected a file such as report.html."
        )
    with holding(file, "--output", beside=True):  # the run itself may go on
        write_report(runs, file)
        say(f"Wrote {file} ({file.stat().st_size / 2**20:.1f} MiB). Open it in any browser.")
        if options.no_plots:
            return 0
        plots = plot_runs(runs, file.with_name(f"{file.stem}_plots"))
    if plots is None:
        print(f"No plots were written: `{pip_install('plots')}` brings matplotlib.")
    elif plots:
        say(f"Plots for papers are in {plots[0].parent}: {', '.join(sorted({plot.stem for plot in plots}))}.")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
