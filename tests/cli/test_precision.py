"""`bf16: auto` in recipes."""

import json
import os

import pytest
import yaml
from transformers import LlamaConfig

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.manifest import write_manifest
from distill_trainers.models import precision
from distill_trainers.models.precision import Products, measure_products, products_of
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.recipe.precision import settle_precision
from distill_trainers.teachers.cache.identity import CacheIdentity, write_identity

SLOW, FAST = Products(62, 9), Products(100, 300)


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    def parse(products, *options, **settings):
        asked = []

        def measured(config):
            asked.append(config)
            return products

        monkeypatch.setattr(precision, "products_of", measured)
        values = {
            "model_name_or_path": str(tmp_path / "student"),
            "teacher_model_name_or_path": str(tmp_path / "teacher"),
        }
        values |= {
            "dataset": "rows.jsonl",
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": "auto",
        } | settings
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        recipe = parse_recipe(["--config", str(file), *options])
        if recipe.run.teachers:
            return recipe.args.bf16, recipe.run.teachers, recipe.args.teacher_model_init_kwargs
        return recipe.args.bf16, recipe.args.teacher_model_init_kwargs, asked

    return parse


def test_products_are_measured_in_both_dtypes():
    products = measure_products(48, 64)
    assert products.float32 > 0 and products.bfloat16 > 0
    assert measure_products(48, 64) is products  # once


@pytest.mark.parametrize(("narrow", "pays"), [(83, False), (150, False), (160, False), (170, True)])
def test_bfloat16_has_to_be_clearly_faster(narrow, pays):
    assert Products(150, narrow).narrow is pays


def test_widths_are_those_of_the_model(monkeypatch):
    monkeypatch.setattr(precision, "measure_products", lambda *widths: widths)
    assert products_of(LlamaConfig(hidden_size=64, intermediate_size=80)) == (64, 80)
    assert products_of(None) == precision.TYPICAL


def test_what_is_faster_is_taken(parsed):
    assert parsed(FAST)[:2] == (True, None)
    assert parsed(SLOW)[:2] == (False, {"dtype": "float32"})  # a teacher saved in bfloat16 would be as slow


def test_a_dtype_that_is_given_stays(parsed):
    assert parsed(SLOW, teacher_model_init_kwargs={"dtype": "bfloat16"})[:2] == (False, {"dtype": "bfloat16"})
    assert parsed(SLOW, teacher_model_init_kwargs={"revision": "x"})[1] == {"revision": "x", "dtype": "float32"}
    assert parsed(SLOW, "--teacher_model_init_kwargs", '{"revision": "y"}')[1] == {"revision": "y"}
    assert parsed(SLOW, teacher_model_name_or_path="http://127.0.0.1:1")[1] is None


def test_each_of_several_teachers_is_loaded_as_one_would_be(parsed, tmp_path):
    source, kwargs = "teacher_model_name_or_path", "teacher_model_init_kwargs"
    one = str(tmp_path / "teacher")
    given = {
        "plain": one,
        "own": {source: one, kwargs: {"revision": "x"}},
        "said": {source: one, kwargs: {"dtype": "bfloat16"}},
        "away": "http://127.0.0.1:1",
    }
    wide = {"dtype": "float32"}
    settled = {**given, "plain": {source: one, kwargs: {"revision": "y", **wide}}}
    settled["own"] = {source: one, kwargs: {"revision": "x", **wide}}
    common = {"teachers": given, source: None, kwargs: {"revision": "y"}}
    assert parsed(SLOW, **common) == (False, settled, {"revision": "y"})
    assert parsed(FAST, **common) == (True, given, {"revision": "y"})
    assert parsed(SLOW, "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', **common)[1] == given


def test_the_cache_of_one_of_several_teachers_tells_the_precision(parsed, tmp_path):
    write_identity(tmp_path, CacheIdentity("hidden", vocab_size=9, tokenizer="t", autocast="bf16", teacher_rows=9))
    members = {"a": str(tmp_path / "teacher"), "b": {"teacher_model_name_or_path": "b", "teacher_cache": str(tmp_path)}}
    assert parsed(SLOW, teachers=members, teacher_model_name_or_path=None)[0] is True


@pytest.mark.parametrize("narrow", [True, False])
def test_other_accelerators_are_asked_as_transformers_asks_them(monkeypatch, narrow):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: narrow)
    monkeypatch.setattr(precision, "products_of", lambda config: pytest.fail("the CPU was measured"))
    assert settle_precision({"bf16": "auto"}, [])[0] == {"bf16": narrow}


@pytest.mark.parametrize("option", [["--bf16", "true"], ["--bf16=true"]])
def test_the_command_line_comes_first(parsed, option):
    narrow, _, asked = parsed(SLOW, *option)
    assert narrow is True and not asked
    assert parsed(FAST, "--bf16=auto", bf16=False)[0] is True


def test_a_run_that_goes_on_keeps_its_precision(parsed, tmp_path):
    folder = tmp_path / "run/checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    write_manifest(folder, {"bf16": False, "teacher_model_init_kwargs": {"dtype": "float32"}})
    for resumed in (True, str(folder)):
        assert parsed(FAST, resume_from_checkpoint=resumed) == (False, {"dtype": "float32"}, [])
    assert parsed(FAST, overwrite_output_dir=True)[0] is True


def test_a_run_with_a_cache_keeps_the_precision_of_its_answers(parsed, tmp_path):
    """Timings that are close may turn between two commands, and the cache would be refused."""
    for autocast, narrow in (("bf16", True), ("no", False)):
        identity = CacheIdentity("hidden", vocab_size=9, tokenizer="t", autocast=autocast, teacher_rows=9)
        (tmp_path / autocast).mkdir()
        write_identity(tmp_path / autocast, identity)
        found = parsed(SLOW if narrow else FAST, teacher_cache=str(tmp_path / autocast))
        assert found == (narrow, None if narrow else {"dtype": "float32"}, [])
    assert parsed(FAST, teacher_cache=str(tmp_path / "new"))[0] is True


def test_widths_are_read_without_code_of_the_model(parsed, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    (tmp_path / "student").mkdir()
    config = {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    (tmp_path / "student/code.py").write_text("raise SystemExit('it ran')")
    assert parsed(FAST)[2] == [None]


def test_the_environment_of_a_recipe_is_set_before_gpus_are_asked_for(parsed, monkeypatch):
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def asked():
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        raise ConfigurationError("enough")

    monkeypatch.setattr("torch.cuda.is_available", asked)
    with pytest.raises(ConfigurationError, match="enough"):
        parsed(FAST, use_cpu=False, env={"CUDA_VISIBLE_DEVICES": "7"})
    assert seen == ["7"]


def test_a_machine_without_gpus_need_not_be_told_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(precision, "products_of", lambda config: FAST)
    assert settle_precision({"bf16": "auto"}, [])[0] == {"bf16": True, "use_cpu": True}
    assert settle_precision({"bf16": "auto", "use_cpu": False}, [])[0] == {"bf16": True, "use_cpu": False}
    monkeypatch.setattr(precision, "products_of", lambda config: SLOW)
    assert settle_precision({"bf16": "auto"}, [])[0] == {"bf16": False}


def test_several_processes_on_cpus_are_told_to_decide(parsed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"`bf16: auto`.*expected true or false"):
        parsed(FAST)
