"""The finished student as others load it: its generation config, adapters merged or not, its card, and the Hub."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from ... import hub, models
from ...cards.facts import CardFacts, CardWishes, shown_settings
from ...cards.model_card import inherited_terms, model_card
from ...cards.plots import plot_history
from ...data.chat import turn_end_id
from ...data.packing import count_rows
from ...exceptions import ConfigurationError
from ...locks import holding
from ...redaction import NOT_SHOWN, hidden
from ...storage import write_file, writing_folder, writing_into
from ..protocol import METHODS
from .proof import Proof

if TYPE_CHECKING:
    from ..config import DistillConfig

logger = logging.getLogger(__name__)

MERGED_NAME = "merged"
INTEGERS_NAME = "quantized_base"  # below an adapter
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")  # one whole model, in one file or in parts


def check(args: DistillConfig, student: Any, adapted: bool, quantized: bool = False) -> None:
    """Refuse uploads and mergers that cannot work, before anything is loaded.

    Args:
        adapted: whether it gets, or has, an adapter.
        quantized: whether its weights are loaded in 4 or 8 bits.

    Raises:
        ConfigurationError, HubError: see `hub.check_access`; or the adapter would name a base that nobody else has.
    """
    adapted = adapted or (isinstance(student, nn.Module) and models.is_peft(student))
    quantized = quantized or bool(getattr(student, "is_quantized", False))
    if args.merge_adapter and not adapted:
        raise ConfigurationError(
            "Got `merge_adapter: true`, but the student has no adapter. Set `use_peft: true` (in Python: "
            "`peft_config`), or leave it out."
        )
    if args.merge_adapter and quantized:
        raise ConfigurationError(
            "Got `merge_adapter: true` with a quantised student: its weights would be rounded once more. Upload the "
            "adapter (`merge_adapter: false`), and merge it into the base's full weights later."
        )
    if not args.push_to_hub:
        return
    if adapted and args.quantize_student is not None:
        raise ConfigurationError(
            f"Got `push_to_hub: true` with an adapter and `quantize_student: {args.quantize_student}`: the adapter is "
            f"one of the integers in `{INTEGERS_NAME}`, which nobody else has. Upload that folder first, and then the "
            "adapter with its name as the base; or train without an adapter."
        )
    base = student if isinstance(student, str) else models.source_of(student)
    if adapted and not args.merge_adapter and (not base or models.looks_like_path(base)):
        raise ConfigurationError(
            f"The adapter would be uploaded beside the name of its base, but that is {_what(base)}, which nobody else "
            "can load. Set `merge_adapter: true` to upload a whole model, or train on a base from the Hub."
        )
    from accelerate import PartialState

    if PartialState().is_main_process:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        hub.check_access(name, token=args.hub_token, private=args.hub_private_repo, revision=args.hub_revision)


def _what(base: str | None) -> str:
    return f"the local folder {base!r}" if base else "a model in memory"


def check_merger(args: DistillConfig, student: nn.Module, accelerator: Any) -> None:
    """Refuse adapters that cannot be merged; a sharded student's is merged into what is on disk, by its name.

    Raises:
        ConfigurationError: it is of such a kind, or a sharded student was made in memory.
    """
    if args.merge_adapter:
        models.refuse_unmergeable(student)
    if args.merge_adapter and _is_sharded(accelerator) and not models.source_of(student):
        raise ConfigurationError(
            "Got `merge_adapter: true` under ZeRO-3 or FSDP2 with a student made in memory; expected one loaded by "
            "name, whose whole weights can be read again. Save it first and pass the folder as `model`."
        )


def _is_sharded(accelerator: Any) -> bool:
    return models.zero_stage(accelerator) == 3 or models.fsdp_version(accelerator) == 2


def make_generable(model: nn.Module, tokenizer: Any) -> None:
    """Give a model the generation config with which it ends as it was trained to end, wherever it is loaded.

    Its ends are the tokenizer's EOS, those it had, and the chat template's end of turn. A config that transformers
    would refuse to save (temperature without sampling) is fixed.
    """
    causal_lm: Any = models.causal_lm_of(model)
    config = getattr(causal_lm, "generation_config", None)
    if config is None or tokenizer is None:
        return
    ends = models.eos_ids(causal_lm, tokenizer)
    turn_end = turn_end_id(tokenizer)
    ends += [] if turn_end is None or turn_end in ends else [turn_end]
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if _is_valid(config):
        return
    config.do_sample = True  # what its temperature, top_p or top_k were meant for
    if not _is_valid(config):
        logger.warning("The student's generation config is invalid; only its special tokens are kept.")
        special_ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        causal_lm.generation_config = GenerationConfig(**special_ids)


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


class Publishing(Trainer):
    """What of `DistillTrainer` saves the student for others, and uploads it."""

    _wishes = CardWishes()  # of whoever called `create_model_card`
    _told_of_base = False
    _is_for_others = False  # what is saved: a checkpoint has weights to train in the place of integers

    if TYPE_CHECKING:
        args: Any
        model: nn.Module
        hub_model_id: Any
        data_sources: list[str]
        proof: Proof

    # ---- Saving -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do as `transformers.Trainer.save_model`; with `merge_adapter`, the run's folder also gets `merged`.

        Raises:
            ConfigurationError: another run has begun in the run's folder; save to another one.
            UnlikeModelError: what was saved does not answer as what was trained; nothing is uploaded.
        """
        is_run_folder = output_dir is None or Path(output_dir) == Path(self.args.output_dir)
        locks = is_run_folder and self.args.process_index == 0
        with holding(self.args.output_dir) if locks else contextlib.nullcontext():
            if is_run_folder:
                self._finish_current_push()  # which reads the files that are written now
            make_generable(self.model, self.processing_class)
            self._is_for_others = is_run_folder or not _internal_call
            try:
                super().save_model(output_dir, _internal_call=True)  # else it uploads before `merged` is there
            finally:
                self._is_for_others = False
            if is_run_folder and self.args.merge_adapter:
                self._save_merged()
        if is_run_folder or not _internal_call:  # checkpoints are read again by those who go on from them
            self.proof.check(self.published_folder if is_run_folder else Path(str(output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with self._args_without_secrets(), self._quantized_for(folder) as changed:
            state_dict = None if changed else state_dict
            if folder != Path(self.args.output_dir) or not self.args.should_save:  # a checkpoint is new or put away
                return super()._save(output_dir, state_dict)
            remedy = "Checkpoints and what was there before are as they were: free some space and go on with "
            remedy += "`--resume_from_checkpoint true`."
            with writing_into(folder, "the student", remedy, replaces=_WEIGHTS) as filled:
                super()._save(str(filled), state_dict)

    def save_state(self) -> None:
        """Do as `transformers.Trainer.save_state`."""
        if self.is_world_process_zero():
            folder, remedy = Path(self.args.output_dir), "The student beside it is saved: free some space."
            with writing_into(folder, "the state of the run", remedy) as filled:
                self.state.save_to_json(str(filled / TRAINER_STATE_NAME))

    @contextlib.contextmanager
    def _quantized_for(self, folder: Path) -> Iterator[bool]:
        """Let what is saved for others be integers: the student, or a base of its own for the adapter."""
        trained: Any = self.model
        if self.args.quantize_student is None or not self._is_for_others:
            yield False
            return
        integers = models.integer_copy(trained)
        if models.is_peft(trained):
            base, remedy = folder / INTEGERS_NAME, "Checkpoints are as they were: free some space."
            with writing_folder(base, "the quantised base of the adapter", remedy) as whole:
                integers.save_pretrained(whole)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(whole)
            with models.naming_base(trained, str(base)):
                yield False
            return
        self.model = integers
        try:
            yield True
        finally:
            self.model = trained

    @contextlib.contextmanager
    def _args_without_secrets(self) -> Iterator[None]:
        """Let `training_args.bin`, which transformers pickles from the trainer's `args`, hold no token."""
        args, kept = self.args, copy.copy(self.args)
        for field in fields(args):
            told = hidden(getattr(args, field.name, None), field.name)
            setattr(kept, field.name, None if isinstance(told, str) and told == NOT_SHOWN else told)
        self.args = kept
        try:
            yield
        finally:
            self.args = args

    @property
    def published_folder(self) -> Path:
        """What is uploaded once training is over."""
        folder = Path(self.args.output_dir)
        return folder / MERGED_NAME if self.args.merge_adapter else folder

    def _save_merged(self) -> None:
        args = self.args
        if not args.should_save:
            return
        if _is_sharded(self.accelerator):
            with models.whole_loading():
                kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
                kwargs |= models.settled_kwargs(args.model_init_kwargs, "model_init_kwargs")
                merged = models.load_merged_adapter(args.output_dir, **kwargs)
            make_generable(merged, self.processing_class)
        else:
            merged = models.merged_copy(self.model)
        folder = self.published_folder
        remedy = f"Its adapter is in {self.args.output_dir}: free some space, and merge it with PEFT's "
        remedy += "`merge_and_unload`."
        with writing_folder(folder, "the merged student", remedy) as whole:
            merged.save_pretrained(whole)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(whole)

    def card_facts(self: Any) -> CardFacts:
        """Return what the student's card says of this run."""
        args, state, adapted = self.args, self.state, models.is_peft(self.model)
        names = [name for name, row in METHODS.items() if row and isinstance(self, row[1])]
        logged = {name: value for entry in state.log_history for name, value in entry.items()}  # callbacks' values, too
        return CardFacts(
            record=self.recorder.facts(),
            recipe_method=names[0] if names else self.method_name,
            repository=args.hub_model_id,
            folder=Path(args.output_dir),
            student=models.source_of(self.model),
            student_class=type(models.causal_lm_of(self.model)).__name__,
            is_encoder_decoder=models.is_encoder_decoder(self.model),
            trained_parameters=models.num_parameters(self.model, trainable_only=True) if adapted else None,
            chats=bool(getattr(self.processing_class, "chat_template", None)),
            teacher=None if self.teacher.is_nobody else self.teacher.name,
            teachers=tuple(self.teacher.parts.values()),
            needs_teacher=bool(args.needs) and not self.teacher.is_the_student,
            data=self.data_sources,
            rows=count_rows(self.train_dataset),
            settings=shown_settings(args),
            max_length=args.max_length,
            seed=args.seed,
            steps=state.global_step,
            epochs=state.epoch or 0,
            seconds=sum(float(entry.get("train_runtime", 0)) for entry in state.log_history),
            is_finished=args.max_steps <= 0 or state.global_step >= args.max_steps,
            metrics={**logged, **self.last_eval_metrics},
            card_license=args.card_license,
            hub_token=args.hub_token,
            wishes=self._wishes,
        )

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | list[str] | None = None,
    ) -> None:
        """Write README.md and its plots into the output directory, and beside the merged student.

        The arguments are those of `transformers.Trainer`, and TRL's `dataset_name`, which is a Hub id as `dataset_tags`
        are. What is given once stays in every later card of the run.

        Raises:
            ConfigurationError: an argument is neither text nor, where several make sense, a list of texts.
        """
        words = {"license": license, "model_name": model_name, "finetuned_from": finetuned_from}
        several = {"language": language, "tags": tags, "tasks": tasks, "dataset_tags": dataset_tags}
        several |= {"dataset": dataset, "dataset_args": dataset_args, "dataset_name": dataset_name}
        for name, value in {**words, **several}.items():
            parts = value if name in several and isinstance(value, list | tuple | set) else [value]
            if not all(isinstance(part, str | None) for part in parts):
                expected = "a text or a list of texts" if name in several else "a text"
                raise ConfigurationError(f"Got `{name}={value!r}` for the model card; expected {expected}.")
        lists = {"tags": tags, "tasks": tasks, "datasets": dataset_tags or dataset_name}
        lists |= {"dataset_names": dataset, "dataset_args": dataset_args}
        wishes: dict[str, Any] = {
            name: [value] if isinstance(value, str) else list(value) for name, value in lists.items() if value
        }
        wishes |= {name: word for name, word in words.items() if word and name != "license"}
        if language:
            wishes["language"] = language if isinstance(language, str) else list(language)
        self._wishes = replace(self._wishes, **wishes)
        if license is not None:
            self.args.card_license = license
        if not self.is_world_process_zero():
            return
        folder, history, facts = Path(self.args.output_dir), self.state.log_history, self.card_facts()
        plots: list[str] = []
        if any("loss" in entry for entry in history):
            plots = [f"plots/{file.name}" for file in plot_history(history, folder / "plots")]
        self._write_card(folder, model_card(facts, plots=plots))
        if self.args.merge_adapter and self.published_folder.is_dir():
            for name in [*plots, "metrics.json"]:
                if (folder / name).is_file():
                    beside = "The student beside it is saved."
                    write_file(self.published_folder / name, (folder / name).read_bytes(), "the card's files", beside)
            self._write_card(self.published_folder, model_card(facts, merged=True, plots=plots))
        terms = inherited_terms(facts)
        for warning in filter(None, [*terms.conflicts, terms.difference()]):
            logger.warning("Licences: %s", warning)

    def _write_card(self, folder: Path, text: str) -> None:
        write_file(folder / "README.md", text, "the model card", "The student beside it is saved.")

    # ---- The Hub ----------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do as `transformers.Trainer`; errors say what to do."""
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with hub.talking_to_hub(f"make the repository {name!r}"):
            super().init_hf_repo(token=token, private=private)
            if self.args.hub_revision and self.is_world_process_zero():
                from huggingface_hub import HfApi

                api = HfApi(token=token or self.args.hub_token)
                api.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the student, write its card, and upload what `hub.published_files` names, as `transformers.Trainer`.

        What was interrupted goes on where it stopped.

        Raises:
            HubError: the student is saved, but not uploaded.
        """
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        remedy = f"The student is saved in {str(self.published_folder)!r}; upload it later with "
        remedy += f"`distill-trainers push {self.published_folder} --repo {name}`."
        with hub.talking_to_hub(f"upload to {name!r}", remedy), models.uploading(self._finished):
            return super().push_to_hub(*args, **kwargs)

    def _finished(self, upload: dict[str, Any]) -> dict[str, Any]:
        return _published({**upload, "folder_path": str(self.published_folder)})

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._is_adapter_of_a_folder(Path(checkpoint_folder)):
            return
        # A file that is rewritten while it is uploaded comes shorter than was said, and server and client wait forever.
        running = getattr(self, "push_in_progress", None)
        if running is not None and not running.is_done():
            if not self.args.hub_always_push:
                return
            running.wait_until_done()
        self._tell_failed_pushes()
        if self.args.hub_strategy != "end":
            self.create_model_card()

        token = self.args.hub_token

        def change(upload: dict[str, Any]) -> dict[str, Any]:
            upload = {**upload, "token": token}
            if upload.get("path_in_repo"):  # a checkpoint to resume from, whole
                return {**upload, "allow_patterns": hub.patterns_of(hub.checkpoint_files(upload["folder_path"]))}
            return _published(upload)

        with models.uploading(change), self._args_without_secrets():
            super()._push_from_checkpoint(checkpoint_folder)

    def _is_adapter_of_a_folder(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint is of no use elsewhere, and would publish where this machine keeps its base."""
        base = hub.read_json(checkpoint / "adapter_config.json").get("base_model_name_or_path")
        is_local = bool(base) and models.looks_like_path(str(base))
        if is_local and not self._told_of_base:
            self._told_of_base = True
            logger.warning("Nothing is uploaded before the end: the adapter's base is a folder of this machine.")
        return is_local

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Uploads beside training fail without a word otherwise; they cost no training."""
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", None) or []
        for job in [upload for upload in jobs if upload.done()]:
            jobs.remove(job)
            error = None if job.cancelled() else job.exception()
            if error is not None:
                logger.warning(
                    "An upload to %r failed, and training goes on: %s The next one sends what is missing.",
                    self.hub_model_id,
                    hub.reason(error),
                )


def _published(upload: dict[str, Any]) -> dict[str, Any]:
    """An upload of a student's folder: what is published of it, and other weights out of the repository."""
    folder = upload["folder_path"]
    return {
        **upload,
        "allow_patterns": hub.patterns_of(hub.published_files(folder)),
        "delete_patterns": hub.stale_weights(folder),
    }
