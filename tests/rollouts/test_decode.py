"""The decode loop samples what `generate` samples, and stops working for rows that have ended."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_trainers import models
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rollouts import (
    DecodeEngine,
    HfEngine,
    SamplingSettings,
    decode_completions,
    decode_scored,
    generate_completions,
)
from distill_trainers.rollouts.decode import loop as decode
from distill_trainers.rollouts.decode.kv_cache import GrowingLayer
from distill_trainers.rollouts.sampling import draw_tokens, logits_processors

DECODABLE = ["llama", "qwen3", "sliding mistral", "hybrid gemma2", "gpt2"]

EOS = [1, 7, 9]


def _same_text(model, ids, mask, sampling, **how):
    """Greedy completions of both, as lists."""
    return tuple(complete(model, ids, mask, sampling, **how) for complete in (decode_completions, generate_completions))


# ---- Greedy: token for token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, pad_id", [*((kind, 3) for kind in DECODABLE), ("llama", 1)])  # 1 is EOS too
def test_greedy_equals_generate(make_model, pad_left, prompts, kind, pad_id):
    model = make_model(kind)
    sampling = SamplingSettings(30, temperature=0.0, eos_token_ids=EOS, pad_token_id=pad_id)
    ours, theirs = _same_text(model, *pad_left(prompts, pad_id), sampling)
    assert ours == theirs
    lengths = set(map(len, ours))
    assert len(lengths) > 3 and max(lengths) == 30, "rows that end early, rows that do not: else nothing was dropped"


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.7}, {"suppress_from": 20}, {"repetition_penalty": 0.8, "suppress_from": 11}],
    ids=str,
)
def test_greedy_equals_generate_under_processors(make_model, pad_left, prompts, settings):
    """A repetition penalty must not take padding for text: the padding id stands in no other prompt."""
    prompts = [[token for token in prompt if token not in (3, 22)] or [4] for prompt in prompts]
    sampling = SamplingSettings(20, temperature=0.0, eos_token_ids=[1], pad_token_id=22, **settings)
    plain = SamplingSettings(20, temperature=0.0, eos_token_ids=[1], pad_token_id=22)
    ours, theirs = _same_text(make_model(), *pad_left(prompts, 22), sampling)
    assert ours == theirs
    assert ours != decode_completions(make_model(), *pad_left(prompts, 22), plain)


def _likeliest(model, prompt, sampling):
    """Greedy text by whole unpadded forwards, with penalty and n-grams counted by hand."""
    ids, size, penalty = list(prompt), sampling.no_repeat_ngram_size, sampling.repetition_penalty
    while len(ids) < len(prompt) + sampling.max_new_tokens:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
        for token in set(ids):
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        if size:
            grams = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
            for token in range(len(logits)):
                if len(ids) >= size - 1 and (*ids[len(ids) - size + 1 :], token) in grams:
                    logits[token] = -math.inf
        ids.append(logits.index(max(logits)))
        if ids[-1] in sampling.eos_token_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("complete", [decode_completions, generate_completions])
@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1, "max_new_tokens": 6},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.9},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 0.7},
    ],
    ids=str,
)
def test_padding_is_no_text_to_what_reads_the_text(make_model, pad_left, prompts, complete, settings):
    """Its id stands in other prompts, and every first token could be taken for it."""
    model, prompts = make_model(), [[5], [5, 5], [3], *prompts[:5]]
    sampling = SamplingSettings(**{"max_new_tokens": 8, "temperature": 0.0, "pad_token_id": 3, **settings})
    expected = [_likeliest(model, prompt, sampling) for prompt in prompts]
    for size in (None, 4):
        assert complete(model, *pad_left(prompts, 3), sampling, size) == expected


@pytest.mark.parametrize("complete", [decode_completions, generate_completions])
def test_a_token_may_follow_itself_once_beside_a_longer_prompt(make_student, complete, streams):
    """A model that says its last token again (p > 0.99); padding as copies of the first token forbade that."""
    model = make_student(initializer_range=0.3, tie_word_embeddings=True).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(4.0)
    ids, mask = torch.tensor([[0, 0, 0, 5], [6, 7, 8, 9]]), torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    assert model(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1)[5] > 0.99
    sampling = SamplingSettings(2, pad_token_id=0, no_repeat_ngram_size=2)
    ids, mask = ids.repeat(50, 1), mask.repeat(50, 1)
    texts = complete(model, ids, mask, sampling, streams=streams(100))
    assert sum(text[0] == 5 for text in texts[::2]) > 45 and not any(text == [5, 5] for text in texts[::2])


def test_each_prompt_gets_what_it_gets_alone(make_model, pad_left, prompts):
    model = make_model()
    sampling = SamplingSettings(16, temperature=0.0, eos_token_ids=EOS)
    together = decode_completions(model, *pad_left(prompts), sampling)
    for prompt, completion in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in completion:  # one whole unpadded forward each: no cache, no mask
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_eos_that_pads_stays_and_ends(make_model, pad_left, prompts):
    sampling = SamplingSettings(30, temperature=0.0, eos_token_ids=EOS, pad_token_id=EOS[0])
    for completion in decode_completions(make_model(), *pad_left(prompts), sampling):
        assert not set(completion[:-1]) & set(EOS)
        assert completion[-1] in EOS or len(completion) == 30


def test_adapters_and_lower_precision(make_model, pad_left, prompts):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(), config).eval()
    sampling = SamplingSettings(12, temperature=0.0, eos_token_ids=EOS)
    ours, theirs = _same_text(model, *pad_left(prompts), sampling)
    assert ours == theirs
    assert ours != decode_completions(make_model(), *pad_left(prompts), sampling)
    half = decode_completions(make_model().bfloat16(), *pad_left(prompts), sampling)
    assert len(half) == len(prompts) and all(half)


# ---- Sampling: the same law -----------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"suppress_from": 17},
    {
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "suppress_from": 19,
    },
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_every_step_samples_from_the_distribution_of_generate(
    make_model, pad_left, prompts, monkeypatch, settings, config_of, streams
):
    """Along the very tokens that `generate` sampled, the probabilities before each of them are equal."""
    model, steps = make_model(), 10
    ids, mask = pad_left([[token for token in prompt if token != 3] or [4] for prompt in prompts])
    sampling = SamplingSettings(steps, pad_token_id=3, **settings)
    torch.manual_seed(0)
    theirs = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config_of(sampling, 24),
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens, order = theirs.sequences[:, ids.shape[1] :], mask.sum(1).argsort(descending=True, stable=True)
    seen = []

    def follow(scores, uniforms):
        seen.append(torch.zeros(len(ids), 24))
        seen[-1][order, : scores.shape[-1]] = scores.softmax(-1)
        return tokens[order, len(seen) - 1]

    monkeypatch.setattr(decode, "draw_tokens", follow)
    assert decode_completions(model, ids, mask, sampling, streams=streams(len(ids))) == tokens.tolist()
    assert len(seen) == steps
    for found, scores in zip(seen, theirs.scores, strict=True):
        torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-4, atol=1e-5)


def test_a_draw_inverts_the_cumulative_distribution_exactly():
    """Every uniform number of a fine grid: the share of each token is its probability."""
    scores = torch.tensor([0.3, -math.inf, 2.0, -1.0, -9.0, 0.0, -math.inf])
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = draw_tokens(scores.expand(len(grid), -1), grid)
    shares = torch.bincount(drawn, minlength=7) / len(grid)
    torch.testing.assert_close(shares, scores.softmax(-1), rtol=0, atol=1e-5)  # two numbers of the grid
    assert shares[1] == shares[6] == 0
    edges = draw_tokens(scores.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edges.tolist() == [0, 5]


def test_a_draw_repeats_in_any_order_of_addition_and_survives_nan():
    scores = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    scores[3] = math.nan
    uniforms = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = draw_tokens(scores, uniforms)
    padded = torch.cat([scores, torch.full((4, 777), -math.inf)], dim=1)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(draw_tokens(padded, uniforms)[:3], drawn[:3])
    finally:
        torch.use_deterministic_algorithms(False)
    assert ((0 <= drawn) & (drawn < 5000)).all()


def test_a_draw_does_not_lose_rare_tokens():
    """2e-10 vanishes beside 1 in float32."""
    scores = torch.tensor([[0.0, math.log(2e-10)]])
    assert draw_tokens(scores, torch.tensor([1 - 1e-10], dtype=torch.float64)).item() == 1
    assert draw_tokens(scores, torch.tensor([1 - 3e-10], dtype=torch.float64)).item() == 0


def test_processors_without_sampling_are_none():
    assert len(logits_processors(SamplingSettings(4, temperature=0.0, top_k=3, top_p=0.5, min_p=0.1))) == 0
    assert len(logits_processors(SamplingSettings(4))) == 0


def _text_law(model, prompt, length, sampling):
    """Probability of every completion of at most `length` tokens, by enumeration in float64."""
    law, open_texts = {}, {(): 1.0}
    for _ in range(length):
        grown = {}
        for text, mass in open_texts.items():
            logits = model(input_ids=torch.tensor([[*prompt, *text]])).logits[:, -1].double()
            for token, p in enumerate(logits_processors(sampling)(None, logits).softmax(-1)[0].tolist()):
                (law if token in sampling.eos_token_ids else grown)[(*text, token)] = mass * p
        open_texts = grown
    return law | open_texts


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_samples_follow_the_enumerated_law_whatever_their_batch_mates(make_model, pad_left, settings, streams):
    """Chi-square over all texts of two tokens; prompts of different lengths share the batch, and rows end early."""
    model, count = make_model(), 3000
    sampling = SamplingSettings(2, eos_token_ids=[2, 5], **settings)
    mixed = [[4, 8, 15, 16], [23], [4, 8]]
    texts = decode_completions(model, *pad_left(mixed * count), sampling, streams=streams(3 * count, step=3))
    for index, prompt in enumerate(mixed):
        law = _text_law(model, prompt, 2, sampling)
        assert sum(law.values()) == pytest.approx(1)
        found = {text: 0 for text in law}
        for text in texts[index :: len(mixed)]:
            found[tuple(text)] += 1  # a KeyError here is a text that cannot be
        often = [text for text, mass in law.items() if mass * count >= 8]
        rest = [text for text in law if text not in set(often)]
        bins = [(found[text], law[text] * count) for text in often]
        bins.append((sum(found[text] for text in rest), max(1e-9, sum(law[text] for text in rest) * count)))
        statistic = sum((seen - expected) ** 2 / expected for seen, expected in bins)
        assert len(bins) > 15
        half = torch.tensor([len(bins) - 1, statistic], dtype=torch.float64) / 2
        assert torch.special.gammaincc(*half) > 3e-7  # as rare as 5 standard errors


@pytest.mark.parametrize("complete", [decode_completions, generate_completions])
def test_a_temperature_needs_random_numbers_for_each_prompt(make_model, pad_left, complete, streams):
    for rows, said in ((None, "no streams"), (streams(1), "1 streams")):
        with pytest.raises(ValueError, match=f"Got {said} .* 2 prompts"):
            complete(make_model(), *pad_left([[4], [5]]), SamplingSettings(3), streams=rows)


@pytest.mark.parametrize("ignores", [True, False])
def test_a_generate_that_draws_by_itself_is_refused(make_model, pad_left, streams, monkeypatch, ignores):
    """It would take the likeliest token, or one by the state of the process, and say nothing."""
    model = make_model()

    def generate(input_ids, logits_processor, **kwargs):
        scores = torch.zeros(len(input_ids), 24)
        tokens = logits_processor(input_ids, scores).argmax(-1) if not ignores else scores.argmax(-1)
        return torch.cat([input_ids, (tokens + 1 - int(ignores)).unsqueeze(1)], dim=1)

    monkeypatch.setattr(model, "generate", generate, raising=False)
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM.*own `generate`.*rollout_engine: decode"):
        HfEngine().generate(model, *pad_left([[4], [5]]), SamplingSettings(1), streams(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.6},
        {"top_k": 3, "temperature": 1.5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("complete", [decode_completions, generate_completions])
def test_filtered_samples_have_the_probabilities_counted_by_hand(make_model, pad_left, complete, settings, streams):
    """Of the first token, behind padding: each within 5 standard errors."""
    model, prompt, count = make_model(), [4, 8, 4], 1500
    sampling = SamplingSettings(1, pad_token_id=3, **settings)
    logits = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / sampling.temperature).tolist()
    for token in set(prompt):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        if sampling.no_repeat_ngram_size:
            logits[token] = -math.inf
    order, mass, p = sorted(range(24), key=lambda token: -logits[token]), 0.0, torch.tensor(logits).softmax(-1)
    kept = []
    for token in order:
        if (
            mass >= sampling.top_p
            or (sampling.top_k and len(kept) == sampling.top_k)
            or p[token] < sampling.min_p * p.max()
        ):
            break
        kept.append(token)
        mass += float(p[token])
    law = torch.zeros(24)
    law[kept] = (p[kept] / p[kept].sum()).float()
    mates = [prompt, [9] * 11]
    texts = complete(model, *pad_left(mates * count), sampling, streams=streams(2 * count))[::2]
    shares = torch.bincount(torch.tensor(texts).flatten(), minlength=24) / count
    assert ((shares - law).abs() <= 5 * (law * (1 - law) / count).sqrt()).all()
    assert len(kept) > 1 and (shares[law == 0] == 0).all()


def test_what_is_sampled_does_not_depend_on_the_batch(make_model, pad_left, prompts, streams):
    model = make_model()
    sampling = SamplingSettings(20, temperature=1.2, eos_token_ids=EOS)
    runs, rows = [], streams(len(prompts))
    for size in (None, 1, 5, 24):
        runs.append(decode_completions(model, *pad_left(prompts), sampling, size, streams=rows))
    assert all(run == runs[0] for run in runs[1:])
    backwards = decode_completions(model, *pad_left(prompts[::-1]), sampling, 5, streams=rows[::-1])
    assert backwards == runs[0][::-1]
    assert decode_completions(model, *pad_left(prompts), sampling, streams=streams(len(prompts), step=1)) != runs[0]


# ---- The work that is saved -----------------------------------------------------------------------------------------


def test_rows_that_have_ended_leave_batch_and_cache(make_model, pad_left, prompts):
    model, sizes = make_model(), []

    def spy(module, args, kwargs):
        layers = kwargs["past_key_values"].layers
        if layers[0].get_seq_length():
            sizes.append(len(kwargs["input_ids"]))
            assert kwargs["input_ids"].shape[1] == 1
            assert all(len(layer.keys) == len(layer.values) == sizes[-1] for layer in layers)

    model.model.register_forward_pre_hook(spy, with_kwargs=True)
    sampling = SamplingSettings(30, temperature=0.0, eos_token_ids=EOS)
    texts = decode_completions(model, *pad_left(prompts), sampling)
    needed = [sum(len(text) >= step for text in texts) for step in range(2, 31)]
    assert 12 < needed[0] < 24 and needed[-1] < 12
    assert sizes == sorted(sizes, reverse=True)
    assert all(size >= need and (size - need) < max(1, size / 8) for size, need in zip(sizes, needed, strict=True))


def test_prompts_are_read_with_little_padding(make_model, pad_left, prompts):
    """By similar length; layers that keep a window of the past only are read all at once."""
    for kind, apart in (("llama", True), ("sliding mistral", False)):
        model, read, seen = make_model(kind), [], []

        def spy(module, args, kwargs, read=read, seen=seen):
            if not kwargs["past_key_values"].get_seq_length():
                ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
                read.append(ids.numel())
                seen.append(ids.numel() if mask is None else int(mask.sum()))

        model.model.register_forward_pre_hook(spy, with_kwargs=True)
        decode_completions(model, *pad_left(prompts), SamplingSettings(2, 0.0))
        assert sum(seen) == sum(map(len, prompts)), "every token once"
        assert (len(read) > 1) == apart
        assert sum(read) <= sum(seen) / 0.75 if apart else sum(read) == len(prompts) * max(map(len, prompts))


@pytest.mark.parametrize("kind", ["llama", "sliding mistral"])
def test_a_prompt_of_several_rows_is_read_once(make_model, pad_left, prompts, streams, kind):
    """As a group's completions, or a pair's, have one: the rows write what they write after reading it each."""
    model, grouped, read = make_model(kind), [prompt for prompt in prompts[:6] for _ in range(4)], []

    def spy(module, args, kwargs):
        if not kwargs["past_key_values"].get_seq_length():
            read.append(len(kwargs["input_ids"]))

    sampling, rows = SamplingSettings(12, temperature=1.0, eos_token_ids=EOS), streams(24)
    alone = [
        decode_completions(model, *pad_left([p]), sampling, streams=[s]) for p, s in zip(grouped, rows, strict=True)
    ]
    model.model.register_forward_pre_hook(spy, with_kwargs=True)
    together = decode_completions(model, *pad_left(grouped), sampling, streams=rows)
    assert sum(read) == len({tuple(prompt) for prompt in grouped}) < 24
    assert together == [text for one in alone for text in one]
    assert len(set(map(tuple, together))) > 12


@pytest.mark.parametrize("kind", DECODABLE)
def test_what_all_prompts_begin_with_is_read_once(make_model, pad_left, prompts, kind):
    """As a system prompt: but where layers keep a window of the past, which has no room for padding in the middle."""
    system = [5, 11, 4, 8, 21, 6, 13, 12, 10, 17]
    model, chats, read = make_model(kind), [system + prompt for prompt in [*prompts, prompts[0]]], []

    def spy(module, args, kwargs):
        ids, past = args[0] if args else kwargs["input_ids"], kwargs["past_key_values"].get_seq_length()
        if past <= len(system):
            read.append((len(ids), past, ids.shape[1]))

    sampling = SamplingSettings(30, temperature=0.0, eos_token_ids=EOS, pad_token_id=3)
    theirs = generate_completions(model, *pad_left(chats), sampling)
    model.base_model.register_forward_pre_hook(spy, with_kwargs=True)
    assert decode_completions(model, *pad_left(chats), sampling) == theirs
    assert len(set(map(len, theirs))) > 2
    if kind in ("llama", "qwen3", "gpt2"):
        assert read[0] == (1, 0, len(system)) and all(past == len(system) for _, past, _ in read[1:])
        assert sum(rows for rows, _, _ in read[1:]) == len({tuple(prompt) for prompt in chats}) < len(chats)
    else:
        assert [past for _, past, _ in read] == [0]


@pytest.mark.parametrize("rope_type", ["default", "dynamic", "longrope"])
def test_frequencies_that_follow_from_the_length_are_those_of_the_whole_prompt(
    make_model, pad_left, prompts, rope_type
):
    """A beginning that is read by itself would have those of a short text."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    config = make_model().config.to_dict() | {"max_position_embeddings": 16, "rope_parameters": rope, "head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    chats = [[5, 11, 4, 8, 21, 6, 13, 12, 10, 17, *range(2, 12), *prompt] for prompt in ([4], [5, 8])]
    one = SamplingSettings(1, temperature=0.0)
    found = decode_scored(model, *pad_left(chats), one)
    for chat, each in zip(chats, found, strict=True):
        logps = model(input_ids=torch.tensor([chat])).logits[0, -1].log_softmax(-1)
        assert each.ids == [int(logps.argmax())] and each.logps[0, 0].item() == pytest.approx(
            logps.max().item(), abs=1e-4
        )


def test_nothing_runs_after_the_last_row_has_ended(make_model, pad_left):
    model, calls = make_model(), []
    model.model.register_forward_pre_hook(lambda *a: calls.append(1))
    everything = SamplingSettings(50, 0.0, eos_token_ids=list(range(24)))
    assert all(len(text) == 1 for text in decode_completions(model, *pad_left([[4, 5], [5, 6]]), everything))
    assert len(calls) == 1
    assert decode_completions(model, torch.zeros(0, 3).long(), torch.zeros(0, 3).long(), everything) == []


def test_one_row_of_logits_and_no_mask_without_padding(make_model):
    model, seen = make_model(), []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True)
    model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    decode_completions(
        model, torch.tensor([[0, 4, 5], [0, 6, 7]]), torch.tensor([[0, 1, 1]] * 2), SamplingSettings(3, 0.0)
    )
    assert seen == [None, 1] * 3


def test_a_growing_layer_holds_what_a_dynamic_one_holds():
    from transformers.cache_utils import DynamicLayer

    grown, plain = GrowingLayer(), DynamicLayer()
    draw, rows = torch.Generator().manual_seed(0), 5
    for step in range(150):
        keys, values = torch.randn(2, rows, 2, 1 if step else 9, 4, generator=draw)
        for mine, other in zip(grown.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, other)
        if step in (10, 70, 71):
            kept, rows = torch.arange(rows)[torch.arange(rows) != 1], rows - 1
            grown.batch_select_indices(kept)
            plain.batch_select_indices(kept)
        assert grown.get_seq_length() == plain.get_seq_length() == 9 + step
        assert torch.equal(grown.keys, plain.keys)
    assert grown.get_mask_sizes(1) == plain.get_mask_sizes(1)


# ---- Models that it does not run ------------------------------------------------------------------------------------


def test_other_caches_fall_back_to_generate_and_say_so_once(make_model, pad_left, prompts, caplog):
    model, engine = make_model("mamba"), DecodeEngine()
    sampling = SamplingSettings(8, temperature=0.0, eos_token_ids=EOS)
    with caplog.at_level(logging.INFO, logger="distill_trainers"):
        found = [engine.generate(model, *pad_left(prompts), sampling) for _ in range(2)]
    assert found[0] == found[1] == HfEngine().generate(model, *pad_left(prompts), sampling)
    assert len(caplog.records) == 1 and "MambaForCausalLM" in caplog.text


@pytest.mark.parametrize("case", ["sharded", "virtual tokens", "own inputs", "no cache"])
def test_reasons_not_to_decode(make_model, monkeypatch, case):
    from peft import PromptTuningConfig, get_peft_model

    model = make_model()
    assert decode.why_not_decodable(model) is None
    if case == "sharded":
        monkeypatch.setattr(models, "must_stay_in_step", lambda model: True)
    elif case == "virtual tokens":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    elif case == "own inputs":
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", lambda self, *a, **k: {}, raising=False)
    else:
        monkeypatch.setattr(type(model), "forward", lambda self, input_ids, attention_mask: None)
    assert isinstance(decode.why_not_decodable(model), str)


def test_models_in_step_call_generate_with_synced_gpus(make_model, pad_left, prompts, monkeypatch):
    """A process whose rows have ended goes on, since the others wait for its shards."""
    model, seen = make_model(), []
    monkeypatch.setattr(models, "must_stay_in_step", lambda model: True)

    def generate(input_ids, synced_gpus, logits_processor, **kwargs):
        seen.append(synced_gpus)
        scores = logits_processor(input_ids, torch.eye(24)[torch.full((len(input_ids),), 5)])
        return torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)

    monkeypatch.setattr(model, "generate", generate, raising=False)
    texts = DecodeEngine().generate(model, *pad_left(prompts), SamplingSettings(4, 0.0))
    assert texts == [[5]] * len(prompts) and seen == [True]


# ---- `generate` as an engine ----------------------------------------------------------------------------------------


def test_the_models_own_generation_config_plays_no_part(make_model, pad_left, prompts):
    sampling = SamplingSettings(10, temperature=0.0, eos_token_ids=[1])
    model = make_model()
    expected = generate_completions(model, *pad_left(prompts), sampling)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.suppress_tokens = 1.8, 2, list(range(5, 15))
    assert generate_completions(model, *pad_left(prompts), sampling) == expected
    assert model.generation_config is own and own.repetition_penalty == 1.8


# ---- Stop strings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of 22 single letters, a word, and a pad token."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", *"abcdefghijklmnopqrstuv", "the"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("the|."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


@pytest.mark.parametrize("pad_id", [0, 1], ids=["pad", "pad is EOS"])
@pytest.mark.parametrize("complete", [decode_completions, generate_completions])
def test_stop_strings_end_a_completion(make_model, letters, pad_left, prompts, complete, pad_id):
    model, settings = make_model(), {"temperature": 0.0, "eos_token_ids": [1], "pad_token_id": pad_id}
    batch = pad_left(prompts, pad_id)
    free = complete(model, *batch, SamplingSettings(24, **settings))
    texts = [[letters.decode([token]) for token in ids] for ids in free]
    stops = ["".join(texts[0][2:4]), texts[3][5], "he"]
    found = complete(model, *batch, SamplingSettings(24, stop_strings=stops, **settings), tokenizer=letters)
    lengths = []
    for before, after, text in zip(free, found, texts, strict=True):
        ends = [n for n in range(1, len(text) + 1) if any(stop in "".join(text[:n]) for stop in stops)]
        lengths.append(min(ends, default=len(before)))
        assert after == before[: lengths[-1]]
    assert len({length for length, before in zip(lengths, free, strict=True) if length < len(before)}) > 3


def test_a_prompt_that_ends_in_half_a_stop_string_changes_nothing(make_model, letters, pad_left):
    settings = {"temperature": 0.0, "pad_token_id": 0}
    (free,) = decode_completions(make_model(), *pad_left([[5, 6]], 0), SamplingSettings(6, **settings))
    sampling = SamplingSettings(6, stop_strings=[letters.decode([6, free[0]])], **settings)
    for complete in (decode_completions, generate_completions):
        (found,) = complete(make_model(), *pad_left([[5, 6]], 0), sampling, tokenizer=letters)
        assert found == free


def test_a_tokenizer_that_cannot_match_strings_is_named(make_model, tokenizer, pad_left):
    with pytest.raises(ConfigurationError, match="TokenizersBackend.*EOS"):
        decode_completions(
            make_model(), *pad_left([[4]]), SamplingSettings(3, 0.0, stop_strings=["1"]), tokenizer=tokenizer
        )


def test_stop_strings_without_a_tokenizer_are_refused(make_model, pad_left):
    with pytest.raises(ConfigurationError, match="tokenizer"):
        decode_completions(make_model(), *pad_left([[4]]), SamplingSettings(3, 0.0, stop_strings=["x"]))


def test_log_probabilities_of_draws_are_not_rounded_like_bfloat16_logits(make_student, streams):
    """All logits lie near −100, where bfloat16 has steps of a half; the softmax does not see that, nor may a ratio."""
    model = models.install_token_forward(make_student(initializer_range=0.25, tie_word_embeddings=False)).bfloat16()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 30.0  # so that the last hidden state always holds it
        model.lm_head.weight[:, 0] = -20.0
    ids = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
    sampling = SamplingSettings(6, pad_token_id=0)
    rows = decode_scored(model, ids, torch.ones_like(ids), sampling, streams=streams(2))
    for prompt, row in zip(ids.tolist(), rows, strict=True):
        whole = torch.tensor([prompt + row.ids])
        hidden = model.model(whole).last_hidden_state[0, 3:-1].float()
        logits = hidden @ model.lm_head.weight.float().T
        assert logits.mean() < -80
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(row.ids)[:, None]).squeeze(-1)
        assert (row.logps[:, 0] - exact).abs().max() < 0.1
