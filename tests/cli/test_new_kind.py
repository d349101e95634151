"""A new kind of teacher costs one class and two rows: a constant distribution, added here and used everywhere.

Everybody else asks the members of `Teacher`. What this file touches of the package is what a kind touches in the
project: a file in teachers/ with its class, a row in teachers/placement.py (its name in recipes), a row in
teachers/loading.py (its class), teachers/options.py if it has settings, a row in benchmarks/parity.py and in
docs/placement.md.
"""

import json

import pytest
import torch

from distill_trainers.cli import main
from distill_trainers.cli.train import run
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.signals import Logits
from distill_trainers.teachers import Teacher, loading, placement

KIND = "constant"


class ConstantTeacher(Teacher):
    """Says the same of every token: all ids are equally likely."""

    provides = frozenset({"distribution"})
    can_read_rollouts = True
    name = "a constant distribution"
    place = "the same for every token"

    @classmethod
    def opened(cls, pair, options):
        return cls(len(pair.tokenizer))

    def __init__(self, num_ids):
        self.num_ids = num_ids

    def prepare(self, accelerator):
        self.device = accelerator.device

    def signal(self, inputs, predicts, vocab_size):
        return Logits(torch.zeros(int(predicts.sum()), vocab_size or self.num_ids, device=self.device))

    def fingerprint(self):
        return f"constant-{self.num_ids}"


@pytest.fixture
def constant(monkeypatch):
    """Two rows: what a recipe may say, and which class that is."""
    row = placement.Placement("the same for every token", has_body=False, unnamed=True)
    monkeypatch.setitem(placement.PLACEMENTS, KIND, row)
    monkeypatch.setitem(loading.KINDS, KIND, ConstantTeacher)


@pytest.fixture
def flat(make_teacher, tokenizer, tmp_path):
    """A folder with a model that says just that: its output head is 0."""
    model = make_teacher()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(tmp_path / "flat")
    tokenizer.save_pretrained(tmp_path / "flat")
    return str(tmp_path / "flat")


@pytest.fixture
def constant_recipe(recipe, constant):
    """`constant_recipe(**changes)`: the small recipe with this teacher, by one key."""
    return lambda **changes: recipe(**{"teacher_model_name_or_path": None, "teacher_placement": KIND, **changes})


SETTINGS = [
    {"method": "gkd", "divergence": "reverse_kl", "lmbda": 0.0},
    {"method": "gkd", "lmbda": 1.0, "temperature": 0.0},
    {"method": "minillm", "objective": "token", "lmbda": 0.0},
    {"method": "dpkd", "chosen": "dataset", "temperature": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['method']}-{s.get('lmbda', '')}")
def test_its_losses_and_gradients_are_those_of_a_model_that_says_the_same(constant_recipe, recipe, flat, settings):
    """The row of the parity table: off-policy and on-policy, in every method."""

    def three_steps(path):
        trainer = run(parse_recipe(["--config", path]))
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [log["loss"] for log in logs], [log["grad_norm"] for log in logs]

    losses, gradients = three_steps(constant_recipe(**settings))
    expected, norms = three_steps(recipe(**{"teacher_model_name_or_path": flat, **settings}))
    assert len(losses) == 3 and losses == pytest.approx(expected, rel=1e-5)
    assert gradients == pytest.approx(norms, rel=1e-4)


def test_a_recipe_is_planned_examined_trained_measured_and_carded(constant_recipe, tmp_path, capsys):
    data = str(tmp_path / "train.jsonl")
    measured = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 3, "eval_measures": ["agreement"]}
    path = constant_recipe(lmbda=0.0, **measured)
    assert main(["train", "--config", path, "--dry_run", "true"]) == 0
    assert ConstantTeacher.place in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--config", path]) == 0, capsys.readouterr()
    capsys.readouterr()
    assert main(["train", "--config", path]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert ConstantTeacher.name in card
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert scores["eval_kl"] > 0 and "eval_student_text_reverse_kl" in scores


def test_what_it_cannot_do_is_refused_before_anything_is_loaded(constant_recipe, capsys, monkeypatch):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *args: pytest.fail("loaded"))
    path = constant_recipe(method="minillm", teacher_mix_alpha=0.2)
    for command in (["train", "--config", path], ["train", "--config", path, "--dry_run", "true"]):
        assert main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "MiniLLMTrainer needs ['completions'] of its teacher, but ConstantTeacher provides only" in said
    assert main(["pairs", "--config", path]) == 2


def test_it_may_have_a_name_of_its_own_and_no_cache_in_front(constant_recipe, capsys, tmp_path):
    named = constant_recipe(lmbda=0.0, teacher_model_name_or_path="uniform:1")
    assert main(["train", "--config", named, "--dry_run", "true"]) == 0
    assert main(["train", "--config", named]) == 0
    capsys.readouterr()
    cached = constant_recipe(lmbda=0.0, teacher_cache=str(tmp_path / "cache"))
    assert main(["train", "--config", cached]) == 2
    assert "`teacher_placement: constant`; expected one of them. Leave one out" in " ".join(
        capsys.readouterr().err.split()
    )
