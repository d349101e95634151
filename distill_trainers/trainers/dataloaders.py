"""Rows as they are trained on and scored: tokenised, also when they come after construction, and completed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from .. import hub, models
from ..data.packing import is_packed_dataset, pack
from ..data.plain import plain_dataset
from ..exceptions import ConfigurationError, DatasetError
from ..requirements import Requirements
from ..teachers import Teacher
from .given import arguments
from .given.lengths import check_positions
from .given.token_batches import check_longest, refuse_stream, row_tokens, rows_of_batch, token_batches
from .lifecycle.completions import fill_with_teacher_completions
from .lifecycle.order import TokenBatchSampler, train_sampler
from .preflight import is_prepared, prepare_rows, read_stream, refuse_other_layout, tell_dataset

_OTHERS_KEPT = 4  # rows that `evaluate` or `predict` was given, ready to be scored again


def _content(dataset: Any) -> str | None:
    """A mark of rows that may change in place: those of a list, or of a dataset with another format or transform."""
    return Hasher.hash(dataset) if isinstance(dataset, list | tuple) else getattr(dataset, "_fingerprint", None)


class Dataloaders(Trainer):
    """What of `DistillTrainer` loads rows."""

    _keeps_order = False
    _rows_of_step = 0  # of batches that are counted in tokens

    if TYPE_CHECKING:
        args: Any
        teacher: Teacher
        processing_class: Any
        requirements: Requirements
        student_config: Any
        teacher_source: Any
        eval_dataset: Any
        formatting_func: Callable[[Any], Any] | None
        _ready_train: Any
        _eval_is_filled: dict[int, tuple[Any, ...]]

    def complete_eval(self, dataset: Any) -> Any:
        """Complete evaluation rows with whatever else the method wants, once they have their completions."""
        return dataset

    def prepared(self, dataset: Any, name: str) -> Any:
        """Tokenise rows that are still raw, as the constructor would have; None and tokenised rows stay as they are."""
        if dataset is None or is_prepared(dataset):
            return dataset
        dataset = arguments.formatted(plain_dataset(dataset, name=name), self.formatting_func, name)
        if name == "train":
            refuse_other_layout(self.args, dataset, self.requirements)
        rows = prepare_rows(self.args, dataset, self.processing_class, name, self.requirements)
        models_of = self.model, self.student_config, self.teacher_source
        check_positions({name: rows}, *models_of, self.args, self.requirements)
        return rows

    def complete_train(self: Any) -> None:
        """Make `train_dataset` what is trained on, once: tokenised, and with the teacher's completions where due."""
        if self.train_dataset is self._ready_train:
            return
        if not is_prepared(self.train_dataset):
            self.data_sources = list(hub.hub_ids_of(self.train_dataset))
        self.train_dataset = self.prepared(self.train_dataset, "train")
        if self.requirements.replaces_completions:
            self.train_dataset = fill_with_teacher_completions(self, self.train_dataset, replace=True)
        tell_dataset(self.teacher, self.train_dataset, "training")
        self._ready_train = self.train_dataset

    def get_train_dataloader(self) -> Any:
        self.complete_train()
        if self.args.packing and not is_packed_dataset(self.train_dataset):
            with self.args.main_process_first(desc="packing"):
                batch_size = rows_of_batch(self.args, self.args.max_length)
                self.train_dataset = self._ready_train = pack(self.train_dataset, self.args.max_length, batch_size)
        if self.args.per_device_train_tokens is None:
            return super().get_train_dataloader()
        return self._token_dataloader()

    def _token_dataloader(self) -> Any:
        """Load batches that are counted in tokens: as transformers does, which knows batches of so many rows alone."""
        args, sampled = self.args, self.requirements.samples_completions
        rows: Any = self.train_dataset
        if isinstance(rows, IterableDataset):  # given after construction
            refuse_stream(args)
        check_longest(rows, args, sampled=sampled)
        batches = token_batches(row_tokens(rows, args, sampled=sampled), args, args.world_size)
        times, window = getattr(args, "num_generations", 1), args.world_size * args.gradient_accumulation_steps
        self._rows_of_step = round(len(rows) * times * window / len(batches))
        workers = args.dataloader_num_workers
        loader: Any = DataLoader(
            rows,
            batch_sampler=TokenBatchSampler(batches, args, lambda: self.state.epoch or 0, times),
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Count the rows of an optimiser step: of batches that are counted in tokens their mean, for speeds alone."""
        return self._rows_of_step or super().get_total_train_batch_size(args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = train_sampler(dataset, self.args, lambda: self.state.epoch or 0)
        return super()._get_train_sampler(dataset) if sampler is None else sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Load evaluation rows; those without completion get the teacher's, once; new raw data is prepared.

        A stream is read to its end once, so that it can be completed and shared between processes.
        """
        if isinstance(eval_dataset, str):
            if not isinstance(self.eval_dataset, Mapping) or eval_dataset not in self.eval_dataset:
                names = sorted(self.eval_dataset) if isinstance(self.eval_dataset, Mapping) else "one without a name"
                raise DatasetError(f"Got no evaluation set called {eval_dataset!r}; expected one of {names}.")
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise DatasetError("Got no rows to evaluate on: pass `eval_dataset` to the trainer, or rows to `evaluate`.")
        return self._forgotten(super().get_eval_dataloader(self._completed(eval_dataset)))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Load rows for `predict`, as those of evaluation, in their order: predictions are read beside rows."""
        if test_dataset is None:
            raise DatasetError("Got None as the rows to predict; expected a dataset, such as `trainer.eval_dataset`.")
        self._keeps_order = True
        try:
            return self._forgotten(super().get_test_dataloader(self._completed(test_dataset, "test")))
        finally:
            self._keeps_order = False

    def _forgotten(self, loader: Any) -> Any:
        models.forget_dataloader(self.accelerator, loader)
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # transformers groups by length what is predicted as well.
        return SequentialSampler(eval_dataset) if self._keeps_order else super()._get_eval_sampler(eval_dataset)

    def _completed(self: Any, dataset: Any, name: str = "eval") -> Any:
        if self.model is None:
            raise ConfigurationError(
                "Got rows to score after `hyperparameter_search`, which has put its students away; expected one "
                "that is trained. Call `train` first, with the best trial's settings in `args`."
            )
        known, content = self._eval_is_filled.get(id(dataset)), _content(dataset)
        if known is None or known[0] != content:
            filled = self.prepared(dataset, name)
            if isinstance(filled, IterableDataset):
                filled = read_stream(filled, name)
            replaces = self.requirements.replaces_completions
            filled = self.complete_eval(fill_with_teacher_completions(self, filled, replace=replaces))
            if filled is not dataset:
                tell_dataset(self.teacher, filled, "evaluation")
            # Holding it keeps its id taken.
            known = self._eval_is_filled[id(dataset)] = (content, filled, dataset)
            own = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
            others = [key for key in self._eval_is_filled if all(key != id(rows) for rows in own)]
            for key in others[:-_OTHERS_KEPT]:
                del self._eval_is_filled[key]
        return known[1]
