"""The Triton kernels, on a GPU or in Triton's interpreter, and compiled for a GPU, which needs none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed (it is in the extra dev)"
)


def run(*command: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-1000:]}"
    return done.stdout


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_a_process_of_its_own(which, tmp_path):
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    options = ["--noconftest", "-q", "-p", "no:cacheprovider", "-m", which, "--import-mode=importlib"]
    told = run("-m", "pytest", *options, str(CASES), **environment)
    assert " passed" in told and "skipped" not in told


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill_trainers.losses import triton_kernel

for kernel in (triton_kernel.value_kernel, triton_kernel.gradient_kernel):
    for kind in triton_kernel.KINDS.values():
        bias, cap = ("*fp32", 30.0) if kind % 2 else (None, None)
        constants = {"KIND": kind, "SCALE": 0.5, "CAP": cap, "TEACHER_SCALE": 1.0, "TEACHER_CAP": cap, "BLOCK": 2048}
        constants |= {} if bias else {"bias": None, "teacher_bias": None}
        types = {"temperature": "fp32", "weight": "fp32", "rows": "i32", "vocab": "i32"}
        types |= {name: "i32" for name in kernel.arg_names if name.endswith("stride")}
        types |= {name: "constexpr" for name in constants}
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        target = GPUTarget("cuda", 90, 32)
        made = triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": 8})
        assert made.asm["cubin"]
print("all")
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    assert run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == "all\n"
