"""Students made anew by `model_init`, one for each call of `train`; the search for hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from torch import nn
from transformers import Trainer

from ... import models
from ...exceptions import ConfigurationError
from ..given import arguments
from .checkpoints import read_method_state


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


class FreshStudents(Trainer):
    """What of `DistillTrainer` makes students anew, and sets the method up again around each."""

    if TYPE_CHECKING:
        args: Any
        requirements: Any
        student_source: Any
        run_checkpoints: list[str]
        make_student: Any
        set_up_method: Any
        load_method_state: Any
        build_collator: Any

    def new_source(self, trial: Any = None) -> Any:
        """Return what `model_init` returns: a name, or a model that no earlier call has returned.

        Raises:
            ConfigurationError: it returned something else.
        """
        set_seed(self.args.seed)
        source = models.compiled_by_layer(arguments.plain(arguments.made_by(self.model_init, trial)))
        arguments.check_kind(type(self).__name__, "model", source, of="model_init()")
        if isinstance(source, nn.Module) and source is getattr(self, "student_source", None):
            raise ConfigurationError(
                "`model_init` returned the model that it had returned before, which is trained by now; expected a new "
                "one from each call. Load or build it inside the function."
            )
        return source

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a student anew, with its adapter, as the constructor does."""
        student = self.make_student(self.new_source(trial))
        models.compile_for_launch(student, self.args, self.accelerator)
        return student

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Do as `transformers.Trainer.hyperparameter_search`; without `compute_objective`, `eval_loss` is minimised.

        The sum of all metrics, which transformers takes, would add agreement to perplexity and the count of tokens.

        Raises:
            ConfigurationError: there is no `model_init`; `hp_space` names what acts while the trainer is made; nothing
                is evaluated, or what the search is for is not said and not the loss alone.
        """
        if self.model_init is None:
            raise ConfigurationError(
                f"Got `hyperparameter_search` with one student for all trials; expected a new one for each. Make the "
                f"trainer with `{type(self).__name__}(model_init=function, …)` in place of `model=`, where "
                "`function()` returns a folder, a Hub id or a new model."
            )
        if self.eval_dataset is None:
            raise ConfigurationError(
                "Got `hyperparameter_search` without `eval_dataset`; expected one, as trials are compared by "
                "what evaluation gives. Pass it to the trainer."
            )
        if compute_objective is None and (self.compute_metrics is not None or isinstance(self.eval_dataset, Mapping)):
            raise ConfigurationError(
                "Got `hyperparameter_search` with metrics of your own or several evaluation sets; expected to be told "
                "what is compared. Pass `compute_objective=lambda metrics: metrics['eval_…']` and its `direction`."
            )
        if compute_objective is None and kwargs.get("direction", "minimize") != "minimize":
            raise ConfigurationError(
                f"Got `direction={kwargs['direction']!r}` without `compute_objective`, whose default is `eval_loss`; "
                "expected 'minimize'. Pass `compute_objective=lambda metrics: metrics['eval_…']`."
            )
        space = None if hp_space is None else arguments.checked_space(hp_space, self.args)
        return super().hyperparameter_search(space, compute_objective or _loss, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        # The one place between a new student, a trial's settings, and the first step.
        before = self._asked()
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        self.args._check_values()
        self.args._check()
        if trial is not None and self._asked() != before:
            raise ConfigurationError(
                f"The trial {getattr(trial, 'params', trial)} asks something else of rows or teacher than the settings "
                "that the trainer was made with: a weight or λ of 0 switches something off. Keep such a value above 0 "
                "in `hp_space` and in the config, or make another trainer."
            )
        self.set_up_method()
        if self.run_checkpoints:
            self.load_method_state(read_method_state(self.run_checkpoints[-1]))

    def _asked(self) -> tuple[Any, ...]:
        args = self.args
        wants = args.needs, args.samples_completions, args.needs_completions, args.replaces_completions
        return *wants, self.build_collator(self.processing_class)
