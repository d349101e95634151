"""Datasets as people have them, formatted, lazy, or not of `datasets` at all, to datasets of plain Python values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from distill_trainers.data.arrow import without_filling
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_CHUNK = 1000  # rows of a dataset of torch that are held as Python values


def plain_dataset(dataset: Any, *, name: str = "train") -> Dataset | IterableDataset:
    """Return the rows of `dataset` as plain values, whatever its format is.

    Formats (`set_format("torch")`, numpy, pandas, …) only change how values are shown, and are taken off; of columns
    that a format hides nothing is read. A lazy transform makes the rows, so it is applied, once. Lists of dictionaries
    and datasets of torch that give dictionaries are read whole; torch's that can only be iterated become streams.

    Raises:
        DatasetError: a dictionary of splits, or something that holds no dictionaries.
    """
    import datasets
    from torch.utils import data as torch_data

    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise DatasetError(f"Dataset {name!r} is a dictionary of splits {sorted(dataset)}. Pass one of them.")
    if isinstance(dataset, datasets.Dataset):
        return _unformatted(dataset)
    if isinstance(dataset, datasets.IterableDataset):
        stream = dataset.with_format(None)
        return stream if stream.features is not None else stream.map(plain_row)
    if isinstance(dataset, torch_data.IterableDataset):
        if iter(dataset) is iter(dataset):
            raise DatasetError(
                f"Dataset {name!r} can be read once only: its __iter__ returns the same iterator each time. Expected a "
                "new one, since the first row is read beforehand, and every epoch reads all. Or pass a list."
            )
        return datasets.IterableDataset.from_generator(_mappings, gen_kwargs={"rows": dataset, "name": name})
    if isinstance(dataset, torch_data.Dataset | Sequence) and not isinstance(dataset, str):
        return _from_rows(dataset, name)
    raise DatasetError(
        f"Dataset {name!r} is a {type(dataset).__name__}, expected datasets.Dataset, datasets.IterableDataset, a list "
        "of dictionaries or a dataset of torch. Columns become one with datasets.Dataset.from_dict, rows with "
        "datasets.Dataset.from_list, a table with datasets.Dataset.from_pandas."
    )


def without_late(column: str, dataset: Any, first: Mapping[str, Any], name: str) -> Any:
    """Return a dataset that refuses rows with something in a column which the `first` lacks: nobody would read it.

    Only rows of a stream that tells no features may differ in their columns.
    """
    if column in first or dataset.features is not None:
        return dataset
    return dataset.map(partial(_refuse_late, column=column, name=name), with_indices=True)


def _refuse_late(row: Mapping[str, Any], index: int, *, column: str, name: str) -> Mapping[str, Any]:
    if row.get(column):
        raise DatasetError(
            f"Row {index} of dataset {name!r} has a column {column!r}, which the first row lacks, so that nobody would "
            "read it; expected the same columns in all rows. Give the first row that column, with null where it has "
            "none."
        )
    return row


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with lists and numbers in place of tensors and arrays."""
    return {column: _plain(value) for column, value in row.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return plain_row(value)
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | str):
        return [_plain(item) for item in value]
    return value


def _unformatted(dataset: Dataset) -> Dataset:
    shown = dataset.format
    if shown["type"] == "custom":
        # `map` gives the transformed rows; the cache does not see what a transform depends on.
        made = dataset.map(
            plain_row, remove_columns=dataset.column_names, load_from_cache_file=False, desc="Applying the transform"
        )
        return made.with_format(None)
    dataset = dataset if shown["type"] is None else dataset.with_format(None)
    hides = set(shown["columns"]) != set(dataset.column_names) and not shown["output_all_columns"]
    return dataset.select_columns(shown["columns"]).with_format(None) if hides else dataset


def _from_rows(rows: Any, name: str) -> Dataset:
    """Read a list or a dataset of torch, some rows at a time: Python's numbers take many times the room of Arrow's."""
    from datasets import Dataset, concatenate_datasets

    read = _mappings((rows[i] for i in range(len(rows))), name)
    parts: list[Dataset] = []
    try:
        while chunk := list(islice(read, _CHUNK)):
            parts.append(_table(chunk))
        if any(part.features != parts[0].features for part in parts):  # a later row has other columns, or other kinds
            return _table([row for part in parts for row in part])
        return concatenate_datasets(parts) if parts else Dataset.from_list([])
    except DatasetError:
        raise
    except (TypeError, ValueError) as error:  # also those of Arrow
        raise DatasetError(
            f"The rows of dataset {name!r} do not have the same columns and kinds of values: {error}. Expected "
            "dictionaries that share both."
        ) from error


def _table(rows: list[dict[str, Any]]) -> Dataset:
    """Put rows into a table that has the columns of all of them, and keeps dictionaries as they are.

    A column of structs would give all rows the same keys, make 1 in one row 1.0 for the sake of 2.5 in another, and
    refuse text beside lists.
    """
    from datasets import Dataset, Features, Json

    # Rows that come from a table bring its filling, and JSON would make it the user's.
    rows = [without_filling(row) for row in rows]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    nested = {name: values for name, values in columns.items() if any(map(_holds_mappings, values))}
    flat = Dataset.from_dict({name: values for name, values in columns.items() if name not in nested})
    if not nested:
        return flat
    features = Features({name: Json() if name in nested else flat.features[name] for name in columns})
    return Dataset.from_dict(columns, features=features)


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(_holds_mappings, value[:1])))


def _mappings(rows: Iterable[Any], name: str) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"Row {index} of dataset {name!r} is a {type(row).__name__}; expected a dictionary of columns, such as "
                "{'prompt': …, 'completion': …}."
            )
        yield plain_row(row)
