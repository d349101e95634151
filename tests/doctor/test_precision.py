"""What the doctor says of dtypes."""

from types import SimpleNamespace

import pytest

from distill_trainers.doctor import precision
from distill_trainers.doctor.several import TeacherOnPaper
from distill_trainers.models.precision import Products


@pytest.mark.parametrize("on_cpu", [True, False])
def test_dtypes_of_several_teachers_are_looked_at_as_that_of_one(monkeypatch, on_cpu):
    monkeypatch.setattr(precision, "products_of", lambda config: Products(62, 9))
    shape, dtype, mode = SimpleNamespace(parameters=10**9), *(("bfloat16", "no") if on_cpu else ("float32", "bf16"))
    case = SimpleNamespace(
        args=SimpleNamespace(bf16=not on_cpu, fp16=False),
        launch=SimpleNamespace(name="", mixed_precision=mode, on_cpu=on_cpu, by_deepspeed=False),
        student_dtype="float32",
        student_config=None,
        peft=False,
        teacher_dtype="float32",
        teacher_shape=None,
        teachers={
            "large": TeacherOnPaper(shape, "replicate", dtype),
            "adapter": TeacherOnPaper(shape, "replicate", dtype, shares=True),
            "away": TeacherOnPaper(None, "remote"),
        },
    )
    (found,) = precision.check_precision(case)
    words = "multiplies slower in bfloat16" if on_cpu else "Teachers are loaded in float32 (4.0 GB)"
    assert words in found.what and "teacher_model_init_kwargs: {dtype: " in found.remedy
