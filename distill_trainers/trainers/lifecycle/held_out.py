"""The measures of `evaluation` at each evaluation of a run, on a few held-out prompts that both models complete.

The student's completions are new each time, from the same random numbers; the teacher's, from others, are made once and
kept. Scores go into the metrics of the evaluation before anybody reads them: logs, trackers, the choice of the best
model and early stopping see them like any other.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from ... import models
from ...data.views import has_view, teacher_prompt
from ...evaluation import METRICS, EvaluationSettings
from ...evaluation.accuracy import answer_parser
from ...evaluation.agreement import comparison_terms
from ...evaluation.collect import Collected
from ...evaluation.examples import Example, ExampleSet
from ...evaluation.exposure import covered_length
from ...evaluation.intervals import Sums
from ...evaluation.measures import MEASURES, NEED_A_TEACHER, NEED_SAMPLES
from ...evaluation.scores import scores_of
from ...evaluation.teacher_forced import Text, TokenValues, force
from ...exceptions import ConfigurationError, DatasetError
from ...losses.reduction import trained_mask
from ...randomness import Role
from ...requirements import Requirements
from ...rollouts import CompletionSettings, complete_prompts, local_engine
from ...rollouts.store import prompt_key
from ...storage import content_key, write_file
from ...teachers import Teacher
from ..protocol import Run
from .completions import completion_store, teachers_tokenizer
from .side_by_side import SideBySide, log_side_by_side

logger = logging.getLogger(__name__)

# The whole evaluation set gives a perplexity; speed is no score of training.
HELD_OUT_METRICS = tuple(name for name in METRICS if name not in ("perplexity", "speed"))
# What an evaluation tells without them.
ALWAYS_THERE = frozenset({"perplexity", "kl", "top1_agreement", "accuracy", "answered", "tokens_per_answer"})
INITIAL_NAME = "initial_scores.json"


def check(args: Any, eval_dataset: Any, teacher: type[Teacher], wants: Requirements) -> None:
    """Refuse measures that cannot be taken, before anything is loaded.

    Raises:
        ConfigurationError, DatasetError: which, and what they need.
    """
    names = args.eval_measures or []
    best = (args.metric_for_best_model or "").removeprefix("eval_").removeprefix("gap_closed_").removeprefix("teacher_")
    if best in MEASURES and best not in ALWAYS_THERE and MEASURES[best].metric not in names:
        raise ConfigurationError(
            f"Got `metric_for_best_model: {args.metric_for_best_model}`, which is measured only with "
            f"`eval_measures: [{MEASURES[best].metric}]`. Add it, or choose another metric."
        )
    if not names:
        return
    if eval_dataset is None:
        raise DatasetError(f"Got `eval_measures: {names}` but no `eval_dataset`, whose first rows they are taken on.")
    if args.max_new_tokens >= args.row_limit:
        raise ConfigurationError(
            f"Got `eval_measures` with max_new_tokens={args.max_new_tokens} and max_length={args.max_length}, which "
            "leaves no room for a prompt. Raise max_length, or lower max_new_tokens."
        )
    if "consistency" in names and args.eval_measures_seeds < 2:
        raise ConfigurationError(
            f"Got `eval_measures: {names}` with `eval_measures_seeds: {args.eval_measures_seeds}`; consistency "
            "compares the samples of at least 2 seeds."
        )
    if args.teacher_cache is not None and set(names) & NEED_A_TEACHER:
        raise ConfigurationError(
            f"Got `eval_measures: {names}` with a `teacher_cache`, which has no answers to text that a student is "
            f"going to write. Leave out {' and '.join(sorted(set(names) & NEED_A_TEACHER))}, or the cache."
        )
    if wants.encoder_decoder:
        raise ConfigurationError(
            "Got `eval_measures` for an encoder-decoder student; expected a causal LM. Leave them out: "
            "`eval_accuracy` scores such students."
        )
    lost = sorted(set(names) & NEED_A_TEACHER)
    if lost and args.has_own_tokenizer:
        raise ConfigurationError(
            f"Got `eval_measures: {names}` with `teacher_tokenizer: {args.teacher_tokenizer}`, of which "
            f"{' and '.join(lost)} compares both models id by id. Leave it out: the terms of `cross_tokenizer` are "
            "measured at each evaluation."
        )
    if lost and not teacher.can_read_rollouts:
        raise ConfigurationError(
            f"Got `eval_measures: {names}`, but the teacher is a {teacher.__name__}, which "
            f"cannot read a student's text. Leave out {' and '.join(lost)}."
        )
    if "exposure_bias" in lost and not teacher.can_generate:
        raise ConfigurationError(
            f"Got `eval_measures: {names}`, but the teacher is a {teacher.__name__}, which writes no "
            "text of its own. Leave out exposure_bias."
        )
    held_out_settings(args).check()


def held_out_settings(args: Any) -> EvaluationSettings:
    """Say how a run's measures are taken: sampled at temperature 1, whatever its rollouts are."""
    return EvaluationSettings(
        metrics=list(args.eval_measures),
        max_length=args.row_limit,
        max_new_tokens=args.max_new_tokens,
        seeds=[args.seed + k for k in range(args.eval_measures_seeds)],
        stop_strings=args.stop_strings,
        batch_size=args.rollout_batch_size or args.per_device_eval_batch_size,
        answer_formats=getattr(args, "answer_formats", None),
        answer_kind=getattr(args, "answer_kind", "auto"),
    )


class HeldOutMeasures(TrainerCallback):
    """Takes the measures of a run; `DistillTrainer` adds it where `eval_measures` asks for any.

    Args:
        run: with its models in place.
    """

    def __init__(self, run: Run):
        self.run, args = run, run.args
        self.settings = held_out_settings(args)
        self.metrics = [name for name in METRICS if name in (args.eval_measures or [])]
        teacher = run.teacher
        self.teacher_writes = teacher.can_read_rollouts and teacher.can_generate
        self._parse = answer_parser(self.settings.answer_formats or ())
        self.examples: ExampleSet | None = None
        self._teacher: Collected | None = None
        self._teacher_scores: dict[str, float] = {}
        self._initial: dict[str, float] | None = None
        self._exposure_length: int | None = None
        self._taken: tuple[int, dict[str, float]] | None = None  # at which step

    # ---- When -------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the scores of the student before training, from which the gap is counted."""
        self._taken = None
        if state.global_step == 0:
            sets = self.run.eval_dataset
            first = next(iter(sets)) if isinstance(sets, dict) else None
            self.take(self.run.get_eval_dataloader(first).dataset)

    def take(self, rows: Any) -> dict[str, float]:
        """Return this step's scores by logged name, without `eval_`; several evaluation sets share them.

        Args:
            rows: prepared rows; those of the first call are kept.
        """
        step = self.run.state.global_step
        if self._taken is not None and self._taken[0] == step and self.run.is_in_train:
            return self._taken[1]
        if self.examples is None:
            self.examples = ExampleSet(self._examples(rows))
            self._take_teacher()
        self._recall(step)
        model = self.run.model_wrapped
        was_training = model.training
        model.eval()
        try:
            collected = self._collect(model)
        finally:
            model.train(was_training)
        scores = {name: sums.value for name, sums in self._scores(collected).items()}
        self._remember(scores, step)
        logged = dict(scores)
        theirs = {name: v for name, v in self._teacher_scores.items() if MEASURES[name].metric not in NEED_A_TEACHER}
        logged |= {f"teacher_{name}": value for name, value in theirs.items() if name in scores}
        logged |= {f"gap_closed_{name}": value for name, value in self._gaps(scores).items()}
        logged = {name: value for name, value in logged.items() if value == value}  # a NaN is no score
        self._taken = (step, logged)
        if self.run.accelerator.is_main_process:
            callbacks = self.run.callback_handler.callbacks
            log_side_by_side(self.run.args, callbacks, step, self._side_by_side(collected))
        return logged

    # ---- What -------------------------------------------------------------------------------------------------------

    def _examples(self, rows: Any) -> list[Example]:
        room = self.settings.max_length - self.settings.max_new_tokens
        rows_read: list[Example] = []
        for row in rows:
            ids, start = list(row["input_ids"]), row["prompt_length"]
            if start == 0:
                continue
            completion = ids[start:]
            reference = self._text(completion) if completion else ""
            answer = row.get("reference") or (self._parse(reference) if reference else None)
            references = [reference] if reference else []
            choices, task = list(row.get("choices") or []), row.get("task") or ""
            example = Example(ids[:start][-room:], completion, references, answer, choices, task)
            rows_read.append(replace(example, teacher_prompt_ids=teacher_prompt(row) if has_view(row) else None))
            if len(rows_read) == self.run.args.eval_measures_rows:
                break
        examples = ExampleSet(rows_read)
        missing = {"rouge_l": "references", "accuracy": "questions", "consistency": "questions"}
        wrong = [name for name in self.metrics if not examples.subsets[missing.get(name, "prompts")]]
        if wrong:
            raise DatasetError(
                f"Got `eval_measures: {self.metrics}`, but the first {self.run.args.eval_measures_rows} rows of "
                f"the evaluation set have no {missing.get(wrong[0], 'prompts')} for {wrong[0]}. Leave it out, or give "
                "them."
            )
        return rows_read

    def _collect(self, model: nn.Module) -> Collected:
        """What the student writes and how it reads, over all processes."""
        assert self.examples is not None
        run, examples = self.run, self.examples
        collected = Collected(end_ids=list(run.sampling.eos_token_ids))
        collected.samples = self._sample(lambda: models.generating(model, run.accelerator), collected.end_ids)
        if "accuracy" in self.metrics:
            generating = models.generating(model, run.accelerator)
            collected.greedy = self._complete(examples.questions, generating, collected.end_ids, greedy=True)
        self._answer(collected)
        metrics = set(self.metrics)
        if metrics & {"agreement", "calibration"}:
            collected.reference = self._read(model, [e.behind(e.completion_ids) for e in examples.with_text])
        if metrics & NEED_A_TEACHER:
            own = zip(examples.prompted, collected.samples[0], strict=True)
            collected.own_text = self._read(model, [e.behind(ids) for e, ids in own])
        if "exposure_bias" in metrics:
            assert self._teacher is not None
            theirs = zip(examples.prompted, self._teacher.samples[0], strict=True)
            collected.teacher_text = self._read(model, [e.behind(ids) for e, ids in theirs])
        return collected

    def _answer(self, collected: Collected) -> None:
        assert self.examples is not None
        collected.read_answers(self.examples, self.metrics, self.settings, self.run.processing_class)

    def _take_teacher(self) -> None:
        """The teacher's own completions and scores, once."""
        if not self.teacher_writes:
            return
        teacher, run = self.run.teacher, self.run
        assert self.examples is not None
        ends = teacher.eos_ids(teachers_tokenizer(run))
        # Texts in ids of the teacher's own have become the student's by then.
        collected = Collected(end_ids=ends if run.requirements.other is None else list(run.sampling.eos_token_ids))

        def generating() -> Any:
            return teacher.generating(run.accelerator)

        collected.samples = self._sample(generating, ends, teacher.fingerprint())
        if "accuracy" in self.metrics:
            collected.greedy = self._complete(
                self.examples.questions, generating(), ends, greedy=True, fingerprint=teacher.fingerprint()
            )
        self._answer(collected)
        self._teacher = collected
        # How the teacher reads references is not measured here.
        metrics = [name for name in self.metrics if name != "calibration"]
        self._teacher_scores = {name: sums.value for name, sums in self._scores(collected, metrics, True).items()}

    def _scores(self, texts: Collected, metrics: list[str] | None = None, is_teacher: bool = False) -> dict[str, Sums]:
        assert self.examples is not None
        length = 1 if is_teacher else self._covered(texts)  # a teacher has no error at any length
        metrics = self.metrics if metrics is None else metrics
        tokenizer = self.run.processing_class
        return scores_of(
            texts, self.examples, self.settings, metrics, tokenizer, is_teacher=is_teacher, exposure_length=length
        )[0]

    def _covered(self, texts: Collected) -> int | None:
        """Return l of ExAccErr(l), the same at all evaluations of a run: each further position would add to it."""
        if "exposure_bias" not in self.metrics or self._teacher is None:
            return None
        if self._exposure_length is None:
            self._exposure_length = covered_length([texts.samples[0], self._teacher.samples[0]])
        longest = max(map(len, texts.samples[0]))
        if longest >= self._exposure_length:
            return self._exposure_length
        logger.warning(
            "exposure_error is left out of step %d: it is taken over %d tokens in this run, and the student's longest "
            "completion now has %d.",
            self.run.state.global_step,
            self._exposure_length,
            longest,
        )
        return None

    def _gaps(self, scores: dict[str, float]) -> dict[str, float]:
        """(now − initial) / (teacher − initial), where all three are known and the gap is not 0."""
        gaps, initial = {}, self._initial or {}
        for name in scores.keys() & initial.keys() & self._teacher_scores.keys():
            gap = self._teacher_scores[name] - initial[name]
            if gap:
                gaps[name] = (scores[name] - initial[name]) / gap
        return {name: gaps[name] for name in scores if name in gaps}

    @property
    def _file(self) -> Path:
        """What a run that goes on from a checkpoint must know of its first evaluation."""
        return Path(self.run.args.output_dir) / INITIAL_NAME

    @property
    def _key(self) -> str:
        assert self.examples is not None
        prompts = [example.prompt_ids for example in self.examples.examples]
        return content_key(prompts, self.settings.metrics, self.settings.seeds, self.settings.max_new_tokens)

    def _remember(self, scores: dict[str, float], step: int) -> None:
        if step:
            return
        self._initial = scores
        if self.run.accelerator.is_main_process and self.run.is_in_train:
            record = {"key": self._key, "scores": scores, "exposure_length": self._exposure_length}
            write_file(self._file, json.dumps(record), "the scores of the first evaluation", "Free some space.")

    def _recall(self, step: int) -> None:
        """Take up what another process of this run has remembered; all processes take the main one's."""
        if step == 0 or self._initial is not None:
            return
        text = self._file.read_text() if self.run.accelerator.is_main_process and self._file.is_file() else "{}"
        record = json.loads(gather_object([text])[0])
        if record.get("key") == self._key:
            self._initial, self._exposure_length = record["scores"], record.get("exposure_length")

    def _side_by_side(self, of_student: Collected) -> list[SideBySide]:
        assert self.examples is not None
        samples = []
        for i, example in enumerate(self.examples.prompted[: self.run.args.eval_measures_shown]):
            texts = {"student": of_student, "teacher": self._teacher}
            written = {
                name: self._text(of_model.samples[0][i])
                for name, of_model in texts.items()
                if of_model is not None and of_model.samples
            }
            if written:
                reference = next(iter(example.references), "")
                samples.append(SideBySide(self._text(example.prompt_ids), reference, **written))
        return samples

    def _text(self, ids: list[int]) -> str:
        return str(self.run.processing_class.decode(ids, skip_special_tokens=True))

    # ---- How --------------------------------------------------------------------------------------------------------

    def _sample(self, generating: Any, end_ids: list[int], fingerprint: str | None = None) -> list[list[list[int]]]:
        """Completions by seed; also for side-by-side samples alone."""
        assert self.examples is not None
        seeds = self.settings.seeds
        if not set(self.metrics) & NEED_SAMPLES - NEED_A_TEACHER:
            seeds = seeds[:1]
        return [
            self._complete(self.examples.prompted, generating(), end_ids, seed=seed, fingerprint=fingerprint)
            for seed in seeds
        ]

    def _complete(
        self,
        examples: list[Example],
        generating: Any,
        end_ids: list[int],
        *,
        seed: int = 0,
        greedy: bool = False,
        fingerprint: str | None = None,
    ) -> list[list[int]]:
        """Completions by all processes together; kept on disk where the model has a `fingerprint`, as a teacher has."""
        run, accelerator = self.run, self.run.accelerator
        other = None if fingerprint is None else run.requirements.other
        tokenizer, rank = run.processing_class, accelerator.process_index
        padding = run.sampling.pad_token_id
        if other is not None:
            tokenizer = teachers_tokenizer(run)
            padding = tokenizer.pad_token_id or 0
        sampling = self.settings.sampling(end_ids, padding, run.vocab_size, greedy=greedy)
        engine = local_engine(run.args.rollout_engine, tokenizer)
        stream = self.settings.stream(seed, Role.STUDENT if fingerprint is None else Role.TEACHER)
        settings = CompletionSettings(sampling, stream, self.settings.batch_size, engine)
        store = None if fingerprint is None else completion_store(run.args, settings, rank, teacher=fingerprint)
        asked = [example.prompt_of(teacher=fingerprint is not None) for example in examples]
        prompts = {prompt_key(ids): ids for ids in asked}
        written = complete_prompts(prompts, generating, accelerator, settings, store, progress=False)
        texts = [written[prompt_key(ids)] for ids in asked]
        if other is None:
            return texts
        return [other.answer(ids, example.prompt_ids) for ids, example in zip(texts, examples, strict=True)]

    @torch.no_grad()
    def _read(self, model: nn.Module, texts: list[Text]) -> list[TokenValues]:
        """Per-token measures of the texts by student and teacher, inside the student's wrappers."""
        run, both = self.run, self.run.two_models
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        asks = bool(set(self.metrics) & NEED_A_TEACHER)

        def read(batch: dict[str, Any]) -> dict[str, Tensor]:
            """Plain rows, whatever the method's own batches are made of: its hooks have no say here."""
            assert bool(trained_mask(batch["labels"]).any())
            with both.autocast():
                return both.terms(model, batch, both.signal if asks else None, comparison_terms, {})[1]

        part_of_rank = force(
            texts,
            read,
            pad_token_id=run.processing_class.pad_token_id,
            device=run.accelerator.device,
            batch_size=self.settings.batch_size,
            progress=False,
            rank=rank,
            world=world,
        )
        whole: list[TokenValues] = [{} for _ in texts]
        for other, part in enumerate(gather_object([part_of_rank])):
            whole[other::world] = part
        return whole
