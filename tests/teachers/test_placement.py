"""Where a teacher's weights are: what is refused before anything is loaded, and what each placement answers."""

from __future__ import annotations

import copy
import importlib.util
import logging

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

from distill_trainers import models
from distill_trainers.exceptions import CacheError, ConfigurationError
from distill_trainers.teachers import CachedTeacher, LocalTeacher
from distill_trainers.teachers.base import Pair
from distill_trainers.teachers.loading import refuse
from distill_trainers.teachers.placement import PLACEMENTS, is_collective
from distill_trainers.teachers.self_teacher import AdapterOff
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers import GKDConfig

RUN = {"lmbda": 0.0, "max_steps": 3}
KINDS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))


def _moved(student):
    """The adapter's weights away from where they start, so that it changes what the model says."""
    torch.manual_seed(5)
    for parameter in student.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return student


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"teacher_placement": "everywhere"}, "expected one of auto, replicate, zero3"),
        ({"teacher_adapter": "there"}, "`adapter_off`"),
        ({"teacher_placement": "cached"}, "distill-trainers cache-teacher"),
        ({"teacher_placement": "adapter_off", "teacher_cache": "there"}, "Leave one out"),
        ({"teacher_placement": "remote", "teacher_cache": "there"}, "Leave one out"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused_by_name(tmp_path, settings, expected):
    with pytest.raises(ConfigurationError, match=expected):
        GKDConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("placement", "package"),
    [("zero3", "deepspeed"), ("zero3_offload", "deepspeed"), ("quantized-4bit", "bitsandbytes")],
)
def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, placement, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=rf"{package} is not installed; `pip install .*\["):
        GKDConfig(output_dir=str(tmp_path), teacher_placement=placement)


@pytest.mark.parametrize(
    ("placement", "teacher", "settings", "expected"),
    [
        ("zero3", "http://127.0.0.1:8000", {}, "Set `remote`"),
        ("remote", "student", {}, "distill-trainers serve-teacher"),
        ("remote", None, {}, "expected the address of a server"),
        ("adapter_off", "student", {}, "expected no teacher"),
        ("adapter_off", None, {}, "has no adapter"),
        ("replicate", None, {}, "Got no teacher model"),
        ("replicate", "student", {"device_map": "auto"}, "`device_map` in `teacher_model_init_kwargs`"),
        ("zero3", "student", {"quantization_config": {}}, "`quantization_config` in `teacher_model_init_kwargs`"),
    ],
    ids=str,
)
def test_a_teacher_that_cannot_be_so_placed_is_refused_before_loading(
    tmp_path, saved, no_loading, placement, teacher, settings, expected
):
    args = GKDConfig(
        output_dir=str(tmp_path), use_cpu=True, teacher_placement=placement, teacher_model_init_kwargs=settings
    )
    teacher = getattr(saved, teacher, teacher) if teacher else None
    with pytest.raises(ConfigurationError, match=expected):
        refuse(Pair(saved.student, teacher), args, args.requirements())


def test_models_in_memory_and_teachers_that_are_placed_are_refused(make_trainer, make_teacher, make_student):
    assert make_trainer(teacher=LocalTeacher(make_teacher()), teacher_placement="zero3").teacher.placement == "zero3"
    with pytest.raises(ConfigurationError, match="by name"):
        make_trainer(teacher=make_teacher(), teacher_placement="device_map")
    student = make_student()
    with pytest.raises(ConfigurationError, match="placed already"):
        make_trainer(teacher=AdapterOff(lambda: student), teacher_placement="replicate")


def test_a_device_map_is_for_one_process_unless_it_names_devices(tmp_path, saved, monkeypatch):
    def args(**more):
        found = GKDConfig(output_dir=str(tmp_path), use_cpu=True, teacher_placement="device_map", **more)
        monkeypatch.setattr(type(found), "world_size", 2)
        return found

    with pytest.raises(ConfigurationError, match="2 processes"):
        refuse(Pair(saved.student, saved.teacher), args(), args().requirements())
    named = args(teacher_model_init_kwargs={"device_map": {"": "cpu"}})
    refuse(Pair(saved.student, saved.teacher), named, named.requirements())


def test_student_and_teacher_cannot_decode_together_from_one_body(make_trainer):
    settings = {"teacher_placement": "adapter_off", "peft_config": KINDS["lora"], "method": "minillm"}
    with pytest.raises(ConfigurationError, match="teacher_mix_alpha: 0"):
        make_trainer(teacher=None, **settings)
    make_trainer(teacher=None, **settings, teacher_mix_alpha=0.0).train()


def test_a_partitioned_teacher_is_not_taken_for_a_whole_one(make_trainer, make_teacher):
    teacher = make_teacher()
    next(teacher.parameters()).ds_id = 0
    with pytest.raises(ConfigurationError, match="partitioned already"):
        models.prepare_frozen(teacher, make_trainer().accelerator, "replicate")


def test_offloading_needs_a_launcher(make_trainer, saved):
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigurationError, match="--num_processes 1"):
        make_trainer(teacher=saved.teacher, teacher_placement="zero3_offload")


def test_which_placements_answer_only_together():
    together = {name for name in PLACEMENTS if is_collective(name, None, None)}
    assert together == {"zero3", "zero3_offload", "fsdp2"}
    assert is_collective("auto", 3, None) and is_collective("auto", None, 2) and not is_collective("replicate", 3, None)


# ---- One process ----------------------------------------------------------------------------------------------------


def test_a_placement_does_not_change_the_loss(make_trainer, saved, by_step, caplog):
    losses = {}
    for placement in ("auto", "replicate", "zero3", "fsdp2", "device_map"):
        caplog.clear()
        trainer = make_trainer(teacher=saved.teacher, teacher_placement=placement, **RUN)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        losses[placement] = by_step(trainer)
        assert losses[placement] == losses["auto"], placement
        alone = "nobody to share" in caplog.text or any("nobody to share" in r.message for r in caplog.records)
        assert alone == (placement in ("zero3", "fsdp2")), placement


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("dora", "vera"))) for kind in KINDS]
)
def test_the_base_teaches_without_a_copy(make_trainer, make_student, by_step, kind):
    """The same losses and gradients as from a copy of the base, made before it got its adapter."""
    runs = []
    for placement in ("auto", "adapter_off"):
        base = make_student(tie_word_embeddings=False)
        teacher = copy.deepcopy(base) if placement == "auto" else None
        torch.manual_seed(3)  # the adapter's first weights are drawn from torch's own numbers
        student = _moved(get_peft_model(base, KINDS[kind]))
        flags = {name: p.requires_grad for name, p in student.named_parameters()}
        trainer = make_trainer(student, teacher, teacher_placement=placement, **RUN)
        trainer.train()
        assert flags == {name: p.requires_grad for name, p in student.named_parameters()}
        assert trainer.model.training
        runs.append((by_step(trainer), by_step(trainer, "grad_norm")))
    assert all(loss > 1e-4 for loss in runs[0][0].values())
    for copied, shared in zip(*runs, strict=True):
        assert shared == pytest.approx(copied, rel=1e-6)


def test_another_adapter_teaches(make_trainer, make_student, by_step, tmp_path):
    """By folder and by name, as from a merged copy; it is neither trained nor taken for the student's."""
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    other = _moved(get_peft_model(make_student(), LoraConfig(**lora)))
    other.save_pretrained(tmp_path / "other")
    merged = copy.deepcopy(other).merge_and_unload()
    expected = make_trainer(teacher=merged, peft_config=LoraConfig(**lora), **RUN)
    settings = {"teacher": None, "teacher_placement": "adapter_off", **RUN}
    by_folder = make_trainer(peft_config=LoraConfig(**lora), teacher_adapter=str(tmp_path / "other"), **settings)
    kept = {n: p.clone() for n, p in by_folder.model.named_parameters() if ".teacher." in n}
    assert kept and not any(p.requires_grad for n, p in by_folder.model.named_parameters() if ".teacher." in n)
    for trainer in (expected, by_folder):
        trainer.train()
    assert by_step(by_folder) == pytest.approx(by_step(expected), rel=1e-5)
    assert all(loss > 1e-4 for loss in by_step(expected).values())
    assert all(torch.equal(p, kept[n]) for n, p in by_folder.model.named_parameters() if n in kept)
    assert by_folder.model.active_adapter == "default"

    named = get_peft_model(make_student(), LoraConfig(**lora))
    named.load_adapter(str(tmp_path / "other"), adapter_name="better")
    trainer = make_trainer(named, teacher_adapter="better", **settings)
    assert (
        trainer.teacher.fingerprint() != make_trainer(peft_config=LoraConfig(**lora), **settings).teacher.fingerprint()
    )
    with pytest.raises(ConfigurationError, match="the adapter that trains"):
        make_trainer(named, teacher_adapter="default", **settings)
    with pytest.raises(ConfigurationError, match="a folder or Hub id of an adapter on the same base"):
        make_trainer(peft_config=LoraConfig(**lora), teacher_adapter=str(tmp_path / "missing"), **settings)


def test_the_base_writes_what_it_teaches(make_trainer, make_student, tmp_path):
    """Completions of the teacher are those of the base, not of the student that the adapter has made of it."""
    base = make_student()
    rows = addition_dataset(6).remove_columns("completion")
    found = []
    for placement in ("auto", "adapter_off"):
        teacher = copy.deepcopy(base) if placement == "auto" else None
        student = _moved(get_peft_model(copy.deepcopy(base), KINDS["lora"]))
        settings = {"seq_kd": True, "temperature": 0.0, "output_dir": str(tmp_path / placement)}
        trainer = make_trainer(student, teacher, rows, teacher_placement=placement, **{**RUN, **settings})
        found.append([row["input_ids"] for row in trainer.get_train_dataloader().dataset])
    assert found[0] == found[1]


def test_a_cache_teaches_alone_once_it_is_full(make_trainer, make_teacher, by_step, tmp_path, no_loading, saved):
    run = {"lmbda": 0.0, "max_steps": 6}  # all rows once
    folder = str(tmp_path / "cache")
    make_trainer(teacher=make_teacher(), teacher_cache=folder, **run)  # nothing is in it yet
    settings = {"teacher": None, "teacher_cache": folder, "teacher_placement": "cached"}
    with pytest.raises(ConfigurationError, match="different rows in the training rows are not in the teacher cache"):
        make_trainer(saved.student, **settings, **run)
    filled = make_trainer(teacher=make_teacher(), teacher_cache=folder, **run)
    filled.train()
    alone = make_trainer(**settings, **run)
    assert isinstance(alone.teacher, CachedTeacher) and not alone.teacher.can_load
    alone.train()
    assert by_step(alone) == pytest.approx(by_step(filled), rel=1e-6)
    for more in ({"lmbda": 0.5}, {"seq_kd": True, "lmbda": 0.0}):
        with pytest.raises(ConfigurationError, match="a teacher cache alone cannot"):
            make_trainer(**settings, **more)
    with pytest.raises((ConfigurationError, CacheError), match="no teacher cache"):
        make_trainer(**{**settings, "teacher_cache": str(tmp_path / "none")}, **run)


def test_a_quantized_teacher_has_a_cache_of_its_own(make_trainer, saved, tmp_path, monkeypatch):
    """It answers otherwise than the whole one."""
    find = importlib.util.find_spec
    pretend = lambda name, package=None: object() if name == "bitsandbytes" else find(name, package)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", pretend)
    folder = str(tmp_path / "cache")
    make_trainer(teacher=saved.teacher, teacher_cache=folder, **RUN).train()
    with pytest.raises(ConfigurationError, match="quantized-8bit"):
        make_trainer(teacher=saved.teacher, teacher_cache=folder, teacher_placement="quantized-8bit", **RUN)
