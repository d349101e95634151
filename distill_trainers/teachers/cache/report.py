"""What a teacher cache holds, found by reading all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...exceptions import ConfigurationError
from .identity import CacheIdentity, read_identity
from .shards import TeacherCache


@dataclass(frozen=True)
class CacheReport:
    """Sizes in bytes, rows and trained tokens.

    Attributes:
        retained_mass: mean probability that the stored ids of the kind `topk` have; None for other kinds, and for an
            empty cache.
        damaged: shards of which something cannot be used, and why.
        abandoned: temporary files of writers that are at work or were killed.
    """

    identity: CacheIdentity
    rows: int
    tokens: int
    bytes: int
    shards: int
    retained_mass: float | None
    damaged: dict[str, str]
    abandoned: int


def inspect_cache(folder: str | Path) -> CacheReport:
    """Read a cache from beginning to end.

    Raises:
        ConfigurationError: there is none in the folder.
        CacheError: it cannot be read at all.
    """
    identity = read_identity(folder)
    if identity is None:
        raise ConfigurationError(f"There is no teacher cache in {str(folder)!r}: it has no identity.json.")
    cache = TeacherCache(folder, identity.stamp())
    mass, tokens = 0.0, 0
    for key in cache.keys():  # noqa: SIM118  # rows that turn out damaged leave the cache meanwhile
        row = cache.read(key)
        if row is not None and identity.kind == "topk":
            mass += (1 - row["tail"].double().exp()).sum().item()
            tokens += len(row["tail"])
    return CacheReport(
        identity=identity,
        rows=len(cache),
        tokens=cache.num_tokens,
        bytes=cache.num_bytes,
        shards=cache.num_shards,
        retained_mass=mass / tokens if tokens else None,
        damaged=dict(cache.damaged),
        abandoned=sum(1 for _ in Path(folder).glob(".*.tmp")),
    )
