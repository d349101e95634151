"""The models of an evaluation: known by their files, loaded when a result is missing, let go when they are done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..exceptions import ConfigurationError, VocabularyError
from ..storage import write_file
from ..teachers import DeferredTeacher, LocalTeacher, shared_vocabulary
from ..teachers.cache.identity import answering_settings, describe_source
from ..teachers.local import weights_fingerprint

ROLES = ("teacher", "baseline", "student")


@dataclass(frozen=True)
class Facts:
    """What only a loaded model tells; remembered, so that a finished evaluation loads none."""

    fingerprint: str
    end_ids: list[int]  # of the model's own generation config


class KnownModels:
    """Facts of models by what their files tell, in `models.json` of a folder; without one, in memory."""

    def __init__(self, folder: Path | None):
        self.file = None if folder is None else folder / "models.json"
        self._known: dict[str, Any] = {}
        if self.file is not None and self.file.is_file():
            with contextlib.suppress(json.JSONDecodeError):  # half-written: asked again
                self._known = json.loads(self.file.read_text(encoding="utf-8"))

    def get(self, stamp: str | None) -> Facts | None:
        return Facts(**self._known[stamp]) if stamp in self._known else None

    def add(self, stamp: str | None, facts: Facts) -> None:
        if stamp is None or self.file is None:
            return
        self._known[stamp] = asdict(facts)
        text = json.dumps(self._known, indent=1)
        write_file(self.file, text, "what models are known", "Free some space and start again.")


class Subject:
    """One model of an evaluation.

    Args:
        source: a folder (also of an adapter, which is merged) or Hub id, or a model in memory.
        loads: counts how often weights were loaded.

    Raises:
        ConfigurationError: the model is not there, or is no causal LM. No weights are loaded yet.
    """

    def __init__(
        self,
        name: str,
        role: str,
        source: str | nn.Module,
        *,
        init_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        known: KnownModels | None = None,
    ):
        self.name, self.role, self._source = name, role, source
        self._kwargs = models.settled_kwargs(init_kwargs, f"the {role}'s init kwargs")
        self.device = device or torch.device("cpu")
        self._known = known or KnownModels(None)
        self._facts: Facts | None = None
        self.loads = 0
        if isinstance(source, str):
            self.config = self._read_config(source)
            self.model: LocalTeacher = DeferredTeacher(self._load, self.config, source)
        else:
            self.config = models.causal_lm_of(source).config
            self._refuse_encoder_decoder()
            trained, self._was_training = [p for p in source.parameters() if p.requires_grad], source.training
            self.model = LocalTeacher(source, name)
            for parameter in trained:  # it is only read here, and may go on training
                parameter.requires_grad_(True)
            self.device = next(source.parameters()).device
            models.check_answers(source, self._who)
        self._refuse_encoder_decoder()

    # ---- Before anything is loaded ----------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """Where it came from, without paths of this machine."""
        name = self._source if isinstance(self._source, str) else models.source_of(self._source)
        if not name:
            return type(self._source).__name__
        return Path(os.path.expanduser(name)).resolve().name if models.looks_like_path(name) else name

    @property
    def path(self) -> str | None:
        """Folder or Hub id; None of a model in memory."""
        return self._source if isinstance(self._source, str) else None

    @property
    def _who(self) -> str:
        return f"The {self.role} {self.name!r}"

    @property
    def rows(self) -> int:
        """Rows of its head."""
        return self.config.get_text_config().vocab_size

    def tokenizer(self) -> Any:
        """Return the tokenizer that lies beside it, or None."""
        name = self._source if isinstance(self._source, str) else models.source_of(self._source)
        for place in (name, _adapted_base(name) if name else None):
            if place:
                try:
                    return models.load_tokenizer(place, **self._files(place))
                except ConfigurationError:  # it is there, and is damaged
                    raise
                except (OSError, ValueError):
                    continue
        return None

    @property
    def _trusted(self) -> bool:
        return bool(self._kwargs.get("trust_remote_code"))

    def _read_config(self, source: str) -> Any:
        base = _adapted_base(source)
        return models.load_config(base or source, self.role, **self._files(base or source))

    def _files(self, place: str) -> dict[str, Any]:
        """What says which files are read: a revision is that of the source, not of an adapter's base."""
        return models.which_files(self._kwargs if place == self._source else {}, self._trusted)

    def _refuse_encoder_decoder(self) -> None:
        if getattr(self.config, "is_encoder_decoder", False):
            raise ConfigurationError(
                f"The {self.role} {self.name!r} is an encoder-decoder ({self.config.model_type}), which this "
                "evaluation cannot read; expected a causal LM. Method rationale reports the accuracy of such students."
            )

    def _stamp(self) -> str | None:
        """Identifies files and how they are loaded; None of a model in memory, or of a Hub copy without a commit."""
        if not isinstance(self._source, str):
            return None
        try:
            files = describe_source(self._source)
        except ConfigurationError:
            return None
        told = json.dumps([files, answering_settings(self._kwargs)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    # ---- Loaded when it has to be -----------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        if self._facts is None:
            stamp = self._stamp()
            self._facts = self._known.get(stamp)
            if self._facts is None:
                self._facts = Facts(weights_fingerprint(self.model.model), models.generation_eos_ids(self.model.model))
                self._known.add(stamp, self._facts)
        return self._facts

    @contextlib.contextmanager
    def generating(self) -> Iterator[Any]:
        """Yield the model, ready to generate; it is loaded only now."""
        model = self.model.model.eval()
        with torch.no_grad(), models.without_router_logits(model):
            yield models.unwrapped(model)

    def release(self) -> None:
        """Let weights go that were loaded by it; a model that the caller passed stays as it came."""
        self.model.release()
        if not isinstance(self._source, str):
            self.model.model.train(self._was_training)

    def end_ids(self, tokenizer: Any) -> list[int]:
        """Return the tokens that end its completions."""
        of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return list(dict.fromkeys(of_tokenizer + self.facts.end_ids))

    def _load(self) -> nn.Module:
        assert isinstance(self._source, str)
        self.loads += 1
        load = models.load_merged_adapter if _adapted_base(self._source) else models.load_causal_lm
        model = load(self._source, role=self.role, **{"dtype": "auto", **self._kwargs})
        model = model if getattr(model, "hf_device_map", None) else model.to(self.device)
        models.check_answers(model, self._who)
        return model


def _adapted_base(name: str) -> str | None:
    """The base model of a folder that holds an adapter alone."""
    folder = Path(os.path.expanduser(name))
    file = folder / "adapter_config.json"
    if os.path.isfile(folder / "config.json") or not os.path.isfile(file):
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"The adapter's config {str(file)!r} cannot be read: {error}. Make it anew."
        ) from error


def reference_tokenizer(subjects: Sequence[Subject], tokenizer: Any = None) -> tuple[Any, int | None]:
    """Return the tokenizer that reads the data, and the number of ids in the softmax of all models (None for all rows).

    Args:
        tokenizer: of the caller; by default that of the teacher, else of the first model that has one.

    Raises:
        ConfigurationError: no model has a tokenizer beside it.
        VocabularyError: two models do not mean the same token by the same id. Before weights are loaded.
    """
    tokenizers = {subject.name: subject.tokenizer() for subject in subjects}
    reference = tokenizer or next((beside for beside in tokenizers.values() if beside is not None), None)
    if reference is None:
        raise ConfigurationError(
            f"None of the models {list(tokenizers)} has a tokenizer beside it. Save one into a model's folder "
            "(`tokenizer.save_pretrained(folder)`), or pass `tokenizer=…`."
        )
    reference = models.with_pad_token(reference)
    first, sizes = subjects[0], []
    for subject in subjects:
        other = tokenizers[subject.name] or (reference if tokenizer is not None else None)
        try:
            sizes.append(shared_vocabulary(reference, other, first.rows, subject.rows))
        except VocabularyError as error:
            raise VocabularyError(f"{first.name!r} and {subject.name!r} cannot be compared. {error}") from error
    known = [size for size in sizes if size is not None]
    return reference, min(known) if known else None


def rendering_tokenizers(subjects: Sequence[Subject], reference: Any, *, is_given: bool) -> tuple[Any, Any]:
    """Return the tokenizers whose chat templates render what all models are asked, and what a teacher alone is.

    Both are asked as in training: by the template of the (first) student, and a teacher with a prompt of its own by
    its own template.

    Args:
        reference: of all models (`reference_tokenizer`); stands in for a student's without a template.
        is_given: the caller has chosen it, for the data too.

    Returns:
        the second is None where the teacher has no template.
    """

    def of(role: str) -> Any:
        beside = (subject.tokenizer() for subject in subjects if subject.role == role)
        return next((tokenizer for tokenizer in beside if getattr(tokenizer, "chat_template", None)), None)

    return (reference if is_given else of("student") or reference), of("teacher")


def one_process_only() -> None:
    """Refuse a launch of several processes, which would all do the same work.

    Raises:
        ConfigurationError: how many there are.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world > 1:
        raise ConfigurationError(
            f"Got {world} processes; evaluation of finished models runs in one. Start `distill-trainers evaluate` "
            "without `accelerate launch`; `model_init_kwargs: {device_map: auto}` spreads a large model over devices."
        )
