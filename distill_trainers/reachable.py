"""Whether the Hub answers at all: without a network, its client would try for a minute before it says so."""

from __future__ import annotations

import functools
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 5.0


def why_out_of_reach(name: str, repo_type: str = "model", cache_dir: Any = None) -> str:
    """Say why a repository cannot be had: nothing of it was fetched before, and no server answers; else "".

    Args:
        name: of the Hub (`owner/name`).
        repo_type: model or dataset.
        cache_dir: where models lie that were fetched, if not in the Hub's own cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # that is soon found out; a proxy has its own ways
        return ""
    folder = repo_folder_name(repo_id=name, repo_type=repo_type)
    if (Path(cache_dir or constants.HF_HUB_CACHE) / folder).exists():
        return ""
    reason = _silence(constants.ENDPOINT)
    return f"nothing of it was fetched before, and {constants.ENDPOINT} does not answer ({reason})" if reason else ""


@functools.cache
def _silence(endpoint: str) -> str:
    """Say why nobody answers there; "" where somebody does."""
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""
