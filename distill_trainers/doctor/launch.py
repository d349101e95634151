"""How a run is going to be started: how many processes, what is sharded over them, where it runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..exceptions import ConfigurationError
from ..recipe.reading import read_settings
from ..settings import require, shown

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
SHARDED = ("zero3", "fsdp2")
_OFFLOADED = ("cpu", "nvme")


@dataclass(frozen=True)
class Launch:
    """What accelerate's configuration says.

    Attributes:
        strategy: of the student: one of STRATEGIES.
        offloads_optimizer, offloads_parameters: DeepSpeed keeps them in the host's memory.
        on_cpu: processes share the machine's memory, and there is no GPU.
        mixed_precision: what the file says: `no`, `bf16` or `fp16`.
    """

    processes: int = 1
    machines: int = 1
    strategy: str = "single"
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    on_cpu: bool = False
    mixed_precision: str = "no"
    name: str = ""

    @property
    def by_deepspeed(self) -> bool:
        return self.strategy.startswith("zero")

    @property
    def per_machine(self) -> int:
        """Processes that share one machine."""
        return max(1, self.processes // self.machines)

    def on(self, gpus: Gpus) -> Launch:
        """Return the same on other hardware; one process alone becomes DDP on several GPUs."""
        strategy = "ddp" if self.strategy == "single" and gpus.count > 1 else self.strategy
        return replace(self, processes=gpus.count, machines=gpus.machines, strategy=strategy, on_cpu=False)


@dataclass(frozen=True)
class Gpus:
    """Hardware that need not be here: `8x80` is 8 GPUs of 80 GB, `2x8x80` two machines of those."""

    count: int
    gigabytes: float
    machines: int = 1

    @property
    def bytes(self) -> float:
        """Of one GPU; a GB is 10⁹ bytes, which is less than makers put on."""
        return self.gigabytes * 1e9

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Read a text like `8x80` or `2x8x80`; raise ConfigurationError for any other."""
        parts = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)(?:gb)?", text.strip().lower())
        if not parts or 0 in (int(parts[1] or 1), int(parts[2])) or float(parts[3]) == 0:
            raise ConfigurationError(
                f"Got `gpus: {text}`; expected GPUs and gigabytes such as 8x80, or machines, GPUs and gigabytes such "
                "as 2x8x80."
            )
        machines = int(parts[1] or 1)
        return cls(machines * int(parts[2]), float(parts[3]), machines)


def read_launch(path: str | Path) -> Launch:
    """Read a launch configuration of accelerate.

    Raises:
        ConfigurationError: it is not there, or not one.
    """
    file = Path(path)
    if not os.path.lexists(file):
        near = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigurationError(
            f"There is no launch configuration {str(path)!r}. That folder holds: {near or 'none'}."
        )
    content = read_settings(file, "The launch configuration")
    if "distributed_type" not in content:
        raise ConfigurationError(
            f"{str(path)!r} is not a launch configuration: it has no `distributed_type`. Write one with `accelerate "
            "config`, or take one of accelerate_configs/."
        )
    for name in ("deepspeed_config", "fsdp_config"):
        require(isinstance(content.get(name) or {}, dict), name, content.get(name), "a mapping")
    for name, least in (("num_processes", 1), ("num_machines", 1)):
        count = content.get(name)
        whole = isinstance(count, int) and not isinstance(count, bool) and least <= count <= 10**6
        require(count is None or whole, name, count, f"a whole number, {least} or more")
    return _from_content(content, file.stem)


def _from_content(content: Mapping[str, Any], name: str) -> Launch:
    kind, processes = str(content["distributed_type"]), int(content.get("num_processes") or 1)
    deepspeed, fsdp = content.get("deepspeed_config") or {}, content.get("fsdp_config") or {}
    strategy = "ddp" if processes > 1 else "single"
    if kind == "DEEPSPEED":
        deepspeed = {**deepspeed, **_of_engine_file(deepspeed.get("deepspeed_config_file"))}
        stage = deepspeed.get("zero_stage", 2)
        require(stage in (0, 1, 2, 3, "0", "1", "2", "3"), "zero_stage", stage, "0, 1, 2 or 3")
        stage = int(stage)
        strategy = f"zero{stage}" if stage else strategy
    elif kind == "FSDP":
        strategy = "fsdp2"
    return Launch(
        processes=processes,
        machines=int(content.get("num_machines") or 1),
        strategy=strategy,
        offloads_optimizer=str(deepspeed.get("offload_optimizer_device")) in _OFFLOADED,
        offloads_parameters=str(deepspeed.get("offload_param_device")) in _OFFLOADED
        or bool(fsdp.get("fsdp_offload_params")),
        on_cpu=bool(content.get("use_cpu")),
        mixed_precision=str(content.get("mixed_precision") or "no"),
        name=name,
    )


def _of_engine_file(path: str | None) -> dict[str, Any]:
    """What DeepSpeed's own configuration file says of sharding, by the names of accelerate's."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization") or {}
        return {
            "zero_stage": int(zero.get("stage", 0)),
            "offload_optimizer_device": (zero.get("offload_optimizer") or {}).get("device"),
            "offload_param_device": (zero.get("offload_param") or {}).get("device"),
        }
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"DeepSpeed's configuration {str(path)!r} cannot be read: {shown(error, 300)}."
        ) from error


def launch_here(environment: Mapping[str, str] | None = None, *, on_cpu: bool = False) -> Launch:
    """Tell the launch that this process is part of, from the environment that `accelerate launch` sets."""
    env = os.environ if environment is None else environment
    processes = int(env.get("WORLD_SIZE", "1"))
    strategy = "ddp" if processes > 1 else "single"
    engine = {
        "zero_stage": env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        "offload_optimizer_device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        "offload_param_device": env.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
        **_of_engine_file(env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")),
    }
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        strategy = f"zero{engine['zero_stage']}"
    elif env.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        strategy = "fsdp2"
    return Launch(
        processes=processes,
        machines=max(1, processes // int(env.get("LOCAL_WORLD_SIZE", processes))),
        strategy=strategy,
        offloads_optimizer=engine["offload_optimizer_device"] in _OFFLOADED,
        offloads_parameters=engine["offload_param_device"] in _OFFLOADED
        or env.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
        on_cpu=on_cpu,
        mixed_precision=env.get("ACCELERATE_MIXED_PRECISION", "no"),
        name=strategy if "ACCELERATE_MIXED_PRECISION" in env else "",  # started without a configuration
    )
