"""Two real processes refuse models that are not whole, or not causal, in the same words, and neither waits."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig

HERE = Path(__file__).parent
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORDS = {
    "missing": "ConfigurationError: The {} model .* 3 tensors .model.layers.1.mlp.down_proj.weight, .* would be random",
    "fewer": "ConfigurationError: The {} model .* 9 tensors .model.layers.1.* of its files have no place in ",
    "shape": "ConfigurationError: The {} model .* 6 tensors .* have another shape than its config says",
    "nan": "ConfigurationError: The {} .*answers with NaN or infinite logits",
    "encoder": "ConfigurationError: The {} .* is not causal: what it says after 8 tokens changes",
    "student": "trained",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, saved, tokenizer):
    root = tmp_path_factory.mktemp("refused")
    for name in ("student", "teacher"):
        shutil.copytree(getattr(saved, name), root / name)
    for name in ("missing", "fewer", "shape", "nan"):
        shutil.copytree(saved.teacher, root / name)
    weights = load_file(root / "missing" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, root / "missing" / "model.safetensors", {"format": "pt"})
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, root / "nan" / "model.safetensors", {"format": "pt"})
    for name, change in (("fewer", {"num_hidden_layers": 1}), ("shape", {"intermediate_size": 40})):
        file = root / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    sizes = {"vocab_size": 14, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=24, initializer_range=0.3, pad_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "encoder")
    tokenizer.save_pretrained(root / "encoder")
    return root


@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero3", "cpu_fsdp2"])
def test_every_process_refuses_alike(folder, environment, launch):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--main_process_port",
        str(33500 + os.getpid() % 2000),
    ]
    command += ["--config_file", str(HERE.parents[1] / "accelerate_configs" / f"{launch}.yaml")]
    with (folder / f"{launch}.log").open("w") as log:
        command += [str(HERE / "refusals.py"), str(folder)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the workers too, which outlive a launcher that is killed
    assert status == 0, (folder / f"{launch}.log").read_text()[-4000:]
    first, second = (json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for case, told in first.items():
        role, fault = case.split()
        assert re.match(WORDS[fault].format(role), told), (case, told)
