"""An error that nobody expected is one line and a file, whatever the command was doing."""

import sys
from pathlib import Path

import pytest
import torch

from distill_trainers.cli import COMMANDS, main, report_errors


def failing(error):
    def command(argv):
        from distill_trainers.value_types import check_finite

        class Values(dict):
            def items(self):
                raise error

        check_finite(Values())

    return command


def traceback_file(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert printed == line + "\n"
    return line, Path(line.split("the traceback is in ")[1].rstrip("."))


@pytest.mark.parametrize("named", [["--output_dir", "OUT"], ["--output-dir=OUT"], ["--config", "RECIPE"], []], ids=str)
def test_one_line_and_a_file_where_the_run_writes(named, tmp_path, capsys, monkeypatch):
    out, temporary, recipe = tmp_path / "out", tmp_path / "temporary", tmp_path / "recipe.yaml"
    out.mkdir(), temporary.mkdir()
    recipe.write_text(f"output_dir: {out}\n")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    argv = [part.replace("OUT", str(out)).replace("RECIPE", str(recipe)) for part in named]
    assert report_errors(failing(RuntimeError("the first\nthe second")), argv) == 1
    line, file = traceback_file(capsys.readouterr().err)
    assert "unexpected, in value_types (check_finite): RuntimeError: the first; " in line and "second" not in line
    assert file.parent == (out if named else temporary) and file.stat().st_mode & 0o077 == 0
    text = file.read_text()
    assert "Traceback (most recent call last)" in text and "the second" in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "MemoryError: this machine's memory is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "OutOfMemoryError: the device's memory is full"),
        (RecursionError("maximum recursion depth"), "RecursionError: values lie too deep"),
        (ImportError("libcudart"), "ImportError: libcudart"),
        (KeyError(), "KeyError: ;"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_happened_is_in_words(error, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert report_errors(failing(error), []) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), BrokenPipeError()], ids=lambda e: type(e).__name__
)
def test_what_is_no_error_stays_as_it_was(error, capsys):
    if isinstance(error, KeyboardInterrupt):
        assert report_errors(failing(error), []) == 130
        return
    with pytest.raises(type(error)):
        report_errors(failing(error), [])


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_traceback_can_be_seen(way, monkeypatch):
    if way == "variable":
        monkeypatch.setenv("DISTILL_TRAINERS_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="as it was"):
        report_errors(failing(RuntimeError("as it was")), ["--traceback"] if way == "option" else [])


def test_without_any_folder_to_write_into(monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    assert report_errors(failing(RuntimeError("why")), ["--output_dir", "/no/such/other"]) == 1
    assert "set DISTILL_TRAINERS_TRACEBACK=1 to see it here" in capsys.readouterr().err


def test_processes_of_a_launch_say_which_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert report_errors(failing(RuntimeError("why")), []) == 1
    line, file = traceback_file(capsys.readouterr().err)
    assert "(process 1 of 2)" in line and file.name.startswith("traceback-rank1-")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_net(command, monkeypatch, tmp_path, capsys):
    """Also while its module is imported."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, f"distill_trainers.cli.{COMMANDS[command][0]}", None)
    assert main([command]) == 1
    line, _ = traceback_file(capsys.readouterr().err)
    assert "ModuleNotFoundError" in line


@pytest.mark.parametrize("name", ["a" * 300, "x/" * 3000], ids=["long", "deep"])
@pytest.mark.parametrize(
    "argv",
    [["push", "{}", "--repo", "me/x"], ["report", "{}"], ["train", "--config", "{}"], ["doctor", "--config", "{}"]],
)
def test_a_name_longer_than_a_file_s_is_no_accident(capsys, argv, name):
    assert main([part.format(name) for part in argv]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and name[:50] in told and len(told) < 600 and "unexpected" not in told
