"""Look at a recipe before it runs: what would go wrong, what it takes, and what to do about it.

distill-trainers doctor --config recipes/….yaml [--launch accelerate_configs/….yaml] [--gpus 8x80] [--json]
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..exceptions import ConfigurationError
from ..redaction import hidden
from ..settings import setting
from . import report_errors, start_log

LONG_RUN = 100  # optimiser steps from which on a run is looked at before it starts


@dataclass
class DoctorArguments:
    """What the doctor needs beside the recipe."""

    launch: str | None = setting(None, "accelerate's configuration that the run will be started with.")
    gpus: str | None = setting(None, "Judge for other hardware: 8x80 is 8 GPUs of 80 GB, 2x8x80 two machines of those.")
    architectures: str | None = setting(
        None, "Folder of config.json files by model (owner--name.json), for models that are not at hand."
    )
    tflops: float | None = setting(
        None, "With gpus: 10¹² operations per second of one GPU, for the expected time.", above=0
    )
    bandwidth: float = setting(2.0, "With tflops: TB per second that a GPU reads its memory.", above=0)
    local_teacher: str | None = setting(
        None, "With a remote teacher: the same model here, to compare both on some rows."
    )
    quick: bool = setting(False, "Leave out what loads a teacher or measures this device.")
    strict: bool = setting(False, "Exit with 1 if there are warnings.")
    json: bool = setting(False, "Print the diagnosis as JSON.")


def main(argv: Sequence[str]) -> int:
    """Examine a recipe; the exit status is 0 if it is healthy, 1 for warnings with `--strict`, and 2 for errors."""
    import torch

    from ..doctor.printing import print_diagnosis
    from ..recipe.parse import parse_recipe

    start_log(logging.ERROR)
    argv = list(argv)
    if not torch.cuda.is_available() and not any(a.startswith("--use_cpu") for a in argv) and "--help" not in argv:
        argv += ["--use_cpu", "true"]  # a recipe for GPUs may be looked at on any machine
    recipe = parse_recipe(argv, DoctorArguments, command="doctor")
    diagnosis = diagnose(recipe, recipe.extra)
    if recipe.extra.json:
        print(json.dumps(hidden(diagnosis.as_dict()), indent=2, default=str))
    else:
        print_diagnosis(diagnosis)
    return diagnosis.exit_status(strict=recipe.extra.strict)


def diagnose(recipe: Any, options: DoctorArguments) -> Any:
    """Return the diagnosis of a recipe.

    Raises:
        ConfigurationError: options that cannot be read.
    """
    import torch

    from ..doctor import Gpus, Launch, examine, read_launch
    from ..doctor.pace import Rates, measured_rates
    from ..doctor.reading import case_of

    gpus = None if options.gpus is None else Gpus.parse(options.gpus)
    if options.tflops is not None and gpus is None:
        raise ConfigurationError(f"Got `tflops: {options.tflops}` without `gpus`; expected both, or neither.")
    on_cpu = gpus is None and recipe.args.device.type == "cpu"
    launch = Launch(on_cpu=on_cpu) if options.launch is None else read_launch(options.launch)
    if gpus is not None:
        launch = launch.on(gpus)
    elif on_cpu:
        launch = replace(launch, on_cpu=True)
    case, findings = case_of(recipe, launch, gpus, options.architectures)
    rates = None
    if options.tflops is not None:
        rates = Rates(options.tflops * 1e12, options.bandwidth * 1e12, f"{options.tflops:g} · 10¹²/s, as given")
    elif gpus is None and not options.quick:
        narrow = torch.bfloat16 if recipe.args.bf16 else torch.float16 if recipe.args.fp16 else torch.float32
        rates = measured_rates(recipe.args.device, narrow, launch.per_machine if on_cpu else 1)
    remote = None
    if options.local_teacher is not None:
        from ..teachers.base import Pair
        from ..teachers.loading import open_teacher, placement_of

        if placement_of(case.teacher, recipe.args) != "remote":
            raise ConfigurationError(
                f"Got `local_teacher: {options.local_teacher}` and the teacher {case.teacher!r}; expected the "
                "address of a server as the teacher, which the local one is compared with. Leave `local_teacher` out."
            )
        if case.tokenizer is not None:  # else that is what there is to fix
            remote = open_teacher(Pair(case.student, case.teacher, tokenizer=case.tokenizer), recipe.args)
            case.teacher = options.local_teacher
    return examine(case, findings, deep=not options.quick and gpus is None, rates=rates, remote=remote)


def look_before(recipe: Any, checked: Any) -> None:
    """Run the cheap checks ahead of a long run, and print what they find.

    Raises:
        ConfigurationError: they found an error.
    """
    from ..doctor import Severity, examine, launch_here
    from ..doctor.printing import print_findings
    from ..doctor.reading import case_of
    from ..recipe.checks import optimiser_steps

    rows = len(checked.ready.given.train) if hasattr(checked.ready.given.train, "__len__") else None
    if optimiser_steps(recipe.args, rows) < LONG_RUN:
        return
    launch = launch_here(on_cpu=recipe.args.device.type == "cpu")
    case, findings = case_of(recipe, launch, checked=checked)
    diagnosis = examine(case, findings)
    if diagnosis.findings and recipe.args.process_index == 0:
        from rich.console import Console

        print_findings(diagnosis, Console(stderr=True))
    errors = diagnosis.count(Severity.ERROR)
    if errors:
        raise ConfigurationError(
            f"The doctor found {errors} error{'s' * (errors != 1)} in this run: {diagnosis.findings[0].what} Fix the "
            "recipe (`distill-trainers doctor` shows the whole picture), or start it all the same with `--no_doctor`."
        )


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
