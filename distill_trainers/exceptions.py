"""Errors of the package. Every message says what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class ConfigurationError(ValueError):
    """Settings that cannot work, alone or together. Raised before any model is loaded where that is possible."""


class DatasetError(ValueError):
    """A dataset that cannot be trained on: a missing column, no rows, rows without completions."""


class NoUsableRowsError(DatasetError):
    """Each row by itself is left out, so that none is there to train on."""


class VocabularyError(ValueError):
    """Student and teacher do not mean the same token by the same id."""


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite; that step changed no weight."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read; checkpoints written earlier are left as they were."""


class UnlikeModelError(RuntimeError):
    """A model that was merged or saved does not answer as the one that was trained; what was trained is kept."""


class TeacherServerError(OSError):
    """A teacher behind HTTP does not answer any more, or answers what it should not; `status` is that of HTTP."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class CacheError(OSError):
    """A teacher cache could not be written or read; what was written earlier is left as it was."""


class HubError(OSError):
    """The Hub could not be reached or refused; what lies on this machine is left as it was."""


# What the user mends before anything has run, and what ends a run that has.
BAD_INPUT = (ConfigurationError, DatasetError, VocabularyError)
FAILURES = (CacheError, CheckpointError, HubError, TeacherServerError, TrainingDivergedError, UnlikeModelError)


def refuse_unknown_keys(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse keys that are not known, suggesting the nearest ones.

    Raises:
        ConfigurationError: for the first unknown key.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(sorted(known))}."
            raise ConfigurationError(f"Unknown key {key!r} in {where}. {hint}")
