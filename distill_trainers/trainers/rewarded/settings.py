"""Settings of rewards beside a divergence, by TRL's names where it has them, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ...data.reward_rows import RewardRows
from ...losses.rewards import ADVANTAGES, SCALES, WEIGHTINGS
from ...requirements import Requirements
from ...rewards.functions import GIVEN, check_names, needs_answers, reward_functions
from ...settings import Checked, require, setting
from .groups import check_group_rows, check_groups

SCHEDULES = ("after", "joint")
GUARDS = ("warn", "stop", "off")
ANSWER_COLUMN = "reward_answer_column"
_LARGEST_WEIGHT = 1e6  # beside the largest rewards, sums still fit into float32


@dataclass
class RewardSettings(Checked):
    """Rewards of the student's completions. A config adds them to those of a method that samples."""

    num_generations: int = setting(
        1,
        "Completions of each prompt in a step, for rewards and for feedback with a right sample ({right}); the rows of "
        "a step, of all processes, must be a multiple of it.",
        least=1,
    )
    reward_funcs: list[str] | str | None = setting(
        None,
        "What completions are rewarded by: final_number, choice, math, exact, json, length:<tokens>, format:<pattern>, "
        "or `module:function` (with trust_remote_code); Python passes functions to the trainer.",
    )
    reward_weights: list[float] | None = setting(None, "Weight of each of reward_funcs; 1 for all if not set.")
    reward_answer_column: str = setting("answer", "Column of right answers that the built-in rewards compare with.")
    reward_timeout: float | None = setting(
        600.0,
        "Seconds that a reward function may take for a step's completions; null: any, in the main thread.",
        above=0,
        most=10**6,  # of what threads can wait for everywhere
    )
    advantage: str = setting(
        "leave_one_out",
        "Reward less the mean of the others of its group (leave_one_out), of all of it (group, as in GRPO: smaller by "
        "1 − 1/G), or the reward itself (none).",
    )
    scale_rewards: str = setting(
        "none", "Divide advantages by the deviation of their group (group, as in GRPO), of the step (batch), or none."
    )
    reward_weight: float = setting(1.0, "Weight of the rewards' policy gradient.", above=0)
    anchor_weight: float = setting(
        0.1, "β: weight of the divergence in steps with rewards; 0 learns from rewards alone.", least=0
    )
    reward_schedule: str = setting(
        "after",
        "after: the divergence alone until reward_start, then rewards with it as their anchor; joint: from the start.",
    )
    reward_start: float = setting(
        0.5, "With reward_schedule after: steps of the divergence alone (below 1: a share of all).", least=0
    )
    future_kl: bool = setting(
        False,
        "Count what a token does to the divergence of later ones too: the exact gradient of E[R] − β·KL of whole "
        "completions, for divergence reverse_kl.",
    )
    token_weighting: str = setting(
        "none",
        "rlsd: weigh advantages by tokens on which the teacher agrees; iw_opd: weigh the divergence by how little has "
        "gone wrong before a token.",
    )
    token_weighting_strength: float = setting(0.5, "λ of rlsd (at most 1), γ of iw_opd: 0 weighs nothing.", least=0)
    token_weighting_clip: float = setting(0.2, "ε of rlsd: how far a weight may leave 1.", least=0, below=1)
    clip_range: float | None = setting(
        0.2,
        "PPO: bound on how far q / sampler of a token may leave 1 (TRL's epsilon); acts with sampler_correction.",
        above=0,
    )
    eval_pass_rows: int = setting(
        32, "With rewards: held-out prompts on which each evaluation takes pass@1 and pass@k; 0: none.", least=0
    )
    eval_pass_samples: int = setting(4, "k of pass@k: completions of each of these prompts.", least=1)
    eval_pass_func: str | None = setting(
        None, "Says which of them pass (0.5 or more), as reward_funcs; by default the first of these."
    )
    reward_guard: str = setting(
        "warn", "Where rewards rise while held-out pass@1 falls: warn, stop (with a checkpoint), or off."
    )

    if TYPE_CHECKING:
        trust_remote_code: bool = False
        temperature: float = 1.0
        sampler_correction: str = "none"

        @property
        def world_size(self) -> int: ...

        @property
        def samples_completions(self) -> bool: ...

    @property
    def reward_names(self) -> list[str]:
        """The names in `reward_funcs`."""
        return [self.reward_funcs] if isinstance(self.reward_funcs, str) else list(self.reward_funcs or ())

    @property
    def chosen_rewards(self) -> list[str]:
        """Names of the settings of rewards that a card tells: those that are not at their defaults."""
        names = [field.name for field in fields(RewardSettings) if getattr(self, field.name) != field.default]
        return [name for name in names if self.reward_names and name not in type(self).__annotations__]

    @property
    def pass_name(self) -> str:
        """The name of what says whether a completion passes."""
        return self.eval_pass_func or self.reward_names[0]

    @property
    def reward_scores(self) -> frozenset[str]:
        """What evaluation logs of rewards."""
        names = {"pass@1", f"pass@{self.eval_pass_samples}"}
        return frozenset(names if self.reward_names and self.eval_pass_rows else ())

    def begins_at(self, max_steps: int) -> int:
        """Return the step (from 0) that is the first with rewards."""
        if self.reward_schedule == "joint":
            return 0
        return int(self.reward_start * max_steps) if self.reward_start < 1 else int(self.reward_start)

    def reward_rows(self, training: bool) -> RewardRows | None:
        """Say what rows must bring for rewards; None: there are none."""
        if not self.reward_names or not (training or self.eval_pass_rows):
            return None
        names = self.reward_names if training else [self.pass_name]
        needed = ((self.reward_answer_column, ANSWER_COLUMN),) if needs_answers(names) else ()
        functions = reward_functions(names)
        taken = ((column, function.name) for function in functions for column in sorted(function.requires - GIVEN))
        return RewardRows(needed, tuple(taken))

    def check_reward_rows(self, train: Any, wants: Requirements) -> None:
        """Refuse rows that cannot be repeated, and functions that are not there; their modules are imported now."""
        check_groups(self, self.world_size)
        check_group_rows(self, train, wants)
        if self.reward_names:
            reward_functions([*self.reward_names, self.pass_name])
            return
        for field in fields(RewardSettings):
            idle = getattr(self, field.name) != field.default and field.name not in ("num_generations", "clip_range")
            self._require(field.name, not idle, "`reward_funcs` beside it: there is nothing to be rewarded by")

    def check_rewarded(self) -> None:
        """Refuse settings of a method that do not go with rewards; a method's config extends it."""

    def check_rewards(self) -> None:
        """Refuse settings of rewards that cannot work.

        Raises:
            ConfigurationError: naming the setting.
        """
        names = self.reward_names
        if self.reward_funcs is None:
            return  # a trainer may be given them yet
        check_names(names, self.trust_remote_code)
        check_names([self.pass_name], self.trust_remote_code, "eval_pass_func")
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        weights, size = self.reward_weights, self.num_generations
        one_each = f"one number for each of the {len(names)} functions"
        self._require("reward_weights", weights is None or len(weights) == len(names), one_each)
        bounded = all(abs(weight) <= _LARGEST_WEIGHT for weight in weights or ())
        self._require("reward_weights", bounded, f"numbers of at most {_LARGEST_WEIGHT:g}; `reward_weight` scales all")
        grouped = "2 or more with `advantage: {}`, which compares the completions of one prompt; 8 is usual"
        compares = self.advantage != "none" or self.scale_rewards == "group"
        self._require("num_generations", size > 1 or not compares, grouped.format(self.advantage))
        sampled = "above 0 with `reward_funcs`, which reward what the student samples"
        require(self.samples_completions, "lmbda", getattr(self, "lmbda", None), sampled)
        self._require(
            "temperature", self.temperature > 0, "a positive number with `reward_funcs`: greedy text is no sample"
        )
        for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            biased = f"{off} with `reward_funcs`: tokens that are never drawn bias the policy gradient"
            self._require(name, getattr(self, name) == off, biased)
        self.check_rewarded()
        self._check_idle()
        strength = "at most 1 with `token_weighting: rlsd`"
        self._require(
            "token_weighting_strength", self.token_weighting != "rlsd" or self.token_weighting_strength <= 1, strength
        )

    def _check_idle(self) -> None:
        """Refuse settings that act beside another one alone."""
        idle = {
            "reward_start": (self.reward_schedule == "joint", "`reward_schedule: after` beside it"),
            "token_weighting_strength": (self.token_weighting == "none", "`token_weighting` beside it"),
            "token_weighting_clip": (self.token_weighting != "rlsd", "`token_weighting: rlsd` beside it"),
        }
        stops = self.reward_guard == "stop" and not self.eval_pass_rows
        self._require("reward_guard", not stops, "`eval_pass_rows` above 0 beside it, which it watches")
        passes = dict.fromkeys(("eval_pass_samples", "eval_pass_func"), (not self.eval_pass_rows, "`eval_pass_rows`"))
        defaults = {field.name: field.default for field in fields(RewardSettings)}
        for name, (is_idle, expected) in {**idle, **passes}.items():
            self._require(name, not is_idle or getattr(self, name) == defaults[name], f"{expected}, or its default")


CHOICES = {
    "advantage": ADVANTAGES,
    "scale_rewards": SCALES,
    "reward_schedule": SCHEDULES,
    "token_weighting": WEIGHTINGS,
    "reward_guard": GUARDS,
}
