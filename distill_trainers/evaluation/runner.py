"""Several students, their baseline and their teacher on the same examples, in one set of results."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .calibration import calibration_bins
from .choosing import choose_metrics, make_subjects
from .collect import Collected, Workshop
from .examples import ExampleSet, read_examples
from .exposure import by_position, covered_length, exposure_curve
from .harness import Harness
from .intervals import Array, Sums, bootstrap_counts, difference, gap_closed, ratio, score
from .measures import AGREEMENT, MEASURES
from .own_tokenizer import IN_TOKENS, OwnReading, choose_without_shared
from .results import (
    EvaluationResults,
    Histogram,
    MeasureInfo,
    MeasureScore,
    ModelResults,
    PositionCurve,
    Sample,
    TokenComparison,
)
from .scores import scores_of
from .settings import EvaluationSettings
from .subjects import KnownModels, Subject, one_process_only, reference_tokenizer, rendering_tokenizers
from .teacher_forced import TokenValues

BOOTSTRAP_SEED = 0


def evaluate_models(
    students: Mapping[str, str | nn.Module],
    dataset: Any,
    *,
    teacher: str | nn.Module | None = None,
    baseline: str | nn.Module | None = None,
    settings: EvaluationSettings | None = None,
    tokenizer: Any = None,
    cache_dir: str | Path | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    teacher_model_init_kwargs: Mapping[str, Any] | None = None,
    baseline_model_init_kwargs: Mapping[str, Any] | None = None,
    use_cpu: bool = False,
    data_name: str = "the data",
    progress: bool = True,
) -> EvaluationResults:
    """Evaluate students beside their teacher and what they were before training.

    Args:
        students: folders (also of adapters), Hub ids or models, by the name that tables give them.
        dataset: rows of any layout (see `read_examples`).
        baseline: the student before training; with it and a teacher every score tells how much of the gap was closed.
        tokenizer: of all models; by default the one that lies beside the first of them, but for the chat template:
            that of the first student renders the data. A teacher's own prompts are rendered by its own.
        cache_dir: where completions and measures of tokens are kept; None keeps nothing.
        model_init_kwargs, teacher_model_init_kwargs: of `from_pretrained`; the dtype is that of the checkpoint.
        baseline_model_init_kwargs: of the baseline, over `model_init_kwargs`.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: before any weights are loaded.
    """
    prepared = prepare(
        students,
        dataset,
        teacher=teacher,
        baseline=baseline,
        settings=settings or EvaluationSettings(),
        tokenizer=tokenizer,
        cache_dir=cache_dir,
        model_init_kwargs=model_init_kwargs,
        teacher_model_init_kwargs=teacher_model_init_kwargs,
        baseline_model_init_kwargs=baseline_model_init_kwargs,
        use_cpu=use_cpu,
        data_name=data_name,
        progress=progress,
    )
    return prepared.run()


def prepare(
    students: Mapping[str, str | nn.Module],
    dataset: Any,
    *,
    settings: EvaluationSettings,
    teacher: str | nn.Module | None = None,
    baseline: str | nn.Module | None = None,
    tokenizer: Any = None,
    cache_dir: str | Path | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    teacher_model_init_kwargs: Mapping[str, Any] | None = None,
    baseline_model_init_kwargs: Mapping[str, Any] | None = None,
    use_cpu: bool = False,
    data_name: str = "the data",
    progress: bool = True,
) -> Evaluation:
    """Make an evaluation that has passed every check, with no weights loaded; arguments as of `evaluate_models`."""
    settings.check()
    one_process_only()
    cache = None if cache_dir is None else Path(cache_dir)
    device = torch.device("cpu") if use_cpu else torch.accelerator.current_accelerator() or torch.device("cpu")
    shared: Any = {"device": device, "known": KnownModels(cache)}
    shared["baseline_kwargs"] = {**(model_init_kwargs or {}), **(baseline_model_init_kwargs or {})}
    subjects = make_subjects(students, teacher, baseline, model_init_kwargs, teacher_model_init_kwargs, **shared)
    is_given = tokenizer is not None
    own = settings.teacher_tokenizer == "own"
    compared = [subject for subject in subjects if not own or subject.role != "teacher"]
    tokenizer, vocab_size = reference_tokenizer(compared, tokenizer)
    reads, of_teacher = rendering_tokenizers(compared, tokenizer, is_given=is_given)
    rows = list(dataset) if own and not hasattr(dataset, "with_format") else dataset  # read twice
    examples = ExampleSet(read_examples(rows, reads, settings, name=data_name, teacher_tokenizer=of_teacher))
    metrics, notes = choose_metrics(settings, examples, has_teacher=teacher is not None)
    if own:
        choose_without_shared(settings, metrics, notes)
    workshop = Workshop(settings, metrics, tokenizer, vocab_size, cache, progress=progress, own=own)
    evaluation = Evaluation(workshop, subjects, examples, Harness(settings), notes, data_name)
    if own:
        evaluation.own = OwnReading.of(evaluation.teacher, rows, examples, workshop, data_name)
    return evaluation


class Evaluation:
    """One evaluation: collects what each model says, then turns it into results.

    Args:
        workshop: settings, metrics, tokenizer and cache.
        subjects: teacher, baseline, students, as far as there are any.
        harness: tasks of lm-eval to run as well; may be none.
    """

    def __init__(
        self,
        workshop: Workshop,
        subjects: Sequence[Subject],
        examples: ExampleSet,
        harness: Harness,
        notes: list[str],
        data_name: str,
    ):
        self.workshop, self.subjects, self.examples, self.harness = workshop, subjects, examples, harness
        self.settings, self.notes, self.data_name = workshop.settings, notes, data_name
        self.teacher = next((subject for subject in subjects if subject.role == "teacher"), None)
        self.own: OwnReading | None = None  # how a teacher with a tokenizer of its own reads
        self._counts: dict[int, Array] = {}

    def _reads(self, subject: Subject) -> tuple[Workshop, ExampleSet]:
        """What works on a model, and the examples in its tokens."""
        if self.own is not None and subject is self.teacher:
            return self.own.workshop, self.own.examples
        return self.workshop, self.examples

    def run(self) -> EvaluationResults:
        """Return all results; models are loaded one beside the teacher, and only where something is missing."""
        collected: dict[str, Collected] = {}
        tokens: list[TokenComparison] = []
        of_teacher = Collected()
        if self.teacher is not None and not self.examples.subsets["texts"]:
            workshop, examples = self._reads(self.teacher)
            written = workshop.first_samples(self.teacher, examples)
            if self.own is None:
                self.examples = self.examples.with_texts_of(written)
            else:
                ends = self.teacher.end_ids(workshop.tokenizer)
                self.examples = self.own.with_texts_of(written, self.examples, ends)
        for subject in self.subjects:
            teacher = self.teacher if subject is not self.teacher and self.own is None else None
            workshop, examples = self._reads(subject)
            collected[subject.name] = workshop.collect(subject, teacher, examples, of_teacher)
            if subject is self.teacher:
                of_teacher = collected[subject.name]
            elif teacher is not None and "agreement" in self.workshop.metrics:
                tokens += self._compare_tokens(subject, collected[subject.name])
            if subject is not self.teacher:
                subject.release()
        if self.teacher is not None:
            self.teacher.release()
        results = self._results(collected, tokens)
        scored = [subject for subject in self.subjects if self.own is None or subject is not self.teacher]
        self.harness.add_scores(results, scored, self.workshop.tokenizer, self.workshop.cache)
        return results

    # ---- Results ----------------------------------------------------------------------------------------------------

    def _results(self, collected: dict[str, Collected], tokens: list[TokenComparison]) -> EvaluationResults:
        length = self._exposure_length(collected)
        sums: dict[str, dict[str, Sums]] = {}
        by_seed: dict[str, dict[str, list[Sums]]] = {}
        for subject in self.subjects:
            workshop, examples = self._reads(subject)
            sums[subject.name], by_seed[subject.name] = scores_of(
                collected[subject.name],
                examples,
                self.settings,
                self.workshop.metrics if self.own is None else [m for m in self.workshop.metrics if m != "agreement"],
                workshop.tokenizer,
                is_teacher=subject is self.teacher,
                exposure_length=length,
            )
        if self.own is not None:
            self._add_of_bytes(self.own, collected, sums)
        models = [self._model(s, collected[s.name], sums, by_seed[s.name]) for s in self.subjects]
        # Tokens of two tokenizers are of different lengths: so are their seconds.
        if self.teacher is not None and self.own is None and (base := models[0].cost) is not None:
            for model in models:
                if model.cost is not None:
                    model.cost.speedup = model.cost.tokens_per_second / base.tokens_per_second
        occurring = [name for name in MEASURES if any(name in of_model for of_model in sums.values())]
        return EvaluationResults(
            models=models,
            measures={name: _info(name) for name in occurring},
            settings={**asdict(self.settings), "metrics": list(self.workshop.metrics)},
            data={
                "name": self.data_name,
                "rows": len(self.examples.examples),
                "reference_text": self.examples.reference,
            },
            subsets=self.examples.subsets,
            samples=self._samples(collected),
            tokens=tokens,
            notes=self.notes,
            environment=environment(self.subjects[0].device),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def _add_of_bytes(self, own: OwnReading, collected: dict[str, Collected], sums: dict[str, dict[str, Sums]]) -> None:
        """Add what two tokenizers can be compared in; take from the teacher what is counted in its own tokens."""
        teacher = collected["teacher"]
        for name, of_model in sums.items() if "agreement" in self.workshop.metrics and teacher.reference else ():
            same = [1.0] * len(teacher.reference)
            alone = Sums.of_means(same, same) if name == "teacher" else None
            of_model["next_byte_agreement"] = alone or own.agreement(collected[name], teacher, self.examples)
        sums["teacher"] = {name: value for name, value in sums["teacher"].items() if name not in IN_TOKENS}
        for name, of_model in sums.items():
            sums[name] = {measure: of_model[measure] for measure in MEASURES if measure in of_model}

    def _exposure_length(self, collected: dict[str, Collected]) -> int | None:
        """How far the completions of all models reach, so that their scores are at the same length."""
        texts = [of_model.samples[0] for of_model in collected.values() if of_model.samples]
        return covered_length(texts) if texts and "exposure_bias" in self.workshop.metrics else None

    def counts(self, prompts: int) -> Array:
        """Return resamples of so many prompts, the same for all models and measures."""
        if prompts not in self._counts:
            self._counts[prompts] = bootstrap_counts(prompts, self.settings.bootstrap_samples, BOOTSTRAP_SEED)
        return self._counts[prompts]

    def _model(
        self, subject: Subject, collected: Collected, sums: dict[str, dict[str, Sums]], by_seed: dict[str, list[Sums]]
    ) -> ModelResults:
        texts = {"reference": collected.reference, "student": collected.own_text} if subject is not self.teacher else {}
        reference = collected.reference if "calibration" in self.workshop.metrics else []
        sure, right = ([row[name] for row in reference] for name in ("confidence", "correct"))
        exposure = sums[subject.name].get("exposure_error")
        return ModelResults(
            name=subject.name,
            role=subject.role,
            source=subject.source,
            fingerprint=subject.facts.fingerprint,
            scores={name: self._score(name, subject, sums, by_seed.get(name, [])) for name in sums[subject.name]},
            positions=[curve for text, values in texts.items() for curve in self._curves(text, values)],
            lengths=_histogram(collected.samples, self.settings.max_new_tokens) if collected.samples else None,
            calibration=calibration_bins(sure, right, self.settings.calibration_bins) if reference else [],
            exposure=exposure_curve(exposure) if exposure is not None and subject is not self.teacher else [],
            cost=collected.cost,
        )

    def _score(
        self, name: str, subject: Subject, sums: dict[str, dict[str, Sums]], by_seed: list[Sums]
    ) -> MeasureScore:
        totals, confidence = sums[subject.name][name], self.settings.confidence
        counts = self.counts(len(totals))
        value = score(totals, counts, confidence)
        result = MeasureScore(
            value.value,
            value.low,
            value.high,
            over=MEASURES[name].over,
            per_prompt=totals.per_prompt(),
            per_seed=[score(seed_totals, counts[:1], confidence).value for seed_totals in by_seed],
        )
        before = sums.get("baseline", {}).get(name)
        if subject.role == "student" and before is not None:
            result.difference = difference(totals, before, counts, confidence)
            reached = sums.get("teacher", {}).get(name)
            if reached is not None:
                result.gap_closed = gap_closed(totals, before, reached, counts, confidence)
        return result

    def _curves(self, text: str, values: Sequence[TokenValues]) -> list[PositionCurve]:
        """Means by position with their intervals, as far as any completion goes."""
        curves = []
        for name in AGREEMENT:
            if not values or name not in values[0]:
                continue
            rows = [row[name] for row in values]
            totals, there = by_position(rows, max(map(len, rows)))
            counts = self.counts(len(rows))
            resampled = ratio(np.stack([counts @ totals, counts @ there], axis=-1))
            alpha = (1 - self.settings.confidence) / 2
            low, high = ([_quantile(column, q) for column in resampled.T] for q in (alpha, 1 - alpha))
            mean = (totals.sum(0) / np.maximum(there.sum(0), 1)).tolist()
            curves.append(PositionCurve(name, text, mean, low, high, [int(n) for n in there.sum(0)]))
        return curves

    def _samples(self, collected: dict[str, Collected]) -> list[Sample]:
        of = {s.name: self._reads(s)[0].tokenizer.decode for s in self.subjects}
        decode = self.workshop.tokenizer.decode
        examples, shown = self.examples, self.examples.subsets["prompts"][: self.settings.shown_samples]
        questions = {place: i for i, place in enumerate(examples.subsets["questions"])}
        samples = []
        for i, place in enumerate(shown):
            example = examples.examples[place]
            prompt = example.prompt_text or decode(example.prompt_ids, skip_special_tokens=True)
            sample = Sample(place, prompt, example.references, example.answer)
            for name, of_model in collected.items():
                if of_model.samples:
                    sample.completions[name] = of[name](of_model.samples[0][i], skip_special_tokens=True)
                if of_model.answers and place in questions:
                    sample.greedy[name] = of_model.answers[questions[place]].text
                    sample.verdicts[name] = of_model.answers[questions[place]].reason
            samples.append(sample)
        return samples

    def _compare_tokens(self, subject: Subject, collected: Collected) -> list[TokenComparison]:
        """A few completions token by token: references, and what the model wrote itself."""
        assert self.teacher is not None
        number, compared = self.settings.token_samples, []
        examples = self.examples.examples
        texts = {
            "reference": [
                (place, examples[place].behind(examples[place].completion_ids), values)
                for place, values in zip(self.examples.subsets["texts"], collected.reference, strict=False)
            ],
            "student": [
                (place, examples[place].behind(collected.samples[0][i]), collected.own_text[i])
                for i, place in enumerate(self.examples.subsets["prompts"][: len(collected.own_text)])
            ],
        }
        for kind, rows in texts.items():
            for place, text, values in rows[:number]:
                compared.append(
                    self.workshop.compare_tokens(subject, self.teacher, text, values, kind=kind, example=place)
                )
        return compared


def _info(name: str) -> MeasureInfo:
    measure = MEASURES[name]
    return MeasureInfo(measure.title, measure.unit, measure.higher_is_better, measure.paper)


def _quantile(values: Array, q: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if len(finite) else None


def _histogram(samples: Sequence[Sequence[Sequence[int]]], longest: int, bins: int = 20) -> Histogram:
    lengths = [len(ids) for completions in samples for ids in completions]
    edges = np.linspace(0, longest, min(bins, longest) + 1)
    counts, _ = np.histogram(lengths, edges)
    return Histogram(edges.tolist(), counts.tolist())


def environment(device: torch.device) -> dict[str, str]:
    """Return versions and kind of machine, without names of it."""
    versions = {"python": platform.python_version(), "device": device.type}
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
    for package in ("distill-trainers", "torch", "transformers", "rouge-score", "sacrebleu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
