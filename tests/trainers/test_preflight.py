"""One place for every refusal: the constructor, the dry run and the doctor say the same words, and load nothing."""

import json

import pytest
import yaml
from datasets import Dataset

from distill_trainers import GKDConfig, GKDTrainer, LocalTeacher, models
from distill_trainers.cli import main
from distill_trainers.exceptions import ConfigurationError, DatasetError, VocabularyError
from distill_trainers.storage import check_folder
from distill_trainers.trainers import METHODS


@pytest.fixture
def everywhere(tmp_path, saved, capsys, monkeypatch):
    """`everywhere(rows, **settings)`: what the constructor, the dry run and the doctor say of one run."""
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))

    def refusals(rows, **settings):
        method = settings.pop("method", "gkd")
        shared = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "use_cpu": True, "max_length": 24}
        shared |= {"max_new_tokens": 4, "report_to": "none", **settings}
        config_class, trainer_class = METHODS[method]
        with pytest.raises((ConfigurationError, DatasetError, VocabularyError)) as refused:
            trainer_class(saved.student, saved.teacher, config_class(**shared), Dataset.from_list(rows))
        constructor = " ".join(str(refused.value).split())
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        path = tmp_path / "recipe.yaml"
        names = {"model_name_or_path": saved.student, "teacher_model_name_or_path": saved.teacher}
        path.write_text(yaml.safe_dump({"method": method, "dataset": str(data), **names, **shared}))
        said = [constructor]
        for command in (["train", "--dry_run", "true"], ["train"], ["doctor", "--quick", "--json"]):
            assert main([command[0], "--config", str(path), *command[1:]]) == 2, command
            printed = capsys.readouterr()
            if command[0] == "doctor":  # it parts a message in two: what is wrong, and what to do
                findings = json.loads(printed.out)["findings"]
                told = [f"{finding['what']} {finding['remedy']}" for finding in findings]
                told = [text.replace(". Expected ", "; expected ").removesuffix(NO_REMEDY) for text in told]
                said.append(next((text for text in told if text == constructor), str(told)))
            else:
                said.append(" ".join(printed.err.split()).removeprefix("error: "))
        return said

    return refusals


NO_REMEDY = " Change what the message names."
PROMPTS = [{"prompt": f"{a}+{a}="} for a in range(8)]
ROWS = [{"prompt": f"{a}+{a}=", "completion": str(2 * a)} for a in range(8)]


def assert_all_say(said, words):
    assert words in said[0]
    assert all(text == said[0] for text in said), said


def test_a_fault_in_one_requirement_is_told_in_the_same_words_everywhere(everywhere, monkeypatch):
    """λ = 1 trains on prompts alone; a config that says otherwise is believed by everybody."""
    monkeypatch.setattr(GKDConfig, "needs_completions", property(lambda self: True))
    assert_all_say(everywhere(PROMPTS, lmbda=1.0), "completion")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (PROMPTS, {"lmbda": 0.0}, "completion"),
        (ROWS, {"teacher_placement": "adapter_off"}, "expected no teacher"),
        (ROWS, {"teacher_server_top_k": 3}, "the address of a teacher's server"),
        (ROWS, {"method": "dpkd", "reference_logps_dir": "kept"}, "expected one of pairs"),
        (ROWS, {"eval_strategy": "steps", "eval_steps": 1}, "no `eval_dataset`"),
        (ROWS, {"merge_adapter": True}, "the student has no adapter"),
        (ROWS, {"teacher_cache": "kept", "lmbda": 1.0}, "never seen twice"),
        (ROWS, {"method": "minillm", "teacher_cache": "kept"}, "never seen twice"),
    ],
    ids=str,
)
def test_refusals_are_told_in_the_same_words_everywhere(everywhere, tmp_path, rows, settings, words):
    paths = {name: str(tmp_path / value) for name, value in settings.items() if value == "kept"}
    assert_all_say(everywhere(rows, **{**settings, **paths}), words)


def test_requirements_of_dpkd_follow_the_layout_of_its_data(tmp_path):
    config = METHODS["dpkd"][0](output_dir=str(tmp_path), report_to="none", use_cpu=True)
    prompts, pairs = (
        config.requirements(PROMPTS[0]),
        config.requirements({"prompt": "1", "chosen": "a", "rejected": "b"}),
    )
    assert prompts.samples_completions and prompts.replaces_completions and not prompts.needs_completions
    assert pairs.needs_completions and not (pairs.samples_completions or pairs.replaces_completions)
    off_policy = GKDConfig(output_dir=str(tmp_path), lmbda=0.0, report_to="none", use_cpu=True)
    assert off_policy.requirements(ROWS[0]).needs_completions


def test_refusals_of_models_in_memory_load_nothing(make_student, make_teacher, tokenizer, saved, tmp_path, monkeypatch):
    """What only Python can pass: no dry run sees it, and no weights are loaded for it."""
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    rows, device_map = Dataset.from_list(ROWS), {"teacher_model_init_kwargs": {"device_map": {"": "cpu"}}}

    def build(student, teacher, **settings):
        args = GKDConfig(output_dir=str(tmp_path), lmbda=0.0, report_to="none", use_cpu=True, max_steps=1, **settings)
        return GKDTrainer(student, teacher, args, rows, processing_class=tokenizer)

    for teacher, settings, words in [
        (
            LocalTeacher(make_teacher()),
            {"teacher_placement": "device_map"},
            "LocalTeacher in memory; expected a folder",
        ),
        (LocalTeacher(make_teacher()), {"teacher_placement": "replicate", **device_map}, "both say how the teacher"),
        (make_teacher(), device_map, "already a"),
        (LocalTeacher(make_teacher(), placement="fsdp2"), {"teacher_placement": "zero3"}, "placed already"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            build(saved.student, teacher, **settings)
    with pytest.raises(ConfigurationError, match="while a student is loaded by name"):
        build(make_student(), saved.teacher, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(DatasetError, match="is a int"):
        GKDTrainer(saved.student, saved.teacher, GKDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True), 3)


def test_a_student_is_loaded_before_the_live_teacher_of_a_cache(make_trainer, saved, tmp_path, monkeypatch):
    order, load = [], models.load_causal_lm
    monkeypatch.setattr(models, "load_causal_lm", lambda *a, role, **k: order.append(role) or load(*a, role=role, **k))
    make_trainer(student=saved.student, teacher=saved.teacher, lmbda=0.0, teacher_cache=str(tmp_path / "cache"))
    assert order == ["student", "teacher"]


def test_what_moved_to_the_config_is_not_looked_for_on_a_trainer():
    with pytest.raises(ConfigurationError, match="Own defines needs; expected it on GKDConfig"):
        type("Own", (GKDTrainer,), {"needs": frozenset()})


def test_an_output_dir_that_is_a_file_or_lies_below_one(everywhere, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        said = everywhere(PROMPTS, lmbda=1.0, output_dir=str(tmp_path / folder))
        assert said[0] == said[1] and "`output_dir: " in said[0], said  # the run itself is stopped by the folder's lock
        assert all("output_dir" in text and "folder" in text for text in said), said


@pytest.mark.parametrize("name", ["completions_dir", "teacher_cache"])
def test_other_folders_that_are_files(everywhere, tmp_path, name):
    (tmp_path / "file").write_text("")
    said = everywhere(PROMPTS, lmbda=1.0, **{name: str(tmp_path / "file")})
    assert f"`{name}: " in said[0] and said[0] == said[1] == said[2], said


def test_a_folder_without_rights(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args, **kwargs: False)  # root may write everywhere
    with pytest.raises(ConfigurationError, match="output_dir: .*a folder to write into"):
        check_folder("output_dir", tmp_path / "new" / "deeper")
    check_folder("teacher_cache", tmp_path, writable=False)


def test_a_system_that_does_not_say_how_long_names_may_be(tmp_path, monkeypatch):
    monkeypatch.delattr("os.pathconf")  # as on Windows
    check_folder("output_dir", tmp_path)
    with pytest.raises(ConfigurationError, match="255 bytes"):
        check_folder("output_dir", tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "NUL"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    with pytest.raises(ConfigurationError, match="output_dir"):
        check_folder("output_dir", tmp_path / name)
