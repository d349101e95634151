"""Where pip gets this package from: an index, a clone, a repository, as its own installation was told."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shlex
from urllib.parse import unquote, urlsplit

NAME = "distill-trainers"
_PUBLIC = ("bitbucket.org", "codeberg.org", "github.com", "gitlab.com")  # addresses elsewhere may be a company's own


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of this package from where the package itself came."""
    folder, address, editable = _origin()
    if folder:
        return f"pip install {'-e ' * editable}{shlex.quote(f'{folder}[{extra}]')}"
    return f"pip install '{NAME}[{extra}]{f' @ {address}' if address else ''}'"


def requirement(version: str) -> str:
    """Return what somebody else gives to pip for this package; "" where it came from a folder that nobody else has.

    An address is told only if it is a plain one of a known forge, without user, port and query.
    """
    folder, address, _ = _origin()
    if folder:
        return ""
    parts = urlsplit(address)
    is_public = parts.scheme in ("https", "git+https") and parts.netloc in _PUBLIC and not parts.query + parts.fragment
    return f"'{NAME} @ {address}'" if is_public else f"{NAME}=={version}"


def project_link() -> str:
    """Return the project's name in Markdown, as a link where the installation knows its page."""
    try:
        urls = importlib.metadata.metadata(NAME).get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    page = next((url.partition(",")[2].strip() for url in urls), "")
    return f"[distill_trainers]({page})" if page else "distill_trainers"


@functools.cache
def _origin() -> tuple[str, str, bool]:
    """A local folder, or an address, or neither where it came from an index; and whether it is installed editable."""
    try:
        told = json.loads(importlib.metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "", "", False
    url = told.get("url", "")
    if "vcs_info" in told:
        vcs = told["vcs_info"]
        return "", f"{vcs['vcs']}+{url}@{vcs['commit_id']}", False
    if url.startswith("file:"):
        return unquote(urlsplit(url).path), "", bool(told.get("dir_info", {}).get("editable"))
    return "", url, False
