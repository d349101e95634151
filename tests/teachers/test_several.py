"""Several teachers: each row has one of them, or they are composed; through the public trainers."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq

from distill_trainers import models
from distill_trainers.data.routing import TEACHER_INDEX
from distill_trainers.exceptions import ConfigurationError, DatasetError, VocabularyError
from distill_trainers.losses.reduction import trained_mask
from distill_trainers.signals import Logits, Routed
from distill_trainers.teachers import CachedTeacher, ComposedTeacher, LocalTeacher, RoutedTeacher, Teacher
from distill_trainers.teachers.rows import dataset_row_key
from distill_trainers.toy import addition_rows
from distill_trainers.trainers.given.best_metric import scores_of_each

NAMES = ("math", "code")
EXACT = {"lmbda": 0.0, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def rows(count=24, names=NAMES, seed=0, column="teacher"):
    """In turn of the teachers, but for every third row, which is the first one's."""
    whose = [names[i % len(names)] if i % 3 else names[0] for i in range(count)]
    return Dataset.from_list([{**row, column: whose[i]} for i, row in enumerate(addition_rows(count, seed=seed))])


def of(teacher, dataset):
    return dataset.filter(lambda row: row["teacher"] == teacher)


@pytest.fixture
def doubles(make_student, make_teacher):
    """`doubles()`: a student and two different teachers in float64, the same each time."""
    return lambda: (make_student().double(), make_teacher().double(), make_teacher(seed=8).double())


def trained(trainer):
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(found, expected, **bounds):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **{"rtol": 0, "atol": 0, **bounds}, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- Each row has one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gkd", {"lmbda": 0.0}),
        ("gkd", {"lmbda": 1.0, "temperature": 0.0, "divergence": "reverse_kl"}),
        ("minillm", {"teacher_mix_alpha": 0.0}),
        ("minillm", {"objective": "token", "estimator": "sampled"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_two_equal_teachers_are_one(make_trainer, doubles, method, settings):
    student, teacher, _ = doubles()
    several = {name: copy.deepcopy(teacher) for name in NAMES}
    settings = {**EXACT, "train": rows(), "method": method, **settings}
    if method == "minillm":
        settings.pop("lmbda", None)
    one = trained(make_trainer(copy.deepcopy(student), teacher, **settings))
    assert_equal(trained(make_trainer(student, several, **settings)), one, atol=1e-12)


def test_rows_that_are_asked_alone_give_the_same_bits(make_trainer, make_student, make_teacher):
    """Where grouping changes no shape, nothing is rounded differently: in float32, with Adam."""
    settings = {"train": rows(), "lmbda": 0.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    one = trained(make_trainer(make_student(), make_teacher(), **settings))
    several = {name: make_teacher() for name in NAMES}
    assert_equal(trained(make_trainer(make_student(), several, **settings)), one)


def test_a_step_is_the_sum_over_rows_by_the_tokens_of_the_step(make_trainer, doubles):
    """One denominator, whoever taught how many tokens in which micro-batch; names in any order change nothing."""
    student, math, code = doubles()
    settings = {**EXACT, "train": rows(), "divergence": "forward_kl", "max_steps": 1, "gradient_accumulation_steps": 2}
    trainer, seen = make_trainer(copy.deepcopy(student), {"math": math, "code": code}, **settings), []
    loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **more: seen.append(inputs) or loss(model, inputs, **more)
    found = trained(trainer)
    assert len(seen) == 2 and {k for batch in seen for k in batch[TEACHER_INDEX].tolist()} == {0, 1}
    total, tokens = 0.0, 0
    for batch in seen:
        for row, index in enumerate(batch[TEACHER_INDEX]):
            real = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row][real][None], batch["labels"][row][real]
            predicts = labels[1:] != -100
            q, p = (
                F.log_softmax(m(input_ids=ids).logits[0, :-1][predicts], -1) for m in (student, (math, code)[index])
            )
            total, tokens = total + kl(p.detach(), q).sum(), tokens + len(q)
    (total / tokens).backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(found[name], (weight - 0.5 * weight.grad).detach(), rtol=0, atol=1e-12)
    student.zero_grad()
    assert_equal(trained(make_trainer(student, {"code": code, "math": math}, **settings)), found)


def test_rows_of_a_batch_may_come_in_any_order(make_trainer, doubles, batch_of):
    student, math, code = doubles()
    trainer = make_trainer(student, {"math": math, "code": code}, train=rows(), lmbda=0.0)
    losses = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 3, 1]):
        batch = {name: value for name, value in batch_of(trainer, order).items()}
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


def test_scores_and_metrics_of_each_teacher_are_those_of_its_rows(make_trainer, doubles):
    student, math, code = doubles()
    held_out = rows(14, seed=5)
    settings = {**EXACT, "train": rows(), "per_device_eval_batch_size": 4}
    several = make_trainer(copy.deepcopy(student), {"math": math, "code": code}, eval_dataset=held_out, **settings)
    scores = several.evaluate()
    for name, teacher in (("math", math), ("code", code)):
        alone = make_trainer(copy.deepcopy(student), teacher, eval_dataset=of(name, held_out), **settings).evaluate()
        for score in ("loss", "kl", "perplexity", "teacher_perplexity", "top1_agreement", "acceptance", "tokens"):
            assert scores[f"eval_{score}/{name}"] == pytest.approx(alone[f"eval_{score}"], rel=1e-6), score
    tokens = [scores[f"eval_tokens/{name}"] for name in NAMES]
    assert sum(tokens) == scores["eval_tokens"]
    weighted = sum(n * scores[f"eval_kl/{name}"] for n, name in zip(tokens, NAMES, strict=True))
    assert scores["eval_kl"] == pytest.approx(weighted / sum(tokens), rel=1e-6)  # not a mean over teachers
    several.train()
    for log in (log for log in several.state.log_history if "loss" in log):
        counted = {name: log.get(f"trained_tokens/{name}", 0) for name in NAMES}
        assert sum(counted.values()) == log["trained_tokens"]
        total = sum(n * log.get(f"divergence/{name}", 0) for name, n in counted.items())
        assert log["divergence"] == pytest.approx(total / log["trained_tokens"], rel=1e-5)


def test_a_run_can_keep_the_best_student_of_one_teacher(make_trainer, make_teacher, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    best |= {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_kl/code", "max_steps": 2, "lmbda": 0.0}
    several = {"math": make_teacher(), "code": make_teacher(seed=8)}
    trainer = make_trainer(teacher=several, train=rows(), eval_dataset=rows(6), **best)
    trainer.train()
    assert trainer.state.best_metric == min(
        log["eval_kl/code"] for log in trainer.state.log_history if "eval_kl" in log
    )
    whole = {name for name in trainer.evaluate() if name.endswith("/code")}
    assert whole == {f"eval_{score}/code" for score in scores_of_each(trainer.args)}
    for metric, evaluation, message in (
        ("eval_kl/cod", rows(6), "eval_kl/cod`; .* such as eval_kl/math, eval_kl/code"),
        ("eval_k/code", rows(6), "such as .*eval_kl/code"),
        ("eval_runtime/code", rows(6), "eval_runtime/code`"),
        ("eval_kl/code", rows(6, ("math",)), "no row of the evaluation set belongs to 'code'; .* rows there: math"),
        ("eval_b_kl/code", {"a": rows(6), "b": rows(6, ("math",))}, "no row of the evaluation set belongs to 'code'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_trainer(
                teacher=several, train=rows(), eval_dataset=evaluation, **{**best, "metric_for_best_model": metric}
            )


def test_each_teacher_writes_the_completions_of_its_own_rows(make_trainer, make_teacher, tokenizer):
    """The same prompt of two teachers gets two texts."""
    prompts = rows(8).remove_columns("completion")
    twice = Dataset.from_list([{**row, "teacher": name} for name in NAMES for row in prompts.remove_columns("teacher")])
    math, code = make_teacher(), make_teacher(seed=8)
    settings = {"lmbda": 0.0, "seq_kd": True, "temperature": 0.0, "max_steps": 1}
    trainer = make_trainer(teacher={"math": math, "code": code}, train=twice, eval_dataset=twice, **settings)
    written = trainer.get_train_dataloader().dataset
    for k, (teacher, name) in enumerate(((make_teacher(), "math"), (make_teacher(seed=8), "code"))):
        alone = make_trainer(
            teacher=teacher, train=of(name, twice), output_dir=f"{trainer.args.output_dir}-{name}", **settings
        )
        expected = [row["input_ids"] for row in alone.get_train_dataloader().dataset]
        assert [row["input_ids"] for row in written if row[TEACHER_INDEX] == k] == expected
    halves = [row["input_ids"] for row in written]
    assert halves[:8] != halves[8:]
    assert {f"eval_kl/{name}" for name in NAMES} <= trainer.evaluate().keys()


def test_the_column_may_have_another_name_and_rows_come_as_a_stream(make_trainer, make_teacher, by_step):
    several = {"math": make_teacher(), "code": make_teacher(seed=8)}
    expected = make_trainer(teacher=several, train=rows(), lmbda=0.0)
    named = make_trainer(teacher=several, train=rows(column="who"), lmbda=0.0, teacher_column="who")
    assert [r[TEACHER_INDEX] for r in named.train_dataset] == [r[TEACHER_INDEX] for r in expected.train_dataset]
    streamed = make_trainer(teacher=several, train=IterableDataset.from_generator(lambda: iter(rows())), lmbda=0.0)
    collated = make_trainer(
        teacher=several, train=rows(), lmbda=0.0, data_collator=DataCollatorForSeq2Seq(expected.processing_class)
    )
    for trainer in (expected, named, streamed, collated):
        trainer.train()
    assert by_step(named) == by_step(expected)
    assert by_step(collated) == by_step(expected)
    assert len(by_step(streamed)) == 3


# ---- They are composed ----------------------------------------------------------------------------------------------


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


def dense_mean(trainer, batch_of, divergence):
    """The loss of all training rows by definition: `divergence(q, *p)` of whole log-probabilities."""
    batch = batch_of(trainer)
    inputs, predicts = {n: batch[n] for n in ("input_ids", "attention_mask")}, trained_mask(batch["labels"])

    def logps(model):
        return F.log_softmax(model(**inputs).logits[:, :-1][predicts].double(), -1)

    return lambda student, *teachers: divergence(logps(student), *map(logps, teachers)).mean().item()


COMPOSED = {
    "geometric": ({"teacher_mix": "geometric"}, lambda p, r: 0.5 * p + 0.5 * r),
    "arithmetic": (
        {"teacher_mix": "arithmetic", "teacher_weights": {"math": np.float32(0.75), "code": np.float32(0.25)}},
        lambda p, r: (0.75 * p.exp() + 0.25 * r.exp()).log(),
    ),
    "extrapolated": (
        {"extrapolate": {"reference": "code", "scale": np.float32(1.25)}},
        lambda p, r: 1.25 * p - 0.25 * r,
    ),
    "weak to strong": (
        {"weak_to_strong": {"base": "math", "plus": "code", "minus": "math", "alpha": 0.5}},
        lambda p, r: 0.5 * p + 0.5 * r,
    ),
}


@pytest.mark.parametrize(
    ("name", "divergence"), [*((name, "reverse_kl") for name in COMPOSED), ("arithmetic", "forward_kl")]
)
def test_a_composed_teacher_has_no_column_and_one_distribution(make_trainer, doubles, batch_of, name, divergence):
    (student, math, code), (settings, compose) = doubles(), COMPOSED[name]
    given = {"train": rows().remove_columns("teacher"), "lmbda": 0.0, "divergence": divergence, **settings}
    trainer = make_trainer(student, {"math": math, "code": code}, **given)
    assert type(trainer.teacher) is ComposedTeacher

    def by_definition(q, p, r):
        composed = F.log_softmax(compose(p, r), -1)
        return kl(q, composed) if divergence == "reverse_kl" else kl(composed, q)

    expected = dense_mean(trainer, batch_of, by_definition)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert loss == pytest.approx(expected(student, math, code), rel=1e-10)


ADAPTED = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}


@pytest.mark.parametrize(
    ("student", "settings"),
    [("in memory", {}), ("by name", {}), ("in memory", ADAPTED), ("with an adapter that is trained", {})],
)
def test_the_reference_may_be_the_student_before_training(
    make_trainer, make_student, make_teacher, saved, student, settings
):
    """Scale 1 is the plain teacher, bit for bit; scale 0 is the student itself, which stays what it was."""
    given = saved.student if student == "by name" else make_student()
    given = get_peft_model(given, LORA) if student.startswith("with") else given
    settings = {"train": rows(8), "eval_dataset": rows(6), "lmbda": 0.0, "max_steps": 1, **settings}

    def run(scale=None):
        torch.manual_seed(0)
        more = {} if scale is None else {"extrapolate": {"reference": "initial", "scale": scale}}
        return make_trainer(copy.deepcopy(given), make_teacher(), **settings, **more)

    still = run(0.0)
    initial = still.teacher.members["initial"]
    assert still.evaluate()["eval_kl"] == pytest.approx(0, abs=1e-9) and initial.name.startswith("the student")
    plain, scaled = run(), run(1.0)
    assert list(scaled.teacher.members) == ["teacher"]  # nothing is loaded that has no say
    assert_equal(trained(scaled), trained(plain))
    moved = run(1.25)
    batch = {
        n: v for n, v in moved.data_collator([moved.train_dataset[0]]).items() if n in ("input_ids", "attention_mask")
    }
    everything = batch["attention_mask"][:, 1:].bool()
    before = moved.teacher.members["initial"].signal(batch, everything, None).chunk(slice(None)).logits.clone()
    trained(moved)
    after = moved.teacher.members["initial"].signal(batch, everything, None).chunk(slice(None)).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_each_of_several_experts_is_moved_away_from_one_reference(make_trainer, doubles, batch_of):
    """G-OPD with several teachers: rows are routed to composed teachers, which share the reference."""
    student, math, code = doubles()
    base = copy.deepcopy(student)
    teachers, scale = {"math": math, "code": code, "base": base}, {"reference": "base", "scale": 1.5}
    trainer = make_trainer(student, teachers, train=rows(), lmbda=0.0, divergence="forward_kl", extrapolate=scale)
    assert trainer.teacher.names == NAMES and len(trainer.teacher.leaves) == 3
    batch = batch_of(trainer)
    whose = batch[TEACHER_INDEX][trained_mask(batch["labels"]).nonzero()[:, 0]]
    expected = dense_mean(
        trainer,
        batch_of,
        lambda q, p, r, p0: kl(F.log_softmax(1.5 * torch.where(whose[:, None] == 0, p, r) - 0.5 * p0, -1), q),
    )
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(
        expected(student, math, code, base), rel=1e-10
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"), [("dpkd", {"chosen": "dataset"}), ("minillm", {"teacher_mix_alpha": 0.0})]
)
def test_a_mix_of_equal_teachers_is_one_in_other_methods(make_trainer, make_teacher, by_step, method, settings):
    settings = {"method": method, "temperature": 0.0 if method == "dpkd" else 1.0, **settings}
    one = make_trainer(teacher=make_teacher(), **settings)
    mixed = make_trainer(teacher={n: make_teacher() for n in NAMES}, teacher_mix="arithmetic", **settings)
    one.train(), mixed.train()
    assert by_step(mixed) == pytest.approx(by_step(one), rel=1e-5)


# ---- Of any kind ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(saved, make_teacher, tmp_path):
    """Folders of two adapters on the saved teacher, and what each of them says, as a model of its own."""
    found = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = get_peft_model(make_teacher(), LORA)
        model.base_model.model.config._name_or_path = saved.teacher
        model.peft_config["default"].base_model_name_or_path = saved.teacher
        model.save_pretrained(tmp_path / name)
        found[name] = (str(tmp_path / name), model.eval())
    return found


def test_adapters_share_the_memory_of_their_base(make_trainer, adapters, saved, batch_of):
    """By their folders, or base and adapter; the base itself may be one of the teachers."""
    math, code = (adapters[name][0] for name in NAMES)
    given = {
        "math": math,
        "code": {"teacher_model_name_or_path": saved.teacher, "teacher_adapter": code},
        "base": saved.teacher,
    }
    trainer = make_trainer(teacher=given, train=rows(names=(*NAMES, "base")), lmbda=0.0)
    weights = [dict(member.model.named_parameters()) for member in trainer.teacher.members.values()]
    places = [{n: w.data_ptr() for n, w in of_one.items()} for of_one in weights]
    assert places[0] == places[1] == places[2] and not any(w.requires_grad for w in weights[0].values())
    assert sum("q_proj.base_layer" in name for name in places[0]) == 2  # of two layers, once
    batch = batch_of(trainer)
    predicts = trained_mask(batch["labels"])
    told = trainer.two_models.signal(batch, predicts).chunk(slice(None)).logps()
    every = [adapters[name][1] for name in NAMES] + [models.load_causal_lm(saved.teacher)]
    with torch.no_grad():
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
        expected = torch.stack([F.log_softmax(m(**inputs).logits[:, :-1][predicts], -1) for m in every])
    whose = batch[TEACHER_INDEX][predicts.nonzero()[:, 0]]
    torch.testing.assert_close(told, expected[whose, torch.arange(len(whose))], rtol=1e-4, atol=1e-4)
    assert len({member.fingerprint() for member in trainer.teacher.members.values()}) == 3
    trainer.train()


@pytest.mark.slow
def test_local_cached_and_remote_teachers_are_the_same(
    make_trainer, make_teacher, saved, by_step, tmp_path, serve_teacher
):
    """A row of the parity table: each of the teachers in any place, on the dataset's text."""
    settings = {"train": rows(12), "lmbda": 0.0, "eval_dataset": rows(6, seed=3), "num_train_epochs": 1}

    def run(teachers, **more):
        trainer = make_trainer(teacher=teachers, **settings, **more)
        trainer.train()
        return trainer, [*by_step(trainer).values(), *(trainer.evaluate()[f"eval_kl/{n}"] for n in NAMES)]

    make_teacher(seed=8).save_pretrained(tmp_path / "other")
    _, local = run({"math": saved.teacher, "code": str(tmp_path / "other")})
    cached = {"teacher_model_name_or_path": saved.teacher, "teacher_cache": str(tmp_path / "cache")}
    filling, first = run({"math": cached, "code": make_teacher(seed=8)})
    assert first == pytest.approx(local, rel=1e-5)
    datasets = (filling.train_dataset, filling.eval_dataset)
    own = {dataset_row_key(row)[0] for dataset in datasets for row in dataset if row[TEACHER_INDEX] == 0}
    assert len(filling.teacher.members["math"].cache) == len(own)  # and none of the other's rows
    _, second = run({"math": CachedTeacher(tmp_path / "cache"), "code": LocalTeacher(make_teacher(seed=8))})
    assert second == pytest.approx(local, rel=1e-5)
    remote, third = run({"math": saved.teacher, "code": serve_teacher(make_teacher(seed=8))})
    assert third == pytest.approx(local, rel=1e-5) and remote.teacher.may_be_away
    remote.teacher.close()


@pytest.fixture
def serve_teacher(tokenizer):
    """`serve_teacher(model)`: the address of a server of it."""
    pytest.importorskip("fastapi")
    import threading
    import time

    from distill_trainers.teachers.remote.http import bind, build_server
    from distill_trainers.teachers.remote.service import Limits, TeacherService

    running = []

    def start(model):
        socket = bind("127.0.0.1", 0)
        server = build_server(TeacherService(LocalTeacher(model), tokenizer, "tiny", Limits()), None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{socket.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


class Fake(Teacher):
    """Counts how it was asked."""

    provides = frozenset({"distribution"})

    def __init__(self, *, collective=False, away=False):
        self.collective, self.may_be_away, self.asked = collective, away, []
        self.prepared = 0

    def prepare(self, accelerator):
        self.prepared += 1

    @property
    def is_collective(self):
        return self.collective

    def signal(self, inputs, predicts, vocab_size):
        self.asked.append((len(predicts), int(predicts.sum()), sorted(inputs)))
        return Logits(torch.zeros(int(predicts.sum()), 5))

    def fingerprint(self):
        return "fake"


def question(index):
    ids = torch.ones(len(index), 4, dtype=torch.long)
    predicts = torch.ones(len(index), 3, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": ids, TEACHER_INDEX: torch.tensor(index)}, predicts


def test_a_sharded_teacher_is_asked_by_all_processes_and_others_by_need():
    """A process without rows of a teacher that all hold shares of asks about nothing; else the others would hang."""
    sharded, other = Fake(collective=True), Fake()
    teacher = RoutedTeacher({"sharded": sharded, "other": other})
    assert teacher.is_collective
    signal = teacher.signal(*question([1, 1]), None)
    assert sharded.asked == [(1, 0, ["attention_mask", "input_ids"])] and other.asked[0][:2] == (2, 6)
    assert isinstance(signal, Routed) and len(signal) == 6 and [len(part) for part in signal.parts] == [0, 6]
    teacher.signal(*question([0, 0]), None)
    assert sharded.asked[1][:2] == (2, 6) and len(other.asked) == 1


def test_only_those_that_are_away_are_asked_ahead_and_one_in_two_places_is_placed_once():
    far, near = Fake(away=True), Fake()
    inner = ComposedTeacher({"far": far, "near": near}, {"far": 0.5, "near": 0.5})
    teacher = RoutedTeacher({"mixed": inner, "near": near})
    with teacher.asking_ahead():
        assert teacher.signal(*question([0, 1]), None) is None
    assert len(far.asked) == 1 and not near.asked and teacher.may_be_away
    assert len(teacher.signal(*question([0, 1]), None)) == 6
    teacher.prepare(None)
    assert near.prepared == far.prepared == 1
    far.failure = ValueError("gone")
    assert teacher.failure is far.failure
    teacher.failure = None
    assert far.failure is None


@pytest.mark.slow
def test_the_record_names_all_teachers_and_no_place_of_this_machine(make_trainer, saved, tmp_path):
    trainer = make_trainer(teacher={"math": saved.teacher, "code": saved.teacher}, train=rows(), lmbda=0.0, max_steps=1)
    trainer.train()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["teacher"] == "math: teacher, code: teacher"
    assert record["recipe"]["teachers"] == {"math": "teacher", "code": "teacher"}
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(saved.root) not in card and "math: teacher, code: teacher" in card


# ---- Refusals -------------------------------------------------------------------------------------------------------


def wrong(**changes):
    return {"lmbda": 0.0, **changes}


REFUSED = {
    "unknown name": ({}, {"train": rows(names=("math", "cod"))}, "Row 1 of dataset 'train'.*'cod'.*math, code"),
    "no column": ({}, {"train": rows(column="who")}, "no column 'teacher'.*math, code"),
    "column of one": ("one", {"teacher_column": "who"}, "`teacher_column: who` with one teacher"),
    "name": ({"a/b": "math"}, {}, "the name 'a/b'; expected text of letters"),
    "number": ({1: "math"}, {}, r"the name 1 \(int\); expected text .*in quotes, if it is a number"),
    "nobody": ("none", {}, "Got no teachers in the mapping"),
    "setting of one": ({"math": {"teacher_model": None, "tau": 2}}, {}, "Unknown key 'tau' in one of several teachers"),
    "prompt of one": (
        {"math": {"teacher_model": "math", "teacher_system_prompt": "Be kind.", "teacher_max_length": 5}},
        {},
        "'math'.*`teacher_max_length: 5` with one of several teachers; expected it beside `teachers`",
    ),
    "no name": ({"math": 3}, {}, r"'math': Got 3 \(int\); expected a folder, a Hub id"),
    "a list": ({"math": {"teacher_model": ["m/cmath"]}}, {}, r"'math': Got \['m/cmath'\] \(list\)"),
    "several in one": ({"math": "routed"}, {"teacher_mix": "geometric"}, "'math': Got a RoutedTeacher of a as one of"),
    "no weights": ({}, {"teacher_mix": "geometric", "teacher_weights": {}}, "one for each of the teachers math, code"),
    "type of a setting": ({"math": {"teacher_server_top_k": "many"}}, {}, "'math'.*teacher_server_top_k.*whole number"),
    "placement of one": ({"math": {"teacher_placement": "cached"}}, {}, "'math'.*cached` without `teacher_cache`"),
    "one cache": ({}, {"teacher_cache": "there"}, "a folder for each of them"),
    "weights": ({}, {"teacher_mix": "geometric", "teacher_weights": {"math": 0.5, "code": 0.6}}, "add up to 1.1"),
    "negative": ({}, {"teacher_mix": "arithmetic", "teacher_weights": {"math": 1.5, "code": -0.5}}, "at least 0"),
    "weight of nobody": (
        {},
        {"teacher_mix": "geometric", "teacher_weights": {"math": 1.0}},
        "one for each of the teachers",
    ),
    "way to mix": ({}, {"teacher_mix": "harmonic"}, "one of geometric, arithmetic"),
    "weights of nothing": ({}, {"teacher_weights": {"math": 0.5, "code": 0.5}}, "`teacher_mix` beside it"),
    "two ways": ({}, {"teacher_mix": "geometric", "extrapolate": {"reference": "math"}}, "expected one of them"),
    "mix of one": ("one", {"teacher_mix": "geometric"}, "expected several by name"),
    "reference": ({}, {"extrapolate": {"reference": "cod"}}, "'cod' is no teacher.*'initial'.*math, code"),
    "scale": ({}, {"extrapolate": {"reference": "code", "scale": "1.2"}}, "{reference: NAME, scale: 1.25}"),
    "part": ({}, {"weak_to_strong": {"base": "math", "plus": "code"}}, "{base: NAME, plus: NAME, minus: NAME"),
    "idle part": (
        {"idle": "math"},
        {"weak_to_strong": {"base": "math", "plus": "code", "minus": "math"}},
        "in which idle have no part",
    ),
    "reserved": ({"initial": "math"}, {}, "means the student before training"),
    "packed": ({}, {"packing": True}, "packed rows are read as one"),
    "replayed": ({}, {"lmbda": 1.0, "replay_buffer_size": 8}, "replay buffer"),
    "pairs": ({}, {"method": "dpkd", "lmbda": None}, "the reference of its rewards is one model"),
    "mixed sampling": ({}, {"method": "minillm", "lmbda": None}, "teacher_mix_alpha: 0"),
    "written": ({}, {"teacher_mix": "geometric", "seq_kd": True}, "under settings in which a teacher writes"),
    "sparse": (
        {"code": {"teacher_model": "math", "teacher_cache": "{tmp}", "teacher_cache_kind": "topk"}},
        {"teacher_mix": "geometric"},
        "'code', which tells topk of 64 ids.*whole distributions",
    ),
    "different": (
        {"math": {"teacher_model": "math", "teacher_cache": "{tmp}", "teacher_cache_kind": "topk"}},
        {},
        "answer in different ways .math: topk of 64 ids, code: hidden",
    ),
    "in memory": (
        {"math": {"teacher_placement": "quantized-8bit", "teacher_model": "code"}},
        {},
        "'math'.*in memory|bitsandbytes",
    ),
    "measures": (
        {"math": {"teacher_model": "math", "teacher_cache": "{tmp}"}},
        {"eval_measures": ["agreement"], "eval_dataset": rows(4)},
        "one of the teachers is a CachedTeacher, which cannot read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name_before_anything_is_loaded(
    make_trainer, make_student, make_teacher, monkeypatch, tmp_path, case
):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *a, **k: pytest.fail("loaded"))
    given, settings, message = REFUSED[case]
    made = {name: make_teacher() for name in NAMES}
    made["routed"] = RoutedTeacher({"a": LocalTeacher(made["math"])})
    if given == "one":
        teachers = made["math"]
    elif given == "none":
        teachers = {}
    else:
        teachers = {
            **{name: made[name] for name in NAMES},
            **{
                name: made.get(entry, entry) if isinstance(entry, str) else copy.copy(entry)
                for name, entry in given.items()
            },
        }
        for entry in (entry for entry in teachers.values() if isinstance(entry, dict)):
            entry |= {k: str(v).format(tmp=tmp_path / "cache") for k, v in entry.items() if k == "teacher_cache"}
            if isinstance(entry.get("teacher_model"), str) and entry["teacher_model"] in made:
                entry["teacher_model"] = made[entry["teacher_model"]]
    settings = {key: value for key, value in {"train": rows(), **wrong(), **settings}.items() if value is not None}
    with pytest.raises((ConfigurationError, DatasetError), match=message):
        make_trainer(make_student(), teachers, **settings)


def test_teachers_of_two_tokenizers_are_refused_by_name(make_trainer, make_teacher, make_tokenizer, saved, tmp_path):
    make_teacher(vocab_size=300).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises((VocabularyError, ConfigurationError), match="'code'.*(different tokens|tokenizer)"):
        make_trainer(saved.student, {"math": saved.teacher, "code": str(tmp_path / "other")}, train=rows(), lmbda=0.0)


def test_padded_heads_agree_on_the_fewest_ids(make_trainer, make_teacher, make_student, tokenizer, batch_of):
    """Ids that no tokenizer defines leave the softmax of all, also of a teacher that alone would have kept them."""
    several = {"math": make_teacher(vocab_size=20), "code": make_teacher(seed=8, vocab_size=24)}
    settings = {"lmbda": 0.0, "teacher_processing_class": tokenizer}
    trainer = make_trainer(make_student(vocab_size=20), several, train=rows(), **settings)
    assert trainer.vocab_size == len(tokenizer)
    alone = make_trainer(make_student(vocab_size=20), several["math"], train=of("math", rows()), **settings)
    assert alone.vocab_size is None
    trainer.train()


def test_a_collator_that_loses_the_teacher_is_told(make_trainer, make_teacher):
    teacher = RoutedTeacher({"math": LocalTeacher(make_teacher())})
    inputs, predicts = question([0])
    with pytest.raises(DatasetError, match="no such entry; expected `teacher_index`"):
        teacher.signal({n: v for n, v in inputs.items() if n != TEACHER_INDEX}, predicts, None)
    with pytest.raises(DatasetError, match="expected 0 to 0: places among the teachers math"):
        teacher.signal({**inputs, TEACHER_INDEX: torch.tensor([1])}, predicts, None)


def test_teachers_made_by_hand(make_trainer, make_teacher, by_step):
    """Objects as they are, one within the other; what answers otherwise than its neighbours is refused."""
    math, code = LocalTeacher(make_teacher()), LocalTeacher(make_teacher(seed=8))
    mixed = ComposedTeacher.mix({"a": math, "b": code})
    moved = ComposedTeacher.extrapolate(code, math, 1.25)
    strong = ComposedTeacher.weak_to_strong(math, code, math, alpha=np.float32(0.5))
    assert strong.fingerprint() != mixed.fingerprint() != moved.fingerprint()
    trainer = make_trainer(teacher=RoutedTeacher({"math": mixed, "code": moved}), train=rows(), lmbda=0.0)
    trainer.train()
    assert by_step(trainer, "divergence/code").keys() == {2, 3}  # the first step has none of its rows
    with pytest.raises(ConfigurationError, match="expected numbers, such as 0.5"):
        ComposedTeacher.mix({"a": math, "b": code}, {"a": 1, "b": float("nan")})
    with pytest.raises(ConfigurationError, match="`how: harmonic`; expected one of geometric, arithmetic"):
        ComposedTeacher.mix({"a": math, "b": code}, how="harmonic")
    with pytest.raises(ConfigurationError, match="`scale: 1.25`; expected a number"):
        ComposedTeacher.extrapolate(code, math, "1.25")
    with pytest.raises(ConfigurationError, match="answer in different ways"):
        sparse = Fake()
        sparse.tells = "topk of 4 ids"
        RoutedTeacher({"math": math, "code": sparse})
    with pytest.raises(ConfigurationError, match="expected a Teacher"):
        RoutedTeacher({"math": make_teacher()})
