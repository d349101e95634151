"""Several teachers beside settings of one: what would be wrong in silence is right, or refused."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.teachers import ComposedTeacher, LocalTeacher, RoutedTeacher, Teacher
from distill_trainers.toy import addition_rows, tiny_llama

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
        RoutedTeacher({"a": inner, "b": ComposedTeacher.mix({"teacher": second}), "a.teacher": Stateful(3)})


# ---- A prompt of the teacher's own ----------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
PLAIN = {"prompt": "1+1=", "completion": "2"}
HASHES = "{% for m in messages %}##{{ m['role'] }} {{ m['content'] }} {% endfor %}##assistant "


@pytest.fixture
def folders(make_tokenizer, tmp_path):
    """A student, and teachers of which `a` and `b` have one other template, and `c` has the student's."""
    tok = make_tokenizer()
    for name, template in (("student", None), ("a", HASHES), ("b", HASHES), ("c", None)):
        own = copy.deepcopy(tok)
        own.chat_template = template or tok.chat_template
        own.save_pretrained(tmp_path / name)
        tiny_llama(own, 16, 1).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("student", "a", "b", "c")}


@pytest.fixture
def asked(make_trainer, make_tokenizer, folders):
    """`asked(teacher)`: what the teacher of one row reads in place of the student's prompt."""

    def ask(teacher, row=None, **settings):
        data = Dataset.from_list([{**(row or {"messages": CHAT}), "teacher": "a"}])
        settings = {"lmbda": 0.0, "max_length": 200, "teacher_system_prompt": "Be brief.", **settings}
        trainer = make_trainer(folders["student"], teacher, train=data, tok=make_tokenizer(), **settings)
        return make_tokenizer().decode(trainer.train_dataset[0]["teacher_prompt_ids"])

    return ask


def test_several_teachers_are_asked_in_their_own_chat_template(asked, folders):
    one = asked(folders["a"])
    assert one == "##system Be brief. ##user 1+1= ##assistant "
    two = {name: folders[name] for name in "ab"}
    three = {name: folders[name] for name in "abc"}
    assert asked(two) == one
    assert asked(two, teacher_mix="geometric") == one
    assert asked(three, teacher_mix="geometric", teacher_weights={"a": 0.5, "b": 0.5, "c": 0.0}) == one
    by_hand = {name: LocalTeacher(AutoModelForCausalLM.from_pretrained(folders[name])) for name in "ab"}
    assert asked(RoutedTeacher(by_hand)) == one


@pytest.mark.parametrize("settings", [{}, {"teacher_mix": "geometric"}], ids=["routed", "mixed"])
def test_teachers_of_two_chat_templates_are_refused_where_one_prompt_is_rendered(
    asked, folders, make_tokenizer, settings
):
    two = {name: folders[name] for name in "ac"}
    with pytest.raises(ConfigurationError, match="'a' and 'c' have different chat templates; expected one"):
        asked(two, **settings)
    assert asked(two, PLAIN, **settings) == "Be brief.\n\n1+1="  # nothing is rendered
    assert "im_start" in asked(two, teacher_processing_class=make_tokenizer(), **settings)


def test_feedback_is_rendered_by_one_chat_template_too(make_trainer, make_tokenizer, folders):
    data = Dataset.from_list([{"prompt": CHAT[:1], "answer": "2"}])
    settings = {"feedback": "default", "lmbda": 1.0, "max_length": 200, "teacher_mix": "geometric", "train": data}

    def rows(*names):
        trainer = make_trainer(folders["student"], {n: folders[n] for n in names}, tok=make_tokenizer(), **settings)
        return trainer.train_dataset[0]["feedback"]

    assert rows("a", "b")["head"] == "##user "
    with pytest.raises(ConfigurationError, match="`feedback` with a conversation, but the teachers 'a' and 'c'"):
        rows("a", "c")


def test_a_reference_that_reads_another_chat_template_is_refused(asked, folders):
    away = {"extrapolate": {"reference": "initial", "scale": 1.25}}
    assert "im_start" in asked(folders["c"], **away)
    with pytest.raises(ConfigurationError, match="'teacher' and 'initial' have different chat templates"):
        asked(folders["a"], **away)


# ---- Composed -------------------------------------------------------------------------------------------------------


def test_the_student_before_training_is_loaded_as_the_student(
    make_trainer, make_student, make_teacher, saved, tmp_path
):
    """What a teacher is loaded with says nothing of a reference: a folder within both names holds another model."""
    for name, source in (("student", saved.student), ("teacher", saved.teacher)):
        shutil.copytree(source, tmp_path / name)
    make_student(seed=99).save_pretrained(tmp_path / "student/x")
    make_teacher().save_pretrained(tmp_path / "teacher/x")
    settings = {"extrapolate": {"reference": "initial", "scale": 1.25}, "lmbda": 0.0}
    trainer = make_trainer(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        teacher_model_init_kwargs={"subfolder": "x", "dtype": "bfloat16"},
        **settings,
    )
    reference = trainer.teacher.members["initial"].model.state_dict()
    for name, value in make_student().state_dict().items():
        torch.testing.assert_close(reference[name], value, rtol=0, atol=0)
    assert trainer.teacher.members["teacher"].model.dtype == torch.bfloat16


@pytest.mark.parametrize("by_hand", [False, True, "routed"])
def test_an_arithmetic_mean_is_not_softened(make_trainer, make_teacher, monkeypatch, by_hand):
    """mean(p)^(1/t), normalised, is another distribution than mean(p^(1/t), normalised): only logits commute with t."""
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *a, **k: pytest.fail("loaded"))
    two, settings = {"a": make_teacher(), "b": make_teacher(seed=8)}, {"kd_temperature": 2.0, "lmbda": 0.0}
    if by_hand:
        mixed = ComposedTeacher.mix({name: LocalTeacher(model) for name, model in two.items()}, how="arithmetic")
        two = RoutedTeacher({"a": mixed}) if by_hand == "routed" else mixed
    else:
        settings["teacher_mix"] = "arithmetic"
    with pytest.raises(ConfigurationError, match="`kd_temperature: 2` with an arithmetic mean of teachers; expected 1"):
        make_trainer(teacher=two, **settings)


def test_a_geometric_mean_is_that_of_softened_teachers(make_trainer, make_student, make_teacher, batch_of):
    models = [model.double() for model in (make_student(), make_teacher(), make_teacher(seed=8))]
    settings = {"teacher_mix": "geometric", "kd_temperature": 2.0, "lmbda": 0.0, "divergence": "forward_kl"}
    trainer = make_trainer(models[0], dict(zip("ab", models[1:], strict=True)), **settings)
    batch = batch_of(trainer)
    predicts = batch["labels"][:, 1:] != -100
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, *p = (F.log_softmax(model(**asked).logits[:, :-1][predicts] / 2, -1) for model in models)
    mean = F.log_softmax((p[0] + p[1]) / 2, -1)
    expected = (mean.exp() * (mean - q)).sum(-1).mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-9)
