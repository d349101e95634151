"""Two real processes: a teacher placed otherwise than the student gives the single process's loss and gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


METHODS = ["GKD off-policy", "GKD on-policy"]


def parity(report, environment, launch, teachers):
    """What `benchmarks/parity.py` finds under a launch: by teacher and method."""
    command = [sys.executable, str(BENCHMARKS / "parity.py"), "--launches", launch, "--teachers", *teachers]
    command += ["--methods", *METHODS, "--json", str(report), "--timeout", "900"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())["results"][launch]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment):
    references = ["replicated", "LoRA, teacher a copy", "DoRA, teacher a copy"]
    references += ["view, replicated", "two by row, replicated", "itself averaged, view"]
    references += ["extrapolated, replicated"]
    return parity(tmp_path_factory.mktemp("alone") / "parity.json", environment, "single", references)


@pytest.mark.parametrize(
    ("launch", "teachers"),
    [
        ("ddp", ["replicated", "zero3", "zero3_offload", "fsdp2", "remote hidden", "LoRA, adapter off"]),
        ("zero3", ["replicated", "zero3", "fsdp2", "cached hidden", "LoRA, adapter off", "DoRA, adapter off"]),
        ("fsdp2", ["replicated", "zero3", "fsdp2", "remote top-k + tail, k = V", "LoRA, adapter off"]),
        ("zero3", ["view, zero3", "two by row, zero3", "itself averaged, view", "extrapolated, zero3"]),
        ("fsdp2", ["view, fsdp2", "two by row, fsdp2", "extrapolated, fsdp2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_placement_gives_the_same_step(tmp_path, environment, alone, launch, teachers):
    found = parity(tmp_path / "parity.json", environment, launch, teachers)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from parity import differences, reference_of
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert list(found) == teachers
    for teacher, cells in found.items():
        for method, cell in cells.items():
            if teacher.startswith("cached") and method == "GKD on-policy":
                assert "never seen twice" in cell["refused"]
                continue
            assert len(cell["loss"]) == 2 and all(loss > 1e-3 for loss in cell["loss"])
            expected = alone[reference_of(teacher)][method]
            assert max(differences(expected, cell)) < 1e-5, (teacher, method, cell, expected)


def test_a_partitioned_teacher_takes_half_and_is_never_whole(tmp_path, environment):
    """Of a teacher of 318 MiB: what a process holds, and what it holds at the peak of loading and of a forward."""
    command = [sys.executable, str(BENCHMARKS / "teacher_memory.py"), "--placements", "zero3", "fsdp2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for placement, found in json.loads((tmp_path / "out.json").read_text())["results"].items():
        held, limit = found["private, afterwards"], 0.65  # a half, and 30 MiB of DeepSpeed's and of a first forward
        if placement == "fsdp2":  # shards stay where the files are mapped
            held, limit = held + found["mapped files, afterwards"], 0.95  # and pages beside them
        assert held < limit * 318, placement
        assert found["private, more at the peak of a forward"] < 0.35 * 318, placement
        assert found["private, peak while loading"] < 0.9 * 318, placement
