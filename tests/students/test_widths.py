"""Narrower students: what is kept answers as the teacher does with the rest masked, and is an ordinary model."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.students import Kept, choose, masked, prune, shape_of, take, width_importance
from distill_trainers.students.importance import most_important
from tests.students.models import DENSE, EVERY, WITHOUT_A_MEAN, build, text_batch

TEXT = [text_batch(0), text_batch(1, left=True)]


def sizes_of(name):
    """Every size of a model, each smaller."""
    if name == "gpt2":
        return {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    inner = {"intermediate_size": 32} if name in DENSE else {"num_experts": 4}
    return {"hidden_size": 24, "num_key_value_heads": 1, **inner}


def exact(name):
    """A model without the epsilons of norms, in float64 where its attention and products know that."""
    model = build(name)
    for setting in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if hasattr(model.config, setting):
            setattr(model.config, setting, 1e-12)
    for module in model.modules():
        for epsilon in ("variance_epsilon", "eps"):
            if hasattr(module, epsilon):
                setattr(module, epsilon, 1e-12)
    return model if name == "gemma2" or name not in DENSE else model.double()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


@pytest.fixture(scope="module")
def pruned():
    """`pruned(name)`: teacher and student, smaller in every direction; made once."""
    made = {}

    def get(name):
        if name not in made:
            model = build(name)
            made[name] = (model, prune(model, keep_layers=3, batches=TEXT, **sizes_of(name)))
        return made[name]

    return get


# ---- Every architecture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_A_MEAN)
def test_the_student_is_the_teacher_with_the_rest_masked(name):
    """Gains make up for fewer channels exactly, but for the epsilon of norms, which is a mean over fewer of them."""
    model, batch = exact(name), text_batch(2)
    choice = choose(model, keep_layers=3, sizes=sizes_of(name), batches=TEXT)
    student = take(model, choice)
    assert student.dtype == model.dtype and student.config.num_hidden_layers == 3
    if choice.kept.experts is not None:
        for place, layer in enumerate(choice.kept.layers):
            _without_experts(model.model.layers[layer].mlp.gate, choice.kept.experts[place], model.config)
    with masked(model, choice.kept):
        expected = logits(model, batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(student, batch), expected, rtol=1e-5, atol=1e-5)


def _without_experts(router, kept, config):
    """The router's own rule over the experts that are kept."""

    def forward(hidden):
        scores = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        away = torch.ones(scores.shape[-1], dtype=torch.bool)
        away[kept] = False
        scores = scores.masked_fill(away, -torch.inf)
        top, chosen = scores.float().softmax(-1).topk(config.num_experts_per_tok, -1)
        if getattr(config, "norm_topk_prob", True):
            top = top / top.sum(-1, keepdim=True)
        return scores, top.to(scores.dtype), chosen

    router.forward = forward


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_with_a_mean_in_its_norms_all_but_channels_is_masked_alike(name):
    model, batch = build(name), text_batch(2)
    sizes = {"intermediate_size": 32} if name == "gpt2" else {"intermediate_size": 32, "num_key_value_heads": 1}
    choice = choose(model, keep_layers=3, sizes=sizes, batches=TEXT)
    with masked(model, choice.kept):
        expected = logits(model, batch)
    torch.testing.assert_close(logits(take(model, choice), batch), expected, rtol=1e-4, atol=1e-5)


def _zero_channels(model, kept, heads_kept=None):
    """Write nothing into other channels; with LayerNorm kept ones have no mean; heads that go do nothing."""
    rest = [channel for channel in range(32) if channel not in kept]
    centres = model.config.model_type in ("gpt2", "phi")
    writers = ("o_proj", "down_proj", "dense", "fc2", "c_proj", "embed_tokens", "wte", "wpe")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            role = name.removesuffix(".weight").removesuffix(".bias")
            if "norm" in role or ".ln_" in role:
                if centres and name.endswith(".bias") and parameter.numel() == 32:
                    parameter[rest] = 0
            elif role.endswith(writers):
                last = parameter.dim() == 1 or role.endswith(("c_proj", "embed_tokens", "wte", "wpe"))
                value = parameter if last else parameter.transpose(-1, -2)  # channels along the last axis
                if centres:
                    value[..., kept] -= value[..., kept].mean(-1, keepdim=True)
                value[..., rest] = 0
                if role.endswith("attn.c_proj") and parameter.dim() == 2:
                    value[heads_kept * 8 :] = 0


@pytest.mark.parametrize("name", EVERY)
def test_channels_of_zeros_go_without_a_change(name):
    model, batch = exact(name), text_batch(2)
    channels = 16 if name == "gpt2" else 24
    kept = sorted(torch.randperm(32, generator=torch.Generator().manual_seed(1))[:channels].tolist())
    _zero_channels(model, kept, heads_kept=2)
    sizes = {"hidden_size": channels} | ({"num_attention_heads": 2} if name == "gpt2" else {})
    choice = choose(model, sizes=sizes, batches=TEXT)
    assert choice.kept.channels == kept
    student = take(model, choice)
    torch.testing.assert_close(logits(student, batch), logits(model, batch), rtol=1e-4, atol=1e-4)
    assert student.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", EVERY)
class TestEvery:
    def test_comes_back_from_disk_and_writes_the_same(self, name, pruned, tmp_path):
        _, student = pruned(name)
        student.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is type(student)
        batch = text_batch(3, left=True)
        settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        cached, whole = student.generate(**batch, **settings), loaded.generate(**batch, **settings, use_cache=False)
        assert torch.equal(cached.sequences, whole.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)

    def test_trains_and_leaves_the_teacher_alone(self, name, pruned):
        model, student = pruned(name)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
        assert {p.data_ptr() for p in student.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build(name).parameters(), strict=True))
        batch, student = text_batch(4), copy.deepcopy(student)
        student(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
        assert student.num_parameters() < 0.7 * model.num_parameters()

    def test_keeping_everything_is_the_identity(self, name):
        model, batch = build(name), text_batch(2)
        whole = shape_of(model.config)
        sizes = {"hidden_size": whole.hidden_size, "num_attention_heads": whole.num_attention_heads}
        student = prune(model, keep_layers=4, batches=TEXT, **sizes)
        assert student is not model and torch.equal(logits(student, batch), logits(model, batch))

    def test_taking_the_weights_gives_the_same_student(self, name, pruned):
        _, student = pruned(name)
        model = build(name)
        taken = prune(model, keep_layers=3, batches=TEXT, copy=False, **sizes_of(name))
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), taken.parameters(), strict=True))
        assert not sum(parameter.numel() for parameter in model.parameters())


# ---- What is chosen --------------------------------------------------------------------------------------------------


def _permuted(model, name):
    """The same model with its feed-forward units in another order."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    both = torch.cat([order, 48 + order])
    with torch.no_grad():
        for layer in model.transformer.h if name == "gpt2" else model.model.layers:
            mlp = layer.mlp
            if name == "gpt2":
                mlp.c_fc.weight.copy_(mlp.c_fc.weight[:, order]), mlp.c_fc.bias.copy_(mlp.c_fc.bias[order])
                mlp.c_proj.weight.copy_(mlp.c_proj.weight[order])
            elif name == "phi3":
                mlp.gate_up_proj.weight.copy_(mlp.gate_up_proj.weight[both])
                mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
            else:
                for product in (mlp.gate_proj, mlp.up_proj):
                    product.weight.copy_(product.weight[order]), product.bias.copy_(product.bias[order])
                mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_order_of_units_does_not_matter(name):
    students = [
        prune(model, intermediate_size=24, batches=TEXT) for model in (build(name), _permuted(build(name), name))
    ]
    assert not torch.equal(*(next(p for n, p in s.named_parameters() if "mlp" in n) for s in students))
    first, second = (logits(student, text_batch(2)) for student in students)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_importance_is_its_formulas():
    """Against the definitions, written down for one layer of a Llama in float64."""
    model = build("llama").double()
    found = width_importance(model, TEXT)
    layer, head_dim = model.model.layers[2], 8
    units, groups, channels, tokens = torch.zeros(48), torch.zeros(2), torch.zeros(32), 0
    units, groups, channels = units.double(), groups.double(), channels.double()
    for batch in TEXT:
        real = batch["attention_mask"].bool()
        seen = {}
        hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(heads=a[0]))]
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
            hooks[0].remove()
            middle = out.hidden_states[2] + layer.self_attn.o_proj(seen["heads"])
            normed = layer.post_attention_layernorm(middle)
            inner = F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            units += inner[real].square().sum(0)
            weight = layer.self_attn.o_proj.weight
            for group in range(2):
                at = slice(group * 2 * head_dim, (group + 1) * 2 * head_dim)
                groups[group] += (seen["heads"][real][:, at] @ weight[:, at].T).square().sum()
            states = out.hidden_states[:-1]
            for block, state in zip(model.model.layers, states, strict=True):
                channels += block.input_layernorm(state)[real].abs().sum(0)
                attended, _ = block.self_attn(
                    block.input_layernorm(state),
                    position_embeddings=model.model.rotary_emb(state, torch.arange(10)[None]),
                    attention_mask=torch.tril(real[:, None, :] & torch.ones(10, 10, dtype=torch.bool))[:, None],
                )
                channels += block.post_attention_layernorm(state + attended)[real].abs().sum(0)
            channels += out.hidden_states[-1][real].abs().sum(0)
        tokens += int(real.sum())
    expected = units.sqrt() * layer.mlp.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(torch.tensor(found.units[2]).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.groups[2]).double(), groups.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.channels).double(), channels / tokens, rtol=1e-5, atol=1e-6)
    assert found.tokens == tokens


def test_experts_are_dropped_by_their_share_of_the_routing():
    model = build("qwen3-moe")
    found = width_importance(model, TEXT)
    shares = torch.tensor(found.experts)
    assert shares.shape == (4, 6) and torch.allclose(shares.sum(-1), torch.ones(4))
    choice = choose(model, sizes={"num_experts": 3}, batches=TEXT)
    for share, kept in zip(shares, choice.kept.experts, strict=True):
        assert kept == sorted(share.topk(3).indices.tolist())


def test_the_larger_of_equals_is_the_first():
    assert most_important([1.0, 3.0, 1.0, 2.0, 1.0], 3) == [0, 1, 3]


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 2}, {"num_key_value_heads": 1}])
def test_heads_go_in_whole_groups(sizes):
    student = prune(build("llama"), batches=TEXT, **sizes)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.config.head_dim == 8 and student.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


def test_what_was_measured_is_told(tmp_path):
    import json

    model = build("llama")
    choice = choose(model, keep_layers=3, sizes={"intermediate_size": 24}, batches=TEXT)
    assert choice.shape == shape_of(take(model, choice).config)
    told = json.loads(choice.to_json())
    assert told["kept"]["layers"] == choice.kept.layers and len(told["kept"]["units"]) == 3
    assert told["importance"]["layers"] == pytest.approx(choice.importance.layers, rel=1e-5)
    again = choose(model, keep_layers=3, sizes={"intermediate_size": 24}, importance=choice.importance)
    assert again.kept == choice.kept


def test_a_student_keeps_dtype_mode_and_how_it_generates():
    model = build("llama").to(torch.bfloat16).train()
    model.generation_config.top_k = 7
    student = prune(model, intermediate_size=24, batches=TEXT)
    assert student.dtype == torch.bfloat16 and student.training and model.training
    assert student.generation_config.top_k == 7 and student.generation_config is not model.generation_config
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_narrower_gemma_scales_its_embedding():
    model = build("gemma")
    student = prune(model, hidden_size=24, batches=TEXT)
    kept = choose(model, sizes={"hidden_size": 24}, batches=TEXT).kept.channels
    ids = torch.arange(61)
    expected = model.model.embed_tokens(ids)[:, kept]
    torch.testing.assert_close(student.model.embed_tokens(ids), expected, rtol=1e-5, atol=1e-6)
    gains = 1 + model.model.layers[0].input_layernorm.weight[kept]
    found = 1 + student.model.layers[0].input_layernorm.weight
    torch.testing.assert_close(found, gains * math.sqrt(32 / 24), rtol=1e-5, atol=1e-6)


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("llama", {"intermediate_size": 30}, "Got intermediate_size=30; expected a multiple of 8, such as 32"),
        ("llama", {"hidden_size": 20}, "a multiple of 8, such as 16"),
        ("llama", {"intermediate_size": 56}, "expected 1 to 48, which the teacher has"),
        ("llama", {"intermediate_size": 0}, "expected 1 to 48"),
        ("llama", {"hidden_size": True}, "Got hidden_size=True"),
        (
            "llama",
            {"num_attention_heads": 3},
            "Got num_attention_heads=3; expected a multiple of 2, because 2 query heads",
        ),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, "num_attention_heads=4; expected 2, because 2"),
        ("llama", {"num_key_value_heads": 3}, "expected 1 to 2"),
        ("llama", {"keep_layers": 5}, "keep 5 of 4 layers"),
        ("llama", {"keep_layers": [0, 9], "intermediate_size": 24}, "from 0 to 3"),
        ("llama", {"num_experts": 2}, "but the model has none"),
        ("llama", {"parameters": 1e4, "keep_layers": 2}, "beside keep_layers; expected one or the other"),
        ("llama", {"parameters": 1e9}, "expected a number up to 35,808"),
        ("llama", {"parameters": -1}, "expected a number up to"),
        ("llama", {"parameters": 1000}, "no shape of a llama"),
        ("gpt2", {"hidden_size": 24}, "expected heads × 8.*Set `hidden_size` and `num_attention_heads` together"),
        ("gpt2", {"num_attention_heads": 2}, "hidden_size=32 with 2 heads of 8"),
        ("qwen3-moe", {"intermediate_size": 8}, "expected `num_experts`, because experts are kept or dropped whole"),
        ("qwen3-moe", {"num_experts": 1}, "Got num_experts=1; expected 2 or more"),
        ("qwen3-moe", {"parameters": 4e4}, "plans are made for dense models"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, sizes, words):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=f"(?s){words}"):
        prune(model, batches=TEXT, **sizes)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_that_cannot_be_narrowed_are_refused():
    import transformers

    settings = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**settings, intermediate_size=48)
    model = transformers.GPTNeoXForCausalLM(config)
    with pytest.raises(ConfigurationError, match="architecture 'gpt_neox', whose weights are not known.*gemma.*llama"):
        prune(model, intermediate_size=24, batches=TEXT)
    assert prune(model, keep_layers=1).config.num_hidden_layers == 1
    changed = build("llama")
    changed.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        ConfigurationError, match="the weight 'model.layers.0.mlp.extra.weight', which its architecture"
    ):
        prune(changed, intermediate_size=24, batches=TEXT)
    quantised = build("llama")
    quantised.is_quantized = True
    with pytest.raises(ConfigurationError, match="quantised"):
        prune(quantised, intermediate_size=24, batches=TEXT)
    with torch.device("meta"):
        shell = build("llama")
    with pytest.raises(ConfigurationError, match="offloaded or missing"):
        prune(shell, intermediate_size=24, batches=TEXT)


def test_sizes_without_text_are_refused():
    with pytest.raises(ConfigurationError, match="no text to measure what matters; expected `batches`"):
        prune(build("llama"), intermediate_size=24)
    with pytest.raises(ConfigurationError, match="no batches"):
        prune(build("llama"), intermediate_size=24, batches=[])


def test_a_kept_of_nothing_cuts_nothing():
    assert not Kept([0]).cuts_widths and Kept([0], units=[[1]]).cuts_widths


# ---- Memory ----------------------------------------------------------------------------------------------------------

_IN_ITS_OWN_PROCESS = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
from distill_trainers.students import prune
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
text = [{"input_ids": torch.arange(8)[None]}]
model(**text[0])
size, loaded = sum(p.nbytes for p in model.parameters()) / 2**20, peak()
student = prune(model, keep_layers=7, intermediate_size=1024, hidden_size=896, batches=text, copy=False)
student.save_pretrained(sys.argv[2])
print(size, loaded, peak())
"""


@pytest.mark.slow
def test_a_model_is_pruned_in_little_more_memory_than_itself(tmp_path):
    """Its student takes two thirds of it; both never lie in memory."""
    import subprocess
    import sys

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=16
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher", max_shard_size="50MB")
    command = [sys.executable, "-c", _IN_ITS_OWN_PROCESS, str(tmp_path / "teacher"), str(tmp_path / "student")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    size, loaded, peak = map(float, done.stdout.splitlines()[-1].split())  # DeepSpeed writes to stdout, too
    assert size > 400 and peak - loaded < 0.15 * size, done.stdout
