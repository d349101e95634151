"""Every file of accelerate_configs: read by accelerate itself, and each `cpu_` one launched, here or in other tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
WORKER = Path(__file__).with_name("worker.py")
ON_CPU = sorted(path.stem for path in CONFIGS.glob("cpu_*.yaml"))
ELSEWHERE = {"cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu_fsdp2"}  # launched by many a test of test_processes.py
ON_GPU = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("cpu_"))
# What a `cpu_` form changes: the device, two processes, and float32.
CHANGED = {"use_cpu", "num_processes", "mixed_precision"}


@pytest.mark.parametrize("name", ON_GPU)
def test_a_cpu_form_differs_in_device_processes_and_precision_alone(name):
    """accelerate's own class takes every key of both; it refuses those it does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    gpu, cpu = (load_config_from_file(str(CONFIGS / f"{prefix}{name}.yaml")).to_dict() for prefix in ("", "cpu_"))
    assert {key for key in gpu.keys() | cpu.keys() if gpu.get(key) != cpu.get(key)} <= CHANGED
    assert cpu["use_cpu"] and not gpu["use_cpu"]
    assert (gpu["mixed_precision"], cpu["mixed_precision"]) == ("bf16", "no")
    assert cpu["num_processes"] == (1 if name == "single" else 2)
    assert gpu["num_processes"] == {"single": 1, "multi_node": 16}.get(name, 8)


def launched(folder, name, environment):
    """Start `name` on every "machine" that it names, all of them here; the main process's report."""
    import yaml

    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    folder.mkdir()
    settings = {"max_steps": 2, "per_device_train_batch_size": 4 // content["num_processes"]}
    settings |= {"temperature": 0.0, "optim": "sgd", "lmbda": 0.0}
    job = json.dumps([{"output": str(folder), "args": settings}])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += ["--main_process_port", str(29500 + (os.getpid() + ON_CPU.index(name)) % 2000)]
    machines, logs, started = content["num_machines"], [], []
    try:
        for rank in range(machines):
            which = ["--machine_rank", str(rank)] if machines > 1 else []
            logs.append(folder / f"machine-{rank}.log")
            with logs[-1].open("w") as log:
                started.append(
                    subprocess.Popen(
                        [*command, *which, str(WORKER), job],
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                        start_new_session=True,
                    )
                )
        end = time.monotonic() + 600
        codes = [process.wait(timeout=max(1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the workers too, which outlive a launcher that is killed
    assert codes == [0] * machines, "\n".join(log.read_text()[-4000:] for log in logs)
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory, environment):
    return launched(tmp_path_factory.mktemp("launches") / "single", "cpu_single", environment)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted({*ON_CPU} - ELSEWHERE))
def test_every_cpu_configuration_trains_what_one_process_trains(tmp_path, environment, single, name):
    report = single if name == "cpu_single" else launched(tmp_path / name, name, environment)
    steps = [log for log in report["logs"] if "loss" in log]
    expected = [log for log in single["logs"] if "loss" in log]
    assert len(steps) == 2 and steps[0]["loss"] > 0.01
    for one, two in zip(expected, steps, strict=True):
        assert two["trained_tokens"] == one["trained_tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert report["eval"]["eval_loss"] == pytest.approx(single["eval"]["eval_loss"], rel=1e-4)
