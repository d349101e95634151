"""A trainer whose teacher is behind HTTP: who is refused, who is waited for, and what is left behind."""

import copy
import gc
import json
import math
import os
import signal
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import TrainerCallback

from distill_trainers.cli import main
from distill_trainers.exceptions import ConfigurationError, TeacherServerError
from distill_trainers.losses import token_divergence
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.servers.endpoints import parse_servers
from distill_trainers.signals import TokenLogits
from distill_trainers.teachers import LocalTeacher, RemoteTeacher
from distill_trainers.teachers.remote import RemoteSettings
from distill_trainers.teachers.remote.wire import PROTOCOL
from distill_trainers.toy import CHARACTERS, tiny_llama
from distill_trainers.trainers import base
from distill_trainers.trainers.lifecycle.callbacks import InterruptCallback

RUN = {"lmbda": 0.0, "max_steps": 5, "gradient_accumulation_steps": 2}


@pytest.fixture
def no_student(monkeypatch):
    """Whoever loads a student fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("the student was loaded before the teacher was refused")

    monkeypatch.setattr(base, "load_student", load)


@pytest.fixture
def other_tokenizer(tokenizer):
    """As large as the other, with two characters exchanged."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", *CHARACTERS[1], CHARACTERS[0], *CHARACTERS[2:]]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def inputs(rows=3, tokens=8):
    ids = torch.arange(rows * tokens).view(rows, tokens) % 12 + 2
    predicts = torch.ones(rows, tokens - 1, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, predicts


# ---- Who is refused, before a student is loaded ---------------------------------------------------------------------


def test_a_server_with_another_tokenizer(make_trainer, serve, other_tokenizer, no_student):
    with pytest.raises(ConfigurationError, match="same ids stand for other tokens"):
        make_trainer(teacher=serve(tok=other_tokenizer).url, **RUN)


def test_a_server_that_is_not_there(make_trainer, no_student):
    with pytest.raises(ConfigurationError, match=r"http://127.0.0.1:9 does not answer .*serve-teacher"):
        make_trainer(teacher="http://127.0.0.1:9", **RUN)


def test_the_token_comes_from_the_environment(make_trainer, serve, monkeypatch, no_student):
    served = serve(token="s3cret")
    with pytest.raises(ConfigurationError, match="401 .*DISTILL_TEACHER_TOKEN"):
        make_trainer(teacher=served.url, **RUN)
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "two words")
    with pytest.raises(ConfigurationError, match="has spaces"):
        make_trainer(teacher=served.url, **RUN)
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "s3cret")
    with pytest.raises(AssertionError, match="student was loaded"):
        make_trainer(teacher=served.url, **RUN)


def test_servers_of_different_teachers(serve, make_teacher):
    with pytest.raises(ConfigurationError, match="serve different teachers"):
        RemoteTeacher([serve().url, serve(make_teacher(seed=8)).url])


def test_rows_longer_than_the_server_takes(make_trainer, serve, no_student):
    with pytest.raises(ConfigurationError, match=r"max_length: 65`.*rows of 64 tokens"):
        make_trainer(teacher=serve().url, max_length=65, **RUN)


def test_the_narrowest_of_several_servers_sets_the_limits(make_trainer, serve, no_student):
    """Any of them may be asked any question."""
    wide, narrow = serve(), serve(max_row_tokens=16, max_rows=2)
    teacher = RemoteTeacher([wide.url, narrow.url])
    assert (teacher.info["max_row_tokens"], teacher.info["max_rows"]) == (16, 2)
    with pytest.raises(ConfigurationError, match=r"max_length: 32`.*rows of 16 tokens"):
        make_trainer(teacher=f"{wide.url},{narrow.url}", max_length=32, **RUN)


def test_a_vocabulary_that_ends_before_the_student_s(make_trainer, serve, make_student):
    from distill_trainers.exceptions import VocabularyError

    with pytest.raises(VocabularyError, match="for which a model has no row"):
        make_trainer(make_student(vocab_size=20), teacher=serve(tiny_vocabulary()).url, **RUN)


def tiny_vocabulary():
    from distill_trainers.toy import character_tokenizer

    return tiny_llama(character_tokenizer(), 48, 2, vocab_size=10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_kd": True, "lmbda": 0.0}, "completions"),
        ({"method": "minillm"}, "completions"),
        ({"method": "minillm", "teacher_mix_alpha": 0.0, "teacher_server_kind": "topk"}, "teacher_server_kind: topk"),
        ({"method": "minillm", "teacher_mix_alpha": 0.0, "teacher_server_kind": "token_logprobs"}, "distribution"),
        ({"teacher_server_kind": "token_logprobs"}, "distribution"),
        ({"teacher_server_kind": "topk", "kd_temperature": 2.0}, "temperature"),
        ({"teacher_server_kind": "sampled", "divergence": "reverse_kl"}, "forward_kl"),
        ({"teacher_server_kind": "logits"}, "one of hidden, topk, sampled, next_bytes, token_logprobs"),
        ({"teacher_server_kind": "topk", "teacher_server_dtype": "bfloat16"}, "float32, float16 for topk"),
        ({"teacher_server_top_k": 0}, "expected 1 or more"),
        ({"teacher_server_draws": 40000}, "32767"),
        ({"teacher_server_timeout": 0.0}, "a number in (0, "),
        ({"teacher_cache": "somewhere"}, "teacher_cache"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "teacher_model_init_kwargs"),
        ({"method": "dpkd", "reference_logps_dir": "somewhere"}, "reference_logps_dir"),
        ({"teacher": "http://a:1,ftp://b"}, "'ftp://b'"),
        ({"teacher": "http://"}, "expected `http://host:port`"),
        ({"teacher": "http://a:1/x?token=5"}, "expected `http://host:port`"),
        ({"teacher": "http://me:secret@a:1"}, "DISTILL_TEACHER_TOKEN"),
        ({"teacher": "http://a:1,http://a:1/v1/"}, "named twice"),
        ({"teacher": "default", "teacher_server_kind": "topk"}, "teacher_server_kind: topk`; expected"),
        ({"teacher": "default", "teacher_server_patience": 5.0}, "teacher_server_patience"),
    ],
)
def test_settings_that_cannot_work(make_trainer, no_student, settings, words):
    with pytest.raises(ConfigurationError) as caught:
        make_trainer(**{"teacher": "http://127.0.0.1:9", **settings})
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_addresses():
    assert parse_servers(" http://a:1/v1/ ,https://b.example/teacher") == ["http://a:1", "https://b.example/teacher"]


# ---- Who is waited for ----------------------------------------------------------------------------------------------


class At(TrainerCallback):
    """Calls `act` when optimiser step `step` begins."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_server_that_restarts_changes_nothing(make_trainer, serve, by_step, make_teacher, lmbda):
    settings = {**RUN, "lmbda": lmbda}
    whole = make_trainer(teacher=make_teacher(), **settings)
    whole.train()
    served, again = serve(), []

    def restart():
        served.stop()
        threading.Timer(0.5, lambda: again.append(serve(port=served.port))).start()

    trainer = make_trainer(teacher=served.url, callbacks=[At(2, restart)], **settings)
    trainer.train()
    assert again and again[0].service.load["questions"] > 0
    assert by_step(trainer) == pytest.approx(by_step(whole), rel=1e-5)


def test_a_server_that_comes_back_as_another_teacher_ends_the_run(make_trainer, serve, make_teacher):
    served = serve()

    def restart():
        served.stop()
        serve(make_teacher(seed=8), port=served.port)

    trainer = make_trainer(teacher=served.url, callbacks=[At(1, restart)], **RUN)
    with pytest.raises(TeacherServerError, match="serves other weights"):
        trainer.train()
    assert trainer.state.global_step in (1, 2)  # the window in progress had been asked for ahead


def test_a_server_that_stays_away_ends_the_run(make_trainer, serve):
    served = serve()
    trainer = make_trainer(teacher=served.url, callbacks=[At(1, served.stop)], teacher_server_patience=0.5, **RUN)
    with pytest.raises(TeacherServerError, match="No teacher's server gave an answer .*resume_from_checkpoint"):
        trainer.train()


MINILLM = {"method": "minillm", "lmbda": 1.0, "teacher_mix_alpha": 0.0, "num_minibatches": 2, "num_inner_epochs": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.5, "replay_buffer_size": 8},
        {"lmbda": 0.5, "teacher_server_kind": "topk", "teacher_server_top_k": 4},
        {"lmbda": 0.5, "teacher_server_kind": "sampled", "divergence": "forward_kl"},
        MINILLM,
        {**MINILLM, "objective": "token", "estimator": "sampled", "teacher_server_kind": "token_logprobs"},
    ],
    ids=["replay", "topk", "sampled", "minillm", "logprobs"],
)
def test_a_run_whose_server_stays_away_goes_on_from_its_last_step(
    make_trainer, make_student, serve, by_step, tmp_path, settings
):
    """Not from its last checkpoint: there is none. Dropout draws numbers in the step that is given up, too."""
    settings = {**RUN, "max_steps": 6, "disable_dropout": False, "teacher_server_patience": 0.3, **settings}
    settings["verify_saved"] = False
    served = serve(batch_tokens=1)

    def make(**more):
        return make_trainer(make_student(attention_dropout=0.1), served.url, **settings, **more)

    whole = make(output_dir=str(tmp_path / "whole"))
    whole.train()
    away = make(callbacks=[At(3, served.stop)])
    with pytest.raises(TeacherServerError, match=r"with `--resume_from_checkpoint true`.* last step is kept in .*-\d"):
        away.train()
    (kept,) = (tmp_path / "out").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{away.state.global_step}" and 3 <= away.state.global_step < 6
    served = serve(port=served.port, batch_tokens=1)
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    for name in ("loss", "grad_norm", "rollouts"):
        assert by_step(resumed, name) == by_step(whole, name)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_a_checkpoint_of_the_last_step_is_not_written_twice(make_trainer, serve, tmp_path):
    served = serve()
    settings = {**RUN, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(teacher=served.url, callbacks=[At(2, served.stop)], teacher_server_patience=0.3, **settings)
    trainer.save_aside = None
    with pytest.raises(TeacherServerError, match="last step is kept in .*checkpoint-[23]"):
        trainer.train()


def test_a_run_that_is_asked_to_end_does_not_wait_for_a_server(make_trainer, serve):
    """SIGTERM: whoever sent it soon sends SIGKILL."""
    served = serve()
    trainer = make_trainer(teacher=served.url, teacher_server_patience=600.0, **RUN)
    trainer.add_callback(InterruptCallback(trainer.teacher, trainer.accelerator))
    trainer.add_callback(At(1, served.stop))
    asked = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
    asked.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(TeacherServerError, match="last step is kept in"):
            trainer.train()
    finally:
        asked.join()
        signal.signal(signal.SIGTERM, before)


def test_one_of_two_servers_is_enough(make_trainer, serve, by_step, make_teacher):
    whole = make_trainer(teacher=make_teacher(), **RUN)
    whole.train()
    first, second = serve(), serve()
    trainer = make_trainer(teacher=f"{first.url},{second.url}", callbacks=[At(2, first.stop)], **RUN)
    trainer.train()
    assert by_step(trainer) == pytest.approx(by_step(whole), rel=1e-5)
    both = [server.service.counted["questions"] for server in (first, second)]
    assert 0 < both[0] < both[1]


def test_nothing_is_left_behind(make_trainer, serve, wait_until):
    served = serve()
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    trainer = make_trainer(teacher=served.url, **RUN)
    trainer.train()
    load = served.service.load
    assert load["waiting"] == load["running"] == 0 and load["questions"] == 10
    trainer.teacher.close()
    wait_until(lambda: not served.server.server_state.connections)
    wait_until(lambda: threading.active_count() <= threads)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


# ---- A fake server, ours or OpenAI's --------------------------------------------------------------------------------


class Fake:
    """Answers `paths[path](body)` (status, JSON or bytes, headers) over real HTTP."""

    def __init__(self, paths):
        self.asked = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def _serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fake.asked.append((self.path, dict(self.headers), body))
                found = paths.get(self.path)
                status, said, *more = found(body) if found else (404, {"error": "no such path"})
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _serve

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def fake():
    fakes = []

    def start(paths):
        fakes.append(Fake(paths))
        return fakes[-1]

    yield start
    for each in fakes:
        each.http.shutdown()
        each.http.server_close()


def test_another_protocol_is_refused(fake):
    server = fake({"/v1/info": lambda body: (200, {"protocol": PROTOCOL + 1, "version": "9.9"})})
    with pytest.raises(
        ConfigurationError, match=rf"version '9.9' and speaks protocol {PROTOCOL + 1}, expected {PROTOCOL}"
    ):
        RemoteTeacher(server.url)


@pytest.mark.parametrize("info", [[], {}, {"protocol": PROTOCOL}, {"protocol": PROTOCOL, "teacher": "t"}])
def test_a_server_that_does_not_describe_itself_is_refused(fake, info):
    with pytest.raises(ConfigurationError):
        RemoteTeacher(fake({"/v1/info": lambda body: (200, info)}).url)


@pytest.mark.parametrize("answer", [b"not json", b"[]", b'{"data": 5}', b'{"data": [{}]}', b'{"data": []}'])
def test_a_server_of_another_kind_is_refused(fake, answer):
    with pytest.raises(ConfigurationError):
        RemoteTeacher(fake({"/v1/models": lambda body: (200, answer)}).url, RemoteSettings("topk"))


def proxied(served, spoil):
    """The paths of a real server, whose answers to questions pass through `spoil(number, status, body)`."""
    count = iter(range(10**6))

    def asked(path, body=None):
        with urllib.request.urlopen(served.url + path, body, timeout=20) as answer:
            return answer.status, answer.read()

    def get(path):
        return lambda body: asked(path)

    def ask(body):
        return spoil(next(count), *asked("/v1/signal", body))

    return {"/v1/info": get("/v1/info"), "/v1/head": get("/v1/head"), "/v1/signal": ask}


@pytest.mark.parametrize(
    "fault",
    [
        lambda status, body: (503, {"error": "busy"}, {"Retry-After": "0.05"}),
        lambda status, body: (500, {"error": "out of memory"}),
        lambda status, body: (429, b""),
        lambda status, body: (200, b"<html>proxy</html>"),
        lambda status, body: (200, body[: len(body) // 2]),
        lambda status, body: (502, b"\xff\xfe"),
    ],
)
def test_a_fault_that_passes_is_got_over(serve, fake, make_teacher, fault):
    served = serve()
    server = fake(proxied(served, lambda number, *real: fault(*real) if number < 2 else real))
    teacher = RemoteTeacher(server.url, RemoteSettings(patience=20.0))
    expected = LocalTeacher(make_teacher()).signal(*inputs(), None)
    torch.testing.assert_close(teacher.signal(*inputs(), None).hidden, expected.hidden)
    teacher.close()


def test_nonsense_without_end_is_not_asked_for_forever(serve, fake):
    server = fake(proxied(serve(), lambda number, status, body: (200, b"nonsense")))
    teacher = RemoteTeacher(server.url)
    with pytest.raises(TeacherServerError, match="answers nonsense"):
        teacher.signal(*inputs(), None)
    assert len(server.asked) < 10
    teacher.close()


def test_a_refusal_is_told_at_once(serve, fake):
    server = fake(proxied(serve(), lambda number, status, body: (409, {"error": "other tokenizer"})))
    teacher = RemoteTeacher(server.url)
    with pytest.raises(TeacherServerError, match="refuses: 409 other tokenizer"):
        teacher.signal(*inputs(), None)
    teacher.close()


def test_a_head_with_another_hash_is_refused(serve, fake):
    paths = proxied(serve(), lambda number, *real: real)
    whole = paths["/v1/head"](b"")[1]
    paths["/v1/head"] = lambda body: (200, whole[:-1] + bytes([whole[-1] ^ 1]))
    teacher = RemoteTeacher(fake(paths).url)
    with pytest.raises(TeacherServerError, match="has not the hash"):
        teacher.signal(*inputs(), None)
    teacher.close()


def test_redirects_do_not_carry_the_token_away(serve, fake):
    thief = fake({"/v1/info": lambda body: (200, {})})
    server = fake({"/v1/info": lambda body: (302, b"", {"Location": thief.url + "/v1/info"})})
    with pytest.raises(ConfigurationError, match="302"):
        RemoteTeacher(server.url, token="s3cret")
    assert server.asked[0][1]["Authorization"] == "Bearer s3cret" and not thief.asked


# ---- OpenAI-compatible servers --------------------------------------------------------------------------------------


@pytest.fixture
def vllm(fake, make_teacher, tokenizer):
    """`vllm(max_logprobs=…)`: a fake that answers as vLLM does, with the tiny teacher's log-probabilities."""

    def start(max_logprobs=20, told=True, tok=tokenizer, model_len=None, more=(), model=None):
        model = make_teacher() if model is None else model

        @torch.no_grad()
        def complete(body):
            asked = json.loads(body)
            k = asked["prompt_logprobs"]
            if k > max_logprobs:
                words = f"Requested prompt logprobs of {k}, which is greater than max allowed: {max_logprobs}"
                return 400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}
            choices = []
            for index, prompt in enumerate(asked["prompt"]):
                logps = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
                places: list = [None]
                for number, token in enumerate(prompt[1:]):
                    ids = list(dict.fromkeys([token, *logps[number].topk(k).indices.tolist()]))
                    ranks = (logps[number] > logps[number][:, None]).sum(-1) + 1
                    places.append(
                        {
                            str(i): {"logprob": float(logps[number, i]), "rank": int(ranks[i]), "decoded_token": "?"}
                            for i in ids
                        }
                    )
                choice = {"index": index, "text": "x", "logprobs": None, "finish_reason": "length"}
                choices.append({**choice, "prompt_logprobs": places if told else None})
            return 200, {"id": "cmpl-1", "object": "text_completion", "choices": choices[::-1], "usage": {}}

        def tokenize(body):
            ids = tok.encode(json.loads(body)["prompt"], add_special_tokens=False)
            return 200, {"count": len(ids), "max_model_len": 64, "tokens": ids}

        models = [{"id": name, "object": "model", "max_model_len": model_len} for name in ("tiny", *more)]
        paths = {"/v1/models": lambda body: (200, {"object": "list", "data": models}), "/v1/completions": complete}
        return fake(paths | ({"/tokenize": tokenize} if tok else {}))

    return start


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("gkd", {"lmbda": 0.5}, {"teacher_server_kind": "topk", "teacher_server_top_k": 14}),
        ("minillm", {"objective": "token", "estimator": "sampled"}, {"teacher_server_kind": "token_logprobs"}),
    ],
)
def test_a_run_on_prompt_logprobs_is_that_of_the_local_teacher(
    make_trainer, vllm, by_step, make_teacher, method, settings, told
):
    run = {"max_steps": 4, "gradient_accumulation_steps": 2, "method": method, **settings}
    local = make_trainer(teacher=make_teacher(), **run)
    local.train()
    remote = make_trainer(teacher=vllm().url + "/v1", **run, **told)
    remote.train()
    assert by_step(remote) == pytest.approx(by_step(local), rel=1e-5)


def test_a_teacher_with_its_own_tokenizer_is_that_of_the_local_one(make_trainer, vllm, by_step, digits):
    """Log-probabilities of the teacher's own tokens are all that `alm` takes."""
    teacher = tiny_llama(digits, 48, 2, seed=7, initializer_range=0.25)
    run = {"max_steps": 3, "lmbda": 0.5, "seed": 1, "cross_tokenizer": {"alm": 1.0}}
    run |= {"teacher_tokenizer": "own", "teacher_processing_class": digits}
    local = make_trainer(teacher=copy.deepcopy(teacher), **run)
    local.train()
    url = vllm(tok=digits, model=teacher).url + "/v1"
    remote = make_trainer(teacher=url, **run, teacher_server_kind="token_logprobs")
    remote.train()
    assert by_step(remote) == pytest.approx(by_step(local), rel=1e-6)


@pytest.mark.parametrize(
    ("told", "kind", "says"),
    [
        (False, "token_logprobs", "no `prompt_logprobs`.*serve-teacher.*train on its text"),  # text alone, on-policy
        (True, "hidden", "tells only topk, token_logprobs"),
        (True, "topk", "whole distribution.*hidden` or `next_bytes"),
        (True, "token_logprobs", r"needs \['distribution'\].*`cross_tokenizer: {alm: 1.0}`"),
    ],
)
def test_what_such_a_server_cannot_tell_of_its_own_tokens_is_refused(make_trainer, vllm, digits, told, kind, says):
    teacher = tiny_llama(digits, 48, 2)
    terms = {"alm": 1.0} if not told else {"alm": 1.0, "next_byte": 1.0}
    run = {"lmbda": 1.0, "cross_tokenizer": terms, "teacher_tokenizer": "own", "teacher_processing_class": digits}
    url = vllm(tok=digits, model=teacher, told=told).url + "/v1"
    with pytest.raises(ConfigurationError, match=says):
        make_trainer(teacher=url, **run, teacher_server_kind=kind)


def test_few_ids_are_those_of_our_own_server(vllm, serve):
    found = [RemoteTeacher(url, RemoteSettings("topk", top_k=4)) for url in (vllm().url, serve().url)]
    theirs, ours = (teacher.signal(*inputs(), None) for teacher in found)
    assert torch.equal(theirs.ids, ours.ids)
    torch.testing.assert_close(theirs.logps, ours.logps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.tail_logps.exp(), ours.tail_logps.exp(), atol=1e-5, rtol=0)
    for teacher in found:
        teacher.close()


@pytest.mark.parametrize("most", [0.0, -1e-9, 1e-5, -3e-8])
@pytest.mark.parametrize("divergence", ["reverse_kl", "adaptive_kl"])
def test_a_teacher_so_sure_that_nothing_is_left_for_the_others(fake, most, divergence):
    logps = {5: most, 6: -30.0, 7: -31.0}
    places = [None, *({str(i): {"logprob": logp} for i, logp in logps.items()} for _ in range(9))]

    def complete(body):
        prompts = json.loads(body)["prompt"]
        choices = [{"index": i, "prompt_logprobs": places[: len(prompt)]} for i, prompt in enumerate(prompts)]
        return 200, {"choices": choices}

    server = fake({"/v1/models": lambda body: (200, {"data": [{"id": "sure"}]}), "/v1/completions": complete})
    teacher = RemoteTeacher(server.url, RemoteSettings("topk", top_k=3))
    batch = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    signal = teacher.signal(batch, torch.ones(1, 5, dtype=torch.bool), None)
    teacher.close()
    student = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = token_divergence(divergence, TokenLogits(student), signal.chunk(slice(None)))
    value.sum().backward()

    left = max(1 - sum(math.exp(logp) for logp in logps.values()), 2.0**-24)
    p = torch.tensor([*(math.exp(logp) for logp in logps.values()), left], dtype=torch.float64)
    q = student.detach().double().softmax(-1)[:, 5:8]
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    reverse, forward = (q * (q / p).log()).sum(-1), (p * (p / q).log()).sum(-1)
    gaps = (p - q).abs()
    share = gaps[:, 0] / gaps.sum(-1)  # the likeliest id is all of the head
    expected = reverse if divergence == "reverse_kl" else share * forward + (1 - share) * reverse
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-4, atol=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("server", "settings", "words"),
    [
        ({}, {"kind": "hidden"}, "tells only topk, token_logprobs"),
        ({}, {"kind": "topk", "top_k": 21}, "--max-logprobs"),
        ({"told": False}, {"kind": "topk", "top_k": 5}, "no `prompt_logprobs`"),
        ({"told": False}, {"kind": "hidden"}, "train on its text (`distill-trainers rationales`)"),
        ({"more": ["other"]}, {"kind": "topk", "top_k": 5}, "serves tiny, other"),
        ({}, {"kind": "topk", "top_k": 5, "model": "large"}, "large"),
    ],
)
def test_openai_servers_that_cannot_serve(vllm, server, settings, words):
    with pytest.raises(ConfigurationError) as caught:
        RemoteTeacher(vllm(**server).url, RemoteSettings(**settings))
    assert words in str(caught.value)


def test_an_openai_server_with_another_tokenizer(make_trainer, vllm, other_tokenizer, no_student):
    told = {"teacher_server_kind": "topk", "teacher_server_top_k": 5}
    with pytest.raises(ConfigurationError, match="splits text into other ids"):
        make_trainer(teacher=vllm(tok=other_tokenizer).url, **RUN, **told)
    with pytest.raises(ConfigurationError, match="takes rows of 20 tokens"):
        make_trainer(teacher=vllm(model_len=21).url, **RUN, **told)


# ---- Recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote_recipe(tmp_path, saved):
    """`remote_recipe(teacher=…)`: options of `train` for the tiny student."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def options(teacher, **changes):
        settings = {
            "model_name_or_path": saved.student,
            "teacher_model_name_or_path": teacher,
            "dataset": tmp_path / "train.jsonl",
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "max_length": 24,
            "max_new_tokens": 4,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "true",
            **changes,
        }
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    return options


def test_a_recipe_names_the_server(remote_recipe, serve, tmp_path, capsys):
    served = serve()
    assert main(["train", *remote_recipe(served.url), "--dry_run", "true"]) == 0
    assert "behind HTTP" in capsys.readouterr().out and served.service.counted["questions"] == 0
    assert main(["train", *remote_recipe(served.url)]) == 0
    assert "`tiny`" in (tmp_path / "out" / "README.md").read_text()
    assert parse_recipe(remote_recipe(served.url)).args.teacher_server_kind == "hidden"


@pytest.mark.parametrize("dry", ["true", "false"])
def test_bad_recipes_are_refused_in_a_line(remote_recipe, serve, other_tokenizer, capsys, monkeypatch, dry):
    from distill_trainers import models

    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    made = {"student_init": '{"from_teacher": true, "keep_layers": 1}'}
    for teacher, changes, words in (
        ("http://127.0.0.1:9", {}, "http://127.0.0.1:9 does not answer"),
        (serve(tok=other_tokenizer).url, {}, "same ids stand for other tokens"),
        ("http://127.0.0.1:9", {"seq_kd": "true", "lmbda": "0"}, "completions"),
        ("http://127.0.0.1:9", {"teacher_server_kind": "all"}, "teacher_server_kind"),
    ):
        assert main(["train", *remote_recipe(teacher, **changes), "--dry_run", dry]) == 2
        assert words in capsys.readouterr().err
    options = remote_recipe("http://127.0.0.1:9", **made)
    del options[:2]  # no student
    assert main(["train", *options, "--dry_run", dry]) == 2
    assert "its weights are not here" in capsys.readouterr().err


def test_pairs_want_a_teacher_that_writes(remote_recipe, capsys):
    assert main(["pairs", *remote_recipe("http://127.0.0.1:9", method="dpkd"), "--pairs_file", "p.jsonl"]) == 2
    assert "needs ['completions'] of its teacher" in capsys.readouterr().err


def test_a_server_open_to_others_wants_a_token(saved, capsys, monkeypatch):
    monkeypatch.delenv("DISTILL_TEACHER_TOKEN", raising=False)
    for options, words in (
        (["--host", "0.0.0.0"], "DISTILL_TEACHER_TOKEN"),
        (["--max-queue", "0"], "max_queue"),
        (["--port", "70000"], "--port"),
        (["--dtype", "int3", "--port", "0"], "dtype 'int3'"),
    ):
        assert main(["serve-teacher", "--model", saved.teacher, *options]) == 2
        assert words in capsys.readouterr().err
    assert main(["serve-teacher", "--model", "./no/such/folder", "--port", "0"]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_rows_longer_for_the_teacher_than_its_server_takes_are_refused_at_once(make_trainer, serve):
    server, views = serve(max_row_tokens=20).url, {"teacher_prompt": "9+9+9+{prompt}", "max_length": 16}
    with pytest.raises(ConfigurationError, match="of the training rows may come to 2. tokens for the teacher, whose"):
        make_trainer(teacher=server, lmbda=1.0, max_new_tokens=9, **views)
    make_trainer(teacher=server, lmbda=1.0, max_new_tokens=2, **views)
