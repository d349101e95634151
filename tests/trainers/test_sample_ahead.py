"""Text that a server writes for the next step while this one trains."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses.sampler_ratio import SAMPLER_LOGPS
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import DecodeEngine, SamplingSettings
from distill_trainers.rollouts.sampling import pad_left
from distill_trainers.rollouts.vllm import Engine, VllmEngine, VllmOptions
from distill_trainers.servers.openai import Written

SERVER = {"rollout_engine": "vllm", "vllm_kwargs": {"mode": "server"}, "sampler_correction": "truncate"}
AHEAD = {**SERVER, "sample_ahead": True}


class Server(Engine):
    """Stands for a server of vLLM: a copy of the student in a thread. `asked` is what it was asked, but for probes."""

    processed = True

    def __init__(self, model):
        self.model, self.asked, self.gate = copy.deepcopy(model).eval(), [], None
        self.thread = ThreadPoolExecutor(1)

    def load(self, weights):
        self.model.load_state_dict(dict(weights), strict=False)  # a tied head is there once

    def load_adapter(self, name, folder):
        raise NotImplementedError

    @torch.no_grad()
    def written(self, prompts, fields):
        first = fields[0]
        eos = [] if first.get("ignore_eos") else first["stop_token_ids"]
        sampling = SamplingSettings(first["max_tokens"], first["temperature"], eos_token_ids=eos)
        streams = [Stream(each["seed"], Role.STUDENT, Purpose.SCORED) for each in fields]
        texts = DecodeEngine().generate(self.model, *pad_left(prompts, 0), sampling, streams)
        return [Written(ids, logps) for ids, logps in zip(texts, texts.logps, strict=True)]

    complete = written  # probes

    def start(self, prompts, fields):
        self.asked.append((prompts, [each["seed"] for each in fields], copy.deepcopy(self.model.state_dict())))
        first = len(self.asked) == 1

        def work():
            assert self.gate is None or first or self.gate.wait(20), "the run waits for text that it needs a step later"
            return self.written(prompts, fields)

        return self.thread.submit(work).result


@pytest.fixture(autouse=True)
def server(monkeypatch):
    def build(model, accelerator, *rest):
        return VllmEngine(Server(model), accelerator, VllmOptions(mode="server"), model.config.vocab_size)

    monkeypatch.setattr("distill_trainers.rollouts.engines.build_vllm", build)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_step_trains_on_text_of_the_weights_before_it_for_its_own_prompts(make_trainer, by_step):
    trainer = make_trainer(lmbda=1.0, max_steps=7, learning_rate=1e-2, **AHEAD)  # 6 steps are an epoch
    inner, seen = trainer.compute_loss, []

    def recorded(model, inputs, *rest, **named):
        seen.append((inputs, copy.deepcopy(model.state_dict())))
        return inner(model, inputs, *rest, **named)

    trainer.compute_loss = recorded
    trainer.train()
    asked = trainer.engine.engine.asked
    assert len(asked) == len(seen) == 7, "nothing is asked for a step that does not come"
    ratios = by_step(trainer, "sampler_ratio_p95")
    for step, ((prompts, seeds, weights), (batch, _)) in enumerate(zip(asked, seen, strict=True)):
        fresh = step % 6 == 0
        assert equal(weights, seen[step if fresh else step - 1][1])
        rows = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        assert [ids[mask.bool()].tolist() for ids, mask in rows] == prompts
        stream = Stream(trainer.args.seed, Role.STUDENT, Purpose.ROLLOUT).at(step=step, rank=0)
        assert seeds == [stream.at(row=row).number % 2**63 for row in range(4)]
        assert (ratios[step + 1] == pytest.approx(1.0, abs=1e-4)) == fresh, "it is held against who wrote it"
        assert SAMPLER_LOGPS in batch


def test_where_weights_stay_it_is_a_run_that_samples_when_due(make_trainer, by_step):
    runs = [make_trainer(lmbda=0.6, max_steps=7, learning_rate=0.0, **settings) for settings in (SERVER, AHEAD)]
    for run in runs:
        run.train()
    own, ahead = (by_step(run) for run in runs)
    assert ahead == pytest.approx(own, rel=1e-5) and by_step(runs[0], "rollouts") == by_step(runs[1], "rollouts")


def test_the_server_writes_while_the_step_before_trains(make_trainer):
    trainer = make_trainer(lmbda=1.0, max_steps=3, **AHEAD)
    trainer.engine.engine.gate = gate = threading.Event()
    inner = trainer.compute_loss
    trainer.compute_loss = lambda *given, **named: (gate.set(), inner(*given, **named))[1]
    trainer.train()
    assert trainer.state.global_step == 3


KILLED = {  # an epoch has 3 steps
    "gkd": (2, {"lmbda": 0.6}),
    "minillm": (4, {"method": "minillm", "teacher_mix_alpha": 0.0}),
    "rewards": (4, {"lmbda": 0.3, "num_generations": 2, "reward_schedule": "after", "reward_start": 3}),
}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_goes_on_with_the_text_that_was_asked_for(make_trainer, make_student, die_at, by_step, name):
    at, method = KILLED[name]
    settings = {**AHEAD, **method, "max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    settings |= {"reward_funcs": length} if name == "rewards" else {}
    settings |= {"save_strategy": "steps", "save_steps": at}
    whole = make_trainer(**settings)
    whole.train()
    with pytest.raises(die_at.error):
        make_trainer(**settings, callbacks=[die_at(at)]).train()
    again = make_trainer(make_student(seed=99), **settings)
    again.train(resume_from_checkpoint=True)
    assert by_step(again) == by_step(whole) and equal(again.model.state_dict(), whole.model.state_dict())
    asked = [[prompts for prompts, *_ in run.engine.engine.asked] for run in (whole, again)]
    assert asked[1] == asked[0][-len(asked[1]) :], "what was kept is not asked for again"


def test_text_of_other_processes_is_sampled_anew(make_trainer, caplog):
    trainer = make_trainer(lmbda=1.0, **AHEAD)
    state = {"step": 3, "rows": [1, 1], "ids": torch.tensor([4, 5]), "lengths": torch.tensor([1, 1])}
    trainer.ahead.load_state_dict({**state, "logps": torch.zeros(2)})
    assert not trainer.ahead.texts and "of 2 processes" in caplog.text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sampler_correction": "none"}, "sampler_correction: none.*truncate, mask or prefix"),
        ({"rollout_engine": "decode"}, "rollout_engine: decode.*mode: server"),
        ({"vllm_kwargs": {"mode": "colocate"}}, "colocate|vLLM is not installed"),
        ({"replay_buffer_size": 8}, "replay_buffer_size: 8.*sample_ahead"),
        ({"adaptive_rollouts": True, "lmbda": 0.5, "eval_strategy": "steps"}, "adaptive_rollouts.*know whether"),
        ({"ignore_data_skip": True}, "ignore_data_skip.*after which rows"),
        ({"lmbda": 0.0, "sampler_correction": "none"}, "sample_ahead: True.*no step trains"),
        ({"method": "minillm", "teacher_mix_alpha": 0.0, "num_minibatches": 2}, "num_minibatches: 2.*sample_ahead"),
        ({"method": "dpkd", "sampler_correction": "none"}, "sample_ahead: True.*no correction"),
    ],
    ids=str,
)
def test_where_it_is_of_no_use_or_wrong_it_is_refused(make_trainer, settings, words):
    given = {"lmbda": 1.0} if settings.get("method") is None else {}
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(**{**given, **AHEAD, **settings})
