"""Models that name no head, have something before it, or cannot generate; students in which nothing is trainable."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from distill_trainers import models
from distill_trainers.doctor.shapes import shape_of
from distill_trainers.exceptions import ConfigurationError

SHARED = {
    "vocab_size": 14,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ENCODERS = {
    "Electra": {"is_decoder": True, "embedding_size": 16},
    "RemBert": {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24},
    "Roberta": {"is_decoder": True},
    "Bert": {"is_decoder": True},
}
DECODERS = {
    "Bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "init_std": 0.3},
    "GPT2": {"n_embd": 32},
    "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "Bloom": {"n_head": 4},
}


class RemoteConfig(PreTrainedConfig):
    model_type = "remote"
    num_hidden_layers = 1
    num_attention_heads = 1


class Means(nn.Module):
    """Says of a position what the mean of all tokens up to it is: the least that is causal."""

    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Embedding(14, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 14)

    def forward(self, input_ids):
        embedded = self.embed(input_ids)
        mean = embedded.cumsum(1) / torch.arange(1, 1 + input_ids.shape[1]).unsqueeze(-1)
        return self.out(F.silu(self.mix(mean + embedded)))


class RemoteModel(PreTrainedModel):
    """As code beside the weights on the Hub may be: no head by a known name, no `generate`, nothing about caches."""

    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.means = Means()
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return CausalLMOutput(logits=self.means(input_ids))

    def get_input_embeddings(self):
        return self.means.embed


class PlainModule(nn.Module):
    """No model of transformers at all, but for a config."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.means = Means()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return SimpleNamespace(logits=self.means(input_ids))


def made(kind, seed=1):
    torch.manual_seed(seed)
    if kind in ("remote", "plain"):
        config = RemoteConfig(vocab_size=14, hidden_size=16, pad_token_id=0, eos_token_id=1)
        model = RemoteModel(config) if kind == "remote" else PlainModule(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model
    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **(ENCODERS | DECODERS)[kind]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def reference(student, teacher, batch):
    """Mean JSD of the models' own logits, by autograd."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trained = batch["labels"][:, 1:] != -100
    q = F.log_softmax(student(**inputs).logits[:, :-1][trained].double(), dim=-1)
    with torch.no_grad():
        p = F.log_softmax(teacher(**inputs).logits[:, :-1][trained].double(), dim=-1)
    m = (0.5 * (p.exp() + q.exp())).log()
    return (0.5 * p.exp() * (p - m) + 0.5 * q.exp() * (q - m)).sum(-1).mean()


def assert_gradients(model, expected):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scale = max(p.grad.abs().max() for p in expected.parameters() if p.grad is not None)
    for name, p in expected.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * scale.item(), msg=name)


@pytest.mark.parametrize("kind", [*ENCODERS, "remote", "plain"])
def test_a_head_that_cannot_be_fused_takes_the_exact_logits(make_trainer, make_student, batch_of, caplog, kind):
    student, teacher = made(kind), made(kind, seed=2)
    own, own_teacher = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    trainer = make_trainer(student, teacher, lmbda=0.0)
    batch = batch_of(trainer, range(8))
    expected = reference(own, own_teacher, batch)
    expected.backward()
    trainer.model.train()
    for _ in range(2):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    assert trainer.two_models.head_is_fused is trainer.teacher._fused is False
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss.item() > 1e-4
    assert_gradients(trainer.model, own)
    assert sum("cannot be fused" in record.getMessage() for record in caplog.records) == 1, "said once, of the student"
    mixed = make_trainer(make_student(), made(kind, seed=2), lmbda=0.0)  # the other way is the teacher's alone
    loss = mixed.compute_loss(mixed.model, batch)
    assert loss.item() == pytest.approx(reference(make_student(), own_teacher, batch).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "layers"), [("Electra", ["query", "value"]), ("remote", ["mix"]), ("plain", ["mix"])])
def test_an_adapter_on_such_a_model(make_trainer, batch_of, tmp_path, kind, layers):
    lora = LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(made(kind), made(kind, seed=2), lmbda=0.0, peft_config=lora)
    batch = batch_of(trainer, range(8))
    own = copy.deepcopy(trainer.model).eval()
    expected = reference(own, made(kind, seed=2).eval(), batch)
    expected.backward()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(trainer.model, own)


def test_such_a_model_trains_evaluates_and_is_saved(make_trainer, rows_for, tmp_path):
    trainer = make_trainer(made("remote"), made("remote", seed=2), lmbda=0.0, eval_dataset=rows_for("gkd")(6, seed=5))
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before
    trainer.save_model(str(tmp_path / "saved"))
    saved = RemoteModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("method", ["gkd", "minillm", "dpkd"])
@pytest.mark.parametrize("engine", ["decode", "hf"])
def test_a_student_that_cannot_generate_is_named_where_it_should_sample(make_trainer, method, engine):
    settings = {"gkd": {"lmbda": 0.5}, "minillm": {"teacher_mix_alpha": 0.0}}.get(method, {})
    with pytest.raises(ConfigurationError, match=r"Got a RemoteModel, which has no `generate`.*GenerationMixin"):
        make_trainer(made("remote"), method=method, rollout_engine=engine, **settings)


@pytest.mark.parametrize("engine", ["decode", "hf"])
@pytest.mark.parametrize("kind", ["Roberta", "Bart"])
def test_a_student_that_counts_positions_itself_is_named_where_it_should_sample(make_trainer, kind, engine):
    """Behind padding, or already with `position_ids` from 0, it answers as the same text alone does not."""
    student = made(kind)
    ids, padded = (
        torch.arange(3, 11)[None],
        torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.arange(3, 11)[None]], 1),
    )
    mask = (padded != 0).long()
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if kind == "Roberta" else {}
    with torch.no_grad():
        alone, behind = student.eval()(ids), student(padded, attention_mask=mask, **given)
    assert (alone.logits[:, -1] - behind.logits[:, -1]).norm() > 0.1 * alone.logits[:, -1].norm()
    with pytest.raises(ConfigurationError, match=rf"Got a {kind}ForCausalLM, which counts the positions of its tokens"):
        make_trainer(student, lmbda=0.5, rollout_engine=engine)


@pytest.mark.parametrize("kind", ["Bert", "Electra", "GPT2", "OPT", "Bloom"])
def test_others_may_sample(kind):
    models.check_can_generate(made(kind))


def test_a_teacher_that_cannot_generate_is_named_where_it_should_answer(make_trainer, rows_for):
    prompts = rows_for("gkd")(8).remove_columns("completion")
    trainer = make_trainer(teacher=made("remote"), train=prompts, lmbda=0.0, seq_kd=True)
    with pytest.raises(ConfigurationError, match=r"Got a RemoteModel, which has no `generate`"):
        trainer.train()


def test_sizes_of_such_a_model_are_read():
    shape = shape_of(made("remote"))
    assert (shape.vocab, shape.parameters) == (14, models.num_parameters(made("remote")))
    assert models.logit_rows(made("remote")) == models.logit_rows(made("Electra")) == 14


# ---- Nothing to train -----------------------------------------------------------------------------------------------


def frozen_whole(make_student):
    return make_student().requires_grad_(False), None


def frozen_adapter(make_student):
    from peft import get_peft_model

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", inference_mode=True)
    return get_peft_model(make_student(), lora), None


def adapter_for_inference(make_student):
    return make_student(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", inference_mode=True)


@pytest.mark.parametrize(
    ("made_by", "remedy"),
    [
        (frozen_whole, r"`requires_grad_\(True\)`"),
        (frozen_adapter, "`is_trainable=True`"),
        (adapter_for_inference, "`inference_mode=False`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_student_in_which_nothing_is_trainable_is_named(make_trainer, make_student, made_by, remedy):
    student, lora = made_by(make_student)
    with pytest.raises(ConfigurationError, match=rf"none of the student's .* parameters.*{remedy}"):
        make_trainer(student, peft_config=lora)


def test_a_frozen_student_is_evaluated(make_trainer, make_student, rows_for):
    student = make_student().requires_grad_(False)
    trainer = make_trainer(student, train=None, eval_dataset=rows_for("gkd")(6))
    assert trainer.evaluate()["eval_kl"] > 0


@pytest.mark.parametrize(
    ("part", "checkpointing"), [("embed_tokens", False), ("layers.1.mlp.down_proj", True), ("norm", True)]
)
def test_a_student_with_one_trainable_part_trains_that_part(make_trainer, make_student, part, checkpointing):
    student = make_student(tie_word_embeddings=False).requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(part in name)
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(student, lmbda=0.5, activation_checkpointing=checkpointing)
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if part in name}


def test_the_head_alone_is_trained(make_trainer, make_student, make_teacher, batch_of):
    student = make_student(tie_word_embeddings=False).requires_grad_(False)
    student.lm_head.weight.requires_grad_(True)
    own, teacher = copy.deepcopy(student), make_teacher()
    trainer = make_trainer(student, copy.deepcopy(teacher), lmbda=0.0)
    batch = batch_of(trainer, range(8))
    trainer.compute_loss(trainer.model, batch).backward()
    reference(own, teacher, batch).backward()
    assert_gradients(trainer.model, own)


def test_a_teacher_that_requires_gradients_gets_none(make_trainer, make_student, make_teacher):
    teacher = make_teacher().train()
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(make_student(), teacher, lmbda=0.0)
    trainer.train()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


# ---- Weights without values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_on_meta_are_named(make_trainer, make_student, role):
    with torch.device("meta"):
        model = type(make_student())(make_student().config)
    with pytest.raises(ConfigurationError, match=f"The {role}'s weight 'model.embed_tokens.weight' is on .* `meta`"):
        make_trainer(**{role: model})


@pytest.mark.parametrize("part", ["whole", "head"])
def test_a_student_made_to_infer_alone_is_named(make_trainer, make_student, part):
    with torch.inference_mode():
        model = make_student(tie_word_embeddings=False)
    if part == "head":
        head, model = model.lm_head, make_student(tie_word_embeddings=False)
        model.lm_head = head
    with pytest.raises(ConfigurationError, match="made under `torch.inference_mode`"):
        make_trainer(model)


def test_a_teacher_made_to_infer_alone_is_a_teacher(make_trainer, make_teacher, by_step):
    with torch.inference_mode():
        teacher = make_teacher()
    trainer, plain = make_trainer(teacher=teacher), make_trainer()
    trainer.train(), plain.train()
    assert by_step(trainer) == by_step(plain)
