"""From what was collected of a model to its scores, as sums over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..data.token_bytes import TokenBytes
from .accuracy import accuracy_by_question
from .calibration import calibration_sums
from .collect import Collected
from .consistency import agree, consistency_sums
from .examples import ExampleSet
from .exposure import exposure_sums
from .intervals import Sums, exp_ratio
from .measures import AGREEMENT, MEASURES
from .settings import EvaluationSettings
from .teacher_forced import TokenValues
from .text_scores import distinct_sums, ended_sums, length_sums, rouge_l, rouge_sums, self_bleu_sums


def scores_of(
    data: Collected,
    examples: ExampleSet,
    settings: EvaluationSettings,
    metrics: Sequence[str],
    tokenizer: Any,
    *,
    is_teacher: bool = False,
    exposure_length: int | None = None,
) -> tuple[dict[str, Sums], dict[str, list[Sums]]]:
    """Score one model by name, in the order of `MEASURES`; sampled text also by seed.

    Args:
        is_teacher: its distances from itself are 0, and its agreement with itself 1.
        exposure_length: l of ExAccErr(l); None leaves it out.
    """
    sums: dict[str, Sums] = {}
    by_seed: dict[str, list[Sums]] = {}
    if data.reference and "perplexity" in metrics:
        sums["perplexity"] = perplexity_sums([row["nll"] for row in data.reference])
        spelled = TokenBytes.of_readable(tokenizer)
        if spelled is not None:
            sums["bits_per_byte"] = bits_per_byte_sums(data.reference, _forced(examples), spelled)
    if "agreement" in metrics:
        sums |= _agreement(data, examples, is_teacher)
    if data.reference and "calibration" in metrics:
        sure, right = ([row[name] for row in data.reference] for name in ("confidence", "correct"))
        sums["ece"] = calibration_sums(sure, right, settings.calibration_bins)
    if "exposure_bias" in metrics and exposure_length is not None:
        texts = [[0.0] * len(ids) for ids in data.samples[0]] if is_teacher else [row["kl"] for row in data.own_text]
        on_teachers = texts if is_teacher else [row["kl"] for row in data.teacher_text]
        sums["exposure_error"] = exposure_sums(texts, on_teachers, exposure_length)
    if data.samples and "rouge_l" in metrics:
        sums["rouge_l"], by_seed["rouge_l"] = _rouge(data, examples, tokenizer)
    if data.samples and "diversity" in metrics:
        sums |= _diversity(data, tokenizer)
        bare = _without_ends(data)
        by_seed["distinct_4"] = [distinct_sums([completions]) for completions in bare]
    if "accuracy" in metrics:
        sums |= accuracy_by_question(data.answers)
    if data.sampled_answers and "consistency" in metrics:
        pairs = zip(data.sampled_answers, examples.questions, strict=True)
        kind = settings.answer_kind
        sums |= consistency_sums([agree(answers, q.answer or "", kind, q.choices) for answers, q in pairs])
    return {name: sums[name] for name in MEASURES if name in sums}, by_seed


def _agreement(collected: Collected, examples: ExampleSet, is_teacher: bool) -> dict[str, Sums]:
    if is_teacher:
        texts = {"": _forced(examples), "student_text_": collected.samples[0] if collected.samples else []}
        agreed = {name: 1.0 if MEASURES[name].higher_is_better else 0.0 for name in AGREEMENT}
        of_bytes = {"next_byte_agreement": _ones(texts[""])} if collected.knows_bytes else {}
        return of_bytes | {
            f"{prefix}{name}": Sums.of_means([agreed[name] * len(ids) for ids in text], [len(ids) for ids in text])
            for prefix, text in texts.items()
            for name in AGREEMENT
            if text
        }
    read = {"": collected.reference, "student_text_": collected.own_text}
    names = {"": (*AGREEMENT, "next_byte_agreement"), "student_text_": AGREEMENT}
    return {
        f"{prefix}{name}": Sums.of_means([sum(row[name]) for row in values], [len(row[name]) for row in values])
        for prefix, values in read.items()
        for name in names[prefix]
        if values and all(name in row for row in values)
    }


def _forced(examples: ExampleSet) -> list[list[int]]:
    """The tokens of the reference texts that something predicts."""
    return [row.completion_ids if row.prompt_ids else row.completion_ids[1:] for row in examples.with_text]


def _ones(texts: Sequence[Sequence[int]]) -> Sums:
    return Sums.of_means([len(ids) for ids in texts], [len(ids) for ids in texts])


def _rouge(collected: Collected, examples: ExampleSet, tokenizer: Any) -> tuple[Sums, list[Sums]]:
    prompts = examples.subsets["prompts"]
    places = [prompts.index(i) for i in examples.subsets["references"]]
    references = [example.references for example in examples.of("references")]
    scored = []
    for seed in collected.samples:
        texts = [tokenizer.decode(seed[i], skip_special_tokens=True) for i in places]
        scored.append(rouge_l(texts, references))
    return rouge_sums(scored), [rouge_sums([rouge]) for rouge in scored]


def _without_ends(collected: Collected) -> list[list[list[int]]]:
    ends = set(collected.end_ids)
    return [[ids[:-1] if ids and ids[-1] in ends else ids for ids in completions] for completions in collected.samples]


def _diversity(collected: Collected, tokenizer: Any) -> dict[str, Sums]:
    sums = {"distinct_4": distinct_sums(_without_ends(collected))}
    if len(collected.samples) > 1:
        texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in seed] for seed in collected.samples]
        sums["self_bleu"] = self_bleu_sums(texts)
    sums["completion_tokens"] = length_sums(collected.samples)
    return sums | {"ended": ended_sums(collected.samples, collected.end_ids)}


def bits_per_byte_sums(reference: Sequence[TokenValues], texts: Sequence[Sequence[int]], spelled: TokenBytes) -> Sums:
    """Compute −log₂ q(y) / bytes of y over all texts: comparable between tokenizers. Ends of text count in q(y)."""
    sizes = [sum(len(token or b"") for token in spelled.tokens(ids)) for ids in texts]
    return Sums.of_means([sum(row["nll"]) / math.log(2) for row in reference], sizes)


def perplexity_sums(nll: Sequence[Sequence[float]]) -> Sums:
    """Compute exp of the mean negative log-likelihood over all tokens, not prompts; end-of-text tokens count.

    Args:
        nll: −log q(y) of every token, in nats, by prompt.
    """
    return Sums.of_means([sum(row) for row in nll], [len(row) for row in nll], exp_ratio)
