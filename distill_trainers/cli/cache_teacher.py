"""Keep a teacher's answers on disk ahead of training, or look into what is kept.

accelerate launch [--config_file …] -m distill_trainers.cli.cache_teacher --config recipes/….yaml
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..exceptions import ConfigurationError
from ..locks import holding_run
from . import report_errors, say, shows_usage

_USAGE = """usage: distill-trainers cache-teacher --config RECIPE [--teacher_cache FOLDER] [--KEY_OF_THE_RECIPE VALUE]
       distill-trainers cache-teacher --inspect FOLDER

The first form asks the teacher for the recipe's training and evaluation rows and keeps its answers in FOLDER; rows that
are there already are not asked for again, so it goes on where it was stopped. The second form tells what a cache holds,
and reads all of it to find damage (exit status 1 if there is any)."""


def main(argv: Sequence[str]) -> int:
    """Fill a cache, or inspect one."""
    if shows_usage(argv, _USAGE):
        return 0
    if "--inspect" in argv:
        return inspect(argv)
    return fill(argv)


def fill(argv: Sequence[str]) -> int:
    """Ask the teacher for what the recipe's cache lacks; return the exit status."""
    from ..recipe.parse import parse_recipe
    from ..trainers.lifecycle.cache_filling import fill_cache
    from .train import build_trainer

    recipe = parse_recipe(argv, command="cache-teacher")
    folder = recipe.args.teacher_cache
    if folder is None:
        raise ConfigurationError(
            "The recipe names no folder for the cache; set `teacher_cache` in it, or add `--teacher_cache FOLDER`."
        )
    if recipe.args.teacher_placement == "cached":
        recipe.args.teacher_placement = "auto"  # what is to be read alone is filled from a live one
    with holding_run(recipe.args.output_dir):  # the cache itself may have any number of writers
        trainer = build_trainer(recipe)
        cache = trainer.teacher.store
        if trainer.is_world_process_zero():
            for name in cache.remove_unreadable():
                say(f"Removed the unreadable shard {name}; its rows are asked for again.")
        started = time.monotonic()
        done = fill_cache(trainer)
    if trainer.is_world_process_zero():
        say(
            f"{done['computed']:,} of {done['rows']:,} rows were asked for in {time.monotonic() - started:.0f} s. "
            f"{folder} holds {len(cache):,} rows with {done['tokens']:,} trained tokens, {_size(cache.num_bytes)}."
        )
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Print what a cache holds; return 1 if some of it is damaged."""
    from ..teachers.cache.report import inspect_cache

    position = list(argv).index("--inspect") + 1
    if position >= len(argv) or len(argv) != 2:
        raise ConfigurationError(f"Got {' '.join(argv)}; expected `--inspect FOLDER` and nothing else.")
    folder = Path(argv[position])
    report = inspect_cache(folder)
    for name, value in _lines(report):
        say(f"{name:<22} {value}")
    for name, reason in report.damaged.items():
        say(f"{'damaged':<22} {name}: {reason}")
    return 1 if report.damaged else 0


def _lines(report: Any) -> list[tuple[str, str]]:
    identity = report.identity
    stored = identity.dtype or ("the teacher gave them" if identity.kind == "hidden" else "float32")
    lines = [("teacher", identity.teacher), ("kind", identity.kind), ("stored as", stored)]
    lines += [(name, str(getattr(identity, name))) for name in ("top_k", "draws", "seed") if getattr(identity, name)]
    lines += [
        ("vocabulary", f"{identity.vocab_size:,} ids"),
        ("tokenizer", identity.tokenizer),
        ("mixed precision", identity.autocast),
        ("teacher settings", str(identity.teacher_settings or "none")),
        ("teacher known by", ", ".join(identity.files) if identity.files else f"weights {identity.weights}"),
        ("rows", f"{report.rows:,}"),
        ("trained tokens", f"{report.tokens:,}"),
        ("size", f"{_size(report.bytes)} in {report.shards:,} shards"),
    ]
    if report.retained_mass is not None:
        lines.append(("mass in the top k", f"{report.retained_mass:.4%} of the teacher's, as a mean over tokens"))
    if report.abandoned:
        lines.append(("unfinished files", f"{report.abandoned} (of a running or killed writer; ignored)"))
    return lines


def _size(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
