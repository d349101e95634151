"""A teacher that runs in this process: any Hugging Face causal LM, whole or sharded with the student."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import models
from ..exceptions import ConfigurationError
from ..signals import HiddenStates, Logits, TeacherSignal
from .base import Teacher

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


class LocalTeacher(Teacher):
    """A causal LM, frozen and in eval mode, kept in its own dtype.

    It answers with last hidden states and its head: exact, and `V / D` times smaller than logits. A model whose
    logits cannot be rebuilt from those (found out on the first batch) answers with logits instead.

    Args:
        model: whole, or partitioned as it was loaded.
        name: for logs and the model card.
        placement: where `prepare` puts its weights: a key of `placement.PLACEMENTS` for teachers with a body.
    """

    provides = frozenset({"distribution", "completions"})

    def __init__(self, model: nn.Module, name: str | None = None, placement: str = "auto"):
        if models.causal_lm_of(model).config.is_encoder_decoder:
            raise ConfigurationError(f"The teacher {type(model).__name__} is an encoder-decoder; expected a causal LM.")
        self.placement = placement
        self.name = name or models.source_of(model) or type(model).__name__
        self._fingerprint = weights_fingerprint(model)  # while the weights are whole
        self.model = models.install_token_forward(model)
        self.model.requires_grad_(False)
        self.model.eval()
        self._fused: bool | None = None

    @property
    def config(self) -> Any:
        """The causal LM's configuration."""
        return models.causal_lm_of(self.model).config

    def prepare(self, accelerator: Accelerator) -> None:
        self.model = models.prepare_frozen(self.model, accelerator, self.placement)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it, its body says what the teacher says."""
        yield

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        self.model.eval()
        if self._fused is None:
            self._fused = models.head_is_fusable(self.model) and models.head_reproduces_logits(self.model, inputs)
        if not self._fused:
            logits = self.model(**inputs).logits[:, :-1][predicts]
            return Logits(logits[:, :vocab_size])
        hidden = self.model(**inputs, on_hidden=lambda hidden, head: hidden[:, :-1][predicts])
        return self.signal_of(hidden, vocab_size)

    def signal_of(self, hidden: Tensor, vocab_size: int | None) -> HiddenStates:
        """What it says where its last hidden states are `hidden` `[N, D]`."""
        return HiddenStates(hidden, models.read_head(models.causal_lm_of(self.model)).cut_to(vocab_size))

    @contextlib.contextmanager
    def whole_head(self, signal: TeacherSignal) -> Iterator[TeacherSignal]:
        if not isinstance(signal, HiddenStates):
            yield signal
            return
        head = signal.head
        with models.whole_parameters(head.weight, head.bias):  # ZeRO-3 fills the parameters in place
            weight = models.whole(head.weight.detach())  # FSDP2 returns new tensors
            bias = None if head.bias is None else models.whole(head.bias.detach())
            yield dataclasses.replace(signal, head=dataclasses.replace(head, weight=weight, bias=bias))

    def fingerprint(self) -> str:
        return self._fingerprint

    def eos_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens that end its completions."""
        return models.eos_ids(self.model, tokenizer)


def weights_fingerprint(model: nn.Module, leave_out: Collection[str] = (), *, with_config: bool = True) -> str:
    """A hash of the configuration and of a few values of every parameter: milliseconds, yet any training changes it.

    Parameters that have one of `leave_out` between the dots of their name do not count, nor, unless `with_config`, does
    the configuration, which changes with the version of transformers.
    """
    digest = hashlib.sha256()
    if with_config:
        digest.update(models.causal_lm_of(model).config.to_json_string(use_diff=False).encode())
    for name, parameter in model.named_parameters():
        if any(part in leave_out for part in name.split(".")):
            continue
        digest.update(f"{name}{tuple(getattr(parameter, 'ds_shape', parameter.shape))}".encode())
        with models.whole_parameters(parameter):  # ZeRO-3 and FSDP2 partition a model as it is loaded
            if parameter.numel() and parameter.device.type != "meta":
                flat = models.whole(parameter.detach()).reshape(-1)
                some = flat[:: max(1, flat.numel() // 64)][:64]
                digest.update(some.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class DeferredTeacher(LocalTeacher):
    """Everything that a `LocalTeacher` is, for runs that have most of its answers already.

    Args:
        load: gives the model; called at the first question, and again after `release`.
        config: of the model, known without its weights.
        name: for logs and the model card.
        placement: as of `LocalTeacher`.
    """

    def __init__(self, load: Callable[[], nn.Module], config: Any, name: str, placement: str = "auto"):
        self.name = name
        self.placement = placement
        self._config = config
        self._load = load
        self._live: LocalTeacher | None = None
        self._accelerator: Accelerator | None = None
        self._fused: bool | None = None

    @property
    def config(self) -> Any:
        return self._config

    @property
    def is_live(self) -> bool:
        """Whether the model is in memory."""
        return self._live is not None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read only
        return self._whole().model

    def _whole(self) -> LocalTeacher:
        if self._live is None:
            logger.info("Loading the teacher %s.", self.name)
            self._live = LocalTeacher(self._load(), self.name, self.placement)
            if self._accelerator is not None:
                self._live.prepare(self._accelerator)
        return self._live

    def prepare(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        if self._live is not None:
            self._live.prepare(accelerator)

    def release(self) -> None:
        """Let the model go until it is asked again."""
        self._live = None

    def fingerprint(self) -> str:
        return self._whole().fingerprint()


class AdapterOff(LocalTeacher):
    """A PEFT student with its adapter switched off: the base model, or with another adapter on it.

    Args:
        student: gives the student in its wrappers as they are now.
        adapter: of the student's adapters, the one to answer with; None for the base alone.
    """

    def __init__(self, student: Callable[[], nn.Module], adapter: str | None = None):
        self.name = f"the student with the adapter {adapter}" if adapter else "the student without its adapter"
        self.adapter = adapter
        self.placement = "adapter_off"
        self._student = student
        self._fingerprint = base_fingerprint(student(), adapter)
        self._fused: bool | None = None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read only
        return self._student()

    def prepare(self, accelerator: Any) -> None:
        """The student is prepared by its trainer."""

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        with self.answering():
            return super().signal(inputs, predicts, vocab_size)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        wrapped = self.model
        training = wrapped.training
        try:
            with models.answering_with(wrapped, self.adapter):
                yield
        finally:
            wrapped.train(training)


def base_fingerprint(student: nn.Module, adapter: str | None = None, **how: Any) -> str:
    """`weights_fingerprint` without adapters, whose weights start at random, but for `adapter`."""
    if not models.is_peft(student):
        return weights_fingerprint(student, **how)
    adapters: Any = models.unwrapped(student).peft_config
    return weights_fingerprint(student, leave_out=frozenset(adapters) - {adapter}, **how)


def reference_fingerprint(student: nn.Module) -> str:
    """What tells the weights that a student, not yet trained, is the reference by: an adapter's if they do anything."""
    known_by = base_fingerprint if adapter_is_neutral(student) else weights_fingerprint
    return known_by(student, with_config=False)


def adapter_is_neutral(student: nn.Module) -> bool:
    """Whether a LoRA student's adapter still changes nothing, as a newly added one does (its B is 0)."""
    second = [p for name, p in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    with models.whole_parameters(*second):
        return bool(second) and not any(bool(p.detach().any()) for p in second)
