"""Runs whose processes are killed end as the run that nobody kills; how is in survival.py."""

import os
import re
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
    assert len(re.findall(r" killed \(.*\), all ended", done.stdout)) >= 4, done.stdout
    assert "its 60 losses are those of the undisturbed one" in done.stdout
