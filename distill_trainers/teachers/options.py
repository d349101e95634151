"""Settings about teachers: one dataclass, whose flat fields every trainer's config has."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError, require
from .cache.kinds import CACHE_KINDS
from .placement import PLACEMENTS
from .remote.wire import NUMBER_DTYPES, SERVER_KINDS

if TYPE_CHECKING:

    class _Config:
        """Fields of the config that options are a part of."""

        trust_remote_code: Any
        seed: Any
        bf16: Any
        fp16: Any
        max_length: Any
        device: Any
        world_size: Any
        main_process_first: Any

else:  # at run time their types are those of the config
    _Config = object


@dataclass
class TeacherOptions(_Config):
    """Where a teacher's answers come from, and how. A config adds them to `TrainingArguments`, whose fields it reads.

    Raises:
        ConfigurationError: values out of range, or settings that contradict each other, by name.
    """

    # Weights
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for a teacher given by name (JSON)."}
    )
    teacher_placement: str = field(
        default="auto",
        metadata={"help": f"Where the teacher's weights are, whatever the student's: one of {', '.join(PLACEMENTS)}."},
    )
    teacher_adapter: str | None = field(
        default=None,
        metadata={
            "help": "With adapter_off: the teacher is this adapter on the student's base (name, folder, Hub id)."
        },
    )

    # Teacher cache
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which the teacher's answers are kept; what is missing is added as it is met."},
    )
    teacher_cache_kind: str = field(
        default="hidden",
        metadata={"help": f"What is kept of each trained token: one of {', '.join(CACHE_KINDS)}; hidden is exact."},
    )
    teacher_cache_top_k: int = field(default=64, metadata={"help": "Ids kept per token by the kind topk."})
    teacher_cache_draws: int = field(default=50, metadata={"help": "Draws per token of the kind sampled."})
    teacher_cache_dtype: str | None = field(
        default=None,
        metadata={"help": "Of what is kept; by default hidden states as the teacher gives them, else float32."},
    )

    # Teacher behind HTTP
    teacher_server_kind: str = field(
        default="hidden",
        metadata={"help": f"What a teacher's server is asked for: one of {', '.join(SERVER_KINDS)}; hidden is exact."},
    )
    teacher_server_top_k: int = field(default=64, metadata={"help": "Ids per token of the kind topk."})
    teacher_server_draws: int = field(default=50, metadata={"help": "Draws per token of the kind sampled."})
    teacher_server_dtype: str | None = field(
        default=None,
        metadata={"help": "Of what is sent; by default hidden states as the teacher gives them, else float32."},
    )
    teacher_server_model: str | None = field(
        default=None,
        metadata={"help": "The teacher as an OpenAI-compatible server names it; by default the only one it serves."},
    )
    teacher_server_concurrency: int = field(
        default=8, metadata={"help": "Questions to teacher servers in flight at once, in each process."}
    )
    teacher_server_timeout: float = field(
        default=120.0, metadata={"help": "Seconds without an answer after which an attempt has failed."}
    )
    teacher_server_patience: float = field(
        default=300.0, metadata={"help": "Seconds for which a teacher server that is away is waited for."}
    )

    @property
    def defers_teacher(self) -> bool:
        """Whether a teacher given by name is loaded only when it is asked."""
        return False

    def check_teacher_options(self) -> None:
        """Refuse what cannot work."""
        if self.teacher_cache is not None:
            self.teacher_cache = os.path.expanduser(self.teacher_cache)
        self._check_teacher_cache()
        self._check_teacher_server()
        self._check_placement()

    def _check_teacher_server(self) -> None:
        kind = self.teacher_server_kind
        require(kind in SERVER_KINDS, "teacher_server_kind", kind, f"one of {', '.join(SERVER_KINDS)}")
        draws = self.teacher_server_draws
        require(1 <= draws <= 32767, "teacher_server_draws", draws, "1 to 32767 draws")
        for name in ("teacher_server_top_k", "teacher_server_concurrency"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("teacher_server_timeout", "teacher_server_patience"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number of seconds above 0")
        dtypes = NUMBER_DTYPES[kind]
        expected = f"one of {', '.join(dtypes)} for {kind}"
        require(
            self.teacher_server_dtype in (None, *dtypes), "teacher_server_dtype", self.teacher_server_dtype, expected
        )

    def _check_teacher_cache(self) -> None:
        kind = self.teacher_cache_kind
        require(kind in CACHE_KINDS, "teacher_cache_kind", kind, f"one of {', '.join(CACHE_KINDS)}")
        draws = self.teacher_cache_draws
        require(self.teacher_cache_top_k >= 1, "teacher_cache_top_k", self.teacher_cache_top_k, "at least 1 id")
        require(1 <= draws <= 32767, "teacher_cache_draws", draws, "1 to 32767 draws")
        dtypes = CACHE_KINDS[kind].dtypes
        require(
            self.teacher_cache_dtype in (None, *dtypes),
            "teacher_cache_dtype",
            self.teacher_cache_dtype,
            f"one of {', '.join(dtypes)} for {kind}",
        )
        require(
            self.teacher_cache is not None or (kind == "hidden" and self.teacher_cache_dtype is None),
            "teacher_cache_dtype" if kind == "hidden" else "teacher_cache_kind",
            self.teacher_cache_dtype if kind == "hidden" else kind,
            "`teacher_cache` beside it: the folder of the cache",
        )

    def _check_placement(self) -> None:
        placement = self.teacher_placement
        if placement not in PLACEMENTS:
            raise ConfigurationError(f"Got `teacher_placement: {placement}`; expected one of {', '.join(PLACEMENTS)}.")
        if self.teacher_adapter is not None and placement != "adapter_off":
            raise ConfigurationError(
                f"Got `teacher_adapter: {self.teacher_adapter}` with `teacher_placement: {placement}`; expected "
                "`adapter_off`, where the teacher is an adapter on the student's base. Set it, or leave the adapter "
                "out."
            )
        if placement == "cached" and self.teacher_cache is None:
            raise ConfigurationError(
                "Got `teacher_placement: cached` without `teacher_cache`; expected the folder of a cache that "
                "`distill-trainers cache-teacher` has filled."
            )
        if placement in ("adapter_off", "remote") and self.teacher_cache is not None:
            raise ConfigurationError(
                f"Got `teacher_cache: {self.teacher_cache}` with `teacher_placement: {placement}`; expected one of "
                "them. Leave one out; to fill a cache and read it, name the teacher by folder or Hub id, and set "
                "`cached`."
            )
        package = PLACEMENTS[placement].package
        if package is not None and importlib.util.find_spec(package[0]) is None:
            raise ConfigurationError(
                f"Got `teacher_placement: {placement}`, but {package[0]} is not installed; "
                f"`pip install 'distill-trainers[{package[1]}]'`, or take another placement."
            )
