"""As a user has it: commands in processes of their own, which know the Hub by HF_ENDPOINT alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PULL = """
import json, sys
from transformers import pipeline
written = [
    pipeline("text-generation", model=name)("37+58=", max_new_tokens=12, do_sample=False, return_tensors=True)
    for name in sys.argv[1:]
]
print(json.dumps([each[0]["generated_token_ids"] for each in written]))
"""


@pytest.mark.slow
def test_pushed_and_pulled_by_other_processes(hub_server, saved, tmp_path):
    hub = hub_server.Hub()
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HOME": str(tmp_path / "home")}
    own |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    root = str(Path(__file__).parents[2])
    env = {**os.environ, **own, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}

    def call(*command):
        done = subprocess.run([sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    settings = f"""--model_name_or_path {saved.student} --teacher_model_name_or_path {saved.teacher}
    --dataset train.jsonl --output_dir run --max_steps 5 --max_length 24 --max_new_tokens 8 --learning_rate 1e-2
    --use_cpu true --push_to_hub true
    --hub_model_id me/student --save_strategy no --report_to none"""
    call("-m", "distill_trainers.cli", "train", *settings.split())
    assert "model.safetensors" in hub.files("me/student")
    here, there = json.loads(call("-c", _PULL, str(tmp_path / "run"), "me/student").splitlines()[-1])
    assert here == there and len(here) > 6
    hub.close()
