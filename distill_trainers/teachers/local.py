"""A teacher that runs in this process: any Hugging Face causal LM, whole or sharded with the student."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import models
from ..exceptions import ConfigurationError
from ..signals import HiddenStates, Logits, TeacherSignal
from .base import Teacher

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
