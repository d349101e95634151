"""Servers that answer anything, and strangers that send anything: each side stays whole, and says what it got.

Answers are right ones, harmed: in their framing, their head, their arrays, or their JSON. A plausible number that is
wrong cannot be told from a right one, so numbers are changed only to what no model can say.
"""

import concurrent.futures as futures
import json
import math
import random
import socket
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill_trainers.exceptions import ConfigurationError, TeacherServerError
from distill_trainers.servers import endpoints
from distill_trainers.servers.openai import OpenAIServer
from distill_trainers.teachers import RemoteTeacher
from distill_trainers.teachers.remote import RemoteSettings, openai
from distill_trainers.teachers.remote.wire import Question, Wanted, pack, pack_question

pytest.importorskip("fastapi", reason="fastapi is not installed")
TOKENS, K, VOCABULARY = 21, 4, 16
DEADLINE = 5.0


def right_answer():
    """Of a top-k teacher about all 21 tokens."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(TOKENS, VOCABULARY, generator=generator).log_softmax(-1)
    top = logps.topk(K)
    tail = torch.log1p(-top.values.exp().sum(-1))
    return {"ids": top.indices.int(), "logps": top.values, "tail": tail}


def harmed_arrays(chance):
    """Arrays that cannot be an answer."""
    arrays = right_answer()
    name = chance.choice(["logps", "tail", "ids"])
    values = arrays[name].clone()
    place = tuple(chance.randrange(size) for size in values.shape)
    way = chance.choice(["number", "dtype", "shape", "missing", "more", "empty", "twice"])
    if way == "number":
        values[place] = (
            chance.choice([2**31 - 1, -1, 99]) if name == "ids" else chance.choice([math.nan, math.inf, 7.0])
        )
    elif way == "dtype":
        others = (
            [torch.int8, torch.bool, torch.complex64] if name != "ids" else [torch.float32, torch.bool, torch.uint32]
        )
        values = values.to(chance.choice(others))
    elif way == "shape":
        values = chance.choice([values[:-1], values.T.contiguous(), values.unsqueeze(0), values.flatten()[:5]])
        values = values if values.shape != arrays[name].shape else values[:-1]
    elif way == "empty":
        values = values[:0]
    elif way == "twice":
        name, values = "ids", torch.ones_like(arrays["ids"])
    arrays[name] = values
    if way == "missing":
        del arrays[name]
    elif way == "more":
        arrays[chance.choice(["hidden", "counts", "x" * 100])] = torch.zeros(3)
    return arrays


def any_json(chance, depth=0):
    """A value of JSON, or of what Python takes for it."""
    plain = [None, True, 0, -1, 10**400, 1e308, math.nan, -math.inf, "", "x" * 5000, "\ud800", "\x1b[2J", [], {}]
    kind = chance.randrange(10)
    if kind < 7 or depth > 3:
        return chance.choice(plain)
    inner = [any_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    return inner if kind < 9 else {chance.choice(["0", "1", "99999999999", "a", ""]): value for value in inner}


def harmed_json(value, chance):
    """The same JSON with one place of it changed, taken out, doubled, or put elsewhere."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = chance.choice(list(places))
        changed = value.copy()
        way = chance.randrange(4)
        if way:
            changed[place] = harmed_json(value[place], chance)
        elif isinstance(value, list):
            changed = chance.choice([value + value[place : place + 1], value[:place] + value[place + 1 :]])
        else:
            del changed[place]
        return changed
    return any_json(chance)


def http(status, body, *headers, length=None):
    length = len(body) if length is None else length
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {length}", *headers]
    return "\r\n".join(head).encode("utf-8", "replace") + b"\r\n\r\n" + body


def chunked(body, chance):
    """The body in chunks, one of which is no chunk."""
    pieces, bad = [body[i : i + 200] for i in range(0, len(body), 200)], None
    bad = chance.randrange(len(pieces))
    sizes = [b"%x" % len(piece) for piece in pieces]
    sizes[bad] = chance.choice(
        [b"zz", b"-5", b"ffffffffffffffff", b"", b"5;" + b"x" * 9000, b"%x" % (len(pieces[bad]) + 3)]
    )
    text = b"".join(size + b"\r\n" + piece + b"\r\n" for size, piece in zip(sizes, pieces, strict=True))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + text + b"0\r\n\r\n"


def harmed_answer(chance, facts):
    """Bytes of an answer over HTTP with something wrong."""
    body = pack(right_answer(), facts)
    way = chance.choice(["arrays", "cut", "length", "chunked", "status", "json", "noise", "head", "facts", "header"])
    if way == "arrays":
        return http(200, pack(harmed_arrays(chance), facts))
    if way == "cut":  # the connection ends too early, or the message does
        kept = chance.randrange(len(body))
        return http(200, body[:kept], length=chance.choice([len(body), kept]))
    if way == "length":
        return http(200, body, length=chance.choice([-1, "x", 10**15, "1, 2", len(body) // 2, 2**64, "0x10", ""]))
    if way == "chunked":
        return chunked(body, chance)
    if way == "status":
        text = json.dumps(any_json(chance)).encode() if chance.random() < 0.5 else chance.randbytes(200)
        again = ["Retry-After: " + chance.choice(["nan", "-5", "1e9", "soon", "0"])]
        return http(chance.choice([100, 204, 301, 400, 404, 418, 500, 503, 599, 999]), text, *again)
    if way == "json":
        return http(200, json.dumps(any_json(chance)).encode(), "Content-Type: application/json")
    if way == "noise":
        return chance.randbytes(chance.randrange(300))
    if way == "head":
        bad = [
            "X: " + "y" * 10**5,
            "Content-Encoding: gzip",
            "Transfer-Encoding: gzip, chunked",
            "no colon",
            ": x",
            "Content-Length: 7",
        ]
        return http(200, body, chance.choice(bad))
    if way == "facts":
        return http(200, pack(right_answer(), {"weights": any_json(chance)}))
    size = int.from_bytes(body[:8], "little")  # the header of safetensors, not its numbers
    place = chance.randrange(8 + size)
    return http(200, body[:place] + bytes([body[place] ^ (1 << chance.randrange(8))]) + body[place + 1 :])


class Answers:
    """A server that is honest about itself and gives each question the next of some answers."""

    def __init__(self, hostile, info, answers):
        self.answers, self.lock, self.hostile, self.info = iter(answers), threading.Lock(), hostile, info
        self.liar = hostile.Liar(self.tell)

    def tell(self, server, connection, path):
        if path == "/v1/info":
            return self.hostile.told(connection, json.dumps(self.info).encode())
        with self.lock:
            answer = next(self.answers)
        connection.sendall(answer)


def ask(teacher, hostile):
    """`refused`, the answer, or what is wrong, in words."""
    start = time.monotonic()
    try:
        signal = teacher.signal(*hostile.inputs(), None)
    except (TeacherServerError, ConfigurationError) as error:
        shown = str(error)
        if not shown.isprintable() or len(shown) > 2000:
            return f"an error that is no sentence: {shown[:300]!r}"
        return "refused" if time.monotonic() - start < DEADLINE else f"{time.monotonic() - start:.1f} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return signal


def run_answers(hostile, ledger, chance, count):
    info = {**hostile.INFO, "vocab_rows": VOCABULARY}
    answers = [harmed_answer(random.Random(chance.random()), {"weights": info["weights"]}) for _ in range(count)]
    right = Answers(hostile, info, [http(200, pack(right_answer(), {"weights": info["weights"]}))])
    settings = RemoteSettings("topk", top_k=K, timeout=0.5, patience=0.0)
    teacher = RemoteTeacher(right.liar.url, settings)
    expected = teacher.signal(*hostile.inputs(), None)
    teacher.close()
    right.liar.close()
    wrong = []

    def one(answer):
        server = Answers(hostile, info, [answer])
        teacher = RemoteTeacher(server.liar.url, settings)
        try:
            return answer, ask(teacher, hostile)
        finally:
            teacher.close()
            server.liar.close()

    with futures.ThreadPoolExecutor(8) as threads:
        for answer, got in threads.map(one, answers):
            if got == "refused":
                ledger("server's answer", "refused")
            elif isinstance(got, str):
                wrong.append(f"{got} after {answer[:300]!r}")
            else:
                same = all(
                    torch.equal(getattr(got, name), getattr(expected, name)) for name in ("ids", "logps", "tail")
                )
                ledger("server's answer", "survived" if same else "silent")
                if not same:
                    wrong.append(f"accepted: {answer[:300]!r}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_taste_of_harmed_answers(remote_tests, ledger, chance):
    run_answers(remote_tests.hostile, ledger, chance, 30)


@pytest.mark.slow
def test_harmed_answers(remote_tests, ledger, chance):
    run_answers(remote_tests.hostile, ledger, chance, 200)


def test_harmed_descriptions(remote_tests, ledger, chance):
    """What a server says of itself, changed in one place: refused in a sentence, or a teacher that makes sense."""
    hostile, wrong = remote_tests.hostile, []
    told = []
    server = hostile.Liar(lambda server, connection, path: hostile.told(connection, told[-1]))
    for _ in range(60):
        changed = harmed_json(hostile.INFO, chance)
        told.append(json.dumps(changed).encode("utf-8", "replace"))
        try:
            teacher = RemoteTeacher(server.url, RemoteSettings("topk", top_k=K, timeout=0.5, patience=0.0))
        except (ConfigurationError, TeacherServerError) as error:
            ledger("server's description", "refused")
            wrong += [] if str(error).isprintable() else [f"{str(error)[:300]!r} of {changed}"]
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error} of {changed}")
        else:
            teacher.close()
            same_kinds = isinstance(changed, dict) and all(
                type(changed.get(name)) is type(value) or changed.get(name) is None or value is None
                for name, value in hostile.INFO.items()
                if name != "version"  # it is only shown
            )
            ledger("server's description", "survived" if same_kinds else "silent")
            wrong += [] if same_kinds else [f"accepted: {changed}"]
    server.close()
    assert not wrong, "\n" + "\n".join(wrong)


def test_harmed_answers_of_openai_s_kind(ledger, chance):
    """JSON as vLLM gives it, changed in one place."""
    place = {str(i): {"logprob": -0.5 - i, "rank": i + 1} for i in range(4)}
    right = {"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, place, place, place]}]}
    question = Question(Wanted("topk", top_k=2), "t", [(np.array([1, 2, 3, 1]), np.array([0, 1, 2]))])
    dialect = openai.OpenAIDialect.__new__(openai.OpenAIDialect)
    dialect.server = OpenAIServer.__new__(OpenAIServer)
    dialect.server.model, wrong = "m", []

    def ask_with(answer):
        return dialect.ask(question, SimpleNamespace(url="http://x", json=lambda *args: answer))

    expected = ask_with(right)
    for _ in range(300):
        changed = harmed_json(right, chance)
        try:
            answer = ask_with(changed)
        except (endpoints.Again, ConfigurationError, TeacherServerError):
            ledger("OpenAI-like answer", "refused")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error} of {str(changed)[:400]}")
        else:
            sound = answer["logps"].shape == (3, 2) and bool((answer["logps"] <= 1e-3).all())
            same = all(torch.equal(answer[name], expected[name]) for name in expected)
            ledger("OpenAI-like answer", "survived" if same or sound else "silent")
    assert not wrong, "\n" + "\n".join(wrong)


# ---- Strangers to our server ----------------------------------------------------------------------------------------


def harmed_request(chance, tokenizer):
    """Bytes that a stranger sends."""
    ids = np.arange(8) % 12 + 2
    body = pack_question(Question(Wanted("hidden", vocab_size=None), tokenizer, [(ids, np.arange(7))]))
    head = b"POST /v1/signal HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    way = chance.choice(
        ["noise", "cut", "flip", "length", "heads", "line", "chunked", "verb", "long", "facts", "pipeline"]
    )
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if way == "noise":
        return chance.randbytes(chance.randrange(2000))
    if way == "cut":
        return whole[: chance.randrange(len(whole))]
    if way == "flip":
        place = chance.randrange(len(whole))
        return whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :]
    if way == "length":
        told = chance.choice([b"-1", b"x", b"%d" % 10**18, b"1, 2", b"", b"0", b"%d" % (len(body) // 2)])
        return head + b"Content-Length: " + told + b"\r\n\r\n" + body
    if way == "heads":
        return head + b"".join(b"X-%d: y\r\n" % i for i in range(chance.randrange(3000))) + b"\r\n" + body
    if way == "line":
        return b"GET /" + b"x" * chance.randrange(10**6) + b" HTTP/1.1\r\n\r\n"
    if way == "chunked":
        bad = chance.choice([b"zz", b"-5", b"f" * 40, b"5;" + b"x" * 9000, b"10"])
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + bad + b"\r\n" + body
    if way == "verb":
        verb, path = (
            chance.choice(["PUT", "OPTIONS", "TRACE", "\x00", "PRI", "get"]),
            chance.choice(["*", "/", "/v1/head", "//x", "/%00"]),
        )
        return f"{verb} {path} HTTP/{chance.choice(['1.1', '9.9', '2.0', '1'])}\r\nHost: localhost\r\n\r\n".encode()
    if way == "long":
        return head + b"X: " + b"y" * chance.randrange(10**6) + b"\r\n\r\n"
    if way == "facts":
        size = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + size])
        said = json.loads(header["__metadata__"]["said"])
        header["__metadata__"]["said"] = json.dumps(harmed_json(said, chance))
        text = json.dumps(header).encode()
        changed = struct.pack("<Q", len(text)) + text + body[8 + size :]
        return head + b"Content-Length: %d\r\n\r\n" % len(changed) + changed
    return whole * 3 + chance.randbytes(50)


def send(served, request):
    """Send it and read until the server is done with it; seconds."""
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except TimeoutError:
            return DEADLINE
        except OSError:  # the server has closed: so it may
            pass
    return time.monotonic() - start


def run_requests(remote_tests, teacher_model, tokenizer, ledger, chance, count):
    served = remote_tests.Served(teacher_model, tokenizer, slow_timeout=1.0)
    honest = RemoteTeacher(served.url, RemoteSettings(timeout=20.0))
    try:
        expected = honest.signal(*remote_tests.hostile.inputs(), None).hidden
        fingerprint = json.loads(fetch(served, "/v1/info"))["tokenizer"]
        requests = [harmed_request(random.Random(chance.random()), fingerprint) for _ in range(count)]
        for start in range(0, count, 25):
            batch = requests[start : start + 25]
            with futures.ThreadPoolExecutor(8) as threads:
                late = [
                    request[:200]
                    for request, seconds in zip(batch, threads.map(lambda r: send(served, r), batch), strict=True)
                    if seconds >= DEADLINE
                ]
            assert not late, late
            assert torch.equal(honest.signal(*remote_tests.hostile.inputs(), None).hidden, expected)
            ledger("stranger's request", "held", len(batch))
        assert fetch(served, "/health")
    finally:
        honest.close()
        served.stop()


def fetch(served, path):
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        text = connection.makefile("rb").read()
    assert text.startswith(b"HTTP/1.1 200"), text[:300]
    return text.partition(b"\r\n\r\n")[2]


def test_a_taste_of_harmed_requests(remote_tests, make_teacher, tokenizer, ledger, chance):
    run_requests(remote_tests, make_teacher(), tokenizer, ledger, chance, 50)


@pytest.mark.slow
def test_harmed_requests(remote_tests, make_teacher, tokenizer, ledger, chance):
    run_requests(remote_tests, make_teacher(), tokenizer, ledger, chance, 200)
