"""Plans from a number of parameters: shapes that have so many, and what each loses, measured without making it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.models import num_parameters, without_weights
from distill_trainers.students import StudentInit, candidates, choose, measure_candidates, prune, shape_of, take
from distill_trainers.students.families import family_of
from distill_trainers.students.shapes import parameters_of, step_of, weights_of, write_shape
from tests.students.models import MODELS, build, text_batch

TEXT = [text_batch(0), text_batch(1, left=True)]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_the_model_has_them(name):
    model = build(name)
    family, whole = family_of(model.config), shape_of(model.config)
    weights = weights_of(model, family)
    assert parameters_of(weights, whole) == num_parameters(model)
    small = replace(whole, num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    small = replace(small, num_key_value_heads=2 if name == "gpt2" else 1)
    small = replace(small, num_experts=4) if whole.num_experts else replace(small, intermediate_size=24)
    config = AutoConfig.for_model(**{**model.config.to_dict(), "num_hidden_layers": 2, "layer_types": None})
    write_shape(config, small)
    assert parameters_of(weights, small) == num_parameters(without_weights(config))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi3"])
def test_candidates_have_the_parameters_and_every_kind_of_shape(name, share):
    model = build(name)
    whole, asked = shape_of(model.config), share * num_parameters(model)
    found = candidates(model, asked)
    for candidate in found:
        assert abs(candidate.parameters - asked) <= 0.08 * asked  # half a step of width, in so small a model
        assert candidate.shape.intermediate_size % 8 == 0
        assert candidate.shape.num_attention_heads == whole.group * candidate.shape.num_key_value_heads
    assert len({candidate.shape for candidate in found}) == len(found)


def test_candidates_of_a_large_model_cut_depth_width_and_both():
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    shell = without_weights(config)
    found = candidates(shell, 3.0e9)
    shapes = [candidate.shape for candidate in found]
    assert any(shape.num_hidden_layers == 32 for shape in shapes)
    assert min(shape.num_hidden_layers for shape in shapes) <= 16
    assert {shape.hidden_size for shape in shapes} == {4096, 3072, 2560}
    assert {shape.num_attention_heads for shape in shapes} == {32, 16}
    assert all(abs(c.parameters - 3.0e9) < 0.025 * 3.0e9 for c in found)
    assert all(shape.intermediate_size % 64 == 0 and shape.intermediate_size > 11008 / 4 for shape in shapes)


@pytest.mark.parametrize(("width", "step"), [(11008, 64), (4096, 64), (1536, 32), (576, 16), (48, 8)])
def test_widths_are_rounded_as_coarsely_as_leaves_a_choice(width, step):
    assert step_of(width) == step


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_what_a_candidate_loses_is_the_kl_of_the_student_itself(name):
    """In float64 against the definition, with each student made for real."""
    model = build(name)
    choice = choose(model, parameters=0.75 * num_parameters(model), batches=TEXT)
    assert [c.kl for c in choice.candidates] == sorted(c.kl for c in choice.candidates) and len(choice.candidates) > 1
    for candidate in choice.candidates[:2] + choice.candidates[-1:]:
        sizes = {n: getattr(candidate.shape, n) for n in ("hidden_size", "intermediate_size", "num_key_value_heads")}
        layers = candidate.shape.num_hidden_layers
        student = prune(model, keep_layers=layers, batches=TEXT, importance=choice.importance, **sizes)
        assert num_parameters(student) == candidate.parameters
        total = tokens = 0
        for batch in TEXT:
            mask = batch["attention_mask"]
            scored = (mask[:, 1:] * mask[:, :-1]).bool()
            with torch.no_grad():
                p, q = (m(**batch).logits[:, :-1][scored].double().log_softmax(-1) for m in (model, student))
            total += (p.exp() * (p - q)).sum().item()
            tokens += len(p)
        assert candidate.kl == pytest.approx(total / tokens, rel=1e-3)


def test_the_candidate_that_loses_least_is_made():
    model = build("llama")
    asked = 0.8 * num_parameters(model)
    choice = choose(model, parameters=asked, batches=TEXT)
    student = take(model, choice)
    best = choice.candidates[0]
    assert shape_of(student.config) == best.shape == choice.shape and num_parameters(student) == best.parameters


def test_layers_that_do_nothing_go_before_width():
    """Two of four layers add nothing: depth alone then loses nothing, and the planner finds it."""
    model = build("llama")
    for index in (1, 2):
        for part in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
            torch.nn.init.zeros_(part.weight), torch.nn.init.zeros_(part.bias)
    two_layers = num_parameters(prune(model, keep_layers=2))
    choice = choose(model, parameters=two_layers, batches=TEXT)
    assert choice.kept.layers == [0, 3] and choice.candidates[0].kl == pytest.approx(0, abs=1e-6)


def test_measuring_leaves_the_model_as_it_was():
    model, batch = build("llama").train(), TEXT[0]
    choice = choose(model, parameters=0.8 * num_parameters(model), batches=TEXT)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, build("llama")(**batch).logits)

    def stop(candidate):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_candidates(model, choice.candidates, choice.importance, TEXT, progress=stop)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_a_recipe_knows_the_candidates_without_weights():
    model = build("llama")
    init = StudentInit(parameters=0.8 * num_parameters(model))
    config = AutoConfig.for_model(**model.config.to_dict())
    tried = init.shrink(config)
    assert [c.shape for c in tried] == [c.shape for c in candidates(model, init.parameters)]
    assert shape_of(config) == tried[len(tried) // 2].shape
    with pytest.raises(ConfigurationError, match="measured on text"):
        init.build(model)
