"""What the models of an evaluation write, and how they and their teacher read it: the part that costs time.

All of it is kept on disk as it is done, by the model's fingerprint, the text and the settings: a second evaluation runs
no model, one that was stopped goes on, and another metric only adds what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..data.token_bytes import TokenBytes
from ..randomness import Role
from ..rollouts import Alone, CompletionSettings, CompletionStore, DecodeEngine, SamplingSettings, complete_prompts
from ..rollouts.store import prompt_key
from ..signals import TokenLogits
from ..storage import RecordStore, content_key
from .accuracy import Answer, answer_parser, judge
from .cost import measure_cost
from .examples import Example, ExampleSet
from .measures import NEED_SAMPLES
from .results import Cost, TokenComparison, TopToken
from .settings import EvaluationSettings
from .subjects import Subject
from .teacher_forced import Text, TokenValues, force, pair_runner


@dataclass
class Collected:
    """Of one model; lists are in the order of the examples that they belong to (see `ExampleSet`).

    Attributes:
        samples: by seed, completions of the prompts.
        greedy: completions of the questions.
        answers: what those answer.
        sampled_answers: by question, the answers of all seeds.
        reference: measures of the reference texts.
        own_text, teacher_text: measures of the first seed's completions, by the model itself and by the teacher.
        knows_bytes: whether the tokenizer tells what its tokens spell.
    """

    end_ids: list[int] = field(default_factory=list)
    samples: list[list[list[int]]] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    sampled_answers: list[list[str | None]] = field(default_factory=list)
    reference: list[TokenValues] = field(default_factory=list)
    own_text: list[TokenValues] = field(default_factory=list)
    teacher_text: list[TokenValues] = field(default_factory=list)
    cost: Cost | None = None
    knows_bytes: bool = False

    def of_owner(self, examples: ExampleSet, owner: int) -> Collected:
        """Return what belongs to `examples.of_owner(owner)`, of what belongs to `examples`."""

        def part(subset: str, values: Sequence[Any]) -> list[Any]:
            own = (example.owner == owner for example in examples.of(subset))
            return [value for value, is_own in zip(values, own, strict=True) if is_own] if values else []

        return Collected(
            self.end_ids,
            samples=[part("prompts", samples) for samples in self.samples],
            greedy=part("questions", self.greedy),
            answers=part("questions", self.answers),
            sampled_answers=part("questions", self.sampled_answers),
            reference=part("texts", self.reference),
            own_text=part("prompts", self.own_text),
            teacher_text=part("prompts", self.teacher_text),
        )

    def read_answers(
        self, examples: ExampleSet, metrics: Sequence[str], settings: EvaluationSettings, tokenizer: Any
    ) -> None:
        """Judge what the greedy completions answer, and parse the samples of the questions for `consistency`."""
        parse, kind = answer_parser(settings.answer_formats or ()), settings.answer_kind
        if self.greedy:
            pairs = zip(examples.questions, self.greedy, strict=True)
            self.answers = [judge(example.question, ids, tokenizer, parse, kind) for example, ids in pairs]
        if "consistency" in metrics:
            places = {example.key: place for place, example in enumerate(examples.prompted)}
            for example in examples.questions:
                texts = [samples[places[example.key]] for samples in self.samples]
                self.sampled_answers.append([parse(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts])


@dataclass
class Workshop:
    """What all work on the models of one evaluation shares.

    Args:
        cache: folder of everything that is kept; None keeps nothing.
        vocab_size: ids in the softmax of all models, or None for all rows.
        own: whether the teacher has a tokenizer of its own, so that each model reads the references alone.
    """

    settings: EvaluationSettings
    metrics: Sequence[str]
    tokenizer: Any
    vocab_size: int | None
    cache: Path | None = None
    chunk_bytes: int | None = None
    progress: bool = True
    own: bool = False

    # ---- Text -------------------------------------------------------------------------------------------------------

    def samples(self, subject: Subject, examples: ExampleSet) -> list[list[list[int]]]:
        """Return completions by seed; the first seed's alone where no metric looks at several."""
        if not set(self.metrics) & NEED_SAMPLES:
            return []
        seeds = self.settings.sampled_seeds
        if not set(self.metrics) & {"rouge_l", "diversity", "consistency"}:
            seeds = seeds[:1]
        sampling = self._sampling(subject)
        return [
            self._completions(subject, examples.prompted, sampling, seed, f"{subject.name}: sampling, seed {seed}")
            for seed in seeds
        ]

    def first_samples(self, subject: Subject, examples: ExampleSet) -> list[list[int]]:
        """Return completions of the first seed, whatever the metrics."""
        seed = self.settings.sampled_seeds[0]
        title = f"{subject.name}: sampling, seed {seed}"
        return self._completions(subject, examples.prompted, self._sampling(subject), seed, title)

    def greedy(self, subject: Subject, questions: list[Example]) -> list[list[int]]:
        """Return the likeliest completion of each question."""
        sampling = self._sampling(subject, greedy=True)
        return self._completions(subject, questions, sampling, 0, f"{subject.name}: answering")

    def _sampling(self, subject: Subject, *, greedy: bool = False) -> SamplingSettings:
        tokenizer = self.tokenizer
        ends = subject.end_ids(tokenizer)
        pad = models.padding_id(tokenizer, self.vocab_size or subject.rows)
        return self.settings.sampling(ends, pad, self.vocab_size, greedy=greedy)

    def _completions(
        self, subject: Subject, examples: list[Example], sampling: SamplingSettings, seed: int, title: str
    ) -> list[list[int]]:
        asked = [example.prompt_of(teacher=subject.role == "teacher") for example in examples]
        prompts = {prompt_key(ids): ids for ids in asked}
        # A baseline draws by its student's numbers, so that a difference shows what training changed.
        stream = self.settings.stream(seed, Role.TEACHER if subject.role == "teacher" else Role.STUDENT)
        settings = CompletionSettings(sampling, stream, self.settings.batch_size, DecodeEngine(self.tokenizer))
        store = None
        if self.cache is not None:
            store = CompletionStore(self.cache / "completions", settings.identity(model=subject.facts.fingerprint))
        written = complete_prompts(
            prompts, subject.generating(), Alone(subject.device), settings, store, title=title, progress=self.progress
        )
        return [written[prompt_key(ids)] for ids in asked]

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def read(self, subject: Subject, teacher: Subject | None, texts: Sequence[Text], what: str) -> list[TokenValues]:
        """Measure every token of the completions under a model and, if there is one, its teacher."""
        spelled = TokenBytes.of_readable(self.tokenizer)
        identity: list[Any] = [subject.facts.fingerprint, teacher.facts.fingerprint if teacher else None]
        identity += [self.vocab_size, "acceptance", self.settings.temperature]
        identity += [] if spelled is None else ["next_byte"]
        store = self._store("tokens", identity, "measures of tokens")

        def run(batch: Any) -> Any:  # the models are loaded when a batch comes, and not before
            local = None if teacher is None else teacher.model
            rows = self.vocab_size or subject.rows
            first_bytes = None if spelled is None else spelled.first_bytes(rows)
            pair = (subject.model, local, self.vocab_size, self.chunk_bytes)
            return pair_runner(*pair, first_bytes=first_bytes, temperature=self.settings.temperature)(batch)

        return force(
            texts,
            run,
            pad_token_id=self.tokenizer.pad_token_id,
            device=subject.device,
            batch_size=self.settings.batch_size,
            store=store,
            title=f"{subject.name}: reading {what}",
            progress=self.progress,
        )

    def _store(self, kind: str, identity: Any, what: str) -> RecordStore | None:
        return None if self.cache is None else RecordStore(self.cache / kind / content_key(identity), what=what)

    # ---- All of one model -------------------------------------------------------------------------------------------

    def collect(self, subject: Subject, teacher: Subject | None, examples: ExampleSet, given: Collected) -> Collected:
        """Collect everything that the metrics need of `subject`.

        Args:
            teacher: None for the teacher itself, which has no distance from itself.
            given: the teacher's own, whose text is read too; a model's `samples` may be there already.
        """
        wanted, collected = set(self.metrics), Collected(end_ids=subject.end_ids(self.tokenizer))
        collected.knows_bytes = TokenBytes.of_readable(self.tokenizer) is not None
        collected.samples = self.samples(subject, examples)
        prompts = [example.prompt_ids for example in examples.prompted]
        if "accuracy" in wanted:
            collected.greedy = self.greedy(subject, examples.questions)
        collected.read_answers(examples, self.metrics, self.settings, self.tokenizer)
        if wanted & {"perplexity", "calibration"} or ("agreement" in wanted and (teacher or self.own)):
            alone = subject.role == "teacher"
            texts = [example.behind(example.completion_ids, teacher=alone) for example in examples.with_text]
            collected.reference = self.read(subject, teacher, texts, "references")
        if teacher and wanted & {"agreement", "exposure_bias"} and collected.samples:
            own_pairs = [e.behind(ids) for e, ids in zip(examples.prompted, collected.samples[0], strict=True)]
            collected.own_text = self.read(subject, teacher, own_pairs, "its own text")
        if teacher and "exposure_bias" in wanted:
            teacher_pairs = [e.behind(ids) for e, ids in zip(examples.prompted, given.samples[0], strict=True)]
            collected.teacher_text = self.read(subject, teacher, teacher_pairs, "the teacher's text")
        if "speed" in wanted:
            collected.cost = self._cost(subject, prompts)
        return collected

    def _cost(self, subject: Subject, prompts: list[list[int]]) -> Cost | None:
        settings = self.settings
        prompts = sorted(prompts, key=len)[: settings.speed_prompts]
        if not prompts:
            return None
        sampling = replace(self._sampling(subject, greedy=True), max_new_tokens=settings.speed_tokens)
        sampling = replace(sampling, eos_token_ids=[], stop_strings=[])
        device = subject.device
        on_cpu = f"{device.type}/{torch.get_num_threads()}"
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
        identity = [subject.facts.fingerprint, place, sampling.as_dict(), prompts, "fastest pass"]
        store, key = self._store("cost", identity, "measured costs"), "cost"
        records = {} if store is None else store.load()
        if key in records:
            return Cost(**records[key]["cost"])
        with subject.generating() as model:
            cost = measure_cost(model, DecodeEngine(self.tokenizer), prompts, sampling, device)
        if store is not None:
            store.append([{"key": key, "cost": asdict(cost)}])
        return cost

    # ---- Token by token ---------------------------------------------------------------------------------------------

    def compare_tokens(
        self, subject: Subject, teacher: Subject, text: Text, values: TokenValues, *, kind: str, example: int
    ) -> TokenComparison:
        """Show one completion as both models see it, with their likeliest tokens at each place."""
        prompt, completion, *own = text
        identity = [subject.facts.fingerprint, teacher.facts.fingerprint, self.vocab_size, self.settings.top_tokens]
        store, key = self._store("top_tokens", identity, "likeliest tokens"), content_key(*text)
        records = {} if store is None else store.load()
        if key not in records:
            seen = {
                "student": self._top(subject, prompt, completion),
                "teacher": self._top(teacher, (*own, prompt)[0], completion),
            }
            records[key] = {"key": key, **seen}
            if store is not None:
                store.append([records[key]])
        tops, tokens = records[key], completion if prompt else completion[1:]
        return TokenComparison(
            model=subject.name,
            text=kind,
            example=example,
            prompt=self.tokenizer.decode(prompt, skip_special_tokens=True),
            tokens=[self.tokenizer.decode([token]) for token in tokens],
            kl=values["kl"],
            reverse_kl=values["reverse_kl"],
            jsd=values["jsd"],
            student_probability=tops["student"]["given"],
            teacher_probability=tops["teacher"]["given"],
            student_top=self._named(tops["student"]["top"]),
            teacher_top=self._named(tops["teacher"]["top"]),
        )

    def _named(self, top: list[list[list[float]]]) -> list[list[TopToken]]:
        return [[TopToken(self.tokenizer.decode([int(token)]), p) for token, p in place] for place in top]

    @torch.no_grad()
    def _top(self, subject: Subject, prompt: list[int], completion: list[int]) -> dict[str, Any]:
        """Probabilities of the given tokens, and ids and probabilities of the likeliest, a few positions at a time."""
        ids = torch.tensor([[*prompt, *completion]], device=subject.device)
        predicts = torch.arange(1, ids.shape[1], device=ids.device).unsqueeze(0) >= len(prompt)
        labels = ids[:, 1:][predicts]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        signal = subject.model.signal(inputs, predicts, self.vocab_size)
        probabilities: list[float] = []
        top: list[list[list[float]]] = []
        for start in range(0, len(labels), 32):
            said = signal.chunk(slice(start, start + 32))
            assert isinstance(said, TokenLogits)  # a model of this process gives nothing else
            best = said.top_k(self.settings.top_tokens)
            chunk = said.logps().gather(-1, labels[start : start + 32, None]).squeeze(-1)
            probabilities += [round(p, 6) for p in chunk.exp().tolist()]
            rows = zip(best.ids.tolist(), best.logps.exp().tolist(), strict=True)
            top += [[[token, round(p, 6)] for token, p in zip(*row, strict=True)] for row in rows]
        return {"given": probabilities, "top": top}
