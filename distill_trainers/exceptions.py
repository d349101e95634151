"""Errors of the package. Every message says what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from . import trl_names
from .escaping import visible
from .redaction import redacted


class _Told(Exception):
    """An error whose message shows no secret that a setting or an answer held, and gives a terminal no orders."""

    def __init__(self, *told: object):
        super().__init__(*(visible(redacted(part)) if isinstance(part, str) else part for part in told))


class ConfigurationError(_Told, ValueError):
    """Settings that cannot work, alone or together. Raised before any model is loaded where that is possible."""


class DatasetError(_Told, ValueError):
    """A dataset that cannot be trained on: a missing column, no rows, rows without completions."""


class NoUsableRowsError(DatasetError):
    """Each row by itself is left out, so that none is there to train on."""


class VocabularyError(_Told, ValueError):
    """Student and teacher do not mean the same token by the same id."""


class TrainingDivergedError(_Told, RuntimeError):
    """The loss or its gradient became NaN or infinite; that step changed no weight."""


class CheckpointError(_Told, OSError):
    """A checkpoint could not be written or read; checkpoints written earlier are left as they were."""


class UnlikeModelError(_Told, RuntimeError):
    """A model that was merged or saved does not answer as the one that was trained; what was trained is kept."""


class ServerError(_Told, OSError):
    """A server does not answer any more, or answers what it should not; `status` is that of HTTP."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class TeacherServerError(ServerError):
    """The same of a teacher behind HTTP."""


class RolloutServerError(ServerError):
    """The same of a server that samples the student's completions."""


class CacheError(_Told, OSError):
    """A teacher cache could not be written or read; what was written earlier is left as it was."""


class RewardError(_Told, RuntimeError):
    """A reward function raised, did not end, or gave back something else than a number for each completion."""


class HubError(_Told, OSError):
    """The Hub could not be reached or refused; what lies on this machine is left as it was."""


# What the user mends before anything has run, and what ends a run that has.
BAD_INPUT = (ConfigurationError, DatasetError, VocabularyError)
FAILURES = (CacheError, CheckpointError, HubError, RewardError, ServerError, TrainingDivergedError, UnlikeModelError)


_SHOWN = 40  # so many known keys are a list that one can read
_LONGEST = 120  # characters of a key


def refuse_unknown_keys(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse keys that are not known, all at once: each with the nearest ones, or with what to do about TRL's names.

    Raises:
        ConfigurationError: naming them.
    """
    unknown = [_cut(str(key)) for key in given if key not in known]
    if len(unknown) == 1:
        raise ConfigurationError(f"Unknown key {unknown[0]!r} in {where}. {_hint(unknown[0], known)}")
    if unknown:
        hints = " ".join(f"{key!r}: {_hint(key, known)}" for key in unknown)
        raise ConfigurationError(f"Unknown keys in {where}: {', '.join(map(repr, unknown))}. {hints}")


def _cut(name: str) -> str:
    """Return a name as an error shows it: not longer than one can read."""
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


def _hint(key: str, known: Collection[str]) -> str:
    if trl_names.KEYS.get(key) in known:
        return f"That is TRL's name of {trl_names.KEYS[key]!r}."
    if key in trl_names.REFUSED:
        return f"That is a setting of TRL without a counterpart here. Instead: {trl_names.REFUSED[key]}."
    if key in trl_names.OLDER:
        return f"That is a setting of older versions of transformers. Instead: {trl_names.OLDER[key]}."
    if key.startswith("vllm_") and "vllm_kwargs" in known:
        return f"That is a setting of TRL. Instead: set `vllm_kwargs: {{{key.removeprefix('vllm_')}: …}}`."
    if key in trl_names.HARMLESS:
        return f"That is a setting of TRL that does nothing here; leave it out: {trl_names.HARMLESS[key]}."
    close = difflib.get_close_matches(key, known, n=3)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"Known: {', '.join(sorted(known))}." if len(known) <= _SHOWN else "Nothing that is known looks like it."
