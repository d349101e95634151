"""A teacher that runs in this process: any Hugging Face causal LM, whole or sharded with the student."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import models
from ..exceptions import ConfigurationError
from ..requirements import Requirements
from ..signals import HiddenStates, Logits, TeacherSignal
from .base import Pair, Teacher
from .placement import PLACEMENTS, is_collective
from .vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from .options import TeacherOptions


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
    has_files = can_generate = can_read_rollouts = keeps_logps = True
    shows_layers: ClassVar[bool] = True
    _rows_stay_apart = False  # whether that was looked at
    _is_looked_at = True  # whether its answers are, before the first is used

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        placement = PLACEMENTS[options.teacher_placement]
        if placement.by_name:
            _refuse_in_memory(pair.teacher, options)
        if options.teacher_placement not in ("auto", "device_map"):
            _refuse_other_placers(options)
        if options.teacher_model_init_kwargs and isinstance(pair.teacher, nn.Module):
            raise ConfigurationError(
                "`teacher_model_init_kwargs` act while a teacher is loaded by name, but `teacher_model` is already "
                f"a {type(pair.teacher).__name__}. Pass its name, or leave them out."
            )
        super().refuse(pair, options, wants)

    @classmethod
    def loaded(
        cls, pair: Pair, options: TeacherOptions, student: Callable[[], nn.Module] | None = None
    ) -> LocalTeacher:
        source, placement = pair.teacher, options.teacher_placement
        if not isinstance(source, str):
            return LocalTeacher(source, placement=placement)
        given: Any = options.teacher_model_init_kwargs or {}
        settings: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, **given}

        def load() -> nn.Module:
            with models.loading_placed(source, placement, options.device, settings) as placed:
                return models.load_causal_lm(source, role="teacher", **placed)

        if options.defers_teacher:
            config = models.load_config(source, "teacher", **options.files_of("teacher"))
            return DeferredTeacher(load, config, source, placement)
        return LocalTeacher(load(), source, placement)

    def __init__(self, model: nn.Module, name: str | None = None, placement: str = "auto"):
        if models.causal_lm_of(model).config.is_encoder_decoder:
            raise ConfigurationError(f"The teacher {type(model).__name__} is an encoder-decoder; expected a causal LM.")
        self.placement = placement
        self.name = name or models.source_of(model) or type(model).__name__
        model = models.compiled_by_layer(model)
        self._fingerprint = weights_fingerprint(model)  # while the weights are whole
        self.model = models.install_token_forward(model)
        self.model.requires_grad_(False)
        self.model.eval()
        self._fused: bool | None = None
        self._shared_by: Accelerator | None = None

    @property
    def config(self) -> Any:
        """The causal LM's configuration."""
        return models.causal_lm_of(self.model).config

    def prepare(self, accelerator: Accelerator) -> None:
        self._shared_by = accelerator
        self.model = models.prepare_frozen(self.model, accelerator, self.placement)

    @property
    def is_collective(self) -> bool:
        launch = self._shared_by
        if launch is None or launch.num_processes == 1:
            return False
        return is_collective(self.placement, models.zero_stage(launch), models.fsdp_version(launch))

    def live(self) -> LocalTeacher:
        return self

    @contextlib.contextmanager
    def generating(self, accelerator: Accelerator) -> Iterator[Any]:
        layer_by_layer = self.placement in ("zero3", "zero3_offload")  # asked for by name: it is never whole
        gather, who = not layer_by_layer, self._who if self._is_looked_at else None
        with self.answering(), models.generating(self.model, accelerator, gather, who) as model:
            yield model

    @property
    def _who(self) -> str:
        return f"The teacher {self.name!r}"

    def shared_ids(self, tokenizer: Any, student_rows: int, teacher_tokenizer: Any = None) -> int | None:
        return shared_vocabulary(tokenizer, teacher_tokenizer, student_rows, self.config.get_text_config().vocab_size)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Let its body, within it, say what the teacher says."""
        yield

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        self.model.eval()  # it may be the student, in training mode
        models.refuse_extras(self.model, inputs, "the teacher")
        if self._is_looked_at:
            models.check_answers(self.model, self._who)
        if models.is_packed(inputs) and not self._rows_stay_apart:
            models.check_rows_stay_apart(self.model, predicts.device, "the teacher")
            self._rows_stay_apart = True
        if self._fused is None:
            self._fused = models.head_is_fusable(self.model) and models.head_reproduces_logits(self.model, inputs)
        if not self._fused:
            logits = models.output_of(self.model, inputs).logits[:, :-1][predicts]
            return Logits(logits[:, :vocab_size])
        hidden = self.model(**inputs, on_hidden=lambda hidden, head: hidden[:, :-1][predicts])
        return self.signal_of(hidden, vocab_size)

    def signal_of(self, hidden: Tensor, vocab_size: int | None) -> HiddenStates:
        """Return what it says where its last hidden states are `hidden` `[N, D]`."""
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
        """Return the tokens that end its completions."""
        return models.eos_ids(self.model, tokenizer)


def weights_fingerprint(model: nn.Module, leave_out: Collection[str] = (), *, with_config: bool = True) -> str:
    """Hash the configuration and a few values of every parameter: milliseconds, yet any training changes it.

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
                sample = flat[:: max(1, flat.numel() // 64)][:64]
                digest.update(sample.to(torch.float32).cpu().numpy().tobytes())
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
        self._shared_by: Accelerator | None = None

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
        self._accelerator = self._shared_by = accelerator
        if self._live is not None:
            self._live.prepare(accelerator)

    def release(self) -> None:
        """Let the model go until it is asked again."""
        self._live = None

    def fingerprint(self) -> str:
        return self._whole().fingerprint()


def base_fingerprint(student: nn.Module, adapter: str | None = None, *, with_config: bool = True) -> str:
    """Return `weights_fingerprint` without adapters, whose weights start at random, but for `adapter`."""
    if not models.is_peft(student):
        return weights_fingerprint(student, with_config=with_config)
    adapters: Any = models.unwrapped(student).peft_config
    return weights_fingerprint(student, leave_out=frozenset(adapters) - {adapter}, with_config=with_config)


def reference_fingerprint(student: nn.Module) -> str:
    """Identify the weights of an untrained student as the reference: its adapter's too if they do anything."""
    known_by = base_fingerprint if adapter_is_neutral(student) else weights_fingerprint
    return known_by(student, with_config=False)


def adapter_is_neutral(student: nn.Module) -> bool:
    """Tell whether a LoRA student's adapter still changes nothing, as a new one does (its B is 0)."""
    second = [p for name, p in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    with models.whole_parameters(*second):
        return bool(second) and not any(bool(p.detach().any()) for p in second)


def trained_outside_adapters(student: nn.Module) -> list[str]:
    """Name what a PEFT student trains of its base, such as biases (`bias: all`): it moves with the adapter off too."""
    adapters = set(models.unwrapped(student).peft_config)  # type: ignore[arg-type]
    return [name for name, p in student.named_parameters() if p.requires_grad and not adapters & set(name.split("."))]


def is_initial_without_adapter(student: nn.Module) -> bool:
    """Tell whether switching the adapter off gives the student before training, now and later."""
    return adapter_is_neutral(student) and not trained_outside_adapters(student)


def _refuse_in_memory(teacher: Any, options: TeacherOptions) -> None:
    placement = options.teacher_placement
    settings: Mapping[str, Any] = options.teacher_model_init_kwargs or {}  # type: ignore[assignment]  # parsed by now
    if teacher is not None and not isinstance(teacher, str):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with a {type(teacher).__name__} in memory; expected a folder or Hub "
            "id, since it acts while weights are loaded. Pass the teacher by name."
        )
    if placement == "device_map" and options.world_size > 1 and not isinstance(settings.get("device_map"), Mapping):
        raise ConfigurationError(
            f"Got `teacher_placement: device_map` in a launch of {options.world_size} processes, each of which would "
            "spread a teacher of its own over all devices. Start one process, name the devices "
            '(`teacher_model_init_kwargs: {device_map: {"": 0}}`), or take `zero3` or `fsdp2`.'
        )


def _refuse_other_placers(options: TeacherOptions) -> None:
    both = sorted({"device_map", "quantization_config"} & (options.teacher_model_init_kwargs or {}).keys())  # type: ignore[union-attr]  # parsed by now
    if both:
        raise ConfigurationError(
            f"Got `teacher_placement: {options.teacher_placement}` and `{both[0]}` in `teacher_model_init_kwargs`, "
            "which both say how the teacher is loaded. Leave one of them out."
        )
