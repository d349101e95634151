"""Checkpoints that can be resumed from, with the method's own state in them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ... import models
from ...exceptions import CheckpointError, ConfigurationError, DatasetError
from ...locks import holding
from ...manifest import MANIFEST_NAME, differences, matters, write_manifest
from ...run_files import (
    check_resumable,
    find_last_complete_checkpoint,
    is_complete,
    last_complete_checkpoint,
    plain,
    shown,
)
from ...storage import tensor_bytes, write_file
from ...teachers import Teacher
from ...teachers.local import base_fingerprint
from . import outage
from .callbacks import InterruptCallback
from .thrift import RunState, give_back_free_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
_ROWS_LOOKED_AT = 32
METHOD_STATE_NAME = "distill_state.json"
METHOD_TENSORS_NAME = "distill_state.safetensors"
TEACHER_NAME = "teacher_state{}.safetensors"


def remove_torn(output_dir: str | Path) -> None:
    """Remove what killed writers left half written: rotation would count it."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.name.rsplit("-", 1)[1].isdigit() and not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)


def stream_position(folder: str | Path) -> tuple[int, int]:
    """Tell where in its stream a run was: whole passes before, and optimiser steps of its pass."""
    state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    # Without a length, transformers takes max_steps for the length of a pass.
    passes = max(0, math.ceil(state["epoch"]) - 1)
    return passes, round((state["epoch"] - passes) * state["max_steps"])


@contextlib.contextmanager
def written_whole(folder: Path, accelerator: Accelerator, should_save: bool) -> Iterator[None]:
    """Write, within it, the checkpoint `folder` anew: wholly, or not at all.

    One that an earlier run left under that name comes back if this one fails. What fails once the checkpoint is
    complete (an upload, say) comes through as itself and costs no checkpoint.

    Raises:
        CheckpointError: it could not be written.
    """
    earlier = folder.with_name(f"earlier-{folder.name}")
    if should_save and folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    accelerator.wait_for_everyone()  # nobody writes into the one that is put away
    try:
        yield
    except Exception as error:
        if not should_save:
            raise
        if is_complete(folder):
            shutil.rmtree(earlier, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        if earlier.exists():
            earlier.rename(folder)
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise CheckpointError(
            f"Could not write the checkpoint {folder}: {error}. {free:.0f} MiB were free there. Checkpoints "
            "written earlier are intact; free some space and go on with `--resume_from_checkpoint true`."
        ) from error
    if should_save:
        shutil.rmtree(earlier, ignore_errors=True)


def write_method_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep what the method must remember beside the checkpoint's weights: nested dicts of JSON values and tensors."""
    plain, tensors = _split(state)
    what = "what the method remembers", "Free some space."
    if tensors:
        write_file(folder / METHOD_TENSORS_NAME, tensor_bytes(tensors), *what)
    write_file(folder / METHOD_STATE_NAME, json.dumps(plain), *what)


def read_method_state(folder: str | Path) -> dict[str, Any]:
    """Read what `write_method_state` wrote; empty where the method had nothing to remember.

    Raises:
        CheckpointError: a file is damaged.
    """
    file = Path(folder) / METHOD_STATE_NAME
    with _reading(file):
        state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for path, tensor in _tensors_in(Path(folder) / METHOD_TENSORS_NAME).items():
        *names, last = path.split("/")
        part = state
        for name in names:
            part = part[name]
        part[last] = tensor
    return state


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name, within it, a file that a checkpoint without a manifest did not say to be damaged."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {str(file.parent)!r} is damaged: {file.name} cannot be read ({error}). Resume another "
            "one, or start a new run."
        ) from error


def _tensors_in(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file; none where there is no such file."""
    with _reading(file):
        return load_file(file) if file.is_file() else {}


def _split(state: dict[str, Any], path: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values that JSON can hold, and tensors by their path."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[path + name] = value
        elif isinstance(value, dict):
            plain[name], inner = _split(value, f"{path}{name}/")
            tensors |= inner
        else:
            plain[name] = value
    return plain, tensors


def _content_of(rows: Any) -> str:
    """Hash some rows from all over a data set."""
    places = range(0, len(rows), max(1, len(rows) // _ROWS_LOOKED_AT))
    text = json.dumps([rows[place] for place in places], default=plain, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def _facts_of(student: Any) -> dict[str, Any]:
    """Say which weights train and, of adapters, how and on which base; all processes must call it.

    A checkpoint of other shapes fails in torch, without a word of the reason; another scale or base of an adapter fits.
    """
    trained = [(name.replace("_orig_mod.", ""), p) for name, p in student.named_parameters() if p.requires_grad]
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained}
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for _, p in trained}))
    size = sum(math.prod(shape) for shape in shapes.values())
    digest = xxhash.xxh3_64_hexdigest(json.dumps(shapes, sort_keys=True).encode())[:8]
    facts: dict[str, Any] = {"trained weights": f"{size:,} in {len(shapes)} tensors ({digest}) of {dtypes}"}
    if models.is_peft(student):
        for name in student.active_adapters:
            facts |= {
                f"adapter {name}, {key}": said for key, said in plain(student.peft_config[name].to_dict()).items()
            }
        facts["the adapter's base"] = base_fingerprint(student, with_config=False)
    return facts


class Resuming(Trainer):
    """What of `DistillTrainer` writes checkpoints, and goes on from them."""

    last_step: outage.LastStep | None = None
    _method_state_aside: dict[str, Any] | None = None
    _facts: dict[str, Any] = {}  # noqa: RUF012  # of the student before it is wrapped; replaced, never changed
    _own_checkpoints: frozenset[str] = frozenset()  # of earlier calls of `train`
    _content: str | None = None  # of the rows as they were given: methods may have a teacher answer them anew

    if TYPE_CHECKING:
        args: Any
        teacher: Teacher
        run_checkpoints: list[str]
        _ready_train: Any

        def method_state(self) -> dict[str, Any]: ...

        def load_method_state(self, state: dict[str, Any]) -> None: ...

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """Do as `transformers.Trainer.train`; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            ConfigurationError: `output_dir` has checkpoints of another run, and nobody said whether to go on.
        """
        if self.train_dataset is None:
            raise DatasetError("Got no `train_dataset`; this trainer can only evaluate.")
        with self._alone_in(self._get_output_dir(trial)):
            return self._train_alone(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train_alone(self, resume_from_checkpoint: Any, trial: Any, ignore_keys_for_eval: Any) -> TrainOutput:
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is None and trial is None:
            told: str | None = self.args.resume_from_checkpoint
            words: dict[str, bool] = {"true": True, "false": False}
            resume_from_checkpoint = words.get(str(told).lower(), told)
            if resume_from_checkpoint is None and not self.args.overwrite_output_dir:
                self._together(self._refuse_to_start_over, self.args.should_save)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self._content is None or self.train_dataset is not self._ready_train:
            self._content = _content_of(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        if not self._facts and self.model is not None:
            self._facts = _facts_of(self.model)
        self._own_checkpoints |= frozenset(map(os.path.abspath, self.run_checkpoints))
        self.run_checkpoints, self.last_step = [], None
        if isinstance(resume_from_checkpoint, str):
            checkpoint = resume_from_checkpoint
            self._together(lambda: check_resumable(checkpoint), self.args.local_process_index == 0)
            if self.args.should_save:
                remove_torn(self.args.output_dir)
            self.run_checkpoints.append(resume_from_checkpoint)
            self.load_method_state(read_method_state(resume_from_checkpoint))
            self.teacher.load_state(_tensors_in(self._teacher_file(resume_from_checkpoint)))
            self._compare_settings(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, InterruptCallback):  # a run that fails tells its callbacks nothing
                    callback.give_signals_back()

    @contextlib.contextmanager
    def _alone_in(self, folder: str) -> Iterator[None]:
        """Hold the folder by the first process, and let all refuse what is another run's."""
        with contextlib.ExitStack() as stack:
            self._together(lambda: stack.enter_context(holding(folder)), self.args.process_index == 0)
            yield

    def _together(self, check: Callable[[], Any], is_checking: bool) -> None:
        """Let some processes check, and all refuse: one alone would keep the others waiting."""
        failure = None
        try:
            if is_checking:
                check()
        except (CheckpointError, ConfigurationError) as error:
            failure = type(error), str(error)
        failures = [told for told in gather_object([failure]) if told is not None]
        if failures:
            error_class, message = failures[0]
            raise error_class(message)

    def _refuse_to_start_over(self) -> None:
        """Refuse a run that would overwrite the checkpoints of another one, unless it was told to."""
        found = find_last_complete_checkpoint(self.args.output_dir)
        own = self._own_checkpoints | set(map(os.path.abspath, self.run_checkpoints))
        if found is not None and os.path.abspath(found) not in own:
            raise ConfigurationError(
                f"Got `output_dir={self.args.output_dir!r}`, which has checkpoints (the newest is {Path(found).name}), "
                "and no `resume_from_checkpoint`; expected to be told whether to go on. Call "
                "`train(resume_from_checkpoint=True)` to go on, `train(resume_from_checkpoint=False)` to start anew "
                "(always: `overwrite_output_dir=True` in a config of ours), or name another `output_dir`."
            )

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self.state = RunState.of(self.state)
        if resume_from_checkpoint is None:
            return position
        state = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        planned = state["max_steps"]
        if planned != max_steps and "constant" not in str(getattr(self.args.lr_scheduler_type, "value", "")):
            logger.warning(
                "The run of %s was to take %d optimiser steps, and now %d: from here on its learning rate is another, "
                "since `lr_scheduler_type: %s` depends on them.",
                resume_from_checkpoint,
                planned,
                max_steps,
                getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type),
            )
        if hasattr(self.train_dataset, "__len__"):
            return position
        # transformers takes all steps so far for steps of a stream's first pass.
        passes, steps = stream_position(resume_from_checkpoint)
        return passes, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with written_whole(folder, self.accelerator, self.args.should_save):
            state = self.method_state() if self._method_state_aside is None else self._method_state_aside
            if self.args.should_save and state:
                folder.mkdir(parents=True, exist_ok=True)
                write_method_state(folder, state)
            self._write_teacher(folder)
            super()._save_checkpoint(model, trial)
            self._seal(folder)
        self.run_checkpoints.append(str(folder))

    def _teacher_file(self, folder: str | Path) -> Path:
        """Where this process finds what the teacher keeps: its own share, or what all have alike."""
        return Path(folder) / TEACHER_NAME.format(f"_{self.args.process_index}" if self.teacher.is_collective else "")

    def _write_teacher(self, folder: Path) -> None:
        if not (self.args.should_save or self.teacher.is_collective):
            return
        state = {name: tensor.cpu() for name, tensor in self.teacher.state().items()}
        if state:
            write_file(self._teacher_file(folder), tensor_bytes(state), "what the teacher keeps", "Free some space.")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder: Path) -> None:
        if self.args.should_save and is_complete(folder) and not (folder / MANIFEST_NAME).exists():
            write_manifest(folder, self.exact_settings())

    def exact_settings(self) -> dict[str, Any]:
        """Return what a resumed run must have as it was, to go on as if it had never stopped."""
        args = self.args
        settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init and matters(f.name)}
        rows = self.train_dataset if hasattr(self.train_dataset, "__len__") else None
        if getattr(self.teacher, "is_live", True) and not self.teacher.moves:  # it is not loaded for this
            settings["teacher's weights"] = self.teacher.fingerprint()
        counted, size = "rows", args.per_device_train_batch_size
        if args.per_device_train_tokens is not None:
            counted, size = "tokens", args.per_device_train_tokens
        return {
            **plain(settings),
            "teacher": shown(self.teacher.name),
            "number of processes": args.world_size,
            f"{counted} of a step": size * args.gradient_accumulation_steps * args.world_size,
            "rows of train_dataset": None if rows is None else len(rows),
            "content of train_dataset": self._content,
            **self._facts,
        }

    def _compare_settings(self, checkpoint: str) -> None:
        changed = differences(checkpoint, self.exact_settings())
        if not changed:
            return
        listed = "; ".join(f"{name}: {then!r:.60}, now {now!r:.60}" for name, (then, now) in changed.items())
        if not self.args.resume_anyway:
            raise CheckpointError(
                f"The run of {checkpoint} had other settings ({listed}), so it cannot go on as if it had not stopped. "
                "Set them as they were, or say `resume_anyway: true`."
            )
        if self.args.should_save:
            logger.warning(
                "Going on from %s with other settings (%s): not what an undisturbed run gives.", checkpoint, listed
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What follows is the main process's word that the checkpoint is whole, so all must have written their part.
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of a weight that was loaded under another name, such as a tied head under its embedding's."""
        assert self.model is not None
        weights = {name: (t.data_ptr(), t.shape) for name, t in self.model.state_dict().items() if t.numel()}
        missing = set(load_result.missing_keys)
        loaded = {place for name, place in weights.items() if name not in missing}
        random = [name for name in load_result.missing_keys if weights.get(name) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=random))

    def save_aside(self, method_state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint that takes no other's place: nothing is rotated out, nothing uploaded.

        Args:
            method_state: the method's as of the checkpoint's step, where it has changed since.
        """
        args, self._method_state_aside = self.args, method_state
        settings = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            self._save_checkpoint(self.model, trial=None)
        finally:
            args.save_total_limit, args.push_to_hub = settings
            self._method_state_aside = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        has_much_to_do = self.control.should_save or self.control.should_evaluate
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if has_much_to_do:
            give_back_free_memory()
        if self.teacher.may_be_away:
            self.last_step = outage.last_step(self.method_state(), self.args.device)
