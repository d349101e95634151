"""Files that are cut, changed, emptied, taken away, mixed up or closed: refused by name, or the result is the same."""

import shutil
from functools import partial

import pytest

WAYS = ("cut", "flipped", "emptied", "removed", "a folder", "another's", "closed", "longer")
# What only a checksum could tell, in files that others wrote and that have none.
OF_OTHERS = tuple(way for way in WAYS if way != "flipped")


def harm(file, way, chance):
    """Damage a file in one way; what it had held if it is to be seen."""
    data = file.read_bytes()
    if way == "cut":
        file.write_bytes(data[: chance.randrange(1, max(2, len(data) - 1))])
    elif way == "flipped":
        place = chance.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :])
    elif way == "emptied":
        file.write_bytes(b"")
    elif way == "removed":
        file.unlink()
    elif way == "a folder":
        file.unlink()
        file.mkdir()
    elif way == "another's":
        others = [f for f in sorted(file.parent.iterdir()) if f.is_file() and f != file and f.read_bytes() != data]
        file.write_bytes(chance.choice(others).read_bytes() if others else b"{}")
    elif way == "closed":
        file.chmod(0)
    elif way == "longer":
        file.write_bytes(data + chance.randbytes(chance.randrange(1, 64)))


def outcome(lab, name, work, done, file):
    """`survived`, `refused` or `silent`; else what is wrong with the refusal, in words."""
    if done.code in lab.codes(name) and not done.plain and "Traceback" not in done.text:
        return "survived" if lab.same(name, work) else "silent"
    folders = [str(folder) for folder in file.parents if folder != work and folder.is_relative_to(work)]
    named = any(part in done.error for part in (file.name, file.parent.name, *folders))
    return "refused" if done.plain and named else f"badly refused: exit {done.code}, {done.error[-600:]}"


@pytest.fixture
def damage_in(ledger, chance, share):
    """`damage_in(lab, kind, name, start, files, ways, again)`: harm each file in each way, start the job, and count."""

    def run(lab, kind, name, start, files, ways=WAYS, again=None, takes=share):
        lab.reference(name)
        wrong = []
        for pattern in files:
            for way in ways:
                if chance.random() > takes:
                    continue
                work = start()
                found = sorted(work.glob(pattern))
                assert found, f"no {pattern}: {sorted(str(f.relative_to(work)) for f in work.rglob('*'))}"
                file = chance.choice(found)
                harm(file, way, chance)
                fault = {"limits": True} if way == "closed" else None
                done = (again or lab.again)(name, work, fault=fault)
                what = outcome(lab, name, work, done, file)
                if what in ("survived", "refused", "silent"):
                    ledger(f"damaged: {kind}", what)
                if what not in ("survived", "refused"):
                    more = lab.difference(name, work) if what == "silent" else ""
                    wrong.append(f"{file.relative_to(work)} {way}: {what} {more}")
                    print(wrong[-1], flush=True)
                lab.forget(work)
        assert not wrong, "\n" + "\n".join(wrong)

    return run


@pytest.fixture
def damage(lab, damage_in):
    return partial(damage_in, lab)


def test_a_taste_of_damage(quick_lab, damage_in):
    files, ways = ["verdicts/part-*.jsonl"], ("flipped", "a folder")
    damage_in(quick_lab, "texts that were kept", "verify", lambda: quick_lab.finished("verify"), files, ways, takes=1.0)


@pytest.fixture
def stopped(lab):
    """`stopped(name)`: makes copies of a run's folder as it was when its checkpoint of step 6 was the newest."""

    def make(name):
        def start():
            work = lab.finished(name)
            shutil.rmtree(work / "out" / "checkpoint-8")
            return work

        return start

    return make


CHECKPOINT = ["config.json", "generation_config.json", "manifest.json", "model.safetensors", "optimizer.pt"]
CHECKPOINT += ["rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"]
CHECKPOINT += ["training_args.bin", "distill_state.json", "distill_state.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_checkpoint(damage, stopped, name):
    damage("checkpoint", "on-policy", stopped("on-policy"), [f"out/checkpoint-6/{name}"])


@pytest.mark.slow
def test_a_damaged_record_of_a_run(damage, stopped):
    files = ["out/run.json", "out/evaluate.json", "out/trainer_state.json", "out/metrics.json", "out/README.md"]
    damage("run's records", "on-policy", stopped("on-policy"), files)


@pytest.mark.slow
def test_a_damaged_initial_student(lab, damage):
    """Made from the teacher's layers by a run that ended before its first checkpoint."""

    def start():
        work = lab.finished("off-policy")
        for checkpoint in (work / "out").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return work

    names = ("manifest.json", "model.safetensors", "config.json", "tokenizer.json")
    damage("initial student", "off-policy", start, [f"out/student_init/{name}" for name in names])


@pytest.mark.slow
def test_a_damaged_teacher_cache(lab, damage):
    """A flipped byte of a row is not among them: it is found when the row is read; see tests/teachers."""
    damage("teacher cache", "cache-teacher", lambda: lab.finished("cache-teacher"), ["cache/identity.json"])
    ways = [way for way in WAYS if way != "flipped"]
    shards = ["cache/shard-*.safetensors"] * 2
    damage("teacher cache", "cache-teacher", lambda: lab.finished("cache-teacher"), shards, ways)


STORES = {
    "extract": ["responses/part-*.jsonl"],
    "verify": ["verdicts/part-*.jsonl"],
    "pairs": [
        "pairs.jsonl.parts/*/part-*.jsonl",
        "pairs.jsonl.parts/*/ends/part-*.jsonl",
        "pairs.jsonl.parts/*/identity.json",
    ],
    "evaluate": ["out/cache/**/part-*.jsonl", "out/cache/**/*.json"],
    "seq_kd": ["out/completions/*/part-*.jsonl", "out/completions/*/identity.json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_a_damaged_store_of_texts(lab, damage, name):
    def start():
        work = lab.finished(name)
        for checkpoint in work.glob("out/checkpoint-*"):
            shutil.rmtree(checkpoint)
        return work

    damage("texts that were kept", name, start, STORES[name])


@pytest.mark.slow
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_damaged_model_folder(lab, damage, role):
    """It belongs to others and has no checksums: what can be seen is refused before a step is taken."""

    def start():
        work = lab.new("on-policy")
        shutil.copytree(lab.shop / role, work / role)
        return work

    def again(name, work, **more):
        return lab.run(
            name, work, f"--{'' if role == 'student' else 'teacher_'}model_name_or_path", str(work / role), **more
        )

    files = [
        f"{role}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    damage("model folder", "on-policy", start, files, OF_OTHERS, again)


@pytest.mark.slow
def test_a_damaged_dataset_folder(lab, damage):
    from datasets import Dataset, DatasetDict

    def start():
        work = lab.new("on-policy")
        rows = Dataset.from_json(str(lab.shop / "train.jsonl"), cache_dir=str(work.parent / "arrow"))
        DatasetDict({"train": rows}).save_to_disk(str(work / "data"))
        return work

    def again(name, work, **more):
        return lab.run(name, work, "--dataset", str(work / "data"), **more)

    files = ["data/dataset_dict.json", "data/train/state.json", "data/train/dataset_info.json", "data/train/*.arrow"]
    damage("dataset folder", "on-policy", start, files, OF_OTHERS, again)


@pytest.mark.slow
def test_a_damaged_file_of_rows(lab, damage):
    """Rows of one stage that another reads. Cut between two lines it is a shorter file, and nobody can tell."""

    def start():
        work = lab.new("verify")
        shutil.copy(lab.shop / "train.jsonl", work)
        return work

    damage("file of rows", "verify", start, ["parsed.jsonl"], ("emptied", "removed", "a folder", "another's", "closed"))
