"""From what was collected of a model to its scores, as sums over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .accuracy import accuracy_by_question
from .calibration import calibration_sums
from .collect import Collected
from .consistency import agree, consistency_sums
from .examples import ExampleSet
from .exposure import exposure_sums
from .intervals import Sums, exp_ratio
from .measures import AGREEMENT, MEASURES
from .settings import EvaluationSettings
from .text_scores import distinct_sums, ended_sums, length_sums, rouge_l, rouge_sums, self_bleu_sums


def scores_of(
    found: Collected,
    examples: ExampleSet,
    settings: EvaluationSettings,
    metrics: Sequence[str],
    tokenizer: Any,
    *,
    is_teacher: bool = False,
    exposure_length: int | None = None,
) -> tuple[dict[str, Sums], dict[str, list[Sums]]]:
    """All scores of one model by name, in the order of `MEASURES`; and those of each seed, of sampled text.

    Args:
        is_teacher: its distances from itself are 0, and its agreement with itself 1.
        exposure_length: l of ExAccErr(l); None leaves it out.
    """
    sums: dict[str, Sums] = {}
    by_seed: dict[str, list[Sums]] = {}
    if found.reference and "perplexity" in metrics:
        sums["perplexity"] = perplexity_sums([row["nll"] for row in found.reference])
    if "agreement" in metrics:
        sums |= _agreement(found, examples, is_teacher)
    if found.reference and "calibration" in metrics:
        sure, right = ([row[name] for row in found.reference] for name in ("confidence", "correct"))
        sums["ece"] = calibration_sums(sure, right, settings.calibration_bins)
    if "exposure_bias" in metrics and exposure_length is not None:
        texts = [[0.0] * len(ids) for ids in found.samples[0]] if is_teacher else [row["kl"] for row in found.own_text]
        given = texts if is_teacher else [row["kl"] for row in found.teacher_text]
        sums["exposure_error"] = exposure_sums(texts, given, exposure_length)
    if found.samples and "rouge_l" in metrics:
        sums["rouge_l"], by_seed["rouge_l"] = _rouge(found, examples, tokenizer)
    if found.samples and "diversity" in metrics:
        sums |= _diversity(found, tokenizer)
        bare = _without_ends(found)
        by_seed["distinct_4"] = [distinct_sums([completions]) for completions in bare]
    if "accuracy" in metrics:
        sums |= accuracy_by_question(found.answers)
    if found.sampled_answers and "consistency" in metrics:
        pairs = zip(found.sampled_answers, examples.questions, strict=True)
        kind = settings.answer_kind
        sums |= consistency_sums([agree(answers, q.answer or "", kind, q.choices) for answers, q in pairs])
    return {name: sums[name] for name in MEASURES if name in sums}, by_seed


def _agreement(found: Collected, examples: ExampleSet, is_teacher: bool) -> dict[str, Sums]:
    if is_teacher:
        reference = [each.completion_ids if each.prompt_ids else each.completion_ids[1:] for each in examples.with_text]
        texts = {"": reference, "student_text_": found.samples[0] if found.samples else []}
        agreed = {name: 1.0 if name == "top1_agreement" else 0.0 for name in AGREEMENT}
        return {
            f"{prefix}{name}": Sums.of_means([agreed[name] * len(ids) for ids in text], [len(ids) for ids in text])
            for prefix, text in texts.items()
            for name in AGREEMENT
            if text
        }
    read = {"": found.reference, "student_text_": found.own_text}
    return {
        f"{prefix}{name}": Sums.of_means([sum(row[name]) for row in values], [len(row[name]) for row in values])
        for prefix, values in read.items()
        for name in AGREEMENT
        if values and all(name in row for row in values)
    }


def _rouge(found: Collected, examples: ExampleSet, tokenizer: Any) -> tuple[Sums, list[Sums]]:
    prompts = examples.subsets["prompts"]
    places = [prompts.index(i) for i in examples.subsets["references"]]
    references = [each.references for each in examples.of("references")]
    scored = []
    for seed in found.samples:
        texts = [tokenizer.decode(seed[i], skip_special_tokens=True) for i in places]
        scored.append(rouge_l(texts, references))
    return rouge_sums(scored), [rouge_sums([each]) for each in scored]


def _without_ends(found: Collected) -> list[list[list[int]]]:
    ends = set(found.end_ids)
    return [[ids[:-1] if ids and ids[-1] in ends else ids for ids in completions] for completions in found.samples]


def _diversity(found: Collected, tokenizer: Any) -> dict[str, Sums]:
    sums = {"distinct_4": distinct_sums(_without_ends(found))}
    if len(found.samples) > 1:
        texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in seed] for seed in found.samples]
        sums["self_bleu"] = self_bleu_sums(texts)
    sums["completion_tokens"] = length_sums(found.samples)
    return sums | {"ended": ended_sums(found.samples, found.end_ids)}


def perplexity_sums(nll: Sequence[Sequence[float]]) -> Sums:
    """exp of the mean negative log-likelihood over all tokens, not over prompts; end-of-text tokens count.

    Args:
        nll: −log q(y) of every token, in nats, by prompt.
    """
    return Sums.of_means([sum(row) for row in nll], [len(row) for row in nll], exp_ratio)
