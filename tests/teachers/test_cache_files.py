"""Shards on disk: what is written comes back, and what is damaged, unfinished or foreign does not."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from distill_trainers import storage
from distill_trainers.exceptions import CacheError
from distill_trainers.teachers.cache import shards as cache_files
from distill_trainers.teachers.cache.shards import TeacherCache
from distill_trainers.teachers.rows import row_key


def row(number, tokens=3):
    generator = torch.Generator().manual_seed(number)
    return {
        "hidden": torch.randn(tokens, 4, generator=generator, dtype=torch.bfloat16),
        "ids": torch.randint(0, 99, (2 * tokens + number,), generator=generator, dtype=torch.int32),
    }


def key(number):
    return row_key([number, 7], [0])


def fill(cache, numbers):
    for number in numbers:
        cache.add(key(number), row(number), 3)
    cache.flush()


def assert_holds(cache, numbers):
    for number in numbers:
        found = cache.read(key(number))
        assert found is not None, number
        assert found.keys() == row(number).keys()
        for name, values in row(number).items():
            assert found[name].dtype == values.dtype and torch.equal(found[name], values)


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_keys_follow_the_tokens_and_the_trained_positions():
    keys = [
        row_key([1, 2, 3], [1]),
        row_key([1, 2, 4], [1]),
        row_key([1, 2, 3], [0]),
        row_key([1, 2, 3], [0, 1]),
        row_key([1, 2, 3, 1], []),
        row_key([1, 2], [3, 1]),
    ]
    assert len(set(keys)) == len(keys)
    assert row_key(torch.tensor([1, 2, 3]).numpy(), [1]) == keys[0]


def test_rows_come_back_from_memory_from_disk_and_in_a_new_process(tmp_path):
    cache = TeacherCache(tmp_path / "new" / "folder", "stamp")
    cache.add(key(0), row(0), 3)
    assert_holds(cache, [0])
    assert not shards(cache.folder)
    fill(cache, [1, 2])
    assert_holds(cache, [0, 1, 2])
    again = TeacherCache(cache.folder, "stamp")
    assert_holds(again, [2, 0, 1])
    assert (len(again), again.num_tokens, again.num_shards) == (3, 9, 1)
    assert key(3) not in again and again.read(key(3)) is None


def test_a_full_shard_is_written_out(tmp_path):
    cache = TeacherCache(tmp_path, "stamp", shard_bytes=2 * sum(v.nbytes for v in row(0).values()))
    for number in range(4):
        cache.add(key(number), row(number), 3)
    assert len(shards(tmp_path)) == 2
    assert_holds(TeacherCache(tmp_path, "stamp"), range(4))


def test_many_shards_keep_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_files, "_OPEN_FILES", 3)
    cache = TeacherCache(tmp_path, "stamp", shard_bytes=1)
    for number in range(8):
        cache.add(key(number), row(number), 3)
    assert_holds(cache, [*range(8), *range(8)])
    assert len(cache._files) == 3


def test_two_writers_are_kept_apart_and_see_each_other(tmp_path):
    one, two = TeacherCache(tmp_path, "stamp"), TeacherCache(tmp_path, "stamp")
    fill(one, [0, 1])
    fill(two, [1, 2])
    assert len(shards(tmp_path)) == 2
    one.refresh()
    two.refresh()
    for cache in (one, two, TeacherCache(tmp_path, "stamp")):
        assert_holds(cache, [0, 1, 2])
        assert len(cache) == 3


def test_many_read_while_one_writes(tmp_path):
    writer = TeacherCache(tmp_path, "stamp", shard_bytes=1)
    failures, seen = [], []

    def read():
        reader = TeacherCache(tmp_path, "stamp")
        while len(reader) < 20:
            reader.refresh()
        try:
            assert_holds(reader, range(20))
            seen.append(dict(reader.damaged))
        except AssertionError as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(20):
        writer.add(key(number), row(number), 3)
    for reader in readers:
        reader.join(timeout=60)
    assert not failures and seen == [{}] * 4


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_shard_is_found_when_opened(tmp_path, caplog, kept):
    cache = TeacherCache(tmp_path, "stamp")
    fill(cache, [0])
    fill(cache, [1])
    first = min(shards(tmp_path), key=lambda path: path.name)
    data = first.read_bytes()
    first.write_bytes(data[:kept])
    again = TeacherCache(tmp_path, "stamp")
    assert again.read(key(0)) is None and again.damaged.keys() == {first.name}
    assert_holds(again, [1])
    assert "cannot be opened" in caplog.text
    assert again.remove_unreadable() == [first.name] and not first.exists()
    fill(again, [0])
    assert_holds(TeacherCache(tmp_path, "stamp"), [0, 1])


def test_a_folder_in_a_shard_s_place_is_named(tmp_path):
    cache = TeacherCache(tmp_path, "stamp")
    fill(cache, [0])
    (path,) = shards(tmp_path)
    path.unlink()
    path.mkdir()
    again = TeacherCache(tmp_path, "stamp")
    assert again.damaged.keys() == {path.name} and again.read(key(0)) is None
    with pytest.raises(CacheError, match=f"{path.name} .*neither opened nor removed"):
        again.remove_unreadable()


def test_a_flipped_bit_is_found_when_read_and_the_row_can_be_written_anew(tmp_path, caplog):
    cache = TeacherCache(tmp_path, "stamp")
    fill(cache, [0, 1])
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    wanted = row(0)["hidden"].view(torch.uint8).numpy().tobytes()
    data[data.index(wanted)] ^= 1
    path.write_bytes(data)
    again = TeacherCache(tmp_path, "stamp")
    assert key(0) in again and again.read(key(0)) is None
    assert key(0) not in again
    assert_holds(again, [1])
    assert "checksum" in caplog.text and "checksum" in again.damaged[path.name]
    assert again.remove_unreadable() == [] and path.exists()  # row 1 is still good
    os.utime(path, ns=(1, 1))  # later shards come later, whatever the clock's resolution
    fill(again, [0])
    assert_holds(TeacherCache(tmp_path, "stamp"), [0, 1])


def test_a_flipped_bit_in_the_index_is_found(tmp_path):
    cache = TeacherCache(tmp_path, "stamp")
    fill(cache, [0])
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(key(0))] ^= 1
    path.write_bytes(data)
    again = TeacherCache(tmp_path, "stamp")
    assert len(again) == 0 and "index" in again.damaged[path.name]


def test_shards_of_another_identity_are_left_alone(tmp_path, caplog):
    fill(TeacherCache(tmp_path, "one"), [0])
    other = TeacherCache(tmp_path, "two")
    assert len(other) == 0 and "another identity" in caplog.text
    assert other.remove_unreadable() == [] and len(shards(tmp_path)) == 1


def test_a_vanished_shard_is_a_miss(tmp_path):
    cache = TeacherCache(tmp_path, "stamp")
    fill(cache, [0])
    again = TeacherCache(tmp_path, "stamp")
    shards(tmp_path)[0].unlink()
    assert again.read(key(0)) is None


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path, "stamp")
    fill(cache, [0])
    before = sorted(path.name for path in tmp_path.iterdir())
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "open", lambda *args, **kwargs: Full(real(*args, **kwargs)), raising=False)
    with pytest.raises(CacheError, match=r"No space left on device.*MiB are free.*intact"):
        fill(cache, [1])
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_holds(TeacherCache(tmp_path, "stamp"), [0])
    cache.flush()  # room was made: what had come together is not lost
    assert_holds(TeacherCache(tmp_path, "stamp"), [0, 1])


WRITER = textwrap.dedent(
    """
    import os, sys, torch
    from distill_trainers.teachers.cache import shards as cache_files
    from distill_trainers.teachers.cache.shards import TeacherCache
    from distill_trainers.teachers.rows import row_key

    cache = TeacherCache(sys.argv[1], "stamp")
    cache.add(row_key([0, 7], [0]), {"hidden": torch.zeros(2, 3)}, 2)
    cache.flush()
    cache.add(row_key([1, 7], [0]), {"hidden": torch.zeros(2, 3)}, 2)

    def stall(number):  # the shard's bytes are in its temporary file, which has not been renamed
        print("writing", flush=True)
        sys.stdin.read()

    os.fsync = stall
    cache.flush()
    """
)


@pytest.mark.slow
def test_a_killed_writer_loses_its_unfinished_shard_only(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "writing"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    (left,) = tmp_path.glob(".*.tmp")
    cache = TeacherCache(tmp_path, "stamp")
    assert key(0) in cache and key(1) not in cache and not cache.damaged
    fill(cache, [1])
    assert not left.exists()  # its writer is dead
    fill(TeacherCache(tmp_path, "stamp"), [2])
    assert len(TeacherCache(tmp_path, "stamp")) == 3


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be made"):
        TeacherCache(tmp_path / "file" / "cache", "stamp")
