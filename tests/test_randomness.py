"""Random numbers: each sequence has a name, no two names share one, and nobody draws by any other."""

from __future__ import annotations

import ast
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

import distill_trainers
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.trainers import METHODS
from distill_trainers.trainers.lifecycle.order import EpochSampler

ROOT = Path(distill_trainers.__file__).parent
HELPER = "randomness.py"

# Where each purpose is used: one place each, so that no two share a stream.
USES = {
    Purpose.ON_POLICY: "rollouts/draws.py",
    Purpose.ROLLOUT: "trainers/sampling.py",
    Purpose.MIXTURE: "trainers/minillm/scoring.py",
    Purpose.REPLAY: "rollouts/replay.py",
    Purpose.TOKEN_BATCHES: "trainers/lifecycle/order.py",
    Purpose.INNER_EPOCH: "trainers/minillm/cycles.py",
    Purpose.PLAIN_TEXT: "trainers/minillm/plain_text.py",
    Purpose.COMPLETION: "trainers/lifecycle/completions.py",
    Purpose.REJECTED: "trainers/dpkd/responses.py",
    Purpose.SCORED: "evaluation/settings.py",
    Purpose.PASSED: "trainers/lifecycle/passes.py",
    Purpose.PAIR: "cli/pairs.py",
    Purpose.RATIONALE: "cli/rationales.py",
    Purpose.CACHE: "teachers/cache/kinds.py",
    Purpose.BOOTSTRAP: "evaluation/intervals.py",
}

# Draws that are not named, by file and what is called, and why.
ALLOWED = {
    ("trainers/base.py", "set_seed"): "transformers' own, for adapters and dropout, as `Trainer` has it",
    ("trainers/lifecycle/fresh.py", "set_seed"): "likewise, for what makes the model",
    ("trainers/lifecycle/order.py", "torch.Generator"): "the order must be that of the Trainer of transformers",
    ("trainers/lifecycle/order.py", "manual_seed"): "likewise",
    ("trainers/lifecycle/order.py", "torch.randperm"): "likewise",
    ("data/loading.py", "train_test_split"): "the rows that `datasets` holds out for the same seed",
    ("toy.py", "random.Random"): "the toy's problems, by the seed of their own that the caller gives",
    ("toy.py", "torch.random.fork_rng"): "the toy's weights, likewise",
    ("toy.py", "torch.manual_seed"): "likewise",
    ("doctor/pace.py", "torch.randn"): "numbers whose values nobody reads: products are timed",
    ("trainers/lifecycle/proof.py", "torch.random.fork_rng"): "keeps the run's state while a saved model is loaded",
    ("trainers/lifecycle/outage.py", "random.setstate"): "puts the state back as a step found it",
    ("trainers/lifecycle/outage.py", "numpy.random.set_state"): "likewise",
    ("trainers/lifecycle/outage.py", "torch.set_rng_state"): "likewise",
    ("trainers/lifecycle/outage.py", "torch.cuda.set_rng_state"): "likewise",
    ("rollouts/vllm.py", "random.setstate"): "puts the state back that vLLM seeds for the whole process",
    ("rollouts/vllm.py", "numpy.random.set_state"): "likewise",
    ("rollouts/vllm.py", "torch.random.fork_rng"): "likewise",
    ("models/probing.py", "torch.random.fork_rng"): "keeps the run's state while a model is probed",
    ("signals.py", "torch.multinomial"): "by the generator that it is given",
    ("rationales/endpoint_model.py", "random.uniform"): "how long to wait before asking again",
    ("servers/endpoints.py", "random.uniform"): "likewise",
}

# Called by these names on anything, a call seeds or draws; `torch.` ones draw from the state of the process.
METHODS_THAT_DRAW = {
    *("manual_seed", "manual_seed_all", "set_seed", "seed_all", "default_rng", "RandomState", "SeedSequence"),
    *("fork_rng", "set_rng_state", "train_test_split", "seed_worker"),
    *("normal_", "uniform_", "bernoulli_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"),
}
OF_TORCH = {
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "multinomial", "bernoulli"),
    *("normal", "poisson", "Generator", "seed", "initial_seed"),
}


def draws_in(source):
    """Every call that seeds or draws, by its dotted name without aliases: (line, name)."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            names |= {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node):
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, f"?.{node.id}") if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        module, _, last = name.rpartition(".")
        if last in ("getstate", "get_state"):
            continue
        of_state = module.startswith(("random", "numpy.random")) or (module.startswith("torch") and last in OF_TORCH)
        seeds = any(keyword.arg in ("random_state", "generator") for keyword in node.keywords) and last == "shuffle"
        shuffles = last == "shuffle" and any(keyword.arg == "seed" for keyword in node.keywords)
        if of_state or last in METHODS_THAT_DRAW or seeds or shuffles:
            yield node.lineno, name if module.startswith(("random", "numpy", "torch")) else last


def test_nobody_seeds_or_draws_but_by_a_named_stream():
    found = set()
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        if place == HELPER:
            continue
        for line, name in draws_in(file.read_text()):
            assert (place, name) in ALLOWED, f"{place}:{line} calls {name}; take a Stream, or say in ALLOWED why not"
            found.add((place, name))
    assert found == ALLOWED.keys(), "what is allowed and no longer there"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.manual_seed(1)", "torch.manual_seed"),
        ("import torch\ntorch.cuda.manual_seed_all(1)", "torch.cuda.manual_seed_all"),
        ("import torch as t\ng = t.Generator().manual_seed(1)", "torch.Generator"),
        ("from torch import rand\nrand(3)", "torch.rand"),
        ("from random import Random as R\nR(3)", "random.Random"),
        ("import random\nrandom.shuffle(rows)", "random.shuffle"),
        ("import numpy as np\nnp.random.default_rng(3)", "numpy.random.default_rng"),
        ("from numpy.random import default_rng\ndefault_rng(3)", "numpy.random.default_rng"),
        ("import numpy as np\nnp.random.permutation(3)", "numpy.random.permutation"),
        ("from transformers import set_seed\nset_seed(1)", "set_seed"),
        ("weights.normal_(0, 1)", "normal_"),
        ("dataset.shuffle(seed=1)", "shuffle"),
        ("def f():\n    import torch\n    return torch.bernoulli(p)", "torch.bernoulli"),
    ],
)
def test_the_check_sees_every_way_to_draw(source, name):
    assert name in {found for _, found in draws_in(source)}


@pytest.mark.parametrize("source", ["replay.sample(3)", "order.shuffle()", "stream.numpy_generator().random(3)"])
def test_the_check_lets_other_calls_pass(source):
    assert not list(draws_in(source))


def test_every_purpose_is_used_at_one_place():
    uses = {}
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            is_stream = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Stream"
            if is_stream and file.name != HELPER:
                seed, role, purpose = node.args
                assert ast.unparse(purpose).startswith("Purpose."), f"{file}:{node.lineno}: say which purpose"
                uses.setdefault(Purpose[purpose.attr], []).append(file.relative_to(ROOT).as_posix())
                assert "eed" in ast.unparse(seed) and "ole" in ast.unparse(role)
    assert uses == {purpose: [file] for purpose, file in USES.items()}
    assert USES.keys() == set(Purpose) and len({purpose.value for purpose in Purpose}) == len(Purpose)


def test_no_two_names_share_their_numbers():
    """Names that bare integers would mix up among them: step 1, rank 23 and step 12, rank 3."""
    places = [{}, {"step": 1, "rank": 23}, {"step": 12, "rank": 3}, {"step": 123}, {"rank": 123}, {"step": "123"}]
    places += [{"step": 0, "rank": 0, "row": row} for row in range(50)] + [{"prompt": f"{n:024x}"} for n in range(50)]
    names = [
        Stream(seed, role, purpose, place)
        for seed, role, purpose, place in itertools.product((0, 1, 42, 43), Role, Purpose, places)
    ]
    assert len({stream.number for stream in names}) == len(names)
    first = {stream.numpy_generator().random() for stream in names}
    assert len(first) == len(names)
    assert abs(np.mean(list(first)) - 0.5) < 5 / np.sqrt(12 * len(names))


def test_a_name_says_the_same_whoever_asks_and_in_whichever_order():
    stream = Stream(3, Role.STUDENT, Purpose.ROLLOUT)
    one, other = stream.at(step=4, rank=1), stream.at(rank=1).at(step=4)
    digest = hashlib.sha256(b'[3, "student", "ROLLOUT", {"rank": 1, "step": 4}]').digest()
    assert one.number == other.number == int.from_bytes(digest[:16], "little")
    assert one.as_dict() == {"seed": 3, "role": "student", "purpose": "rollout", "step": 4, "rank": 1}
    draws = [one.numpy_generator().random(4).tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    for device in ("cpu", torch.device("cpu")):
        drawn = torch.rand(3, generator=one.torch_generator(device))
        assert torch.equal(drawn, torch.rand(3, generator=other.torch_generator()))


def test_a_library_that_draws_from_torchs_state_leaves_no_trace():
    stream = Stream(0, Role.STUDENT, Purpose.ROLLOUT)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with stream.at(step=5).ruling_torch(torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.rand(2), expected)
    with stream.at(step=5).ruling_torch(torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
    with stream.at(step=6).ruling_torch(torch.device("cpu")):
        assert not torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_the_order_of_rows_is_that_of_the_trainer_of_transformers(tmp_path, epoch):
    args = METHODS["gkd"][0](str(tmp_path), use_cpu=True, seed=7)
    theirs = SeedableRandomSampler(range(40), data_seed=7, generator=torch.Generator())
    theirs.set_epoch(epoch)
    assert list(EpochSampler(40, args, lambda: epoch)) == list(theirs)
