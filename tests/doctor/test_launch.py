"""Launch configurations, as files and as the environment that accelerate leaves."""

import json
from pathlib import Path

import pytest

from distill_trainers.doctor import Gpus, Launch, launch_here, read_launch
from distill_trainers.exceptions import ConfigurationError

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_read(path):
    launch = read_launch(path)
    name = path.stem.removeprefix("cpu_")
    assert launch.strategy in name or name not in ("single", "ddp", "zero2", "zero3", "fsdp2")
    assert launch.on_cpu == path.stem.startswith("cpu_") and launch.name == path.stem
    assert launch.processes >= (1 if name == "single" else 2)


def test_the_environment_of_a_launched_process():
    assert launch_here({}) == Launch()
    ddp = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "bf16"}
    launch = launch_here(ddp)
    assert (launch.strategy, launch.machines, launch.per_machine, launch.mixed_precision) == ("ddp", 2, 8, "bf16")
    zero = {**ddp, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    zero["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
    launch = launch_here(zero)
    assert launch.strategy == "zero3" and launch.offloads_optimizer and not launch.offloads_parameters
    fsdp = {**ddp, "ACCELERATE_USE_FSDP": "true"}
    assert launch_here(fsdp).strategy == "fsdp2" and not launch_here(fsdp).offloads_parameters
    assert launch_here({**fsdp, "FSDP_OFFLOAD_PARAMS": "true"}).offloads_parameters


def test_the_engines_own_configuration_file(tmp_path):
    """accelerate names the file and nothing else, in its own configuration as in the environment."""
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    (engine := tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    content = {"distributed_type": "DEEPSPEED", "num_processes": 8}
    content["deepspeed_config"] = {"deepspeed_config_file": str(engine)}
    (tmp_path / "launch.yaml").write_text(json.dumps(content))
    environment = {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true"}
    environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(engine)
    for launch in (read_launch(tmp_path / "launch.yaml"), launch_here(environment)):
        assert launch.strategy == "zero3" and launch.offloads_optimizer and not launch.offloads_parameters
    engine.write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        launch_here(environment)


def test_gpus():
    assert Gpus.parse("8x80") == Gpus(8, 80.0) and Gpus.parse("2x8x141GB") == Gpus(16, 141.0, 2)
    assert Launch().on(Gpus(8, 80.0)).strategy == "ddp" and Launch().on(Gpus(1, 80.0)).strategy == "single"
    assert Launch(4, strategy="zero3").on(Gpus.parse("2x8x80")).per_machine == 8
