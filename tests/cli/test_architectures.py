"""Recipes for GPUs against the architectures that they name: built on the meta device, counted, planned."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from distill_trainers.cli import main
from distill_trainers.doctor import shape_of
from distill_trainers.students import StudentInit
from distill_trainers.students.shapes import write_shape

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "architectures"
# As their owners publish them.
PARAMETERS = {
    "openlm-research/open_llama_3b_v2": 3_426_473_600,
    "openlm-research/open_llama_7b_v2": 6_738_415_616,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-Coder-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-Math-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-9b-it": 9_241_705_984,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}
# Said to be tight in their own README: the student is gathered whole for its rollouts.
TIGHT = {"llama-2-13b/gkd", "llama-2-13b/dpkd"}
ON_PAPER = [
    path
    for path in sorted(ROOT.glob("recipes/*/*.yaml"))
    if all(
        name is None or (FOLDER / f"{name.replace('/', '--')}.json").is_file()
        for name in (yaml.safe_load(path.read_text()).get(f"{role}model_name_or_path") for role in ("teacher_", ""))
    )
]


def launch_of(path):
    """The launch that the recipe's head names; plain data parallelism otherwise."""
    for line in path.read_text().splitlines():
        if line.startswith("# Launch: "):
            return line.split()[2]
    return "accelerate_configs/ddp.yaml"


def plan(path, capsys, *options):
    """Exit status and diagnosis of a recipe on 8 GPUs of 80 GB."""
    command = ["doctor", "--config", str(path), "--architectures", str(FOLDER), "--gpus", "8x80", "--json"]
    status = main([*command, "--launch", str(ROOT / launch_of(path)), *options])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_an_architecture_has_the_published_number_of_parameters(name):
    content = json.loads((FOLDER / f"{name.replace('/', '--')}.json").read_text())
    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)))
    assert shape.parameters == PARAMETERS[name]


def test_every_architecture_is_counted():
    assert {path.stem.replace("--", "/") for path in FOLDER.glob("*.json")} == set(PARAMETERS)


def test_the_recipes_of_the_mission_are_there():
    pairs = {(path.parent.name, path.stem) for path in ON_PAPER}
    for student, second in (("open-llama-3b", "dpkd"), ("llama-2-7b", "minillm"), ("llama-2-13b", "dpkd")):
        assert {(student, m + how) for m in ("gkd", second) for how in ("", "_lora")} <= pairs
    assert {"qwen3-1.7b", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b"} <= {student for student, _ in pairs}


@pytest.mark.parametrize(
    ("student", "weight"), [("open-llama-3b", 0.5), ("llama-2-3b", 0.5), ("llama-2-7b", 0.7), ("llama-2-13b", 0.8)]
)
def test_weights_of_the_mission(student, weight):
    """w τ² D + (1 − w) NLL, up to the factor that makes one of them 1 (docs/recipes.md)."""
    for path in ROOT.glob(f"recipes/{student}/*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        if "kd_temperature" not in recipe:
            continue
        assert recipe["kd_temperature"] == 4.0
        scale = 16 if recipe.get("tau_squared") else 1
        ratio = recipe["lm_loss_weight"] / scale
        assert ratio == pytest.approx((1 - weight) / (weight * 16), rel=1e-4), path.name


PRUNED = [path for path in ON_PAPER if "parameters" in yaml.safe_load(path.read_text()).get("student_init", {})]


@pytest.mark.parametrize("path", PRUNED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_pruned_student_has_the_parameters_of_its_recipe(path, capsys):
    """Every shape of its plan is a model that can be built; one of them is judged."""
    recipe = yaml.safe_load(path.read_text())
    asked, name = float(recipe["student_init"]["parameters"]), recipe["teacher_model_name_or_path"].replace("/", "--")
    config = AutoConfig.for_model(**json.loads((FOLDER / f"{name}.json").read_text()))
    planned = StudentInit(parameters=asked).shrink(copy.deepcopy(config))
    assert len(planned) >= 10
    for candidate in planned[:: len(planned) // 4]:
        built = copy.deepcopy(config)
        built.num_hidden_layers = candidate.shape.num_hidden_layers
        write_shape(built, candidate.shape)
        with torch.device("meta"):
            assert shape_of(AutoModelForCausalLM.from_config(built)).parameters == candidate.parameters
        assert candidate.parameters == pytest.approx(asked, rel=0.025)
    _, report = plan(path, capsys)
    assert report["parameters"]["student"] == pytest.approx(asked, rel=0.025)


@pytest.mark.parametrize("path", ON_PAPER, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_fits_the_gpus_that_it_is_for(path, capsys):
    """Nothing is downloaded or loaded; the doctor has no more to say than that it judged on paper."""
    status, report = plan(path, capsys, "--tflops", "400")
    expected = {"note", "warning"} if f"{path.parent.name}/{path.stem}" in TIGHT else {"note"}
    assert (status, {f["severity"] for f in report["findings"]}) == (0, expected), report["findings"]
    assert 0 < report["memory"]["peak"] < report["available"] and report["operations_per_step"] > 1e12
    name = yaml.safe_load(path.read_text()).get("teacher_model_name_or_path")
    assert report["parameters"]["teacher"] == PARAMETERS.get(name)


def test_seventy_billion_parameters_need_sharding(capsys):
    """Whole on each of 8 GPUs the teacher fits nowhere; sharded it does, an eighth of it on each."""
    _, report = plan(ROOT / "recipes/llama-2-13b/gkd_lora.yaml", capsys)
    table = {(each["student"], each["teacher"]): each for each in report["placements"]}
    assert not any(each["fits"] for (_, teacher), each in table.items() if teacher == "replicate")
    assert table["zero3", "zero3"]["fits"]
    spared = table["zero3", "replicate"]["bytes"] - table["zero3", "zero3"]["bytes"]
    weights = 2 * PARAMETERS["meta-llama/Llama-2-70b-hf"]
    assert spared == pytest.approx(weights * 7 / 8, rel=0.03)
