"""What strangers hand over stays data: recipes, models, checkpoints, templates. See docs/security.md."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import distill_trainers
from distill_trainers.addresses import is_loopback, origin, secret_for
from distill_trainers.cli import main
from distill_trainers.doctor.trust import check_trust
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.manifest import MANIFEST_NAME
from distill_trainers.recipe.environment import set_environment
from distill_trainers.recipe.parse import parse_recipe

ROOT = Path(distill_trainers.__file__).parent


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def write_recipe(tmp_path, saved):
    """`write_recipe(**changes)` writes a small recipe and returns its path; a change to None drops the key."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "question": "1+1"} for a in range(4) for b in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(**changes):
        content = {
            "method": "gkd",
            "model_name_or_path": saved.student,
            "teacher_model_name_or_path": saved.teacher,
            "dataset": str(tmp_path / "train.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 24,
            "max_new_tokens": 4,
            "use_cpu": True,
            "save_steps": 1,
            "lmbda": 0.0,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write


# ---- Calls that are in no file --------------------------------------------------------------------------------------

_NEVER = {"eval", "exec", "compile", "__import__", "input"}
_NEVER_OF = {
    "os": {"system", "popen", "execv", "execve", "execvp", "spawnl", "spawnv", "startfile"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"},
    "torch": {"load"},
    "tempfile": {"mktemp"},
    "shutil": {"unpack_archive"},
    "np": {"load"},
    "numpy": {"load"},
}
_NEVER_IMPORTED = {
    "pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "tarfile",
    "xml",
    "telnetlib",
    "jinja2",
}
_KEYWORDS = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("verify", False), ("ssl", False)}
_KEYWORDS |= {("trust_remote_code", True), ("autoescape", False), ("trust_env", True)}
# Classes of failures, which are caught.
_ALLOWED = {("data/chat.py", "jinja2"), ("models/loading.py", "pickle")}
_ALLOWED |= {("recipe/reading.py", "yaml.load")}  # with a loader made from `yaml.SafeLoader`


def _dangers(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names if not getattr(node, "level", 0) else ():
                if name.partition(".")[0] in _NEVER_IMPORTED:
                    yield name.partition(".")[0]
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in _NEVER:
            yield called.id
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            if called.attr in _NEVER_OF.get(called.value.id, ()):
                yield f"{called.value.id}.{called.attr}"
        if isinstance(called, ast.Attribute) and called.attr in ("extractall", "read_pickle", "to_pickle"):
            yield called.attr
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in _KEYWORDS:
                yield f"{keyword.arg}={keyword.value.value}"


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_runs_or_unpickles_data_is_called(file):
    name = str(file.relative_to(ROOT))
    found = {(name, danger) for danger in _dangers(ast.parse(file.read_text(encoding="utf-8")))}
    assert not found - _ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "yaml.load(text)",
        "torch.load(file)",
        "np.load(file)",
        "from pickle import loads",
        "import tarfile",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert list(_dangers(ast.parse(code)))


# ---- Code that comes with a model -----------------------------------------------------------------------------------


@pytest.fixture(params=["a kind of its own", "a known kind", "the tokenizer alone"])
def planted(request, saved, tmp_path):
    """A model folder with code that would create a file, and that file."""
    folder, marker = tmp_path / "planted", tmp_path / "ran"
    shutil.copytree(saved.student, folder)
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'evil'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    if request.param != "the tokenizer alone":
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        if request.param == "a kind of its own":
            config |= {"model_type": "evil", "architectures": ["M"]}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder), marker


def _doors(folder, write_recipe, saved, tmp_path):
    student = lambda: write_recipe(model_name_or_path=folder)  # noqa: E731
    teacher = lambda: write_recipe(teacher_model_name_or_path=folder)  # noqa: E731
    made = {"student_init": {"from_teacher": True, "keep_layers": 1}, "model_name_or_path": None}
    questions = {"folder": str(tmp_path / "r"), "questions": str(tmp_path / "train.jsonl"), "use_cpu": True}
    (tmp_path / "rationales.yaml").write_text(yaml.safe_dump({**questions, "teacher": folder, "max_questions": 1}))
    evaluation = {"students": folder, "teacher": saved.teacher, "dataset": str(tmp_path / "train.jsonl")}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({**evaluation, "output_dir": str(tmp_path / "e")}))
    return {
        "train, student": lambda: ["train", "--config", student()],
        "train, teacher": lambda: ["train", "--config", teacher()],
        "train, made of it": lambda: ["train", "--config", write_recipe(teacher_model_name_or_path=folder, **made)],
        "dry run": lambda: ["train", "--config", student(), "--dry_run", "true"],
        "doctor": lambda: ["doctor", "--config", student(), "--quick"],
        "doctor, teacher": lambda: ["doctor", "--config", teacher(), "--quick"],
        "cache-teacher": lambda: ["cache-teacher", "--config", teacher(), "--teacher_cache", str(tmp_path / "c")],
        "prune": lambda: ["prune", "--config", teacher(), "--intermediate_size", "8"],
        "pairs": lambda: ["pairs", "--config", teacher(), "--folder", str(tmp_path / "p")],
        "rationales": lambda: ["rationales", "extract", "--config", str(tmp_path / "rationales.yaml")],
        "evaluate": lambda: ["evaluate", "--config", str(tmp_path / "evaluate.yaml")],
        "push": lambda: ["push", folder, "me/it"],
    }


def test_code_of_a_model_runs_at_no_door_unless_it_is_said(planted, write_recipe, saved, tmp_path, monkeypatch, capsys):
    folder, marker = planted
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.chdir(tmp_path)
    for door, arguments in _doors(folder, write_recipe, saved, tmp_path).items():
        try:
            main(arguments())
        except (ValueError, OSError, SystemExit):  # how it is refused is another test's
            pass
        assert not marker.exists(), door
    capsys.readouterr()


def test_code_of_a_model_runs_where_it_is_said(saved, tmp_path):
    """The trap works: else the test above proves nothing."""
    from distill_trainers.models import load_config

    marker, folder = tmp_path / "ran", tmp_path / "planted"
    shutil.copytree(saved.student, folder)
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig\nclass C(LlamaConfig):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "evil.C"}, "model_type": "one of its own"}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    with pytest.raises(ConfigurationError, match="brings code of its own.*Read it.*`trust_remote_code: true`"):
        load_config(str(folder), "student")
    assert not marker.exists()
    load_config(str(folder), "student", trust_remote_code=True)
    assert marker.exists()


# ---- Pickles --------------------------------------------------------------------------------------------------------


def test_pickled_weights_run_nothing(saved, write_recipe, tmp_path, capsys):
    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(saved.student, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(marker)}, folder / "pytorch_model.bin")
    for changes in ({"model_name_or_path": str(folder)}, {"teacher_model_name_or_path": str(folder)}):
        assert main(["train", "--config", write_recipe(**changes)]) == 2
        assert "pickled weights" in capsys.readouterr().err
        assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint_run_nothing(write_recipe, tmp_path, name):
    assert main(["train", "--config", write_recipe(max_steps=1)]) == 0
    checkpoint, marker = tmp_path / "out" / "checkpoint-1", tmp_path / "ran"
    torch.save({"state": Trap(marker)}, checkpoint / name)
    (checkpoint / MANIFEST_NAME).unlink()  # an attacker would write it anew
    try:
        main(["train", "--config", write_recipe(), "--resume_from_checkpoint", str(checkpoint)])
    except (pickle.UnpicklingError, RuntimeError, ValueError):  # how it is refused is the checkpoints' tests'
        pass
    assert not marker.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoint / name, weights_only=True)


# ---- Recipes --------------------------------------------------------------------------------------------------------

HOSTILE_VARIABLES = """LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES PATH HOME PYTHONPATH PYTHONSTARTUP
PYTHONHOME PYTHONBREAKPOINT BASH_ENV CC CXX CUDA_HOME TRITON_PTXAS_PATH NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN NCCL_CONF_FILE
HF_ENDPOINT HF_TOKEN HF_HOME WANDB_BASE_URL WANDB_API_KEY WANDB_DIR HTTPS_PROXY https_proxy ALL_PROXY SSL_CERT_FILE
REQUESTS_CA_BUNDLE CURL_CA_BUNDLE OPENAI_BASE_URL OPENAI_CUSTOM_HEADERS DISTILL_TEACHER_TOKEN DISTILL_TEACHER_TOKEN_FOR
OPENAI_API_KEY_FOR AWS_ENDPOINT_URL MLFLOW_TRACKING_URI VLLM_PLUGINS VLLM_LOGGING_CONFIG_PATH GIT_SSH_COMMAND TMPDIR
TORCH_NCCL_DEBUG_INFO_PIPE_FILE TORCHINDUCTOR_CACHE_DIR OMP_NUM_THREADS=1 LD_PRELOAD\n""".split(" ")
HOSTILE_VARIABLES = [name for part in HOSTILE_VARIABLES for name in part.split("\n") if name] + [
    "",
    "OMP_NUM_THREADS\n",
]


@pytest.mark.parametrize("name", HOSTILE_VARIABLES)
def test_a_recipe_sets_no_variable_that_runs_or_sends(write_recipe, monkeypatch, name):
    before = dict(os.environ)
    with pytest.raises(ConfigurationError, match="in the shell that starts the run") as raised:
        parse_recipe(["--config", write_recipe(env={"OMP_NUM_THREADS": 1, name: "s3cret"})])
    assert dict(os.environ) == before and "s3cret" not in str(raised.value)


HARMLESS_VARIABLES = """OMP_NUM_THREADS CUDA_VISIBLE_DEVICES WANDB_PROJECT NCCL_DEBUG TOKENIZERS_PARALLELISM
HIP_VISIBLE_DEVICES PYTORCH_ENABLE_MPS_FALLBACK TORCHDYNAMO_DISABLE TORCH_DISTRIBUTED_DEBUG NCCL_IB_GID_INDEX""".split()


def test_a_recipe_sets_variables_of_speed_and_devices(monkeypatch):
    for name in HARMLESS_VARIABLES:
        monkeypatch.setenv(name, "before")
        set_environment({name: 1})
        assert os.environ[name] == "1"
    for wrong in ({"OMP_NUM_THREADS": [1]}, {"OMP_NUM_THREADS": None}, ["OMP_NUM_THREADS=1"], "OMP_NUM_THREADS=1"):
        with pytest.raises(ConfigurationError, match="env"):
            set_environment(wrong)


def test_a_recipe_is_data(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"method: !!python/object/apply:open [{str(tmp_path / 'ran')!r}, w]")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert not (tmp_path / "ran").exists()


def _trust(path, *options):
    return "\n".join(f"{finding.what}" for finding in check_trust(parse_recipe(["--config", path, *options])))


def test_the_doctor_says_what_a_recipe_runs_and_sends(write_recipe, saved, capsys):
    assert _trust(write_recipe()) == ""
    told = _trust(write_recipe(trust_remote_code=True))
    assert f"runs code that comes with the student '{saved.student}'" in told
    assert f"runs code that comes with the teacher '{saved.teacher}'" in told
    told = _trust(write_recipe(teacher_model_init_kwargs={"trust_remote_code": True}))
    assert "the teacher" in told and "the student" not in told
    told = _trust(write_recipe(attn_implementation="evil/kernel", model_init_kwargs={"use_kernels": True}))
    assert "'evil/kernel' in the student" in told and "use_kernels" in told
    told = _trust(write_recipe(teacher_model_name_or_path="https://gpu.example:8000"))
    assert "sends the token ids of its rows, and of what the student writes, to https://gpu.example:8000" in told
    told = _trust(write_recipe(report_to=["tensorboard"], push_to_hub=True, hub_model_id="me/it", eval_strategy="no"))
    assert "uploads the student to the Hub (me/it)" in told and "metrics" not in told
    assert main(["doctor", "--config", write_recipe(trust_remote_code=True), "--quick"]) == 0
    assert "note (trust): This recipe runs code that comes with the student" in capsys.readouterr().out


# ---- Secrets and addresses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://a", "http://a:80"),
        ("HTTPS://A.example/v1?x#y", "https://a.example:443"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("https://me:secret@a:1/", "https://a:1"),
    ],
)
def test_origins(address, expected):
    assert origin(address) == expected


@pytest.mark.parametrize("address", ["", "a", "ftp://a", "http://", "http://a:99999", "file:///etc/passwd"])
def test_what_is_no_address(address):
    with pytest.raises(ConfigurationError, match="as an address"):
        origin(address)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.1.2.3", True),
        ("http://[::1]", True),
        ("http://localhost:8000", True),
        ("http://localhost.evil.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("http://127.0.0.1@evil.example", False),
        ("http://0.0.0.0", False),
        ("http://10.0.0.1", False),
    ],
)
def test_loopback(address, loopback):
    assert is_loopback(address) is loopback


def test_a_secret_belongs_to_whole_origins(monkeypatch, caplog):
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "s3cret")
    assert secret_for("DISTILL_TEACHER_TOKEN", ["http://127.0.0.1:8000", "http://[::1]:1"]) == "s3cret"
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN_FOR", "https://gpu.example, http://10.0.0.1:8000 https://b.example")
    assert secret_for("DISTILL_TEACHER_TOKEN", ["https://gpu.example:443/v1"]) == "s3cret"
    assert not caplog.records
    assert secret_for("DISTILL_TEACHER_TOKEN", ["http://10.0.0.1:8000"]) == "s3cret"
    assert "plain HTTP" in caplog.text and "s3cret" not in caplog.text
    for other in ("http://gpu.example", "https://gpu.example:8443", "https://gpu.example.evil", "http://127.0.0.1:1"):
        with pytest.raises(ConfigurationError, match="was to be sent"):
            secret_for("DISTILL_TEACHER_TOKEN", ["https://gpu.example", other])
    monkeypatch.delenv("DISTILL_TEACHER_TOKEN")
    assert secret_for("DISTILL_TEACHER_TOKEN", ["http://anywhere"]) is None


def test_an_empty_secret_is_nobodys(monkeypatch):
    """The caller says that it is empty; a list of addresses would not help."""
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "")
    assert secret_for("DISTILL_TEACHER_TOKEN", ["http://gpu1:8123"]) == ""


@pytest.mark.parametrize("written", ["gpu1:8123", "gpu1", "*", "http://gpu1 gpu2"])
def test_a_list_of_addresses_that_is_none_is_named(monkeypatch, written):
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "s3cret")
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN_FOR", written)
    with pytest.raises(ConfigurationError, match="variable DISTILL_TEACHER_TOKEN_FOR holds"):
        secret_for("DISTILL_TEACHER_TOKEN", ["http://gpu1:8123"])


def test_the_remedy_keeps_the_addresses_that_were_named(monkeypatch):
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "s3cret")
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN_FOR", "https://gpu1")
    with pytest.raises(
        ConfigurationError, match="set DISTILL_TEACHER_TOKEN_FOR=https://gpu1:443,http://localhost:1 in"
    ):
        secret_for("DISTILL_TEACHER_TOKEN", ["http://localhost:1"])
