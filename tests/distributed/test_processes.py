"""Two real processes train the student that one process trains, under DDP, ZeRO-2, ZeRO-3 and FSDP2."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_trainers.trainers.checkpoints import find_last_complete_checkpoint

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", autouse=True)
def own_extensions(environment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", environment["TORCH_EXTENSIONS_DIR"])
        yield


def launch(folder, config, settings, lora=False, timeout=400, **more):
    """Run the worker (one process without `config`) and read its report; what it said, if it died before."""
    folder.mkdir(parents=True, exist_ok=True)
    job = json.dumps({"output": str(folder), "args": settings, "lora": lora, **more})
    command = [sys.executable]
    if config:
        port = str(29500 + os.getpid() % 400 + abs(hash(str(folder))) % 1000)
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config)]
        command += ["--main_process_port", port]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen(
        [*command, str(WORKER), job],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers too, which outlive a launcher that is killed
    assert process.returncode == 0, output[-2000:] + errors[-6000:]
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.exists() else output


def weights(folder, lora=False):
    if lora:
        from safetensors.torch import load_file

        return load_file(folder / "student" / "adapter_model.safetensors")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()


def assert_same_run(one, two, folder_one, folder_two, lora=False, norms=True):
    first, second = ([log for log in run["logs"] if "loss" in log] for run in (one, two))
    assert len(first) == len(second) >= 4
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4), (a, b)
        assert b["trained_tokens"] == a["trained_tokens"]
        if norms:
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3)
    names = {"eval_loss", "eval_kl", "eval_perplexity", "eval_top1_agreement", "eval_tokens", "eval_accuracy"}
    assert one["eval"].keys() & names == two["eval"].keys() & names and "eval_loss" in one["eval"]
    for name in sorted(names & one["eval"].keys()):
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-3), name
    left, right = weights(folder_one, lora), weights(folder_two, lora)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(right[name], left[name], rtol=2e-3, atol=2e-4, msg=name)


# Greedy rollouts, so that what is sampled does not depend on which process samples it.
SETTINGS = {"max_steps": 4, "temperature": 0.0, "optim": "sgd", "lmbda": 0.0}


def one_and_two(tmp_path, config, lora=False, more=None, **changes):
    settings, more = {**SETTINGS, "gradient_accumulation_steps": 2, **changes}, more or {}
    if more.get("method") in ("dpkd", "rationale"):
        del settings["lmbda"]
    one = launch(tmp_path / "one", None, {**settings, "per_device_train_batch_size": 4}, lora, **more)
    two = launch(tmp_path / "two", config, {**settings, "per_device_train_batch_size": 2}, lora, **more)
    return one, two


def test_two_processes_equal_one(tmp_path):
    one, two = one_and_two(tmp_path, "cpu_ddp.yaml")
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero2.yaml", "cpu_zero3.yaml"])
@pytest.mark.parametrize("lmbda", [0.5, 1.0])
def test_two_processes_equal_one_on_policy(tmp_path, config, lmbda):
    one, two = one_and_two(tmp_path, config, lmbda=lmbda)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
@pytest.mark.parametrize("replay", [0, 8])
def test_processes_whose_completions_end_at_different_steps_wait_for_each_other(tmp_path, config, replay):
    """Under ZeRO-3 one that stops generating earlier would leave the others waiting for its shards."""
    settings = {**SETTINGS, "lmbda": 1.0, "temperature": 1.0, "max_new_tokens": 24, "max_length": 40, "max_steps": 6}
    settings |= {"per_device_train_batch_size": 2, "replay_buffer_size": replay, "learning_rate": 0.01}
    report = launch(tmp_path, config, settings, timeout=200)
    losses = [log["loss"] for log in report["logs"] if "loss" in log]
    assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)
    rollouts = [log["rollouts"] for log in report["logs"] if "loss" in log]
    assert set(rollouts) == ({4.0} if not replay else {0.0, 4.0}), "of both processes"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_zero2.yaml", "cpu_zero3.yaml", "cpu_fsdp2.yaml"])
def test_two_processes_equal_one_sharded(tmp_path, config):
    one, two = one_and_two(tmp_path, config)
    assert two["student_is_sharded"] == ("fsdp2" in config)  # accelerate alone would make DDP of it on a CPU
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero2.yaml", "cpu_zero3.yaml"])
@pytest.mark.parametrize(
    "settings",
    [
        {"reference": "student"},
        {"loss_type": "contrastive_skew"},
        {"reference_logps_dir": "kept", "logprob_mse_weight": 0.5},
    ],
    ids=["student", "contrastive", "kept"],
)
def test_two_processes_equal_one_on_pairs(tmp_path, config, settings):
    """Means over pairs, α of DistiLLM-2 among them, are those of all micro-batches and processes."""
    one, two = one_and_two(tmp_path, config, more={"method": "dpkd", "pairs": True}, **settings)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")
    for name in ("reward_margin", "nll_chosen", "nll_rejected"):
        logs = [[log[name] for log in run["logs"] if name in log] for run in (one, two)]
        assert logs[0] == pytest.approx(logs[1], rel=2e-3, abs=2e-4)
    assert two["eval"]["eval_reward_margin"] == pytest.approx(one["eval"]["eval_reward_margin"], rel=2e-3, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_two_processes_equal_one_on_pairs_of_both_models(tmp_path, config):
    """The teacher's responses, shared, over the student's own, sampled greedily on whichever process."""
    one, two = one_and_two(tmp_path, config, more={"method": "dpkd"})
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_processes_take_the_same_steps_from_the_replay_buffer(tmp_path, config):
    settings = {**SETTINGS, "temperature": 1.0, "refresh_steps": 2, "replay_buffer_size": 8, "max_steps": 4}
    del settings["lmbda"]
    report = launch(tmp_path, config, {**settings, "per_device_train_batch_size": 2}, method="dpkd", timeout=200)
    assert [log["rollouts"] for log in report["logs"] if "loss" in log] == [4.0, 0.0, 4.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml", "cpu_fsdp2.yaml"])
def test_a_sharded_student_is_merged(tmp_path, saved, config):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {**SETTINGS, "per_device_train_batch_size": 2, "merge_adapter": True}
    launch(tmp_path, config, settings, lora=True, student=saved.student)
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged"), torch.tensor([[4, 5, 12, 6, 13]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml", "cpu_fsdp2.yaml"])
def test_two_processes_equal_one_with_lora(tmp_path, config):
    one, two = one_and_two(tmp_path, config, lora=True)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two", lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_two_processes_share_the_teachers_completions(tmp_path, config):
    one, two = one_and_two(tmp_path, config, seq_kd=True)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_two_processes_share_the_measures_on_held_out_prompts(tmp_path, config):
    """Texts of both are read and written once; under ZeRO-3 another engine samples, so only given text compares."""
    measures = {"eval_measures": ["agreement", "rouge_l", "diversity", "exposure_bias", "calibration"]}
    measures |= {"eval_measures_rows": 11, "eval_measures_seeds": 2, "per_device_eval_batch_size": 2}
    one, two = one_and_two(tmp_path, config, **measures, learning_rate=0.05)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")
    names = {"eval_reverse_kl", "eval_jsd", "eval_ece"}
    if "ddp" in config:
        names |= {"eval_rouge_l", "eval_distinct_4", "eval_student_text_kl", "eval_exposure_error"}
        names |= {"eval_teacher_rouge_l", "eval_gap_closed_reverse_kl"}
    for name in names:
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-3, abs=1e-5), name
    assert 0 < two["eval"]["eval_completion_tokens"] <= 4
    samples = [(tmp_path / run / "run" / "samples.jsonl").read_text().count("\n") for run in ("one", "two")]
    assert samples[0] == samples[1] == 3 * 2, "before training and at its end, by the main process alone"


RATIONALES = {"optim": "sgd", "max_steps": 4, "max_length": 48, "learning_rate": 0.5, "temperature": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero2.yaml", "cpu_zero3.yaml"])
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "step_by_step"},
        {"objective": "edit", "wrong_weight": 0.5},
        {"objective": "dual_chain", "innovation_samples": 1},
    ],
    ids=lambda settings: settings["objective"],
)
def test_two_processes_weigh_tasks_by_their_own_tokens(tmp_path, config, settings):
    """Each term is a mean over its tokens on both processes, and questions are answered by both."""
    settings = {**RATIONALES, **settings, "max_new_tokens": 20, "gradient_accumulation_steps": 2}
    one = launch(tmp_path / "one", None, {**settings, "per_device_train_batch_size": 4}, method="rationale")
    two = launch(tmp_path / "two", config, {**settings, "per_device_train_batch_size": 2}, method="rationale")
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")
    first, second = ([log for log in run["logs"] if "loss" in log] for run in (one, two))
    for name in {"label", "rationale", "right_steps", "wrong_steps", "imitation", "answer"} & first[0].keys():
        assert [log[name] for log in second] == pytest.approx([log[name] for log in first], rel=2e-4), name


@pytest.mark.slow
def test_zero3_teacher_is_sharded(tmp_path):
    """Left out of the engine, its weights would stay whole on every process."""
    settings = {**SETTINGS, "max_steps": 1, "per_device_train_batch_size": 2}
    report = launch(tmp_path, "cpu_zero3.yaml", settings, teacher_mlp=2048)  # large enough not to be kept whole
    assert report["teacher_mlp_kept_whole"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_two_processes_fill_and_read_a_teacher_cache(tmp_path, config, kind):
    """Into the second epoch, where each process meets rows that the other has recorded."""
    cache = {"teacher_cache_kind": kind, "teacher_cache_top_k": 999, "teacher_cache": str(tmp_path / "cache")}
    settings = {**SETTINGS, "max_steps": 9, "gradient_accumulation_steps": 2}
    one = launch(tmp_path / "one", None, {**settings, "per_device_train_batch_size": 4})
    two = launch(tmp_path / "two", config, {**settings, **cache, "per_device_train_batch_size": 2})
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


# Nearly greedy, which the weights of importance make up for: what is sampled does not depend on the process.
MINILLM = {"lmbda": 1.0, "teacher_mix_alpha": 0.0, "temperature": 1e-6, "num_minibatches": 2, "num_inner_epochs": 2}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero2.yaml", "cpu_zero3.yaml"])
def test_two_processes_equal_one_in_minillm(tmp_path, config):
    """Through two cycles of rollouts, each with a second inner epoch in an order of its own, and text beside them."""
    more = {"method": "minillm", "text": True}
    one, two = one_and_two(tmp_path, config, more=more, **MINILLM, max_steps=8, learning_rate=0.05)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")
    for a, b in zip(one["logs"], two["logs"], strict=True):
        for name in {"reward", "sequence_kl", "advantage", "ratio", "clipped", "pretraining"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_processes_mix_the_teacher_in_and_wait_for_each_other(tmp_path, config):
    """Completions end at other tokens on each process, which under ZeRO-3 goes on until all of them have."""
    settings = {**SETTINGS, "lmbda": 1.0, "temperature": 1.0, "max_new_tokens": 24, "max_length": 40, "max_steps": 6}
    settings |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "num_inner_epochs": 2}
    report = launch(tmp_path, config, settings, timeout=200, method="minillm")
    logs = [log for log in report["logs"] if "loss" in log]
    assert len(logs) == 6 and [log["rollouts"] for log in logs] == [4.0, 0.0] * 3, "of both processes"
    for log in logs[::2]:
        assert log["ratio"] == pytest.approx(1.0, abs=1e-4) and 0 < log["teacher_mix_share"] < 1


# 48 rows: 6 steps an epoch. λ draws, a replay buffer and dropout; or cycles of four steps on the same rollouts.
RESUMED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9, "per_device_train_batch_size": 2}
RESUMED |= {
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "disable_dropout": False,
}
INTERRUPTED = {
    "replay": {"settings": {"lmbda": 0.5, "replay_buffer_size": 8}},
    "cycle": {"method": "minillm", "settings": {**MINILLM, "temperature": 1.0}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("replay", "cpu_zero3.yaml"),
        ("replay", "cpu_fsdp2.yaml"),
        ("cycle", "cpu_ddp.yaml"),
        ("cycle", "cpu_zero2.yaml"),
    ],
)
def test_processes_that_died_go_on_exactly(tmp_path, kind, config):
    """Died in the second epoch, and in the middle of an inner one; resumed from the middle of the first."""
    assert_goes_on(tmp_path, config, kind, {"dies": 5}, first=3)


def assert_goes_on(tmp_path, config, kind, interruption, first, changes=None, **more):
    """A run that is interrupted and goes on from step `first` takes every step that one takes as a whole."""
    more |= {"dropout": 0.1, "method": INTERRUPTED[kind].get("method", "gkd")}
    settings = {**RESUMED, **INTERRUPTED[kind]["settings"], **(changes or {})}
    whole = launch(tmp_path / "whole", config, settings, **more)
    said = launch(tmp_path / "resumed", config, settings, **more, **interruption)
    assert isinstance(said, str), "it was not interrupted"
    resumed = launch(tmp_path / "resumed", config, settings, **more, resume=True)
    expected = [log for log in whole["logs"] if "loss" in log and log["step"] > first]
    found = [log for log in resumed["logs"] if "loss" in log]
    assert [log["step"] for log in found] == list(range(first + 1, RESUMED["max_steps"] + 1))
    for name in ("loss", "grad_norm", "trained_tokens", "rollouts", "learning_rate"):
        assert [log[name] for log in found] == [log[name] for log in expected], name
    assert {log["rollouts"] for log in expected} >= {0.0}, "some steps take rows that were sampled before"
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(right[name], left[name]) for name in left)
    return said


@pytest.mark.slow
def test_a_checkpoint_is_whole_when_all_processes_have_written_theirs(tmp_path):
    said = launch(tmp_path, "cpu_ddp.yaml", RESUMED, dies_saving=6)
    assert "Could not write the checkpoint" in said
    assert find_last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
