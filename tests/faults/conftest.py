"""Faults put into commands, and the ledger of what came of them.

    pytest tests/faults -m "" -n 2 --faults-report faults.json      # figures, also as faults.md
    FAULTS_SEED=7 pytest tests/faults -m ""                         # other random moments, bytes and places

A fault is counted by its kind and its outcome: `refused` (in one sentence that names it), `survived` (the result is
that of an undisturbed run), `held` (an attack that got nothing), or `silent` (accepted though wrong), which fails the
test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

OUTCOMES = ("survived", "refused", "held", "silent")
SEED = int(os.environ.get("FAULTS_SEED", "0"))
SHARE = 0.2
HERE = Path(__file__).parent
COUNTS = pytest.StashKey[Counter]()


# ---- The ledger -----------------------------------------------------------------------------------------------------


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption("--faults-report", metavar="FILE", help="write what came of all faults as JSON, and beside as .md")
    group.addoption("--faults-seed", type=int, default=SEED, help="of the random moments, bytes and places")
    share = "the share of kills, full disks and damaged files to try; less takes less time (%(default)s)"
    group.addoption("--faults-share", type=float, default=SHARE, help=share)


def pytest_configure(config):
    config.stash[COUNTS] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """With xdist: take over what a worker counted."""
    for key, count in getattr(node, "workeroutput", {}).get("faults", {}).items():
        node.config.stash[COUNTS][tuple(key.split("\t"))] += count


@pytest.hookimpl(trylast=True)  # after the workers' end
def pytest_sessionfinish(session):
    config = session.config
    counts = config.stash[COUNTS]
    if hasattr(config, "workeroutput"):
        config.workeroutput["faults"] = {"\t".join(key): count for key, count in counts.items()}
    elif config.getoption("faults_report", None) and counts:
        kinds = {kind: {o: counts[kind, o] for o in OUTCOMES} for kind in sorted({kind for kind, _ in counts})}
        file = Path(config.getoption("faults_report"))
        seed = config.getoption("faults_seed", SEED)
        file.write_text(json.dumps({"seed": seed, "kinds": kinds}, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(kinds))


def table(kinds):
    """Kinds with their outcomes, and the sum of all, in Markdown."""
    lines = ["| fault | tried | " + " | ".join(OUTCOMES) + " |", "|---|---" + "|---" * len(OUTCOMES) + "|"]
    total = {o: sum(counts[o] for counts in kinds.values()) for o in OUTCOMES}
    for kind, counts in [*kinds.items(), ("all", total)]:
        lines.append(f"| {kind} | {sum(counts.values()):,} | " + " | ".join(f"{counts[o]:,}" for o in OUTCOMES) + " |")
    return "\n".join(lines) + "\n"


@pytest.fixture
def ledger(request):
    """`ledger(kind, outcome, n=1)` counts faults; any that was accepted in silence fails the test at its end."""
    counts = request.config.stash.setdefault(COUNTS, Counter())
    silent = []

    def enter(kind: str, outcome: str, n: int = 1) -> None:
        assert outcome in OUTCOMES, outcome
        counts[kind, outcome] += n
        silent.extend([kind] * n if outcome == "silent" else [])

    yield enter
    if silent:
        pytest.fail(f"accepted in silence: {Counter(silent)}")


@pytest.fixture
def chance(request):
    """Random numbers of this test alone; the seed is printed where it fails."""
    seed = f"{request.config.getoption('faults_seed', SEED)} {request.node.name}"
    print(f"faults: random.Random({seed!r}); FAULTS_SEED or --faults-seed gives others")
    return random.Random(seed)


@pytest.fixture
def share(request):
    """The share of all faults that this run tries, 0 to 1."""
    return request.config.getoption("faults_share", SHARE)


# ---- Commands -------------------------------------------------------------------------------------------------------


def load(name, file):
    """A module by its file: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def jobs():
    """The module `tests/faults/jobs.py`."""
    return load("fault_jobs", HERE / "jobs.py")


@pytest.fixture(scope="session")
def remote_tests():
    """What the tests of remote teachers have: `Served` (our server), and in `hostile` a server that lies."""
    module = load("remote_conftest", HERE.parent / "remote" / "conftest.py")
    module.hostile = load("remote_hostile", HERE.parent / "remote" / "test_hostile.py")
    return module


def open_lab(jobs, folder, light):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    lab = jobs.Lab(folder, environment, light)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def lab(jobs, tmp_path_factory):
    """Where commands are started and disturbed; see `Lab` in jobs.py."""
    yield from open_lab(jobs, tmp_path_factory.mktemp("lab"), light=False)


@pytest.fixture(scope="session")
def quick_lab(jobs, tmp_path_factory):
    """The same for `verify` alone, which needs no torch: a taste in the fast tests."""
    yield from open_lab(jobs, tmp_path_factory.mktemp("quick"), light=True)
