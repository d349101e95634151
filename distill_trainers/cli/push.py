"""Upload a finished run, or a file of pairs or rationales, to the Hub.

distill-trainers push RUN --repo owner/name
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..exceptions import ConfigurationError
from ..locks import holding
from . import report_errors, say


def make_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(
        prog="distill-trainers push",
        description="Upload a finished student with its card, or a JSONL file of pairs or rationales as a dataset. "
        "What is there already is not sent again, so an upload that was interrupted goes on.",
    )
    parser.add_argument("source", help="output_dir of a run, or a .jsonl file")
    parser.add_argument("--repo", required=True, help="owner/name on the Hub; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", help="a branch other than main")
    parser.add_argument("--evaluation", help="evaluation.json with scores for the card (by default that of the run)")
    parser.add_argument("--data", help="of a file: where its prompts or questions come from, for the licence")
    return parser


def main(argv: Sequence[str]) -> int:
    """Upload; a run's card gets the scores of an evaluation first, if there are some."""
    options = make_parser().parse_args(list(argv))
    source = Path(os.path.expanduser(options.source))
    if source.is_dir():
        address = push_run(source, options)
    elif source.is_file() and source.suffix == ".jsonl":
        address = push_file(source, options)
    else:
        raise ConfigurationError(
            f"There is no run and no .jsonl file at {options.source!r}; expected the `output_dir` of a run, or what "
            "`distill-trainers pairs` or `rationales` wrote."
        )
    say(f"Uploaded {source} to {address}.")
    return 0


def push_run(folder: Path, options: argparse.Namespace) -> str:
    """Upload a folder that holds a student; return the address."""
    from .. import hub

    if not hub.stale_weights(folder):
        raise ConfigurationError(
            f"{str(folder)!r} holds no model: no `model.safetensors` and no `adapter_model.safetensors`. Point to the "
            "`output_dir` of a run that has finished."
        )
    _refuse_local_base(folder)
    with holding(folder, "RUN"):
        _with_scores(folder, options.evaluation)
        names = hub.published_files(folder)
        say(f"Uploading {', '.join(names)}")
        return hub.upload(
            folder,
            options.repo,
            private=options.private or None,
            revision=options.revision,
            message="Upload with distill-trainers push",
            only=names,
        )


def _refuse_local_base(folder: Path) -> None:
    from .. import hub, models

    base = hub.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if base and models.looks_like_path(base):
        raise ConfigurationError(
            f"{str(folder)!r} holds an adapter for the local folder {base!r}, which nobody else can load. Upload a "
            "merged model (`merge_adapter: true` writes `merged` beside it), or an adapter of a base on the Hub."
        )


def _with_scores(folder: Path, evaluation: str | None) -> None:
    from ..cards.model_card import with_scores
    from ..evaluation.results import FILE_NAME, EvaluationResults
    from ..storage import write_file
    from ..trainers.lifecycle.publishing import MERGED_NAME

    card, run = folder / "README.md", folder.parent if folder.name == MERGED_NAME else folder
    places = [Path(evaluation)] if evaluation else [place / FILE_NAME for place in (folder, run, run / "evaluation")]
    file = next((place for place in places if place.exists()), None)
    if file is None or not card.is_file():
        if evaluation:
            raise ConfigurationError(
                f"There is no {evaluation!r}, or no card in {str(folder)!r} to put its scores into."
            )
        return
    text = with_scores(card.read_text(encoding="utf-8"), EvaluationResults.load(file), run.resolve().name)
    write_file(card, text, "the model card", "The student is as it was.")


def push_file(file: Path, options: argparse.Namespace) -> str:
    """Upload rows as a dataset; return its address."""
    from ..cards.dataset_card import Writers, push_rows
    from ..storage import read_rows

    rows = read_rows(file)
    return push_rows(
        rows, options.repo, Writers(data=options.data), private=options.private or None, revision=options.revision
    )


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
