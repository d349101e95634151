"""Make a recipe's student out of its teacher, without training it.

accelerate launch [--config_file …] -m distill_trainers.cli.prune --config recipes/….yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..exceptions import ConfigurationError
from ..locks import holding_run
from ..settings import setting
from . import report_errors, say, shows_usage

_USAGE = """usage: distill-trainers prune --config RECIPE [--parameters 3e9] [--keep_layers N] [--intermediate_size N]
           [--hidden_size N] [--num_attention_heads N] [--num_key_value_heads N] [--num_experts N]
           [--KEY_OF_THE_RECIPE VALUE]
       distill-trainers prune --config RECIPE --dry_run true

The first form measures on the recipe's training data what matters in its teacher, and leaves the student in
OUTPUT_DIR/student_init: an ordinary model folder, with what was measured and kept in pruning.json. A run of a recipe
with the same `student_init` starts from it. Sizes given here take the place of those in the recipe. The second form
loads no weights, and prints the plan."""


@dataclass
class PruneArguments:
    """Sizes of the student, in place of those of the recipe's `student_init`."""

    keep_layers: int | None = setting(None, "Number of the teacher's layers.")
    intermediate_size: int | None = setting(None, "Units of each feed-forward layer, a multiple of 8.")
    hidden_size: int | None = setting(None, "Channels of the residual stream, a multiple of 8.")
    num_attention_heads: int | None = setting(None, "Query heads of each layer, in whole groups.")
    num_key_value_heads: int | None = setting(None, "Key-value heads of each layer, in whole groups.")
    num_experts: int | None = setting(None, "Experts of each mixture.")
    parameters: float | None = setting(None, "In place of all sizes: so many parameters, of which a plan is made.")


def main(argv: Sequence[str]) -> int:
    """Make the student, or print the plan."""
    if shows_usage(argv, _USAGE):
        return 0
    from ..recipe.checks import check_recipe
    from ..recipe.parse import parse_recipe
    from .train import make_initial_student

    recipe = parse_recipe(argv, extra=PruneArguments, complete=_with_sizes, command="prune")
    if recipe.run.dry_run:
        from .plan import make_plan, print_plan

        print_plan(make_plan(recipe))
        return 0
    with holding_run(recipe.args.output_dir):
        folder = make_initial_student(recipe, check_recipe(recipe).ready.rows()[0])
    say(f"The student is in {folder}.")
    return 0


def _with_sizes(recipe: Any) -> None:
    """Put the sizes that were given into the recipe's `student_init`."""
    sizes = {name: value for name, value in asdict(recipe.extra).items() if value is not None}
    if not sizes and not recipe.run.student_init:
        raise ConfigurationError(
            "Got a recipe without `student_init`, and no sizes; expected how small the student is to be. Add "
            "`--parameters 3e9`, for instance, or `student_init` to the recipe."
        )
    if sizes:
        told = recipe.run.student_init or {}
        how = {name: told[name] for name in ("measure", "importance_batches") if name in told}
        recipe.run.student_init = {"from_teacher": True, **how, **sizes}
        recipe.model.model_name_or_path = None


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
