"""Licences of what a student was made from: read from cards, listed, and warned about. No legal advice.

What is not written in a card is unknown, and said to be. What follows where licences differ is for a person to say.
"""

from __future__ import annotations

import fnmatch
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models import looks_like_path

_CARD = "README.md"
_SECONDS = 10  # for the Hub to answer


_OWN_MODELS = "its outputs may be used to improve no other language models than its own family"
_NAMED = "a model trained on it or on its outputs has a name that begins with Llama, and says what it was built with"
_NAMES = {"llama3": "Llama 3", "llama3.*": "Llama", "llama4": "Llama"}  # how the student's name must begin
# What to know of a licence, by the Hub's ids of licences, the first pattern that fits.
LICENSES: dict[str, str] = {
    **dict.fromkeys(("apache-2.0", "mit", "bsd*", "isc", "unlicense", "cc0-1.0", "pddl", "cdla-permissive-*"), ""),
    "cc-by-nc-nd-*": "no commercial use, and no derivatives, which a model trained on it may be",
    "cc-by-nc-sa-*": "no commercial use, and derivatives are under this licence alone",
    "cc-by-nc-*": "no commercial use",
    "cc-by-nd-*": "no derivatives, which a model trained on it may be",
    **dict.fromkeys(("cc-by-sa-*", "odbl", "lgpl*", "agpl*", "gpl*"), "derivatives are under this licence alone"),
    **dict.fromkeys(("cc-by-*", "odc-by"), "credit its authors"),
    "llama2": _OWN_MODELS,
    "llama3": _OWN_MODELS,
    **dict.fromkeys(("llama3.*", "llama4"), _NAMED),
    "gemma": "models trained on its outputs are under its terms too",
    "*openrail*": "its restrictions of use are passed on to derivatives",
}


def known_of(license_id: str, table: dict[str, str] = LICENSES) -> str | None:
    """Tell what to know of a licence; None if it is not in the table."""
    return next((note for pattern, note in table.items() if fnmatch.fnmatchcase(license_id, pattern)), None)


@dataclass(frozen=True)
class Licensed:
    """One thing that went into the student.

    Attributes:
        role: `teacher`, `student` (the weights that training started from) or `data`.
        name: a Hub id, or the name of a folder or file.
        license: the Hub's id of it; None where no card tells one.
    """

    role: str
    name: str
    license: str | None
    why: str = ""


@dataclass
class Inherited:
    """What is known for the student.

    Attributes:
        license: of the student, where all licences are the same one or the user says so.
        conflicts: what a licence asks that the student does not meet.
        unknown: what has to be found out.
        notes: what to observe.
    """

    sources: list[Licensed]
    license: str | None = None
    conflicts: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def metadata(self) -> dict[str, str]:
        """Write the header of a card: nothing where no licence can be named."""
        if self.license is None:
            return {}
        if known_of(self.license) is not None:
            return {"license": self.license}
        return {"license": "other", "license_name": self.license.replace(" ", "-"), "license_link": "README.md"}

    def difference(self) -> str:
        """Tell which licences differ; empty where they do not."""
        names = sorted({source.license for source in self.sources if source.license})
        advice = "read what each asks of what is made from it, and set `card_license`"
        return f"The licences differ ({', '.join(names)}): {advice}." if len(names) > 1 else ""


def inherit(sources: Sequence[Licensed], model_name: str | None = None, chosen: str | None = None) -> Inherited:
    """List licences, what to know of them, and whether they are all the same one.

    Args:
        model_name: of the student's repository, for licences that ask for a name.
        chosen: the user's own word on the student's licence; what has to be found out is told all the same.
    """
    terms = Inherited(list(sources))
    name = (model_name or "").rpartition("/")[2]
    for source in sources:
        note = known_of(source.license or "")
        if source.license is None:
            terms.unknown.append(f"The licence of the {source.role} {source.name!r} is unknown: {source.why}.")
            continue
        if note is None:
            terms.unknown.append(
                f"What the licence {source.license!r} of the {source.role} {source.name!r} asks is not known here; "
                "read it."
            )
            continue
        where = f"{source.license} ({source.role} {source.name!r})"
        if note:  # of no derivatives, no licence of the student could be named
            (terms.conflicts if "-nd-" in source.license else terms.notes).append(f"{where}: {note}.")
        prefix = known_of(source.license, _NAMES)
        if prefix and name and not name.lower().replace("-", " ").startswith(prefix.lower()):
            terms.conflicts.append(f"{where} asks for a name that begins with {prefix!r}; this one is called {name!r}.")
    if terms.difference():
        terms.unknown.append(terms.difference())
    agreed = sources[0].license if sources and not terms.unknown and not terms.conflicts else None
    terms.license = chosen or agreed
    return terms


# ---- Reading cards --------------------------------------------------------------------------------------------------


def licensed(role: str, source: str | None, *, shown_as: str | None = None, token: str | None = None) -> Licensed:
    """Read what the card of a model or dataset says.

    Args:
        source: a folder, a file (whose folder may hold a card), or a Hub id; None for something made in memory.
    """
    if not source:
        return Licensed(role, shown_as or "in memory", None, "it was made in memory, where no card is")
    if looks_like_path(source):
        path = Path(os.path.expanduser(source))
        path = path if path.is_dir() else path.parent
        name = shown_as or Path(os.path.expanduser(source)).resolve().name
        try:
            license_id, why = _license_in(_metadata(path / _CARD)), "its card names none"
        except (OSError, ValueError):
            license_id, why = None, f"there is no {_CARD} with metadata beside it"
        return Licensed(role, name, license_id, "" if license_id else why)
    license_id, why = _from_hub(source, "dataset" if role == "data" else "model", token)
    return Licensed(role, shown_as or source, license_id, why)


def _metadata(file: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    return metadata_load(file) or {}


def _license_in(metadata: Any) -> str | None:
    """The licence of a card; of `other`, its name."""
    license_id = metadata.get("license") if metadata else None
    if isinstance(license_id, list):
        license_id = license_id[0] if len(license_id) == 1 else None
    if license_id == "other":
        license_id = metadata.get("license_name")
    return str(license_id).lower() if license_id and license_id not in ("unknown", "other") else None


def _from_hub(name: str, kind: str, token: str | None) -> tuple[str | None, str]:
    from huggingface_hub import HfApi

    try:
        license_id = _license_on(HfApi().endpoint, name, kind, token)
    except Exception as error:  # away, offline, private, gated: a card is written all the same
        return None, f"its card on the Hub could not be read ({type(error).__name__})"
    return license_id, "" if license_id else "its card names none"


@functools.lru_cache(maxsize=64)  # a card is written with every checkpoint
def _license_on(endpoint: str, name: str, kind: str, token: str | None) -> str | None:
    from huggingface_hub import HfApi

    info: Any = HfApi(endpoint=endpoint, token=token).repo_info(name, repo_type=kind, timeout=_SECONDS)
    return _license_in(info.card_data.to_dict() if info.card_data else {})
