"""What reward functions read of a row: its prompt as it was given, and its columns, as JSON until it was answered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.settings import shown

REWARD_ROW = "reward_row"  # of rows, and of batches as a list of B: what `RewardRows.written` wrote
PROMPT, COLUMNS = "prompt", "columns"
_OWN = frozenset({PROMPT, "completions"})  # columns that would take the place of what functions get from us


@dataclass(frozen=True)
class RewardRows:
    """Writes what reward functions will be given.

    Args:
        needed: columns of right answers, each with the setting that names it; rows without one are refused.
        taken: columns that there must be, each with the function that takes it.
        aliases: columns as they are called now, by what they were called before `column_mapping`: both names are kept.
    """

    needed: tuple[tuple[str, str], ...] = ()
    taken: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def reading(self, columns: Iterable[str], mapping: Mapping[str, str] | None, name: str) -> RewardRows:
        """Return the same, for a dataset with these columns.

        Raises:
            ConfigurationError: a column is missing.
        """
        columns, aliases = set(columns), dict(mapping or {})
        for column, setting in self.needed:
            if aliases.get(column, column) not in columns:
                raise ConfigurationError(
                    f"Got `{setting}: {column}`, but dataset {name!r} has the columns {sorted(columns)}; expected that "
                    "one, which reward functions compare completions with. Name yours."
                )
        for column, function in self.taken:
            if column == PROMPT or aliases.get(column, column) not in columns:
                raise ConfigurationError(
                    f"The reward function {function!r} takes {column!r}, but of dataset {name!r} it is given the "
                    f"columns {sorted(columns - _OWN)}; expected that one. Add the column, rename yours, or give it a "
                    "default."
                )
        return replace(self, aliases=tuple(aliases.items()))

    def written(self, row: Mapping[str, Any], asked: str | Sequence[Any] | None) -> str:
        """Write a row as JSON.

        Args:
            asked: the prompt as text or messages; None where there are only ids.

        Raises:
            DatasetError: no right answer, or a value that JSON cannot hold, such as a date or an image.
        """
        columns = {column: value for column, value in row.items() if column not in _OWN}
        columns |= {old: row[new] for old, new in self.aliases if new in row and old not in row}
        for column, _ in self.needed:
            answer = columns.get(column)
            if answer is None or answer != answer or not str(answer).strip():  # pandas writes NaN for none
                raise DatasetError(
                    f"There is no answer in the column {column!r}, which rewards compare completions with. Give the "
                    "row one, or take it out."
                )
        for column, value in columns.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise DatasetError(
                    f"The column {column!r} holds {shown(value, 80)!r}, which cannot be handed to reward functions "
                    f"({shown(error)}); expected text, numbers, lists or mappings. Convert the column, or remove it."
                ) from error
        return json.dumps({PROMPT: asked, COLUMNS: columns}, ensure_ascii=False)


def read_row(written: str) -> tuple[Any, dict[str, Any]]:
    """Return prompt and columns of `RewardRows.written`."""
    row = json.loads(written)
    return row[PROMPT], row[COLUMNS]
