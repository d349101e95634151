"""The server under load and abuse: it stays up, refuses clearly, and leaks nothing."""

import concurrent.futures as futures
import contextlib
import http.client
import json
import os
import socket
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.teachers import LocalTeacher, RemoteTeacher
from distill_trainers.teachers.cache.identity import tokenizer_fingerprint
from distill_trainers.teachers.remote import RemoteSettings
from distill_trainers.teachers.remote.wire import (
    PROTOCOL,
    Question,
    Wanted,
    WireError,
    pack_question,
    unpack,
    unpack_question,
)
from distill_trainers.toy import tiny_llama


def rows(count=2, tokens=6, seed=0):
    random = np.random.default_rng(seed)
    ids = random.integers(2, 14, (count, tokens)).astype(np.int32)
    return [(row, np.arange(2, tokens - 1)) for row in ids]


@pytest.fixture
def question(tokenizer):
    """`question(**changes)`: the bytes of a good question, unless changed."""

    def make(kind="topk", tokens=6, count=2, tok=None, own=None, **wanted):
        wanted = {"top_k": 3, "draws": 2, "seed": 0, **wanted}
        return pack_question(
            Question(Wanted(kind, **wanted), tok or tokenizer_fingerprint(tokenizer), own or rows(count, tokens))
        )

    return make


def post(served, body, path="/v1/signal", headers=(), timeout=20):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=timeout)
    try:
        connection.request("POST" if body is not None else "GET", path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def refused(served, body, **how):
    status, said, _ = post(served, body, **how)
    return status, json.loads(said)["error"]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


# ---- Questions ------------------------------------------------------------------------------------------------------


def test_a_question_comes_through_whole():
    asked = Question(Wanted("topk", 12, "float16", top_k=4), "abc", rows(3))
    read = unpack_question(pack_question(asked))
    assert read.wanted == asked.wanted and read.tokenizer == "abc" and read.counts == [3, 3, 3]
    for (ids, positions), (own, places) in zip(read.rows, asked.rows, strict=True):
        assert (ids == own).all() and (positions == places).all()


def tampered(**changes):
    """A message with the given arrays or values in place of a good question's."""
    arrays, said = unpack(pack_question(Question(Wanted("topk", top_k=3), "t", rows())))
    arrays |= {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    said |= {name: value for name, value in changes.items() if not isinstance(value, torch.Tensor)}
    return save(arrays, {"protocol": str(PROTOCOL), "said": json.dumps(said)})


MALFORMED = {
    "empty": b"",
    "short": b"\x05",
    "text": b"hello, is this a teacher?" * 10,
    "pickle": b"\x80\x04\x95" + b"\x00" * 60,
    "huge header": (2**40).to_bytes(8, "little") + b"{}" * 50,
    "no metadata": save({"ids": torch.zeros(2, dtype=torch.int32)}),
    "other protocol": save({"ids": torch.zeros(2, dtype=torch.int32)}, {"protocol": "0", "said": "{}"}),
    "cut": tampered()[:-3],
    "missing array": save({"ids": torch.zeros(2, dtype=torch.int32)}, {"protocol": "1", "said": "{}"}),
    "more arrays": tampered(extra=torch.zeros(1)),
    "floating ids": tampered(ids=torch.zeros(12)),
    "negative ids": tampered(ids=torch.full((12,), -1, dtype=torch.int32)),
    "lengths that do not add up": tampered(lengths=torch.tensor([6, 7], dtype=torch.int32)),
    "no rows": tampered(lengths=torch.zeros(0, dtype=torch.int32)),
    "negative lengths": tampered(lengths=torch.tensor([14, -2], dtype=torch.int32)),
    "mask of another length": tampered(predicts=torch.zeros(5, dtype=torch.bool)),
    "nothing asked": tampered(predicts=torch.zeros(12, dtype=torch.bool)),
    "last position": tampered(predicts=torch.ones(12, dtype=torch.bool)),
    "unknown kind": tampered(kind="logits"),
    "text for a number": tampered(top_k="3"),
    "true for a number": tampered(top_k=True),
    "nought": tampered(top_k=0),
    "no k": tampered(top_k=None),
    "unknown value": tampered(callback="os.system"),
    "no tokenizer": tampered(tokenizer=None),
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_questions_are_no_questions(message):
    with pytest.raises(WireError):
        unpack_question(message)


def test_every_cut_and_every_flipped_byte_is_read_or_refused():
    """Whatever comes, nothing but WireError comes of it."""
    good = tampered()
    random = np.random.default_rng(0)
    for place in range(len(good)):
        for message in (good[:place], good[:place] + bytes([random.integers(256)]) + good[place + 1 :]):
            with contextlib.suppress(WireError):
                unpack_question(message)


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_is_refused_by_name(serve, question):
    limits = {"max_rows": 3, "max_tokens": 40, "max_row_tokens": 30, "max_body_mib": 0.01, "max_answer_mib": 0.001}
    served = serve(**limits)
    for message in MALFORMED.values():
        status, said = refused(served, message)
        assert status == 400 and "no question" in said
    cases = [
        (question(tok="other"), 409, "the same ids stand for other tokens"),
        (question(count=4), 413, "`max_rows` allows 3"),
        (question(tokens=14, count=3), 413, "`max_tokens` allows 40"),
        (question(tokens=31, count=1), 413, "`max_row_tokens` allows 30"),
        (question(kind="sampled", tokens=20, draws=1000), 413, "bytes where"),
        (question(own=[(np.array([2, 99, 3], dtype=np.int32), np.array([0]))]), 422, "99 is not in a vocabulary of 14"),
        (question(kind="token_logprobs", vocab_size=3), 422, "is not in a vocabulary of 3"),
        (question(dtype="int8"), 422, "not in int8"),
        (b"x" * 20000, 413, "larger than"),
    ]
    for body, expected, words in cases:
        status, said = refused(served, body)
        assert (status, words in said) == (expected, True), (status, said)
    assert post(served, None, "/nowhere")[0] == 404 and post(served, None)[0] == 405
    assert post(served, question())[0] == 200  # and it is still there


def test_a_kind_that_the_teacher_cannot_tell(serve, question, monkeypatch):
    monkeypatch.setattr("distill_trainers.models.head_is_fusable", lambda model: False)
    served = serve()
    assert refused(served, question(kind="hidden"))[0] == 422
    assert post(served, None, "/v1/head")[0] == 404
    with pytest.raises(ConfigurationError, match="tells only topk, sampled, next_bytes, token_logprobs"):
        RemoteTeacher(served.url)


def test_the_token_is_wanted_everywhere_but_for_health(serve, question):
    served = serve(token="s3cret")
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer "}):
        for path in ("/v1/info", "/v1/load", "/v1/head"):
            assert post(served, None, path, given)[0] == 401
        assert refused(served, question(), headers=given)[0] == 401
    assert post(served, question(), headers={"Authorization": "Bearer s3cret"})[0] == 200
    assert json.loads(post(served, None, "/health")[1]) == {"status": "ok"}
    assert json.loads(post(served, None, "/version")[1])["protocol"] == PROTOCOL
    with pytest.raises(ConfigurationError, match="DISTILL_TEACHER_TOKEN"):
        RemoteTeacher(served.url, token="wrong")
    RemoteTeacher(served.url, token="s3cret").close()


def test_a_full_queue_asks_to_come_again(serve, question, monkeypatch, wait_until):
    served = serve(max_queue=2)
    hold = slow(served, monkeypatch)
    with futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, served, question())
        wait_until(lambda: served.service.load["running"] == 1)
        more = [pool.submit(post, served, question()) for _ in range(2)]
        wait_until(lambda: served.service.load["waiting"] == 2)
        status, said, headers = post(served, question())
        assert status == 503 and headers["retry-after"] == "1" and b"waiting already" in said
        hold.set()
        assert [each.result()[0] for each in [first, *more]] == [200] * 3
    assert served.service.load | {"questions": 3, "refused": 1} == served.service.load


def slow(served, monkeypatch):
    """The teacher computes nothing until the event is set."""
    hold, real = threading.Event(), served.service._forward

    def forward(rows):
        assert hold.wait(20)
        real(rows)

    monkeypatch.setattr(served.service, "_forward", forward)
    return hold


def test_an_answer_that_takes_too_long_is_called_off(serve, question, monkeypatch, wait_until):
    served = serve(request_timeout=0.3)
    hold = slow(served, monkeypatch)
    status, _, headers = post(served, question())
    assert status == 503 and headers["retry-after"] == "5"
    hold.set()
    wait_until(lambda: not served.service.load["running"])
    assert post(served, question())[0] == 200


def test_a_client_that_goes_away_leaves_the_queue(serve, question, monkeypatch, wait_until):
    served = serve()
    hold = slow(served, monkeypatch)
    with futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, served, question())
        wait_until(lambda: served.service.load["running"] == 1)
        with pytest.raises(TimeoutError):
            post(served, question(), timeout=0.3)
        wait_until(lambda: served.service.load["waiting"] == 0)
        hold.set()
        assert running.result()[0] == 200
    assert served.service.load["questions"] == 1


def test_a_failure_inside_one_question_is_that_question_s(serve, question, monkeypatch, wait_until):
    served, real = serve(), LocalTeacher.signal
    poison = np.full(9, 13, dtype=np.int32)

    def signal(self, inputs, predicts, vocab_size):
        if bool((inputs["input_ids"] == 13).all(1).any()):
            raise RuntimeError("out of memory")
        return real(self, inputs, predicts, vocab_size)

    hold = slow(served, monkeypatch)
    monkeypatch.setattr(LocalTeacher, "signal", signal)
    bodies = [question(), question(own=[(poison, np.array([3]))]), question(), question()]
    with futures.ThreadPoolExecutor(4) as pool:
        found = [pool.submit(post, served, body) for body in bodies]
        wait_until(lambda: served.service.load["waiting"] + served.service.load["running"] == 4)
        hold.set()
        assert [each.result()[0] for each in found] == [200, 500, 200, 200]
    assert post(served, question())[0] == 200


# ---- Slow clients ---------------------------------------------------------------------------------------------------


def connect(served, text):
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(text)
    return connection


def closed_after(connection):
    """Seconds until the server hangs up."""
    start = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    connection.close()
    return time.monotonic() - start


def test_slow_clients_are_cut_off(serve, question):
    """One that says nothing, one that never ends its head, one that never ends its question."""
    served, body = serve(slow_timeout=0.5), question()
    head = f"POST /v1/signal HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for text in (b"", b"GET /health HTTP/1.1\r\nX-Slow: ", head, head + body[:100]):
        assert closed_after(connect(served, text)) < 5
    trickling = connect(served, b"")
    start = time.monotonic()
    with contextlib.suppress(ConnectionError):
        for byte in head + body:
            trickling.sendall(bytes([byte]))
            time.sleep(0.02)
            assert time.monotonic() - start < 5
    trickling.close()
    assert post(served, body)[0] == 200


def test_an_answer_that_nobody_reads_is_dropped(serve, tokenizer, wait_until):
    """The head of a teacher that is wide is more than socket buffers hold."""
    served = serve(tiny_llama(tokenizer, 128, 1, vocab_size=60000), slow_timeout=0.5)
    assert len(served.service.head) > 20e6
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    connection.sendall(b"GET /v1/head HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: not served.server.server_state.connections, 10)
    connection.close()
    assert len(post(served, None, "/v1/head")[1]) == len(served.service.head)  # a reader gets all of it


# ---- Load -----------------------------------------------------------------------------------------------------------


def test_two_hundred_at_once_with_strangers_between(serve, question, make_teacher, wait_until):
    """Good, oversized, malformed and foreign questions together: each gets its own answer, and all is given back."""
    served = serve(max_body_mib=0.05, slow_timeout=2.0)
    post(served, question())
    threads, files = threading.active_count(), descriptors()
    local, alone = LocalTeacher(make_teacher()), threading.Lock()

    def expected(own):
        ids = torch.from_numpy(np.stack([row for row, _ in own])).long()
        predicts = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        predicts[:, 2:] = True
        with alone:  # a model runs one forward at a time; the server has one thread for its own
            return local.signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, predicts, None).hidden

    def one(number):
        match number % 5:
            case 0:
                return refused(served, b"x" * 60000)[0] == 413
            case 1:
                return refused(served, b"nonsense")[0] == 400
            case 2:
                return refused(served, question(tok="other"))[0] == 409
        own = rows(1 + number % 3, 4 + number % 9, seed=number)
        while True:
            status, body, _ = post(served, question("hidden", own=own), timeout=60)
            if status != 503:
                break
            time.sleep(0.05)
        return status == 200 and torch.allclose(unpack(body)[0]["hidden"], expected(own), atol=1e-4)

    slow_ones = [connect(served, b"POST /v1/signal HTTP/1.1\r\n") for _ in range(10)]
    with futures.ThreadPoolExecutor(200) as pool:
        start = threading.Barrier(200)
        found = list(pool.map(lambda number: start.wait() >= 0 and one(number), range(200)))
    assert all(found)
    load = served.service.load
    assert load["waiting"] == load["running"] == 0 and load["questions"] == 1 + 80
    assert load["forwards"] < load["questions"]  # they were answered together
    for connection in slow_ones:
        assert closed_after(connection) < 10
    wait_until(lambda: not served.server.server_state.connections)
    assert threading.active_count() <= threads and descriptors() <= files


def test_many_clients_share_one_server(serve, make_teacher):
    served = serve(max_queue=4)
    inputs = {"input_ids": torch.randint(2, 14, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    predicts = torch.ones(4, 8, dtype=torch.bool)
    expected = LocalTeacher(make_teacher()).signal(inputs, predicts, None).hidden
    teachers = [RemoteTeacher(served.url, RemoteSettings(concurrency=2)) for _ in range(12)]
    with futures.ThreadPoolExecutor(12) as pool:
        for said in pool.map(lambda teacher: teacher.signal(inputs, predicts, None), teachers):
            torch.testing.assert_close(said.hidden, expected)
    for teacher in teachers:
        teacher.close()


def test_stopping_finishes_what_runs_and_sends_the_rest_away(serve, question, monkeypatch, wait_until):
    served = serve()
    hold = slow(served, monkeypatch)
    with futures.ThreadPoolExecutor(4) as pool:
        running = pool.submit(post, served, question())
        wait_until(lambda: served.service.load["running"] == 1)
        waiting = pool.submit(post, served, question())
        wait_until(lambda: served.service.load["waiting"] == 1)
        served.server.should_exit = True
        hold.set()
        assert running.result()[0] == 200 and waiting.result()[0] in (200, 503)
        served.thread.join(20)
    assert not served.thread.is_alive() and not served.service._thread.is_alive()
    with pytest.raises(ConnectionError):
        post(served, question())
