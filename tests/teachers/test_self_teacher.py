"""The student as its own teacher: what each kind is, that it costs what it says, and that it goes on after a crash."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from distill_trainers import models
from distill_trainers.exceptions import CheckpointError, ConfigurationError
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers import GKDConfig

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OFF_POLICY = {"lmbda": 0.0, "divergence": "forward_kl"}
MOVED = {**OFF_POLICY, "lm_loss_weight": 1.0}  # a self-teacher that sees what the student sees moves nothing by itself
EMA = {"self_teacher": "ema", "self_teacher_decay": 0.8}
KINDS = {"initial": {"self_teacher": "initial"}, "ema": EMA, "live": {"self_teacher": "live"}}
REUSED = {"method": "minillm", "teacher_mix_alpha": 0.0}
STUDENTS = ("full", "lora", "trained-lora", "ia3")
SOME_STUDENTS = ["full", "lora", *(pytest.param(student, marks=pytest.mark.slow) for student in STUDENTS[2:])]


@pytest.fixture
def student_of(make_student):
    """`student_of("lora")`: a student without an adapter, with a new one, or with one that was trained before."""

    def make(kind="full", **config):
        torch.manual_seed(3)
        student = make_student(**config)
        if kind == "full":
            return student
        adapter = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        student = get_peft_model(student, adapter if kind == "ia3" else LoraConfig(**LORA))
        if kind == "trained-lora":
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(0.2 * torch.randn_like(parameter))
        return student

    return make


class Recorder(TrainerCallback):
    """Keeps the trained weights in float64, as training begins and after each step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.on_train_begin(args, state, control, model)


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"self_teacher": "yesterday"}, "expected one of initial, ema, live"),
        ({"self_teacher_decay": 0.9}, "expected `self_teacher: ema` beside it"),
        ({"self_teacher": "live", "self_teacher_decay": 0.9}, "expected `self_teacher: ema` beside it"),
        ({"self_teacher": "ema", "self_teacher_decay": 1.0}, r"expected a number in \(0, 1\)"),
        ({"self_teacher": "ema", "self_teacher_decay": 0.0}, r"expected a number in \(0, 1\)"),
        ({"self_teacher": "ema", "teacher_placement": "live"}, "expected `self_teacher: live`, or one of them alone"),
        ({"self_teacher": "ema", "teacher_cache": "there"}, "it left out with `self_teacher: ema`"),
        ({"self_teacher": True, "teacher_adapter": "there"}, "it left out with `self_teacher: initial`"),
        ({"self_teacher": 3}, "expected text or null or true or false"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_together_are_refused_by_name(tmp_path, settings, expected):
    with pytest.raises(ConfigurationError, match=expected):
        GKDConfig(output_dir=str(tmp_path), **settings)


def test_the_same_kind_by_each_of_its_names(tmp_path):
    for given in ({"self_teacher": True}, {"self_teacher": "true"}, {"teacher_placement": "initial"}):
        args = GKDConfig(output_dir=str(tmp_path), **given)
        assert (args.self_teacher, args.teacher_placement) == ("initial", "auto")
    assert GKDConfig(output_dir=str(tmp_path), self_teacher=False).self_teacher is None
    assert GKDConfig(output_dir=str(tmp_path), self_teacher="ema").self_teacher_decay == 0.99


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("full", {"self_teacher": "ema", "teacher": "default"}, "expected no teacher, since the student is its own"),
        ("full", {"self_teacher": "live", "teacher": "http://127.0.0.1:1"}, "expected no teacher"),
        ("full", {"self_teacher": "ema", "teacher_placement": "zero3"}, "expected auto: its weights are the student's"),
        ("lora", {"self_teacher": "initial", "teacher_placement": "replicate"}, "expected auto or adapter_off"),
        ("full", {"self_teacher": "initial", "teacher_placement": "adapter_off"}, "expected a place for a copy of it"),
        ("full", {"self_teacher": "initial", "teacher_placement": "device_map"}, "Pass the student by name"),
        ("lora", {"self_teacher": "initial", "teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "nothing is loaded"),
        ("full", {"self_teacher": "initial", "model_init_kwargs": {"quantization_config": {}}}, "quantised student"),
        ("full", {"self_teacher": "ema", "seq_kd": True}, "the teacher moves with the student"),
        ("full", {"self_teacher": "live", "method": "minillm"}, "teacher_mix_alpha: 0"),
        ("lora", {"self_teacher": "initial", "method": "minillm"}, "teacher_mix_alpha: 0"),
        ("full", {"self_teacher": "live", **REUSED, "num_inner_epochs": 2}, "`num_inner_epochs: 1`"),
        ("lora", {"self_teacher": "ema", **REUSED, "num_minibatches": 2}, "`self_teacher: initial`"),
        ("full", {"self_teacher": "ema", "method": "dpkd"}, "the teacher moves with the student"),
        ("lora", {"self_teacher": "initial", "method": "dpkd", "reference_logps_dir": "there"}, "reference_logps_dir"),
        ("full", {"self_teacher": "live", "eval_measures": ["exposure_bias"], "eval": True}, "Leave out exposure_bias"),
    ],
    ids=str,
)
def test_what_a_self_teacher_cannot_be_is_refused_before_anything_is_loaded(
    make_trainer, student_of, saved, monkeypatch, kind, settings, expected
):
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    settings = {"teacher": None, **settings}
    if settings.pop("eval", False):
        settings["eval_dataset"] = addition_dataset(4)
    student = saved.student if "model_init_kwargs" in settings else student_of(kind)
    with pytest.raises(ConfigurationError, match=expected):
        make_trainer(student, train=addition_dataset(8).remove_columns("completion"), **settings)


# ---- What it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "divergence"), [*zip(KINDS, ["forward_kl", "reverse_kl", "jsd"], strict=True)])
@pytest.mark.parametrize("student", STUDENTS)
def test_nothing_is_to_be_learnt_before_the_student_has_moved(
    make_trainer, student_of, batch_of, student, kind, divergence
):
    """φ = θ and one view of both: the loss and every gradient are 0, to the bit."""
    settings = {**OFF_POLICY, "divergence": divergence, **KINDS[kind]}
    trainer = make_trainer(student_of(student), None, **settings)
    trainer.teacher.begin()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(4)))
    loss.backward()
    assert loss.item() == 0
    assert trainer.model.training
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("student", SOME_STUDENTS)
def test_at_its_limits_an_average_is_the_initial_student_and_the_live_one(make_trainer, student_of, by_step, student):
    def divergences(**kind):
        trainer = make_trainer(student_of(student), None, **MOVED, **kind)
        trainer.train()
        return by_step(trainer, "divergence")

    live, initial = divergences(self_teacher="live"), divergences(self_teacher="initial")
    assert not any(live.values()) and initial[1] == 0 and all(initial[step] > 0 for step in (2, 3))
    assert divergences(self_teacher="ema", self_teacher_decay=1e-12) == live
    still = divergences(self_teacher="ema", self_teacher_decay=1 - 1e-12)
    assert still == pytest.approx(initial, rel=1e-4, abs=1e-9)
    between = divergences(self_teacher="ema", self_teacher_decay=0.5)
    assert 0 < between[3] < initial[3]


@pytest.mark.parametrize("student", ["full", "lora", "bfloat16"])
def test_the_average_is_that_of_its_formula(make_trainer, student_of, student):
    """θ̄ₙ = Σₖ a(1−a)ⁿ⁻ᵏ θₖ + (1−a)ⁿ θ₀ in float64, of each factor of an adapter; not as the student rounds."""
    narrow, decay, steps = student == "bfloat16", 0.8, 20
    recorder = Recorder()
    model = student_of("lora" if student == "lora" else "full")
    trainer = make_trainer(
        model.to(torch.bfloat16) if narrow else model,
        None,
        **{**MOVED, **EMA, "max_steps": steps, "learning_rate": 1e-3},
        callbacks=[recorder],
    )
    trainer.train()
    weights, average = recorder.weights, trainer.teacher.state()
    assert len(weights) == steps + 1 and average.keys() == weights[0].keys()
    rounded = 0
    for name, found in average.items():
        expected = decay**steps * weights[0][name]
        for k in range(1, steps + 1):
            expected = expected + (1 - decay) * decay ** (steps - k) * weights[k][name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
        rounded += int((found != found.to(torch.bfloat16)).sum())
    assert rounded > 100, "nothing was between two numbers of bfloat16"
    moved = sum((average[name] - weights[0][name]).norm().item() for name in average)
    assert moved > 1e-2


@pytest.mark.parametrize(
    ("student", "tied"), [("full", True), ("full", False), ("lora", True), ("head", True), ("head", False)]
)
def test_it_answers_with_the_average_and_its_head(make_trainer, student_of, make_student, student, tied):
    """As a teacher of its own does that was given the averaged weights; the student is what it was, to the bit."""
    settings = {**MOVED, **EMA, "learning_rate": 2e-2, "eval_dataset": addition_dataset(5, seed=4), "max_steps": 2}
    model = student_of("full" if student == "head" else student, tie_word_embeddings=tied)
    if student == "head":
        lora = {"r": 4, "target_modules": ["q_proj"]}
        lora |= {"target_modules": ["q_proj", "lm_head"]} if tied else {"modules_to_save": ["lm_head"]}
        model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    trainer = make_trainer(model, None, **settings)
    trainer.train()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    scores = trainer.evaluate()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    twin = copy.deepcopy(trainer.model)
    for name, parameter in twin.named_parameters():
        if name in trainer.teacher.state():
            parameter.data.copy_(trainer.teacher.state()[name])
    other = make_trainer(trainer.model, twin, **{k: v for k, v in settings.items() if k not in EMA})
    expected = other.evaluate()
    assert expected["eval_kl"] > 1e-5
    for name in ("eval_kl", "eval_teacher_perplexity", "eval_divergence"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("student", ["full", "trained-lora", pytest.param("ia3", marks=pytest.mark.slow)])
def test_the_initial_student_is_a_copy_of_the_one_that_was_given(make_trainer, student_of, by_step, student):
    runs = []
    for copied in (True, False):
        model = student_of(student)
        kind = {} if copied else KINDS["initial"]
        trainer = make_trainer(model, copy.deepcopy(model) if copied else None, **MOVED, **kind)
        trainer.train()
        runs.append((by_step(trainer), by_step(trainer, "grad_norm")))
    for of_copy, of_self in zip(*runs, strict=True):
        assert of_self == pytest.approx(of_copy, rel=1e-5)


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_a_second_train_goes_on_with_the_student_that_the_first_began_with(make_trainer, student_of, kind):
    """As the copy of a student without an adapter does."""
    trainer = make_trainer(student_of("trained-lora"), None, **MOVED, **KINDS[kind], learning_rate=1e-2)
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    kept = trainer.teacher.state() if kind == "ema" else first
    assert any(not torch.equal(p, kept[name]) for name, p in trainer.model.named_parameters() if name in kept)
    trainer.teacher.begin()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trainer.teacher.state().items())


def test_a_student_made_anew_is_its_own_teacher_by_the_weights_that_it_begins_with(make_trainer, student_of):
    made = [student_of("trained-lora") for _ in range(2)]
    for parameter in made[1].parameters():
        parameter.data.add_(0.1)
    begun = {name: p.detach().clone() for name, p in made[1].named_parameters() if p.requires_grad}
    left = iter(made)
    trainer = make_trainer(None, None, model_init=lambda: next(left), **MOVED, **KINDS["initial"])
    trainer.train()
    assert trainer.model is made[1] and trainer.teacher.state().keys() == begun.keys()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in trainer.teacher.state().items())
    with pytest.raises(ConfigurationError, match=r"makes a student anew for each .*`peft_config`"):
        make_trainer(None, None, model_init=lambda: student_of("full"), **MOVED, **KINDS["initial"])


def test_a_base_whose_biases_train_is_not_taken_for_the_initial_student(make_trainer, make_student):
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, bias="all")
    with pytest.raises(ConfigurationError, match=r"trains \d+ weights of the base too .*bias.*`self_teacher: initial`"):
        student = make_student(attention_bias=True)
        make_trainer(student, None, peft_config=lora, **MOVED, teacher_placement="adapter_off")
    trainer = make_trainer(make_student(attention_bias=True), None, peft_config=lora, **MOVED, **KINDS["initial"])
    trainer.train()
    kept = trainer.teacher.state()
    assert any(name.endswith("bias") for name in kept)
    trained = {name: p for name, p in trainer.model.named_parameters() if name in kept}
    assert any(not torch.equal(p, kept[name]) for name, p in trained.items() if name.endswith("bias"))


def test_a_copy_is_loaded_by_name_in_another_dtype_and_place(make_trainer, saved, tmp_path):
    more = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}, "teacher_placement": "replicate"}
    for student in (saved.student, None):
        more = more if student else {"teacher_model_init_kwargs": {"dtype": torch.bfloat16}}
        trainer = make_trainer(student, None, **OFF_POLICY, **KINDS["initial"], **{**more, "output_dir": str(tmp_path)})
        assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        trainer.train()


def test_a_live_teacher_draws_nothing_and_knows_no_dropout(make_trainer, make_student, batch_of, by_step):
    settings = {**OFF_POLICY, **KINDS["live"], "disable_dropout": False}
    trainer = make_trainer(make_student(attention_dropout=0.3), None, **settings)
    batch = batch_of(trainer, range(4))
    trainer.model.train()
    trainer.model.model.layers[0].eval()  # each module has its mode again: DeepSpeed's engine has one of its own
    modes = [module.training for module in trainer.model.modules()]
    before = torch.get_rng_state()
    first, second = (trainer.two_models.signal(batch, batch["labels"][:, 1:] != -100) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(first.hidden, second.hidden) and not first.hidden.requires_grad
    trainer.train()
    assert all(loss > 1e-6 for loss in by_step(trainer).values())


# ---- What it costs, and what is left of it --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["initial", "ema", "live"])
def test_an_adapters_teacher_shares_the_base_and_costs_the_adapter_at_most(make_trainer, student_of, kind):
    trainer = make_trainer(student_of("lora"), None, **MOVED, **KINDS[kind])
    base = {name: p.data_ptr() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    teacher = trainer.teacher
    assert models.unwrapped(teacher.model) is trainer.model
    with teacher.answering():
        assert {n: p.data_ptr() for n, p in teacher.model.named_parameters() if n in base} == base
    kept = sum(tensor.nbytes for tensor in teacher.state().values())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert kept == (4 * trained if kind == "ema" else 0)


def test_the_saved_student_holds_nothing_of_its_teacher(make_trainer, student_of, tmp_path):
    names = []
    for kind in (EMA, {}):
        out = tmp_path / str(len(names))
        model = student_of("lora")
        settings = {**MOVED, **kind, "output_dir": str(out), "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(model, None if kind else student_of("full"), **settings)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        names.append(set(load_file(out / "adapter_model.safetensors")))
        assert not list(out.glob("teacher*"))
        assert (out / "checkpoint-3" / "teacher_state.safetensors").exists() == bool(kind)
        listed = json.loads((out / "checkpoint-3" / "manifest.json").read_text())["files"]
        assert ("teacher_state.safetensors" in listed) == bool(kind)
    assert names[0] == names[1]
    assert "self_teacher: ema" in (tmp_path / "0" / "README.md").read_text()
    assert "teacher_model_name_or_path" not in (tmp_path / "0" / "README.md").read_text()


RESUMED = [("lora", "ema"), ("trained-lora", "initial")]
RESUMED_SLOWLY = [("full", "initial"), ("full", "ema"), ("full", "live"), ("lora", "initial"), ("lora", "live")]


@pytest.mark.parametrize(
    ("student", "kind"), [*RESUMED, *(pytest.param(*case, marks=pytest.mark.slow) for case in RESUMED_SLOWLY)]
)
def test_a_killed_run_goes_on_exactly(make_trainer, student_of, by_step, die_at, tmp_path, student, kind):
    """Half on-policy, with dropout, so that every draw counts; saved in the middle, killed a step later."""
    settings = {**MOVED, **KINDS[kind], "lmbda": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings |= {"disable_dropout": False, "eval_dataset": addition_dataset(6, seed=4), "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "verify_saved": False}

    def run(folder, resume=None, **more):
        trainer = make_trainer(
            student_of(student, attention_dropout=0.1), None, output_dir=str(tmp_path / folder), **settings, **more
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    with pytest.raises(die_at.error):
        run("broken", callbacks=[die_at(3)])
    resumed = run("broken", resume=True)
    for name in ("loss", "divergence", "grad_norm", "entropy", "eval_kl", "eval_loss"):
        assert by_step(resumed, name) == by_step(whole, name), name
    assert any(by_step(whole, "divergence").values())
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(right[name], left[name]) for name in left)
    kept, again = whole.teacher.state(), resumed.teacher.state()
    assert kept.keys() == again.keys() and all(torch.equal(again[name], kept[name]) for name in kept)


def test_what_was_kept_of_another_student_is_refused_and_of_none_is_told(make_trainer, student_of, tmp_path, caplog):
    settings = {**MOVED, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, "verify_saved": False}
    trainer = make_trainer(student_of("lora"), None, **settings, **EMA)
    trainer.train()
    kept = tmp_path / "out" / "checkpoint-2" / "teacher_state.safetensors"
    trainer.teacher.load_state({name: tensor[:1] for name, tensor in load_file(kept).items()})
    with pytest.raises(CheckpointError, match="another shape, or missing"):
        trainer.teacher.begin()
    with pytest.raises(CheckpointError, match="self_teacher_decay: 0.8, now 0.9"):
        make_trainer(student_of("lora"), None, **settings, **{**EMA, "self_teacher_decay": 0.9}).train(True)
    make_trainer(student_of("lora"), student_of("full"), **{**settings, "output_dir": str(tmp_path / "b")}).train()
    later = {**settings, "output_dir": str(tmp_path / "b"), "resume_anyway": True, "max_steps": 3}
    with caplog.at_level(logging.WARNING):
        make_trainer(student_of("lora"), None, **later, **EMA).train(True)
    assert "holds nothing of an average of the student" in caplog.text


# ---- With everything else -------------------------------------------------------------------------------------------


METHODS = {
    "gkd off-policy": {"lmbda": 0.0},
    "gkd on-policy": {"lmbda": 1.0},
    "minillm": {"method": "minillm", "teacher_mix_alpha": 0.0},
    "minillm token": {"method": "minillm", "objective": "token", "lmbda": 1.0},
    "dpkd": {"method": "dpkd", "chosen": "dataset"},
    "dpkd contrastive": {"method": "dpkd", "chosen": "dataset", "loss_type": "contrastive_skew"},
    "dpkd reference": {"method": "dpkd", "chosen": "dataset", "reference": "student"},
}


@pytest.mark.parametrize("kind", ["ema", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("initial", "live"))])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("gkd off-policy", "dpkd contrastive"))) for n in METHODS]
)
def test_every_method_learns_from_its_own_student(make_trainer, student_of, by_step, name, kind):
    trainer = make_trainer(student_of("lora"), None, **METHODS[name], **KINDS[kind], temperature=1.0)
    trainer.train()
    assert len(by_step(trainer)) == 3
    if METHODS[name].get("lmbda") == 1.0:
        assert all(0 < entropy < 3 for entropy in by_step(trainer, "entropy").values())
        assert len(by_step(trainer, "completion_length")) == 3


def test_a_copy_decodes_with_the_student_it_was(make_trainer, student_of):
    make_trainer(student_of("full"), None, method="minillm", teacher_mix_alpha=0.2, **KINDS["initial"]).train()


def test_the_entropy_is_that_of_the_student(make_trainer, student_of, by_step, dense):
    trainer = make_trainer(student_of("full"), None, **OFF_POLICY, **KINDS["live"], max_steps=1, learning_rate=0.0)
    found = dense(trainer.model, trainer.model, [trainer.train_dataset[i] for i in range(24)])
    entropies = torch.special.entr(found.q.exp()).sum(-1)
    assert entropies.max() - entropies.min() > 1e-4
    trainer = make_trainer(
        student_of("full"), None, **OFF_POLICY, **KINDS["live"], max_steps=1, per_device_train_batch_size=24
    )
    trainer.train()
    assert by_step(trainer, "entropy")[1] == pytest.approx(entropies.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=lambda more: next(iter(more)),
)
def test_it_goes_with(make_trainer, student_of, by_step, more):
    runs = []
    for settings in ({}, more):
        trainer = make_trainer(student_of("lora"), None, **{**MOVED, **EMA, "max_steps": 3, **settings})
        trainer.train()
        runs.append(by_step(trainer, "divergence"))
    assert runs[0][3] > 1e-6 and runs[1] == pytest.approx(runs[0], rel=1e-3, abs=1e-9)


def test_what_is_risky_is_told(make_trainer, make_tokenizer, student_of, tokenizer, caplog):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}"
    with caplog.at_level(logging.WARNING):
        make_trainer(student_of("lora"), None, tok=thinking, **MOVED, **KINDS["initial"])
        assert "a chat template that has `enable_thinking`" in caplog.text and "stays 0" not in caplog.text
        caplog.clear()
        make_trainer(student_of("lora"), None, **OFF_POLICY, **KINDS["live"])
        assert "the loss of distillation stays 0" in caplog.text and "chat template" not in caplog.text
        caplog.clear()
        make_trainer(student_of("lora"), None, **OFF_POLICY, **KINDS["live"], disable_dropout=False)
        assert "the loss of distillation stays 0" in caplog.text, "a student without dropout has none to keep"
        caplog.clear()
        drops = student_of("lora")
        drops.base_model.model.model.layers[0].self_attn.attention_dropout = 0.1
        make_trainer(drops, None, **OFF_POLICY, **KINDS["live"], disable_dropout=False)
        assert not caplog.text


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_training_that_would_stand_still_is_told_before_anything_is_loaded(
    make_trainer, student_of, monkeypatch, caplog, kind
):
    settings = {**OFF_POLICY, **KINDS[kind]}
    with caplog.at_level(logging.WARNING):
        make_trainer(student_of("lora"), None, **settings, lm_loss_weight=0.5)  # it holds the student near its start
        views = {**settings, "train": settings.get("train", addition_dataset(8)), "teacher_prompt": "1+{prompt}"}
        make_trainer(student_of("lora"), None, **views)
        assert "stands still" not in caplog.text
        monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *args: pytest.fail("loaded"))
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            make_trainer(student_of("lora"), None, **settings)
        assert "stays 0 and training stands still" in caplog.text
