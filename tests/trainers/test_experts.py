"""The balance term of mixtures of experts: the model's own, once per micro-batch, where its config asks for it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from distill_trainers.exceptions import ConfigurationError

COEFFICIENT = 0.5  # large enough to be seen beside the divergence
SHARED = {
    "vocab_size": 14,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "output_router_logits": True,
    "router_aux_loss_coef": COEFFICIENT,
}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
KINDS = {
    "Mixtral": {},
    "Qwen2Moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3Moe": {"decoder_sparse_step": 1},
    "Olmoe": {},
    "GptOss": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    "Phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "GraniteMoe": {"logits_scaling": 2.0},
    "Jamba": {**HYBRID, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "JetMoe": {"kv_channels": 8, "num_key_value_heads": 2, "aux_loss_coef": COEFFICIENT},
    "MiniMax": {"layer_types": ["full_attention", "full_attention"], "block_size": 4},
}


def mixture(kind="Mixtral", seed=1, **changes):
    settings = {**SHARED, **KINDS.get(kind, {}), **changes}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings), dtype=torch.float32)


def silent(model):
    """The same model, whose config does not ask for the term."""
    model = copy.deepcopy(model)
    model.config.output_router_logits = False
    return model


def balance_of(model, batch):
    """The term from router logits of a forward that has nothing of ours, by transformers' function for it."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model(**inputs, output_router_logits=True)
    return load_balancing_loss_func(output.router_logits, 4, 2, batch["attention_mask"])


def loss_and_gradients(trainer, batch):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [None, False], ids=["fused head", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_balance_term_is_added(make_trainer, batch_of, kind, fused):
    student = mixture(kind)
    with_term = make_trainer(copy.deepcopy(student), lmbda=0.0)
    without = make_trainer(silent(student), lmbda=0.0)
    batch = batch_of(with_term, range(8))
    assert not batch["attention_mask"].all(), "padding must not count"
    reference = copy.deepcopy(student).train()
    balance = balance_of(reference, batch)
    (COEFFICIENT * balance).backward()
    expected = gradients(reference)
    assert balance.item() > 0.5
    for trainer in (with_term, without):
        trainer.two_models.head_is_fused = fused
    loss, found = loss_and_gradients(with_term, batch)
    plain, of_plain = loss_and_gradients(without, batch)
    assert with_term.two_models.head_is_fused is (fused is None)
    assert loss - plain == pytest.approx(COEFFICIENT * balance.item(), rel=1e-4)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        difference = found[name] - of_plain.get(name, 0)
        torch.testing.assert_close(difference, value, rtol=1e-3, atol=1e-4 * scale.item(), msg=name)
    # What transformers' Trainer adds to its loss with the same model.
    labels = {"labels": batch["labels"], **{n: batch[n] for n in ("input_ids", "attention_mask")}}
    theirs = [copy.deepcopy(model).train()(**labels).loss.item() for model in (student, silent(student))]
    assert loss - plain == pytest.approx(theirs[0] - theirs[1], rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}], ids=lambda changes: next(iter(changes))
)
def test_a_config_that_does_not_ask_gets_none(make_trainer, batch_of, changes):
    student = mixture(**changes)
    trainer, reference = make_trainer(student, lmbda=0.0), make_trainer(silent(student), lmbda=0.0)
    batch = batch_of(trainer, range(8))
    assert loss_and_gradients(trainer, batch)[0] == loss_and_gradients(reference, batch)[0]


def test_a_model_that_adds_nothing_to_its_own_loss_gets_nothing(make_trainer, batch_of):
    """DeepSeek-V3 balances by biases: it gives router logits, and no term."""
    settings = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    settings |= {"head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 0}
    settings |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    student = mixture("DeepseekV3", **settings)
    trainer, reference = make_trainer(student, lmbda=0.0), make_trainer(silent(student), lmbda=0.0)
    batch = batch_of(trainer, range(8))
    assert loss_and_gradients(trainer, batch)[0] == loss_and_gradients(reference, batch)[0]


def test_a_step_takes_the_mean_over_its_micro_batches(make_trainer, batch_of):
    """As TRL's SFTTrainer. transformers' Trainer adds them up, so that accumulation changes what is trained."""
    settings = {"lmbda": 0.0, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    settings |= {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "weight_decay": 0.0}
    student = mixture()
    trained = {}
    for name, model in (("with", copy.deepcopy(student)), ("without", silent(student))):
        trained[name] = make_trainer(model, **settings)
        trained[name].train()
    loader = iter(make_trainer(copy.deepcopy(student), **settings).get_train_dataloader())
    reference = copy.deepcopy(student).train()
    terms = [balance_of(reference, next(loader)) for _ in range(3)]
    mean = sum(terms) / 3
    (COEFFICIENT * mean).backward()
    assert max(terms) - min(terms) > 1e-3, "they must differ for this to mean anything"
    logs = {name: trainer.state.log_history[0] for name, trainer in trained.items()}
    assert logs["with"]["loss"] - logs["without"]["loss"] == pytest.approx(COEFFICIENT * mean.item(), rel=1e-4)
    assert logs["with"]["aux_loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert "aux_loss" not in logs["without"]
    weights = {name: trainer.model.state_dict() for name, trainer in trained.items()}
    for name, gradient in gradients(reference).items():
        moved = (weights["without"][name] - weights["with"][name]) / 0.1
        torch.testing.assert_close(moved, gradient, rtol=1e-2, atol=1e-4, msg=name)


def test_an_adapter_of_a_mixture_learns_to_balance(make_trainer, batch_of):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    student = mixture()
    trainers = [make_trainer(m, lmbda=0.0, peft_config=lora) for m in (copy.deepcopy(student), silent(student))]
    batch = batch_of(trainers[0], range(8))
    (loss, found), (plain, of_plain) = (loss_and_gradients(trainer, batch) for trainer in trainers)
    reference = copy.deepcopy(trainers[0].model).train()
    reference.zero_grad()
    balance = balance_of(reference, batch)
    (COEFFICIENT * balance).backward()
    assert loss - plain == pytest.approx(COEFFICIENT * balance.item(), rel=1e-4)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(found[name] - of_plain[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_the_teachers_balance_and_evaluation_have_no_part_in_it(make_trainer, make_student, batch_of, rows_for):
    teacher = mixture(seed=3)
    trainer = make_trainer(make_student(), copy.deepcopy(teacher), lmbda=0.0)
    reference = make_trainer(make_student(), silent(teacher), lmbda=0.0)
    batch = batch_of(trainer, range(8))
    assert loss_and_gradients(trainer, batch)[0] == loss_and_gradients(reference, batch)[0]
    student, rows = mixture(), rows_for("gkd")(6, seed=5)
    scores = [make_trainer(m, lmbda=0.0, eval_dataset=rows).evaluate() for m in (student, silent(student))]
    assert scores[0]["eval_loss"] == scores[1]["eval_loss"] and "eval_aux_loss" not in scores[0]


@pytest.mark.parametrize("method", ["minillm", "dpkd", "rationale"])
def test_every_method_adds_it(make_trainer, method):
    trainer = make_trainer(mixture(), method=method, max_steps=2)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2 and all(1.5 < row["aux_loss"] < 4 for row in logs), "2 of 4 experts, evenly used, give 2"


def test_activation_checkpointing_keeps_it(make_trainer, batch_of):
    student, found = mixture(), []
    for checkpointing in (False, True):
        trainer = make_trainer(copy.deepcopy(student), lmbda=0.0, activation_checkpointing=checkpointing, max_steps=2)
        trainer.train()
        found.append(trainer)
    logs = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in found]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    for name, value in found[0].model.state_dict().items():
        torch.testing.assert_close(found[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("engine", ["decode", "hf"])
def test_a_mixture_samples_what_it_would_without_the_term(make_trainer, batch_of, engine):
    """transformers computes the term at each token of one token and a mask of all, and fails."""
    student, sampled = mixture(), []
    for model in (student, silent(student)):
        trainer = make_trainer(model, copy.deepcopy(student), lmbda=1.0, rollout_engine=engine, temperature=0.0)
        batches, _ = trainer.get_batch_samples(iter([batch_of(trainer, range(4))]), 1, torch.device("cpu"))
        sampled.append(batches[0]["input_ids"])
    assert torch.equal(*sampled)
    assert student.config.output_router_logits is True


def test_the_launch_in_which_its_backward_pass_fails_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr("distill_trainers.models.zero_stage", lambda accelerator: 3)
    with pytest.raises(ConfigurationError, match="`output_router_logits: true`.*under ZeRO-3.*expected ZeRO-2"):
        make_trainer(mixture(), lmbda=0.0)
    make_trainer(silent(mixture()), lmbda=0.0)


def test_an_encoder_decoder_that_asks_for_it_is_refused(make_trainer):
    config = transformers.NllbMoeConfig(vocab_size=14, output_router_logits=True)
    student = transformers.NllbMoeForConditionalGeneration.__new__(transformers.NllbMoeForConditionalGeneration)
    torch.nn.Module.__init__(student)
    student.config = config
    with pytest.raises(ConfigurationError, match="`output_router_logits: true`.*nllb-moe"):
        make_trainer(student, method="rationale", objective="step_by_step")


def test_packed_rows_whose_padding_the_balance_would_count_are_refused(make_trainer):
    settings = {"lmbda": 0.0, "packing": True, "max_steps": 1}
    with pytest.raises(ConfigurationError, match="packing: true` with `output_router_logits: true"):
        make_trainer(mixture(), **settings)
    make_trainer(mixture(output_router_logits=False), **settings).train()
