"""The benchmarks run, at toy size, and every contender computes the same thing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_trainers_beside_trl_are_given_the_same_batches():
    shown = _run("compare_trl.py", "--modes", "off-policy, teacher three times as deep, LoRA student")
    lines = [line for line in shown.splitlines() if "Trainer" in line and line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len(rows) == 3 and all(len(row) == 8 and float(row[3]) > 0 for row in rows)
    losses = [float(row[-1]) for row in rows]  # ours from the live teacher and from its cache, and theirs
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


@pytest.mark.slow
def test_losses_beside_others_have_the_same_value(tmp_path):
    _run("loss.py", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    values = {name: runs[0]["loss"] for name, runs in results.items() if name != "bare"}
    assert {"ours", "trl_gkd", "trl_distillation"} <= values.keys()
    assert all(value == pytest.approx(values["ours"], rel=1e-4) for value in values.values())


@pytest.mark.slow
def test_rollouts_of_every_engine_are_counted(tmp_path):
    _run("rollouts.py", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"hf", "keep", "decode"}
    assert all(run["tokens"] > 0 and run["tokens_per_second"] > 0 for runs in results.values() for run in runs)
    # Dropping finished rows does not change what is sampled.
    assert results["keep"][0]["tokens"] == results["decode"][0]["tokens"]


@pytest.mark.bench
def test_packed_rows_are_timed_beside_padded_ones(tmp_path):
    _run("packing.py", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 4 and all(run["per_cpu_second"] > 0 for runs in results.values() for run in runs)
    assert {run["steps"] for runs in results.values() for run in runs} == {4}, "as many rows a step, packed or not"


@pytest.mark.bench
def test_steps_of_minillm_are_timed_beside_gkd(tmp_path):
    _run("minillm.py", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 5 and all(run["cpu_seconds"] > 0 for runs in results.values() for run in runs)


@pytest.mark.bench
def test_students_with_and_without_rationales_are_scored_alike(tmp_path):
    options = ["--task", "addition", "--train", "64", "--steps", "3", "--seeds", "1", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(BENCHMARKS / "rationales.py"), *options], check=True, capture_output=True)
    results = [json.loads(line) for line in (tmp_path / "addition.jsonl").read_text().splitlines()]
    assert [result["rationale_weight"] for result in results] == [0.0, 1.0]
    assert all(0 <= result["accuracy"] <= 1 and result["label"] > 0 for result in results)


@pytest.mark.bench
def test_students_with_a_tokenizer_of_their_own_are_judged_alike(tmp_path):
    options = ["--contenders", "ours", "gold", "--seeds", "0", "--json", str(tmp_path / "out.json")]
    shown = _run("cross_tokenizer.py", "--work", str(tmp_path), *options)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"teacher", "start", "ours", "gold"}
    assert all(0 < run["bits_per_byte"] < 12 for runs in results.values() for run in runs)
    assert shown.count("|") == 8 * 6, "teacher, start and two contenders below two lines of heading"


@pytest.mark.bench
def test_the_memory_formula_stands_beside_measured_peaks(tmp_path):
    """At toy size what the libraries take outweighs the models, so that only the order of things is looked at."""
    _run("memory.py", "--runs", "single", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"single"}
    assert all(0 < run["predicted_mib"] < run["measured_mib"] for runs in results.values() for run in runs)


@pytest.mark.bench
def test_a_served_teacher_is_timed_beside_a_local_one(tmp_path):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    _run("remote.py", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 7 and all(run["tokens_per_second"] > 0 for runs in results.values() for run in runs)


@pytest.mark.slow
def test_what_a_gpu_is_measured_with_runs_as_a_toy_on_a_cpu(tmp_path):
    table = _run("gpu.py", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"bytes", "loss", "off_policy", "on_policy", "vllm"} and table.count("\n| ours") == 6
    assert all(record["by_kernels"] < record["by_torch"] / 5 for record in results["bytes"])
    losses = [record["loss"] for record in results["loss"] if record.get("loss")]
    assert len(losses) >= 4 and losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    trained = [*results["off_policy"], *results["on_policy"]]
    assert len(trained) == 3 and all(record["seconds"] > 0 for record in trained)


def test_a_part_that_takes_too_long_is_written_down(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setitem(gpu.BUDGETS, "bytes", 0.01)
    records = gpu.run_part("bytes", quick=True)
    assert records == [{"name": "bytes", "failed": "more than 0.01 s"}]
    assert "| bytes | not measured: more than 0.01 s |" in gpu.table(records)
    assert gpu.tried("a", lambda: 1 // 0)["failed"].startswith("ZeroDivisionError")


def _toy_teacher(folder, tokenizer, **more):
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    shape |= {"vocab_size": len(tokenizer), "hidden_size": 16, **more}
    config = LlamaConfig(max_position_embeddings=1024, tie_word_embeddings=True, **shape)
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_every_method_is_judged_by_one_evaluation(tmp_path, make_tokenizer):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    teacher = _toy_teacher(tmp_path / "teacher", make_tokenizer())
    options = ["--teacher", teacher, "--work", str(tmp_path / "work"), "--keep-layers", "2"]
    options += ["--contenders", "gkd_minillm", "rationale"]  # a process of its own each
    table = _run("methods.py", *options, "--seconds", "1", "--seeds", "0", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 4 and table.count("\n|") == 6  # start, teacher and two trainings, below two lines
    trained = [row for row in results.values() if "steps" in row]
    assert len(trained) == 2 and all(row["steps"] >= 1 and row["scores"]["kl"]["value"] > 0 for row in trained)
    assert results["the teacher"]["scores"]["perplexity"]["value"] > 1


@pytest.mark.bench
def test_instructions_into_the_weights_stand_beside_sft(tmp_path):
    options = ["--what", "concise", "--work", str(tmp_path), "--seeds", "0", "--json", str(tmp_path / "out.json")]
    table = _run("prompt_distillation.py", *options)
    results = {name: runs[0] for name, runs in json.loads((tmp_path / "out.json").read_text())["results"].items()}
    assert set(results) == {"start", "divergence", "sft"} and table.count("\n|") == 5
    start = results["start"]
    assert start["plain_kl"] == pytest.approx(0, abs=1e-6) and start["told_kl"] > 0, "a new adapter changes nothing"
    assert all(run["tokens"] >= 1 and run["cpu_seconds"] > 0 for run in results.values() if run is not start)
    assert results["divergence"]["told_kl"] < start["told_kl"], "the loss has fallen on held-out prompts, too"


@pytest.mark.bench
def test_rewards_for_a_format_stand_beside_as_many_steps_of_the_divergence(tmp_path):
    options = ["--work", str(tmp_path), "--seeds", "0", "--json", str(tmp_path / "out.json")]
    table = _run("format_rewards.py", *options)
    results = {name: runs[0] for name, runs in json.loads((tmp_path / "out.json").read_text())["results"].items()}
    assert set(results) == {"teacher", "divergence", "rewards"} and table.count("\n| ") == 4
    control, rewarded = results["divergence"], results["rewards"]
    assert control.keys() == rewarded.keys() and control["before"] == rewarded["before"]
    assert control["halfway"] == rewarded["halfway"], "rewards have not begun"


@pytest.mark.bench
def test_one_student_of_two_experts_stands_beside_one_of_each(tmp_path):
    table = _run("experts.py", "--work", str(tmp_path), "--seeds", "0", "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"both", "addition", "subtraction"} and table.count("\n| ") == 3
    for name in ("addition", "subtraction"):
        own, common = results[name][0], results["both"][0]
        assert own[f"before/{name}"] == pytest.approx(common[f"before/{name}"], rel=1e-5) and own[f"before/{name}"] > 0


@pytest.mark.bench
def test_a_profile_of_a_step_says_where_its_time_goes(tmp_path, make_tokenizer):
    teacher = _toy_teacher(tmp_path / "teacher", make_tokenizer())
    out = tmp_path / "out.json"
    _run("step.py", "--teacher", teacher, "--steps", "2", "--new-tokens", "4", "--json", str(out))
    results = json.loads(out.read_text())["results"]
    for name in ("off", "on"):
        shares, got = results[name]["shares"], results[name]
        assert sum(sum(kinds.values()) for kinds in shares.values()) == pytest.approx(1)
        assert got["cpu_seconds"] > got["floor_seconds"] > 0 and got["trained_tokens"] > 0
        assert all(shares[part].get("products", 0) > 0 for part in ("teacher", "forward and loss", "backward"))
        assert (shares["rollout"].get("products", 0) > 0) == (name == "on")


def test_results_of_other_settings_are_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measuring, draft = importlib.import_module("measuring"), importlib.import_module("draft")
    given = ["--teacher", "a", "--work", str(tmp_path / "work")]
    for more in (["--quick"], ["--quick", "--seconds", "150", "--seeds", "7", "--contenders", "lk"]):
        measuring.keep_settings(draft.arguments().parse_args([*given, *more]))
    with pytest.raises(SystemExit, match="quick was True, is False, seconds was 150, is 9.0. Name another --work"):
        measuring.keep_settings(draft.arguments().parse_args([*given, "--seconds", "9"]))


@pytest.mark.slow
def test_drafts_are_accepted_as_often_as_the_distributions_say(tmp_path, make_tokenizer, monkeypatch):
    """By transformers' own speculation on tiny random models, beside Σ min(p, q) of the text that it wrote."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    draft = importlib.import_module("draft")
    teacher = _toy_teacher(tmp_path / "teacher", make_tokenizer(), initializer_range=0.3)
    options = [
        "--quick",
        "--teacher",
        teacher,
        "--work",
        str(tmp_path / "work"),
        "--keep-layers",
        "1",
        "--seconds",
        "1",
    ]
    options = draft.arguments().parse_args([*options, "--seeds", "0", "--contenders", "lk", "--new-tokens", "200"])
    for name, seed in draft.runs(options):
        draft.work(name, str(seed), options)
    results = draft.summary(options)
    assert set(results) == {"before", "lk"} and draft.table(results).count("\n|") == 3
    for (found,) in results.values():
        assert found["tried"] > 300 and 0.1 < found["expected"] < 0.95
        assert abs(found["accepted"] - found["expected"]) < 1.5 * found["half_interval"] < 0.08
        assert found["tokens"] > found["rounds"] * (1 + 0.5 * found["expected"])
    assert results["lk"][0]["steps"] >= 1 and results["lk"][0]["kl"] != results["before"][0]["kl"]


@pytest.mark.bench
def test_students_of_every_shape_are_pruned_trained_and_judged(tmp_path, make_tokenizer):
    teacher = _toy_teacher(tmp_path / "teacher", make_tokenizer())
    options = ["--teacher", teacher, "--work", str(tmp_path / "work"), "--seconds", "1", "--seeds", "0"]
    options += ["--contenders", "1 width", "1 planned", "--json", str(tmp_path / "out.json")]
    table = _run("pruning.py", *options)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"1 width", "1 planned"} and table.count("\n|") == 4
    assert all(row["kl"] > 0 and row["after"] > 0 and row["runs"][0]["steps"] >= 1 for row in results.values())
    assert results["1 planned"]["candidates"] and not results["1 width"]["candidates"]
    curve = tmp_path / "curve.svg"
    _run("pruning.py", *options, "--plot", str(curve))  # all of it is there
    assert "</svg>" in curve.read_text(encoding="utf-8")


@pytest.mark.bench
def test_rounding_and_training(tmp_path, make_tokenizer):
    pytest.importorskip("torchao")
    teacher = _toy_teacher(tmp_path / "teacher", make_tokenizer())
    options = ["--teacher", teacher, "--work", str(tmp_path / "work"), "--seconds", "1", "--seeds", "0"]
    options += ["--group-size", "16", "--json", str(tmp_path / "out.json")]
    table = _run("quantized.py", *options)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["unquantised"]["kl"] < 1e-6 < results["ptq"]["kl"] and table.count("\n|") == 6
    (run,) = results["qad"]
    assert run["steps"] >= 1 and run["off"] == 0
