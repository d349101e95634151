"""One function from what student and teacher say about some tokens to a divergence per token."""

from __future__ import annotations

import functools

from torch import Tensor

from ..exceptions import ConfigurationError, VocabularyError
from ..signals import Sampled, TokenLogits, TokenLogprobs, TokenSampled, TokenSignal, TokenTopK, TopK
from .closed_form import closed_form, closed_form_divergence
from .divergences import DIVERGENCES, Divergence, forward_kl, logit_mse, resolve_divergence
from .kernels import kernel_divergence
from .sparse import sampled_forward_kl, top_k_divergence


def token_divergence(
    divergence: str | Divergence, student: TokenLogits, teacher: TokenSignal, temperature: float = 1.0
) -> Tensor:
    """Compute every token's divergence, by the cheapest exact way that the teacher's signal allows.

    Whole distributions: the gradient in closed form for all of `DIVERGENCES` but `adaptive_kl`, on CUDA by Triton
    kernels (`kernels.py`); that one, and functions of your own, by autograd. Top k: over the K ids and their tail.
    Draws: the unbiased estimate of the forward KL.

    Args:
        divergence: a name in `DIVERGENCES`, what `resolve_divergence` gave, or any function of log-probabilities
            `(student_logps, teacher_logps)` `[n, V]` to values `[n]`.
        student: logits `[n, V]`; they receive gradients, once.
        teacher: what it says about the same tokens, a constant.
        temperature: divides both models' logits; sparse signals hold probabilities at 1 and take no other.

    Returns:
        values `[n]`.

    Raises:
        ConfigurationError: the signal cannot give this divergence at this temperature.
        VocabularyError: the logits of both sides differ in their number of ids.
    """
    function = resolve_divergence(divergence) if isinstance(divergence, str) else divergence
    if isinstance(teacher, TokenLogprobs):
        raise ConfigurationError(
            "The teacher gives log-probabilities of the given tokens alone (TokenLogprobs); a divergence is a sum over "
            "the vocabulary. Use a teacher with a distribution, or MiniLLM with `estimator: sampled`."
        )
    if not isinstance(teacher, TokenLogits):
        check_sparse(function, type(teacher), temperature)
        if isinstance(teacher, TokenTopK):
            return top_k_divergence(function, student, teacher)
        return sampled_forward_kl(student, teacher)
    if student.shape != teacher.shape:
        raise VocabularyError(
            f"The student's logits have shape {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}, expected [n, V] of the same tokens and ids. Padding ids leave both "
            "softmaxes by `vocab_size`."
        )
    rule = closed_form(function)
    if rule is None:
        return function(student.logps(temperature), teacher.logps(temperature))
    values = kernel_divergence(rule, student, teacher, temperature)
    if values is not None:
        return values
    return closed_form_divergence(rule, student.logits, teacher.logits, temperature, student.workspace)


def check_sparse(
    divergence: str | Divergence,
    signal: type[TokenTopK] | type[TokenSampled] | type[TopK] | type[Sampled],
    temperature: float = 1.0,
) -> None:
    """Refuse a divergence, or a temperature, that a sparse signal of the teacher cannot give.

    Raises:
        ConfigurationError: a temperature other than 1; `logit_mse` from a top k; anything but `forward_kl` from draws.
    """
    function = resolve_divergence(divergence) if isinstance(divergence, str) else divergence
    while isinstance(function, functools.partial):
        function = function.func
    if temperature != 1.0:
        raise ConfigurationError(
            f"The temperature of the loss is {temperature}, but {signal.__name__} holds a teacher's probabilities at "
            "temperature 1, and what was left out cannot be softened afterwards. Use temperature 1, or a teacher that "
            "gives hidden states."
        )
    name = getattr(function, "__name__", repr(function))
    if issubclass(signal, (TokenSampled, Sampled)) and function is not forward_kl:
        raise ConfigurationError(
            f"Draws of the teacher ({signal.__name__}) give an unbiased estimate of forward_kl only, got {name}. "
            "Use divergence forward_kl, or a top-k or hidden-state signal."
        )
    if function is logit_mse:
        raise ConfigurationError(
            f"{name} compares the logits of every id, which {signal.__name__} does not hold. Use one of "
            f"{', '.join(sorted(set(DIVERGENCES) - {name}))}, or a teacher that gives hidden states."
        )
