"""One process of a launch: gives GKD models that are not whole, or not causal, and writes what each process is told.

Usage: accelerate launch --config_file … refusals.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

from distill_trainers import GKDConfig, GKDTrainer, models
from distill_trainers.toy import addition_dataset

CASES = [("student", "missing"), ("student", "fewer"), ("student", "shape"), ("student", "nan")]
CASES += [
    ("teacher", "missing"),
    ("teacher", "fewer"),
    ("teacher", "shape"),
    ("teacher", "nan"),
    ("teacher", "encoder"),
]


def main(folder: Path) -> None:
    told = {}
    models.check_files = lambda *args: None  # reads names before anything is loaded: here it is the loading that counts
    for role, fault in [*CASES, ("student", "student")]:
        names = {"student": str(folder / "student"), "teacher": str(folder / "teacher"), role: str(folder / fault)}
        args = GKDConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            report_to="none",
            max_steps=1,
            max_length=24,
            max_new_tokens=4,
            lmbda=0.0,
            save_strategy="no",
            per_device_train_batch_size=2,
        )
        try:
            GKDTrainer(names["student"], names["teacher"], args, addition_dataset(8)).train()
            told[f"{role} {fault}"] = "trained"
        except Exception as error:
            told[f"{role} {fault}"] = f"{type(error).__name__}: {error}"
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
