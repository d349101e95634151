"""pass@1 and pass@k of held-out prompts at each evaluation, and a watch over rewards that rise while these fall."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from accelerate.utils import gather_object

from ... import models
from ...data.reward_rows import REWARD_ROW
from ...exceptions import BAD_INPUT, DatasetError, RewardError
from ...randomness import Purpose, Role, Stream
from ...rewards.functions import reward_functions
from ...rollouts import CompletionSettings, complete_prompts, local_engine
from ...rollouts.store import prompt_key
from ..protocol import Run
from ..rewarded.settings import RewardSettings
from .completions import student_prompt
from .outage import keep_finished_step
from .side_by_side import SideBySide, log_side_by_side

logger = logging.getLogger(__name__)

PASSES = 0.5  # what a completion must be worth
_SHOWN = 400  # characters of a text that the log shows


def pass_at(right: int, samples: int, k: int) -> float:
    """Estimate without bias how likely k samples hold a right one, from samples so many of which are right.

    The estimate of arXiv 2107.03374, eq. 1:

    1 - C(samples - right, k) / C(samples, k)
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass
class Watch:
    """What the guard remembers: rewards since the last evaluation, and how things stood when pass@1 was at its best.

    An evaluation with no log of rewards since the one before goes by the rewards of that one.
    """

    total: float = 0.0
    count: int = 0
    latest: float | None = None  # mean reward of logs, as the last evaluation knew it
    best: float | None = None
    reward: float | None = None  # then
    told: bool = False

    def is_hacked(self, passed: float, error: float) -> bool:
        """Take in pass@1 of an evaluation, and tell whether it fell, by more than twice its error, as rewards rose."""
        reward = self.latest = self.total / self.count if self.count else self.latest
        self.total, self.count = 0.0, 0
        if reward is None:
            return False  # rewards have not begun
        fell = self.best is not None and passed < self.best - 2 * error
        rose = self.reward is not None and reward > self.reward
        if self.best is None or passed >= self.best:
            self.best, self.reward = passed, reward
        return fell and rose


class HeldOutPasses:
    """Samples completions of the first held-out prompts, and counts which pass.

    Args:
        run: its config has `RewardSettings`.
        rewards: calls functions (`trainers.rewarded.scoring.Rewards`).
    """

    def __init__(self, run: Run, rewards: Any):
        self.run, self.rewards = run, rewards
        self.args = cast(RewardSettings, run.args)
        self.functions = reward_functions([self.args.pass_name])
        self.watch = Watch()

    def heard(self, logs: dict[str, float]) -> None:
        """Take in a training log."""
        if "reward_mean" in logs:
            self.watch.total += logs["reward_mean"]
            self.watch.count += 1

    def take(self, dataset: Any) -> dict[str, float]:
        """Return `pass@1` and `pass@k` of rows of a prepared dataset; all processes must ask.

        Raises:
            DatasetError: rows that were prepared without their columns.
        """
        count, samples = min(self.args.eval_pass_rows, len(dataset)), self.args.eval_pass_samples
        rows = [row for row in (dataset[k] for k in range(count)) if row["prompt_length"]]
        if not rows:
            return {}
        if REWARD_ROW not in rows[0]:
            raise DatasetError(
                "Got evaluation rows that are tokenised already, without the columns that rewards read; expected raw "
                "rows, or `eval_pass_rows: 0`."
            )
        prompts = [student_prompt(row) for row in rows]
        known = [row[REWARD_ROW] for row in rows]
        rights, texts = [0] * len(rows), list[Any]()
        for sample in range(samples):
            completions = self._completed(prompts, sample)
            for place, value in enumerate(self._values(known, prompts, completions)):
                rights[place] += value is not None and value >= PASSES
            texts = texts or completions
        first = [right / samples for right in rights]
        passed = sum(first) / len(first)
        self._show(rows, prompts, texts)
        self._guard(passed, first)
        scores = {"pass@1": passed}
        if samples > 1:
            scores[f"pass@{samples}"] = sum(pass_at(right, samples, samples) for right in rights) / len(rights)
        return scores

    def _completed(self, prompts: Sequence[list[int]], sample: int) -> list[list[int]]:
        run = self.run
        engine = local_engine(run.args.rollout_engine, run.processing_class)
        stream = Stream(run.args.seed, Role.STUDENT, Purpose.PASSED).at(sample=sample)
        batch_size = run.args.rollout_batch_size or run.args.per_device_eval_batch_size
        settings = CompletionSettings(run.sampling, stream, batch_size, engine)
        generating = models.generating(run.model_wrapped, run.accelerator)
        by_key = {prompt_key(ids): ids for ids in prompts}
        written = complete_prompts(by_key, generating, run.accelerator, settings, None, progress=False)
        return [written[prompt_key(ids)] for ids in prompts]

    def _values(
        self, known: Sequence[str], prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> list[float | None]:
        """Ask on the first process alone: all must count alike, though a function of the user's may answer anew."""
        told: tuple[list[float | None], str] = ([], "")
        if self.run.accelerator.is_main_process:
            try:
                told = self.rewards.valued_by(self.functions, known, prompts, completions)[0], ""
            except (RewardError, *BAD_INPUT) as error:
                told = [], str(error)
        values, failure = gather_object([told])[0]
        if failure:
            kept = keep_finished_step(self.run) if self.run.is_in_train else ""
            raise RewardError(f"While held-out prompts were scored: {failure} {kept}".rstrip())
        return values

    def _show(self, rows: Sequence[Any], prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> None:
        run: Any = self.run
        decode = run.processing_class.decode
        if not run.accelerator.is_main_process or run.args.eval_measures:  # which show both models'
            return
        shown = [
            SideBySide(decode(ids)[-_SHOWN:], decode(row["input_ids"][len(ids) :]), decode(text))
            for row, ids, text in zip(rows[: run.args.eval_measures_shown], prompts, completions, strict=False)
        ]
        log_side_by_side(run.args, run.callback_handler.callbacks, run.state.global_step, shown)

    def _guard(self, passed: float, of_prompts: Sequence[float]) -> None:
        mode, watch = self.args.reward_guard, self.watch
        if mode == "off" or not self.run.is_in_train:
            return
        best = watch.best
        hacked = watch.is_hacked(passed, _standard_error(of_prompts))
        if not hacked or watch.told:
            return
        watch.told = True
        done = "Training stops here, with a checkpoint. " if mode == "stop" else ""
        logger.warning(
            "Rewards rise while held-out pass@1 falls (%.3f at its best, %.3f at step %d): the student may have learnt "
            "to please the reward functions rather than to answer. %sLook at its completions (samples.jsonl), raise "
            "`anchor_weight`, lower `reward_weight`, or mend the functions. `reward_guard: off` ends this watch.",
            best,
            passed,
            self.run.state.global_step,
            done,
        )
        if mode == "stop":
            self.run.control.should_save = self.run.control.should_training_stop = True

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.watch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch = Watch(**state)


def _standard_error(values: Sequence[float]) -> float:
    """Of a mean over prompts."""
    count = len(values)
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, count - 1) / count)
