"""Rouge-L of sampled completions (Lin 2004, W04-1013), as the papers on distillation report it.

F-measure of the longest common subsequence of words, stemmed, the best over references, times 100; computed by
rouge-score, whose words are runs of a-z and 0-9: text in other scripts has none, and scores 0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ..exceptions import ConfigurationError
from .intervals import Sums


def require_library(module: str, package: str, metric: str) -> None:
    """Refuse a metric whose library is missing.

    Raises:
        ConfigurationError: which one, and how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"The metric {metric} needs {package}, which is not installed: `pip install "
            f"'distill-trainers[evaluation]'`, or leave {metric} out of `metrics`."
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
