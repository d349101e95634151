"""Licences of what a student was made from: read from cards, put together, and warned about. No legal advice.

What is not written in a card is unknown, and said to be.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models import looks_like_path

logger = logging.getLogger(__name__)

_CARD = "README.md"
_SECONDS = 10  # for the Hub to answer


@dataclass(frozen=True)
class Terms:
    """What a licence asks of a model that was made from what it covers.

    Attributes:
        passes_on: the student is under it as well (its terms name models trained on outputs, or all derivatives).
        share_alike: derivatives are under this licence and no further restriction may be added.
        non_commercial, no_derivatives: as they say.
        restricts: it restricts use, so that share-alike licences cannot be met beside it.
        only_improves: names of licences of the only models that may be improved with outputs; None: any.
        name_prefix: how the student's name must begin.
        says: what to know, in a few words.
    """

    passes_on: bool = False
    share_alike: bool = False
    non_commercial: bool = False
    no_derivatives: bool = False
    restricts: bool = False
    only_improves: tuple[str, ...] | None = None
    name_prefix: str = ""
    says: str = ""


_PERMISSIVE = Terms()
_OWN_MODELS_ONLY = "its outputs may be used to improve no other language models than its own family"
_LLAMA_NAME = "a model trained on it or on its outputs has a name that begins with {}, and says what it was built with"
# By the Hub's ids of licences, the first pattern that fits.
LICENSES: dict[str, Terms] = {
    "apache-2.0": _PERMISSIVE,
    "mit": _PERMISSIVE,
    "bsd*": _PERMISSIVE,
    "isc": _PERMISSIVE,
    "unlicense": _PERMISSIVE,
    "cc0-1.0": _PERMISSIVE,
    "pddl": _PERMISSIVE,
    "cdla-permissive-*": _PERMISSIVE,
    "cc-by-nc-nd-*": Terms(True, non_commercial=True, no_derivatives=True, restricts=True),
    "cc-by-nc-sa-*": Terms(True, share_alike=True, non_commercial=True, restricts=True),
    "cc-by-nc-*": Terms(True, non_commercial=True, restricts=True),
    "cc-by-nd-*": Terms(True, no_derivatives=True),
    "cc-by-sa-*": Terms(True, share_alike=True),
    "cc-by-*": Terms(says="credit its authors"),
    "odc-by": Terms(says="credit its authors"),
    "odbl": Terms(True, share_alike=True),
    "lgpl*": Terms(True, share_alike=True),
    "agpl*": Terms(True, share_alike=True),
    "gpl*": Terms(True, share_alike=True),
    "llama2": Terms(True, restricts=True, only_improves=("llama2",), says=_OWN_MODELS_ONLY),
    "llama3": Terms(
        True, restricts=True, only_improves=("llama3",), name_prefix="Llama 3", says=_OWN_MODELS_ONLY
    ),
    "llama3.*": Terms(True, restricts=True, name_prefix="Llama", says=_LLAMA_NAME.format("Llama")),
    "llama4": Terms(True, restricts=True, name_prefix="Llama", says=_LLAMA_NAME.format("Llama")),
    "gemma": Terms(True, restricts=True, says="models trained on its outputs are under its terms too"),
    "*openrail*": Terms(True, restricts=True, says="its restrictions of use are passed on to derivatives"),
}  # fmt: skip


def terms_of(license_id: str) -> Terms | None:
    """What is known of a licence; None if it is not in the table."""
    return next((terms for pattern, terms in LICENSES.items() if fnmatch.fnmatchcase(license_id, pattern)), None)


@dataclass(frozen=True)
class Licensed:
    """One thing that went into the student.

    Attributes:
        role: `teacher`, `student` (the weights that training started from) or `data`.
        name: a Hub id, or the name of a folder or file.
        license: the Hub's id of it; None where no card tells one.
        why: why it is not known.
    """

    role: str
    name: str
    license: str | None
    why: str = ""


@dataclass
class Inherited:
    """What follows for the student.

    Attributes:
        license: of the student; None where it is unknown or there is none that fits.
        conflicts: why no licence meets all of the terms.
        unknown: what has to be found out.
        notes: what to observe.
    """

    sources: list[Licensed]
    license: str | None = None
    conflicts: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def metadata(self) -> dict[str, str]:
        """For the header of a card: nothing where no licence can be named."""
        if self.license is None:
            return {}
        if terms_of(self.license) and " and " not in self.license:
            return {"license": self.license}
        return {"license": "other", "license_name": self.license.replace(" ", "-"), "license_link": "README.md"}


def inherit(sources: Sequence[Licensed], model_name: str | None = None, chosen: str | None = None) -> Inherited:
    """Put licences together.

    Args:
        model_name: of the student's repository, for licences that ask for a name.
        chosen: the user's own word on the student's licence; conflicts are told all the same.
    """
    found = Inherited(list(sources))
    known: list[tuple[Licensed, Terms]] = []
    for each in sources:
        terms = terms_of(each.license) if each.license else None
        if each.license is None:
            found.unknown.append(f"The licence of the {each.role} {each.name!r} is unknown: {each.why}.")
        elif terms is None:
            found.unknown.append(
                f"What the licence {each.license!r} of the {each.role} {each.name!r} asks is not known here; read it."
            )
        else:
            known.append((each, terms))
    for each, terms in known:
        if terms.says:
            found.notes.append(f"{each.license} ({each.role} {each.name!r}): {terms.says}.")
        if terms.non_commercial:
            found.notes.append(f"{each.license} ({each.role} {each.name!r}): no commercial use.")
        prefix, name = terms.name_prefix, (model_name or "").rpartition("/")[2]
        if prefix and name and not name.lower().replace("-", " ").startswith(prefix.lower()):
            found.conflicts.append(
                f"{each.license} ({each.role} {each.name!r}) asks for a name that begins with {prefix!r}; the model is "
                f"called {name!r}."
            )
    found.conflicts += _conflicts(known)
    found.license = chosen or (None if found.conflicts or found.unknown else _of_student(known))
    return found


def _conflicts(known: Sequence[tuple[Licensed, Terms]]) -> list[str]:
    found = []
    for place, (each, terms) in enumerate(known):
        where = f"{each.license} ({each.role} {each.name!r})"
        if terms.no_derivatives:
            found.append(f"{where} allows no derivatives, and a model trained on it may be one.")
        for other_place, (other, its) in enumerate(known):
            there = f"{other.license} ({other.role} {other.name!r})"
            if other.license == each.license:
                continue
            if terms.share_alike and (its.restricts or (its.share_alike and place < other_place)):
                found.append(f"{where} lets derivatives have no terms but its own, and {there} asks for others.")
            only = terms.only_improves
            if only is not None and each.role == "teacher" and other.role == "student" and other.license not in only:
                found.append(f"{where}: {terms.says}; the student's weights are under {there}.")
    return found


def _of_student(known: Sequence[tuple[Licensed, Terms]]) -> str | None:
    """What is passed on; else the licence of the weights."""
    passed = sorted({str(each.license) for each, terms in known if terms.passes_on})
    if passed:
        return " and ".join(passed)
    by_role = {each.role: each.license for each, _ in reversed(known)}
    return by_role.get("student") or by_role.get("data") or by_role.get("teacher")


# ---- Reading cards --------------------------------------------------------------------------------------------------


def licensed(role: str, source: str | None, *, shown_as: str | None = None, token: str | None = None) -> Licensed:
    """What the card of a model or dataset says.

    Args:
        source: a folder, a file (whose folder may hold a card), or a Hub id; None for something made in memory.
    """
    if not source:
        return Licensed(role, shown_as or "in memory", None, "it was made in memory, where no card is")
    if looks_like_path(source):
        path = Path(source).expanduser()
        path = path if path.is_dir() else path.parent
        name = shown_as or Path(source).expanduser().resolve().name
        try:
            found, why = _license_in(_metadata(path / _CARD)), "its card names none"
        except (OSError, ValueError):
            found, why = None, f"there is no {_CARD} with metadata beside it"
        return Licensed(role, name, found, "" if found else why)
    found, why = _from_hub(source, "dataset" if role == "data" else "model", token)
    return Licensed(role, shown_as or source, found, why)


def _metadata(file: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    return metadata_load(file) or {}


def _license_in(metadata: Any) -> str | None:
    """The licence of a card; of `other`, its name."""
    found = metadata.get("license") if metadata else None
    if isinstance(found, list):
        found = found[0] if len(found) == 1 else None
    if found == "other":
        found = metadata.get("license_name")
    return str(found).lower() if found and found not in ("unknown", "other") else None


def _from_hub(name: str, kind: str, token: str | None) -> tuple[str | None, str]:
    from huggingface_hub import HfApi

    try:
        found = _license_on(HfApi().endpoint, name, kind, token)
    except Exception as error:  # away, offline, private, gated: a card is written all the same
        return None, f"its card on the Hub could not be read ({type(error).__name__})"
    return found, "" if found else "its card names none"


@functools.lru_cache(maxsize=64)  # a card is written with every checkpoint
def _license_on(endpoint: str, name: str, kind: str, token: str | None) -> str | None:
    from huggingface_hub import HfApi

    info: Any = HfApi(endpoint=endpoint, token=token).repo_info(name, repo_type=kind, timeout=_SECONDS)
    return _license_in(info.card_data.to_dict() if info.card_data else {})
