"""Settings about teachers: one dataclass, whose flat fields every trainer's config has."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.teacher_prompts import names_in
from ..exceptions import ConfigurationError
from ..installing import pip_install
from ..models import which_files
from ..settings import Checked, require, setting, shown
from ..value_types import parse_mapping
from .cache.packing import CACHE_KINDS
from .placement import PLACEMENTS, SELF_TEACHERS
from .remote.wire import NUMBER_DTYPES, SERVER_KINDS

MIXES = ("geometric", "arithmetic")

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


TOO_LONG = ("error", "drop")
SHARED, OWN = "shared", "own"  # of `teacher_tokenizer`


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

    # A teacher with another tokenizer
    teacher_tokenizer: str = setting(
        SHARED,
        "Whose ids the teacher reads: the student's (shared), or its own ones of the same text: own, or the folder or "
        "Hub id of its tokenizer where none lies beside it (a server, a cache).",
    )

    # What the teacher reads in place of the student's prompt
    teacher_system_prompt: str | None = setting(
        None, "System prompt of the teacher alone; a system message of the row follows it in the same message."
    )
    teacher_prompt: str | None = setting(
        None,
        "What the teacher is asked: a template such as '{prompt} Hint: {hint}' over columns and what the student is "
        "asked ({prompt}), or the name of a column of text or messages.",
    )
    teacher_max_length: int | None = setting(
        None, "Longest row of the teacher, its own prompt plus completion, in tokens; nothing of it is cut.", least=2
    )
    teacher_too_long: str = setting(
        "error", f"What happens to rows that are longer for the teacher: one of {', '.join(TOO_LONG)}."
    )

    # Several teachers
    teacher_column: str = setting("teacher", "With several teachers: the column that names the teacher of each row.")
    teacher_mix: str | None = setting(
        None, f"Make one teacher of several, by their {' or '.join(MIXES)} mean, in place of one for each row."
    )
    teacher_weights: dict[str, float] | str | None = setting(
        None, "Of teacher_mix, such as {math: 0.7, code: 0.3}, adding up to 1; by default equal (JSON)."
    )
    extrapolate: dict[str, Any] | str | None = setting(
        None,
        "Move each teacher away from a reference, such as {reference: initial, scale: 1.25}: the student before "
        "training, or one of several teachers (JSON).",
    )
    weak_to_strong: dict[str, Any] | str | None = setting(
        None,
        "Make one teacher of three: base + alpha * (plus - minus) in logits, such as {base: large, plus: tuned, minus: "
        "raw, alpha: 1.0} (JSON).",
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
        None,
        "Of what is kept; by default hidden states as the teacher gives them, a top k in int8 (all ids: float32), else "
        "float32.",
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
        300.0, "Seconds for which a teacher server that is away is waited for; .inf: for ever.", above=0
    )

    @property
    def defers_teacher(self) -> bool:
        """Whether a teacher given by name is loaded only when it is asked."""
        return False

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the teacher reads its own ids of the student's text."""
        return self.teacher_tokenizer != SHARED

    @property
    def composes_teachers(self) -> bool:
        """Whether several teachers, or one and a reference, are made one."""
        return any(getattr(self, name) is not None for name in ("teacher_mix", "extrapolate", "weak_to_strong"))

    def files_of(self, role: str) -> dict[str, Any]:
        """Return the arguments with which config and tokenizer of the "student" or "teacher" are read."""
        given: Any = getattr(self, "model_init_kwargs" if role == "student" else "teacher_model_init_kwargs", None)
        return which_files(given, self.trust_remote_code)

    def check_teacher_options(self) -> None:
        """Refuse what cannot work."""
        if self.teacher_cache is not None:
            self.teacher_cache = os.path.expanduser(self.teacher_cache)
        self._check_view()
        self._check_self_teacher()
        self._check_teacher_cache()
        self._check_teacher_server()
        for name in ("teacher_weights", "extrapolate", "weak_to_strong"):
            if isinstance(text := getattr(self, name), str):
                setattr(self, name, parse_mapping(text))
        self._check_composition()
        self._check_placement()

    def _check_view(self) -> None:
        if "{" in (self.teacher_prompt or ""):
            names_in(str(self.teacher_prompt))  # it says what is no template
        self._require("teacher_too_long", self.teacher_too_long in TOO_LONG, f"one of {', '.join(TOO_LONG)}")
        self._require(
            "teacher_too_long",
            self.teacher_too_long == "error" or self.teacher_max_length is not None,
            "`teacher_max_length` beside it: the length that is too long",
        )

    def _check_composition(self) -> None:
        self._require("teacher_mix", self.teacher_mix in (None, *MIXES), f"one of {', '.join(MIXES)}")
        mixed = self.teacher_mix is not None
        self._require("teacher_weights", mixed or self.teacher_weights is None, "`teacher_mix` beside it")
        given = [name for name in ("teacher_mix", "extrapolate", "weak_to_strong") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(
                f"Got {' and '.join(f'`{name}`' for name in given)}, which both say what one teacher is made of; "
                "expected one of them. In Python, compose a ComposedTeacher of ComposedTeachers."
            )
        self._check_numbers("extrapolate", {"reference": None, "scale": 1.25})
        self._check_numbers("weak_to_strong", {"base": None, "plus": None, "minus": None, "alpha": 1.0})

    def _check_numbers(self, setting: str, parts: dict[str, float | None]) -> None:
        """Fill in what has a default; names of teachers have none."""
        given: Any = getattr(self, setting)
        if given is None:
            return
        names = [part for part, default in parts.items() if default is None]
        whole = {part: default for part, default in parts.items() if default is not None} | dict(given)
        fits = whole.keys() == parts.keys() and all(isinstance(whole[name], str) for name in names)
        for number in parts.keys() - set(names):
            value = whole.get(number)
            fits &= isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        example = ", ".join(f"{part}: {'NAME' if default is None else default}" for part, default in parts.items())
        self._require(setting, fits, f"{{{example}}}, names of teachers and a number")
        setattr(self, setting, whole)

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
                f"`{pip_install(package[1])}`, or take another placement."
            )
