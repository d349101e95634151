"""Two real processes train an adapter of each kind as one process does, under DDP, ZeRO-2 and ZeRO-3."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = ["LoRA", "DoRA", "IA3", "VeRA", "LoHa", "LoKr", "LoRA, another adapter", "IA3, adapter off"]
REFERENCE = {"LoRA, another adapter": "LoRA, a merged copy", "IA3, adapter off": "IA3, a copy of its base"}
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("adapters", HERE / "adapters.py")
    adapters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapters)
    made = tmp_path_factory.mktemp("models")
    adapters.make_models(made)
    return made


def launched(folder, environment, config, cells):
    """What the processes of a launch (one without `config`) have found."""
    out = folder / f"{config}-{len(cells)}.json"
    command = [sys.executable]
    if config:
        command += ["-m", "accelerate.commands.launch", "--main_process_port", str(31500 + os.getpid() % 2000)]
        command += ["--config_file", str(HERE.parents[1] / "accelerate_configs" / f"{config}.yaml")]
    job = json.dumps({"folder": str(folder), "out": str(out), "cells": cells})
    log = out.with_suffix(".log")
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, str(HERE / "adapters.py"), job],
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=900)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the workers too, which outlive a launcher that is killed
    assert status == 0, log.read_text()[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def single(folder, environment):
    return launched(folder, environment, None, list(dict.fromkeys(REFERENCE.get(kind, kind) for kind in KINDS)))


def assert_same(one, two):
    assert len(one["loss"]) == len(two["loss"]) == len(two["grad_norm"]) == 2
    assert all(loss > 1e-3 for loss in one["loss"]) and all(norm > 1e-4 for norm in one["grad_norm"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero3"])
def test_adapters_of_every_kind_and_a_teacher_that_is_one(folder, environment, single, config):
    found = launched(folder, environment, config, KINDS)
    for kind in KINDS:
        if config == "cpu_zero3" and kind in ("LoHa", "LoKr"):
            assert "under ZeRO-3" in found[kind]["refused"]
            continue
        assert_same(single[REFERENCE.get(kind, kind)], found[kind])


@needs_bitsandbytes
def test_lora_on_a_student_in_4_bits(folder, environment):
    one, two = (launched(folder, environment, config, ["QLoRA"])["QLoRA"] for config in (None, "cpu_ddp"))
    assert_same(one, two)
