"""A teacher that answers from disk, and asks a live one only for rows that are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import models
from ...data.token_bytes import TokenBytes
from ...exceptions import CacheError, ConfigurationError
from ...requirements import Requirements
from ...settings import shown
from ...signals import Head, HiddenStates, TeacherSignal
from ..base import Pair, Teacher
from ..heads import read_head_file, write_head
from ..local import LocalTeacher
from ..placement import is_collective
from ..rows import batch_keys, dataset_row_key, plain_rows
from ..vocabulary import shared_vocabulary
from .identity import CacheIdentity, read_identity, read_learnt, refuse_differences, write_learnt
from .kinds import NextBytesKind, refuse_sparse, told_kind
from .opening import check_vocabulary, config_of, dtype_of, identity_of, record_identity, rows_of, source_of
from .packing import kind_of
from .shards import Answer, TeacherCache

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from ..options import TeacherOptions

logger = logging.getLogger(__name__)

_HEAD = "head.safetensors"


class CachedTeacher(Teacher):
    """Answers with what a live teacher once said about the same row, kept in a folder.

    Rows that `expect` named are recorded when a live teacher first answers them; others, such as a student's own
    samples, are only passed on to it. Without a live teacher, or once all is recorded, no teacher body is in memory:
    for `hidden` its head, for the sparse kinds nothing.

    Args:
        folder: of a cache that exists; `distill-trainers cache-teacher` or the setting `teacher_cache` makes one.
        load: gives the live teacher; called when it is needed and not before. None: misses are errors.
        first_bytes: of the live teacher's ids (`TokenBytes.first_bytes`), for the kind `next_bytes`.
        hidden_size, dtype: of the teacher, to estimate sizes.
        collective: whether the live teacher answers only when all processes ask.

    Raises:
        ConfigurationError: there is no cache in the folder.
        CacheError: it cannot be read.
    """

    provides = frozenset({"distribution"})
    has_files = can_generate = keeps_logps = True

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        """Refuse what a cache cannot serve, alone or in front of a live teacher."""
        given, local = isinstance(pair.teacher, cls), isinstance(pair.teacher, LocalTeacher)
        if options.teacher_cache is not None and isinstance(pair.teacher, Teacher) and not local:
            raise ConfigurationError(
                f"Got `teacher_cache: {shown(options.teacher_cache)}` and a {type(pair.teacher).__name__}; expected a "
                "model or its name as `teacher_model` beside it. Leave one of them out."
            )
        alone = pair.teacher if given else None
        if options.teacher_placement == "cached" and not given:
            alone = cls(str(options.teacher_cache))
        if alone is not None and wants.keeps_reference:
            raise ConfigurationError(
                "Got `reference_logps_dir` with a CachedTeacher; expected a model or its name. Leave one of them out."
            )
        refuse_sparse(options.teacher_cache_kind if alone is None else alone.identity.kind, "teacher_cache_kind", wants)
        no_body = alone is not None and not alone.can_load
        if no_body and wants.replaces_completions:
            raise ConfigurationError(
                "The teacher's completions are to take the place of the dataset's, but a teacher cache alone cannot "
                "write any. Give the dataset completions and leave that setting out, or give a live `teacher_model`."
            )
        if not wants.samples_completions:
            super().refuse(dataclasses.replace(pair, teacher=alone), options, wants)
            return
        if no_body:
            raise ConfigurationError(
                "The student's own completions are new at every step, so a teacher cache alone cannot judge them. Set "
                "`lmbda: 0`, or give a live `teacher_model` (with `teacher_cache` for the dataset's rows)."
            )
        if not wants.needs_completions and not wants.replaces_completions:
            raise ConfigurationError(
                f"Got `teacher_cache: {shown(options.teacher_cache)}`, but every step trains on the student's own "
                "completions, which are never seen twice. Leave `teacher_cache` out, or set lmbda below 1."
            )
        if wants.streams_rows:
            raise ConfigurationError(
                "Got `teacher_cache` with a stream and student rollouts: which rows come again cannot be known. Pass a "
                "`datasets.Dataset`, set `lmbda: 0`, or leave `teacher_cache` out."
            )
        super().refuse(dataclasses.replace(pair, teacher=alone), options, wants)

    @classmethod
    def opened(cls, pair: Pair, options: TeacherOptions) -> CachedTeacher:
        """Return the cache of `teacher_placement: cached`, or one that was given."""
        if isinstance(pair.teacher, cls):
            teacher = pair.teacher
        else:
            teacher = cls(str(options.teacher_cache))
            if pair.teacher is not None:
                refuse_differences(teacher.cache.folder, teacher.identity, identity_of(pair, options))
        rows = None if pair.student is None else rows_of(pair.student, options, "student")
        check_vocabulary(teacher.identity, pair.tokenizer, rows)
        return teacher

    @classmethod
    def in_front_of(cls, load: Callable[[], Any], pair: Pair, options: TeacherOptions) -> CachedTeacher:
        """Put the configured cache in front of a teacher that `load` gives; a new folder is begun.

        Raises:
            ConfigurationError: the cache was made under other conditions, or belongs to another tokenizer.
            CacheError: it cannot be read or made.
        """
        is_of_bytes = options.teacher_cache_kind == NextBytesKind.name
        spelled = TokenBytes.of(pair.tokenizer, "the teacher") if is_of_bytes else None
        identity = identity_of(pair, options)
        record_identity(str(options.teacher_cache), identity, options)
        source = source_of(pair.teacher)
        config = config_of(source, options)

        def collective(accelerator: Accelerator) -> bool:
            stage, version = models.zero_stage(accelerator), models.fsdp_version(accelerator)
            return is_collective(options.teacher_placement, stage, version)

        teacher = cls(
            str(options.teacher_cache),
            load,
            first_bytes=None if spelled is None else spelled.first_bytes(identity.teacher_rows),
            hidden_size=config.get_text_config().hidden_size,
            dtype=dtype_of(source, config, options),
            collective=collective,
        )
        teacher.name = identity.teacher  # the folder may have moved
        return teacher

    def __init__(
        self,
        folder: str | Path,
        load: Callable[[], LocalTeacher] | None = None,
        *,
        first_bytes: Tensor | None = None,
        hidden_size: int = 0,
        dtype: torch.dtype = torch.float32,
        collective: Callable[[Accelerator], bool] = lambda accelerator: False,
    ):
        identity = read_identity(folder)
        if identity is None:
            raise ConfigurationError(
                f"There is no teacher cache in {str(folder)!r}. Make one with `distill-trainers cache-teacher --config "
                "recipe.yaml --teacher_cache FOLDER`."
            )
        self.identity: CacheIdentity = identity
        self.name = identity.teacher
        self.tells = told_kind(identity.kind, identity.top_k, identity.draws)
        self.kind = kind_of(identity, folder)
        self.provides = self.kind.tells  # type: ignore[misc]
        self.cache = TeacherCache(folder, identity.stamp())
        self.token_bytes = self.kind.token_bytes(hidden_size, dtype)
        self.head_bytes = identity.teacher_rows * hidden_size * dtype.itemsize if identity.kind == "hidden" else 0
        self._load = load
        self._first_bytes = first_bytes
        self._asks_together = collective
        self._live: LocalTeacher | None = None
        self._head: Head | None = None
        self._accelerator: Accelerator | None = None
        self._wanted: set[bytes] | None = set()
        self._stays = False

    # ---- As a teacher -----------------------------------------------------------------------------------------------

    def prepare(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        if self._live is not None:
            self._live.prepare(accelerator)

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        inputs, predicts = plain_rows(inputs, predicts, self.name)
        keys = batch_keys(inputs, predicts)
        rows = self._read(keys)
        missing = {key: number for number, key in enumerate(keys) if key is not None and key not in rows}
        if self._all_ask(bool(missing) or self._needs_head()):
            rows |= self._ask(inputs, predicts, vocab_size, missing)
        ordered = [rows[key] for key in keys if key is not None]
        head = self._cached_head(predicts.device) if self.identity.kind == "hidden" else None
        return self.kind.answer(ordered, None if head is None else head.cut_to(vocab_size), predicts.device)

    @contextlib.contextmanager
    def whole_head(self, signal: TeacherSignal) -> Iterator[TeacherSignal]:
        with self._live.whole_head(signal) if self._live is not None else contextlib.nullcontext(signal) as whole:
            yield whole

    def fingerprint(self) -> str:
        """Return that of the live teacher, which is loaded only if the cache does not say."""
        return self.identity.weights or read_learnt(self.cache.folder).get("weights") or self.live().fingerprint()

    def eos_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return `models.eos_ids` of the live teacher, which is loaded only if the cache does not say."""
        of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        recorded = read_learnt(self.cache.folder).get("eos_token_ids")
        if recorded is None:
            recorded = models.generation_eos_ids(self.live().model)
        return list(dict.fromkeys(of_tokenizer + recorded))

    def shared_ids(self, tokenizer: Any, student_rows: int, teacher_tokenizer: Any = None) -> int | None:
        # Its rows were made with the student's tokenizer.
        return shared_vocabulary(tokenizer, teacher_tokenizer or tokenizer, student_rows, self.identity.teacher_rows)

    # ---- What is recorded -------------------------------------------------------------------------------------------

    def expects(self, rows: Iterable[Mapping[str, Any]] | None, name: str) -> None:
        if rows is not None:
            self.expect(rows, why=f"the {name} rows")
            return
        if name == "training":
            self._wanted = None  # of a stream nobody knows the rows beforehand: whatever is asked for is recorded
        else:
            self._stays = True
        self.live()

    def expects_rollouts(self) -> None:
        logger.warning("The live teacher is loaded beside its cache: it judges the student's own completions.")
        self._stays = True
        self.live()

    def expect(self, rows: Iterable[Mapping[str, Any]], *, why: str = "the training rows") -> None:
        """Name tokenised rows that are going to be asked for, so that they are recorded.

        If some are not in the cache, their size is held against the free disk and the live teacher is loaded.

        Raises:
            ConfigurationError: rows are missing and there is no live teacher.
            CacheError: they would not fit on the disk.
        """
        self.cache.refresh()
        tokens: dict[bytes, int] = {}
        for row in rows:
            key, count = dataset_row_key(row)
            if count:
                tokens[key] = count
        if self._wanted is not None:
            self._wanted |= tokens.keys()
        missing = [count for key, count in tokens.items() if key not in self.cache]
        if not missing and not (tokens and self._needs_head()):
            return
        if self._load is None:
            raise ConfigurationError(
                f"{len(missing)} of {len(tokens)} different rows in {why} are not in the teacher cache "
                f"{str(self.cache.folder)!r} (other data, tokenizer, max_length or chat template?), and there is no "
                "live teacher to ask. Set `teacher_cache` beside a `teacher_model` instead of giving the cache alone "
                "(`teacher_placement: cached`), or run `distill-trainers cache-teacher` first."
            )
        self._check_room(len(missing), sum(missing))
        self.live()

    def live(self) -> LocalTeacher:
        """Return the live teacher, loaded if need be.

        Raises:
            ConfigurationError: there is none.
        """
        if self._live is None:
            if self._load is None:
                raise ConfigurationError(
                    f"The teacher cache {str(self.cache.folder)!r} cannot answer this by itself: it needs the live "
                    "teacher. Set `teacher_cache` beside a `teacher_model` instead of passing the cache alone."
                )
            logger.info("Loading the teacher %s: its cache does not hold all that is asked for.", self.name)
            self._live = self._load()
            if self._accelerator is not None:
                self._live.prepare(self._accelerator)
        return self._live

    def flush(self) -> None:
        """Write out what was recorded; once all expected rows are, the live teacher leaves the memory."""
        self.cache.flush()
        if self._live is None or self._stays or self._wanted is None or self.is_collective:
            return
        self.cache.refresh()
        if self._wanted and all(key in self.cache for key in self._wanted):
            self._live = self._head = None

    @property
    def store(self) -> TeacherCache:
        return self.cache

    @property
    def can_load(self) -> bool:
        """Whether there is a live teacher to ask."""
        return self._load is not None

    @property
    def is_live(self) -> bool:
        """Whether the live teacher's body is in memory."""
        return self._live is not None

    @property
    def is_collective(self) -> bool:
        accelerator = self._accelerator
        if accelerator is None or accelerator.num_processes == 1:
            return False
        return self._asks_together(accelerator)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _read(self, keys: Sequence[bytes | None]) -> dict[bytes, Answer]:
        wanted = {key for key in keys if key is not None}
        if any(key not in self.cache for key in wanted):
            self.cache.refresh()  # another process may have met them
        rows = {key: self.cache.read(key) for key in wanted}
        return {key: row for key, row in rows.items() if row is not None}

    def _all_ask(self, need: bool) -> bool:
        """Whether the live teacher is asked now: by whoever needs it, or by all processes if any of them does."""
        if not self.is_collective:
            return need
        assert self._accelerator is not None
        votes = torch.tensor(float(need), device=self._accelerator.device)
        return bool(self._accelerator.reduce(votes, reduction="sum").item())

    def _ask(
        self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None, missing: Mapping[bytes, int]
    ) -> dict[bytes, Answer]:
        """The live teacher's answers for some rows of a batch, recorded if they are expected."""
        numbers = torch.tensor(list(missing.values()) or [0], device=predicts.device)
        selected = {name: values[numbers] for name, values in inputs.items()}
        width = int(selected["attention_mask"].any(0).nonzero().max()) + 1
        selected = {name: values[:, :width] for name, values in selected.items()}
        trained = predicts[numbers][:, : width - 1]
        teacher = self.live()
        signal = teacher.signal(selected, trained, vocab_size)
        if isinstance(signal, HiddenStates):
            self._head = signal.head.cut_to(None)
        with teacher.whole_head(signal) as whole:
            self._keep_facts(whole)
            if not missing:
                return {}
            counts = trained.sum(1).tolist()
            with torch.autocast(predicts.device.type, enabled=False):  # the head's product is never rounded
                told = self.kind.told(whole, selected["input_ids"][:, 1:][trained], self._first_bytes)
                rows = dict(zip(missing, self.kind.store(told, counts, list(missing)), strict=True))
        for (key, row), count in zip(rows.items(), counts, strict=True):
            if self._wanted is None or key in self._wanted:
                self.cache.add(key, row, count)
        return rows

    def _keep_facts(self, signal: TeacherSignal) -> None:
        """Write what later runs need of the teacher beside its answers, once."""
        if self._accelerator is not None and not self._accelerator.is_main_process:
            return
        folder = self.cache.folder
        if self.identity.kind == "hidden" and isinstance(signal, HiddenStates) and not (folder / _HEAD).exists():
            write_head(folder / _HEAD, signal.head.cut_to(None))
        learnt = read_learnt(folder)
        if "eos_token_ids" not in learnt:
            assert self._live is not None
            eos_ids = models.generation_eos_ids(self._live.model)
            write_learnt(folder, {**learnt, "weights": self._live.fingerprint(), "eos_token_ids": eos_ids})

    def _needs_head(self) -> bool:
        return self.identity.kind == "hidden" and self._head is None and not (self.cache.folder / _HEAD).exists()

    def _cached_head(self, device: torch.device) -> Head:
        if self._head is None:
            self._head = read_head_file(self.cache.folder / _HEAD, device)
        return self._head

    def _check_room(self, rows: int, tokens: int) -> None:
        head = 0 if (self.cache.folder / _HEAD).exists() else self.head_bytes
        needed, free = tokens * self.token_bytes + head, shutil.disk_usage(self.cache.folder).free
        if needed > free:
            raise CacheError(
                f"The teacher cache {str(self.cache.folder)!r} needs about {needed / 2**30:,.2f} GiB more for "
                f"{rows:,} rows with {tokens:,} tokens ({self.token_bytes:,.0f} bytes each), but {free / 2**30:,.2f} "
                "GiB are free there. Name a folder on a larger disk, store less (`teacher_cache_kind: topk` or "
                "`sampled`, a smaller `teacher_cache_top_k`, `teacher_cache_dtype: bfloat16` for hidden states and "
                "`int8` for topk), or leave `teacher_cache` out."
            )
