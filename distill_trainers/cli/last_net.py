"""What is no error of the package's own: told in one line, with the traceback in a file."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..escaping import visible
from ..exceptions import ConfigurationError
from ..redaction import redacted
from ..settings import shown

SHOW = "DISTILL_TRAINERS_TRACEBACK"
_PACKAGE = Path(__file__).parents[1]
_IN_WORDS = {
    "OutOfMemoryError": "the device's memory is full. Take a smaller `per_device_train_batch_size` (or "
    "`per_device_train_tokens`) or `loss_chunk_mib`, or `activation_checkpointing: true`; `distill-trainers doctor` "
    "says what fits",
    "MemoryError": "this machine's memory is full. Take fewer `dataset_num_proc`, or a smaller model or batch",
    "RecursionError": "values lie too deep in each other. Look for lists or mappings without end in the data",
}


def wants_traceback(argv: list[str]) -> bool:
    """Tell whether tracebacks go to the terminal; the option `--traceback` is taken out of `argv`."""
    asked = "--traceback" in argv
    while "--traceback" in argv:
        argv.remove("--traceback")
    return asked or os.environ.get(SHOW, "").lower() in ("1", "true", "yes")


def bad_name(error: Exception) -> str | None:
    """Say what to do about a name that is longer than any file's; None of another error."""
    if not isinstance(error, OSError) or error.errno != errno.ENAMETOOLONG:
        return None
    return f"Got the name {shown(error.filename)!r}, longer than a file's can be; expected a shorter one. Mend it."


def tell(error: Exception, argv: Sequence[str]) -> None:
    """Print one line about an error that nobody expected, and write its traceback to a file."""
    kind, reason = type(error).__name__, " ".join(str(error).split("\n")[0].split())
    reason = _IN_WORDS.get(kind) or (reason if len(reason) <= 300 else f"{reason[:299]}…")
    rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1") or 1)
    process = f" (process {rank} of {world})" if world > 1 else ""
    where = _written(error, argv, f"rank{rank}-" if world > 1 else "")
    said = visible(redacted(f"{_doing(error)}{process}: {kind}: {reason.rstrip('.')}"))
    print(f"error: {said}; {where}.", file=sys.stderr)  # the file's name stays one that can be copied


def _doing(error: Exception) -> str:
    """Name the innermost place of this package that an error has passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    if not frames:
        return "unexpected"
    file = Path(frames[-1].filename).resolve().relative_to(_PACKAGE)
    return f"unexpected, in {file.with_suffix('').as_posix()} ({frames[-1].name})"


def _is_ours(name: str) -> bool:
    file = Path(name)
    return file.is_absolute() and file.resolve().is_relative_to(_PACKAGE) and file != Path(__file__)


def _written(error: Exception, argv: Sequence[str], process: str) -> str:
    """Write the traceback into the command's folder, or where temporary files go; say where it is."""
    text = redacted("".join(traceback.format_exception(error)))
    for folder in filter(None, (_folder(argv), tempfile.gettempdir())):
        try:  # `mkstemp` follows no link that lies there, and lets nobody else read it
            prefix = f"traceback-{process}{time.strftime('%Y%m%d-%H%M%S')}-"
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=".txt", dir=folder)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
        except (OSError, ValueError):
            continue
        return f"the traceback is in {name}"
    return f"no folder takes its traceback: set {SHOW}=1 to see it here"


def _folder(argv: Sequence[str]) -> str | None:
    """Find the folder of the command's results, if it is there; nothing that is read here may fail."""
    from ..recipe.reading import read_settings

    named = {}
    for option, value in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, behind = option.partition("=")
        if name.startswith("--"):
            named[name[2:].replace("-", "_")] = behind if equals else value
    try:
        settings = read_settings(named["config"], "The recipe") if "config" in named else {}
    except (ConfigurationError, OSError, ValueError):
        settings = {}
    folders = [place.get(name) for place in (named, settings) for name in ("output_dir", "folder")]
    folder = next((f for f in folders if isinstance(f, str) and f and "\0" not in f), None)
    return folder if folder and os.path.isdir(os.path.expanduser(folder)) else None
