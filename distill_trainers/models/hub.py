"""What goes to the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uploading_without(patterns: list[str]) -> Iterator[None]:
    """Within it, what a `Trainer` uploads to the Hub leaves out files that match `patterns`, too.

    transformers has its own list of patterns and no way to add to it.
    """
    from transformers import trainer as module

    own = module.hf_api

    class Api:
        def __getattr__(self, name: str) -> Any:
            return getattr(own(), name)

        def upload_folder(self, *, ignore_patterns: list[str] | None = None, **kwargs: Any) -> Any:
            return own().upload_folder(ignore_patterns=[*(ignore_patterns or []), *patterns], **kwargs)

    module.hf_api = Api  # type: ignore[assignment]  # it has what a Trainer asks of one
    try:
        yield
    finally:
        module.hf_api = own
