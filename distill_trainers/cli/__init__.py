"""`distill-trainers COMMAND …`: everything that can be done without writing Python."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS = {
    "train": (
        "train",
        "train a student from a recipe (start it with `accelerate launch -m distill_trainers.cli.train`)",
    ),
    "recipes": ("recipes", "put the recipes and launch settings of the documentation into a folder"),
    "doctor": ("doctor", "look at a recipe before it runs: tokenizers, templates, memory, disk, time"),
    "prune": ("prune", "make a recipe's student out of its teacher: fewer layers, narrower ones, or both"),
    "cache-teacher": ("cache_teacher", "keep a teacher's answers to a recipe's rows on disk; --inspect looks at them"),
    "pairs": ("pairs", "make preference pairs from a recipe's teacher, student and prompts"),
    "rationales": ("rationales", "chains of thought from a teacher: extract, parse, verify, dual"),
    "evaluate": ("evaluate", "score students beside their teacher, with intervals and the gap that was closed"),
    "report": ("report", "write one HTML file that shows what runs did: curves, scores, texts token by token, cost"),
    "serve-teacher": ("serve_teacher", "answer the questions of trainers elsewhere about their tokens, over HTTP"),
    "push": ("push", "upload a finished run, or a file of pairs or rationales, to the Hub; goes on where it stopped"),
    "import-gguf": ("import_gguf", "turn a GGUF checkpoint into an ordinary Hugging Face folder"),
    "demo": ("demo", "distil a real 135M teacher into a smaller student, and show how much nearer it came"),
    "proof": ("proof", "a three-minute proof: every method on a tiny task learnt from scratch"),
    "completion": ("completion", "print what completes commands and options in bash, zsh or tcsh"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 with a one-line reason for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print("usage: distill-trainers COMMAND [options]\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<14} {text}")
        print("\n`distill-trainers COMMAND --help` lists the options of one, with examples;")
        print("--traceback shows where an error arose.")
        return 0
    if args[0] not in COMMANDS:
        print(f"error: unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module = f".{COMMANDS[args[0]][0]}"
    try:
        return report_errors(lambda argv: importlib.import_module(module, __name__).main(argv), args[1:])
    finally:
        if {"-h", "--help"} & set(args[1:]):
            from .examples import examples_of

            print(f"\n{examples_of(args[0])}")


def shows_usage(argv: Sequence[str], usage: str) -> bool:
    """Tell whether help was asked for and print it; else let the command begin, with warnings alone in its log."""
    if argv and argv[0] not in ("-h", "--help"):
        start_log()
        return False
    print(usage)
    return True


def start_log(level: int = logging.WARNING) -> None:
    """Let the log go to stderr, without secrets."""
    from ..redaction import Redacting

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels for GPUs wherever there is none
    libraries = [logging.getLogger(name) for name in ("", "transformers", "datasets", "huggingface_hub")]
    for handler in {handler for logger in libraries for handler in logger.handlers}:
        if not any(isinstance(known, Redacting) for known in handler.filters):
            handler.addFilter(Redacting())


def say(text: str, **options: Any) -> None:
    """Print text with names of the user's in it: without secrets, and without what a terminal would obey."""
    from ..escaping import visible
    from ..redaction import redacted

    print(visible(redacted(text)), **options)


def report_errors(command: Callable[[list[str]], int | None], argv: Sequence[str]) -> int:
    """Run `command(argv)`; every error is printed in one line, and the traceback of an unexpected one kept in a file.

    Returns:
        0, 2 for bad input, 1 for what ended a run that had begun, and 130 after Ctrl-C.
    """
    from ..exceptions import BAD_INPUT, FAILURES
    from . import last_net

    argv = list(argv)
    shows = last_net.wants_traceback(argv)
    try:
        return command(argv) or 0
    except (*BAD_INPUT, *FAILURES) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        raise
    except Exception as error:
        if shows:
            raise
        last_net.tell(error, argv)
        return 1
