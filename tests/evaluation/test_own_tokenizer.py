"""A teacher with a tokenizer of its own is compared with its students in bytes, and not in tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_trainers.evaluation import EvaluationSettings, evaluate_models
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_rows, character_tokenizer, tiny_llama

SETTINGS = EvaluationSettings(
    max_length=20,
    max_new_tokens=5,
    seeds=[1],
    answer_formats=["first_line"],
    answer_kind="number",
    bootstrap_samples=60,
    speed_prompts=2,
    speed_tokens=3,
)
ROWS = addition_rows(6, seed=5)
OWN = dataclasses.replace(SETTINGS, teacher_tokenizer="own")


def pairs_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with some pairs of digits, which is neither the toy's vocabulary nor its way to cut."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "3579" for b in "0246"]
    vocab = {token: i for i, token in enumerate(["<end>", *letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for name, tokenizer, seed in (
        ("teacher", pairs_tokenizer(), 0),
        ("student", character_tokenizer(), 1),
        ("before", character_tokenizer(), 2),
    ):
        tiny_llama(tokenizer, 32, 1, seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("teacher", "student", "before")}


def run(folders, rows=ROWS, settings=OWN, **given):
    models = {"teacher": folders["teacher"], "baseline": folders["before"], **given}
    return evaluate_models(
        {"mine": folders["student"]}, rows, settings=settings, use_cpu=True, progress=False, **models
    )


def read(folder, tokenizer, row):
    """Bits of the completion with its end, and the likeliest first byte at each of its places, written out."""
    from transformers import AutoModelForCausalLM

    prompt, completion = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    logps = logps[len(prompt) - 1 : -1]
    bits = -sum(logps[i, token].item() for i, token in enumerate(completion)) / math.log(2)
    likeliest = []
    for place in logps.exp():
        mass: dict[str, float] = {}
        for i, p in enumerate(place.tolist()):
            token = tokenizer.convert_ids_to_tokens(i)
            first = "end" if i == tokenizer.eos_token_id else "special" if token == "<pad>" else token[0]
            mass[first] = mass.get(first, 0.0) + p
        likeliest.append(max(mass, key=mass.get))
    return bits, likeliest, [tokenizer.decode([token]) for token in completion[:-1]]


def test_bits_per_byte_and_next_bytes_are_those_of_the_definition(folders):
    results = run(folders)
    size = sum(len(row["completion"]) for row in ROWS)
    told = {"teacher": [], "mine": []}
    for name, folder, tokenizer in (
        ("teacher", "teacher", pairs_tokenizer()),
        ("mine", "student", character_tokenizer()),
    ):
        told[name] = [read(folders[folder], tokenizer, row) for row in ROWS]
        expected = sum(bits for bits, _, _ in told[name]) / size
        assert results.model(name).scores["bits_per_byte"].value == pytest.approx(expected, rel=1e-4)
    agreed = places = 0
    for (_, ours, letters), (_, theirs, pieces) in zip(told["mine"], told["teacher"], strict=True):
        ends = [sum(map(len, letters[:i])) for i in range(len(letters) + 1)]
        for j in range(len(pieces) + 1):
            i = ends.index(sum(map(len, pieces[:j])))
            agreed, places = agreed + (ours[i] == theirs[j]), places + 1
    assert results.model("mine").scores["next_byte_agreement"].value == pytest.approx(agreed / places)
    assert results.model("teacher").scores["next_byte_agreement"].value == 1


def test_gaps_are_closed_in_bytes_and_not_in_tokens(folders):
    results = run(folders)
    teacher, mine = results.model("teacher").scores, results.model("mine").scores
    assert mine["bits_per_byte"].gap_closed is not None and mine["next_byte_agreement"].gap_closed is not None
    assert "perplexity" not in teacher and mine["perplexity"].gap_closed is None and "kl" not in mine
    assert any("exposure_bias was left out" in note for note in results.notes)
    assert len(results.samples[0].completions) == 3
    costs = [results.model(name).cost for name in ("teacher", "mine")]
    assert all(cost.tokens_per_second > 0 and cost.speedup is None for cost in costs)


def test_prompts_alone_are_read_behind_the_teachers_own_text(folders):
    results = run(folders, [{"prompt": row["prompt"]} for row in ROWS])
    assert results.data["reference_text"] == "the teacher"
    assert results.model("mine").scores["bits_per_byte"].value > 0


def test_one_tokenizer_gives_the_same_either_way(folders):
    same = {"teacher": folders["before"], "baseline": folders["before"]}
    own, shared = (run(folders, settings=settings, **same) for settings in (OWN, SETTINGS))
    for name in ("bits_per_byte", "next_byte_agreement"):
        values = [results.model("mine").scores[name].value for results in (own, shared)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert own.model("baseline").scores["next_byte_agreement"].value == 1


def test_what_needs_shared_tokens_or_a_teacher_is_refused(folders):
    with pytest.raises(ConfigurationError, match="exposure_bias with `teacher_tokenizer: own`"):
        run(folders, settings=dataclasses.replace(OWN, metrics=["exposure_bias"]))
    with pytest.raises(ConfigurationError, match="own` without a teacher"):
        run(folders, teacher=None)
    with pytest.raises(ConfigurationError, match="teacher_tokenizer"):
        run(folders, settings=dataclasses.replace(OWN, teacher_tokenizer="other"))
