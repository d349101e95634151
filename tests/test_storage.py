"""Files that are whole or not there: full disks, things in the way, planted links, killed writers."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import distill_trainers
from distill_trainers import storage
from distill_trainers.exceptions import CacheError, CheckpointError
from distill_trainers.storage import (
    RecordStore,
    append_lines,
    write_atomically,
    write_file,
    writing_folder,
    writing_into,
)

ROOT = Path(distill_trainers.__file__).parent
WORDS = ("the thing", "Make room.")


@contextlib.contextmanager
def full_disk(limit):
    """Within it no file grows beyond so many bytes: the rest fails as on a full disk, of any writer in any language."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- One file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 999])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, limit):
    write_file(tmp_path / "a.json", "old", *WORDS)
    with (
        full_disk(limit),
        pytest.raises(CheckpointError, match=r"Could not write the thing to .*\d MiB are free there. Make room.$"),
    ):
        write_file(tmp_path / "a.json", "n" * 1000, *WORDS)
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == ["a.json"]


def test_no_room_for_a_part_of_a_cache_is_an_error_of_the_cache(tmp_path):
    with full_disk(0), pytest.raises(CacheError, match="MiB are free there. What the cache held before is intact"):
        write_atomically(tmp_path / "shard", b"rows")
    assert not names(tmp_path)


def test_what_is_in_the_way_is_said_without_talk_of_space(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file" / "a.json", tmp_path / "folder", tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="Something else is in the way") as caught:
            write_file(path, "new", *WORDS)
        assert "MiB" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder", "folder/thesis", "pipe"]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_to_is_said_so(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match="This process may not write there") as caught:
        write_file(tmp_path / "a.json", "new", *WORDS)
    assert "Make room" not in str(caught.value)


def test_links_are_replaced_and_not_followed(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").symlink_to(elsewhere)
    write_file(tmp_path / "out" / "a.json", "new", *WORDS)
    assert not (tmp_path / "out" / "a.json").is_symlink() and (tmp_path / "out" / "a.json").read_text() == "new"
    monkeypatch.setattr(storage.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / "out" / f".{storage._MACHINE}-{os.getpid()}-guessed.tmp").symlink_to(elsewhere)
    with pytest.raises(CheckpointError):
        write_file(tmp_path / "out" / "a.json", "newer", *WORDS)
    assert elsewhere.read_text() == "precious" and (tmp_path / "out" / "a.json").read_text() == "new"


def test_who_may_read_a_file_stays_as_it_was(tmp_path):
    (tmp_path / "a.json").touch(mode=0o600)
    write_file(tmp_path / "a.json", "new", *WORDS)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


def test_a_reader_sees_the_old_or_the_new_and_writers_do_not_meet(tmp_path):
    def write(letter):
        for _ in range(30):
            write_file(tmp_path / "a", letter * 50_000, *WORDS)

    write_file(tmp_path / "a", "x" * 50_000, *WORDS)
    threads = [threading.Thread(target=write, args=(letter,)) for letter in "yz"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen = (tmp_path / "a").read_text()
        assert len(seen) == 50_000 and len(set(seen)) == 1
    assert names(tmp_path) == ["a"]


def test_what_killed_writers_left_is_swept_and_that_of_others_is_not(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from distill_trainers import storage
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "file":
    storage.write_file(Path(sys.argv[1], "a"), "half", "it", "")
with storage.writing_folder(Path(sys.argv[1], "b"), "it", "") as filled:
    (filled / "c").write_text("half")
"""
    for kind in ("file", "folder"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path), kind]).returncode == -signal.SIGKILL
    mine, old = tmp_path / ".me.tmp", tmp_path / ".old.tmp"
    others = tmp_path / f".{storage._MACHINE}-{os.getpid()}-0.tmp"
    for file in (mine, old, others):
        file.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    assert len(names(tmp_path)) >= 5
    write_file(tmp_path / "a", "whole", *WORDS)
    assert names(tmp_path) == sorted([mine.name, others.name, "a"])


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_a_folder_takes_the_others_place_or_leaves_it(tmp_path):
    out = tmp_path / "model"
    for content in ("first", "second"):
        with writing_folder(out, *WORDS) as filled:
            assert filled.name == "model"
            (filled / content).write_text(content)
        assert names(tmp_path) == ["model", f"model/{content}"]
    with full_disk(10), pytest.raises(CheckpointError, match="Could not write the thing to .*model'.*Make room"):
        with writing_folder(out, *WORDS) as filled:
            (filled / "second").write_text("n" * 1000)
    with pytest.raises(KeyError), writing_folder(out, *WORDS) as filled:
        (filled / "x").touch()
        raise KeyError
    assert names(tmp_path) == ["model", "model/second"] and (out / "second").read_text() == "second"


def test_a_folder_put_away_by_a_killed_run_comes_back(tmp_path):
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "kept").touch()
    with pytest.raises(KeyError), writing_folder(tmp_path / "model", *WORDS):
        raise KeyError
    assert names(tmp_path) == ["model", "model/kept"]


def test_a_link_in_a_folders_place_does_not_lead_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    with writing_folder(tmp_path / "model", *WORDS) as filled:
        (filled / "new").touch()
    assert names(tmp_path) == ["elsewhere", "elsewhere/precious", "model", "model/new"]


def test_files_go_into_a_folder_together_and_replace_what_belongs_to_them(tmp_path):
    for name in ("model-1.bin", "model-2.bin", "other"):
        (tmp_path / name).write_text("old")
    with writing_into(tmp_path, *WORDS, replaces=("model*.bin",)) as filled:
        (filled / "below").mkdir()
        (filled / "below" / "a").touch()
    with writing_into(tmp_path, *WORDS, replaces=("model*.bin",)) as filled:
        (filled / "model.bin").write_text("new")
    assert names(tmp_path) == ["below", "below/a", "model.bin", "other"]
    with full_disk(10), pytest.raises(CheckpointError), writing_into(tmp_path, *WORDS) as filled:
        (filled / "other").write_text("new")
        (filled / "model.bin").write_text("n" * 1000)
    assert names(tmp_path) == ["below", "below/a", "model.bin", "other"] and (tmp_path / "other").read_text() == "old"


# ---- Lines ----------------------------------------------------------------------------------------------------------


def test_lines_of_several_processes_do_not_mix(tmp_path):
    code = """
import sys
from distill_trainers.storage import RecordStore
store = RecordStore(sys.argv[1])
for number in range(50):
    store.append([{"key": f"{sys.argv[2]}{number}-{i}", "text": sys.argv[2] * 3000} for i in range(8)])
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(RecordStore(tmp_path).load()) == 800
    # One that looks while the other writes may take its line for half a one: an empty line more, which nobody reads.
    assert len([line for line in (tmp_path / "part-00000.jsonl").read_text().splitlines() if line]) == 800


def test_lines_after_a_full_disk_are_whole(tmp_path):
    store = RecordStore(tmp_path)
    store.append([{"key": "a"}])
    with (
        full_disk(30),
        pytest.raises(CheckpointError, match="Could not write rationales .*MiB are free there. What was written"),
    ):
        store.append([{"key": "b", "text": "n" * 1000}])
    store.append([{"key": "c"}])
    assert store.load().keys() == {"a", "c"}
    append_lines(tmp_path / "new" / "x.jsonl", ["é", "\ud800"], *WORDS)
    assert (tmp_path / "new" / "x.jsonl").read_text(encoding="utf-8") == "é\n?\n"


# ---- Everywhere -----------------------------------------------------------------------------------------------------

# Calls that write, by file: why they are no danger.
ALLOWED = {
    ("gguf.py", "open"): "into a scratch folder of storage's",
    ("gguf.py", "symlink_to"): "into a scratch folder of storage's",
    ("gguf.py", "save_pretrained"): "into a folder of `writing_folder`",
    ("locks.py", "open"): "made by the one process that holds the lock; readers bear half a file",
    ("cli/train.py", "save_pretrained"): "into a folder of `writing_folder`",
    ("cli/rationales.py", "save_to_disk"): "into a folder of `writing_folder`",
    ("trainers/lifecycle/publishing.py", "save_pretrained"): "into a folder of `writing_folder`",
    ("trainers/lifecycle/publishing.py", "save_to_json"): "into a folder of `writing_into`",
    ("cards/plots.py", "savefig"): "into memory",
    ("cards/dataset_card.py", "to_parquet"): "into a temporary folder that is uploaded and gone",
    ("cards/dataset_card.py", "TemporaryDirectory"): "of the system, uploaded and gone",
    ("cli/last_net.py", "mkstemp"): "a traceback; what went wrong may be the storage",
    ("cli/last_net.py", "open"): "likewise",
    ("trainers/lifecycle/thrift.py", "open"): "into a checkpoint, whose manifest comes last",
    ("rollouts/vllm.py", "mkdtemp"): "the folder by which weights go to vLLM: made anew for each sync, read once",
    ("rollouts/vllm.py", "save_file"): "into that folder",
    ("rollouts/vllm.py", "save_pretrained"): "into that folder",
    ("cli/recipes.py", "copytree"): "into a folder of `writing_folder`",
    ("cli/proof.py", "TemporaryDirectory"): "of the system, gone with the command",
}
WRITERS = {"write_text", "write_bytes", "savefig", "save_pretrained", "save_to_disk", "save_to_json", "to_parquet"}
WRITERS |= {"to_json", "to_csv", "save_file", "copy", "copyfile", "copytree", "move", "symlink_to", "mkstemp"}
WRITERS |= {"mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "tofile"}
MODULES = {"copy": {"shutil"}, "move": {"shutil"}, "to_json": set()}  # of a name with other meanings


def writes_of(tree):
    """Calls that may write a file: (line, name)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        of = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        if name == "open":
            place = 0 if isinstance(function, ast.Attribute) and of not in ("os", "io") else 1
            given = [*node.args[place : place + 1], *(k.value for k in node.keywords if k.arg == "mode")]
            modes = [m.value for m in given if isinstance(m, ast.Constant) and isinstance(m.value, str)]
            if any(set(mode) & set("wax+") for mode in modes):
                yield node.lineno, name
        elif name in WRITERS and (name not in MODULES or of in MODULES[name]):
            yield node.lineno, name
        elif (of, name) in {("torch", "save"), ("json", "dump"), ("pickle", "dump"), ("yaml", "dump")}:
            if name != "dump" or len(node.args) > 1:
                yield node.lineno, name


def test_the_walk_finds_writers():
    code = 'open(p, "w"); p.open("ab"); p.open(mode="x"); p.write_text(""); shutil.copy(a, b); torch.save(x, p)\n'
    code += 'open(p); p.open("rb"); archive.open(name); d.copy(); json.dumps(x)'
    found = [name for _, name in writes_of(ast.parse(code))]
    assert sorted(found) == ["copy", "open", "open", "open", "save", "write_text"]


def test_nothing_writes_but_storage():
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name != "storage.py":
            for line, call in writes_of(ast.parse(file.read_text(encoding="utf-8"))):
                found.setdefault((name, call), []).append(line)
    new = {place: lines for place, lines in found.items() if place not in ALLOWED}
    assert not new, f"write through storage.py (`write_file`, `writing_folder`, `append_lines`): {new}"
    assert ALLOWED.keys() <= found.keys(), "these write no more: strike them"
