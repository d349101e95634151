"""Sampled completions with what student, sampler and teacher think of each of their tokens."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ...exceptions import ConfigurationError
from ...losses.reduction import trained_mask
from ...losses.sampler_ratio import SAMPLED, SAMPLER_LOGPS
from ...randomness import Purpose, Role, Stream
from ...rollouts import Mixture, Scored, decode_scored, why_not_scored
from ...signals import HiddenStates
from ...teachers import Teacher
from ..logps import logps_of_both
from ..protocol import Batch, Run
from .cycles import with_logps

SIGNAL = "teacher_signal"  # the batch entry that keeps what a teacher has said already


def check_mixture(student: nn.Module, teacher: Teacher) -> None:
    """Refuse models that the decode loop cannot run together.

    Raises:
        ConfigurationError: the teacher does not generate, or one of the models keeps more than keys and values.
    """
    if not teacher.can_generate:
        raise ConfigurationError(
            f"Got `teacher_mix_alpha` above 0, but {type(teacher).__name__} cannot write tokens together with the "
            "student. Set `teacher_mix_alpha: 0`, or give a local teacher."
        )
    for role, model in (("student", student), ("teacher", teacher.live().model)):
        reason = why_not_scored(model)
        if reason:
            raise ConfigurationError(
                f"Got `teacher_mix_alpha` above 0, which takes both models into one decode loop, but it cannot run the "
                f"{role}: {reason}. Set `teacher_mix_alpha: 0`."
            )


def sample_scored(run: Run, batches: list[Batch], alpha: float, keep_signal: bool) -> list[Batch]:
    """Sample completions of the batches, with their log-probabilities as `cycles.LOGPS` `[B, T, K]`, K = 3 or 4.

    They are those of the student, of the sampler and of the teacher. The first two come from generation itself where
    the decode loop runs, else from a forward after it; the teacher's from generation if it has a say in it (`alpha`).
    An engine that tells how likely each token was is taken for the sampler where `sampler_correction` asks for that;
    else the student is, and what was told comes fourth.

    Args:
        keep_signal: leave what the teacher said in the batch, for a loss on the very same rows.
    """
    args, scored = run.args, list[Scored]()
    place = {"step": run.state.global_step, "rank": run.accelerator.process_index}
    coins = Stream(args.seed, Role.RUN, Purpose.MIXTURE).at(**place)
    decodes = args.rollout_engine == "decode" and why_not_scored(run.model) is None

    def generate(model: Any, ids: Tensor, mask: Tensor, sampling: Any, streams: Any) -> list[list[int]]:
        teacher: Any = contextlib.nullcontext()
        if alpha:
            teacher = run.teacher.generating(run.accelerator)
        with teacher as other:
            mixture = Mixture(other, alpha, coins, keeps_hidden=keep_signal) if alpha else None
            size, given = args.rollout_batch_size, {"streams": streams, "tokenizer": run.processing_class}
            scored.extend(decode_scored(model, ids, mask, sampling, size, mixture=mixture, **given))
        return [completion.ids for completion in scored]

    batches = run.sample_completions(batches, generate if decodes else None)
    if not decodes:
        return [_scored_afterwards(run, batch) for batch in batches]
    scored_batches, start = [], 0
    if not alpha:
        run.two_models.ask_ahead(batches, run.teacher_signal)
    for batch in batches:
        rows = scored[start : start + len(batch["labels"])]
        start += len(rows)
        logps = torch.cat([row.logps for row in rows if row.logps is not None]).to(batch["labels"].device)
        if alpha and keep_signal and rows and rows[0].hidden is not None:
            hidden = torch.cat([row.hidden for row in rows if row.hidden is not None])
            batch = {**batch, SIGNAL: run.teacher.live().signal_of(hidden, run.vocab_size)}
        if not alpha:
            teacher_logps, signal = run.two_models.frozen_logps(run.teacher, batch)
            logps = torch.cat([logps, teacher_logps.unsqueeze(1).to(logps.device)], dim=1)
            if keep_signal and isinstance(signal, HiddenStates):  # anything else may be as large as logits
                batch = {**batch, SIGNAL: signal}
        scored_batches.append(with_logps(batch, logps))
    return scored_batches


def _scored_afterwards(run: Run, batch: Batch) -> Batch:
    """Score what an engine has sampled that knows its own log-probabilities at most."""
    batch = dict(batch)
    told, _ = batch.pop(SAMPLER_LOGPS, None), batch.pop(SAMPLED, None)
    logps = logps_of_both(run, batch)
    if told is None:
        return with_logps(batch, logps)
    own = told[:, 1:][trained_mask(batch["labels"])].to(logps)
    if run.args.sampler_correction == "none":
        return with_logps(batch, torch.cat([logps, own[:, None]], dim=1))
    return with_logps(batch, torch.stack([logps[:, 0], own, logps[:, 2]], dim=1))
