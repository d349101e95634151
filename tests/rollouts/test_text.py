"""A local teacher of text: batches, resumption, styles; and the same model behind `transformers serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rationales.local_model import LocalTextModel
from distill_trainers.rationales.records import Request
from distill_trainers.rationales.stages import extract
from distill_trainers.rollouts import CompletionSettings, SamplingSettings
from distill_trainers.storage import RecordStore

CHAT = "{% for m in messages %}{{ '+' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}=="


class Numbered:
    """An engine whose completions tell the prompt's length and its place in the batch."""

    def __init__(self):
        self.sizes = []

    def generate(self, model, prompt_ids, prompt_mask, sampling, streams=None):
        self.sizes.append(len(prompt_ids))
        return [[2 + int(length) % 10, 1] for length in prompt_mask.sum(1)]


def local(make_teacher, tokenizer, style="auto", **settings):
    stream = Stream(0, Role.TEACHER, Purpose.RATIONALE)
    settings = CompletionSettings(SamplingSettings(8, 1.0, eos_token_ids=[1], pad_token_id=0), stream, **settings)
    return LocalTextModel(make_teacher().eval(), tokenizer, settings, Accelerator(cpu=True), name="t", style=style)


QUESTIONS = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 150, 13)]


def test_batches_of_like_length_and_every_request_answered(make_teacher, tokenizer):
    engine = Numbered()
    teacher = local(make_teacher, tokenizer, batch_size=5, style="text", engine=engine)
    requests = [Request(str(n), [{"role": "user", "content": "1" * (n + 1)}]) for n in range(12)]
    answers = {answer.key: answer for answer in teacher.complete(requests)}
    assert engine.sizes == [5, 5, 2] and answers.keys() == {str(n) for n in range(12)}
    for n in range(12):
        assert answers[str(n)].text == str(answers[str(n)].prompt_tokens % 10)
        assert answers[str(n)].finish == "stop" and answers[str(n)].completion_tokens == 2


def test_a_prompt_beyond_the_models_positions_costs_itself_alone(tokenizer):
    """A model with learnt positions failed in the midst of its batch."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=20, n_embd=16, n_layer=1, n_head=2))
    teacher = local(model.eval, tokenizer, batch_size=5, style="text")
    requests = [Request(str(n), [{"role": "user", "content": "1" * n}]) for n in (3, 40, 4)]
    answers = {answer.key: answer for answer in teacher.complete(requests)}
    assert [answers[key].error == "prompt too long" for key in ("3", "40", "4")] == [False, True, False]


def test_it_goes_on_where_it_was_stopped_with_the_same_answers(make_teacher, tokenizer, tmp_path):
    """What a question gets depends on its own key, never on when it is asked or with which others."""
    how = {"batch_size": 1, "style": "text"}
    whole, asked = extract(QUESTIONS, local(make_teacher, tokenizer, **how), RecordStore(tmp_path / "whole"))
    assert asked.done + asked.failed.total() == len(QUESTIONS) and asked.done > 3

    def killed(items, total, what):
        for number, item in enumerate(items):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    store = RecordStore(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        extract(QUESTIONS, local(make_teacher, tokenizer, **how), store, progress=killed)
    rows, again = extract(QUESTIONS, local(make_teacher, tokenizer, style="text", batch_size=4), store)
    assert again.known > 0 and again.known + again.done == asked.done
    assert [row["response"] for row in rows] == [row["response"] for row in whole]


def test_a_chat_template_is_used_where_there_is_one(make_teacher, tokenizer):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    teacher = local(make_teacher, chatty)
    assert teacher.style == "chat" == teacher.identity()["style"]
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    assert chatty.decode(teacher._ids(Request("k", messages))).replace(" ", "") == "+1=2+3=="
    assert local(make_teacher, tokenizer).style == "text"


@pytest.fixture(scope="module")
def served(saved, tokenizer, tmp_path_factory):
    """`transformers serve` on loopback, with a tiny model that has a chat template."""
    for name in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'transformers[serving]' openai")
    import copy
    import shutil

    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(saved.teacher, folder)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    chatty.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    log = (folder.parent / "log").open("w")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            assert process.poll() is None, (folder.parent / "log").read_text()[-3000:]
            time.sleep(0.5)
        else:
            pytest.fail("transformers serve did not start: " + (folder.parent / "log").read_text()[-3000:])
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_extraction_through_transformers_serve(served, tmp_path):
    from distill_trainers.rationales.endpoint_model import EndpointSettings, RemoteTextModel

    name, url = served
    settings = EndpointSettings(name, url, max_tokens=12, temperature=1.0, concurrency=2, timeout=60, max_retries=0)
    store = RecordStore(tmp_path)
    rows, asked = extract(QUESTIONS, RemoteTextModel(settings), store, samples=2)
    assert asked.done + asked.failed.total() == 2 * len(QUESTIONS) and asked.done > 0
    assert all(error in ("cut-off answer", "empty answer") for error in asked.failed), asked.failed
    assert all(set(row["response"]) <= set("0123456789+= ") for row in rows)
    assert asked.completion_tokens > 0
    _, again = extract(QUESTIONS, RemoteTextModel(settings), store, samples=2)
    assert again.known == asked.done
