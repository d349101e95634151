"""Whole evaluations of tiny models: exact scores, what equality gives, caches, interruption, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from distill_trainers.evaluation import EvaluationResults, EvaluationSettings, evaluate_models
from distill_trainers.evaluation.collect import Workshop
from distill_trainers.evaluation.examples import ExampleSet, read_examples
from distill_trainers.evaluation.runner import prepare
from distill_trainers.evaluation.tables import markdown, number, share_of_gap, tables_of
from distill_trainers.evaluation.teacher_forced import force
from distill_trainers.exceptions import ConfigurationError, DatasetError, VocabularyError
from distill_trainers.rollouts import decode_completions
from distill_trainers.toy import addition_rows, character_tokenizer

SETTINGS = EvaluationSettings(
    max_length=20,
    max_new_tokens=5,
    seeds=[1, 2],
    batch_size=3,
    answer_formats=["first_line"],
    answer_kind="number",
    bootstrap_samples=60,
    speed_prompts=2,
    speed_tokens=3,
    token_samples=2,
)
ROWS = addition_rows(6, seed=5)


@pytest.fixture(scope="module")
def models(make_student, make_teacher):
    return {"student": make_student(seed=3), "baseline": make_student(seed=1), "teacher": make_teacher()}


@pytest.fixture
def run(models, tokenizer):
    def evaluate(rows=None, **changes):
        named = {
            name: changes.pop(name) for name in ("students", "teacher", "baseline", "cache_dir") if name in changes
        }
        how = {"students": {"mine": models["student"]}, "teacher": models["teacher"], "baseline": models["baseline"]}
        how |= {"tokenizer": tokenizer, "use_cpu": True, "progress": False, **named}
        return evaluate_models(
            dataset=ROWS if rows is None else rows, settings=dataclasses.replace(SETTINGS, **changes), **how
        )

    return evaluate


@pytest.fixture(scope="module")
def all_results(models, tokenizer):
    students = {"mine": models["student"], "copy of the teacher": copy.deepcopy(models["teacher"])}
    how = {"teacher": models["teacher"], "baseline": models["baseline"], "tokenizer": tokenizer, "use_cpu": True}
    return evaluate_models(students, ROWS, settings=SETTINGS, progress=False, **how)


# ---- What the numbers are -------------------------------------------------------------------------------------------


def test_a_teacher_that_sees_more_is_evaluated_on_its_own_view(run, models, dense, tokenizer, tmp_path):
    rows = [{**row, "hint": "9+" * (1 + i % 2)} for i, row in enumerate(ROWS)]
    own = {"teacher_prompt": "{hint}{prompt}"}
    results = run(rows, metrics=["perplexity", "agreement", "rouge_l"], cache_dir=tmp_path, **own)
    examples = read_examples(rows, tokenizer, dataclasses.replace(SETTINGS, **own))
    labels = [example.completion_ids for example in examples]
    sides = {
        name: [
            {"input_ids": [*ids, *y], "labels": [-100] * len(ids) + y} for ids, y in zip(prompts, labels, strict=True)
        ]
        for name, prompts in (
            ("q", [example.prompt_ids for example in examples]),
            ("p", [tokenizer(r["hint"] + r["prompt"], add_special_tokens=False)["input_ids"] for r in rows]),
        )
    }
    q, p = (getattr(dense(models["student"], models["teacher"], of_side), name) for name, of_side in sides.items())
    assert results.model("mine").scores["kl"].value == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4
    )
    nll = -p.gather(1, torch.tensor([token for y in labels for token in y])[:, None]).mean()
    assert results.model("teacher").scores["perplexity"].value == pytest.approx(nll.exp().item(), rel=1e-4)
    plain = run(
        rows, metrics=["perplexity", "agreement", "rouge_l"], cache_dir=tmp_path
    )  # nothing of the other is read
    assert plain.model("mine").scores["kl"].value != pytest.approx(results.model("mine").scores["kl"].value, rel=1e-2)
    assert plain.model("mine").scores["rouge_l"].value == results.model("mine").scores["rouge_l"].value


def forced(tokenizer):
    """The rows as `dense` takes them."""
    return [
        {
            "input_ids": [*each.prompt_ids, *each.completion_ids],
            "labels": [-100] * len(each.prompt_ids) + each.completion_ids,
        }
        for each in read_examples(ROWS, tokenizer, SETTINGS)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_forced_scores_equal_a_dense_reference_at_any_batch_size(run, models, dense, tokenizer, batch_size):
    results = run(metrics=["perplexity", "agreement", "calibration"], batch_size=batch_size)
    found = dense(models["student"], models["teacher"], forced(tokenizer))
    assert len(found.labels) == sum(len(row["completion"]) + 1 for row in ROWS), "EOS counts, padding does not"
    q, p = found.q, found.p
    m = ((q.exp() + p.exp()) / 2).log()
    sure, best = q.exp().max(-1)
    expected = {
        "perplexity": (-q.gather(1, found.labels[:, None]).mean()).exp(),
        "kl": (p.exp() * (p - q)).sum(-1).mean(),
        "reverse_kl": (q.exp() * (q - p)).sum(-1).mean(),
        "jsd": ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)).mean() / 2,
        "top1_agreement": (p.argmax(-1) == best).double().mean(),
        "acceptance": torch.minimum(p.exp(), q.exp()).sum(-1).mean(),
    }
    scores = results.model("mine").scores
    for name, value in expected.items():
        assert scores[name].value == pytest.approx(value.item(), rel=1e-4), name
    bins = (sure * 10).ceil().long() - 1
    right = (best == found.labels).double()
    ece = sum((right[bins == b] - sure[bins == b]).sum().abs() for b in range(10)) / len(sure)
    assert scores["ece"].value == pytest.approx(ece.item(), rel=1e-3)
    teacher_nll = -p.gather(1, found.labels[:, None]).mean()
    assert results.model("teacher").scores["perplexity"].value == pytest.approx(teacher_nll.exp().item(), rel=1e-4)


def test_acceptance_is_at_the_sampling_temperature_and_so_is_its_cache(run, models, dense, tokenizer, tmp_path):
    for temperature in (1.0, 0.5):
        scores = run(metrics=["agreement"], temperature=temperature, cache_dir=tmp_path).model("mine").scores
        found = dense(models["student"], models["teacher"], forced(tokenizer), temperature=temperature)
        expected = torch.minimum(found.p.exp(), found.q.exp()).sum(-1).mean().item()
        assert scores["acceptance"].value == pytest.approx(expected, rel=1e-4)


def test_a_copy_of_the_teacher_has_closed_all_of_every_gap(all_results):
    teacher, same = all_results.model("teacher"), all_results.model("copy of the teacher")
    assert same.fingerprint == teacher.fingerprint
    for name in ("kl", "reverse_kl", "jsd", "student_text_kl", "student_text_reverse_kl", "student_text_jsd"):
        assert same.scores[name].value == teacher.scores[name].value == 0.0
    for name in ("top1_agreement", "acceptance"):
        assert same.scores[name].value == same.scores[f"student_text_{name}"].value == 1.0
    assert same.scores["exposure_error"].value == 0.0
    assert same.scores.keys() == teacher.scores.keys()
    # Text that is sampled anew: the copy draws by a student's random numbers, not by its teacher's.
    sampled = {"rouge_l", "distinct_4", "self_bleu", "completion_tokens", "ended", "consistency", "majority_accuracy"}
    compared = 0
    for name, score in same.scores.items():
        if name in sampled:
            continue
        assert score.value == teacher.scores[name].value, name
        assert score.gap_closed is not None
        if score.gap_closed.value is not None:  # else teacher and baseline score alike
            assert score.gap_closed.value == pytest.approx(1.0), name
            compared += 1
    assert compared >= 9
    assert any(same.scores[name].value != teacher.scores[name].value for name in sampled)


def test_a_student_that_is_the_baseline_has_closed_nothing(run, models):
    results = run(students={"same": copy.deepcopy(models["baseline"])}, metrics=["perplexity", "agreement"])
    for name, score in results.model("same").scores.items():
        assert score.difference.value == 0.0 and score.gap_closed.value == pytest.approx(0.0), name


def test_own_text_is_sampled_by_the_model_itself(run, models, tokenizer, dense):
    results = run(metrics=["agreement"])
    sample = results.samples[0]
    ids = tokenizer(sample.prompt).input_ids
    own = next(each for each in results.tokens if each.model == "mine" and each.text == "student")
    written = [tokenizer.convert_tokens_to_ids(token) for token in own.tokens]
    labels = [-100] * len(ids) + written
    found = dense(models["student"], models["teacher"], [{"input_ids": [*ids, *written], "labels": labels}])
    assert own.kl == pytest.approx((found.p.exp() * (found.p - found.q)).sum(-1).tolist(), rel=1e-3)
    for place, (top, given) in enumerate(zip(own.teacher_top, own.teacher_probability, strict=True)):
        p = found.p[place].exp()
        assert [each.probability for each in top] == pytest.approx(p.topk(5).values.tolist(), abs=1e-4)
        assert given == pytest.approx(p[written[place]].item(), abs=1e-4)
    assert results.model("mine").scores["student_text_kl"].per_prompt[0] == pytest.approx(
        sum(own.kl) / len(own.kl), rel=1e-4
    )


def test_greedy_answers_and_consistency(run, models, tokenizer):
    results = run(metrics=["accuracy", "consistency"])
    prompts = [tokenizer(row["prompt"]).input_ids for row in ROWS]
    sampling = SETTINGS.sampling([tokenizer.eos_token_id], tokenizer.pad_token_id, None, greedy=True)
    right = []
    for ids, row in zip(prompts, ROWS, strict=True):
        (written,) = decode_completions(
            models["student"].eval(), torch.tensor([ids]), torch.ones(1, len(ids)), sampling
        )
        right.append(tokenizer.decode(written, skip_special_tokens=True).strip() == row["completion"])
    scores = results.model("mine").scores
    assert scores["accuracy"].per_prompt == [float(each) for each in right]
    assert 0.5 <= scores["consistency"].value <= 1.0


def test_positions_lengths_and_bins_add_up(all_results):
    mine = all_results.model("mine")
    curve = next(c for c in mine.positions if (c.text, c.measure) == ("reference", "kl"))
    assert curve.count[0] == len(ROWS) and curve.count == sorted(curve.count, reverse=True)
    tokens = sum(curve.count)
    assert sum(m * n for m, n in zip(curve.mean, curve.count, strict=True)) / tokens == pytest.approx(
        mine.scores["kl"].value, rel=1e-6
    )
    assert sum(mine.lengths.counts) == len(ROWS) * len(SETTINGS.seeds)
    assert sum(each.tokens for each in mine.calibration) == tokens
    assert mine.exposure[-1] == pytest.approx(mine.scores["exposure_error"].value)
    assert len(mine.scores["rouge_l"].per_seed) == 2
    assert mine.scores["rouge_l"].value == pytest.approx(sum(mine.scores["rouge_l"].per_seed) / 2)
    assert all_results.model("teacher").cost.speedup == 1.0
    assert mine.cost.parameters == 21088 and mine.cost.tokens_per_second > 0


def test_without_references_the_teachers_text_is_forced(run):
    results = run([{"prompt": row["prompt"]} for row in ROWS], metrics=["perplexity", "agreement", "exposure_bias"])
    assert results.data["reference_text"] == "the teacher"
    forced = next(each for each in results.tokens if each.text == "reference")
    assert "".join(forced.tokens).replace("<eos>", "").replace("<pad>", "") == results.samples[0].completions["teacher"]


def test_one_model_alone(run):
    results = run(teacher=None, baseline=None)
    assert [model.role for model in results.models] == ["student"]
    scores = results.model("mine").scores
    assert {"perplexity", "rouge_l", "accuracy", "distinct_4", "consistency", "ece"} <= scores.keys()
    assert not {"kl", "exposure_error"} & scores.keys()
    assert any("agreement was left out" in note for note in results.notes)
    assert all(score.gap_closed is None and score.difference is None for score in scores.values())


def test_plain_text_has_a_perplexity_without_its_first_token(run, models, dense, tokenizer):
    results = run([{"text": "12+34=46"}], metrics=["perplexity"])
    ids = [*tokenizer("12+34=46").input_ids, tokenizer.eos_token_id]
    row = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    found = dense(models["student"], models["teacher"], [row])
    expected = (-found.q.gather(1, found.labels[:, None]).mean()).exp().item()
    assert results.model("mine").scores["perplexity"].value == pytest.approx(expected, rel=1e-4)


def test_a_model_is_left_as_it_came(run, make_student, models):
    student = make_student(seed=9).train()
    run(students={"mine": student}, metrics=["perplexity"])
    assert student.training and all(p.requires_grad for p in student.parameters())


# ---- Caches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Batches read and batches sampled, as they happen."""
    from distill_trainers.evaluation import collect
    from distill_trainers.rollouts import engines

    calls = {"read": 0, "sampled": 0, "fail at": None}

    def counting(name, inner):
        def call(*args, **kwargs):
            calls[name] += 1
            if calls["fail at"] == (name, calls[name]):
                raise KeyboardInterrupt
            return inner(*args, **kwargs)

        return call

    original = collect.pair_runner
    monkeypatch.setattr(collect, "pair_runner", lambda *a, **k: counting("read", original(*a, **k)))
    monkeypatch.setattr(engines, "decode_completions", counting("sampled", engines.decode_completions))
    return calls


def scores_without_cost(results):
    return [(model.name, model.scores, model.positions) for model in results.models]


def test_a_second_evaluation_runs_and_loads_no_model(saved, counted, tmp_path):
    how = {"teacher": saved.teacher, "baseline": saved.student, "settings": SETTINGS, "use_cpu": True}
    how |= {"cache_dir": tmp_path / "cache", "progress": False}
    first = evaluate_models({"mine": saved.student}, ROWS, **how)
    assert counted["read"] > 5 and counted["sampled"] > 5
    counted.update(read=0, sampled=0)
    again = prepare({"mine": saved.student}, ROWS, **how)
    second = again.run()
    assert (counted["read"], counted["sampled"]) == (0, 0)
    assert [subject.loads for subject in again.subjects] == [0, 0, 0]
    assert scores_without_cost(second) == scores_without_cost(first)
    assert [model.cost for model in second.models] == [model.cost for model in first.models]
    assert second.tokens == first.tokens and second.samples == first.samples


@pytest.mark.parametrize("where", [("sampled", 4), ("read", 2), ("read", 6)])
def test_an_interrupted_evaluation_goes_on(run, counted, tmp_path, where):
    metrics = ["perplexity", "agreement", "rouge_l"]
    expected = run(metrics=metrics)
    total = dict(counted)
    counted.update(read=0, sampled=0, **{"fail at": where})
    with pytest.raises(KeyboardInterrupt):
        run(metrics=metrics, cache_dir=tmp_path)
    done = {name: counted[name] - (name == where[0]) for name in ("read", "sampled")}
    counted.update(read=0, sampled=0, **{"fail at": None})
    results = run(metrics=metrics, cache_dir=tmp_path)
    assert {name: counted[name] + done[name] for name in done} == {name: total[name] for name in done}
    assert scores_without_cost(results) == scores_without_cost(expected)


def test_a_torn_line_is_made_anew(run, counted, tmp_path):
    metrics = ["perplexity", "rouge_l"]
    expected = run(metrics=metrics, cache_dir=tmp_path).model("mine").scores["perplexity"]
    for part in tmp_path.rglob("part-*.jsonl"):
        part.write_text(part.read_text()[:-9])
    counted.update(read=0, sampled=0)
    found = run(metrics=metrics, cache_dir=tmp_path).model("mine").scores["perplexity"]
    assert found.per_prompt == pytest.approx(expected.per_prompt, rel=1e-4), "a row alone is rounded differently"
    assert counted["read"] == 3 and counted["sampled"] == 6, "one row of each file"


def test_what_changes_a_result_is_not_taken_from_the_cache(run, counted, tmp_path, make_student):
    run(metrics=["rouge_l"], cache_dir=tmp_path)
    for changes in ({"temperature": 0.5}, {"seeds": [7, 8]}, {"students": {"mine": make_student(seed=8)}}):
        counted["sampled"] = 0
        run(metrics=["rouge_l"], cache_dir=tmp_path, **changes)
        assert counted["sampled"] > 0
    counted.update(read=0, sampled=0)
    run(metrics=["rouge_l", "agreement"], cache_dir=tmp_path)
    assert counted["sampled"] == 0 and counted["read"] > 0, "another metric only adds what it needs"


# ---- Models and data ------------------------------------------------------------------------------------------------


def test_an_adapter_is_evaluated_as_its_merged_model(saved, make_student, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # else the adapter is another in each run, and now and then changes next to nothing
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved.student),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    settings = dataclasses.replace(SETTINGS, metrics=["perplexity"])
    how = {"settings": settings, "use_cpu": True, "progress": False}
    given = evaluate_models({"adapter": str(tmp_path / "adapter")}, ROWS, **how).model("adapter")
    merged = evaluate_models({"merged": adapted.merge_and_unload()}, ROWS, tokenizer=tokenizer, **how).model("merged")
    plain = evaluate_models({"plain": saved.student}, ROWS, **how).model("plain")
    assert given.scores["perplexity"].value == pytest.approx(merged.scores["perplexity"].value, rel=1e-5)
    assert given.scores["perplexity"].value != pytest.approx(plain.scores["perplexity"].value, rel=1e-3)
    assert given.source == "adapter"


def test_questions_choices_references_and_lengths(tokenizer):
    rows = [
        {"question": "1+1", "answer": 2},
        {"prompt": "1+2=", "references": ["3", "=3="]},
        {"prompt": "1+3=", "completion": "4", "answer": "4"},
        {"text": "1+1=2"},
        {"prompt": "", "completion": ""},
    ]
    settings = dataclasses.replace(SETTINGS, question_prompt="{question}=")
    examples = ExampleSet(read_examples(rows, tokenizer, settings))
    assert len(examples.examples) == 4
    assert examples.subsets == {
        "texts": [0, 2, 3],
        "prompts": [0, 1, 2],
        "references": [0, 1, 2],
        "questions": [0, 1, 2],
    }
    assert [each.answer for each in examples.examples] == ["2", "3", "4", "1+1=2"]
    assert tokenizer.decode(examples.examples[0].prompt_ids) == "1+1="
    assert examples.examples[0].completion_ids[-1] == tokenizer.eos_token_id
    assert len(read_examples(rows, tokenizer, dataclasses.replace(settings, max_samples=2))) == 2
    long = [{"prompt": "1+1=" * 9, "completion": "2" * 30}]
    (cut,) = read_examples(long, tokenizer, settings)
    assert len(cut.prompt_ids) <= 20 - 5 and len(cut.prompt_ids) + len(cut.completion_ids) <= 20


def test_references_of_few_words_are_left_out(tokenizer):
    rows = [{"prompt": "1=", "references": ["one two"]}, {"prompt": "2=", "references": ["one", "one two three"]}]
    settings = dataclasses.replace(SETTINGS, min_reference_words=3)
    assert [each.references for each in read_examples(rows, tokenizer, settings)] == [["one", "one two three"]]
    with pytest.raises(DatasetError, match="min_reference_words=9"):
        read_examples(rows, tokenizer, dataclasses.replace(settings, min_reference_words=9))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": ["rogue_l"]}, "rogue_l"),
        ({"metrics": []}, "metrics"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 20}, "max_length"),
        ({"confidence": 1.0}, "confidence"),
        ({"answer_formats": ["hsh"]}, "hsh"),
        ({"answer_kind": "nmber"}, "nmber"),
        ({"bootstrap_samples": 0}, "bootstrap_samples"),
        ({"students": {"teacher": "x"}}, "another name"),
        ({"students": {}, "teacher": None, "baseline": None}, "no model"),
        ({"students": {"mine": "./no/such/folder"}}, "not a folder"),
        ({"teacher": None, "metrics": ["agreement"]}, "no teacher"),
    ],
)
def test_what_cannot_work_is_refused(run, changes, expected):
    with pytest.raises(ConfigurationError, match=expected):
        run(**changes)


@pytest.mark.parametrize(
    ("rows", "metrics", "expected"),
    [
        ([{"prompt": "1="}], ["rouge_l"], "references"),
        ([{"prompt": "1="}], ["accuracy"], "answer"),
        ([{"text": "1="}], ["diversity"], "no prompts"),
        ([{"prompt": "", "completion": ""}], None, "None of the 1 rows"),
        ([{"colour": "red"}], None, "colour"),
        ([{"prompt": "1=", "references": "2"}], None, "a list of texts"),
        ([{"prompt": "1=", "completion": 4}], None, "Row 0"),
    ],
)
def test_data_that_cannot_serve_is_refused(run, rows, metrics, expected):
    with pytest.raises(DatasetError, match=expected):
        run(rows, metrics=metrics)


def test_one_seed_has_no_consistency(run):
    with pytest.raises(DatasetError, match="several seeds"):
        run(metrics=["consistency"], temperature=0.0)


def test_other_tokenizers_are_refused_before_weights_are_loaded(saved, make_student, tmp_path, monkeypatch):
    from distill_trainers import models

    other = character_tokenizer()
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    table = vocabulary["model"]["vocab"]
    table["1"], table["2"] = table["2"], table["1"]
    other._tokenizer = type(other._tokenizer).from_str(json.dumps(vocabulary))
    make_student().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load_causal_lm", refuse)
    with pytest.raises(VocabularyError, match="'teacher' and 'other' cannot be compared"):
        evaluate_models({"other": str(tmp_path / "other")}, ROWS, teacher=saved.teacher, settings=SETTINGS)


# ---- Processes, results and tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_texts_and_run_equally_many_batches(world):
    texts = [([1, 2], [n]) for n in (3, 4, 3, 5)] + [([1], [7, 8])]
    batches, found = [], [None] * len(texts)
    for rank in range(world):
        count = 0

        def run(batch):
            nonlocal count
            count += 1
            labels = batch["labels"][:, 1:]
            return {"id": labels[labels != -100].float()}

        how = {"pad_token_id": 0, "device": torch.device("cpu"), "batch_size": 2, "progress": False}
        found[rank::world] = force(texts, run, rank=rank, world=world, **how)
        batches.append(count)
    assert len(set(batches)) == 1
    assert [each["id"] for each in found] == [completion for _, completion in texts]


def test_results_survive_json(all_results, tmp_path):
    all_results.save(tmp_path)
    read = EvaluationResults.load(tmp_path)
    assert read == EvaluationResults.load(tmp_path / "evaluation.json")
    assert read.to_json() == all_results.to_json()
    assert read.model("mine").scores["kl"] == all_results.model("mine").scores["kl"]
    assert read.tokens[0].student_top[0][0] == all_results.tokens[0].student_top[0][0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "no JSON"),
        ("[]", "no evaluation"),
        ('{"format": "other"}', "'other'"),
        ('{"format": "distill_trainers.evaluation", "version": 99}', "version 99"),
        ('{"format": "distill_trainers.evaluation", "version": 1}', "damaged"),
    ],
)
def test_other_files_are_no_results(text, expected, tmp_path):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(DatasetError, match=expected):
        EvaluationResults.load(tmp_path)


def test_no_results(tmp_path):
    with pytest.raises(DatasetError, match="There are no results"):
        EvaluationResults.load(tmp_path)


def test_numbers_that_are_not_finite_are_null(all_results):
    changed = dataclasses.replace(all_results, data={"x": float("inf"), "y": [float("nan")]})
    assert json.loads(changed.to_json())["data"] == {"x": None, "y": [None]}


def test_tables(all_results):
    scores, gaps, costs = tables_of(all_results)
    assert scores.headings == ["", "teacher", "baseline", "mine", "copy of the teacher"]
    assert gaps.headings == ["", "mine", "copy of the teacher"]
    assert {row[2] for row in gaps.rows if "KL" in row[0]} == {"(100 %)"}  # of six prompts
    assert [row[0] for row in costs.rows][:3] == ["Parameters", "Weights (MiB)", "Decoding (tokens/s)"]
    text = markdown(all_results)
    assert text.count("\n## ") == 4 and "/tmp" not in text
    assert (number(None), number(0.5, "share"), number(12345.6), number(2.3456)) == ("–", "50.0 %", "12,346", "2.346")
    assert share_of_gap(None) == "–"


def test_a_workshop_without_samples_asks_for_none(tokenizer):
    workshop = Workshop(SETTINGS, ["perplexity"], tokenizer, None)
    assert workshop.samples(None, ExampleSet([])) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "1+1="),
        ({"prompt": [{"role": "user", "content": "1+1="}]}, "1+1="),
        ({"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}, "1+1="),
        (
            {"conversations": [{"from": "system", "value": "1"}, {"from": "human", "value": "2"}]},
            "system: 1\n\nuser: 2",
        ),
    ],
)
def test_prompts_are_shown_as_they_were_written(tokenizer, row, text):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (example,) = read_examples([row], tokenizer, SETTINGS)
    assert example.prompt_text == text
