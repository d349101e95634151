"""Runs whose processes are killed end as the run that nobody kills; how is in survival.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_runs_go_on_as_if_nothing_had_been():
    done = subprocess.run(
        [sys.executable, str(HERE / "survival.py"), "--kills", "4", "--seed", "3"],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(" killed, all ended") >= 5, done.stdout
