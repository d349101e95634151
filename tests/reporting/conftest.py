"""Evaluations with invented numbers of a realistic size, for the layout of reports: nothing of them was measured."""

from __future__ import annotations

import json
import math
import random

import pytest

from distill_trainers.evaluation.measures import AGREEMENT, MEASURES
from distill_trainers.evaluation.results import (
    CalibrationBin,
    Cost,
    EvaluationResults,
    GapClosed,
    Histogram,
    MeasureInfo,
    MeasureScore,
    ModelResults,
    PositionCurve,
    Sample,
    Score,
    TokenComparison,
    TopToken,
)

_WORDS = (
    " the of a model student teacher learns answers from its own text because every token weighs alike and what it "
    "reads is what others wrote so mistakes that it makes are never corrected unless sampling shows them distillation"
).split()
# baseline, student, teacher
_LEVELS = {
    "perplexity": (38.4, 12.9, 9.7),
    "top1_agreement": (0.41, 0.74, 1.0),
    "student_text_top1_agreement": (0.38, 0.77, 1.0),
    "acceptance": (0.36, 0.71, 1.0),
    "student_text_acceptance": (0.33, 0.69, 1.0),
    "rouge_l": (14.2, 24.8, 27.5),
    "accuracy": (0.08, 0.31, 0.42),
    "answered": (0.55, 0.97, 0.99),
    "tokens_per_answer": (96.0, 61.0, 58.0),
    "distinct_4": (0.99, 0.93, 0.95),
    "self_bleu": (6.0, 21.0, 17.0),
    "completion_tokens": (118.0, 74.0, 70.0),
    "ended": (0.61, 0.98, 1.0),
    "consistency": (0.24, 0.52, 0.58),
    "majority_accuracy": (0.1, 0.36, 0.46),
    "exposure_error": (31.0, 9.4, 0.0),
    "ece": (0.21, 0.06, 0.04),
}


@pytest.fixture(scope="session")
def made_up():
    """`made_up(samples=…, tokens=…, length=…, students=…)`: results that `invent` invents."""
    return invent


@pytest.fixture
def run_folder(tmp_path):
    """`run_folder(name, results)` leaves what a short training leaves, and an evaluation where there is one."""

    def make(name="run", results=None, steps=40, record=True):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        log = [{"step": 0, "epoch": 0.0, "eval_loss": 1.9, "eval_kl": 1.8, "eval_top1_agreement": 0.3,
                "eval_perplexity": 9.0, "eval_teacher_perplexity": 4.0}]  # fmt: skip
        for step in range(10, steps + 1, 10):
            terms = {"loss": 2 / step, "divergence": 1 / step, "lm_loss": 3.0, "grad_norm": 0.5}
            rollouts = {"trained_tokens": 500.0, "rollouts": 16, "completion_length": 20.0}
            log.append({"step": step, **terms, "learning_rate": 1e-4, **rollouts})
        log.append({**log[0], "step": steps, "eval_kl": 0.6, "eval_loss": 0.7, "eval_perplexity": 5.0})
        state = {"global_step": steps, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        if record:
            session = {"started": "2026-01-02T03:04:05+00:00", "from_step": 0, "to_step": steps, "seconds": 90.0,
                       "peak_mib": 2048.0, "energy_joules": 7200.0}  # fmt: skip
            facts = {"format": "distill_trainers.run", "version": 1, "method": "GKD", "student": "small",
                     "student_parameters": 12345, "teacher": "large", "device": "an accelerator", "processes": 2,
                     "paper": {"title": "A paper", "authors": "Somebody", "year": "2024", "id": "2306.13649"},
                     "versions": {"torch": "2.13.0"}, "recipe": {"learning_rate": 0.001, "lmbda": 0.5}}  # fmt: skip
            (folder / "run.json").write_text(json.dumps({**facts, "sessions": [session]}))
        if results is not None:
            results.save(folder)
        return folder

    return make


def invent(samples: int = 8, tokens: int = 4, length: int = 48, students: int = 1, seed: int = 0) -> EvaluationResults:
    """`samples` prompts side by side, and `tokens` texts of `length` tokens each as every student reads them."""
    rng = random.Random(seed)
    roles = [("teacher", "teacher"), ("baseline", "baseline"), ("student", "student")]
    roles += [(f"student-{i}", "student") for i in range(2, students + 1)]
    names = [name for name, _ in roles]
    models = [_model(rng, name, role) for name, role in roles]
    return EvaluationResults(
        models=models,
        measures={n: MeasureInfo(m.title, m.unit, m.higher_is_better, m.paper) for n, m in MEASURES.items()},
        settings={"confidence": 0.95, "seeds": [10, 20, 30, 40, 50], "temperature": 1.0},
        data={"name": "instructions.jsonl", "rows": 200, "reference_text": "the data"},
        subsets={"prompts": list(range(200))},
        samples=[_sample(rng, i, names) for i in range(samples)],
        tokens=[
            _tokens(rng, name, i, length, text)
            for name, role in roles
            if role == "student"
            for text in ("reference", "student")
            for i in range(math.ceil(tokens / 2 / students))
        ][:tokens],
        environment={"python": "3.11", "torch": "2.13.0", "device": "cpu"},
        created="2026-01-02T03:04:05+00:00",
    )


def _model(rng: random.Random, name: str, role: str) -> ModelResults:
    place = {"baseline": 0, "student": 1, "teacher": 2}[role]
    scores = {}
    for measure in MEASURES:
        before, after, reached = _LEVELS.get(measure, (1.62, 0.41, 0.0))
        value = (before, after * rng.uniform(0.9, 1.1), reached)[place]
        wide = abs(before - reached) * 0.08
        scores[measure] = MeasureScore(
            value,
            value - wide,
            value + wide,
            per_prompt=[max(rng.gauss(value, abs(value) / 4), 0) for _ in range(200)],
            per_seed=[rng.gauss(value, wide / 4) for _ in range(5)] if measure in ("rouge_l", "distinct_4") else [],
        )
        if role == "student":
            share = (value - before) / (reached - before)
            scores[measure].difference = Score(value - before, value - before - wide, value - before + wide)
            scores[measure].gap_closed = GapClosed(share, share - 0.09, share + 0.09, measure != "completion_tokens")
    sharp = {"baseline": 1.6, "student": 0.4, "teacher": 0.0}[role]
    positions = [_curve(rng, measure, text, sharp) for text in ("reference", "student") for measure in AGREEMENT]
    middle = {"baseline": 16, "student": 9, "teacher": 8}[role]
    return ModelResults(
        name=name,
        role=role,
        source={"teacher": "example/Large-7B", "baseline": "student_init", "student": "run"}[role],
        fingerprint=f"{name}-0",
        scores=scores,
        positions=positions if role != "teacher" else [],
        lengths=Histogram(
            [6.4 * i for i in range(21)], [round(300 * math.exp(-(((i - middle) / 4) ** 2))) for i in range(20)]
        ),
        calibration=[
            CalibrationBin(i / 10, (i + 1) / 10, 40 + 60 * i, i / 10 + 0.05, max((i / 10 + 0.05) ** (1 + sharp / 2), 0))
            for i in range(10)
        ],
        exposure=[sharp * 12 * math.log1p(i) for i in range(64)] if role != "teacher" else [],
        cost=Cost(
            {"teacher": 7_241_732_096}.get(role, 494_032_768),
            {"teacher": 13813.0}.get(role, 942.3),
            "bfloat16",
            "an accelerator",
            {"teacher": 212.0}.get(role, 1480.0),
            8,
            32,
            peak_mib={"teacher": 15100.0}.get(role, 1320.0),
            speedup={"teacher": 1.0}.get(role, 6.98),
        ),
    )


def _curve(rng: random.Random, measure: str, text: str, sharp: float) -> PositionCurve:
    size, scale = 128, {"top1_agreement": 0.3, "acceptance": 0.3, "jsd": 0.2}.get(measure, 1.0)
    mean = [scale * sharp * (1 + 0.4 * math.log1p(t) / 5 + rng.gauss(0, 0.08)) for t in range(size)]
    mean = [1 - value for value in mean] if MEASURES[measure].higher_is_better else mean
    count = [max(200 - 2 * t, 1) for t in range(size)]
    wide = [0.05 * scale * (1 + t / 40) for t in range(size)]
    low, high = ([m + sign * w for m, w in zip(mean, wide, strict=True)] for sign in (-1, 1))
    return PositionCurve(measure, text, mean, low, high, count)


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words)).capitalize() + "."


def _sample(rng: random.Random, index: int, names: list[str]) -> Sample:
    return Sample(
        index,
        f"Explain in your own words: {_sentence(rng, 14)}",
        references=[_sentence(rng, 40)],
        answer=str(rng.randrange(100)),
        completions={name: _sentence(rng, rng.randrange(20, 80)) for name in names},
        greedy={name: f"The answer is {rng.randrange(100)}." for name in names},
        verdicts={name: rng.choice(["right", "wrong", "no answer"]) for name in names},
    )


def _tokens(rng: random.Random, model: str, example: int, length: int, text: str) -> TokenComparison:
    tokens = [
        f" {rng.choice(_WORDS)}" if rng.random() < 0.9 else rng.choice([",", ".", "\n", "ing"]) for _ in range(length)
    ]
    kl = [min(rng.expovariate(2.2), 6.0) for _ in range(length)]
    return TokenComparison(
        model=model,
        text=text,
        example=example,
        prompt=_sentence(rng, 16),
        tokens=tokens,
        kl=kl,
        reverse_kl=[value * rng.uniform(0.5, 1.5) for value in kl],
        jsd=[min(value / 5, 0.69) for value in kl],
        student_probability=[rng.random() for _ in range(length)],
        teacher_probability=[rng.random() for _ in range(length)],
        student_top=[_top(rng) for _ in range(length)],
        teacher_top=[_top(rng) for _ in range(length)],
    )


def _top(rng: random.Random) -> list[TopToken]:
    left, found = 1.0, []
    for word in rng.sample(_WORDS, 5):
        share = left * rng.uniform(0.3, 0.8)
        left -= share
        found.append(TopToken(f" {word}", round(share, 6)))
    return found
