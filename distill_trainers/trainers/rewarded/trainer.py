"""Trainers that learn from rewards of the student's completions beside their divergence."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers import TrainerCallback

from ...losses import token_entropy, token_logps
from ...losses.policy_gradient import returns_after, sequence_rewards
from ...losses.reduction import IGNORE_INDEX
from ...losses.rewards import iw_opd_weights, policy_term, rlsd_advantages
from ...losses.sampler_ratio import LOG_RATIO, ROW_WEIGHT
from ...rewards.functions import named, reward_functions
from ...signals import TokenLogits, TokenLogprobs, TokenSignal
from ..base import Batch
from ..lifecycle.order import RepeatedSampler
from ..lifecycle.passes import HeldOutPasses
from ..logps import logps_of_both
from ..on_policy import OnPolicyTrainer
from .scoring import ADVANTAGE, Rewards, without_reward_rows
from .settings import RewardSettings

FUTURE, OPD_WEIGHT = "token_future", "token_opd_weight"  # batch entries [B, T]
POLICY = "policy"  # the term of rewards
logger = logging.getLogger(__name__)


class RewardStart(TrainerCallback):
    """Warns of a run that ends before its rewards begin, and of functions for which other processes do not wait."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin, steps = args.begins_at(state.max_steps), state.max_steps
        if args.reward_names and begin >= steps:
            logger.warning(
                "Got `reward_start: %g` with %d steps: the run ends before its rewards begin, so they teach nothing. "
                "Lower it (below 1 it is a share of all steps), or set `reward_schedule: joint`.",
                args.reward_start,
                steps,
            )
        slow = [f for f in reward_functions(args.reward_names) if not f.is_checker]  # built-ins have their own limits
        whole = len(slow) * (args.reward_timeout or math.inf)
        if slow and args.world_size > 1 and whole >= args.ddp_timeout:
            logger.warning(
                "Got %d reward functions, each with `reward_timeout: %s`, and `ddp_timeout: %d`: where together they "
                "take longer, other processes end the run, and the last finished step may not be saved. Lower "
                "`reward_timeout` (of all together below `ddp_timeout`), or raise `ddp_timeout`.",
                len(slow),
                "null" if args.reward_timeout is None else f"{args.reward_timeout:g}",
                args.ddp_timeout,
            )


class RewardedTrainer(OnPolicyTrainer):
    """An `OnPolicyTrainer` whose config has `RewardSettings`.

    `score` rewards what a step has sampled. A method adds `policy_terms` to its terms where batches have `ADVANTAGE`,
    and `POLICY` to its weights where `is_rewarded`.

    Args:
        reward_funcs: a name, a function `f(prompts, completions, **columns)` as in TRL, or a list of both; in place of
            the setting. All other arguments are those of `DistillTrainer`.
    """

    _given_rewards: Any = None
    rewards: Rewards | None
    on_policy_step: bool

    def __init__(self, *args: Any, reward_funcs: Any = None, **kwargs: Any):
        self._given_rewards = reward_funcs
        super().__init__(*args, **kwargs)
        self.add_callback(RewardStart)

    def configured(self, args: Any) -> Any:
        if self._given_rewards is not None:
            args._require("reward_funcs", args.reward_funcs is None, "none where the trainer is given functions, too")
            given = self._given_rewards
            args = copy.copy(args)  # the user's own may be given to another trainer, with functions again
            args.reward_funcs = given if isinstance(given, str) else named(given)
            args.check_rewards()
        return args

    def set_up_method(self) -> None:
        super().set_up_method()
        self.rewards = Rewards(self) if self.reward_args.reward_names else None
        self.passes = HeldOutPasses(self, self.rewards) if self.rewards and self.reward_args.eval_pass_rows else None

    @property
    def reward_args(self) -> RewardSettings:
        """The config, as its settings of rewards."""
        return cast(RewardSettings, self.args)

    # ---- When -------------------------------------------------------------------------------------------------------

    @property
    def sampled_step(self) -> int:
        """The step in which the text of the coming step is sampled."""
        return self.state.global_step

    @property
    def rewards_have_begun(self) -> bool:
        """Whether the text of the coming step is rewarded, if it is sampled."""
        return self.rewards is not None and self.sampled_step >= self.reward_args.begins_at(self.state.max_steps)

    def must_sample(self, step: int) -> bool:
        """Tell whether step `step` samples whatever λ says: those of rewards behind a divergence do."""
        args = self.reward_args
        return (
            self.rewards is not None
            and args.reward_schedule == "after"
            and step >= args.begins_at(self.state.max_steps)
        )

    @property
    def is_rewarded(self) -> bool:
        """Whether the loss, as it is asked for now, has a term of rewards; that of evaluation has none."""
        return self.model.training and self.on_policy_step and self.rewards_have_begun

    # ---- What -------------------------------------------------------------------------------------------------------

    def score(self, batches: list[Batch]) -> list[Batch]:
        batches = super().score(batches)
        if not (self.on_policy_step and self.rewards_have_begun):  # the student may not be in training mode yet
            return [without_reward_rows(batch) for batch in batches]
        assert self.rewards is not None
        batches = self.rewards.added_to(batches)
        if self.reward_args.future_kl or self.reward_args.token_weighting == "iw_opd":
            batches = [self._with_log_ratios(batch) for batch in batches]
        return batches

    def _with_log_ratios(self, batch: Batch) -> Batch:
        """Add what the log-ratios of a row's tokens say of its other tokens."""
        args, mask = self.reward_args, batch["labels"] != IGNORE_INDEX
        student, _, teacher = _spread(logps_of_both(self, batch), mask).unbind(-1)
        rewards = sequence_rewards(student, teacher, mask)
        entries = {}
        if args.future_kl:
            entries[FUTURE] = returns_after(rewards, mask)
        if args.token_weighting == "iw_opd":
            entries[OPD_WEIGHT] = iw_opd_weights(rewards, mask, args.token_weighting_strength)
        return {**batch, **entries}

    def policy_terms(
        self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute `POLICY` `[n]`, and what is logged beside it: `entropy`, `sampled_kl`."""
        args, labels, temperature = self.reward_args, tokens["labels"], self.args.temperature
        plain = token_logps(student, labels)
        logps = plain if temperature == 1 else token_logps(TokenLogits(student.logits / temperature), labels)
        teacher_logps = _teacher_logps(teacher, labels)
        log_ratios = None if teacher_logps is None else (teacher_logps - plain).detach()
        advantages = tokens[ADVANTAGE]
        if args.token_weighting == "rlsd":
            assert log_ratios is not None
            strength, clip = args.token_weighting_strength, args.token_weighting_clip
            advantages = rlsd_advantages(advantages, log_ratios, strength, clip)
        advantages = args.reward_weight * advantages
        if FUTURE in tokens:
            advantages = advantages + args.anchor_weight * tokens[FUTURE]
        ratio = tokens[LOG_RATIO].exp() if LOG_RATIO in tokens else None
        terms = {POLICY: policy_term(logps, advantages, tokens.get(ROW_WEIGHT), ratio, args.clip_range)}
        terms["entropy"] = token_entropy(student)
        return terms if log_ratios is None else {**terms, "sampled_kl": -log_ratios}

    # ---- Rows and evaluation ----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order, size = super()._get_train_sampler(train_dataset), self.reward_args.num_generations
        return order if order is None or size == 1 else RepeatedSampler(order, size)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Add pass@1 and pass@k of held-out prompts."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.passes is None or description == "Prediction":
            return output
        scores = {f"{metric_key_prefix}_{k}": value for k, value in self.passes.take(dataloader.dataset).items()}
        self.last_eval_metrics.update(scores)
        return output._replace(metrics={**(output.metrics or {}), **scores})

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | ({} if self.passes is None else {"passes": self.passes.state_dict()})

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        if self.passes is not None and "passes" in state:
            self.passes.load_state_dict(state["passes"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.passes is not None and self.state.log_history:
            self.passes.heard(self.state.log_history[-1])


def _teacher_logps(teacher: TokenSignal | None, labels: Tensor) -> Tensor | None:
    if isinstance(teacher, TokenLogits):
        return token_logps(teacher, labels)
    return teacher.values if isinstance(teacher, TokenLogprobs) else None


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values `[N, K]` of the tokens of a mask `[B, T]`, at their places: `[B, T, K]`."""
    entry = values.new_zeros((*mask.shape, values.shape[-1]))
    entry[mask] = values.to(mask.device)
    return entry
