"""Rollouts and teachers with vLLM itself (the version in requirements.txt), on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from distill_trainers.exceptions import ConfigurationError, UnlikeModelError
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import CompletionSettings, SamplingSettings
from distill_trainers.teachers import RemoteTeacher
from distill_trainers.teachers.remote import RemoteSettings

pytestmark = pytest.mark.vllm

RUN = {"max_steps": 3, "max_length": 32, "max_new_tokens": 8, "gradient_accumulation_steps": 2}


def trained_and_served(report):
    """The student learnt, and vLLM's greedy text is its own, token for token."""
    assert not hasattr(report, "error"), report.error
    assert len(report.losses) == 3 and report.losses[0] != report.losses[2]
    assert report.theirs == report.ours
    # Each prompt has a seed of its own, so the same text comes twice. Its log-probabilities are those of transformers.
    assert report.samples[0] == report.samples[1] and len(set(map(tuple, report.samples[0]))) > 1
    assert report.gap < 1e-3


# ---- Rollouts -------------------------------------------------------------------------------------------------------


def test_colocated_students_write_what_they_have_learnt(run_jobs, starting_server, starting_lora_server):
    """Heads tied to the embedding too, which vLLM packs on a CPU; adapters merged, and alone."""
    colocate = {"vllm": {"mode": "colocate"}, "student": "tied"}
    jobs = [
        {**colocate, "name": "gkd", "args": {"sampler_correction": "truncate"}},
        {**colocate, "name": "minillm", "method": "minillm", "args": {"learning_rate": 1e-3}},
        {**colocate, "name": "stale", "stale": 2},
        {**colocate, "name": "merged", "lora": "merged"},
        {**colocate, "name": "adapter", "lora": "adapter", "student": "student"},
    ]
    (reports,) = run_jobs(jobs)
    stale = reports.pop("stale")
    assert stale.steps == 1 and "UnlikeModelError: vLLM serves weights of an earlier step" in stale.error
    for report in reports.values():
        trained_and_served(report)
        assert report.processed is True, "of the distribution that was drawn from"
        assert len(report.ratios) >= 9 and max(abs(ratio - 1) for ratio in report.ratios) < 5e-3


def test_students_of_a_server_write_what_they_have_learnt(run_jobs, server):
    """No package of vLLM where the student is trained. The run goes on from a checkpoint as if it had not stopped."""
    told = {"vllm": {"mode": "server", "server_port": server.port}, "student": "student"}
    saving = {"save_strategy": "steps", "save_steps": 2, "seed": 5}
    jobs = [
        {**told, "name": "gkd", "args": saving},
        {**told, "name": "minillm", "method": "minillm"},
        {**told, "name": "merged", "lora": "merged"},
        {**told, "name": "stale", "stale": 2},
        {**told, "name": "resumed", "args": saving, "resume": str(server.folder / "runs" / "gkd" / "checkpoint-2")},
    ]
    (reports,) = run_jobs(jobs, with_vllm=False)
    stale, resumed = reports.pop("stale"), reports.pop("resumed")
    assert stale.steps == 1 and "vLLM serves weights of an earlier step" in stale.error
    assert not hasattr(resumed, "error"), resumed.error
    assert resumed.losses[-1] == reports["gkd"].losses[-1] and resumed.ours == reports["gkd"].ours
    for report in reports.values():
        trained_and_served(report)
        assert report.processed is False, "vLLM's default, which the server was asked for"


def test_an_adapter_alone_goes_to_a_server_by_name(run_jobs, lora_server):
    told = {"vllm": {"mode": "server", "server_port": lora_server.port}, "student": "student", "lora": "adapter"}
    (reports,) = run_jobs([{**told, "name": "gkd"}, {**told, "name": "again"}], with_vllm=False)
    for report in reports.values():
        trained_and_served(report)
    served = [model["id"] for model in lora_server.get("/v1/models")["data"]]
    assert len(served) <= 3, "older adapters are let go"


@pytest.mark.distributed
@pytest.mark.parametrize("launch", ["cpu_ddp.yaml", "cpu_zero3.yaml"])
def test_two_processes_share_a_server(run_jobs, server, launch):
    job = {"vllm": {"mode": "server", "server_port": server.port}, "student": "student", "name": "gkd"}
    one, other = run_jobs([job], launch, with_vllm=False)
    trained_and_served(one["gkd"])
    assert one["gkd"].theirs == other["gkd"].theirs == other["gkd"].ours


@pytest.mark.distributed
def test_each_of_two_processes_has_an_engine(run_jobs, starting_server):
    job = {"vllm": {"mode": "colocate"}, "student": "student", "name": "gkd"}
    one, other = run_jobs([job], "cpu_ddp.yaml")
    trained_and_served(one["gkd"])
    assert one["gkd"].theirs == other["gkd"].theirs == other["gkd"].ours


def test_servers_that_cannot_serve_the_student(make_trainer, server, folder):
    """Each is refused in words, before a step; another model as soon as it is sent the weights."""
    told = {"mode": "server", "server_port": server.port}
    run = {**RUN, "lmbda": 1.0, "rollout_engine": "vllm"}
    student = str(folder / "student")
    for changes, settings, words in (
        ({"server_port": 9, "server_timeout": 1.0}, {}, "does not answer as vLLM does.*vllm serve"),
        ({"server_model": "large"}, {}, "server_model: large.*serves toy"),
        ({}, {"max_length": 65}, "takes 64 tokens; expected at least 65"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_trainer(student, **{**run, "vllm_kwargs": {**told, **changes}, **settings})
    server.serve("teacher")
    trainer = make_trainer(student, **run, vllm_kwargs=told, learning_rate=1e-3)
    trainer.engine.engine.load = lambda weights: None  # as a server of another model would be
    with pytest.raises(UnlikeModelError, match="does not serve the student"):
        trainer.train()


# ---- Teachers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("gkd", {"lmbda": 0.0}, {"teacher_server_kind": "topk", "teacher_server_top_k": 14}),
        ("gkd", {"lmbda": 1.0}, {"teacher_server_kind": "topk", "teacher_server_top_k": 14}),
        ("minillm", {"objective": "token", "estimator": "sampled"}, {"teacher_server_kind": "token_logprobs"}),
    ],
)
def test_a_run_with_its_teacher_in_vllm_is_that_of_the_local_teacher(
    make_trainer, server, folder, by_step, method, settings, told
):
    """All ids for `topk`; both models in float32."""
    server.serve("teacher")
    run = {**RUN, "method": method, **settings}
    local = make_trainer(str(folder / "student"), teacher=str(folder / "teacher"), **run)
    local.train()
    remote = make_trainer(str(folder / "student"), teacher=server.url, **run, **told)
    remote.train()
    assert by_step(remote) == pytest.approx(by_step(local), rel=1e-4)


def test_a_served_teacher_writes_by_streams(server, folder, tokenizer):
    """A text depends on its own key: not on its batch, nor on what was asked before. Greedy, it is the local one."""
    from transformers import AutoModelForCausalLM

    server.serve("teacher")
    prompts = {f"prompt {a}": [a, 12, b, 13] for a in range(2, 7) for b in (3, 8)} | {"twin": [2, 12, 3, 13]}
    stream = Stream(3, Role.TEACHER, Purpose.COMPLETION)
    local = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    teacher = RemoteTeacher(server.url, RemoteSettings("token_logprobs"))
    for sampling in (
        SamplingSettings(10, 0.0, eos_token_ids=teacher.eos_ids(tokenizer)),
        SamplingSettings(10, 0.9, top_p=0.95, eos_token_ids=teacher.eos_ids(tokenizer)),
    ):
        settings = CompletionSettings(sampling, stream)
        with teacher.generating() as writer:
            together = settings.complete(writer, prompts, torch.device("cpu"))
            alone = {
                key: settings.complete(writer, {key: ids}, torch.device("cpu"))[key] for key, ids in prompts.items()
            }
        assert together == alone and all(1 not in ids[:-1] for ids in together.values())
        if sampling.temperature == 0:
            assert together == settings.complete(local, prompts, torch.device("cpu"))
        else:
            assert together["twin"] != together["prompt 2"] or len(set(map(tuple, together.values()))) > 5
    teacher.close()


def test_sequence_kd_from_a_served_teacher(make_trainer, server, folder):
    """Greedy completions of vLLM are those of the local teacher, so the runs are the same."""
    server.serve("teacher")
    run = {**RUN, "lmbda": 0.0, "seq_kd": True, "temperature": 0.0}
    losses = []
    for teacher, told in (
        (str(folder / "teacher"), {}),
        (server.url, {"teacher_server_kind": "topk", "teacher_server_top_k": 14}),
    ):
        trainer = make_trainer(
            str(folder / "student"), teacher=teacher, **run, **told, completions_dir=f"{folder}/{told}"
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_pairs_from_a_served_teacher(server, folder, tmp_path):
    from distill_trainers.cli.pairs import main

    server.serve("teacher")
    rows = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "method": "gkd",
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": server.url,
        "teacher_server_kind": "topk",
        "teacher_server_top_k": 14,
        "dataset": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "max_length": 32,
        "max_new_tokens": 8,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["--config", str(tmp_path / "recipe.yaml")]) == 0
    first = (tmp_path / "out" / "pairs.jsonl").read_text()
    assert len(first.splitlines()) > 6
    (tmp_path / "again").mkdir()
    main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "pairs.jsonl").read_text() == first, "by the same seeds"
