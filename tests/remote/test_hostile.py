"""Servers that lie, and strangers that take up room: what each side believes is bounded in bytes, time and places."""

import contextlib
import gzip
import json
import math
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill_trainers.exceptions import ConfigurationError, TeacherServerError
from distill_trainers.servers import endpoints
from distill_trainers.teachers import RemoteTeacher
from distill_trainers.teachers.remote import RemoteSettings, openai
from distill_trainers.teachers.remote.wire import PROTOCOL, Question, Wanted, pack, problem_of
from distill_trainers.trainers.lifecycle.callbacks import InterruptCallback

INFO = {
    "protocol": PROTOCOL,
    "version": "1",
    "teacher": "tiny",
    "weights": "abc",
    "tokenizer": "def",
    "vocab_rows": 16,
    "dtype": "float32",
    "kinds": ["topk", "token_logprobs", "sampled"],
    "hidden_size": None,
    "head_sha256": None,
    "max_rows": 64,
    "max_tokens": 4096,
    "max_row_tokens": 64,
    "max_answer_bytes": 2**20,
}


class Liar:
    """Hands `tell(connection, path)` each request to answer as it likes, over plain sockets."""

    def __init__(self, tell):
        self.ended = threading.Event()
        self._tell, self._socket = tell, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            self._tell(self, connection, head.split(b" ")[1].decode())

    def close(self):
        self.ended.set()
        self._socket.close()


@pytest.fixture
def liar():
    liars = []

    def start(tell):
        liars.append(Liar(tell))
        return liars[-1]

    yield start
    for each in liars:
        each.close()


def told(connection, body, *headers, length=None):
    lines = [b"HTTP/1.1 200 OK", f"Content-Length: {len(body) if length is None else length}".encode(), *headers]
    connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)


def trickle(server, connection, pieces):
    for piece in pieces:
        if server.ended.wait(0.02):
            return
        connection.sendall(piece)


def endless(piece):
    while True:
        yield piece


def _signal_only(tell):
    """Honest about itself; `tell` answers questions."""

    def answer(server, connection, path):
        told(connection, json.dumps(INFO).encode()) if path == "/v1/info" else tell(server, connection)

    return answer


def never_ends(server, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    while not server.ended.is_set():
        connection.sendall(piece)


def announces(server, connection):
    told(connection, b"x", length=10**15)
    server.ended.wait(20)


def bombs(server, connection):
    told(connection, gzip.compress(b"\0" * 2**24), b"Content-Encoding: gzip")


def trickles_a_body(server, connection):
    told(connection, b"", length=1000)
    trickle(server, connection, endless(b"x"))


def trickles_a_head(server, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    trickle(server, connection, endless(b"X-A: b\r\n"))


def long_head(server, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not server.ended.is_set():
        connection.sendall(b"x" * 65536)


def says_nothing(server, connection):
    server.ended.wait(20)


LIES = [never_ends, announces, bombs, trickles_a_body, trickles_a_head, long_head, says_nothing]


def inputs(rows=3, tokens=8):
    ids = torch.arange(rows * tokens).view(rows, tokens) % 12 + 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones(rows, tokens - 1, dtype=torch.bool)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_an_answer_is_bounded_in_bytes_and_seconds(liar, lie):
    server = liar(_signal_only(lie))
    teacher = RemoteTeacher(server.url, RemoteSettings("topk", top_k=4, timeout=0.4, patience=0.5))
    before, start = resident(), time.monotonic()
    with pytest.raises(TeacherServerError, match="No teacher's server gave an answer"):
        teacher.signal(*inputs(), None)
    assert time.monotonic() - start < 10  # not the answer's hours
    assert resident() - before < 64 * 2**20
    teacher.close()


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_description_is_bounded_too(liar, lie):
    server = liar(lambda server, connection, path: lie(server, connection))
    with pytest.raises(ConfigurationError, match="does not answer"):
        RemoteTeacher(server.url, RemoteSettings("topk", timeout=0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_rows": "16"},
        {"vocab_rows": -1},
        {"vocab_rows": True},
        {"max_rows": 0},
        {"max_tokens": 1e300},
        {"max_answer_bytes": None},
        {"kinds": "topk"},
        {"kinds": ["topk", 7]},
        {"dtype": "load"},
        {"hidden_size": 1.5},
        {"teacher": "\x1b[2J"},
        {"teacher": "x" * 10**4},
        {"tokenizer": {"a": 1}},
        {"weights": None},
    ],
    ids=str,
)
def test_a_description_of_the_wrong_types_is_refused_by_name(liar, changes):
    server = liar(lambda server, connection, path: told(connection, json.dumps({**INFO, **changes}).encode()))
    with pytest.raises(ConfigurationError, match=f"tells no {next(iter(changes))} that makes sense"):
        RemoteTeacher(server.url, RemoteSettings("topk"))


@pytest.mark.parametrize("body", [b"[" * 10**5, b"9" * 5000, b'{"protocol": NaN}', b"\xff\xfe", b""], ids=len)
def test_a_description_that_is_hardly_json(liar, body):
    with pytest.raises(ConfigurationError):
        RemoteTeacher(liar(lambda server, connection, path: told(connection, body)).url, RemoteSettings("topk"))


def topk(**changes):
    """A good answer about two tokens, k = 2, unless changed."""
    logps = torch.tensor([[0.5, 0.25], [0.6, 0.3]]).log()
    tail = torch.tensor([0.25, 0.1]).log()
    return {"ids": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), "logps": logps, "tail": tail, **changes}


def drawn(**changes):
    """A good answer about two tokens, three draws each, unless changed."""
    ids, counts = torch.tensor([1, 2, 5], dtype=torch.int32), torch.tensor([1, 2, 3], dtype=torch.int16)
    lengths = torch.tensor([2, 1], dtype=torch.int16)
    return {"ids": ids, "logps": torch.tensor([-1.0, -2.0, -3.0]), "counts": counts, "lengths": lengths, **changes}


TOPK, DRAWN = Wanted("topk", top_k=2), Wanted("sampled", draws=3, seed=0)
HIDDEN, GIVEN, BYTES = Wanted("hidden"), Wanted("token_logprobs"), Wanted("next_bytes")
EVEN = torch.full((2, 258), -math.log(258))


@pytest.mark.parametrize(
    ("wanted", "answer", "words"),
    [
        (TOPK, topk(), None),
        (TOPK, topk(tail=torch.tensor([0.25, 0.1]).log().half()), None),
        (TOPK, topk(logps=torch.tensor([[1.0, 0.0], [0.9, 0.0]]).log(), tail=torch.tensor([0.0, 0.1]).log()), None),
        (DRAWN, drawn(), None),
        (GIVEN, {"logps": torch.tensor([0.0, -float("inf")])}, None),
        (HIDDEN, {"hidden": torch.zeros(2, 3)}, None),
        (BYTES, {"logps": torch.zeros(2), "buckets": EVEN.half()}, None),
        (BYTES, {"logps": torch.zeros(2), "buckets": EVEN[:, 1:]}, "shapes"),
        (BYTES, {"logps": torch.zeros(2), "buckets": EVEN - 1}, "add up to 1"),
        (BYTES, {"logps": torch.zeros(2), "buckets": torch.full((2, 258), float("nan"))}, "log-probabilities"),
        (BYTES, {"logps": torch.ones(2), "buckets": EVEN}, "log-probabilities"),
        (BYTES, {"logps": torch.zeros(2)}, "logps, expected buckets, logps"),
        (TOPK, topk(logps=torch.full((2, 2), float("nan"))), "log-probabilities"),
        (TOPK, topk(logps=torch.full((2, 2), float("inf"))), "log-probabilities"),
        (TOPK, topk(logps=torch.ones(2, 2)), "log-probabilities"),
        (TOPK, topk(tail=torch.tensor([0.5, 0.5])), "log-probabilities"),
        (TOPK, topk(tail=torch.zeros(2)), "add up to 1"),
        (TOPK, topk(logps=torch.full((2, 2), -9.0)), "add up to 1"),
        (TOPK, topk(ids=torch.tensor([[1, 1], [3, 4]])), "same id twice"),
        (TOPK, topk(ids=torch.tensor([[1, -2], [3, 4]])), "vocabulary of 16"),
        (TOPK, topk(ids=torch.tensor([[1.0, 2.0], [3.0, 4.0]])), "types"),
        (TOPK, topk(logps=torch.zeros(2, 2, dtype=torch.int8)), "types"),
        # What torch neither compares nor adds, and what would keep the others from being looked at.
        (TOPK, topk(ids=torch.tensor([[1, 2], [3, 4]]).to(torch.uint32)), "types"),
        (TOPK, topk(ids=torch.tensor([[1, 2], [3, 4]]).to(torch.complex64)), "types"),
        (TOPK, topk(ids=torch.tensor([[False, True], [True, False]])), "types"),
        (TOPK, topk(tail=torch.tensor([0.25, 0.1]).log().to(torch.float8_e4m3fn)), "types"),
        (DRAWN, drawn(lengths=torch.tensor([2, 1]).to(torch.uint16)), "types"),
        (
            TOPK,
            topk(ids=torch.tensor([[1, 1], [3, 4]]), hidden=torch.zeros(2, 3)),
            "hidden, ids, logps, tail, expected",
        ),
        (GIVEN, {}, "nothing, expected logps"),
        (DRAWN, drawn(counts=torch.tensor([1, 2, 4], dtype=torch.int16)), "3 draws"),
        (DRAWN, drawn(counts=torch.tensor([-1, 4, 3], dtype=torch.int16)), "3 draws"),
        (DRAWN, drawn(ids=torch.tensor([2, 2, 5])), "same id twice"),
        (DRAWN, drawn(logps=torch.tensor([-1.0, 2.0, -3.0])), "log-probabilities"),
        (DRAWN, drawn(lengths=torch.tensor([4, -1], dtype=torch.int16)), "shapes"),
        (GIVEN, {"logps": torch.tensor([0.1, -1.0])}, "log-probabilities"),
        (GIVEN, {"logps": torch.tensor([0, -1])}, "types"),
        (HIDDEN, {"hidden": torch.tensor([[0.0, 1.0, float("nan")], [0.0, 0.0, 0.0]])}, "finite"),
        (HIDDEN, {"hidden": torch.full((2, 3), float("inf"))}, "finite"),
    ],
)
def test_answers_are_checked_where_they_arrive(wanted, answer, words):
    problem = problem_of(answer, 2, wanted, {"hidden_size": 3, "vocab_rows": 16}, 16)
    assert problem is None if words is None else words in problem


@pytest.mark.parametrize(
    "place",
    [
        {"99999999999": -0.7, "3": -0.7},
        {"-1": -0.7, "3": -0.7},
        {"2": -(10**400), "3": -0.1},
        {"2": "x", "3": 0},
        5,
        [],
    ],
    ids=str,
)
def test_prompt_logprobs_of_ids_or_numbers_that_cannot_be_are_nonsense(place):
    told = {i: {"logprob": value} for i, value in place.items()} if isinstance(place, dict) else place
    places = [[None, {"1": {"logprob": -1.0}}], [None, told, told]]  # the first is asked for at once, as a trial
    choices = [{"index": 0, "prompt_logprobs": None}]
    answers = {"/v1/models": {"data": [{"id": "m"}]}, "/v1/completions": {"choices": choices}}

    def answer(path, *_):
        if path == "/v1/completions":
            choices[0]["prompt_logprobs"] = places.pop(0)
        return answers[path]

    endpoint = SimpleNamespace(url="http://x", json=answer)
    dialect = openai.OpenAIDialect(endpoint, RemoteSettings(kind="topk", top_k=2))
    with pytest.raises(endpoints.Again, match="nonsense"):
        dialect.ask(Question(TOPK, "t", [(np.array([1, 2, 3]), np.array([0, 1]))]), endpoint)


@pytest.mark.parametrize("told", [5, "ab", {"a": 1, "b": 2}, None])
def test_an_openai_server_whose_prompt_logprobs_are_no_list_is_refused(told):
    answers = {"/v1/models": {"data": [{"id": "m"}]}, "/v1/completions": {"choices": [{"index": 0}]}}
    answers["/v1/completions"]["choices"][0]["prompt_logprobs"] = told
    endpoint = SimpleNamespace(url="http://x", json=lambda path, *args: answers[path])
    with pytest.raises(ConfigurationError, match="gives no `prompt_logprobs`"):
        openai.OpenAIDialect(endpoint, RemoteSettings(kind="topk", top_k=2))


@pytest.mark.parametrize("theirs", [5, None, {"a": 1}, "ab"])
def test_an_openai_server_whose_tokens_are_no_ids_has_another_tokenizer(theirs, tokenizer):
    choices = [{"index": 0, "prompt_logprobs": [None, {"1": {"logprob": -1.0}}]}]
    answers = {"/v1/models": {"data": [{"id": "m"}]}, "/v1/completions": {"choices": choices}}
    endpoint = SimpleNamespace(url="http://x", json=lambda path, *_: {**answers, "/tokenize": {"tokens": theirs}}[path])
    dialect = openai.OpenAIDialect(endpoint, RemoteSettings(kind="topk", top_k=2))
    with pytest.raises(ConfigurationError, match="splits text into other ids"):
        dialect.compare_tokenizer(endpoint, tokenizer)


def test_a_server_s_nonsense_ends_the_run_with_its_reason(liar):
    arrays = {"ids": torch.zeros(21, 4, dtype=torch.int32), "logps": torch.ones(21, 4), "tail": torch.zeros(21)}
    body = pack(arrays, {"weights": INFO["weights"]})
    server = liar(_signal_only(lambda server, connection: told(connection, body)))
    teacher = RemoteTeacher(server.url, RemoteSettings("topk", top_k=4, timeout=5.0))
    with pytest.raises(TeacherServerError, match="log-probabilities are above 0"):
        teacher.signal(*inputs(), None)
    teacher.close()


def test_what_a_server_says_does_not_move_a_terminal_s_cursor(liar):
    def refuse(server, connection, path):
        body = b"\x1b[2J\x07 go away \r\n\x00\x9b!"
        connection.sendall(f"HTTP/1.1 403 No\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    with pytest.raises(ConfigurationError) as caught:
        RemoteTeacher(liar(refuse).url)
    assert "go away" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "weights", ["\x1b[2J" + "x" * 10**4, "\ud800", ["\x1b[2J"] * 1000, {"a\x07": 10**100}], ids=type
)
def test_nor_does_what_it_says_of_its_weights(liar, weights):
    body = pack({"logps": torch.zeros(21)}, {"weights": weights})
    server = liar(_signal_only(lambda server, connection: told(connection, body)))
    # The liar answers before it has read all: now and then its connection is reset, and is asked again.
    teacher = RemoteTeacher(server.url, RemoteSettings("topk", top_k=4, timeout=5.0, patience=5.0))
    with pytest.raises(TeacherServerError, match="serves other weights than 'tiny'") as caught:
        teacher.signal(*inputs(), None)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    teacher.close()


def test_nor_do_the_names_of_its_arrays(liar):
    body = pack({"\x1b[2J\x7f": torch.zeros(1), "y" * 10**4: torch.zeros(1)}, {"weights": INFO["weights"]})
    server = liar(_signal_only(lambda server, connection: told(connection, body)))
    teacher = RemoteTeacher(server.url, RemoteSettings("topk", top_k=4, timeout=5.0, patience=0.0))
    with pytest.raises(TeacherServerError, match="nonsense") as caught:
        teacher.signal(*inputs(), None)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800
    teacher.close()


# ---- SIGTERM while a server is silent -------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_run_that_is_asked_to_end_does_not_wait_for_a_silent_server(make_trainer, serve, monkeypatch, lmbda):
    """It computes for ever: what a stopped process, or a lost machine, looks like from here."""
    served, hold = serve(), threading.Event()
    real = served.service._forward
    trainer = make_trainer(teacher=served.url, lmbda=lmbda, max_steps=5, gradient_accumulation_steps=2)
    trainer.add_callback(InterruptCallback(trainer.teacher, trainer.accelerator))
    asked = []

    def stalled(rows):
        if trainer.state.global_step >= 1:
            if not asked:
                asked.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
            hold.wait(60)
        real(rows)

    monkeypatch.setattr(served.service, "_forward", stalled)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(TeacherServerError, match="last step is kept in .*checkpoint-1"):
            trainer.train()
        assert time.monotonic() - asked[0] < endpoints._GRACE + 10
    finally:
        hold.set()
        signal.signal(signal.SIGTERM, before)


def test_an_answer_on_its_way_is_still_taken_when_a_run_is_asked_to_end(serve):
    served = serve()
    teacher = RemoteTeacher(served.url)
    teacher.stop_waiting()
    assert teacher.signal(*inputs(), None).hidden.shape[0] == 21
    teacher.close()


# ---- Strangers ------------------------------------------------------------------------------------------------------


def talk(served, text):
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(text)
    return connection


STRANGERS = {
    "silent": b"",
    "head": b"GET /v1/info HTTP/1.1\r\nX-Slow: ",
    "body of a page without": b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx",
    "question": b"POST /v1/signal HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx",
    "wrong path": b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx",
}


@pytest.mark.parametrize("text", STRANGERS.values(), ids=STRANGERS)
def test_strangers_take_no_places_of_those_with_the_token(serve, text, wait_until):
    """More of them than the server has places, none of which ever ends its request, and more that come."""
    served = serve(token="s3cret", max_queue=64, slow_timeout=30.0)
    crowd = [talk(served, text) for _ in range(300)]
    time.sleep(1.2)
    crowd += [talk(served, text) for _ in range(20)]
    teacher = RemoteTeacher(served.url, token="s3cret")
    for _ in range(3):
        assert teacher.signal(*inputs(), None).hidden.shape[0] == 21
    crowd += [talk(served, text) for _ in range(100)]
    assert teacher.signal(*inputs(), None).hidden.shape[0] == 21
    teacher.close()
    for connection in crowd:
        connection.close()
    wait_until(lambda: not served.server.server_state.connections)


def test_an_answer_before_its_request_s_body_ends_the_connection(serve):
    served = serve(slow_timeout=30.0)
    for text in (STRANGERS["body of a page without"], STRANGERS["wrong path"]):
        start, connection = time.monotonic(), talk(served, text)
        while connection.recv(65536):
            pass
        assert time.monotonic() - start < 10
        connection.close()


HOSTS = {"127.0.0.1:80": 200, "localhost": 200, "[::1]:8123": 200, "evil.example": 421, "": 421, "[localhost": 421}
HOSTS |= {"127.0.0.1.evil.example:80": 421, "localhost@evil.example": 421}


@pytest.mark.parametrize("path", ["/health", "/v1/info", "/v1/head"])
def test_a_name_of_somebody_else_s_does_not_lead_here(serve, path):
    served = serve()
    for host, status in HOSTS.items():
        connection = talk(served, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert int(connection.makefile("rb").readline().split()[1]) == status, host
        connection.close()


def test_with_a_token_any_name_will_do(serve):
    served = serve(token="s3cret")
    text = (
        b"GET /v1/info HTTP/1.1\r\nHost: teacher.example\r\nAuthorization: Bearer s3cret\r\nConnection: close\r\n\r\n"
    )
    assert b"200 OK" in talk(served, text).makefile("rb").readline()


def test_draws_are_counted_exactly():
    from distill_trainers.signals import TokenLogits

    generator = torch.Generator().manual_seed(0)
    told = TokenLogits(torch.from_numpy(np.random.default_rng(0).normal(size=(4, 16))).float()).sample(20000, generator)
    counts = told.weights.double() * 20000
    assert torch.equal(counts.round().sum(-1), torch.full((4,), 20000.0, dtype=torch.float64))
    torch.testing.assert_close(counts, counts.round(), atol=2e-3, rtol=0)


def test_what_is_half_asked_is_bounded(serve, wait_until):
    """All who have the token together: 600 connections of 16 MiB each would be 10 GiB."""
    served = serve(token="s3cret", max_body_mib=1.0, max_held_mib=1.5)
    head = b"POST /v1/signal HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer s3cret\r\nContent-Length: 943718\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), 20) as first:
        first.sendall(head + bytes(900_000))
        wait_until(lambda: served.service._held[0] == 900_000)
        with socket.create_connection(("127.0.0.1", served.port), 20) as second:
            second.sendall(head + bytes(700_000))
            said = second.recv(65536)
            assert said.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in said.lower()
        wait_until(lambda: served.service._held[0] == 900_000)  # what was refused is let go after the answer
    wait_until(lambda: served.service._held[0] == 0)
    with socket.create_connection(("127.0.0.1", served.port), 20) as third:
        third.sendall(head + bytes(943_718))
        assert third.recv(65536).startswith(b"HTTP/1.1 400")  # read to its end, and no question
    wait_until(lambda: served.service._held[0] == 0)


def test_answers_count_until_they_are_taken(serve, wait_until):
    served = serve()
    teacher = RemoteTeacher(served.url, RemoteSettings("topk", top_k=4))
    teacher.signal(*inputs(), 14)
    wait_until(lambda: served.service._held[0] == 0)


@pytest.mark.parametrize("address", ["http://192.0.2.1:8000", "https://gpu.example", "http://127.0.0.1:9,http://a:1"])
def test_the_token_goes_only_where_the_environment_says(make_trainer, monkeypatch, address):
    """A recipe names the address, and must not thereby get the token; 192.0.2.1 is nobody's."""
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "s3cret")
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match="DISTILL_TEACHER_TOKEN_FOR=http") as raised:
        make_trainer(teacher=address)
    assert "s3cret" not in str(raised.value) and time.monotonic() - started < 10
