"""The other model of a mixture: it is asked only now and then, and misses nothing."""

from __future__ import annotations

import pytest
import torch

from distill_trainers import models
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import Mixture, SamplingSettings, decode_scored
from distill_trainers.rollouts.decode.mixture import Partner
from distill_trainers.rollouts.decode.thin_products import linear, thin_products
from distill_trainers.toy import character_tokenizer, tiny_llama

PROMPTS = [[3, 4, 12], [7, 12, 7, 13, 2, 5], [2, 2, 9, 9, 4], [5], [8, 8], [3, 4, 12, 5, 13, 6, 7]]
ENDS = [1, 5, 9]
COINS = Stream(4, Role.RUN, Purpose.MIXTURE)
STREAMS = [Stream(4, Role.STUDENT, Purpose.ROLLOUT).at(row=row) for row in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def pair():
    made = (tiny_llama(character_tokenizer(), size, 2, seed=size, initializer_range=0.25) for size in (32, 48))
    return [models.install_token_forward(model.eval()) for model in made]


def padded(prompts=PROMPTS):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])


def mixed(pair, alpha, prompts, **how):
    sampling, mixture = (
        SamplingSettings(24, eos_token_ids=ENDS, suppress_from=14),
        Mixture(pair[1], alpha, COINS, **how),
    )
    return decode_scored(pair[0], *padded(prompts), sampling, streams=STREAMS, mixture=mixture)


SYSTEM = [6, 3, 10, 2, 8, 12, 4, 4, 11]
OF_SEVERAL = {
    "ragged": PROMPTS,
    "one beginning": [SYSTEM + prompt for prompt in PROMPTS],
    "groups": [PROMPTS[0]] * 3 + [PROMPTS[1]] * 2 + [PROMPTS[4]],
    "groups with one beginning": [SYSTEM + PROMPTS[1]] * 3 + [SYSTEM + PROMPTS[3]] * 3,
}


@pytest.mark.parametrize(
    ("alpha", "gives_hidden", "prompts"),
    [
        *((alpha, hidden, "ragged") for alpha in (0.05, 0.5, 0.95) for hidden in (True, False)),
        *((0.5, hidden, prompts) for hidden in (True, False) for prompts in list(OF_SEVERAL)[1:]),
    ],
)
def test_what_it_tells_is_what_one_forward_over_everything_tells(pair, alpha, gives_hidden, prompts, monkeypatch):
    """Ragged prompts, some of them read once for several rows, and rows that leave one by one."""
    if not gives_hidden:
        monkeypatch.setattr(models, "gives_hidden_states", lambda model: False)
    found = mixed(pair, alpha, OF_SEVERAL[prompts], keeps_hidden=True)
    assert len({len(each.ids) for each in found}) > 2, "ragged, or this tests little"
    for prompt, each in zip(OF_SEVERAL[prompts], found, strict=True):
        whole, start = torch.tensor([prompt + each.ids]), len(prompt) - 1
        of_tokens = []
        for model in pair:
            logps = model(input_ids=whole).logits[0, start:-1, :14].log_softmax(-1)
            of_tokens.append(logps.gather(1, torch.tensor(each.ids)[:, None])[:, 0].detach())
        q, p = of_tokens
        drawn = (alpha * p.exp() + (1 - alpha) * q.exp()).log()
        torch.testing.assert_close(each.logps, torch.stack([q, drawn, p], dim=1), atol=1e-4, rtol=1e-4)
        if gives_hidden:
            states = pair[1](input_ids=whole, on_hidden=lambda hidden, head: hidden[0])
            torch.testing.assert_close(each.hidden, states[start:-1].detach(), atol=1e-4, rtol=1e-4)
        else:
            assert each.hidden is None


@pytest.mark.parametrize("alpha", [0.05, 0.95])
def test_it_is_asked_only_when_its_coin_comes_up(pair, monkeypatch, alpha):
    """No row ends, so that none leaves: a forward for each of its coins but the first step's, and one at the end."""
    calls, forward = [], Partner._forward
    monkeypatch.setattr(Partner, "_forward", lambda *args: calls.append(args[1].shape[1]) or forward(*args))
    ids = torch.tensor([[3, 4, 12], [2, 2, 9]])
    mixture = Mixture(pair[1], alpha, COINS)
    decode_scored(pair[0], ids, torch.ones_like(ids), SamplingSettings(24), streams=STREAMS[:2], mixture=mixture)
    coins = (COINS.numpy_generator().random(24) < alpha).tolist()
    assert calls[0] == 3 and sum(calls[1:]) == 23, "every token is read once, and the last not at all"
    assert len(calls) - 1 == sum(coins[1:]) + (not coins[-1])


def test_a_mixture_does_not_depend_on_how_many_are_worked_on_together(pair):
    """Nor on their order: all batches of a rollout share its coins, and each row has its own numbers."""
    sampling, mixture = SamplingSettings(24, eos_token_ids=ENDS, suppress_from=14), Mixture(pair[1], 0.5, COINS)
    ids, mask = padded()
    runs = [
        [row.ids for row in decode_scored(pair[0], ids, mask, sampling, size, streams=STREAMS, mixture=mixture)]
        for size in (None, 1, 4)
    ]
    turned = decode_scored(pair[0], ids.flip(0), mask.flip(0), sampling, 2, streams=STREAMS[::-1], mixture=mixture)
    assert runs[0] == runs[1] == runs[2] == [row.ids for row in turned][::-1]


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_k": 3}, {"temperature": 0.0}])
def test_filters_are_refused(pair, setting):
    with pytest.raises(ValueError, match="temperature 1 and no filters"):
        mixture = Mixture(pair[1], 0.5, COINS)
        decode_scored(pair[0], *padded(), SamplingSettings(4, **setting), streams=STREAMS, mixture=mixture)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("biased", [True, False])
def test_thin_products_are_the_same_products(count, biased):
    layer = torch.nn.Linear(7, 5, bias=biased)
    model, rows = torch.nn.Sequential(layer), torch.randn(count, 1, 7)
    expected = layer(rows)
    with torch.no_grad(), thin_products(model):
        torch.testing.assert_close(model(rows), expected)
    assert "forward" not in layer.__dict__
    with thin_products(model):  # a graph is kept where one is wanted
        assert model(rows).requires_grad
    torch.testing.assert_close(linear(rows.double(), layer.weight.double()), rows.double() @ layer.weight.double().T)
