"""What importing the package costs and offers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import distill_trainers


def _loaded(statement: str) -> set[str]:
    """Modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def _families(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_the_package_itself_imports_nothing_heavy():
    heavy = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy", "yaml", "rich"}
    assert not heavy & _families(_loaded("import distill_trainers; dir(distill_trainers)"))


def test_rationales_are_read_without_torch():
    heavy = {"torch", "transformers", "datasets", "math_verify", "sympy", "openai"}
    assert not heavy & _families(_loaded("import distill_trainers.rationales, distill_trainers.rationales.stages"))


def test_the_trainer_imports_no_engine():
    modules = _loaded("from distill_trainers import GKDConfig, GKDTrainer, RationaleTrainer")
    assert "torch" in modules, "else this test looks at nothing"
    assert not {"deepspeed", "vllm", "bitsandbytes", "matplotlib", "gguf", "openai", "math_verify"} & _families(modules)
    assert not {name for name in modules if name.startswith("trl.trainer")}


@pytest.mark.parametrize("name", distill_trainers.__all__)
def test_everything_that_is_promised_is_there(name):
    assert getattr(distill_trainers, name) is not None


def test_exports_say_where_they_live():
    for name, module in distill_trainers._EXPORTS.items():
        assert hasattr(importlib.import_module(f"distill_trainers.{module}"), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        distill_trainers.Nonsense  # noqa: B018


# Where no tensor is on a device: values of the host, and Triton's, which runs on GPUs that have float64.
ON_THE_HOST = {
    "losses/kernels.py",
    "losses/rewards.py",
    "losses/reduction.py",
    "models/merging.py",
    "teachers/cache/report.py",
    "teachers/remote/wire.py",
    "trainers/evaluation_loop.py",
}


def test_no_device_is_asked_for_float64():
    """MPS has none: a tensor comes to the host before, or goes through `losses.reduction.widest`."""
    root, found = Path(distill_trainers.__file__).parent, set()
    for file in root.rglob("*.py"):
        lines = file.read_text().splitlines()
        asks = (".double()" in line and ".cpu().double()" not in line for line in lines)
        if any(asks) or any("float64" in line and "device=" in line for line in lines):
            found.add(str(file.relative_to(root)))
    assert found == ON_THE_HOST
