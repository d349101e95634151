"""Settings about teachers: one dataclass, whose flat fields every trainer's config has."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError
from ..models import which_files
from ..settings import Checked, require, setting, shown
from .cache.kinds import CACHE_KINDS
from .placement import PLACEMENTS, SELF_TEACHERS
from .remote.wire import NUMBER_DTYPES, SERVER_KINDS

if TYPE_CHECKING:

    class _Config:
        """Fields of the config that options are a part of."""

        trust_remote_code: Any
        model_init_kwargs: Any
        seed: Any
        bf16: Any
        fp16: Any
        max_length: Any
        device: Any
        world_size: Any
        main_process_first: Any

else:  # at run time their types are those of the config
    _Config = object

_DECAY = 0.99  # an average over about 100 steps


@dataclass
class TeacherOptions(Checked, _Config):
    """Where a teacher's answers come from, and how. A config adds them to `TrainingArguments`, whose fields it reads.

    Raises:
        ConfigurationError: values out of range, or settings that contradict each other, by name.
    """

    # Weights
    teacher_model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments of `from_pretrained` for a teacher given by name (JSON)."
    )
    teacher_placement: str = setting(
        "auto", f"Where the teacher's weights are, whatever the student's: one of {', '.join(PLACEMENTS)}."
    )
    teacher_adapter: str | None = setting(
        None, "With adapter_off: the teacher is this adapter on the student's base (name, folder, Hub id)."
    )

    # The student as its own teacher
    self_teacher: str | None = setting(
        None,
        "The student teaches itself, and there is no other teacher: as it was before training (initial, or true), as "
        "an average of its weights (ema), or as it is (live).",
    )
    self_teacher_decay: float | None = setting(
        None,
        "With ema: weight of the average before each optimiser step, the student's new weights have the rest; 0.99 by "
        "default.",
        above=0,
        below=1,
    )

    # Teacher cache
    teacher_cache: str | None = setting(
        None, "Folder in which the teacher's answers are kept; what is missing is added as it is met."
    )
    teacher_cache_kind: str = setting(
        "hidden", f"What is kept of each trained token: one of {', '.join(CACHE_KINDS)}; hidden is exact."
    )
    teacher_cache_top_k: int = setting(64, "Ids kept per token by the kind topk.", least=1)
    teacher_cache_draws: int = setting(50, "Draws per token of the kind sampled.", least=1, most=32767)
    teacher_cache_dtype: str | None = setting(
        None, "Of what is kept; by default hidden states as the teacher gives them, else float32."
    )

    # Teacher behind HTTP
    teacher_server_kind: str = setting(
        "hidden", f"What a teacher's server is asked for: one of {', '.join(SERVER_KINDS)}; hidden is exact."
    )
    teacher_server_top_k: int = setting(64, "Ids per token of the kind topk.", least=1)
    teacher_server_draws: int = setting(50, "Draws per token of the kind sampled.", least=1, most=32767)
    teacher_server_dtype: str | None = setting(
        None, "Of what is sent; by default hidden states as the teacher gives them, else float32."
    )
    teacher_server_model: str | None = setting(
        None, "The teacher as an OpenAI-compatible server names it; by default the only one it serves."
    )
    teacher_server_concurrency: int = setting(
        8, "Questions to teacher servers in flight at once, in each process.", least=1, most=1024
    )
    teacher_server_timeout: float = setting(
        120.0, "Seconds for one whole answer of a server; without it an attempt has failed.", above=0, most=10**9
    )
    teacher_server_patience: float = setting(
        300.0, "Seconds for which a teacher server that is away is waited for.", above=0
    )

    @property
    def defers_teacher(self) -> bool:
        """Whether a teacher given by name is loaded only when it is asked."""
        return False

    def files_of(self, role: str) -> dict[str, Any]:
        """Return the arguments with which config and tokenizer of the "student" or "teacher" are read."""
        given: Any = getattr(self, "model_init_kwargs" if role == "student" else "teacher_model_init_kwargs", None)
        return which_files(given, self.trust_remote_code)

    def check_teacher_options(self) -> None:
        """Refuse what cannot work."""
        if self.teacher_cache is not None:
            self.teacher_cache = os.path.expanduser(self.teacher_cache)
        self._check_self_teacher()
        self._check_teacher_cache()
        self._check_teacher_server()
        self._check_placement()

    def _check_self_teacher(self) -> None:
        words: dict[str, str | None] = {"true": "initial", "false": None}  # YAML's, and the command line's
        self.self_teacher = words.get(str(self.self_teacher).lower(), self.self_teacher)
        if self.teacher_placement in SELF_TEACHERS:
            expected = f"`self_teacher: {self.teacher_placement}`, or one of them alone"
            self._require("self_teacher", self.self_teacher in (None, self.teacher_placement), expected)
            self.self_teacher, self.teacher_placement = self.teacher_placement, "auto"
        kind = self.self_teacher
        self._require("self_teacher", kind in (None, *SELF_TEACHERS), f"one of {', '.join(SELF_TEACHERS)}")
        moving = "`self_teacher: ema` beside it, the average that it belongs to; leave it out otherwise"
        self._require("self_teacher_decay", self.self_teacher_decay is None or kind == "ema", moving)
        if kind == "ema" and self.self_teacher_decay is None:
            self.self_teacher_decay = _DECAY
        for name in ("teacher_cache", "teacher_adapter") if kind else ():
            expected = f"it left out with `self_teacher: {kind}`, whose answers are the student's own"
            self._require(name, getattr(self, name) is None, expected)

    def _check_teacher_server(self) -> None:
        kind = self.teacher_server_kind
        self._require("teacher_server_kind", kind in SERVER_KINDS, f"one of {', '.join(SERVER_KINDS)}")
        dtypes = NUMBER_DTYPES[kind]
        expected = f"one of {', '.join(dtypes)} for {kind}"
        self._require("teacher_server_dtype", self.teacher_server_dtype in (None, *dtypes), expected)

    def _check_teacher_cache(self) -> None:
        kind = self.teacher_cache_kind
        self._require("teacher_cache_kind", kind in CACHE_KINDS, f"one of {', '.join(CACHE_KINDS)}")
        dtypes = CACHE_KINDS[kind].dtypes
        self._require(
            "teacher_cache_dtype", self.teacher_cache_dtype in (None, *dtypes), f"one of {', '.join(dtypes)} for {kind}"
        )
        require(
            self.teacher_cache is not None or (kind == "hidden" and self.teacher_cache_dtype is None),
            "teacher_cache_dtype" if kind == "hidden" else "teacher_cache_kind",
            self.teacher_cache_dtype if kind == "hidden" else kind,
            "`teacher_cache` beside it: the folder of the cache",
        )

    def _check_placement(self) -> None:
        placement = self.teacher_placement
        self._require("teacher_placement", placement in PLACEMENTS, f"one of {', '.join(PLACEMENTS)}")
        if self.teacher_adapter is not None and placement != "adapter_off":
            raise ConfigurationError(
                f"Got `teacher_adapter: {shown(self.teacher_adapter)}` with `teacher_placement: {placement}`; expected "
                "`adapter_off`, where the teacher is an adapter on the student's base. Set it, or leave the adapter "
                "out."
            )
        if placement == "cached" and self.teacher_cache is None:
            raise ConfigurationError(
                "Got `teacher_placement: cached` without `teacher_cache`; expected the folder of a cache that "
                "`distill-trainers cache-teacher` has filled."
            )
        if self.teacher_cache is not None and placement != "cached" and not PLACEMENTS[placement].has_body:
            raise ConfigurationError(
                f"Got `teacher_cache: {shown(self.teacher_cache)}` with `teacher_placement: {placement}`; expected one "
                "of them. Leave one out; to fill a cache and read it, name the teacher by folder or Hub id, and set "
                "`cached`."
            )
        package = PLACEMENTS[placement].package
        if package is not None and importlib.util.find_spec(package[0]) is None:
            raise ConfigurationError(
                f"Got `teacher_placement: {placement}`, but {package[0]} is not installed; "
                f"`pip install 'distill-trainers[{package[1]}]'`, or take another placement."
            )
