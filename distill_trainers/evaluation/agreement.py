"""How near the student is to its teacher on given tokens (teacher-forced), token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..losses import token_divergence, token_logps
from ..losses.cross_tokenizer import bucket_logps
from ..losses.divergences import forward_kl, jsd, reverse_kl, total_variation
from ..signals import TokenLogits, TokenLogprobs, TokenSampled, TokenSignal

AGREEMENT_TERMS = ("nll", "teacher_nll", "kl", "top1_agreement", "acceptance", "bytes")


@torch.no_grad()
def acceptance(student: TokenLogits, teacher: TokenSignal, temperature: float = 1.0) -> Tensor | None:
    """Compute Σ min(p, q) `[n]`: the share of the student's drafts that speculative sampling takes (arXiv 2211.17192).

    A draft v ~ q is taken with probability min(1, p(v) / q(v)), so that Σ q min(1, p / q) = 1 − TV(p, q) are.

    Args:
        temperature: of sampling, for both models; 0 is greedy, where a draft is taken if it is the teacher's choice.

    Returns:
        values `[n]`; from a top k an upper bound, since ids put together never look further apart; from draws the
            unbiased estimate, the mean of min(1, q / p). None where the signal does not tell it: at temperatures
            other than 1 a sparse one, and log-probabilities of given tokens at any.
    """
    if isinstance(teacher, TokenLogprobs) or not (isinstance(teacher, TokenLogits) or temperature == 1):
        return None
    if isinstance(teacher, TokenLogits) and temperature == 0:
        return (student.logits.argmax(-1) == teacher.logits.argmax(-1)).to(student.logits.dtype)
    if isinstance(teacher, TokenSampled):
        ratio = (token_logps(student, teacher.ids) - teacher.logps).masked_fill(teacher.weights == 0, 0.0)
        return (teacher.weights * ratio.clamp(max=0).exp()).sum(-1)
    return 1 - token_divergence(total_variation, student, teacher, temperature).clamp(max=1)


def agreement_terms(
    student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Measure every token `[n]` at temperature 1; without a teacher, `nll` alone.

    Args:
        tokens: `labels`; with `token_bytes`, bytes of text of each, these are told as `bytes`.
        temperature: of `acceptance`.

    Returns:
        nll, teacher_nll: −log q(y) and −log p(y) of the given tokens, in nats; the latter not from a sparse teacher.
            From a teacher that gives only log-probabilities of these tokens, nothing else.
        kl: forward KL(p‖q) in nats; from a top k its lower bound, from draws its unbiased estimate.
        top1_agreement: 1 where both models would take the same token; from draws, the likeliest that was drawn.
        acceptance: see there; left out where it is None.
    """
    known = {"bytes": tokens["token_bytes"].float()} if "token_bytes" in tokens else {}
    if isinstance(teacher, TokenLogprobs):
        return {"nll": -token_logps(student, tokens["labels"]), "teacher_nll": -teacher.values, **known}
    if teacher is None:
        return {"nll": -token_logps(student, tokens["labels"]), **known}
    taken = acceptance(student, teacher, temperature)
    known |= {} if taken is None else {"acceptance": taken}
    if not isinstance(teacher, TokenLogits):
        logps = teacher.logps
        if isinstance(teacher, TokenSampled):
            logps = logps.masked_fill(teacher.weights == 0, -math.inf)
        best = teacher.ids.gather(-1, logps.argmax(-1, keepdim=True)).squeeze(-1)
        return {
            "nll": -token_logps(student, tokens["labels"]),
            "kl": token_divergence(forward_kl, student, teacher),
            "top1_agreement": (student.logits.argmax(-1) == best).to(student.logits.dtype),
            **known,
        }
    student_logps, teacher_logps = student.logps(), teacher.logps()
    labels = tokens["labels"].unsqueeze(-1)
    same = student_logps.argmax(-1) == teacher_logps.argmax(-1)
    return {
        "nll": -student_logps.gather(-1, labels).squeeze(-1),
        "teacher_nll": -teacher_logps.gather(-1, labels).squeeze(-1),
        "kl": forward_kl(student_logps, teacher_logps),
        "top1_agreement": same.to(student_logps.dtype),
        **known,
    }


@torch.no_grad()
def comparison_terms(
    student: TokenLogits,
    teacher: TokenSignal | None,
    tokens: Mapping[str, Tensor],
    first_bytes: Tensor | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Measure every token `[n]` for a report, at temperature 1; what the teacher cannot tell is left out.

    Args:
        temperature: of `acceptance`.
        first_bytes: `[V]`, the byte that each id begins with (`TokenBytes.first_bytes`); None leaves next bytes out.

    Returns:
        nll, confidence (the student's probability of its likeliest token), correct (1 where that is the given one);
            with a teacher also kl, reverse_kl, jsd (β = ½) in nats, top1_agreement and `acceptance`.
            next_byte, the student's likeliest next byte (256: the end of the text), and next_byte_agreement, 1 where it
            is the teacher's.
    """
    logps = student.logps()
    best = logps.max(-1)
    terms = {
        "nll": -logps.gather(-1, tokens["labels"].unsqueeze(-1)).squeeze(-1),
        "confidence": best.values.exp(),
        "correct": (best.indices == tokens["labels"]).to(logps.dtype),
    }
    if first_bytes is not None:
        first_bytes = first_bytes.to(student.logits.device)
        terms["next_byte"] = bucket_logps(student.logits, first_bytes).argmax(-1).to(logps.dtype)
        if isinstance(teacher, TokenLogits):
            other = bucket_logps(teacher.logits, first_bytes).argmax(-1)
            terms["next_byte_agreement"] = (terms["next_byte"] == other).to(logps.dtype)
    if teacher is None or isinstance(teacher, TokenLogprobs):
        return terms
    if isinstance(teacher, TokenLogits):
        teacher_logps = teacher.logps()
        terms |= {"kl": forward_kl(logps, teacher_logps), "reverse_kl": reverse_kl(logps, teacher_logps)}
        terms |= {"jsd": jsd(logps, teacher_logps)}
        terms |= {"top1_agreement": (best.indices == teacher_logps.argmax(-1)).to(logps.dtype)}
        taken = acceptance(student, teacher, temperature)
        return terms if taken is None else terms | {"acceptance": taken}
    if not isinstance(teacher, TokenSampled):
        terms |= {"reverse_kl": token_divergence("reverse_kl", student, teacher)}
        terms |= {"jsd": token_divergence("jsd", student, teacher)}
    known = agreement_terms(student, teacher, tokens, temperature)
    return terms | {name: known[name] for name in ("kl", "top1_agreement", "acceptance") if name in known}


def agreement_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Turn token means into metrics: perplexities, bits per byte, KL (nats/token), top-1 agreement and acceptance.

    Bits per byte, −log₂ q(y) / bytes of y, compare models of different tokenizers; the end of the text counts in q(y).
    """
    metrics = {"perplexity": _exp(means["nll"])}
    if means.get("bytes"):
        metrics["bits_per_byte"] = bits_per_byte(means["nll"], means["bytes"])
    if "teacher_nll" in means:
        metrics["teacher_perplexity"] = _exp(means["teacher_nll"])
    return metrics | {name: means[name] for name in ("kl", "top1_agreement", "acceptance") if name in means}


def bits_per_byte(nll: float, size: float) -> float:
    """Turn nats over a text into bits for each of its bytes."""
    return nll / (math.log(2) * size)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
