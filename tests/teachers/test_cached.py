"""Training from a teacher cache: equal to the live teacher, without its body, and refused wherever it could lie."""

import copy
import gc
import shutil
import weakref

import pytest
import torch
from transformers import TrainerCallback

from distill_trainers import models
from distill_trainers.exceptions import CacheError, ConfigurationError
from distill_trainers.losses.reduction import trained_mask
from distill_trainers.signals import HiddenStates
from distill_trainers.teachers import CachedTeacher, LocalTeacher
from distill_trainers.teachers.cache import teacher as cached
from distill_trainers.toy import addition_dataset

RUN = {"lmbda": 0.0, "divergence": "forward_kl", "max_steps": -1, "num_train_epochs": 2}
RUN |= {"per_device_train_batch_size": 8}
FILLED = {"num_train_epochs": 1}  # a run that is there to fill the cache
BEGUN = {"max_steps": 1}  # the cache is there, with some of the rows


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def make(make_trainer, folder):
    """`make(**settings)`: an off-policy trainer with the cache, two epochs of 24 rows, three steps each."""

    def build(**settings):
        settings = {**RUN, "teacher_cache": str(folder), **settings}
        return make_trainer(**settings)

    return build


@pytest.fixture
def loads(monkeypatch):
    """Names of the teachers that were loaded; the list grows as they are."""
    names = []
    load = LocalTeacher.loaded

    def counted(pair, args, student=None):
        names.append(pair.teacher if isinstance(pair.teacher, str) else "a model")
        return load(pair, args, student)

    monkeypatch.setattr(LocalTeacher, "loaded", counted)
    return names


def shards(folder):
    return sorted(folder.glob("shard-*"))


def assert_same_losses(found, expected, by_step, rel=1e-4):
    ours, theirs = by_step(found), by_step(expected)
    assert len(ours) == len(theirs) > 3 and ours == pytest.approx(theirs, rel=rel)


# ---- Equal to the live teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["by name", "in memory"])
def test_the_first_epochs_and_later_runs_equal_the_live_teacher(
    make, make_trainer, saved, make_teacher, by_step, loads, name
):
    """Two shuffled epochs fill and read the cache; a second run, with other batches and order, only reads it."""
    teacher = saved.teacher if name == "by name" else make_teacher()
    live = make_trainer(teacher=teacher, **RUN)
    live.train()
    filling = make(teacher=teacher)
    filling.train()
    assert_same_losses(filling, live, by_step)
    loads.clear()
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "seed": 7}
    other = make_trainer(teacher=teacher, **{**RUN, **changed})
    other.train()
    loads.clear()
    reading = make(teacher=teacher, **changed)
    reading.train()
    assert_same_losses(reading, other, by_step)
    assert loads == [] and not reading.teacher.is_live


def test_the_first_epoch_is_bitwise_the_live_one(make, make_trainer, by_step):
    live, filling = make_trainer(**{**RUN, "num_train_epochs": 1}), make(num_train_epochs=1)
    live.train()
    filling.train()
    assert by_step(filling) == by_step(live) and by_step(filling, "grad_norm") == by_step(live, "grad_norm")


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
def test_top_k_of_the_whole_vocabulary_equals_the_live_teacher(make, make_trainer, by_step, divergence):
    settings = {**RUN, "divergence": divergence}
    live = make_trainer(**settings)
    live.train()
    whole = make(divergence=divergence, teacher_cache_kind="topk", teacher_cache_top_k=10_000)
    whole.train()
    assert_same_losses(whole, live, by_step)


K4 = {"teacher_cache_kind": "topk", "teacher_cache_top_k": 4}


def test_fewer_ids_give_a_lower_bound_that_rises_with_k(make, tmp_path):
    values, taken = [], []
    for k in (1, 2, 4, 14):
        trainer = make(
            eval_dataset=addition_dataset(12, seed=9),
            teacher_cache=str(tmp_path / f"k{k}"),
            teacher_cache_kind="topk",
            teacher_cache_top_k=k,
        )
        scores = trainer.evaluate()
        assert scores["eval_loss"] == pytest.approx(scores["eval_kl"], rel=1e-5)
        values.append(scores["eval_kl"])
        taken.append(scores["eval_acceptance"])
    assert 0 < values[0] < values[1] < values[2] < values[3]
    assert 1 > taken[0] > taken[1] > taken[2] > taken[3] > 0  # and an upper bound of what is accepted
    softer = make(eval_dataset=addition_dataset(12, seed=9), teacher_cache=str(tmp_path / "k4"), temperature=0.5, **K4)
    assert "eval_acceptance" not in softer.evaluate()  # what a top k cannot tell


def test_draws_estimate_the_divergence(make, make_trainer, tmp_path):
    rows = addition_dataset(12, seed=9)
    exact = make_trainer(eval_dataset=rows, **RUN).evaluate()
    found = make(eval_dataset=rows, teacher_cache_kind="sampled", teacher_cache_draws=20_000).evaluate()
    assert found["eval_kl"] == pytest.approx(exact["eval_kl"], rel=0.03)
    assert found["eval_acceptance"] == pytest.approx(exact["eval_acceptance"], rel=0.01)
    assert found["eval_perplexity"] == pytest.approx(exact["eval_perplexity"], rel=1e-4)
    assert found["eval_top1_agreement"] == pytest.approx(exact["eval_top1_agreement"], abs=1e-6)


def test_draws_of_a_row_do_not_depend_on_its_batch(make, batch_of, tmp_path):
    signals = []
    for name, order in (("one", range(6)), ("two", [4, 5]), ("three", [5, 0, 4])):
        trainer = make(teacher_cache=str(tmp_path / name), teacher_cache_kind="sampled", teacher_cache_draws=9)
        batch = batch_of(trainer, order)
        trainer.teacher.signal(batch, trained_mask(batch["labels"]), None)
        alone = batch_of(trainer, [4])
        signals.append(trainer.teacher.signal(alone, trained_mask(alone["labels"]), None))
    for other in signals[1:]:
        assert torch.equal(other.ids, signals[0].ids) and torch.equal(other.weights, signals[0].weights)
    assert torch.allclose(signals[0].weights.sum(-1), torch.ones(len(signals[0])))


@pytest.mark.parametrize("kind, dtype, tolerance", [("hidden", "bfloat16", 2e-2), ("topk", "float16", 2e-3)])
def test_narrower_numbers_stay_near(make, make_trainer, kind, dtype, tolerance):
    rows = addition_dataset(12, seed=9)
    exact = make_trainer(eval_dataset=rows, **RUN).evaluate()["eval_kl"]
    trainer = make(eval_dataset=rows, teacher_cache_kind=kind, teacher_cache_dtype=dtype, teacher_cache_top_k=10_000)
    found = trainer.evaluate()["eval_kl"]
    assert found != exact and found == pytest.approx(exact, rel=tolerance)


def test_left_padding_finds_the_same_rows(make, batch_of):
    trainer = make()
    batch = batch_of(trainer, range(4))
    teacher, right = trainer.teacher, trained_mask(batch["labels"])
    first = teacher.signal(batch, right, None)
    shift = 3
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    left = {name: torch.nn.functional.pad(batch[name], (shift, 0), value=value) for name, value in pad.items()}
    assert cached.batch_keys(left, trained_mask(left["labels"])) == cached.batch_keys(batch, right)
    again = teacher.signal(left, trained_mask(left["labels"]), None)
    assert torch.equal(first.hidden, again.hidden)


def test_repeated_and_untrained_rows(make, batch_of):
    trainer = make()
    batch = batch_of(trainer, [0, 1, 0, 2])
    batch["labels"][1] = -100
    predicts = trained_mask(batch["labels"])
    signal = trainer.teacher.signal(batch, predicts, None)
    direct = LocalTeacher(trainer.teacher.live().model).signal(
        {name: batch[name] for name in ("input_ids", "attention_mask")}, predicts, None
    )
    assert torch.allclose(signal.hidden, direct.hidden, atol=1e-4) and len(signal) == int(predicts.sum())
    trainer.teacher.flush()
    assert len(trainer.teacher.cache) == 2
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert len(trainer.teacher.signal(empty, trained_mask(empty["labels"]), None)) == 0


@pytest.mark.parametrize(
    "config",
    [{"logit_scale": 0.5}, {"final_logit_softcapping": 3.0}],
    ids=["scale", "soft cap"],
)
def test_the_cached_head_is_all_of_the_head(tmp_path, make_teacher, config):
    model = make_teacher()
    for name, value in config.items():
        setattr(model.config, name, value)
    head = models.read_head(model)
    bias = torch.randn(len(head.weight))
    head = type(head)(head.weight, bias, head.scale, head.soft_cap)
    cached.write_head(tmp_path / "head.safetensors", head)
    again = cached.read_head_file(tmp_path / "head.safetensors", torch.device("cpu"))
    hidden = torch.randn(5, head.weight.shape[1])
    assert torch.equal(again.logits(hidden), head.logits(hidden))
    assert (again.scale, again.soft_cap) == (head.scale, head.soft_cap) != (1.0, None)


# ---- No body in memory ----------------------------------------------------------------------------------------------


def test_no_teacher_is_in_memory_once_the_cache_is_complete(make, saved, monkeypatch):
    make(teacher=saved.teacher, num_train_epochs=1).train()
    loaded = []
    load = models.load_causal_lm

    def watch(name, **kwargs):
        loaded.append(name)
        return load(name, **kwargs)

    def wide() -> set[int]:
        """Parameters of the teacher's hidden size, which the student has nowhere."""
        gc.collect()
        return {id(each) for each in gc.get_objects() if isinstance(each, torch.nn.Parameter) and 48 in each.shape}

    others = wide()  # of fixtures that other tests still hold
    monkeypatch.setattr(models, "load_causal_lm", watch)
    trainer = make(teacher=saved.teacher, student=saved.student, **BEGUN)
    trainer.train()
    assert loaded == [saved.student]
    assert not wide() - others


def test_the_body_leaves_the_memory_when_the_last_row_is_recorded(make, saved):
    trainer = make(teacher=saved.teacher)
    body = weakref.ref(trainer.teacher.live().model)
    epochs = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            gc.collect()
            epochs.append(body() is not None)

    trainer.add_callback(Watch())
    trainer.train()
    assert epochs == [True, False]


def test_evaluation_reads_the_cache_too(make, saved, loads):
    rows = addition_dataset(12, seed=9)
    first = make(teacher=saved.teacher, eval_dataset=rows, **FILLED)
    scores = first.evaluate()
    first.train()
    loads.clear()
    again = make(teacher=saved.teacher, eval_dataset=rows)
    assert again.evaluate()["eval_kl"] == pytest.approx(scores["eval_kl"], rel=1e-5)
    assert loads == []
    new = again.evaluate(addition_dataset(5, seed=10))  # rows that nobody has seen: the teacher is asked, and they stay
    assert new["eval_kl"] > 0 and loads == [saved.teacher]
    loads.clear()
    make(teacher=saved.teacher).evaluate(addition_dataset(5, seed=10))
    assert loads == []


def test_a_cache_serves_without_any_teacher(make, make_trainer, saved, folder, by_step):
    live = make(teacher=saved.teacher)
    live.train()
    alone = make_trainer(teacher=CachedTeacher(folder), **RUN)
    alone.train()
    assert_same_losses(alone, live, by_step)
    with pytest.raises(ConfigurationError, match="no live teacher"):
        make_trainer(teacher=CachedTeacher(folder), train=addition_dataset(30), **RUN)


def test_a_teacher_given_as_a_model_finds_what_its_name_wrote(make, saved, loads):
    make(teacher=saved.teacher, teacher_model_init_kwargs={"dtype": "bfloat16"}, **FILLED).train()
    loads.clear()
    make(teacher=models.load_causal_lm(saved.teacher, role="teacher", dtype="bfloat16"), **FILLED).train()
    assert loads == []
    with pytest.raises(ConfigurationError, match="weights or configuration"):
        make(teacher=models.load_causal_lm(saved.teacher, role="teacher", dtype="float32"))


# ---- What is recorded -----------------------------------------------------------------------------------------------


def test_an_edited_row_is_a_miss_and_the_others_are_not(make, saved, folder):
    rows = addition_dataset(24)
    make(teacher=saved.teacher, train=rows, **FILLED).train()
    edited = rows.map(lambda row, i: {"completion": "7"} if i == 3 else row, with_indices=True)
    trainer = make(teacher=saved.teacher, train=edited, **FILLED)
    asked = []
    live = trainer.teacher.live()
    answer = live.signal
    live.signal = lambda inputs, *rest: asked.append(len(inputs["input_ids"])) or answer(inputs, *rest)
    trainer.train()
    assert sum(asked) == 1
    assert len(CachedTeacher(folder).cache) == 25


def test_completions_of_the_teacher_are_cached_and_need_no_body_again(make, saved, tmp_path, loads, by_step):
    settings = {"seq_kd": True, "completions_dir": str(tmp_path / "kept"), "teacher": saved.teacher}
    prompts = addition_dataset(24).remove_columns("completion")
    first = make(train=prompts, **settings)
    first.train()
    loads.clear()
    again = make(train=prompts, **settings)
    again.train()
    assert loads == []
    assert_same_losses(again, first, by_step)


def test_the_students_own_text_is_judged_live_and_never_recorded(make, saved, folder, caplog):
    trainer = make(teacher=saved.teacher, lmbda=0.5, num_train_epochs=3)
    assert "live teacher is loaded" in caplog.text
    trainer.train()
    assert any(log.get("rollouts", 0) > 0 for log in trainer.state.log_history)
    assert trainer.teacher.is_live
    assert 0 < len(CachedTeacher(folder).cache) <= 24


def test_a_stream_is_recorded_as_it_comes(make, saved, folder):
    stream = addition_dataset(24).to_iterable_dataset()
    make(teacher=saved.teacher, train=stream, max_steps=3).train()
    assert len(CachedTeacher(folder).cache) == 24


def test_a_killed_run_goes_on_from_what_it_had_written(make, saved, folder, die_at):
    trainer = make(teacher=saved.teacher, callbacks=[die_at(2)])
    trainer.teacher.cache.shard_bytes = 1
    with pytest.raises(die_at.error):
        trainer.train()
    assert len(CachedTeacher(folder).cache) == 16
    again = make(teacher=saved.teacher, **FILLED)
    again.train()
    assert len(CachedTeacher(folder).cache) == 24


@pytest.mark.parametrize("damage", ["truncated", "bit"])
def test_damage_is_computed_anew(make, saved, folder, by_step, loads, damage):
    first = make(teacher=saved.teacher)
    first.train()
    (shard,) = shards(folder)
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    else:
        data[-5] ^= 4  # within the last row's hidden states
        shard.write_bytes(data)
    loads.clear()
    again = make(teacher=saved.teacher)
    again.train()
    assert_same_losses(again, first, by_step)
    assert loads == [saved.teacher] and again.teacher.cache.damaged


def test_damage_without_a_teacher_is_refused(make, make_trainer, saved, folder):
    make(teacher=saved.teacher, **FILLED).train()
    (shard,) = shards(folder)
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ConfigurationError, match="live teacher"):
        make_trainer(teacher=CachedTeacher(folder), **RUN).train()


def test_a_damaged_head_is_never_used_and_a_missing_one_is_written_anew(make, make_trainer, saved, folder, by_step):
    first = make(teacher=saved.teacher)
    first.train()
    head = folder / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    for damaged in (data, data[:-9]):
        head.write_bytes(damaged)
        with pytest.raises(CacheError, match="Delete this file"):
            make_trainer(teacher=CachedTeacher(folder), **RUN).train()
    head.unlink()
    again = make(teacher=saved.teacher)
    again.train()
    assert head.exists()
    assert_same_losses(again, first, by_step)


# ---- Refused --------------------------------------------------------------------------------------------------------


def copy_of(saved, tmp_path):
    return shutil.copytree(saved.teacher, tmp_path / "teacher")


def test_a_changed_teacher_is_refused_and_a_moved_one_is_not(make, saved, tmp_path, loads):
    make(teacher=saved.teacher, **FILLED).train()
    loads.clear()
    moved = copy_of(saved, tmp_path)
    assert make(teacher=str(moved)).teacher.name == str(moved)
    assert loads == []
    model = models.load_causal_lm(str(moved), role="teacher")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(moved)
    with pytest.raises(ConfigurationError, match=r"model.safetensors has changed.*Name another folder"):
        make(teacher=str(moved))


def test_a_changed_teacher_config_is_refused(make, saved, tmp_path):
    teacher = copy_of(saved, tmp_path)
    make(teacher=str(teacher), **BEGUN).train()
    config = teacher / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    assert "1e-03" in config.read_text()
    with pytest.raises(ConfigurationError, match="config.json has changed"):
        make(teacher=str(teacher))


def test_a_changed_model_in_memory_is_refused(make, make_teacher):
    teacher = make_teacher()
    make(teacher=teacher, **BEGUN).train()
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        changed.model.norm.weight.add_(1e-3)
    with pytest.raises(ConfigurationError, match="weights or configuration"):
        make(teacher=changed)
    make(teacher=copy.deepcopy(teacher))


def test_a_changed_tokenizer_is_refused(make, make_trainer, saved, tokenizer, folder, tmp_path):
    from transformers import AutoTokenizer

    make(teacher=saved.teacher, **FILLED).train()
    tokenizer.save_pretrained(tmp_path / "tok")
    file = tmp_path / "tok" / "tokenizer.json"
    text = file.read_text()
    seven, eight = (text.index(f'"{digit}": ') for digit in (7, 8))
    swapped = text[:seven] + '"8"' + text[seven + 3 : eight] + '"7"' + text[eight + 3 :]
    file.write_text(swapped)
    changed = AutoTokenizer.from_pretrained(tmp_path / "tok")
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        make_trainer(teacher=CachedTeacher(folder), tok=changed, **RUN)
    with pytest.raises(ConfigurationError, match="which id stands for which token"):
        make(teacher=saved.teacher, tok=changed, teacher_processing_class=changed)


@pytest.mark.parametrize(
    "then, now, message",
    [
        ({}, {"teacher_cache_kind": "topk"}, "teacher_cache_kind: 'hidden' then, 'topk' now"),
        ({}, {"teacher_cache_dtype": "bfloat16"}, "teacher_cache_dtype"),
        ({}, {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "teacher_model_init_kwargs"),
        ({}, {"bf16": True}, "mixed precision"),
        ({"teacher_cache_kind": "topk"}, {"teacher_cache_kind": "topk", "teacher_cache_top_k": 3}, "64 then, 3 now"),
        ({"teacher_cache_kind": "sampled"}, {"teacher_cache_kind": "sampled", "seed": 1}, "seed"),
        (
            {"teacher_cache_kind": "sampled"},
            {"teacher_cache_kind": "sampled", "teacher_cache_draws": 9},
            "teacher_cache_draws",
        ),
    ],
)
def test_other_settings_are_refused_before_the_student_loads(make, saved, monkeypatch, then, now, message):
    make(teacher=saved.teacher, **BEGUN, **then).train()
    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigurationError, match=message):
        make(student=saved.student, teacher=saved.teacher, **now)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lmbda": 1.0}, "never seen twice"),
        ({"teacher_cache_kind": "topk", "kd_temperature": 2.0}, "temperature"),
        ({"teacher_cache_kind": "topk", "divergence": "logit_mse"}, "logit_mse"),
        ({"teacher_cache_kind": "sampled", "divergence": "jsd"}, "forward_kl"),
        ({"teacher_cache_kind": "logits"}, "hidden, topk, sampled, next_bytes"),
        ({"teacher_cache_kind": "topk", "teacher_cache_dtype": "bfloat16"}, "float32, float16"),
        ({"teacher_cache_kind": "topk", "teacher_cache_top_k": 0}, "teacher_cache_top_k"),
        ({"teacher_cache_kind": "sampled", "teacher_cache_draws": 40_000}, "teacher_cache_draws"),
        ({"teacher_cache": None, "teacher_cache_kind": "topk"}, "teacher_cache"),
        ({"teacher_cache": None, "teacher_cache_dtype": "float32"}, "teacher_cache_dtype"),
    ],
)
def test_settings_that_exclude_each_other(make, saved, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(teacher=saved.teacher, **settings)


def test_a_cache_alone_cannot_judge_rollouts(make, make_trainer, saved, folder):
    make(teacher=saved.teacher, **FILLED).train()
    with pytest.raises(ConfigurationError, match="lmbda: 0"):
        make_trainer(teacher=CachedTeacher(folder), **{**RUN, "lmbda": 0.5})
    with pytest.raises(ConfigurationError, match="Leave one of them out"):
        make(teacher=CachedTeacher(folder))
    with pytest.raises(ConfigurationError, match="There is no teacher cache"):
        CachedTeacher(folder / "elsewhere")


def test_rollouts_on_a_stream_are_refused(make, saved):
    with pytest.raises(ConfigurationError, match="stream"):
        make(teacher=saved.teacher, lmbda=0.5, max_steps=2, train=addition_dataset(24).to_iterable_dataset())


def test_a_teacher_whose_head_is_unknown_cannot_be_kept_as_hidden_states(make, saved, monkeypatch):
    monkeypatch.setattr(models, "head_is_fusable", lambda model: False)
    with pytest.raises(ConfigurationError, match="topk"):
        make(teacher=saved.teacher, **BEGUN).train()
    make(teacher=saved.teacher, teacher_cache=saved.teacher + "-topk", teacher_cache_kind="topk", **BEGUN).train()


def test_a_cache_that_does_not_fit_is_refused_with_figures(make, saved, monkeypatch, loads, folder):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(cached.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 4096))
    with pytest.raises(CacheError, match=r"GiB more for 24 rows with \d+ tokens \(192 bytes each\).*0.00 GiB are free"):
        make(teacher=saved.teacher)
    assert loads == [] and not shards(folder)


def test_a_cache_of_another_format_is_refused(make, saved, folder):
    make(teacher=saved.teacher, **BEGUN).train()
    file = folder / "identity.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CacheError, match="format 99"):
        make(teacher=saved.teacher)
    file.write_text("{")
    with pytest.raises(CacheError, match="does not describe"):
        CachedTeacher(folder)


def test_a_hub_repository_is_told_by_its_commit(monkeypatch, tmp_path):
    import transformers.utils

    from distill_trainers.teachers.cache.identity import describe_source

    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    monkeypatch.setattr(transformers.utils, "cached_file", lambda name, file, revision: str(snapshot / file))
    assert list(describe_source("a/b").values()) == [{"commit": "c0ffee"}]
    monkeypatch.setattr(transformers.utils, "cached_file", lambda name, file, revision: str(tmp_path / file))
    with pytest.raises(ConfigurationError, match="commit"):
        describe_source("a/b")


def test_hidden_states_are_stored_exactly(make, batch_of):
    trainer = make()
    batch = batch_of(trainer, range(5))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    predicts = trained_mask(batch["labels"])
    direct = trainer.teacher.live().signal(inputs, predicts, 12)
    found = trainer.teacher.signal(inputs, predicts, 12)
    trainer.teacher.flush()
    again = trainer.teacher.signal(inputs, predicts, 12)
    for signal in (found, again):
        assert isinstance(signal, HiddenStates) and torch.equal(signal.hidden, direct.hidden)
        with trainer.teacher.whole_head(signal) as whole:
            assert torch.equal(whole.chunk(slice(None)).logits, direct.chunk(slice(None)).logits)
