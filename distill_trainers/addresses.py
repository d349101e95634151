"""Whose secrets go where: a key or token leaves this machine only for the address that it belongs to."""

from __future__ import annotations

import ipaddress
import logging
import os
from urllib.parse import urlsplit

from .exceptions import ConfigurationError

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
_HOMES = {"OPENAI_API_KEY": OPENAI}  # keys whose address everybody knows
_PORTS = {"http": 80, "https": 443}


def origin(address: str) -> str:
    """Return scheme, host and port of an address, the port always written.

    Raises:
        ConfigurationError: it is no address of HTTP.
    """
    try:
        url = urlsplit(address.strip())
        port = url.port or _PORTS.get(url.scheme)
    except ValueError:
        url, port = urlsplit(""), None
    if port is None or not url.hostname:
        raise ConfigurationError(f"Got {address.strip()!r} as an address; expected one such as `https://host:port`.")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{url.scheme}://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Tell whether an address is this machine's own, which others do not reach."""
    host = urlsplit(origin(address)).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secret_for(variable: str, addresses: list[str]) -> str | None:
    """Return the secret in an environment variable, if it may be sent to all of these addresses; None without one.

    It may go where the variable `<variable>_FOR` says (addresses with commas between), which is the environment's word
    and never a recipe's. Without it `OPENAI_API_KEY` may go to OpenAI, and variables of this package
    (`DISTILL_…`) to servers on this machine.

    Raises:
        ConfigurationError: it may not. Nothing was sent.
    """
    secret = os.environ.get(variable)
    if not secret:  # an empty one is the caller's to refuse
        return secret
    told = os.environ.get(f"{variable}_FOR")
    named = (told or _HOMES.get(variable, "")).replace(",", " ").split()
    try:
        allowed = {origin(part) for part in named}
    except ConfigurationError as error:
        said = f"The environment variable {variable}_FOR holds no list of addresses. {error}"
        raise ConfigurationError(said) from error
    for address in addresses:
        if told is None and variable.startswith("DISTILL_") and is_loopback(address):
            continue
        if origin(address) not in allowed:
            whose = f"for {', '.join(sorted(allowed))}" if allowed else "for no address yet"
            wanted = ",".join([*sorted(allowed), origin(address)])
            raise ConfigurationError(
                f"The secret in the environment variable {variable} was to be sent to {origin(address)}, but it is "
                f"{whose}. If it belongs there, set {variable}_FOR={wanted} in the environment as well."
            )
        if urlsplit(address.strip()).scheme == "http" and not is_loopback(address):
            logger.warning(
                "The secret in %s goes to %s over plain HTTP, where others on the way can read it. Use `https://…`, or "
                "a tunnel.",
                variable,
                origin(address),
            )
    return secret
