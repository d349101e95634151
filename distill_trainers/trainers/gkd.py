"""Generalized Knowledge Distillation: On-Policy Distillation of Language Models (Agarwal et al., ICLR 2024).

arXiv 2306.13649:  L = (1−λ)·E_{(x,y)~data}[D(p‖q)(y|x)] + λ·E_{x, y~q(·|x)}[D(p‖q)(y|x)], where D is any per-token
divergence and no gradient flows through sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..losses.divergences import DIVERGENCES, Divergence, TaidSchedule, resolve_divergence, taid
from ..rollouts import draws_on_policy
from ..signals import TokenLogits
from .base import Batch, DistillTrainer
from .config import DistillConfig, require


@dataclass
class GKDConfig(DistillConfig):
    """Settings of `GKDTrainer`; see each field's help."""

    lmbda: float = field(
        default=0.5,
        metadata={"help": "λ: probability that an optimiser step trains on student rollouts; 0 never samples."},
    )
    divergence: str = field(default="jsd", metadata={"help": f"Per-token divergence: one of {', '.join(DIVERGENCES)}."})
    beta: float | None = field(default=None, metadata={"help": "β of jsd (0.5): weight of the teacher in the mixture."})
    alpha: float | None = field(default=None, metadata={"help": "α of the skew divergences (0.1)."})
    mu: float | None = field(default=None, metadata={"help": "μ of adaptive_kl (0.5): teacher mass of the head."})
    t: float | None = field(
        default=None,
        metadata={"help": "t of taid: fixed share of the teacher in the target; by default it rises from 0.4 to 1."},
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Replace the dataset's completions by the teacher's own, generated once and kept on disk."},
    )
    lm_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of −log q(y) of given completions, added to the divergence (never on student rollouts)."
        },
    )
    tau_squared: bool = field(
        default=False, metadata={"help": "Multiply the divergence by kd_temperature², which keeps gradients' size."}
    )

    def divergence_params(self) -> dict[str, float]:
        """The parameters of the divergence that were set."""
        given = {"beta": self.beta, "alpha": self.alpha, "mu": self.mu, "t": self.t}
        return {name: value for name, value in given.items() if value is not None}

    def _check(self) -> None:
        super()._check()
        require(0 <= self.lmbda <= 1, "lmbda", self.lmbda, "a probability in [0, 1]")
        require(self.lm_loss_weight >= 0, "lm_loss_weight", self.lm_loss_weight, "0 or a positive number")
        require(
            self.max_new_tokens < self.max_length or (self.lmbda == 0 and not self.seq_kd),
            "max_new_tokens",
            self.max_new_tokens,
            f"less than max_length ({self.max_length}), which counts prompt and completion",
        )
        require(
            not (self.seq_kd and self.lmbda == 1),
            "seq_kd",
            True,
            "lmbda below 1: with lmbda = 1 every step trains on student rollouts and the teacher's text is never used",
        )
        resolve_divergence(self.divergence, **self.divergence_params())


class GKDTrainer(DistillTrainer):
    """Matches the teacher's next-token distributions on dataset tokens, on the student's own, or on both.

    Eq. 3 of arXiv 2306.13649, with one draw of λ per optimiser step, the same on every process.
    """

    args: GKDConfig
    config_class = GKDConfig
    method_name = "GKD"
    paper = {
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        "authors": "Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem",
        "year": "2024",
    }

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.on_policy_step = False
        self.divergence = resolve_divergence(self.args.divergence, **self.args.divergence_params())
        moves = self.args.divergence == "taid" and self.args.t is None
        self.taid_schedule = TaidSchedule() if moves else None

    @property
    def loss_weights(self) -> dict[str, float]:
        scale = self.args.kd_temperature**2 if self.args.tau_squared else 1.0
        weights = {"divergence": scale}
        # On the student's own samples −log q has zero expected gradient: nothing but noise.
        if self.args.lm_loss_weight and not (self.on_policy_step and self.model.training):
            weights["lm_loss"] = self.args.lm_loss_weight
        return weights

    @property
    def samples_completions(self) -> bool:
        return self.args.lmbda > 0

    @property
    def needs_completions(self) -> bool:
        return self.args.lmbda < 1 and not self.args.seq_kd

    @property
    def replaces_completions(self) -> bool:
        return self.args.seq_kd

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        self.on_policy_step = draws_on_policy(self.args.lmbda, self.args.seed, self.state.global_step)
        return self.sample_completions(batches) if self.on_policy_step else batches

    def after_step(self, loss: float) -> None:
        if self.taid_schedule is not None:
            self.taid_schedule.step(loss, self.state.global_step / self.state.max_steps)

    def method_state(self) -> dict[str, Any]:
        return {} if self.taid_schedule is None else {"taid": self.taid_schedule.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        if self.taid_schedule is not None and "taid" in state:
            self.taid_schedule.load_state_dict(state["taid"])

    def divergence_now(self) -> Divergence:
        """The divergence of this step; one with a moving target is evaluated at its end, so that scores compare."""
        if self.taid_schedule is None:
            return self.divergence
        schedule = self.taid_schedule
        return partial(taid, t=schedule.t if self.model.training else schedule.t_end)

    def distill_terms(
        self, student: TokenLogits, teacher: TokenLogits | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert teacher is not None
        tau = self.args.kd_temperature
        terms = {"divergence": self.divergence_now()(student.logps(tau), teacher.logps(tau))}
        if self.args.lm_loss_weight:
            terms["lm_loss"] = -student.logps().gather(-1, tokens["labels"].unsqueeze(-1)).squeeze(-1)
        return terms
