"""Scores of sampled texts: how near they are to references, and how much they differ from each other.

**Rouge-L** (Lin 2004, W04-1013), as the papers on distillation report it: F-measure of the longest common subsequence
of words, stemmed, the best over references, times 100; computed by rouge-score, whose words are runs of a-z and 0-9:
text in other scripts has none, and scores 0.

**Diversity**: distinct-n over all completions, self-BLEU among those of one prompt. Distillation that seeks modes
(reverse KL) may close in on its teacher's likeliest answers and lose the others; scores of quality do not show it.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence

from ..exceptions import ConfigurationError
from ..installing import pip_install
from .intervals import Sums


def require_library(module: str, package: str, metric: str) -> None:
    """Refuse a metric whose library is missing.

    Raises:
        ConfigurationError: which one, and how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"The metric {metric} needs {package}, which is not installed: "
            f"`{pip_install('evaluation')}`, or leave {metric} out of `metrics`."
        )


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return Rouge-L × 100 of each text against its references, the best of them."""
    require_library("rouge_score", "rouge-score", "rouge_l")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(texts, references, strict=True)
    return [100 * scorer.score_multi(list(those), text)["rougeL"].fmeasure for text, those in pairs]


def rouge_sums(by_seed: Sequence[Sequence[float]]) -> Sums:
    """Average over prompts the mean over seeds; `by_seed[s][i]` is prompt i's score with seed s."""
    return Sums.of_means([sum(scores) / len(scores) for scores in zip(*by_seed, strict=True)], [1.0] * len(by_seed[0]))


def distinct_sums(by_seed: Sequence[Sequence[Sequence[int]]], n: int = 4) -> Sums:
    """Sum up distinct-n (Li et al., arXiv 1510.03055): different n-grams over n-grams, within each seed.

    An n-gram that occurs c times counts 1/c at each of them, so that the prompts' sums add up to the number of
    different ones. A bootstrap keeps c as it is: drawing a prompt twice must not pass for repetition.

    Args:
        by_seed: `[S][P]` completions as token ids, without the token that ends them.
    """
    totals, counts = [0.0] * len(by_seed[0]), [0.0] * len(by_seed[0])
    for completions in by_seed:
        grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in completions]
        times = Counter(gram for own_grams in grams for gram in own_grams)
        for prompt, own_grams in enumerate(grams):
            totals[prompt] += sum(1 / times[gram] for gram in own_grams)
            counts[prompt] += len(own_grams)
    return Sums.of_means(totals, counts)


def self_bleu(texts: Sequence[str]) -> float:
    """Return mean BLEU (0 to 100) of each text against all others (Zhu et al., arXiv 1802.01886); 100: all alike.

    BLEU says 0 of a text without words; here it is 100 like any text that another one equals, if another has none too.
    """
    require_library("sacrebleu", "sacrebleu", "diversity")
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)  # shorter texts than 4 words are scored by the n-grams they have
    empty = sum(not text.strip() for text in texts)

    def score(place: int, text: str) -> float:
        if not text.strip():
            return 100.0 if empty > 1 else 0.0
        return bleu.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score

    return sum(score(place, text) for place, text in enumerate(texts)) / len(texts)


def self_bleu_sums(by_seed: Sequence[Sequence[str]]) -> Sums:
    """Average Self-BLEU among the samples of each prompt over prompts; `[S][P]` texts with S ≥ 2."""
    return Sums.of_means([self_bleu(samples) for samples in zip(*by_seed, strict=True)], [1.0] * len(by_seed[0]))


def length_sums(by_seed: Sequence[Sequence[Sequence[int]]]) -> Sums:
    """Return mean tokens per completion, the token that ends it included."""
    return Sums.of_means([sum(map(len, row)) / len(row) for row in zip(*by_seed, strict=True)], [1] * len(by_seed[0]))


def ended_sums(by_seed: Sequence[Sequence[Sequence[int]]], eos_token_ids: Sequence[int]) -> Sums:
    """Return the share of completions whose last token ends them, and not `max_new_tokens`."""

    def share(completions: Sequence[Sequence[int]]) -> float:
        return sum(bool(ids) and ids[-1] in eos_token_ids for ids in completions) / len(completions)

    return Sums.of_means([share(samples) for samples in zip(*by_seed, strict=True)], [1] * len(by_seed[0]))
