"""Loading: every local format, folders, missing and broken files, and held-out rows."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from distill_trainers.data.formats import first_row
from distill_trainers.data.loading import load_split, train_eval_split
from distill_trainers.exceptions import ConfigurationError, DatasetError

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(4)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path):
    dataset = Dataset.from_list(ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path.parent / "arrow")
        next((path.parent / "arrow").glob("*.arrow")).rename(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_files(tmp_path, suffix, streaming):
    dataset = load_split(write(tmp_path / f"rows.{suffix}"), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == ROWS


def test_json_lines_in_a_json_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert list(load_split(str(path))) == ROWS


def test_text_files_have_a_row_a_line(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one\ntwo\n")
    assert list(load_split(str(path))) == [{"text": "one"}, {"text": "two"}]


def test_a_file_answers_to_any_split_and_slice(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert list(load_split(path, split="test")) == ROWS
    assert list(load_split(path, split="validation[1:3]")) == ROWS[1:3]


def test_columns_are_mapped(tmp_path):
    dataset = load_split(write(tmp_path / "rows.jsonl"), column_mapping={"prompt": "question"})
    assert sorted(dataset.column_names) == ["completion", "question"]


def test_folders_of_files(tmp_path):
    write(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "LICENSE").write_text("free")
    assert list(load_split(str(tmp_path))) == ROWS
    assert list(load_split(str(tmp_path), split="test")) == ROWS[:1]
    assert list(load_split(str(tmp_path), data_files="test.jsonl")) == ROWS[:1]
    with pytest.raises(DatasetError, match="split 'dev'"):
        load_split(str(tmp_path), split="dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_from_save_to_disk(tmp_path, streaming):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(dev=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "several")
    assert list(load_split(str(tmp_path / "one"), streaming=streaming)) == ROWS
    assert list(load_split(str(tmp_path / "several"), split="dev", streaming=streaming)) == ROWS
    with pytest.raises(DatasetError, match=r"splits \['dev'\], not 'train'"):
        load_split(str(tmp_path / "several"))


@pytest.mark.parametrize("text", ["./none", "/none/there", "~/none.jsonl", "none.parquet"])
def test_missing_paths_are_not_looked_up_on_the_hub(monkeypatch, text):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(DatasetError, match="no such file or folder"):
        load_split(text)


def test_a_missing_file_in_a_present_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DatasetError, match="looked for .*data/none"):
        load_split("data/none")


def test_hub_names_reach_the_hub_and_its_refusal_is_explained(monkeypatch):
    asked = {}

    def load_dataset(source, **settings):
        asked.update(settings, source=source)
        raise FileNotFoundError("Dataset 'owner/none' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DatasetError, match="Could not load 'owner/none'.*doesn't exist on the Hub"):
        load_split("owner/none", name="main", split="test", streaming=True)
    assert asked == {
        "source": "owner/none",
        "name": "main",
        "split": "test",
        "data_files": None,
        "streaming": True,
    }


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("rows.jsonl", "", "empty file"),
        ("rows.json", "[]", "rows"),
        ("rows.csv", "prompt,completion\n", "no data"),
        ("rows.jsonl", '{"prompt": ', "Could not load"),
        ("rows.parquet", "not parquet", "Could not load"),
        ("rows.xlsx", "x", "unknown suffix '.xlsx'"),
    ],
)
def test_files_without_rows_are_refused(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_split(str(tmp_path / file))


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DatasetError, match="no dataset in it"):
        load_split(str(tmp_path))


@pytest.mark.parametrize(("asked", "held_out"), [(0.25, 25), (0.001, 1), (10, 10)])
def test_rows_are_held_out_by_seed(asked, held_out):
    dataset = Dataset.from_dict({"text": [str(i) for i in range(100)]})
    train, held = train_eval_split(dataset, asked, seed=3)
    again, other = train_eval_split(dataset, asked, seed=3)[1], train_eval_split(dataset, asked, seed=4)[1]
    assert len(held) == held_out and len(train) == 100 - held_out
    assert not set(train["text"]) & set(held["text"])
    assert held["text"][:] == again["text"][:] != other["text"][:]


def test_a_stream_holds_out_its_first_rows():
    stream = Dataset.from_dict({"text": list("abcd")}).to_iterable_dataset()
    train, held = train_eval_split(stream, 1, seed=0)
    assert [row["text"] for row in held] == ["a"] and [row["text"] for row in train] == list("bcd")
    with pytest.raises(ConfigurationError, match="number of rows"):
        train_eval_split(stream, 0.5, seed=0)


def test_impossible_shares_are_refused():
    dataset = Dataset.from_dict({"text": list("abcd")})
    for asked in (0, -1, 0.0, 1.0, True, 1.5):
        with pytest.raises(ConfigurationError, match="hold out"):
            train_eval_split(dataset, asked, seed=0)
    with pytest.raises(DatasetError, match="4 of 4 rows"):
        train_eval_split(dataset, 4, seed=0)


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


DAMAGES = {
    "no dataset_info": lambda folder: (folder / "dataset_info.json").unlink(),
    "no rows": lambda folder: next(folder.glob("*.arrow")).unlink(),
    "cut rows": lambda folder: cut(next(folder.glob("*.arrow")), 100),
    "empty rows": lambda folder: cut(next(folder.glob("*.arrow")), 0),
    "cut state": lambda folder: cut(folder / "state.json", 9),
    "state of a list": lambda folder: (folder / "state.json").write_text("[]"),
    "state of nothing": lambda folder: (folder / "state.json").write_text("{}"),
    "cut info": lambda folder: cut(folder / "dataset_info.json", 9),
    "info of a list": lambda folder: (folder / "dataset_info.json").write_text("[]"),
    "other columns": lambda folder: (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"prompt": {"dtype": "int64", "_type": "Value"}}})
    ),
    "no such type": lambda folder: (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"prompt": {"dtype": "int64", "_type": "Nothing"}}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_folders_of_save_to_disk_are_named(tmp_path, damage, streaming):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DAMAGES[damage](tmp_path / "saved")
    with pytest.raises(DatasetError, match="saved.*cannot be read: .*make or fetch them again"):
        load_split(str(tmp_path / "saved"), streaming=streaming)


@pytest.mark.parametrize("told", ["{", "[]"])
def test_damaged_folders_of_several_splits_are_named(tmp_path, told):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/dataset_dict.json").write_text(told)
    with pytest.raises(DatasetError, match="cannot be read"):
        load_split(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a.parquet", b""),
        ("b.parquet", b"PAR1xxxx"),
        ("c.jsonl", b'{"prompt": "a"}\n{"prompt": "b'),
        ("d.jsonl", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-5]),
        ("e.jsonl", '{"prompt": "é"}'.encode("latin-1")),
        ("f.csv", "prompt\né\n".encode("latin-1")),
        ("g.json", b"[" * 5000),
        ("h.txt", b"\xff\xfe\x00"),
        ("i.arrow", b"xx"),
        ("j.jsonl", b"\0" * 50),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_are_named_by_their_first_row_at_the_latest(tmp_path, name, written, streaming):
    (tmp_path / name).write_bytes(written)
    with pytest.raises(DatasetError):
        first_row(load_split(str(tmp_path / name), streaming=streaming))


@pytest.mark.parametrize("name", ["x" * 5000 + ".jsonl", "a\0b.jsonl"], ids=["long", "NUL"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(DatasetError, match="no such file"):
        load_split(name)
