"""A small recipe on disk."""

import json

import pytest
import yaml


@pytest.fixture
def recipe(tmp_path, saved):
    """`recipe(**changes)` writes a small recipe and returns its path; a change to None drops the key."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(**changes):
        content = {
            "method": "gkd",
            "model_name_or_path": saved.student,
            "teacher_model_name_or_path": saved.teacher,
            "dataset": str(data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "max_length": 24,
            "max_new_tokens": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return str(path)

    return write
