"""Whether the Hub answers at all: without a network, its client would try for a minute before it says so."""

from __future__ import annotations

import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 5.0
_KEPT = 10.0  # seconds that a failure is believed for: a recipe names several things
_asked: dict[str, tuple[float, str]] = {}  # by server: when a failure ends to count, and what came of it


def why_out_of_reach(name: str, repo_type: str = "model", *, cache_dir: Any = None, proxies: Any = None) -> str:
    """Say why a repository cannot be had: nothing of it was fetched before, and no server answers; else "".

    Args:
        name: of the Hub (`owner/name`), or of a reader of `datasets`, which is none of the Hub's.
        repo_type: model or dataset.
        cache_dir: where models lie that were fetched, if not in the Hub's own cache.
        proxies: through which the Hub is asked; a proxy has its own ways, and is left to them.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_OFFLINE or proxies or _has_proxy(constants.ENDPOINT):  # offline is soon found out
        return ""
    if repo_type == "dataset" and _is_known_to_datasets(name):
        return ""
    folder = repo_folder_name(repo_id=name, repo_type=repo_type)
    if (Path(cache_dir or constants.HF_HUB_CACHE) / folder).exists():
        return ""
    reason = _silence(constants.ENDPOINT)
    return f"nothing of it was fetched before, and {constants.ENDPOINT} does not answer ({reason})" if reason else ""


def _has_proxy(endpoint: str) -> bool:
    """Whether the environment names a proxy for a server; NO_PROXY alone names none."""
    address, proxies = urlsplit(endpoint), urllib.request.getproxies()
    return bool({address.scheme, "all"} & proxies.keys()) and not urllib.request.proxy_bypass(address.hostname or "")


def _is_known_to_datasets(name: str) -> bool:
    """Whether `datasets` needs no Hub: it is told to be offline, has the reader, or has prepared this one before."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    owner, _, own = name.rpartition("/")
    prepared = f"{owner}___{camelcase_to_snakecase(own)}" if owner else camelcase_to_snakecase(own)
    readers = _PACKAGED_DATASETS_MODULES
    return bool(config.HF_HUB_OFFLINE) or name in readers or any(Path(config.HF_DATASETS_CACHE, prepared).glob("*/*/*"))


def _silence(endpoint: str) -> str:
    """Say why nobody answers there; "" where somebody does, or did before in this process."""
    until, reason = _asked.get(endpoint, (0.0, ""))
    if time.monotonic() >= until:
        reason = _refusal(endpoint)
        _asked[endpoint] = (time.monotonic() + _KEPT if reason else float("inf"), reason)
    return reason


def _refusal(endpoint: str) -> str:
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""
