"""Datasets from a local file, a local folder or the Hub, and held-out rows for evaluation."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_trainers.data.formats import apply_column_mapping, reading
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.reachable import why_out_of_reach

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]

# File suffix to the name of the reader in `datasets`.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


def load_split(
    name_or_path: str,
    *,
    name: str | None = None,
    split: str = "train",
    data_files: DataFiles | None = None,
    streaming: bool = False,
    column_mapping: Mapping[str, str] | None = None,
) -> Dataset | IterableDataset:
    """Load one split of a dataset.

    Args:
        name_or_path: a file (.json, .jsonl, .csv, .parquet, .arrow, .txt), a folder of such files, a folder written by
            `save_to_disk`, or a dataset on the Hub.
        name: configuration on the Hub.
        split: a single file has one split only, which answers to any name; slices such as `train[:10%]` work where
            `datasets` allows them.
        data_files: files within a folder or a Hub dataset.
        streaming: read rows as they are needed.
        column_mapping: renames columns, from the dataset's names to those of a layout.

    Raises:
        DatasetError: nothing is there, it cannot be read, has no such split, or is empty.
    """
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path):  # false too of names that no file can have
        dataset = _from_file(path, split, streaming)
    elif os.path.isdir(path):
        dataset = _from_folder(path, name, split, data_files, streaming)
    elif _looks_like_path(name_or_path):
        raise DatasetError(
            f"No dataset at {name_or_path!r}: there is no such file or folder (looked for {str(path.absolute())!r}). "
            f"Expected a file ending in {', '.join(READERS)}, a folder, or the name of a Hub dataset (owner/name)."
        )
    else:
        if away := why_out_of_reach(name_or_path, "dataset"):
            raise DatasetError(
                f"No dataset {name_or_path!r}: it is no file or folder here, {away}. Check the name and this machine's "
                "network."
            )
        dataset = _load(name_or_path, name_or_path, name=name, split=split, data_files=data_files, streaming=streaming)
    if getattr(dataset, "num_rows", None) == 0:
        raise DatasetError(f"{name_or_path!r} (split {split!r}) has no rows. Check the file and the split.")
    return apply_column_mapping(dataset, column_mapping, name=name_or_path)


def train_eval_split(
    dataset: Dataset | IterableDataset, eval_fraction_or_count: float | int, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Hold rows out for evaluation; the same seed holds out the same rows.

    Args:
        eval_fraction_or_count: a float between 0 and 1 is the share of rows (at least one row), an int their number. A
            stream has no length: it takes a number, and holds out its first rows.
        seed: of the draw.

    Returns:
        The rows to train on and those held out.

    Raises:
        ConfigurationError: neither a fraction nor a count, or a fraction of a stream.
        DatasetError: nothing would be left to train on.
    """
    from datasets import IterableDataset

    amount = eval_fraction_or_count
    is_count = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    if not is_count and not (isinstance(amount, float) and 0.0 < amount < 1.0):
        raise ConfigurationError(
            f"Cannot hold out {amount!r} of a dataset: expected a fraction between 0 and 1, or a number of rows from 1."
        )
    if isinstance(dataset, IterableDataset):
        if not is_count:
            raise ConfigurationError(f"A stream has no length to take {amount} of. Give a number of rows.")
        return dataset.skip(int(amount)), dataset.take(int(amount))
    count = int(amount) if is_count else max(1, round(amount * len(dataset)))
    if count >= len(dataset):
        raise DatasetError(
            f"Holding out {count} of {len(dataset)} rows leaves none to train on. Hold out fewer, or pass an "
            "eval dataset."
        )
    halves = dataset.train_test_split(test_size=count, seed=seed)
    return halves["train"], halves["test"]


def _from_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DatasetError(
            f"Cannot read {str(path)!r}: unknown suffix {path.suffix!r}. Expected one of {', '.join(READERS)}."
        )
    if path.stat().st_size == 0:
        raise DatasetError(f"{str(path)!r} is an empty file. Expected rows to train on.")
    split_name = re.match(r"\w+", split)
    files = {split_name.group() if split_name else "train": str(path)}
    return _load(str(path), reader, split=split, data_files=files, streaming=streaming, **_as_written([path]))


def _from_folder(
    path: Path, name: str | None, split: str, data_files: DataFiles | None, streaming: bool
) -> Dataset | IterableDataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_saved(path, split, streaming)
    if data_files is None and not any(file.suffix.lower() in READERS for file in path.rglob("*")):
        raise DatasetError(
            f"The folder {str(path)!r} has no dataset in it: looked for files ending in {', '.join(READERS)} and for "
            "what Dataset.save_to_disk writes (state.json, dataset_dict.json)."
        )
    chosen = path.rglob("*") if data_files is None else _chosen(path, data_files)
    files = [file for file in chosen if file.suffix.lower() in READERS]
    settings = {"name": name, "data_files": data_files, "streaming": streaming, **_as_written(files)}
    return _load(str(path), str(path), split=split, **settings)


def _chosen(folder: Path, data_files: DataFiles) -> list[Path]:
    """The files that `data_files` names, some by patterns."""
    named: list[Any] = [*data_files.values()] if isinstance(data_files, Mapping) else [data_files]
    patterns = [pattern for some in named for pattern in ([some] if isinstance(some, str) else some)]
    return [Path(file) for pattern in patterns for file in glob.glob(str(folder / pattern), recursive=True)]


def _as_written(files: Sequence[Path]) -> dict[str, Any]:
    """How to read CSV files as the text that they are: pandas takes 007 for 7, and NA and None for nothing."""
    if not files or any(file.suffix.lower() != ".csv" for file in files):
        return {}
    from datasets import Features, Value
    from pandas import read_csv

    try:
        columns = read_csv(files[0], nrows=0).columns
    except (OSError, ValueError):  # told by the reader of the whole
        return {}
    return {"features": Features({str(column): Value("string") for column in columns}), "keep_default_na": False}


def _from_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import DatasetDict, load_from_disk

    told = f"The folder {str(path)!r}, which `save_to_disk` wrote, cannot be read"
    with reading(told, more=(ValueError, LookupError, TypeError, AttributeError)):
        saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise DatasetError(f"{str(path)!r} has the splits {sorted(saved)}, not {split!r}. Choose one of them.")
        saved = saved[split]
    elif "[" in split:
        raise DatasetError(f"{str(path)!r} is one saved dataset, which cannot be sliced by split={split!r}.")
    return saved.to_iterable_dataset() if streaming else saved


def _load(shown: str, source: str, split: str, **files: Any) -> Dataset | IterableDataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(source, split=split, **files)
    except (DatasetsError, OSError, ValueError, LookupError, EOFError, TypeError, AttributeError) as error:
        cause = error.__cause__ or error
        accepted = ", ".join(READERS)
        raise DatasetError(
            f"Could not load {shown!r} (split {split!r}): {type(cause).__name__}: {str(cause).rstrip('.')}. Expected "
            f"rows that share their columns, in a file ending in {accepted}, a folder of such files, or a Hub dataset "
            "that this machine can reach; name and split must be its own."
        ) from error


def _looks_like_path(text: str) -> bool:
    if text.startswith((".", "~", os.sep)) or Path(text).suffix.lower() in READERS:
        return True
    return os.sep in text and os.path.isdir(Path(text).parent)
