"""How near the student is to its teacher on given tokens (teacher-forced), token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..losses import token_divergence, token_logps
from ..losses.divergences import forward_kl, jsd, reverse_kl
from ..signals import TokenLogits, TokenLogprobs, TokenSampled, TokenSignal

AGREEMENT_TERMS = ("nll", "teacher_nll", "kl", "top1_agreement")


def agreement_terms(
    student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Measure every token `[n]` at temperature 1; without a teacher, `nll` alone.

    Returns:
        nll, teacher_nll: −log q(y) and −log p(y) of the given tokens, in nats; the latter not from a sparse teacher.
            From a teacher that gives only log-probabilities of these tokens, nothing else.
        kl: forward KL(p‖q) in nats; from a top k its lower bound, from draws its unbiased estimate.
        top1_agreement: 1 where both models would take the same token; from draws, the likeliest that was drawn.
    """
    if isinstance(teacher, TokenLogprobs):
        return {"nll": -token_logps(student, tokens["labels"]), "teacher_nll": -teacher.values}
    if teacher is None:
        return {"nll": -token_logps(student, tokens["labels"])}
    if not isinstance(teacher, TokenLogits):
        logps = teacher.logps
        if isinstance(teacher, TokenSampled):
            logps = logps.masked_fill(teacher.weights == 0, -math.inf)
        best = teacher.ids.gather(-1, logps.argmax(-1, keepdim=True)).squeeze(-1)
        return {
            "nll": -token_logps(student, tokens["labels"]),
            "kl": token_divergence(forward_kl, student, teacher),
            "top1_agreement": (student.logits.argmax(-1) == best).to(student.logits.dtype),
        }
    student_logps, teacher_logps = student.logps(), teacher.logps()
    labels = tokens["labels"].unsqueeze(-1)
    same = student_logps.argmax(-1) == teacher_logps.argmax(-1)
    return {
        "nll": -student_logps.gather(-1, labels).squeeze(-1),
        "teacher_nll": -teacher_logps.gather(-1, labels).squeeze(-1),
        "kl": forward_kl(student_logps, teacher_logps),
        "top1_agreement": same.to(student_logps.dtype),
    }


@torch.no_grad()
def comparison_terms(
    student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Measure every token `[n]` for a report, at temperature 1; what the teacher cannot tell is left out.

    Returns:
        nll, confidence (the student's probability of its likeliest token), correct (1 where that is the given one);
            with a teacher also kl, reverse_kl, jsd (β = ½) in nats and top1_agreement.
    """
    logps = student.logps()
    best = logps.max(-1)
    terms = {
        "nll": -logps.gather(-1, tokens["labels"].unsqueeze(-1)).squeeze(-1),
        "confidence": best.values.exp(),
        "correct": (best.indices == tokens["labels"]).to(logps.dtype),
    }
    if teacher is None or isinstance(teacher, TokenLogprobs):
        return terms
    if isinstance(teacher, TokenLogits):
        teacher_logps = teacher.logps()
        terms |= {"kl": forward_kl(logps, teacher_logps), "reverse_kl": reverse_kl(logps, teacher_logps)}
        terms |= {"jsd": jsd(logps, teacher_logps)}
        return terms | {"top1_agreement": (best.indices == teacher_logps.argmax(-1)).to(logps.dtype)}
    if not isinstance(teacher, TokenSampled):
        terms |= {"reverse_kl": token_divergence("reverse_kl", student, teacher)}
        terms |= {"jsd": token_divergence("jsd", student, teacher)}
    known = agreement_terms(student, teacher, tokens)
    return terms | {name: known[name] for name in ("kl", "top1_agreement")}


def agreement_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Turn token means into metrics: perplexities, KL (nats/token) and top-1 agreement (share of tokens)."""
    metrics = {"perplexity": _exp(means["nll"])}
    if "teacher_nll" in means:
        metrics["teacher_perplexity"] = _exp(means["teacher_nll"])
    return metrics | {name: means[name] for name in ("kl", "top1_agreement") if name in means}


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
