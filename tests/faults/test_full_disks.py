"""Disks that are full at any write: what was there stays whole, the message names space and remedy, and it goes on."""

import shutil

import pytest

JOBS = (
    "off-policy",
    "on-policy",
    "minillm",
    "dpkd",
    "rationale",
    "seq_kd",
    "cache-teacher",
    "extract",
    "verify",
    "evaluate",
    "pairs",
)
WAYS = ("no space", "no space", "small files", "small disk")


def full_at(chance, events, kib, way):
    """Where the disk ends: at a write, at a byte of any file, or at a byte of all."""
    if way == "no space":
        return {"event": chance.randint(1, events), "full": True}
    if way == "small files":
        return {"file_bytes": int(2 ** chance.uniform(4, 18))}
    return {"disk_kib": 4 * chance.randint(1, max(2, kib // 4))}


def size_kib(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1024 + 1


def check_whole(work):
    """Checkpoints that say that they are whole are."""
    from distill_trainers.manifest import damage_of
    from distill_trainers.run_files import is_complete

    for folder in filter(is_complete, work.glob("out/checkpoint-*")):
        assert damage_of(folder) is None, f"{folder.name}: {damage_of(folder)}"


def fill_and_go_on(lab, ledger, chance, name, ways):
    """Let the disk be full once in each way, then start the command again with room."""
    events = lab.reference(name)[1]
    kib = size_kib(lab.folders[name])
    wrong = []
    for way in ways:
        fault, work = full_at(chance, events, kib, way), lab.new(name)
        done = lab.run(name, work, fault=fault)
        if "unshare" in done.text or "] mount" in done.text:  # a machine that gives no disk of one's own
            lab.forget(work)
            continue
        if "disk_kib" in fault:
            shutil.rmtree(work)
            shutil.copytree(f"{done.log}.disk", work, copy_function=shutil.copy2)
        check_whole(work)
        ended = done.code in lab.codes(name) and not done.plain and "Traceback" not in done.text
        if not ended and not (done.plain and "free" in done.error):
            wrong.append(f"{fault}: exit {done.code}, {done.error[-700:]}")
        again = done if ended else lab.again(name, work)
        if again.code not in lab.codes(name) or "Traceback" in again.text:
            wrong.append(f"{fault}, then again: exit {again.code}, {again.error[-700:]}")
        else:
            same = lab.same(name, work)
            ledger(f"full disk: {name}", "survived" if same else "silent")
            wrong += [] if same else [f"{fault}: {lab.difference(name, work)}"]
        print(*wrong[-1:], flush=True)
        lab.forget(work)
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_taste_of_full_disks(quick_lab, ledger, chance):
    fill_and_go_on(quick_lab, ledger, chance, "verify", ("no space", "small files"))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_full_disk(lab, ledger, chance, share, name):
    """Each way at a share of a half and more."""
    ways = chance.sample(WAYS, min(len(WAYS), max(2, round(2 * len(WAYS) * share))))
    fill_and_go_on(lab, ledger, chance, name, ways)
