"""What a run was and what it cost, in `run.json` beside the student: for reports, which see no trainer."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ... import models
from ...run_files import FORMAT, RECORD_NAME, VERSION, plain, read_record, shown
from ...storage import write_file
from ..protocol import Run

# What says nothing about the run.
_SILENT = {"run_name", "resume_from_checkpoint", "disable_tqdm", "report_to", "dry_run", "local_rank"}


@dataclass
class Session:
    """One stretch of training, from a start or a resumption to a stop.

    Attributes:
        seconds: of training, evaluation and saving within it.
        peak_mib: of device memory, of the process where that is a CPU; the largest of all processes.
        energy_joules: of all devices, as their driver counts it; None where no driver does.
    """

    started: str
    from_step: int
    to_step: int
    seconds: float
    peak_mib: float | None = None
    energy_joules: float | None = None


class RunRecorder(TrainerCallback):
    """Writes `run.json` when training begins, at each checkpoint and at the end.

    Attributes:
        recipe: what was set, by key; those who read a recipe add what the trainer does not see.
    """

    def __init__(self, run: Run):
        self.run = run
        self.recipe: dict[str, Any] = changed_settings(run.args)
        self._earlier: list[dict[str, Any]] = []
        self._session = Session("", 0, 0, 0.0)
        self._clock = 0.0
        self._energy: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._earlier = []
        if state.global_step:
            known = read_record(args.output_dir).get("sessions", [])
            self._earlier = [session for session in known if session.get("from_step", 0) < state.global_step]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._session = Session(now, state.global_step, state.global_step, 0.0)
        self._clock, self._energy = time.monotonic(), energy_joules(args.device)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._write(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        """All processes must call it."""
        session, energy = self._session, energy_joules(args.device)
        spent = float("nan") if energy is None or self._energy is None else energy - self._energy
        of_rank = torch.tensor([[peak_mib(args.device), spent]], device=args.device, dtype=torch.float32)
        everyone = self.run.accelerator.gather(of_rank).cpu().double()
        session.to_step, session.seconds = state.global_step, time.monotonic() - self._clock
        session.peak_mib, session.energy_joules = _number(everyone[:, 0].max()), _number(everyone[:, 1].sum())
        if not args.should_save:
            return
        record = {**self.facts(), "sessions": [*self._earlier, asdict(session)]}
        remedy = "Free some space and go on from the last checkpoint."
        text = json.dumps(record, indent=1, default=str)
        write_file(Path(args.output_dir) / RECORD_NAME, text, "the record of the run", remedy)

    def facts(self) -> dict[str, Any]:
        """Return what was run, without paths of this machine."""
        run, student, device = self.run, models.causal_lm_of(self.run.model), self.run.args.device
        source = models.source_of(run.model)
        teachers = {"teachers": plain(run.teacher.parts)} if run.teacher.parts else {}
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": run.method_name,
            "paper": dict(run.paper),
            "student": shown(source) if source else type(student).__name__,
            "student_parameters": models.num_parameters(run.model),
            "teacher": shown(run.teacher.name),
            "processes": run.accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": _versions(),
            "recipe": {**teachers, **self.recipe},
        }


def changed_settings(settings: Any) -> dict[str, Any]:
    """List fields of a dataclass that are not at their defaults; folders by name, and no possible secret."""
    changed = {}
    for field in fields(settings):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(settings, field.name)
        unset = value is None or value == default or (not value and not default)  # False is what None comes to
        if field.init and field.name not in _SILENT and not unset and not is_dataclass(value):
            changed[field.name] = value
    return plain(changed)


def energy_joules(device: torch.device) -> float | None:
    """Read what the device has used since its driver was loaded; None where no driver counts it.

    NVIDIA's counts from Volta on, through `nvidia-ml-py`.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # no library, no such counter, another maker's device: a cost that is not known
        return None


def peak_mib(device: torch.device) -> float:
    """Read the peak of device memory since training began; on a CPU the whole process's. NaN where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _number(value: torch.Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None


@functools.cache  # each is read from a folder of the environment
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("distill-trainers", "torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
