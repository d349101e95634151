"""Packed caches: ids come back as they were, rounded numbers keep every loss within the bounds of docs/maths.md."""

import dataclasses
import math

import pytest
import torch

from distill_trainers.exceptions import CacheError, ConfigurationError
from distill_trainers.losses import DIVERGENCES, resolve_divergence, token_divergence
from distill_trainers.signals import Logits, TokenLogits, TokenTopK
from distill_trainers.teachers import CachedTeacher
from distill_trainers.teachers.cache import opening
from distill_trainers.teachers.cache.identity import CacheIdentity, refuse_differences, write_identity
from distill_trainers.teachers.cache.kinds import SampledKind, TopKKind
from distill_trainers.teachers.cache.packing import CACHE_KINDS, pack_ids, round_logps, unpack_ids, unround_logps

CPU = torch.device("cpu")
N, V, K = 60, 300, 12


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(kind, size=V, **fields):
    return CacheIdentity(kind, size, "", "no", size, **fields)


def distributions(seed):
    """Flat and sure, long-tailed and all but one: logits `[N, V]` of spreads from 0.01 to 100."""
    spread = 10 ** torch.linspace(-2, 2, N, dtype=torch.float64)[:, None]
    return torch.cat([spread * rand(N, V, seed=seed), -spread * torch.arange(1, V + 1).double().log()])


# ---- Ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "size", "expected"),
    [(64, 49_152, 92), (64, 151_936, 106), (64, 262_144, 112), (1, 50_000, 3), (14, 14, 4), (3, 4, 1), (5, 70_001, 10)],
)
def test_ids_come_back_in_few_bytes(k, size, expected):
    some = torch.rand(8, size, generator=torch.Generator().manual_seed(k)).topk(k).indices.sort(-1).values
    ids = torch.cat([some, torch.arange(k)[None], torch.arange(size - k, size)[None]]).int()
    packed = pack_ids(ids, size)
    assert packed.dtype == torch.uint8 and packed.shape == (10, expected)
    assert torch.equal(unpack_ids(packed, k, size), ids)
    assert unpack_ids(packed[:0], k, size).shape == (0, k)


@pytest.mark.parametrize(("dtype", "expected"), [(None, 352), ("float16", 224), ("int8", 164)])
def test_a_token_takes_what_is_told(dtype, expected):
    size = 49_152
    kind = CACHE_KINDS["topk"](identity("topk", size, top_k=64, dtype=dtype))
    signal, counts = Logits(rand(3, size)), [2, 1]
    rows = kind.store(signal, counts, [b"", b""])
    assert sum(values.nbytes for row in rows for values in row.values()) == 3 * kind.token_bytes(1, torch.float32)
    assert kind.token_bytes(1, torch.float32) == expected
    kinds = kind, TopKKind(identity("topk", size, top_k=64))
    told, plain = (each.answer(each.store(signal, counts, [b"", b""]), None, CPU) for each in kinds)
    order = plain.ids.argsort(-1)
    assert torch.equal(told.ids, plain.ids.gather(-1, order)) and torch.equal(told.tail_logps, plain.tail_logps)
    torch.testing.assert_close(told.logps.float(), plain.logps.gather(-1, order), rtol=0, atol=0.05 if dtype else 0)


def test_plain_rows_of_earlier_versions_are_read_among_packed_ones():
    about = identity("topk", top_k=K)
    kinds, signal = (CACHE_KINDS["topk"](about), TopKKind(about)), Logits(rand(9, V))
    packed, plain = (kind.store(signal, [3, 3, 3], [b""] * 3) for kind in kinds)
    one, mixed = (kinds[0].answer(rows, None, CPU) for rows in (packed, [packed[0], plain[1], packed[2]]))
    assert torch.equal(one.tail_logps, mixed.tail_logps)
    sparse = [torch.zeros(9, V).scatter(-1, told.ids.long(), told.logps) for told in (one, mixed)]
    assert torch.equal(*sparse)


@pytest.mark.parametrize(("size", "draws", "saved"), [(V, 50, 3), (V, 300, 2), (70_000, 50, 1)])
def test_draws_come_back_with_narrower_integers(size, draws, saved):
    about, signal = identity("sampled", size, draws=draws, seed=0), Logits(rand(4, size))
    kinds = SampledKind(about), CACHE_KINDS["sampled"](about)
    wide, narrow = (kind.store(signal, [1, 3], [b"a", b"b"]) for kind in kinds)
    expected, found = (kind.answer(rows, None, CPU) for kind, rows in zip(kinds, (wide, narrow), strict=True))
    for name, values in vars(expected).items():
        assert torch.equal(getattr(found, name).to(values.dtype), values)
    bytes_of = [sum(v.nbytes for row in rows for v in row.values()) for rows in (wide, narrow)]
    number = sum(len(row["ids"]) for row in wide)
    assert bytes_of[0] - bytes_of[1] == saved * number + (4 if draws < 256 else 0)


# ---- Eight bits -----------------------------------------------------------------------------------------------------


def rounded(told):
    """The signal as a cache gives it back, and ε of each token."""
    numbers = round_logps(told.logps.float())
    logps = unround_logps(**numbers, tail_logps=told.tail_logps.float())
    return TokenTopK(told.ids, logps.double(), told.tail_logps), numbers["scale"].double() / 127


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_keep_their_mass_their_likeliest_id_and_their_ratio(seed):
    told = TokenLogits(distributions(seed)).top_k(K)
    found, bound = rounded(told)
    off = (found.logps - told.logps).abs().amax(-1)
    assert (off <= bound + 1e-5 + 1e-6 * told.logps.abs().amax(-1)).all() and (off > bound / 20).any()
    assert torch.equal(found.logps.argmax(-1), told.logps.argmax(-1))
    torch.testing.assert_close(found.logps.logsumexp(-1), told.logps.logsumexp(-1), rtol=0, atol=1e-5)


def forward(loss, eps):
    return eps.expm1() * (loss + (2 * loss).sqrt() + eps)


A = 0.1
BOUNDS = {  # of docs/maths.md, by the loss with exact numbers and ε
    "forward_kl": forward,
    "reverse_kl": lambda loss, eps: eps,
    "jsd": lambda loss, eps: eps.expm1() * 0.5 * (math.log(2) + 1),
    "skew_forward_kl": lambda loss, eps: eps.expm1() * (3 - 2 * A - math.log(A)),
    "skew_reverse_kl": lambda loss, eps: eps.expm1(),
    "total_variation": lambda loss, eps: eps.expm1() / 2,
    "taid": lambda loss, eps: forward(loss, 0.8 * eps),
}
GRADIENTS = {"forward_kl": torch.expm1, "reverse_kl": lambda eps: eps}


@pytest.mark.parametrize("far", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("name", [*BOUNDS, "lk", "adaptive_kl"])
def test_losses_and_gradients_stay_within_their_bounds(name, far):
    teacher = distributions(1)
    student = (teacher * (1 + 0.1 * far) + far * rand(*teacher.shape, seed=2)).requires_grad_()
    exact = TokenLogits(teacher).top_k(K)
    near, eps = rounded(exact)
    found, expected = {}, {}
    for losses, told in ((found, near), (expected, exact)):
        for each in {name, "forward_kl", "reverse_kl", "total_variation"}:
            function = resolve_divergence(each, **({"alpha": A} if each.startswith("skew") else {}))
            losses[each] = token_divergence(function, TokenLogits(student), told)
    slack = 1e-5 * (1 + teacher.abs().amax(-1))
    within = {each: BOUNDS[each](expected[each].detach(), eps) + slack for each in expected.keys() & BOUNDS.keys()}
    within["lk"] = (within["forward_kl"] + within["total_variation"]) / 2
    if name == "adaptive_kl":  # its weight may jump, but is one: the loss lies between the two that it weighs
        low, high = torch.stack([found[n] for n in ("forward_kl", "reverse_kl")]).aminmax(dim=0)
        assert (found[name] >= low - slack).all() and (found[name] <= high + slack).all()
        return
    off = (found[name] - expected[name]).abs()
    assert (off <= within[name]).all() and off.max() > 0
    if name in GRADIENTS:
        ours, theirs = (torch.autograd.grad(losses[name].sum(), student)[0] for losses in (found, expected))
        off = (ours - theirs).abs().sum(-1)
        assert (off <= GRADIENTS[name](eps) + slack).all() and off.max() > 1e-3


@pytest.mark.parametrize(
    "logps",
    [[-1.5, -1.5, -2.0], [-1e-7, -25.0, -90.0], [0.0, -math.inf, -math.inf], [-2.0, -math.inf, -3.0]],
    ids=["equal", "sure", "one id", "an excluded id"],
)
def test_edges_of_the_grid(logps):
    told = torch.tensor([logps], dtype=torch.float64)
    tail = torch.log(-torch.expm1(told.logsumexp(-1).clamp(max=-1e-12)))
    found, bound = rounded(TokenTopK(torch.arange(3)[None], told, tail))
    assert torch.equal(found.logps.isinf(), told.isinf()) and not found.logps.isnan().any()
    assert ((found.logps - told).abs().nan_to_num() <= bound + 1e-6).all()


def test_one_id_is_exact_and_what_is_no_number_stays_none():
    told = TokenLogits(distributions(0)).top_k(1)
    torch.testing.assert_close(rounded(told)[0].logps, told.logps, rtol=1e-4, atol=1e-6)
    broken = round_logps(torch.tensor([[math.nan, -1.0], [-1.0, -2.0]]))
    assert unround_logps(**broken, tail_logps=torch.full((2,), -3.0)).isnan().tolist() == [[True] * 2, [False] * 2]


@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_ids_that_a_teacher_masks_take_no_digits_from_the_others(masked):
    """A distance of 10^9 as the grid's end would leave the likeliest id alone; farther than 256 is as far as that."""
    logits = 2 * rand(N, 14)
    logits[:, 10:] = masked
    told = TokenLogits(logits).top_k(12)
    found, bound = rounded(told)
    assert bound.max() <= 256 / 127
    torch.testing.assert_close(found.logps[:, :10].exp(), told.logps[:, :10].exp(), rtol=0, atol=0.15)
    assert (found.logps[:, 10:] < -200).all() and found.logps[:, 10:].isfinite().all()


def test_ids_beyond_the_digits_of_float32_come_back():
    ids = torch.tensor([[5, 2**30 - 3]]).int()
    assert torch.equal(unpack_ids(pack_ids(ids, 2**30), 2, 2**30), ids)


@pytest.mark.parametrize(
    "told",
    [("topk", {"top_k": 4, "dtype": "int4"}), ("tails", {}), ("sampled", {"draws": 5, "seed": 0, "dtype": "int8"})],
)
def test_a_kind_that_this_version_does_not_know_is_named(tmp_path, told):
    """As of a newer version, whose format is the same."""
    write_identity(tmp_path, identity(told[0], **told[1]))
    with pytest.raises(
        CacheError, match=f"holds '{told[0]}' in '?(int4|int8|None).*this version reads hidden in float32, "
    ):
        CachedTeacher(tmp_path)


# ---- In a run -------------------------------------------------------------------------------------------------------

RUN = {"lmbda": 0.0, "divergence": "forward_kl", "teacher_cache_kind": "topk", "teacher_cache_top_k": 4}


def test_a_cache_of_an_earlier_version_goes_on_as_it_is(make_trainer, saved, tmp_path, monkeypatch):
    """Half of it was written with plain ids in float32; the same recipe fills the other half, and `int8` is refused."""
    settings = {**RUN, "teacher": saved.teacher, "teacher_cache": str(tmp_path / "cache")}
    with monkeypatch.context() as then:
        then.setattr(opening, "_unset_dtype", lambda options, vocab_size: None)
        then.setitem(CACHE_KINDS, "topk", TopKKind)
        make_trainer(max_steps=1, **settings).train()
    old = CachedTeacher(tmp_path / "cache")
    assert old.identity.dtype is None and all("ids" in old.cache.read(key) for key in old.cache.keys())
    trainer = make_trainer(max_steps=-1, num_train_epochs=1, **settings)
    trainer.train()
    forms = [row.keys() for row in map(trainer.teacher.cache.read, trainer.teacher.cache.keys())]
    assert len(forms) == 24 and 0 < sum("packed" in form for form in forms) < 24
    told = trainer.teacher.identity
    refuse_differences(old.cache.folder, told, dataclasses.replace(told, dtype="float32"))
    with pytest.raises(ConfigurationError, match="teacher_cache_dtype: 'float32' then, 'int8' now"):
        refuse_differences(old.cache.folder, told, dataclasses.replace(told, dtype="int8"))


def test_filling_and_reading_give_the_same_losses_in_eight_bits(make_trainer, by_step, tmp_path):
    settings = {**RUN, "max_steps": -1, "num_train_epochs": 1, "teacher_cache": str(tmp_path / "cache")}
    filling, reading = make_trainer(**settings), make_trainer(**settings)
    filling.train()
    reading.train()
    assert filling.teacher.identity.dtype == "int8"
    assert by_step(reading) == by_step(filling) and len(by_step(reading)) > 1
    assert set(DIVERGENCES) - {"logit_mse"} == {*BOUNDS, "lk", "adaptive_kl"}  # none without a bound or a reason
