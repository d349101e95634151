"""A text depends on its own key alone: on no batch, no order, no neighbour, and never on its teacher's numbers."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
import yaml
from datasets import Dataset

from distill_trainers.cli import main
from distill_trainers.evaluation import EvaluationSettings, evaluate_models
from distill_trainers.evaluation.text_scores import rouge_l
from distill_trainers.rollouts import CompletionStore
from distill_trainers.storage import read_rows
from distill_trainers.toy import addition_rows

PROMPTS = Dataset.from_list([{"prompt": row["prompt"]} for row in addition_rows(24, seed=5)])


@pytest.fixture
def writes(make_teacher, tokenizer):
    """`writes(ids, length, draws)`: so many texts of the teacher, by torch's own sampling, one forward a token."""
    model = make_teacher().eval()

    @torch.no_grad()
    def sample(ids, length, draws):
        generator, rows = torch.Generator().manual_seed(0), torch.tensor([ids] * draws)
        for _ in range(length):
            probabilities = model(input_ids=rows).logits[:, -1].softmax(-1)
            rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        texts = rows[:, len(ids) :].tolist()
        cut = [text[: text.index(1)] if 1 in text else text for text in texts]
        return [tokenizer.decode(text, skip_special_tokens=True) for text in cut]

    return sample


def test_a_copy_of_the_teacher_is_no_nearer_to_its_text_than_chance_has_it(
    make_trainer, make_teacher, writes, tokenizer
):
    """Rouge-L against references that the teacher writes: as of independent draws (it was 100)."""
    names = {"eval_measures": ["rouge_l"], "eval_measures_rows": 24, "temperature": 1.0, "lmbda": 1.0}
    metrics = make_trainer(make_teacher(), make_teacher(), eval_dataset=PROMPTS, **names).evaluate()
    means, variances = [], []
    for row in PROMPTS:
        texts = writes(tokenizer(row["prompt"]).input_ids, 4, 60)
        found = torch.tensor(rouge_l(texts[:30], [[text] for text in texts[30:]]))
        means.append(found.mean().item())
        variances.append(found.var().item() + found.var().item() / 30)
    error = math.sqrt(sum(variances)) / len(means)
    assert abs(metrics["eval_rouge_l"] - sum(means) / len(means)) < 5 * error + 1e-6
    assert metrics["eval_rouge_l"] < 40 and metrics["eval_teacher_rouge_l"] < 40, "nor is the teacher's second text"


def test_what_a_copy_of_the_teacher_rejects_is_not_what_the_teacher_chose(make_trainer, make_teacher):
    """Sibling: the evaluation pairs of DPKD (all were equal)."""
    trainer = make_trainer(make_teacher(), make_teacher(), method="dpkd", eval_dataset=PROMPTS)
    rows = trainer.get_eval_dataloader().dataset
    chosen = [row["input_ids"][row["prompt_length"] :] for row in rows]
    rejected = [row["rejected_ids"] for row in rows]
    assert sum(one == other for one, other in zip(chosen, rejected, strict=True)) < 6


@pytest.fixture
def pairs(recipe, tmp_path):
    def run(folder, teacher, student, **changes):
        data = tmp_path / "prompts.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in PROMPTS))
        file = tmp_path / folder / "pairs.jsonl"
        models = {"teacher_model_name_or_path": teacher, "model_name_or_path": student, "dataset": str(data)}
        assert main(["pairs", "--config", recipe(pairs_file=str(file), **models, **changes)]) == 0
        return [json.loads(line) for line in file.read_text().splitlines()]

    return run


def test_pairs_of_a_teacher_with_itself_are_pairs(pairs, saved):
    """Sibling: all were left out as equal."""
    assert len(pairs("self", saved.teacher, saved.teacher)) > 16


# ---- The same texts whatever the batches, and whatever was there before ---------------------------------------------


def cut(folder, lines):
    """Keep so many of the lines of each store in a folder, as a kill would leave it."""
    parts = sorted(folder.rglob("part-*.jsonl"))
    assert parts
    for part in parts:
        part.write_text("".join(part.read_text().splitlines(keepends=True)[:lines]))


def test_pairs_do_not_depend_on_batches_or_on_what_was_kept(pairs, saved, tmp_path):
    whole = pairs("whole", saved.teacher, saved.student, rollout_batch_size=16)
    shutil.copytree(tmp_path / "whole" / "pairs.jsonl.parts", tmp_path / "again" / "pairs.jsonl.parts")
    cut(tmp_path / "again", 7)
    assert pairs("again", saved.teacher, saved.student, rollout_batch_size=5) == whole


def test_the_teachers_text_does_not_depend_on_batches_or_on_what_was_kept(make_trainer, tmp_path):
    texts, settings = [], {"train": PROMPTS, "seq_kd": True, "lmbda": 0.0, "completions_dir": str(tmp_path / "kept")}
    for engine, size in (("decode", 16), ("decode", 5), ("hf", 3)):
        trainer = make_trainer(rollout_engine=engine, rollout_batch_size=size, **settings)
        trainer.get_train_dataloader()
        texts.append([row["input_ids"] for row in trainer.train_dataset])
        cut(tmp_path / "kept", 9)
    assert texts[1:] == texts[:1] * 2 and len(set(map(tuple, texts[0]))) == 24


def test_an_evaluation_does_not_depend_on_batches_or_on_what_was_kept(make_student, make_teacher, tokenizer, tmp_path):
    """Nor on the order of the rows, or on other rows."""
    rows, found = addition_rows(12, seed=5), []
    for size, order, count in ((16, 1, 12), (5, -1, 12), (1, 1, 6)):
        settings = EvaluationSettings(
            metrics=["diversity"], max_length=20, max_new_tokens=5, seeds=[1, 2], batch_size=size, shown_samples=12
        )
        results = evaluate_models(
            {"mine": make_student(seed=3)},
            rows[:count][::order],
            teacher=make_teacher(),
            settings=settings,
            tokenizer=tokenizer,
            use_cpu=True,
            progress=False,
            cache_dir=tmp_path / "cache",
        )
        found.append({sample.prompt: sample.completions for sample in results.samples})
        cut(tmp_path / "cache" / "completions", 3)
    assert found[0] == found[1] and len(found[0]) > 10
    assert found[2].items() <= found[0].items() and len(found[2]) == 6


def test_chains_do_not_depend_on_batches_or_on_what_was_kept(saved, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"question": f"{n}+{n}=", "answer": str(2 * n)}) for n in range(1, 24)))
    base = {
        "teacher": saved.teacher,
        "questions": str(questions),
        "prompt_style": "text",
        "use_cpu": True,
        "samples": 2,
    }
    base |= {"max_new_tokens": 6, "temperature": 1.0}

    def extract(folder, **changes):
        config = tmp_path / "rationales.yaml"
        config.write_text(yaml.safe_dump({**base, "folder": str(tmp_path / folder), **changes}))
        main(["rationales", "extract", "--config", str(config)])  # its status tells that some answers are empty
        rows = read_rows(tmp_path / folder / "responses.jsonl")
        return {(row["question"], row["provenance"]["sample"]): row["response"] for row in rows}

    whole = extract("whole", batch_size=16)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    cut(tmp_path / "again", 11)
    assert extract("again", batch_size=5) == whole and len(whole) > 15  # of 46: the tiny teacher says nothing to some
    assert any(whole.get((question, 0), text) != text for (question, sample), text in whole.items() if sample)


def test_rollouts_depend_on_their_place_in_the_step_alone(make_trainer, batch_of):
    """Not on how many are worked on together, by which engine, or in how many batches of a window."""
    windows = []
    for engine, size, sizes in (("decode", None, (8, 4)), ("decode", 5, (2,) * 6), ("hf", 1, (12,))):
        settings = {"rollout_engine": engine, "rollout_batch_size": size, "per_device_train_batch_size": sizes[0]}
        trainer = make_trainer(lmbda=1.0, max_new_tokens=8, **settings)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        batches = [batch_of(trainer, range(start, start + n)) for start, n in zip(starts, sizes, strict=True)]
        rolled = trainer.rollout(batches)
        windows.append(
            [
                row[mask.bool()].tolist()
                for b in rolled
                for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
            ]
        )
    assert windows[1:] == windows[:1] * 2


def test_a_model_is_scored_by_other_numbers_than_its_teacher(make_teacher, tokenizer, tmp_path):
    """A copy of it, in the same evaluation; what is kept of the one is not taken for the other's."""
    model = make_teacher()
    settings = EvaluationSettings(metrics=["diversity"], max_length=20, max_new_tokens=5, seeds=[1], shown_samples=12)
    how = {"settings": settings, "tokenizer": tokenizer, "use_cpu": True, "progress": False}
    rows = addition_rows(12, seed=5)
    for _ in range(2):
        results = evaluate_models({"copy": copy.deepcopy(model)}, rows, teacher=model, cache_dir=tmp_path, **how)
        texts = [(sample.completions["copy"], sample.completions["teacher"]) for sample in results.samples]
        assert sum(mine == theirs for mine, theirs in texts) < 4


def test_what_is_kept_for_one_purpose_is_not_taken_for_another(tmp_path, make_trainer):
    """The teacher's references and its scored text had one store where all their settings agreed."""
    names = {"eval_measures": ["rouge_l"], "temperature": 1.0, "lmbda": 1.0, "completions_dir": str(tmp_path / "kept")}
    make_trainer(eval_dataset=PROMPTS, **names).evaluate()
    folders = [folder for folder in (tmp_path / "kept").iterdir() if any(folder.glob("part-*"))]
    assert len(folders) == 2
    described = [json.loads((folder / "identity.json").read_text()) for folder in folders]
    assert {each.get("purpose") for each in described} == {None, "scored"}
    assert all(CompletionStore(tmp_path / "kept", each).load() for each in described)
