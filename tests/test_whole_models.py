"""Models are loaded whole or not at all, and answer as causal language models: at every door."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, modeling_utils

from distill_trainers import GKDConfig, GKDTrainer, models
from distill_trainers.evaluation.runner import make_subjects
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.models.whole import _listening as listening
from distill_trainers.toy import addition_dataset

PACKAGE = Path(models.__file__).parents[1]
TINY = {
    "vocab_size": 14,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved teacher, to be damaged."""
    return Path(shutil.copytree(saved.teacher, tmp_path / "model"))


def weights(folder, change):
    """Write the weights of a folder anew, as `change` makes them."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state) or state, folder / "model.safetensors", {"format": "pt"})


def settings(folder, **changed):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def cut(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def without(*parts):
    return lambda state: {name: value for name, value in state.items() if not any(part in name for part in parts)}


# ---- What the files hold --------------------------------------------------------------------------------------------


def sharded(folder, change):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    change(folder, sorted(folder.glob("model-*.safetensors")))


def pickled(folder, change):
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    file.write_bytes(change(file.read_bytes()))


MLP = r"3 tensors \(model.layers.1.mlp.down_proj.weight, .*\) of LlamaForCausalLM are not in its files and would be ran"
DAMAGE = {
    "a layer without its MLP": (lambda f: weights(f, without("layers.1.mlp")), MLP),
    "a norm": (lambda f: weights(f, without("model.norm")), r"1 tensor \(model.norm.weight\) of"),
    "no embedding": (lambda f: weights(f, without("embed_tokens")), r"model.embed_tokens.weight.*not in its files"),
    "a config of more layers": (
        lambda f: settings(f, num_hidden_layers=3),
        r"9 tensors \(model.layers.2.*, …\) of Lla",
    ),
    "a config of fewer layers": (
        lambda f: settings(f, num_hidden_layers=1),
        r"9 tensors \(model.layers.1.*\) of its files have no place in LlamaForCausalLM. Expected config and weights",
    ),
    "a smaller vocabulary": (lambda f: settings(f, vocab_size=9), r"embed_tokens.weight: \[14, 48\], not \[9, 48\]"),
    "another width": (lambda f: settings(f, intermediate_size=40), "have another shape than its config says"),
    "a classifier's head": (
        lambda f: weights(f, lambda state: {**state, "score.weight": torch.ones(1, 48)}),
        r"1 tensor \(score.weight\) of its files have no place",
    ),
    "cut weights": (lambda f: cut(f, 5000), "model.safetensors is damaged, cut short or away"),
    "a cut head": (lambda f: cut(f, 100), "model.safetensors is damaged, cut short or away"),
    "no bytes": (lambda f: cut(f, 0), "model.safetensors is damaged, cut short or away"),
    "a pointer of Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is damaged, cut short or away",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: Error no file named"),
    "a shard that is away": (lambda f: sharded(f, lambda _, s: s[1].unlink()), "model-00002-of-.*cannot|cannot.*00002"),
    "a shard without bytes": (lambda f: sharded(f, lambda _, s: s[1].write_bytes(b"")), "model-00002-of-.*is damaged"),
    "an index that is no index": (
        lambda f: sharded(f, lambda f, _: (f / "model.safetensors.index.json").write_text("[]")),
        "cannot be loaded: TypeError",
    ),
    "an index without names": (
        lambda f: sharded(f, lambda f, _: (f / "model.safetensors.index.json").write_text("{}")),
        "cannot be loaded: KeyError: 'weight_map'",
    ),
    "a cut pickle": (lambda f: pickled(f, lambda data: data[:3000]), "cannot be loaded: PytorchStreamReader"),
    "a pickle without bytes": (lambda f: pickled(f, lambda data: b""), "cannot be loaded: EOFError. Expected"),
    "a pickle that is a text": (lambda f: pickled(f, lambda data: b"hello"), "cannot be loaded: KeyError"),
    "a width that is a word": (lambda f: settings(f, hidden_size="x"), "cannot be read: .*expected int, got str"),
    "no heads": (lambda f: settings(f, num_attention_heads=0), "cannot be read: ZeroDivisionError"),
    "two kinds": (lambda f: settings(f, model_type=["llama"]), "cannot be read: TypeError"),
    "an unknown dtype": (lambda f: settings(f, dtype="float33"), "cannot be read: AttributeError"),
    "a damaged generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json' is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_model_that_is_not_whole_is_refused_by_name(case, folder):
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(ConfigurationError, match=f"(?s){words}") as refusal:
        models.load_causal_lm(str(folder), role="teacher")
    assert str(folder) in str(refusal.value) and len(str(refusal.value)) < 600


def save(kind, folder, **changed):
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**TINY, **changed}))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_needs_a_trained_head(kind, tied, tmp_path):
    config = transformers.Qwen2Config(**TINY, num_key_value_heads=2, tie_word_embeddings=tied)
    kind.from_config(config).save_pretrained(tmp_path)
    if kind is AutoModel and tied:  # its head is its embedding: this is how GPT-2 was published
        assert models.load_causal_lm(str(tmp_path)).lm_head.weight.std() > 0
        return
    words = r"score.weight\) of its files have no place" if tied else r"lm_head.weight\).*So it has no trained head"
    with pytest.raises(ConfigurationError, match=words):
        models.load_causal_lm(str(tmp_path))


WHOLE = {
    "an embedding that is the head, saved twice": (
        {"tie_word_embeddings": True},
        lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()},
    ),
    "buffers of older versions": (
        {},
        lambda state: {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    ),
    "layers that look further ahead": ({}, lambda state: {**state, "mtp.layers.0.proj.weight": torch.ones(2)}),
    "such layers, numbered": (
        {"num_nextn_predict_layers": 1},
        lambda state: {**state, "model.layers.2.eh_proj.weight": torch.ones(2)},
    ),
    "a tower that sees": ({}, lambda state: {**state, "vision_tower.layers.9.weight": torch.ones(2)}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_an_architecture_leaves_out_is_no_fault(case, tmp_path):
    changed, change = WHOLE[case]
    expected = save("Llama", tmp_path, **changed).state_dict()
    weights(tmp_path, change)
    found = models.load_causal_lm(str(tmp_path)).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_missing_expert_is_named(tmp_path):
    """Experts are stacked as they are loaded: one that is away is a stack of another shape."""
    save("Mixtral", tmp_path, num_local_experts=4, num_key_value_heads=2)
    weights(tmp_path, without("layers.1.block_sparse_moe.experts.3.w1", "layers.1.mlp.experts.3.w1"))
    with pytest.raises(ConfigurationError, match=r"1 tensor \(model.layers.1.*experts.*\) cannot be put together"):
        models.load_causal_lm(str(tmp_path))


def test_a_folder_of_a_model_and_an_adapter_is_refused(saved, folder):
    """transformers would take the adapter's base, and leave the weights beside it."""
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match="holds a model and a PEFT adapter"):
        models.load_causal_lm(str(folder))


@pytest.mark.parametrize("fault", ["missing", "more", "shape"])
def test_under_zero3_names_and_shapes_are_compared_before_weights_are_partitioned(fault, make_student, monkeypatch):
    """There transformers tells only what is missing, and one process alone that shapes differ."""
    model, partitioned = make_student(), []
    zero3 = "transformers.modeling_utils._load_state_dict_into_zero3_model"
    monkeypatch.setattr(zero3, lambda model, state_dict, load_config=None: partitioned.append(len(state_dict)))
    whole = model.state_dict()
    changed = {
        "missing": without("layers.1.mlp")(whole),
        "more": {**whole, "model.layers.2.mlp.up_proj.weight": torch.ones(2)},
        "shape": {**whole, "model.norm.weight": torch.ones(2)},
    }[fault]
    words = {
        "missing": "would be random",
        "more": r"1 tensor \(model.layers.2",
        "shape": r"norm.weight: \[2\], not \[32\]",
    }
    with listening("The teacher model 'x'"):
        with pytest.raises(ConfigurationError, match=f"The teacher model 'x' is not whole: .*{words[fault]}"):
            modeling_utils._load_state_dict_into_zero3_model(model, changed, None)
        assert not partitioned
        modeling_utils._load_state_dict_into_zero3_model(model, whole, None)
    assert partitioned == [len(whole)]


# ---- Adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(saved, tmp_path):
    """A folder of an adapter of the saved student, with a head of its own."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["model.norm"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def adapter_weights(folder, change):
    state = change(load_file(folder / "adapter_model.safetensors"))
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


ADAPTERS = {
    "half a layer": (
        lambda f: adapter_weights(f, without("layers.1.mlp.up_proj.lora_B")),
        r"1 tensor \(.*layers.1.mlp.up_proj.lora_B.*\) are not in its files",
    ),
    "its copy of the norm": (
        lambda f: adapter_weights(f, without("norm")),
        "KeyError: .base_model.model.model.norm.weight",
    ),
    "more layers": (
        lambda f: adapter_weights(
            f, lambda s: {**s, **{n.replace("layers.1", "layers.7"): v.clone() for n, v in s.items()}}
        ),
        r"4 tensors \(.*layers.7.*\) of its files have no place",
    ),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "cannot be loaded: SafetensorError|Safet"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused(case, adapter, saved):
    damage, words = ADAPTERS[case]
    damage(adapter)
    with pytest.raises(ConfigurationError, match=words):
        models.load_merged_adapter(str(adapter))
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    with pytest.raises(ConfigurationError, match=f"teacher_adapter.*({words}|header too small)"):
        models.load_adapter(get_peft_model(base, LoraConfig(target_modules=["q_proj"])), str(adapter))


def test_a_whole_adapter_is_loaded(adapter):
    norm = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert torch.equal(models.load_merged_adapter(str(adapter)).model.norm.weight, norm)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base_is_refused(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigurationError, match="names no base model|names the base model None"):
        models.load_merged_adapter(str(adapter))


# ---- What the models say --------------------------------------------------------------------------------------------


def bert(**changed):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.BertConfig(**{**TINY, "vocab_size": 14, **changed}))


ACAUSAL = r"\(BertLMHeadModel\) is not causal: what it says after 8 tokens changes with the tokens that follow"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_encoder_is_refused_in_training(role, make_trainer):
    trainer = make_trainer(**{role: bert()}, lmbda=0.0)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ConfigurationError, match=f"The {role}.*{ACAUSAL}"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_an_encoder_is_refused_before_it_writes(make_trainer):
    with pytest.raises(ConfigurationError, match=f"The student {ACAUSAL}"):
        make_trainer(bert(), lmbda=1.0).train()


def test_a_decoder_of_that_kind_trains(make_trainer, by_step):
    trainer = make_trainer(bert(is_decoder=True), bert(is_decoder=True, initializer_range=0.3), lmbda=0.5)
    trainer.train()
    assert len(by_step(trainer)) == 3


KINDS = ["Llama", "Mistral", "Gemma2", "Mamba", "Mixtral", "GPT2", "Rwkv", "GPTNeoX", "OPT", "Qwen2Moe"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_causal_architectures_pass_and_stay_as_they_were(kind, dtype):
    small = {"num_key_value_heads": 2, "sliding_window": 4, "word_embed_proj_dim": 16, "ffn_dim": 24, "head_dim": 8}
    if kind == "Qwen2Moe":
        small |= {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**TINY, **small), dtype=dtype)
    model.train()
    model.get_submodule(next(name for name, part in model.named_modules() if isinstance(part, nn.Embedding))).eval()
    modes = [part.training for part in model.modules()]
    state = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    random = torch.get_rng_state()
    models.check_answers(model, "The student")
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(v, state[name]) for name, v in [*model.named_parameters(), *model.named_buffers()])
    assert torch.equal(random, torch.get_rng_state())


def test_a_model_of_few_positions_is_asked_about_those(tokenizer):
    models.check_answers(bert(is_decoder=True, max_position_embeddings=6), "The student")
    with pytest.raises(ConfigurationError, match="after 3 tokens"):
        models.check_answers(bert(max_position_embeddings=6), "The student")


def test_a_model_is_asked_once(make_student, monkeypatch):
    model, calls = make_student(), []
    model.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(3):
        models.check_answers(model, "The student")
    assert len(calls) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_broken_weights_are_named(role, value, make_trainer, make_student, make_teacher):
    model = make_student() if role == "student" else make_teacher()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    words = rf"The {role}.*NaN or infinite logits: 1 tensor \(model.layers.1.mlp.up_proj.weight\) hold NaN"
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(**{role: model}).train()


# ---- Every door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_trainers_refuse(role, folder, saved, tmp_path):
    weights(folder, without("layers.1.mlp"))
    given = {"student": saved.student, "teacher": saved.teacher, role: str(folder)}
    args = GKDConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(ConfigurationError, match=f"The {role} model .*{MLP}"):
        GKDTrainer(given["student"], given["teacher"], args, addition_dataset(8))


def test_evaluation_refuses(folder, saved):
    weights(folder, without("layers.1.mlp"))
    subject, *_ = make_subjects({"student": saved.student}, str(folder), None, None, None)
    with pytest.raises(ConfigurationError, match=f"The teacher model .*{MLP}"):
        _ = subject.facts
    encoder = bert()
    with pytest.raises(ConfigurationError, match=f"The student.*{ACAUSAL}"):
        make_subjects({"encoder": encoder}, None, None, None, None)


@pytest.mark.parametrize("broken", ["files", "encoder"])
def test_a_server_refuses(broken, folder, tokenizer):
    from distill_trainers.cli.serve_teacher import load_service
    from distill_trainers.teachers.remote.service import Limits

    if broken == "files":
        weights(folder, without("layers.1.mlp"))
    else:
        shutil.rmtree(folder)
        bert().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    options = SimpleNamespace(trust_remote_code=False, device_map=None, model=str(folder), dtype="auto", device="cpu")
    with pytest.raises(ConfigurationError, match=MLP if broken == "files" else ACAUSAL):
        load_service(options, Limits())


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b'{"model": ', b"\xff\xfe", b'{"pad_token": 7}'])
def test_a_damaged_tokenizer_is_refused_by_name(file, text, folder, tokenizer):
    from distill_trainers.teachers.loading import teacher_tokenizer
    from distill_trainers.trainers.student import student_tokenizer

    (folder / file).write_bytes(text)
    args = GKDConfig(output_dir=str(folder / "out"), use_cpu=True, report_to="none")
    subject, *_ = make_subjects({"student": str(folder)}, None, None, None, None)
    for door in (
        lambda: models.load_tokenizer(str(folder)),
        lambda: teacher_tokenizer(str(folder), tokenizer, args),
        lambda: student_tokenizer(str(folder), args),
        subject.tokenizer,
    ):
        with pytest.raises(ConfigurationError, match=f"The tokenizer of '.*{folder.name}' cannot be read: .*"):
            door()


LOADERS = {"AutoConfig", "config_class", "AutoTokenizer", "GenerationConfig", "PeftConfig"}


def test_one_place_loads_models():
    """`from_pretrained` of models, and PEFT's `load_adapter`, fill and drop in silence: `models/whole.py` asks them."""
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "load_adapter"):
                owner = ast.unparse(node.value)
                if owner not in LOADERS:
                    found.add((file.relative_to(PACKAGE).as_posix(), f"{owner}.{node.attr}"))
    assert found == {
        ("models/whole.py", "kind.from_pretrained"),
        ("models/whole.py", "peft.load_adapter"),
        ("models/merging.py", "PeftModel.from_pretrained"),  # then asked again, by models/whole.py
        ("teachers/self_teacher.py", "models.load_adapter"),
        ("rollouts/vllm.py", "self.engine.load_adapter"),  # vLLM's own, which is proved afterwards
    }
