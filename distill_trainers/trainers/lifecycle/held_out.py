"""The measures of `evaluation` at each evaluation of a run, on a few held-out prompts that both models complete.

The student's completions are new each time, from the same random numbers; the teacher's, from others, are made once and
kept. Scores go into the metrics of the evaluation before anybody reads them: logs, trackers, the choice of the best
model and early stopping see them like any other.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from ... import models
from ...data.routing import TEACHER_INDEX
from ...data.views import has_view, teacher_prompt
from ...evaluation import METRICS
from ...evaluation.accuracy import answer_parser
from ...evaluation.agreement import comparison_terms
from ...evaluation.collect import Collected
from ...evaluation.examples import Example, ExampleSet
from ...evaluation.exposure import covered_length
from ...evaluation.measures import MEASURES, NEED_A_TEACHER, NEED_SAMPLES
from ...evaluation.scores import scores_of
from ...evaluation.teacher_forced import Text, TokenValues, force
from ...exceptions import DatasetError
from ...losses.reduction import trained_mask
from ...randomness import Role
from ...rollouts import CompletionSettings, complete_prompts, local_engine
from ...rollouts.store import prompt_key
from ...storage import content_key, write_file
from ...teachers import Teacher
from ..protocol import Run
from .completions import completion_store, teachers_tokenizer
from .held_out_checks import held_out_settings
from .side_by_side import SideBySide, log_side_by_side

logger = logging.getLogger(__name__)

# The whole evaluation set gives a perplexity; speed is no score of training.
HELD_OUT_METRICS = tuple(name for name in METRICS if name not in ("perplexity", "speed"))
# What a metric is taken on, if not on any prompt.
_ROWS = {"rouge_l": "references", "accuracy": "questions", "consistency": "questions"}
INITIAL_NAME = "initial_scores.json"


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
        self._exposure_lengths: dict[str, int] = {}  # by `_ends`
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
        scores = self._scores(collected, self.metrics)
        self._remember(scores, step)
        logged = dict(scores)
        theirs = {name: v for name, v in self._teacher_scores.items() if _metric_of(name) not in NEED_A_TEACHER}
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
            owner = row.get(TEACHER_INDEX, 0)
            example = Example(ids[:start][-room:], completion, references, answer, choices, task, owner=owner)
            rows_read.append(replace(example, teacher_prompt_ids=teacher_prompt(row) if has_view(row) else None))
            if len(rows_read) == self.run.args.eval_measures_rows:
                break
        wrong = [name for name in self.metrics if not _has_rows(ExampleSet(rows_read), name)]
        if wrong:
            raise DatasetError(
                f"Got `eval_measures: {self.metrics}`, but the first {self.run.args.eval_measures_rows} rows of "
                f"the evaluation set have no {_ROWS.get(wrong[0], 'prompts')} for {wrong[0]}. Leave it out, or give "
                "them."
            )
        return rows_read

    def _collect(self, model: nn.Module) -> Collected:
        """What the student writes and how it reads, over all processes."""
        assert self.examples is not None
        run, examples = self.run, self.examples
        collected = Collected(end_ids=list(run.sampling.eos_token_ids))
        collected.samples = self._sample(
            examples.prompted, lambda: models.generating(model, run.accelerator), collected.end_ids
        )
        if "accuracy" in self.metrics:
            generating = models.generating(model, run.accelerator)
            collected.greedy = self._complete(examples.questions, generating, collected.end_ids, greedy=True)
        self._answer(collected)
        metrics = set(self.metrics)
        if metrics & {"agreement", "calibration"}:
            given = [example.completion_ids for example in examples.with_text]
            collected.reference = self._read(model, examples.with_text, given)
        if metrics & NEED_A_TEACHER:
            collected.own_text = self._read(model, examples.prompted, collected.samples[0])
        if "exposure_bias" in metrics:
            assert self._teacher is not None
            collected.teacher_text = self._read(model, examples.prompted, self._teacher.samples[0])
        return collected

    def _answer(self, collected: Collected) -> None:
        assert self.examples is not None
        collected.read_answers(self.examples, self.metrics, self.settings, self.run.processing_class)

    def _take_teacher(self) -> None:
        """The teacher's own completions and scores, once."""
        if not self.teacher_writes:
            return
        run, examples = self.run, self.examples
        assert examples is not None
        collected = Collected()
        # By place among the examples that each is over: of several teachers, each completes the prompts of its own.
        samples: list[dict[int, list[int]]] = []
        greedy: dict[int, list[int]] = {}
        for owner, teacher in enumerate(run.teacher.writers):
            own, ends = examples.of_owner(owner), teacher.eos_ids(teachers_tokenizer(run))
            # Texts in ids of the teacher's own have become the student's by then.
            theirs = ends if run.requirements.other is None else run.sampling.eos_token_ids
            collected.end_ids = sorted({*collected.end_ids, *theirs})
            if not own.prompted:
                continue
            fingerprint = teacher.fingerprint()

            def generating(teacher: Teacher = teacher) -> Any:
                return teacher.generating(run.accelerator)

            by_seed = self._sample(own.prompted, generating, ends, fingerprint)
            samples = samples or [{} for _ in by_seed]
            for into, completions in zip(samples, by_seed, strict=True):
                into |= _placed(examples.prompted, owner, completions)
            if "accuracy" in self.metrics and own.questions:
                answers = self._complete(own.questions, generating(), ends, greedy=True, fingerprint=fingerprint)
                greedy |= _placed(examples.questions, owner, answers)
        collected.samples = [[of_seed[i] for i in sorted(of_seed)] for of_seed in samples]
        collected.greedy = [greedy[i] for i in sorted(greedy)]
        self._answer(collected)
        self._teacher = collected
        # How the teacher reads references is not measured here.
        metrics = [name for name in self.metrics if name != "calibration"]
        self._teacher_scores = self._scores(collected, metrics, is_teacher=True)

    def _scores(self, collected: Collected, metrics: list[str], *, is_teacher: bool = False) -> dict[str, float]:
        """Score one model by name; by several teachers, their own rows too, as `SCORE/NAME`."""
        assert self.examples is not None
        parts = {"": (self.examples, collected, self._teacher)}
        for owner, name in enumerate(self.run.teacher.names):
            own = self.examples.of_owner(owner)
            theirs = None if self._teacher is None else self._teacher.of_owner(self.examples, owner)
            if own.examples:
                parts[f"/{name}"] = (own, collected.of_owner(self.examples, owner), theirs)
        scores: dict[str, float] = {}
        for end, (examples, texts, theirs) in parts.items():
            names = [name for name in metrics if _has_rows(examples, name)]
            covers = "exposure_bias" in names and not is_teacher  # a teacher has no error at any length
            length = self._covered(texts, theirs, end) if covers else 1
            operands = (texts, examples, self.settings, names, self.run.processing_class)
            sums, _ = scores_of(*operands, is_teacher=is_teacher, exposure_length=length)
            scores |= {f"{name}{end}": value.value for name, value in sums.items()}
        return scores

    def _covered(self, texts: Collected, theirs: Collected | None, end: str) -> int | None:
        """Return l of ExAccErr(l), the same at all evaluations of a run: each further position would add to it."""
        if theirs is None:
            return None
        if end not in self._exposure_lengths:
            self._exposure_lengths[end] = covered_length([texts.samples[0], theirs.samples[0]])
        length, longest = self._exposure_lengths[end], max(map(len, texts.samples[0]))
        if longest >= length:
            return length
        logger.warning(
            "exposure_error%s is left out of step %d: it is taken over %d tokens in this run, and the student's "
            "longest completion now has %d.",
            end,
            self.run.state.global_step,
            length,
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
            record = {"key": self._key, "scores": scores, "exposure_lengths": self._exposure_lengths}
            write_file(self._file, json.dumps(record), "the scores of the first evaluation", "Free some space.")

    def _recall(self, step: int) -> None:
        """Take up what another process of this run has remembered; all processes take the main one's."""
        if step == 0 or self._initial is not None:
            return
        text = self._file.read_text() if self.run.accelerator.is_main_process and self._file.is_file() else "{}"
        record = json.loads(gather_object([text])[0])
        if record.get("key") == self._key:
            self._initial, self._exposure_lengths = record["scores"], record.get("exposure_lengths") or {}

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

    def _sample(
        self, examples: list[Example], generating: Any, end_ids: list[int], fingerprint: str | None = None
    ) -> list[list[list[int]]]:
        """Completions by seed; also for side-by-side samples alone."""
        seeds = self.settings.seeds
        if not set(self.metrics) & NEED_SAMPLES - NEED_A_TEACHER:
            seeds = seeds[:1]
        return [self._complete(examples, generating(), end_ids, seed=seed, fingerprint=fingerprint) for seed in seeds]

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
        both = zip(texts, examples, asked, strict=True)
        other = other.ended_by(teacher=end_ids)
        return [other.answer(ids, example.prompt_ids, prompt) for ids, example, prompt in both]

    def _read(self, model: nn.Module, examples: list[Example], completions: list[list[int]]) -> list[TokenValues]:
        """Per-token measures of the completions by student and teacher, inside the student's wrappers.

        Of several teachers, each reads the rows of its own.
        """
        texts = [example.behind(ids) for example, ids in zip(examples, completions, strict=True)]
        found: dict[int, TokenValues] = {}
        for owner in range(max(1, len(self.run.teacher.names))):
            places = [i for i, example in enumerate(examples) if example.owner == owner]
            found |= dict(zip(places, self._read_of(owner, model, [texts[i] for i in places]), strict=True))
        return [found[i] for i in range(len(texts))]

    @torch.no_grad()
    def _read_of(self, owner: int, model: nn.Module, texts: list[Text]) -> list[TokenValues]:
        run, both = self.run, self.run.two_models
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        asks = bool(set(self.metrics) & NEED_A_TEACHER)
        terms = partial(comparison_terms, temperature=run.args.temperature)

        def read(batch: dict[str, Any]) -> dict[str, Tensor]:
            """Plain rows, whatever the method's own batches are made of: its hooks have no say here."""
            assert bool(trained_mask(batch["labels"]).any())
            if run.teacher.names:
                batch = {**batch, TEACHER_INDEX: torch.full_like(batch["labels"][:, 0], owner)}
            with both.autocast():
                return both.terms(model, batch, both.signal if asks else None, terms, {})[1]

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


# ---- Details --------------------------------------------------------------------------------------------------------


def _placed(examples: list[Example], owner: int, completions: list[list[int]]) -> dict[int, list[int]]:
    """Completions of one teacher's examples by the places of these among all."""
    return dict(zip((i for i, e in enumerate(examples) if e.owner == owner), completions, strict=True))


def _has_rows(examples: ExampleSet, metric: str) -> bool:
    return bool(examples.subsets[_ROWS.get(metric, "prompts")])


def _metric_of(score: str) -> str:
    """The metric of a score, which may be that of one of several teachers."""
    return MEASURES[score.partition("/")[0]].metric
