"""`distill-trainers COMMAND …`: everything that can be done without writing Python."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
        print("\n`distill-trainers COMMAND --help` lists the options of one, with examples.")
        print("--version tells which this is; --import MODULE, behind a command, adds a method of your own;")
        print("--traceback shows where an error arose.")
        return 0
    if args[0] in ("-V", "--version"):
        from .. import __version__

        print(f"distill-trainers {__version__}")
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f" Did you mean `distill-trainers {near[0]}`?" if near else ""
        print(f"error: unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2
    module = f".{COMMANDS[args[0]][0]}"
    asks_for_help = bool({"-h", "--help"} & set(args[1:]))
    try:
        with _with_examples(args[0]) if asks_for_help else contextlib.nullcontext():
            return report_errors(lambda argv: importlib.import_module(module, __name__).main(argv), args[1:])
    except BrokenPipeError:
        if not asks_for_help:
            raise
        with contextlib.suppress(OSError, ValueError):  # `… --help | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextlib.contextmanager
def _with_examples(command: str) -> Iterator[None]:
    """Print examples of a command below its help, after which argparse leaves."""
    from .examples import examples_of

    try:
        yield
    finally:
        print(f"\n{examples_of(command)}", flush=True)


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
    from .command_line import import_modules, quiet_libraries, with_config

    quiet_libraries()
    argv = with_config(argv)
    shows = last_net.wants_traceback(argv)
    try:
        return command(import_modules(argv)) or 0
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
        if (told := last_net.bad_name(error)) is not None:
            print("error:", told, file=sys.stderr)
            return 2
        last_net.tell(error, argv)
        return 1
