"""What a frozen reference says about the tokens of given rows: asked as they come, or kept on disk and read."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ... import models
from ...data import DistillCollator
from ...data.pairs import rows_of_pair
from ...data.views import teacher_inputs, viewed_row
from ...exceptions import ConfigurationError
from ...losses.reduction import trained_mask
from ...teachers import LocalTeacher, Teacher
from ...teachers.cache.identity import CacheIdentity
from ...teachers.cache.opening import config_of, record_identity, source_of, whose_answers
from ...teachers.cache.shards import TeacherCache
from ...teachers.local import base_fingerprint, is_initial_without_adapter
from ...teachers.placement import is_collective
from ...teachers.rows import batch_keys, dataset_row_key
from ...teachers.self_teacher import AdapterOff
from ..protocol import Run
from ..student import load_student
from .config import DPKDConfig

_FLUSH_SECONDS = 30.0  # what a killed run may lose


class PreferenceRun(Run, Protocol):
    """A run with the settings of preferences."""

    @property
    def args(self) -> DPKDConfig: ...


class ReferenceLogps:
    """Log-probabilities of a frozen model for the trained tokens of batches.

    Rows are found by their content, so shuffling, further epochs and other processes find them again; what a store does
    not hold is asked of the model and, for rows of a dataset, kept.

    Args:
        load: gives the reference, ready to answer; called when it is first needed.
        store: where answers are kept; None asks every time.
    """

    def __init__(self, run: PreferenceRun, load: Callable[[], Teacher], store: TeacherCache | None = None):
        self.run = run
        self.store = store
        self._load = load
        self._model: Teacher | None = None
        self._last_flush = time.monotonic()

    @property
    def model(self) -> Teacher:
        """The reference itself."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @torch.no_grad()
    def of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return `[B, T]`: log-probability of each trained token, 0 elsewhere."""
        predicts = trained_mask(batch["labels"])
        keys = batch_keys(*self._read(batch, predicts)) if self.store is not None else []
        rows = self._known(keys)
        missing = [key for key in keys if key is not None and key not in rows]
        if self.store is None or self._all_ask(bool(missing)):
            values = self._ask(batch, predicts)
            for number, key in enumerate(keys):
                if key in missing:
                    self._keep(key, values[number][predicts[number]])
        else:
            known = [rows[key]["logps"] for key in keys if key is not None]
            logps = torch.cat(known).to(predicts.device) if known else torch.zeros(0, device=predicts.device)
            values = torch.zeros(predicts.shape, dtype=logps.dtype, device=logps.device).masked_scatter(predicts, logps)
        return torch.nn.functional.pad(values, (1, 0))

    @property
    def _is_teacher(self) -> bool:
        return self.run.args.reference == "teacher"

    def _read(self, batch: Mapping[str, Tensor], predicts: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """What the reference reads: the teacher's own view, if it is the teacher."""
        return teacher_inputs(batch, predicts) if self._is_teacher else (batch, predicts)

    def _ask(self, batch: Mapping[str, Tensor], predicts: Tensor) -> Tensor:
        logps, _ = self.run.two_models.frozen_logps(self.model, batch)
        return torch.zeros(predicts.shape, dtype=logps.dtype, device=logps.device).masked_scatter(predicts, logps)

    # ---- On disk ----------------------------------------------------------------------------------------------------

    def _known(self, keys: Iterable[bytes | None]) -> dict[bytes | None, dict[str, Tensor]]:
        if self.store is None:
            return {}
        rows = {key: self.store.read(key) for key in set(keys) if key is not None and key in self.store}
        return {key: row for key, row in rows.items() if row is not None}

    def _keep(self, key: bytes | None, logps: Tensor) -> None:
        assert self.store is not None and key is not None
        self.store.add(key, {"logps": logps}, len(logps))
        if time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write out what has been learnt."""
        self._last_flush = time.monotonic()
        if self.store is not None:
            self.store.flush()

    def release(self) -> None:
        """Let a teacher that can be loaded again go; one that is sharded stays, since all processes run it."""
        if self.store is not None and not self._collective:
            self.run.teacher.release()

    @property
    def _collective(self) -> bool:
        accelerator, args = self.run.accelerator, self.run.args
        placement = args.teacher_placement if self._is_teacher else "auto"  # the student lies as launched
        sharded = is_collective(placement, models.zero_stage(accelerator), models.fsdp_version(accelerator))
        return accelerator.num_processes > 1 and sharded

    def _all_ask(self, need: bool) -> bool:
        """Whether the reference is asked: by whoever needs it, or by all processes where it is sharded."""
        if not self._collective:
            return need
        votes = torch.tensor(float(need), device=self.run.args.device)
        return bool(self.run.accelerator.reduce(votes, reduction="sum").item())

    def fill(self, pairs: Any) -> int:
        """Ask for all rows of tokenised pairs that the store lacks; return how many there were.

        Each batch is kept as it comes: a killed run goes on where it was. Processes share the work.
        """
        if self.store is None or not hasattr(pairs, "__len__"):
            return 0
        run, accelerator = self.run, self.run.accelerator
        accelerator.wait_for_everyone()
        self.store.refresh()
        todo: dict[bytes, dict[str, Any]] = {}
        for row in itertools.chain.from_iterable(map(rows_of_pair, pairs)):
            key, count = dataset_row_key(viewed_row(row) if self._is_teacher else row)
            if count and key not in self.store:
                todo[key] = row
        accelerator.wait_for_everyone()  # nobody writes before all know what is missing
        size = run.args.per_device_eval_batch_size
        rows = sorted(todo.values(), key=lambda row: -len(row["input_ids"]))
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        world, rank = accelerator.num_processes, accelerator.process_index
        collate = DistillCollator(run.processing_class.pad_token_id)
        for turn in tqdm(range(-(-len(batches) // world)), desc="Reference log-probabilities", disable=rank != 0):
            number = min(turn * world + rank, len(batches) - 1)
            self.of({name: entry.to(run.args.device) for name, entry in collate(batches[number]).items()})
        self.flush()
        accelerator.wait_for_everyone()
        self.store.refresh()
        return len(todo)


class ReferenceKeeper(TrainerCallback):
    """Writes out what a reference was asked wherever a run may end or go on from, and lets its model go."""

    def __init__(self, references: ReferenceLogps):
        self.references = references

    def _flush(self, *args: Any, **kwargs: Any) -> None:
        self.references.flush()

    def _flush_and_release(self, *args: Any, **kwargs: Any) -> None:
        self.references.flush()
        self.references.release()

    on_epoch_end = on_save = on_train_end = _flush
    on_train_begin = on_evaluate = _flush_and_release


# ---- Which model is the reference -----------------------------------------------------------------------------------


def initial_student(run: Run, source: Any, quantization_config: Any) -> Callable[[], LocalTeacher]:
    """Return how to get the initial student: itself without a new adapter, its folder again, or a frozen copy.

    A copy too where biases of the base train beside the adapter: without it, it would not be as it was.

    Raises:
        ConfigurationError: its weights are sharded already, and it has no name to be loaded by.
    """
    student, args = run.model, run.args
    if models.is_peft(student) and is_initial_without_adapter(student):
        reference = AdapterOff(lambda: run.model_wrapped)
        return lambda: reference
    if isinstance(source, str) and not models.is_peft(student):

        def load() -> LocalTeacher:
            loaded = LocalTeacher(load_student(source, args, None, quantization_config), name=source)
            loaded.prepare(run.accelerator)
            return loaded

        return load
    if any(hasattr(parameter, "ds_id") for parameter in student.parameters()):
        raise ConfigurationError(
            "Got `reference: student` with a student whose weights ZeRO-3 has partitioned already, so they cannot be "
            "copied. Pass the student by name, or train a new adapter (`peft_config`)."
        )
    frozen = LocalTeacher(models.unquantized(copy.deepcopy(student)), name="the student before training")
    frozen.prepare(run.accelerator)
    return lambda: frozen


def source_fingerprint(source: Any) -> str | None:
    """Identify the student's weights before an adapter is added; None for one given by name."""
    return None if isinstance(source, str) else base_fingerprint(source)


def open_store(run: PreferenceRun, folder: str, source: Any, weights: str | None) -> TeacherCache:
    """Open the store of a reference's log-probabilities; make it if it is missing.

    Args:
        source: the reference: a name, or a model.
        weights: its fingerprint where it was given as a model.

    Raises:
        ConfigurationError: the folder was made with another reference, tokenizer, vocabulary or precision.
        CacheError: it cannot be read or made.
    """
    args = run.args
    teacher_is_it = source is not None and weights is None
    settings: Any = (args.teacher_model_init_kwargs if teacher_is_it else args.model_init_kwargs) or {}
    rows = config_of(source, args, "teacher" if teacher_is_it else "student").get_text_config().vocab_size
    identity = CacheIdentity(
        kind="logps",
        vocab_size=rows if run.vocab_size is None else run.vocab_size,
        teacher_rows=rows,
        weights=weights,
        **whose_answers(source, settings, run.processing_class, args),
    )
    return TeacherCache(folder, record_identity(folder, identity, args, "reference_logps_dir").stamp())


def reference_of(
    run: PreferenceRun, student: Any, teacher: Any, fingerprint: str | None, quantization_config: Any
) -> ReferenceLogps | None:
    """Return the reference that a run's config names; None where the teacher's own signal is enough.

    Args:
        student, teacher: as the run was given them.
        fingerprint: of a student in memory, before it got an adapter.
    """
    args = run.args
    if args.reference == "teacher" and args.reference_logps_dir is None:
        return None
    if args.reference == "teacher":
        source = run.model if args.teacher_placement == "adapter_off" else source_of(teacher)
        weights = None if isinstance(source, str) else run.teacher.fingerprint()
        load: Callable[[], Teacher] = partial(getattr, run, "teacher")
    else:
        source, weights = student, fingerprint
        load = initial_student(run, student, quantization_config)
    store = None if args.reference_logps_dir is None else open_store(run, args.reference_logps_dir, source, weights)
    return ReferenceLogps(run, load, store)
