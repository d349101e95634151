"""The ledger of what came of faults and attacks."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

OUTCOMES = ("survived", "refused", "held", "silent")
COUNTS = pytest.StashKey()


def pytest_configure(config):
    config.stash[COUNTS] = Counter()


def pytest_sessionfinish(session):
    """`FAULTS_LEDGER=faults.json` keeps the counts."""
    counts, file = session.config.stash[COUNTS], os.environ.get("FAULTS_LEDGER")
    if counts and file and not hasattr(session.config, "workerinput"):
        kinds = {kind: {o: counts[kind, o] for o in OUTCOMES} for kind in sorted({kind for kind, _ in counts})}
        Path(file).write_text(json.dumps({"kinds": kinds}, indent=1) + "\n")


@pytest.fixture
def ledger(request):
    """`ledger(kind, outcome, n=1)` counts faults; any that was accepted in silence fails the test at its end."""
    counts, silent = request.config.stash[COUNTS], Counter()

    def enter(kind: str, outcome: str, n: int = 1) -> None:
        assert outcome in OUTCOMES, outcome
        counts[kind, outcome] += n
        silent[kind] += n if outcome == "silent" else 0

    yield enter
    assert not silent.total(), f"accepted in silence: {silent}"
