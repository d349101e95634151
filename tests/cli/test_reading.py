"""Files of settings as people have them: read as they are written, or refused in one sentence that says what to do."""

import pytest

from distill_trainers.cli import main
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.recipe.environment import set_environment
from distill_trainers.recipe.reading import read_settings

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("run_name: café\n".encode("latin-1"), "not in UTF-8 (line 1, byte 0xe9)"),
        ("run_name: x\n".encode("utf-16"), "is in UTF-16"),
        (b"a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, in the lines 1 and 3"),
        (b"a: {b: 1, b: 2}\n", "the key 'b' stands twice"),
        (b"a:\n\tb: 1\n", "is not valid YAML"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n", "holds list"),
        (BOMB.encode(), "unfold to more than"),
        (b"a: &a [*a]\n", "unfold to more than"),
        (b"a: " + b"[" * 5000, "50 levels deep"),
        (b"".join(b" " * i + b"a:\n" for i in range(900)), "levels deep"),
        (b"a: \0\n", "is not valid YAML"),
        (b"a: !!python/object/apply:os.system ['echo']\n", "is not valid YAML"),
        (b"a: !!timestamp x\n", "cannot read"),
        (b"a: !!bool x\n", "cannot read"),
        (b"a: 1\n---\nb: 2\n", "single document"),
        (b"on: 1\n", "put such a word in quotes"),
        (b"1: 2\n", "the key '1', which is no text"),
        (b"a: " + b"9" * 5000, "cannot read"),
        (b"a: " + b"x" * 2**21, "of at most 1048576 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_file_of_settings(tmp_path, written, told, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(written)
    with pytest.raises(ConfigurationError) as error:
        read_settings(path, "The recipe")
    assert told in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700
    assert main(["train", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_values_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = "\ufeffa: 2024-01-01\nb: 010\nc: 1:30\nd: 1_000\ne: 1e-5\nf: 0x1F\ng: .5\nh: -3\ni: no\nj: 'no'\nk: 1.\n"
    path.write_text(text, encoding="utf-8")
    values = {"a": "2024-01-01", "b": 10, "c": "1:30", "d": "1_000", "e": 1e-5, "f": 31, "g": 0.5, "h": -3}
    assert read_settings(path, "The recipe") == {**values, "i": False, "j": "no", "k": 1.0}


def test_aliases_and_merges_work(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("x: &x {a: 1}\ny:\n  <<: *x\n  b: 2\n")
    assert read_settings(path, "The recipe") == {"x": {"a": 1}, "y": {"a": 1, "b": 2}}


def test_what_a_merge_brings_stands_once(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: {b: &b {<<: {c: 1, d: 2}, c: 3}}\ne: {<<: *b, c: 4}\n")
    assert read_settings(file, "The file") == {"a": {"b": {"c": 3, "d": 2}}, "e": {"c": 4, "d": 2}}


def test_a_folder_and_a_file_without_rights_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="is a folder; expected a file"):
        read_settings(tmp_path, "The recipe")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(ConfigurationError, match="cannot be read: Permission denied"):
        read_settings(tmp_path / "recipe.yaml", "The recipe")


@pytest.mark.parametrize(
    "variables",
    [{1: "a"}, {"A=B": "a"}, {"": "a"}, {"NCCL_ALGO": None}, {"NCCL_ALGO": True}, {"NCCL_ALGO": "\0"}, ["NCCL_ALGO"]],
)
def test_variables_that_no_environment_takes(variables):
    with pytest.raises(ConfigurationError, match="env"):
        set_environment(variables)


@pytest.mark.parametrize(
    "written", [b"\xff\xfe", b"[1]", b"distributed_type: NO\nnum_processes: many\n", b"a: 1\na: 2\n"]
)
def test_launch_configurations_too(recipe, tmp_path, written, capsys):
    launch = tmp_path / "launch.yaml"
    launch.write_bytes(written)
    assert main(["doctor", "--config", recipe(), "--launch", str(launch)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_one_file_of_settings(recipe, capsys):
    assert main(["train", "--config", recipe(), "--config", recipe()]) == 2
    assert "`--config` twice" in capsys.readouterr().err
