"""vLLM as the rollout engine, in this process or on a server, by its own interfaces.

Before each call it is sent the student's weights: all of them by `reload_weights`, or an adapter alone, under a new
name. Then a probe proves that what is served is what is trained: its log-probabilities by vLLM and by the student.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from .. import models
from ..exceptions import ConfigurationError, ServerError, UnlikeModelError, refuse_unknown_keys
from ..randomness import Stream
from ..servers.endpoints import ROLLOUTS, Again, Attempt, Endpoint, Servers, parse_servers
from ..servers.openai import OpenAIServer, Writer, Written
from ..settings import require
from .base import Completions, RolloutEngine, check_room, completions_of
from .sampling import SamplingSettings, unpadded
from .stale import Read, refuse_stale

MODES = ("colocate", "server")
LORA = ("merged", "adapter")
OLDEST, TRIED = "0.32", "0.32.0"  # older ones were not tried
# What the trainer itself decides about vLLM, so that it is not among `vllm_kwargs`.
_OWN = frozenset({"model", "tokenizer", "seed", "load_format", "enable_lora", "distributed_executor_backend"})
_SEEDS = 2**63
_PROBE_TOKENS = 8  # that vLLM writes after the 16 of `models.probe`
_PROBE_ROOM = 16 + _PROBE_TOKENS


@dataclass(frozen=True)
class VllmOptions:
    """`vllm_kwargs`, less what goes to vLLM's `LLM` as it is.

    Args:
        mode: `colocate` (in this process) or `server`.
        server_base_url: address of a server that runs already; else `server_host` and `server_port` make it up.
        server_model: as the server names it; None takes the only one that it has.
        server_timeout: seconds for one whole answer, also for that of a sync.
        server_patience: seconds for which a server that is away is waited for.
        server_concurrency: prompts that are in flight at once, for each process.
        sync_dir: folder that this machine and the server see by the same path; weights go through it.
        lora: whether an adapter is sent `merged` into its base, or as the `adapter` alone.
        tolerance: nats by which log-probabilities of the probe may differ from the student's, in the mean.
    """

    mode: str = "colocate"
    server_base_url: str | None = None
    server_host: str = "127.0.0.1"
    server_port: int = 8000
    server_model: str | None = None
    server_timeout: float = 240.0
    server_patience: float = 300.0
    server_concurrency: int = 64
    sync_dir: str | None = None
    lora: str = "merged"
    tolerance: float = 0.1

    @property
    def url(self) -> str:
        return self.server_base_url or f"http://{self.server_host}:{self.server_port}"


def split_options(given: Mapping[str, Any] | None) -> tuple[VllmOptions, dict[str, Any]]:
    """Return our own options, and the arguments of vLLM's `LLM`.

    Raises:
        ConfigurationError: a value out of range, an unknown name, or vLLM is not installed, or of another version.
    """
    given = dict(given or {})
    names = {field.name for field in dataclasses.fields(VllmOptions)}
    options = VllmOptions(**{name: given.pop(name) for name in names & given.keys()})
    where = "vllm_kwargs: {%s}"
    require(options.mode in MODES, where % "mode", options.mode, f"one of {', '.join(MODES)}")
    require(options.lora in LORA, where % "lora", options.lora, f"one of {', '.join(LORA)}")
    for name in ("tolerance", "server_timeout", "server_patience", "server_concurrency"):
        value, most = getattr(options, name), float("inf") if name == "server_patience" else 1e9
        require(isinstance(value, int | float) and 0 < value <= most, where % name, value, f"a number in (0, {most:g}]")
    if options.mode == "server":
        if len(parse_servers(options.url, ROLLOUTS)) > 1:
            raise ConfigurationError(f"Got the rollout servers {options.url}; expected one, which gets the weights.")
        refuse_unknown_keys(given, names, "vllm_kwargs of `mode: server`, whose engine is started with its own options")
        return options, {}
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "Got `rollout_engine: vllm`, but vLLM is not installed. Install it (`pip install vllm`), name a server "
            "(`vllm_kwargs: {mode: server}`), or take `rollout_engine: decode`, which needs nothing more."
        )
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    check_version(vllm.__version__, "here")
    known = {field.name for field in dataclasses.fields(EngineArgs)} - _OWN
    refuse_unknown_keys(given, names | known, "vllm_kwargs")
    if given.get("tensor_parallel_size", 1) != 1:
        raise ConfigurationError(
            f"Got `tensor_parallel_size: {given['tensor_parallel_size']}` with `mode: colocate`, where each process "
            "has an engine of its own; expected 1. Start a server for a sharded engine (`mode: server`)."
        )
    return options, given


def check_version(version: Any, where: str) -> None:
    from packaging.version import InvalidVersion, Version

    try:
        old = Version(str(version)) < Version(OLDEST)
    except InvalidVersion:  # built from a checkout
        return
    if old:
        raise ConfigurationError(
            f"Got vLLM {version} {where}; expected {OLDEST} or newer ({TRIED} was tried), whose `reload_weights` takes "
            "weights anew. Install another version, or take `rollout_engine: decode`."
        )


def request_fields(sampling: SamplingSettings, seed: int | None, vocab_rows: int | None = None) -> dict[str, Any]:
    """Return the fields of one prompt's request, which `SamplingParams` and the completions API name alike.

    A server fills in what is left out from the model's generation config, so nothing is.

    Raises:
        ConfigurationError: a setting that vLLM does not have.
    """
    if sampling.no_repeat_ngram_size:
        raise ConfigurationError(
            f"Got `no_repeat_ngram_size: {sampling.no_repeat_ngram_size}` with vLLM, which has no such setting; "
            "expected 0."
        )
    if seed is None and sampling.temperature > 0:
        raise ValueError(f"Got no streams of random numbers at temperature {sampling.temperature}; expected one each.")
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.eos_token_ids),
        "logprobs": 0,  # of the token alone
        "seed": seed,
    }
    if sampling.stop_strings:
        fields |= {"stop": list(sampling.stop_strings), "include_stop_str_in_output": True}
    if sampling.suppress_from is not None and vocab_rows is not None and sampling.suppress_from < vocab_rows:
        fields["logit_bias"] = dict.fromkeys(range(sampling.suppress_from, vocab_rows), -100.0)  # vLLM's lowest
    return fields


def write(
    writer: Writer, prompts: Sequence[list[int]], sampling: SamplingSettings, streams: Sequence[Stream]
) -> Completions:
    """Let a model behind a server complete prompts, each by a seed of its own.

    Raises:
        ConfigurationError: it would cut completions short, or lacks a setting.
        ServerError: it refuses, or stays away.
    """
    check_room(prompts, sampling, writer.longest, "the server")
    bodies = [
        {"prompt": ids, **request_fields(sampling, stream.number % _SEEDS, writer.limit)}
        for ids, stream in zip(prompts, streams, strict=True)
    ]
    return completions_of(writer.write(bodies), sampling)


# ---- Engines --------------------------------------------------------------------------------------------------------


class Engine(ABC):
    """A vLLM that answers this process.

    Attributes:
        sends: whether this process is the one that sends it weights.
        longest: tokens of prompt and completion together.
        processed: see `Completions`; None where its numbers are of another kind.
        untied_head: it takes a head of its own for a model that ties it.
        where: for messages.
        serves: the name of what it is asked for, where it has several.
    """

    sends: bool = True
    longest: int | None = None
    processed: bool | None = None
    untied_head: bool = False
    where: str = "vLLM"
    serves: str = ""
    folder: Path

    def own_folder(self, parent: str | None = None) -> None:
        """Make the folder through which weights go; it is removed in the end."""
        self.folder = Path(tempfile.mkdtemp(prefix="distill-rollouts-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @abstractmethod
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights anew, by the names of a checkpoint."""

    @abstractmethod
    def load_adapter(self, name: str, folder: Path) -> None:
        """Take a PEFT adapter in place of the last one."""

    @abstractmethod
    def start(self, prompts: Sequence[list[int]], fields: Sequence[dict[str, Any]]) -> Callable[[], list[Written]]:
        """Begin to complete each prompt by its own fields, in the background if it can; what it returns waits."""

    def complete(self, prompts: Sequence[list[int]], fields: Sequence[dict[str, Any]]) -> list[Written]:
        """Complete each prompt by its own fields."""
        return self.start(prompts, fields)()


class Colocated(Engine):
    """vLLM in this process, which shares its device."""

    def __init__(self, source: str, model: Any, tokenizer: Any, processes: int, options: VllmOptions, given: dict):
        # Else its engine runs in a process of its own, to which weights would have to be pickled.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        causal_lm, self.lora = models.causal_lm_of(model), models.is_peft(model) and options.lora == "adapter"
        self.own_folder()
        for part in (tokenizer, causal_lm.config):  # vLLM reads a config beside a tokenizer
            part.save_pretrained(self.folder / "tokenizer")
        arguments: dict[str, Any] = {
            "dtype": str(causal_lm.dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            **given,
        }
        if self.lora:
            arguments |= {"enable_lora": True, "max_loras": 1}
            arguments.setdefault("max_lora_rank", max(16, *(c.r for c in model.peft_config.values())))
        if processes > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        device = next(causal_lm.parameters()).device
        if device.type == "cpu" and causal_lm.config.get_text_config().tie_word_embeddings and not self.lora:
            # On a CPU vLLM packs the head's weight, and would keep the old pack of one that is the embedding's: so the
            # head gets a weight of its own, which no checkpoint of a tied model has.
            self.untied_head = True
            overrides = {"tie_word_embeddings": False, **(given.get("hf_overrides") or {})}
            arguments |= {"hf_overrides": overrides, "load_format": "dummy"}
        with _random_state_kept(device):
            self.llm = LLM(model=source, tokenizer=str(self.folder / "tokenizer"), **arguments)
        self.longest = self.llm.llm_engine.model_config.max_model_len
        self.processed = {"processed_logprobs": True, "raw_logprobs": False}.get(arguments["logprobs_mode"])
        self._adapter: Any = None

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()

    def load_adapter(self, name: str, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        last = self._adapter
        self._adapter = LoRARequest(name, 1 if last is None else last.lora_int_id + 1, str(folder))
        self.llm.llm_engine.add_lora(self._adapter)
        if last is not None:
            self.llm.llm_engine.remove_lora(last.lora_int_id)

    def start(self, prompts: Sequence[list[int]], fields: Sequence[dict[str, Any]]) -> Callable[[], list[Written]]:
        from vllm import SamplingParams

        questions: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        params, written = [SamplingParams(**each) for each in fields], []
        for answer in self.llm.generate(questions, params, use_tqdm=False, lora_request=self._adapter):
            output = answer.outputs[0]
            places = zip(output.token_ids, output.logprobs or [], strict=True)
            written.append(Written(list(output.token_ids), [float(place[token].logprob) for token, place in places]))
        return lambda: written


class Served(Engine):
    """vLLM's OpenAI server. Weights go through a folder that both sides see; no package of vLLM is needed here."""

    def __init__(self, tokenizer: Any, sends: bool, lora: bool, options: VllmOptions):
        self.sends, self.where = sends, f"the rollout server {options.url}"
        if sends:
            self.own_folder(options.sync_dir)
        self.servers = Servers(
            parse_servers(options.url, ROLLOUTS),
            os.environ.get(ROLLOUTS.token),
            options.server_concurrency,
            options.server_timeout,
            options.server_patience,
            ROLLOUTS,
        )
        endpoint = self.servers.endpoints[0]
        path = "/v1/load_lora_adapter" if lora else "/collective_rpc"
        try:
            version = endpoint.json("/version")
            server = OpenAIServer(endpoint, options.server_model, "server_model")
            server.compare_tokenizer(tokenizer, "student")
        except (Again, ServerError) as error:
            raise ConfigurationError(
                f"The rollout server {endpoint.url} does not answer as vLLM does ({error}). Start one with `vllm serve "
                "STUDENT`, wait until it is up, or fix `server_base_url` in `vllm_kwargs`."
            ) from error
        check_version(version.get("version") if isinstance(version, dict) else None, f"at {endpoint.url}")
        _check_path(endpoint, path)
        self.base = self.serves = server.model
        self.longest, self.writer = server.longest, Writer(self.servers, server)
        self.processed = self._kind_of_logps()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        from safetensors.torch import save_file

        folder = self.folder / "weights"
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights}, folder / "new.tmp")
        os.replace(folder / "new.tmp", folder / "model.safetensors")  # vLLM may have the old file mapped
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._post("/reset_prefix_cache", {})

    def load_adapter(self, name: str, folder: Path) -> None:
        last = self.serves
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self.serves = name
        if last != self.base:
            self._post("/v1/unload_lora_adapter", {"lora_name": last})

    def start(self, prompts: Sequence[list[int]], fields: Sequence[dict[str, Any]]) -> Callable[[], list[Written]]:
        self.writer.server.model = self.serves
        return self.writer.start([{"prompt": ids, **each} for ids, each in zip(prompts, fields, strict=True)])

    def _kind_of_logps(self) -> bool | None:
        """Tell what `--logprobs-mode` the server was started with: see `Completions.processed`."""
        fields = {**request_fields(SamplingSettings(1), 0), "logit_bias": {0: 100.0}}
        logps = self.complete([[0]], [fields])[0].logps
        return None if logps is None else logps[0] > -1e-3  # processed, the bias leaves that token no other

    def _post(self, path: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        Attempt(self.servers, lambda endpoint: endpoint.request(path, data, "application/json")).result()


def _check_path(endpoint: Endpoint, path: str) -> None:
    """Refuse a server that was not started to take weights; an empty question is answered by 400 where it was."""
    needed = "VLLM_SERVER_DEV_MODE=1 in its environment"
    if path != "/collective_rpc":
        needed = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and `--enable-lora`"
    try:
        endpoint.request(path, b"{}", "application/json")
    except (Again, ServerError) as error:
        if getattr(error, "status", None) == 404:
            raise ConfigurationError(
                f"The rollout server {endpoint.url} takes no weights ({path} is not there). Start it with {needed}."
            ) from error


# ---- The proof -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave all random states as they were: vLLM seeds them for the whole process."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _probe_of(model: Any) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Return prompts and fields of a probe, whose text vLLM writes: what it says of it is what rollouts get.

    Not of given text (`prompt_logprobs`): with an adapter, vLLM 0.32 dies of that on a CPU.
    """
    prompts = models.probe(models.causal_lm_of(model))["input_ids"].tolist()
    fields = {**request_fields(SamplingSettings(_PROBE_TOKENS), 0), "ignore_eos": True}
    return prompts, [fields] * len(prompts)


def _logps_of(model: Any, prompts: list[list[int]], texts: list[list[int]]) -> Tensor:
    """What the student thinks of texts of one length, `[rows, tokens]`; all processes must ask where it is sharded."""
    ids = torch.tensor([[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)])
    sharded, inputs = models.must_stay_in_step(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = models.logits_of(model if sharded else models.unwrapped(model), inputs, sharded=sharded)
    logps = logits.log_softmax(-1).view(*ids.shape, -1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return logps[:, len(prompts[0]) - 1 :]


class VllmEngine(RolloutEngine):
    """vLLM, sent the student's weights before each call; each prompt has a seed of its own.

    So what is drawn for a prompt depends on its stream, the model and the settings, as with the local engines, but not
    by the same numbers.

    Args:
        engine: that answers this process.
        accelerator: of the processes that take part in a sync.
        vocab_rows: rows of the model's output embedding.
    """

    runs_the_model = False  # weights are gathered one after the other, and only for the sync

    def __init__(self, engine: Engine, accelerator: Any, options: VllmOptions, vocab_rows: int):
        self.engine, self.accelerator, self.options, self.vocab_rows = engine, accelerator, options, vocab_rows
        self.processed = engine.processed
        self._syncs = 0
        self._before: Read | None = None

    def generate(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> Completions:
        """Sample from `model`, in whatever wrappers it is; all processes call it.

        Raises:
            UnlikeModelError: what vLLM serves is not the student.
            RolloutServerError: the server refuses, or stays away.
        """
        return self.start(model, prompt_ids, prompt_mask, sampling, streams)()

    def start(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> Callable[[], Completions]:
        """Send the weights as they are now and do as `generate`, on a server in the background.

        Returns:
            what waits for it, and may be called again. The next `start` must come after it: it sends other weights.
        """
        prompts = unpadded(prompt_ids, prompt_mask)
        check_room(prompts, sampling, self.engine.longest, self.engine.where)
        self.sync(model)
        seeds = [stream.number % _SEEDS for stream in streams] if streams else [None] * len(prompts)
        fields = [request_fields(sampling, seed, self.vocab_rows) for seed in seeds]
        written = self.engine.start(prompts, fields)
        return lambda: completions_of(written(), sampling, self.engine.processed)

    def sync(self, model: Any) -> None:
        """Send the weights, and prove that they are served. One process that fails ends all, else they would wait."""
        self._syncs += 1
        with torch.no_grad():
            send = self._gathered(model)
        prompts, fields = _probe_of(model)

        def sent() -> tuple[list[Written], str]:
            if not self.engine.sends:
                return [], ""
            send()
            return self.engine.complete(prompts, fields), self.engine.serves

        told = self._together(sent)
        written, self.engine.serves = told[self.accelerator.process_index if self.engine.sends else 0]
        texts = [row.ids for row in written]
        own = _logps_of(model, prompts, texts)

        def prove() -> None:
            if self.engine.sends:
                now = Read(texts, torch.tensor([row.logps for row in written]), own)
                self._before = refuse_stale(now, self._before, self.options.tolerance, self._hint(model))

        self._together(prove)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Do it on each process, and return what all got, or raise what any raised."""
        outcome: Any = None
        try:
            outcome = work()
        except (UnlikeModelError, ServerError) as error:
            outcome = error
        outcomes = gather_object([outcome]) if self.accelerator.num_processes > 1 else [outcome]
        for other in outcomes:
            if isinstance(other, Exception):
                raise other
        return outcomes

    @property
    def _adapter_name(self) -> str:
        # A new one each time, also where another run was before: what is cached of another is not taken for its own.
        return f"{self.engine.folder.name}-{self._syncs}"

    def _sends_adapter(self, model: Any) -> bool:
        return self.options.lora == "adapter" and models.is_peft(models.unwrapped(model))

    def _gathered(self, model: Any) -> Callable[[], None]:
        """Return what sends the weights, which are gathered by now where that takes all processes."""
        engine, whole = self.engine, models.unwrapped(model)
        if self._sends_adapter(model):
            return self._adapter(whole)
        if models.is_peft(whole):
            with models.whole_parameters(*whole.parameters()):
                merged = models.merged_copy(whole) if engine.sends else None
            return lambda: engine.load(models.checkpoint_tensors(merged, engine.untied_head)) if engine.sends else None
        if isinstance(engine, Colocated):  # each process has one, and so reads each weight as it is gathered
            return lambda: engine.load(models.checkpoint_tensors(whole, engine.untied_head))
        state = {}
        for name, tensor in models.checkpoint_tensors(whole):
            if engine.sends:
                state[name] = tensor.to("cpu", copy=True)
        return lambda: engine.load(state.items()) if engine.sends else None

    def _adapter(self, model: Any) -> Callable[[], None]:
        state = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with models.whole_parameters(parameter):
                    state[name] = models.whole(parameter.detach()).to("cpu", copy=True)

        def send() -> None:
            if not self.engine.sends:
                return
            folder = self.engine.folder / self._adapter_name
            model.save_pretrained(folder, state_dict=state)
            self.engine.load_adapter(self._adapter_name, folder)
            shutil.rmtree(self.engine.folder / f"{self.engine.folder.name}-{self._syncs - 1}", ignore_errors=True)

        return send

    def _hint(self, model: Any) -> str:
        tied = models.causal_lm_of(model).config.get_text_config().tie_word_embeddings
        if isinstance(self.engine, Served) and tied:
            return "On a CPU, vLLM's server cannot reload a head that is tied to the embedding: see docs/rollouts.md."
        return ""


def build_vllm(
    model: Any, accelerator: Any, tokenizer: Any, max_length: int | None, batch_size: int | None, given: Any
) -> VllmEngine:
    """Start vLLM in this process, or connect to its server (see `build_engine`)."""
    options, arguments = split_options(given)
    engine: Engine
    if options.mode == "server":
        lora = options.lora == "adapter" and models.is_peft(model)
        engine = Served(tokenizer, accelerator.process_index == 0, lora, options)
    else:
        source = models.source_of(models.causal_lm_of(model))
        if not source:
            raise ConfigurationError(
                "vLLM loads the student by its folder or Hub id, but the model was made in memory and has none. Save "
                "it with `save_pretrained` and pass the folder, or take `rollout_engine: decode`."
            )
        sizes = {"max_model_len": max_length, "max_num_seqs": batch_size}
        arguments = {name: value for name, value in sizes.items() if value is not None} | arguments
        engine = Colocated(source, model, tokenizer, accelerator.num_processes, options, arguments)
    least = max(max_length or 0, _PROBE_ROOM)
    if engine.longest is not None and engine.longest < least:
        raise ConfigurationError(
            f"Got `max_length: {max_length}`, but {engine.where} takes {engine.longest} tokens; expected at least "
            f"{least}. Raise its `max_model_len`, or lower `max_length`."
        )
    return VllmEngine(engine, accelerator, options, models.logit_rows(model))
