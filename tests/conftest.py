"""Shared fixtures: a character tokenizer, tiny models, trainers that run in milliseconds, and a dense reference.

How bounds are set. Every processor rounds in its own way (the width of its vectors, whether it multiplies bfloat16), so
a comparison is made in float64, or its bound stands ten times above what rounding gave. That was measured with AMX and
AVX-512, with AVX2, and with no vectors at all. A fault of a formula gives a hundredth or more. What is drawn at random
has a bound of 5 standard errors. What must be the same bit for bit, as a resumed run, is compared with `==`.
"""

from __future__ import annotations

import os

# Before torch and transformers are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import functools
import gc
import importlib.util
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from _pytest import logging as pytest_logging
from accelerate.utils import imports as accelerate_imports
from datasets import disable_progress_bars
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging as transformers_logging

from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.toy import (
    RATIONALE_PROMPTS,
    addition_dataset,
    addition_rationales,
    character_tokenizer,
    tiny_llama,
)
from distill_trainers.trainers import METHODS

torch.set_num_threads(1)
disable_progress_bars()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# Rows that a method reads, where they are not prompts with completions, and what it takes to read them.
METHOD_DATA = {"rationale": addition_rationales}
METHOD_SETTINGS = {"rationale": {**RATIONALE_PROMPTS, "max_length": 40, "max_new_tokens": 20}}
# Without such a device torch keeps each seed for the day it comes, with the stack of the call: a tenth of a trainer.
for device in (torch.cuda, torch.mtia, torch.xpu):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None
# It reads the metadata of installed packages anew whenever a model is unwrapped.
accelerate_imports._is_package_available = functools.cache(accelerate_imports._is_package_available)


class _StaysOn(pytest_logging.catching_logs):
    """A handler of pytest's stays on: pytest walks 600 loggers twelve times a test, longer than most tests take."""

    def __enter__(self):
        loggers = len(logging.root.manager.loggerDict)
        if self.handler not in logging.root.handlers or loggers != getattr(self.handler, "walked", 0):
            super().__enter__()
            self.handler.walked = loggers
        return self.handler

    def __exit__(self, *error):
        if self.level is not None:
            super().__exit__(*error)


pytest_logging.catching_logs = _StaysOn


def _freeze() -> None:
    """Leave what is there out of later walks of the garbage collector, which the trainer calls at every start.

    All tests and all that they import are 320,000 objects: a walk takes as long as three steps of a tiny model.
    """
    gc.collect()
    gc.freeze()
    _freeze.modules = len(sys.modules)


def pytest_collection_finish():
    _freeze()


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, bos: bool = False, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, but two newlines in a row merge into one token (so that borders can be straddled)."""
    newline = "\u010a"
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    alphabet[newline * 2] = len(alphabet)
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[(newline, newline)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<bos>", "<end_of_turn>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<bos>" if bos else None
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    """A byte-level tokenizer made on the spot: one token a byte, a ChatML template, padding with the EOS token."""
    return build_tokenizer


@pytest.fixture(scope="session")
def streams():
    """`streams(count, step=0, …)`: random numbers for so many prompts; others at another place."""

    def make(count, seed=0, **place):
        stream = Stream(seed, Role.STUDENT, Purpose.ROLLOUT).at(**place)
        return [stream.at(row=row) for row in range(count)]

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """One token per character; pad and EOS are different tokens."""
    return character_tokenizer()


def digits_tokenizer():
    """Two digits are one token; no id but by accident stands for what it does to the character tokenizer."""
    characters = ["=", "+", *"9876543210"]
    pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
    vocab = {token: i for i, token in enumerate([*characters, *(a + b for a, b in pairs), "<pad>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<pad>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="session")
def digits():
    """A tokenizer of the same characters, with a token for each two digits."""
    return digits_tokenizer()


@pytest.fixture(scope="session")
def make_student(tokenizer):
    """Factory of a student of random weights: `make_student(seed=…, **llama_config)`."""

    def make(seed=1, **config):
        return _tiny(tokenizer, 32, **{"seed": seed, **config})

    return make


@pytest.fixture(scope="session")
def make_teacher(tokenizer):
    """Factory of a teacher whose random weights are large enough for sharp, position-dependent distributions."""

    def make(seed=7, **config):
        return _tiny(tokenizer, 48, **{"seed": seed, "initializer_range": 0.25, **config})

    return make


_MADE = {}


def _tiny(tok, width, **config):
    """`tiny_llama` of two layers, as a copy of the first of its kind: a third of the time."""
    key = repr((len(tok), tok.pad_token_id, tok.eos_token_id, width, sorted(config.items())))
    if key not in _MADE:
        _MADE[key] = tiny_llama(tok, width, 2, **config)
    return copy.deepcopy(_MADE[key])


@functools.cache
def _rows(method):
    return METHOD_DATA.get(method, addition_dataset)(24)


@pytest.fixture
def make_trainer(tmp_path, tokenizer, make_student, make_teacher, digits):
    """Factory of a trainer on CPU: constructor arguments by name, everything else goes into its config.

    With `teacher_tokenizer: own` the default teacher is one that reads two digits as one token.
    """
    constructor = {
        "data_collator",
        "callbacks",
        "optimizers",
        "peft_config",
        "quantization_config",
        "pretraining_dataset",
        "formatting_func",
        "model_init",
        "compute_metrics",
        "preprocess_logits_for_metrics",
        "optimizer_cls_and_kwargs",
        "reward_funcs",
    }

    def make(
        student=None, teacher="default", train="default", eval_dataset=None, method="gkd", tok=tokenizer, **settings
    ):
        config_class, trainer_class = METHODS[method]
        kwargs = {name: settings.pop(name) for name in constructor & settings.keys()}
        if "teacher_processing_class" in settings:
            kwargs["teacher_processing_class"] = settings.pop("teacher_processing_class")
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "max_length": 24,
            "max_new_tokens": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **METHOD_SETTINGS.get(method, {}),
        }
        if not {"max_steps", "num_train_epochs"} & settings.keys():
            defaults["max_steps"] = 3
        args = config_class(**{**defaults, **settings})
        if isinstance(teacher, str) and teacher in ("default", "double"):
            # A method that needs no teacher gets none.
            dtype = torch.float64 if teacher == "double" else torch.float32
            own = settings.get("teacher_tokenizer") == "own"
            if own:
                kwargs.setdefault("teacher_processing_class", digits)
            teacher = None
            if args.needs:
                model = _tiny(digits, 48, seed=7, initializer_range=0.25) if own else make_teacher()
                teacher = model.to(dtype)
        trainer = trainer_class(
            student if student is not None or "model_init" in kwargs else make_student(),
            teacher,
            args,
            _rows(method) if isinstance(train, str) else train,
            eval_dataset,
            processing_class=tok,
            **kwargs,
        )
        transformers_logging.set_verbosity_error()
        return trainer

    return make


@pytest.fixture(scope="session")
def rows_for():
    """`rows_for(method)(count, seed)`: a dataset of the layout that a method reads."""
    return lambda method: METHOD_DATA.get(method, addition_dataset)


@pytest.fixture
def batch_of(tokenizer):
    """`batch_of(trainer, rows)` collates rows of `trainer.train_dataset` (all of them by default)."""

    def collate(trainer, rows=None, dataset=None):
        dataset = trainer.train_dataset if dataset is None else dataset
        return trainer.data_collator([dataset[i] for i in (rows if rows is not None else range(len(dataset)))])

    return collate


class Die(TrainerCallback):
    """Kills a run as a signal would: nothing of the trainer's own shutdown happens."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Killed(BaseException):
    """Not an Exception, so that no handler swallows it."""


@pytest.fixture
def die_at():
    """`die_at(step)` is a callback that raises `die_at.error` when optimiser step `step` (from 0) begins."""

    def make(step):
        return Die(step)

    make.error = Killed
    return make


@pytest.fixture(scope="session")
def by_step():
    """`by_step(trainer, name)`: the logged values of one metric, by optimiser step."""

    def read(trainer, name="loss"):
        return {row["step"]: row[name] for row in trainer.state.log_history if name in row}

    return read


@pytest.fixture(scope="session")
def dense():
    """`dense(student, teacher, rows)`: float64 log-probabilities of every trained token, one unpadded row at a time.

    It shares nothing with the package but the models themselves: no batch, no padding, no mask, no fused head.
    """

    @torch.no_grad()
    def reference(student, teacher, rows, vocab_size=None, temperature=1.0):
        student, teacher = copy.deepcopy(student).double().eval(), copy.deepcopy(teacher).double().eval()
        q, p, labels = [], [], []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            trained = [t for t in range(1, ids.shape[1]) if row["labels"][t] != -100]
            for model, logps in ((student, q), (teacher, p)):
                logits = model(input_ids=ids).logits[0, :, :vocab_size].double() / temperature
                logps += [F.log_softmax(logits[t - 1], dim=-1) for t in trained]
            labels += [row["input_ids"][t] for t in trained]
        return SimpleNamespace(q=torch.stack(q), p=torch.stack(p), labels=torch.tensor(labels))

    return reference


@pytest.fixture(scope="session")
def jsd_mean():
    """Mean generalised JSD of dense log-probabilities, written from its definition (arXiv 2306.13649, eq. 1)."""

    def value(found, beta=0.5):
        p, q = found.p.exp(), found.q.exp()
        m = beta * p + (1 - beta) * q
        terms = beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log())
        return terms.sum(-1).mean().item()

    return value


@pytest.fixture
def settings_of_both(tmp_path):
    """`settings_of_both(**changes)`: what TRL's configs and ours are given alike, for a short plain run on the CPU."""
    plain = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
    }
    return lambda **changes: {**plain, **changes}


@pytest.fixture(autouse=True)
def seeded():
    """Libraries draw from torch's own numbers (PEFT its adapters): they are the same whatever test ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def few_to_walk():
    """Libraries that were first needed by a test before are frozen too."""
    if len(sys.modules) > _freeze.modules + 100:
        _freeze()


@pytest.fixture(scope="session", autouse=True)
def extensions(tmp_path_factory):
    """DeepSpeed builds once, in a folder of this session: the lock of a build killed elsewhere would hang all."""
    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session  # that of all its processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(session / "extensions"))
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer, make_student, make_teacher):
    """Folders of a saved student and teacher, each with the tokenizer beside it."""
    root: Path = tmp_path_factory.mktemp("models")
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return SimpleNamespace(student=str(root / "student"), teacher=str(root / "teacher"), root=root)


@pytest.fixture(scope="session")
def hub_server():
    """The module `tests/hub/server.py`: a Hub on loopback."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent / "hub" / "server.py")
    module = sys.modules["hub_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """A Hub that this process takes for the only one: online, an empty cache, the token of `me`, and no Xet.

    Libraries read that from the environment when they are imported, so it is their constants that are set.
    """
    import datasets.config
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    server = hub_server.Hub()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no_token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_OFFLINE": False}.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    # One that was made on import, and is what functions such as `whoami` are methods of.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # between attempts
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    yield server
    server.close()
