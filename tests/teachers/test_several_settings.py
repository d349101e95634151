"""Several teachers beside settings of one: what would be wrong in silence is right, or refused."""

import pytest
from datasets import Dataset

from distill_trainers.exceptions import ConfigurationError
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
