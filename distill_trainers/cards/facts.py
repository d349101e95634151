"""What a model card says of a run: filled in by those who ran it, so that cards know no trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..escaping import code, prose
from ..redaction import without_secrets
from ..run_files import shown

_SHARED_SETTINGS = """
    learning_rate lr_scheduler_type num_train_epochs max_steps weight_decay per_device_train_batch_size
    gradient_accumulation_steps kd_temperature temperature seed
""".split()


@dataclass(frozen=True)
class CardWishes:
    """What the caller of `create_model_card` wants the card to say, in the words of `transformers`.

    Attributes:
        tasks: the first becomes the card's task, the others are tags.
        datasets: Hub ids (`dataset_tags`).
        dataset_names, dataset_args: how the text calls them, and which configuration each is.
    """

    language: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tags: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    dataset_names: list[str] = field(default_factory=list)
    dataset_args: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """A run and the student that came of it.

    Attributes:
        record: what `run.json` says: method, paper, parameters, processes, device, versions and recipe.
        recipe_method: the method as a recipe names it.
        repository: the student's on the Hub, if it has one.
        folder: where the run has written it.
        student: name or folder that its first weights came from; None for a model made in memory.
        teacher: its name or folder; None for a method that asked none.
        teachers: names or folders of several; empty for one alone.
        needs_teacher: whether a recipe must name one.
        trained_parameters: those of the adapter; None where the whole model was trained.
        chats: whether its tokenizer has a chat template.
        data: Hub ids, files and folders of the training rows.
        rows: their number; None for a stream.
        metrics: the last of each name, as logged.
    """

    record: dict[str, Any]
    recipe_method: str
    repository: str | None
    folder: Path
    student: str | None
    student_class: str
    is_encoder_decoder: bool
    trained_parameters: int | None
    chats: bool
    teacher: str | None
    needs_teacher: bool
    data: list[str]
    rows: int | None
    settings: dict[str, Any]
    max_length: int | None
    seed: int
    steps: int
    epochs: float
    seconds: float
    is_finished: bool
    metrics: dict[str, Any]
    card_license: str | None
    hub_token: str | None
    teachers: tuple[str, ...] = ()
    wishes: CardWishes = field(default_factory=CardWishes)

    @property
    def title(self) -> str:
        """The repository, unless the caller wants another name than that of its last part."""
        wanted = self.wishes.model_name
        if self.repository and wanted in (None, self.repository.rpartition("/")[2]):
            return self.repository
        return wanted or "A distilled student"

    @property
    def data_names(self) -> list[str]:
        """Markdown of what the text says of the data: the caller's names before the sources that are known."""
        wishes = self.wishes
        args = [*wishes.dataset_args, *[""] * len(wishes.dataset_names)]
        named = [f"{name} ({arg})" if arg else name for name, arg in zip(wishes.dataset_names, args, strict=False)]
        return [prose(shown(name)) for name in named] + [code(shown(source)) for source in self.data]

    @property
    def is_adapter(self) -> bool:
        """Whether the student is a base and an adapter."""
        return self.trained_parameters is not None


def shown_settings(args: Any) -> dict[str, Any]:
    """Return the method's own settings and those of the optimiser that decide a run, without local paths."""
    names = [name for name in type(args).__dataclass_fields__ if name in type(args).__dict__.get("__annotations__", {})]
    names += _SHARED_SETTINGS
    if args.per_device_train_tokens is not None:
        names[names.index("per_device_train_batch_size")] = "per_device_train_tokens"
    names += getattr(args, "chosen_rewards", [])
    names += ["teacher_cache_kind"] if args.teacher_cache else []
    corrected = args.sampler_correction != "none"
    names += ["sampler_correction", "sampler_ratio_min", "sampler_ratio_max"] if corrected else []
    names += [name for name in ("self_teacher", "self_teacher_decay") if getattr(args, name)]
    names += [name for name in ("quantize_student", "quantize_group_size") if getattr(args, name)]
    names += ["teacher_tokenizer", "cross_tokenizer", "alm_temperature"] if args.has_own_tokenizer else []
    names += ["teacher_placement"] if args.teacher_placement != "auto" else []
    chosen = {name: getattr(args, name) for name in names}
    plain = {name: getattr(value, "value", value) for name, value in chosen.items() if value is not None}
    told = without_secrets(plain)
    return {name: shown(value) if isinstance(value, str) else value for name, value in told.items()}
