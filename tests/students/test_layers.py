"""Students made of a teacher's layers: ordinary models, and the layers that are worth keeping."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.students import (
    StudentInit,
    choose_layers,
    even_layers,
    find_decoder_layers,
    layer_importance,
    make_student,
    prune_layers,
)

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 4, "use_sliding_window": True}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NEOX = {**SIZES, "intermediate_size": 48, "initializer_range": 0.2, "tie_word_embeddings": False}
NEOX |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, **SLIDING, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
}


def build(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def text_batch(seed: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return {"input_ids": ids, "attention_mask": mask if left else mask.flip(1)}


@pytest.mark.parametrize(
    ("total", "keep", "expected"),
    [(6, 6, [0, 1, 2, 3, 4, 5]), (6, 3, [0, 3, 5]), (12, 2, [0, 11]), (30, 4, [0, 10, 19, 29]), (5, 1, [0])],
)
def test_even_layers(total, keep, expected):
    assert even_layers(total, keep) == expected


def test_even_layers_are_distinct_and_hold_both_ends():
    for total in range(2, 40):
        for keep in range(2, total + 1):
            kept = even_layers(total, keep)
            gaps = [after - before for before, after in zip(kept, kept[1:], strict=False)]
            assert (len(kept), kept[0], kept[-1]) == (keep, 0, total - 1)
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("keep", [0, 7, -1, True, [], [0, 6], [-1, 2], [2, 1], [1, 1], [0, 1.5]])
def test_impossible_layers_are_refused(keep):
    model = build("llama")
    with pytest.raises(ConfigurationError, match="layers"):
        prune_layers(model, keep)
    assert len(find_decoder_layers(model)[1]) == 6


@pytest.mark.parametrize("name", MODELS)
class TestPruned:
    def test_is_the_teacher_without_the_other_layers(self, name):
        model, kept, batch = build(name), [0, 2, 5], text_batch()
        student = prune_layers(model, kept)
        assert student.config.num_hidden_layers == 3
        # Reference: the teacher itself, its dropped layers made to hand on what they get.
        for index, layer in enumerate(find_decoder_layers(model)[1]):
            if index not in kept:
                layer.register_forward_hook(
                    lambda module, args, kwargs, out: (
                        (args[0], *out[1:])
                        if isinstance(out, tuple)
                        else (args[0] if args else kwargs["hidden_states"])
                    ),
                    with_kwargs=True,
                )
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(student(**batch).logits[real], model(**batch, use_cache=False).logits[real])

    def test_generates_the_same_with_and_without_cache(self, name):
        student = prune_layers(build(name), [1, 3, 4])
        batch = text_batch(left=True)
        settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with_cache = student.generate(**batch, **settings, use_cache=True)
        without = student.generate(**batch, **settings, use_cache=False)
        assert torch.equal(with_cache.sequences, without.sequences)
        torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-4)

    def test_comes_back_from_disk_the_same(self, name, tmp_path):
        student, batch = prune_layers(build(name), [0, 3, 4]), text_batch()
        student.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert type(loaded) is type(student)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits)

    def test_training_it_leaves_the_teacher_alone(self, name):
        model, batch = build(name).requires_grad_(False), text_batch()
        before = copy.deepcopy(model.state_dict())
        student = prune_layers(model, 4)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
        assert (model.config.num_hidden_layers, len(find_decoder_layers(model)[1])) == (6, 6)
        assert {p.data_ptr() for p in student.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        student(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        optimizer.step()
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_importance_is_the_kl_of_the_model_without_the_layer(self, name):
        model, batches = build(name), [text_batch(0), text_batch(1, left=True)]
        expected = []
        with torch.no_grad():
            for index in range(6):
                student = prune_layers(model, [layer for layer in range(6) if layer != index])
                total = tokens = 0
                for batch in batches:
                    mask = batch["attention_mask"]
                    scored = (mask[:, 1:] * mask[:, :-1]).bool()
                    p = model(**batch).logits.double().log_softmax(-1)[:, :-1][scored]
                    q = student(**batch).logits.double().log_softmax(-1)[:, :-1][scored]
                    total += (p.exp() * (p - q)).sum().item()
                    tokens += int(scored.sum())
                expected.append(total / tokens)
        got = layer_importance(model, batches, chunk_size=4)
        assert min(expected) > 1e-3
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-5)
        assert all("forward" not in layer.__dict__ for layer in find_decoder_layers(model)[1])


def test_per_layer_settings_follow_their_layers():
    student = prune_layers(build("qwen2-sliding"), [1, 2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_several_eos_ids_are_no_layer_setting():
    model = build("llama")
    model.config.eos_token_id = [1, 2, 3, 4, 5, 6]
    assert prune_layers(model, 2).config.eos_token_id == [1, 2, 3, 4, 5, 6]


def test_pruning_in_place():
    model = build("llama")
    assert prune_layers(model, [0, 5], copy=False) is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 2


def test_parts_of_a_layer_are_not_taken_for_layers():
    model = build("llama")
    for layer in model.model.layers:
        layer.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(6))
    path, layers = find_decoder_layers(model)
    assert path == "model.layers" and layers is model.model.layers


def test_config_that_counts_layers_is_refused_when_it_no_longer_fits():
    config = Qwen3MoeConfig(
        **LLAMA, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1]
    )
    with pytest.raises(ConfigurationError, match="does not describe the kept layers"):
        prune_layers(Qwen3MoeForCausalLM(config), [0, 2])


def test_two_lists_of_layers_are_refused():
    model = build("llama")
    model.twin = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(6))
    with pytest.raises(ConfigurationError, match=r"2 lists of 6 modules \(model.layers, twin\)"):
        prune_layers(model, 2)


def test_models_that_cannot_be_pruned_are_refused():
    peft = pytest.importorskip("peft")
    with pytest.raises(ConfigurationError, match="merge_and_unload"):
        prune_layers(peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"])), 2)
    quantised = build("llama")
    quantised.is_quantized = True
    with pytest.raises(ConfigurationError, match="quantised"):
        prune_layers(quantised, 2)


def _identity_layer(model, index):
    """Make a Llama layer add nothing to its residual stream."""
    layer = model.model.layers[index]
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)


@pytest.mark.parametrize("measure", ["kl", "angular"])
def test_layers_that_do_nothing_are_dropped_first(measure):
    model = build("llama")
    _identity_layer(model, 2)
    _identity_layer(model, 4)
    model.train()
    importance = layer_importance(model, [text_batch()], measure=measure)
    assert model.training
    assert importance[2] == pytest.approx(0, abs=1e-6) and importance[4] == pytest.approx(0, abs=1e-6)
    assert choose_layers(importance, 4) == [0, 1, 3, 5]
    student = make_student(model, 4, "importance", batches=[text_batch()], measure=measure)
    batch = text_batch(3)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(**batch).logits, model.eval()(**batch).logits)


def test_angular_is_one_minus_the_cosine():
    model, batch = build("llama"), text_batch()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    scored = (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).bool()
    before, after = states[1][:, :-1][scored], states[2][:, :-1][scored]
    expected = (1 - F.cosine_similarity(before, after, dim=-1)).mean().item()
    assert layer_importance(model, [batch], measure="angular")[1] == pytest.approx(expected, rel=1e-5)


def test_labels_say_what_is_measured():
    model, batch = build("llama"), text_batch()
    alone = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0] = batch["input_ids"][0]
    got = layer_importance(model, [{**batch, "labels": labels}])
    assert got == pytest.approx(layer_importance(model, [alone]), rel=1e-3)
    with pytest.raises(ConfigurationError, match="no token"):
        layer_importance(model, [{**batch, "labels": torch.full_like(labels, -100)}])


def test_importance_under_autocast_ranks_alike():
    model, batches = build("llama"), [text_batch(seed) for seed in range(4)]
    exact = torch.tensor(layer_importance(model, batches))
    rounded = torch.tensor(layer_importance(model, batches, autocast_dtype=torch.bfloat16))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.01)


def test_importance_is_measured_without_dropout():
    model, batches = build("gpt2"), [text_batch()]
    assert model.config.resid_pdrop > 0
    assert layer_importance(model.train(), batches) == layer_importance(model.eval(), batches)


def test_progress_is_told():
    seen = []
    layer_importance(build("llama"), [text_batch(), text_batch(1)], progress=lambda *done: seen.append(done))
    assert seen == [(batch, layer) for batch in range(2) for layer in range(1, 7)]


def test_a_failing_forward_leaves_the_model_whole():
    model, batch = build("llama"), text_batch()

    def stop(batch_index, layer):
        raise KeyboardInterrupt

    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(KeyboardInterrupt):
            layer_importance(model, [batch], progress=stop)
        assert torch.equal(model(**batch).logits, before)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_choose_layers_prefers_the_lower_of_equals():
    assert choose_layers([0.5, 0.1, 0.5, 0.9, 0.5], 3) == [0, 2, 3]
    with pytest.raises(ConfigurationError, match="1 to 5"):
        choose_layers([0.0] * 5, 6)


def test_student_init_reads_a_recipe():
    init = StudentInit.from_dict({"from_teacher": True, "keep_layers": 3})
    assert init == StudentInit(keep_layers=3)
    assert init.build(build("llama")).config.num_hidden_layers == 3
    layers = StudentInit.from_dict({"keep_layers": [0, 5]}).build(build("llama")).model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, build("llama").model.layers[5].mlp.up_proj.weight)


def test_student_init_takes_only_the_batches_it_was_told_to():
    def batches():
        yield from (text_batch(seed) for seed in range(2))
        raise AssertionError("a third batch was asked for")

    init = StudentInit(keep_layers=4, strategy="importance", importance_batches=2)
    expected = choose_layers(layer_importance(build("llama"), [text_batch(0), text_batch(1)]), 4)
    student, teacher = init.build(build("llama"), batches()), build("llama")
    for layer, index in zip(student.model.layers, expected, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, teacher.model.layers[index].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_layer": 3}, "did you mean 'keep_layers'"),
        ({"keep_layers": 3, "zzz": 1}, "it has keep_layers, from_teacher"),
        ({"from_teacher": True}, "does not say how small"),
        ({"keep_layers": 3, "from_teacher": False}, "leave student_init out"),
        ({"keep_layers": "3"}, "expected a number of layers or a list"),
        ({"keep_layers": True}, "expected a number of layers or a list"),
        ({"keep_layers": 3, "strategy": "random"}, "choose one of even, importance"),
        ({"keep_layers": [0, 1], "strategy": "importance"}, "names the layers"),
        ({"keep_layers": 3, "measure": "l2"}, "choose one of kl, angular"),
        ({"keep_layers": 3, "importance_batches": 0}, "expected 1 or more"),
    ],
)
def test_student_init_refuses(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        StudentInit.from_dict(settings)


def test_importance_without_text_is_refused():
    with pytest.raises(ConfigurationError, match="give `batches`"):
        make_student(build("llama"), 3, "importance")
