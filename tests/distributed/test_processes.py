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

from distill_trainers.run_files import find_last_complete_checkpoint

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")

pytestmark = pytest.mark.distributed


def launch(folder, config, settings, timeout=400, **more):
    """Run one job (alone without `config`) and read its report; what it said, if it died before."""
    said = launch_all(folder, config, [{"output": str(folder), "args": settings, **more}], timeout)
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.exists() else said


def launch_all(folder, config, jobs, timeout):
    """The jobs one after another in the same processes, each reporting into its own folder; what they said."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    if config:
        port = str(29500 + os.getpid() % 400 + abs(hash(str(folder))) % 1000)
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config)]
        command += ["--main_process_port", port]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen(
        [*command, str(WORKER), json.dumps(jobs)],
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
    return output


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
    names = {"eval_kl/math", "eval_kl/code", "eval_tokens/code"}
    names |= {"eval_loss", "eval_kl", "eval_perplexity", "eval_top1_agreement", "eval_acceptance", "eval_tokens"}
    names |= {"eval_accuracy"}
    assert one["eval"].keys() & names == two["eval"].keys() & names and "eval_loss" in one["eval"]
    for name in sorted(names & one["eval"].keys()):
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-3), name
    left, right = weights(folder_one, lora), weights(folder_two, lora)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(right[name], left[name], rtol=2e-3, atol=2e-4, msg=name)


# ---- As one process does --------------------------------------------------------------------------------------------

# Greedy rollouts, so that what is sampled does not depend on which process samples it.
SETTINGS = {"max_steps": 4, "temperature": 0.0, "optim": "sgd", "gradient_accumulation_steps": 2}
OFF_POLICY = {**SETTINGS, "lmbda": 0.0}
RATIONALES = {**SETTINGS, "max_length": 48, "max_new_tokens": 20, "learning_rate": 0.5}
# Nearly greedy, which the weights of importance make up for.
MINILLM = {"lmbda": 1.0, "teacher_mix_alpha": 0.0, "temperature": 1e-6, "num_minibatches": 2, "num_inner_epochs": 2}
CACHE = {"teacher_cache_top_k": 999, "teacher_cache": "{output}/cache", "max_steps": 9}  # into the second epoch
MEASURES = {
    "eval_measures": ["agreement", "rouge_l", "diversity", "exposure_bias", "calibration"],
    "eval_measures_rows": 11,
    "eval_measures_seeds": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 0.05,
}
# Right samples are looked for in both processes; long rows are left out, so that often one of them trains nothing.
FEEDBACK = {"feedback": "{attempt}{prompt}\n\n{right}", "feedback_answer_column": "completion"}
FEEDBACK |= {"teacher_max_length": 13, "teacher_too_long": "drop"}
# Nearly greedy copies of one prompt are alike, so that rewards themselves are the advantages.
REWARDS = {"reward_funcs": ["length:2"], "advantage": "none", "num_generations": 2, "reward_schedule": "joint"}
# Sampled: each row's random numbers are its own, whichever process has it.
GROUPS = {"reward_funcs": ["length:2", "format:[02468]$"], "num_generations": 4, "reward_schedule": "joint"}
GROUPS |= {"temperature": 1.0, "lmbda": 1.0, "learning_rate": 0.05, "divergence": "reverse_kl", "future_kl": True}

OWN = {"teacher_tokenizer": "own"}


def pairs(**settings):
    return {"method": "dpkd", "pairs": True, "args": {**SETTINGS, **settings}}


CASES = {
    "off-policy": {"args": OFF_POLICY},
    "mixed": {"args": {**SETTINGS, "lmbda": 0.5}},
    # Each epoch is one step, so that it has all rows however they are dealt.
    "tokens": {
        "args": {**SETTINGS, "lmbda": 0.5, "per_device_train_tokens": 512, "per_device_train_batch_size": 8},
    },
    "on-policy": {"args": {**SETTINGS, "lmbda": 1.0}},
    "feedback": {"args": {**SETTINGS, "lmbda": 1.0, **FEEDBACK}},
    "seq_kd": {"args": {**OFF_POLICY, "seq_kd": True}},
    "other-tokenizer": {"digits": True, "args": {**SETTINGS, **OWN, "lmbda": 0.5}},
    "routed": {"several": True, "args": {**SETTINGS, "lmbda": 0.5}},
    "composed": {"several": True, "args": {**OFF_POLICY, "extrapolate": {"reference": "math", "scale": 1.25}}},
    "lora": {"lora": True, "args": OFF_POLICY},
    "compiled": {"args": {**SETTINGS, "lmbda": 0.5, "torch_compile": True, "torch_compile_backend": "aot_eager"}},
    "cache-hidden": {"args": {**OFF_POLICY, **CACHE, "teacher_cache_kind": "hidden"}},
    "cache-topk": {"args": {**OFF_POLICY, **CACHE, "teacher_cache_kind": "topk"}},
    "measures": {"args": {**OFF_POLICY, **MEASURES}},
    "pairs-student": pairs(reference="student"),
    "pairs-contrastive": pairs(loss_type="contrastive_skew"),
    "pairs-kept": pairs(reference_logps_dir="{output}/kept", logprob_mse_weight=0.5),
    "pairs-sampled": {"method": "dpkd", "args": SETTINGS},
    "minillm": {
        "method": "minillm",
        "text": True,
        "args": {**SETTINGS, **MINILLM, "max_steps": 8, "learning_rate": 0.05},
    },
    "minillm-rewards": {
        "method": "minillm",
        "args": {**SETTINGS, **MINILLM, **REWARDS, "learning_rate": 0.05},
    },
    "other-minillm": {
        "method": "minillm",
        "digits": True,
        "args": {**SETTINGS, **MINILLM, **OWN, "estimator": "sampled", "learning_rate": 0.05},
    },
    "other-pairs": {**pairs(**OWN), "digits": True},
    "other-rationale": {"method": "rationale", "digits": True, "args": {**RATIONALES, **OWN, "distill_weight": 0.5}},
    "gkd-rewards": {"args": {**SETTINGS, **GROUPS}},
    "step_by_step": {"method": "rationale", "args": {**RATIONALES, "objective": "step_by_step"}},
    "edit": {"method": "rationale", "args": {**RATIONALES, "objective": "edit", "wrong_weight": 0.5}},
    "dual_chain": {"method": "rationale", "args": {**RATIONALES, "objective": "dual_chain", "innovation_samples": 1}},
}
# What is logged beside the loss and must not depend on processes either.
LOGGED = {
    "pairs": {"reward_margin", "nll_chosen", "nll_rejected"},
    "minillm-rewards": {"reward", "reward_mean", "reward_flat_groups", "advantage", "rewards/length"},
    "other-rationale": {"distillation"},
    "gkd-rewards": {
        "reward_mean",
        "reward_std",
        "reward_flat_groups",
        "rewards/format",
        "policy",
        "divergence",
        "entropy",
    },
    "minillm": {"reward", "sequence_kl", "advantage", "ratio", "clipped", "pretraining"},
    "rationale": {"label", "rationale", "right_steps", "wrong_steps", "imitation", "answer"},
}
LAUNCHES = ["cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu_fsdp2"]
# For time: what depends on whether weights are whole or sharded is there in the first two; ZeRO-2 shards no weights.
WHOLE_AND_SHARDED = ["cpu_ddp", "cpu_zero3"]
BUT_ZERO2 = ["cpu_ddp", "cpu_zero3", "cpu_fsdp2"]
# Of the other two launches, one case of each way through a step.
EVERYWHERE = ["off-policy", "mixed", "other-tokenizer", "routed", "lora", "cache-hidden", "measures", "pairs-student"]
EVERYWHERE += ["tokens", "minillm", "minillm-rewards", "step_by_step"]
# Of methods whose teacher reads its own tokens, "other-tokenizer" is sharded; the others are for what each adds to it.
UNSHARDED = ["other-minillm", "other-pairs", "other-rationale"]
LAUNCHED = [(c, case) for c in LAUNCHES for case in CASES if c in WHOLE_AND_SHARDED or case in EVERYWHERE]
LAUNCHED = [(c, case) for c, case in LAUNCHED if c == "cpu_ddp" or case not in UNSHARDED]

# Sampled at temperature 1, where nothing compares with one process: completions end at other tokens on each.
SAMPLED = {
    **SETTINGS,
    "temperature": 1.0,
    "max_new_tokens": 24,
    "max_length": 40,
    "max_steps": 6,
    "learning_rate": 0.01,
}
SAMPLED["gradient_accumulation_steps"] = 1
REPLAY = {"refresh_steps": 2, "replay_buffer_size": 8, "max_steps": 4, "max_new_tokens": 4, "max_length": 32}
# Each process has one of the two completions of a prompt.
IN_GROUPS = {"lmbda": 1.0, "reward_funcs": ["length:8"], "num_generations": 2, "per_device_train_batch_size": 1}
IN_GROUPS |= {"reward_schedule": "joint", "reward_guard": "stop"}
ON_THEIR_OWN = {
    "waits": {"args": {**SAMPLED, "lmbda": 1.0}},
    "waits-replay": {"args": {**SAMPLED, "lmbda": 1.0, "replay_buffer_size": 8}},
    "waits-mixture": {"method": "minillm", "args": {**SAMPLED, "num_inner_epochs": 2}},
    "pairs-replay": {"method": "dpkd", "args": {**SAMPLED, **REPLAY}},
    "groups": {"args": {**SAMPLED, **IN_GROUPS}},
    "merged": {"lora": True, "args": {**OFF_POLICY, "merge_adapter": True}},
    "wide": {"teacher_mlp": 2048, "args": {**OFF_POLICY, "max_steps": 1}},  # too large for ZeRO-3 to keep it whole
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, saved):
    """`finished(case, config)`: its report and folder. All cases of a launch run in the same processes, at first need.

    A case that fails leaves a report of the error, and the next ones run; one in which a process hangs fails them all.
    """
    folders = {}

    def find(case, config=None):
        if config not in folders:
            folder = folders[config] = tmp_path_factory.mktemp(config or "alone")
            rows = 4 if config is None else 2
            jobs = {name: job for name, job in CASES.items() if config is None or (config, name) in LAUNCHED}
            jobs |= ON_THEIR_OWN if config in BUT_ZERO2 else {}
            jobs = [
                {**job, "args": {"per_device_train_batch_size": rows, **job["args"]}, "output": str(folder / name)}
                for name, job in jobs.items()
            ]
            for job in jobs:
                if "merge_adapter" in job["args"]:
                    job["student"] = saved.student
            launch_all(folder, config and f"{config}.yaml", jobs, timeout=900)
        folder = folders[config] / case
        assert (folder / "report.json").is_file(), f"{case} was not reached under {config}"
        report = json.loads((folder / "report.json").read_text())
        assert "error" not in report, report["error"]
        return report, folder

    return find


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one = launch(tmp_path / "one", None, {**OFF_POLICY, "per_device_train_batch_size": 4})
    two = launch(tmp_path / "two", "cpu_ddp.yaml", {**OFF_POLICY, "per_device_train_batch_size": 2})
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "case"), LAUNCHED)
def test_what_two_processes_train_is_what_one_trains(finished, config, case):
    (one, alone), (two, together) = finished(case), finished(case, config)
    assert two["student_is_sharded"] == ("fsdp2" in config)  # accelerate alone would make DDP of it on a CPU
    assert_same_run(one, two, alone, together, CASES[case].get("lora", False))
    method = "pairs" if CASES[case].get("pairs") else CASES[case].get("method")
    for name in LOGGED.get(method, set()) | LOGGED.get(case, set()):
        first, second = ([log[name] for log in run["logs"] if name in log and "loss" in log] for run in (one, two))
        assert second == pytest.approx(first, rel=2e-3, abs=2e-4), name
    assert two["eval"].get("eval_reward_margin", 0) == pytest.approx(
        one["eval"].get("eval_reward_margin", 0), rel=2e-3, abs=2e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", LAUNCHES)
def test_two_processes_share_the_measures_on_held_out_prompts(finished, config):
    """Texts of both are read and written once; sharded, another engine samples, so only given text compares."""
    (one, alone), (two, together) = finished("measures"), finished("measures", config)
    names = {"eval_reverse_kl", "eval_jsd", "eval_ece"}
    if config in ("cpu_ddp", "cpu_zero2"):
        names |= {"eval_rouge_l", "eval_distinct_4", "eval_student_text_kl", "eval_exposure_error"}
        names |= {"eval_teacher_rouge_l", "eval_gap_closed_reverse_kl"}
    for name in names:
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-3, abs=1e-5), name
    assert 0 < two["eval"]["eval_completion_tokens"] <= 4
    samples = [(folder / "run" / "samples.jsonl").read_text().count("\n") for folder in (alone, together)]
    assert samples[0] == samples[1] == 3 * 2, "before training and at its end, by the main process alone"


# ---- Processes beside each other ------------------------------------------------------------------------------------


def rollouts_of(report):
    return [log["rollouts"] for log in report["logs"] if "loss" in log]


@pytest.mark.slow
@pytest.mark.parametrize("config", BUT_ZERO2)
@pytest.mark.parametrize("case", ["waits", "waits-replay"])
def test_processes_whose_completions_end_at_different_steps_wait_for_each_other(finished, config, case):
    """Under ZeRO-3 one that stops generating earlier would leave the others waiting for its shards."""
    report, _ = finished(case, config)
    losses = [log["loss"] for log in report["logs"] if "loss" in log]
    assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)
    assert set(rollouts_of(report)) == ({4.0} if case == "waits" else {0.0, 4.0}), "of both processes"


@pytest.mark.slow
@pytest.mark.parametrize("config", WHOLE_AND_SHARDED)
def test_groups_that_lie_on_two_processes_are_compared(finished, config):
    """Else each completion would be alone in its group, and have no advantage."""
    report, _ = finished("groups", config)
    steps = [log for log in report["logs"] if "loss" in log]
    assert len(steps) == 6 and any(log["reward_std"] > 0 for log in steps)
    assert all((log["policy"] != 0) == (log["reward_std"] > 0) for log in steps)
    assert all(log["reward_flat_groups"] in (0.0, 1.0) for log in steps)
    assert 0 <= report["eval"]["eval_pass@1"] <= report["eval"]["eval_pass@4"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("config", BUT_ZERO2)
def test_processes_take_the_same_steps_from_the_replay_buffer(finished, config):
    assert rollouts_of(finished("pairs-replay", config)[0]) == [4.0, 0.0, 4.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("config", BUT_ZERO2)
def test_processes_mix_the_teacher_in_and_wait_for_each_other(finished, config):
    report, _ = finished("waits-mixture", config)
    assert rollouts_of(report) == [4.0, 0.0] * 3, "of both processes"
    for log in [log for log in report["logs"] if "loss" in log][::2]:
        assert log["ratio"] == pytest.approx(1.0, abs=1e-4) and 0 < log["teacher_mix_share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("config", BUT_ZERO2)
def test_a_sharded_student_is_merged(finished, saved, config):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, folder = finished("merged", config)
    base = AutoModelForCausalLM.from_pretrained(saved.student)
    adapted = PeftModel.from_pretrained(base, folder / "run")
    merged, ids = AutoModelForCausalLM.from_pretrained(folder / "run" / "merged"), torch.tensor([[4, 5, 12, 6, 13]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2", "cpu_fsdp2"])  # refused under ZeRO-3
def test_two_processes_balance_experts_as_one_does_that_accumulates_twice_as_much(tmp_path, config):
    """The balance term is one of a micro-batch; a step takes the mean over those of all processes."""
    settings = {**OFF_POLICY, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    experts = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    one = launch(tmp_path / "one", None, {**settings, "gradient_accumulation_steps": 4}, experts=experts)
    two = launch(tmp_path / "two", f"{config}.yaml", settings, experts=experts)
    assert_same_run(one, two, tmp_path / "one", tmp_path / "two")
    first, second = ([log["aux_loss"] for log in run["logs"] if "loss" in log] for run in (one, two))
    assert second == pytest.approx(first, rel=1e-4) and all(value > 1.5 for value in first)


@pytest.mark.slow
def test_two_processes_train_the_integers_that_one_trains(tmp_path):
    pytest.importorskip("torchao")
    settings = {**OFF_POLICY, "quantize_student": "int8", "learning_rate": 0.1}
    one = launch(tmp_path / "one", None, {**settings, "per_device_train_batch_size": 4})
    two = launch(tmp_path / "two", "cpu_ddp.yaml", {**settings, "per_device_train_batch_size": 2})
    first, second = ([log["loss"] for log in run["logs"] if "loss" in log] for run in (one, two))
    assert second == pytest.approx(first, rel=1e-3) and len(first) == 4
    assert two["eval"]["eval_kl"] == pytest.approx(one["eval"]["eval_kl"], rel=2e-3)
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    layer = "model.layers.0.mlp.up_proj.weight"
    off = (left[layer].qdata.int() - right[layer].qdata.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01, "sums in another order round another way, seldom"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_zero2", "cpu_fsdp2"])
def test_shards_are_no_integers(tmp_path, config):
    pytest.importorskip("torchao")
    jobs = [
        {
            "output": str(tmp_path / name),
            "args": {**OFF_POLICY, "quantize_student": "int4", "per_device_train_batch_size": 2},
        }
        for name in ("first", "again")  # of a single one, the error would end the processes
    ]
    launch_all(tmp_path, f"{config}.yaml", jobs, timeout=300)
    told = json.loads((tmp_path / "first" / "report.json").read_text())["error"]
    assert told.startswith("ConfigurationError: Got `quantize_student: int4` under ")


@pytest.mark.slow
def test_zero3_teacher_is_sharded(finished):
    """Left out of the engine, its weights would stay whole on every process."""
    assert finished("wide", "cpu_ddp")[0]["teacher_mlp_kept_whole"] > 0
    assert finished("wide", "cpu_zero3")[0]["teacher_mlp_kept_whole"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_two_processes_read_every_row_once_in_batches_counted_in_tokens(tmp_path, lmbda):
    """With a student that stands still, an epoch's losses, weighed by tokens, are those of one process."""
    settings = {**SETTINGS, "lmbda": lmbda, "per_device_train_tokens": 48, "learning_rate": 0.0}
    settings |= {"max_steps": -1, "num_train_epochs": 1}
    found = []
    for config in (None, "cpu_ddp.yaml"):
        report = launch(tmp_path / str(config), config, settings)
        logs = [log for log in report["logs"] if "loss" in log]
        tokens = sum(log["trained_tokens"] for log in logs)
        found.append((len(logs), tokens, sum(log["loss"] * log["trained_tokens"] for log in logs) / tokens))
    (steps, tokens, loss), (halved, same_tokens, same_loss) = found
    assert halved == pytest.approx(steps / 2, abs=1) and same_tokens == tokens
    assert same_loss == pytest.approx(loss, rel=1e-5)


# ---- Dead and back --------------------------------------------------------------------------------------------------

# 48 rows: 6 steps an epoch. λ draws, a replay buffer and dropout; or cycles of four steps on the same rollouts.
RESUMED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9, "per_device_train_batch_size": 2}
RESUMED |= {
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "disable_dropout": False,
}
SELF_TAUGHT = {"lm_loss_weight": 1.0, "self_teacher": "ema", "self_teacher_decay": 0.5}
INTERRUPTED = {
    "self-taught": {"args": {"lmbda": 0.5, **SELF_TAUGHT}},
    "self-taught, adapter": {"lora": True, "args": {"lmbda": 0.5, **SELF_TAUGHT}},
    "replay": {"args": {"lmbda": 0.5, "replay_buffer_size": 8}},
    "cycle": {"method": "minillm", "args": {**MINILLM, "temperature": 1.0}},
    "tokens": {"args": {"lmbda": 0.5, "per_device_train_tokens": 32, "per_device_train_batch_size": 8}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("replay", "cpu_zero3.yaml"),
        ("replay", "cpu_fsdp2.yaml"),
        ("self-taught", "cpu_zero3.yaml"),
        ("self-taught", "cpu_fsdp2.yaml"),
        ("self-taught, adapter", "cpu_zero3.yaml"),
        ("self-taught, adapter", "cpu_fsdp2.yaml"),
        ("tokens", "cpu_ddp.yaml"),
        ("tokens", "cpu_zero3.yaml"),
        ("cycle", "cpu_ddp.yaml"),
        ("cycle", "cpu_zero2.yaml"),
    ],
)
def test_processes_that_died_go_on_exactly(tmp_path, kind, config):
    """Died in the second epoch, and in the middle of an inner one; resumed from the middle of the first."""
    assert_goes_on(tmp_path, config, kind, {"dies": 5}, first=3)


def assert_goes_on(tmp_path, config, kind, interruption, first, changes=None, **more):
    """A run that is interrupted and goes on from step `first` takes every step that one takes as a whole."""
    job = {**INTERRUPTED[kind], **more, "dropout": 0.1}
    job["args"] = {**RESUMED, **INTERRUPTED[kind]["args"], **(changes or {})}
    whole, resumed = ({**job, "output": str(tmp_path / name)} for name in ("whole", "resumed"))
    said = launch_all(tmp_path, config, [whole, {**resumed, **interruption}], timeout=400)
    assert not (tmp_path / "resumed" / "report.json").exists(), "it was not interrupted"
    launch_all(tmp_path, config, [{**resumed, "resume": True}], timeout=400)
    whole, resumed = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "resumed"))
    expected = [log for log in whole["logs"] if "loss" in log and log["step"] > first]
    found = [log for log in resumed["logs"] if "loss" in log]
    assert [log["step"] for log in found] == list(range(first + 1, RESUMED["max_steps"] + 1))
    for name in ("loss", "grad_norm", "trained_tokens", "rollouts", "learning_rate"):
        assert [log[name] for log in found] == [log[name] for log in expected], name
    assert {log["rollouts"] for log in expected} >= {0.0}, "some steps take rows that were sampled before"
    left, right = (weights(tmp_path / name, job.get("lora", False)) for name in ("whole", "resumed"))
    assert left and left.keys() == right.keys() and all(torch.equal(right[name], left[name]) for name in left)
    return said


REWARD_FAILURES = {
    "raises": "raised ConnectionError: the judge is away",
    "nan": "gave 'nan' (float) for completion 1",
    "count": "gave back 3 values for 4 completions",
    "hangs": "has not answered after 2 s",
}


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_both_and_loses_nothing(tmp_path):
    """Both tell of it, in time, and the last finished step is kept; resumed, the run takes the steps of a whole one."""
    settings = {**SETTINGS, "temperature": 1.0, "lmbda": 1.0, "learning_rate": 0.05, "per_device_train_batch_size": 2}
    settings |= {"num_generations": 4, "reward_schedule": "joint", "reward_timeout": 2.0, "save_strategy": "steps"}
    settings |= {"save_steps": 100, "eval_pass_rows": 0}
    jobs = [
        {"output": str(tmp_path / how), "args": settings, "reward_fails": how} for how in [*REWARD_FAILURES, "never"]
    ]
    jobs.append({**jobs[0], "reward_fails": "never", "resume": True})
    launch_all(tmp_path, "cpu_ddp.yaml", jobs, timeout=300)
    for how, said in REWARD_FAILURES.items():
        for rank in (0, 1):
            ended = json.loads((tmp_path / how / f"ended-{rank}.json").read_text())
            assert ended["error"].startswith(f"The reward function 'judge' {said}"), ended
            assert "The last finished step is kept in" in ended["error"] and ended["seconds"] < 60
        kept = find_last_complete_checkpoint(tmp_path / how / "run")
        assert kept == str(tmp_path / how / "run" / "checkpoint-2") or how == "raises", "which has gone on since"
    whole, resumed = (json.loads((tmp_path / n / "report.json").read_text())["logs"] for n in ("never", "raises"))
    losses = [{log["step"]: log["loss"] for log in logs if "loss" in log} for logs in (whole, resumed)]
    assert losses[1] == {step: losses[0][step] for step in (3, 4)}


@pytest.mark.slow
def test_a_checkpoint_is_whole_when_all_processes_have_written_theirs(tmp_path):
    said = launch(tmp_path, "cpu_ddp.yaml", RESUMED, dies_saving=6)
    assert "Could not write the checkpoint" in said
    assert find_last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")


# ---- The student as its own teacher, or made of it ------------------------------------------------------------------

OWN_TEACHERS = {
    "ema": {"args": {**SETTINGS, "lmbda": 0.5, **SELF_TAUGHT}},
    "ema, adapter": {"lora": True, "args": {**OFF_POLICY, **SELF_TAUGHT}},
    "initial": {"args": {**OFF_POLICY, "lm_loss_weight": 1.0, "self_teacher": "initial"}},
    "initial, adapter": {"lora": True, "args": {**OFF_POLICY, "lm_loss_weight": 1.0, "self_teacher": "initial"}},
    "live": {"args": {**OFF_POLICY, "lm_loss_weight": 1.0, "self_teacher": "live"}},
    "made of it": {"pruned": True, "args": {**OFF_POLICY, "hidden_weight": 1.0}},
}


@pytest.fixture(scope="module")
def self_taught(tmp_path_factory):
    """`self_taught(config)`: a folder with the reports of all of these, run in the same processes once."""
    folders = {}

    def find(config=None):
        if config not in folders:
            folder = folders[config] = tmp_path_factory.mktemp(f"self-{config}")
            rows = {"per_device_train_batch_size": 4 if config is None else 2}
            jobs = [{**j, "args": {**j["args"], **rows}, "output": str(folder / n)} for n, j in OWN_TEACHERS.items()]
            launch_all(folder, config and f"{config}.yaml", jobs, timeout=900)
        return folders[config]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("config", LAUNCHES)
def test_two_processes_are_taught_by_their_student_as_one_is(self_taught, config):
    """Each averages its own share; what answers is the average on all of them, and the student is as it was."""
    one, two = self_taught(), self_taught(config)
    for case, job in OWN_TEACHERS.items():
        reports = [json.loads((folder / case / "report.json").read_text()) for folder in (one, two)]
        assert not any("error" in report for report in reports), (case, reports)
        assert_same_run(*reports, one / case, two / case, job.get("lora", False))
        first, second = ([log["divergence"] for log in r["logs"] if "divergence" in log] for r in reports)
        assert second == pytest.approx(first, rel=5e-3, abs=1e-8), case
        assert any(first) == (case != "live"), case
        first, second = ([log["hidden_mse"] for log in r["logs"] if "hidden_mse" in log] for r in reports)
        assert second == pytest.approx(first, rel=5e-3) and any(first) == (case == "made of it"), case
