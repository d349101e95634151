"""Several teachers beside settings of one: what would be wrong in silence is right, or refused."""

import pytest
import torch
from datasets import Dataset

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.teachers import ComposedTeacher, RoutedTeacher, Teacher
from distill_trainers.toy import addition_rows

PAIR_ROWS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "0"} for row in addition_rows(8)]


@pytest.mark.parametrize(
    ("several", "settings"),
    [
        (False, {"extrapolate": {"reference": "initial", "scale": 3.0}}),
        (True, {"teacher_mix": "geometric"}),
    ],
    ids=["moved away", "mixed"],
)
def test_log_probabilities_of_composed_teachers_are_not_kept_as_those_of_one(
    make_trainer, saved, tmp_path, monkeypatch, several, settings
):
    """The store knows a teacher by its files: a plain run on the same folder would read the composed one's answers."""
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *a, **k: pytest.fail("loaded"))
    teacher = {"a": saved.teacher, "b": saved.student} if several else saved.teacher
    kept = {"method": "dpkd", "train": Dataset.from_list(PAIR_ROWS), "reference_logps_dir": str(tmp_path / "kept")}
    with pytest.raises(ConfigurationError, match="`reference_logps_dir` with the teachers .*expected one model"):
        make_trainer(saved.student, teacher, **kept, **settings)


class Stateful(Teacher):
    """Has one number that must survive, and counts what it hears."""

    provides = frozenset({"distribution"})

    def __init__(self, number):
        self.number, self.heard = torch.tensor(float(number)), []

    def prepare(self, accelerator):
        self.heard.append("prepare")

    def begin(self):
        self.heard.append("begin")

    def after_step(self):
        self.heard.append("after_step")

    def state(self):
        return {"number": self.number}

    def load_state(self, tensors):
        self.number = tensors["number"]

    def signal(self, inputs, predicts, vocab_size):
        raise NotImplementedError

    def fingerprint(self):
        return str(self.number)


def moved(*pairs):
    """Teachers by hand: each moved away from a reference of its own, by the names `teacher` and `reference`."""
    return RoutedTeacher({n: ComposedTeacher.extrapolate(*t, 1.25) for n, t in zip("abc", pairs, strict=False)})


def test_teachers_that_their_owners_call_alike_all_hear_of_the_run_and_keep_their_states():
    four = [Stateful(number) for number in range(4)]
    teacher = moved(four[:2], four[2:])
    assert list(teacher.leaves) == ["a.reference", "a.teacher", "b.reference", "b.teacher"] == list(teacher.parts)
    teacher.prepare(None), teacher.begin(), teacher.after_step()
    assert all(member.heard == ["prepare", "begin", "after_step"] for member in four)
    kept = teacher.state()
    assert len(kept) == 4
    again = [Stateful(-1) for _ in range(4)]
    moved(again[:2], again[2:]).load_state(kept)
    assert [member.number.item() for member in again] == [0, 1, 2, 3]


def test_one_reference_of_several_keeps_its_short_name_and_names_that_stay_alike_are_refused():
    shared, first, second = map(Stateful, range(3))
    assert list(moved((first, shared), (second, shared)).leaves) == ["reference", "a.teacher", "b.teacher"]
    inner = moved((first, shared)).members["a"]
    with pytest.raises(ConfigurationError, match="4 teachers under the 3 names .*Rename one"):
        RoutedTeacher(
            {"a": inner, "b": ComposedTeacher.mix({"teacher": second}), "a.teacher": Stateful(3)}
        )
