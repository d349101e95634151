"""An endpoint over real HTTP on loopback: one that works, and ones that misbehave on purpose."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai", reason="the openai client is not installed")

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rationales.endpoint_model import EndpointSettings, RemoteTextModel
from distill_trainers.rationales.stages import extract
from distill_trainers.storage import RecordStore

QUESTIONS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(12)]


def answer(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Server:
    """Serves chat completions; `misbehave(question, attempt)` may name a fault."""

    def __init__(self, misbehave=lambda question, attempt: None, delay=0.0):
        self.attempts: dict[str, int] = {}
        self.times: list[float] = []
        self.running = self.most = 0
        self.keys: set[str] = set()
        self.elsewhere: str | None = None
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    server.attempts[question] = attempt = server.attempts.get(question, 0) + 1
                    server.times.append(time.monotonic())
                    server.keys.add(self.headers.get("Authorization", ""))
                    server.headers.append(dict(self.headers))
                    server.bodies.append(body)
                    server.running += 1
                    server.most = max(server.most, server.running)
                time.sleep(delay)
                with contextlib.suppress(OSError):
                    self._respond(misbehave(question, attempt), question)
                with lock:
                    server.running -= 1

            def _respond(self, fault, question):
                number = int(question.split()[2])
                text = f"{number} and {number} make {2 * number}. The answer is {2 * number}."
                whole = json.dumps(answer(text)).encode()
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Retry-After", "0.05")
                    if server.elsewhere:
                        self.send_header("Location", server.elsewhere)
                    self.end_headers()
                    self.wfile.write(b'{"error": {"message": "no"}}')
                elif fault == "hang":
                    time.sleep(3)
                elif fault == "close":
                    self.connection.close()
                else:
                    bodies = {
                        "empty": json.dumps(answer("  ")).encode(),
                        "cut": json.dumps(answer("12 and", "length")).encode(),
                        "half": whole[: len(whole) // 2],
                        "garbage": b"<html>busy</html>",
                        "no choices": b'{"id": "x", "object": "chat.completion", "choices": []}',
                    }
                    body = bodies.get(fault, whole)
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(whole if fault == "half" else body)))
                    self.end_headers()
                    self.wfile.write(body)
                    if fault == "half":
                        self.connection.close()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def make(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def remote(server, fault=None, **settings):
    """A question is given up soon only where the server does not answer at all: a busy machine may be slow."""
    quick = {"timeout": 1.0 if fault == "hang" else 30.0, "max_retries": 3, "first_wait": 0.01, "concurrency": 4}
    return RemoteTextModel(EndpointSettings("m", server.url, **{**quick, **settings}))


def test_every_question_is_answered_once(serve, tmp_path, monkeypatch):
    server = serve(delay=0.05)
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.setenv("MY_KEY_FOR", server.url)
    model = remote(server, temperature=0.3, api_key_env="MY_KEY")
    rows, asked = extract(QUESTIONS, model, RecordStore(tmp_path))
    assert [row["question"] for row in rows] == [row["question"] for row in QUESTIONS]
    assert all(f"The answer is {row['answer']}." in row["response"] for row in rows)
    assert set(server.attempts.values()) == {1}
    assert (asked.done, asked.prompt_tokens, asked.completion_tokens) == (12, 120, 60)
    assert 1 < server.most <= 4
    assert server.keys == {"Bearer secret"} and server.bodies[0]["temperature"] == 0.3
    assert rows[0]["provenance"]["teacher"] == "m" and rows[0]["provenance"]["prompt"] == "cot 1"
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("*"))


FAULTS = ["hang", "close", "empty", "cut", "half", "garbage", "no choices", 429, 500, 503]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_passes_is_tried_again(serve, tmp_path, fault):
    server = serve(lambda question, attempt: fault if question.split()[2] == "7" and attempt == 1 else None)
    rows, asked = extract(QUESTIONS, remote(server, fault), RecordStore(tmp_path))
    assert len(rows) == asked.done == 12 and not asked.failed
    assert server.attempts["What is 7 + 7?"] == 2 and sum(server.attempts.values()) == 13


ERRORS = {
    "hang": "time-out",
    "close": "no connection",
    "empty": "empty answer",
    "cut": "cut-off answer",
    "garbage": "malformed answer",
    "no choices": "malformed answer",
    500: "status 500",
    400: "status 400",
}


@pytest.mark.parametrize("fault", ERRORS, ids=str)
def test_what_stays_costs_its_items_only_and_the_next_run_asks_for_them(serve, tmp_path, fault):
    bad = {"3", "7"}
    server = serve(lambda question, attempt: fault if question.split()[2] in bad else None)
    how = {"max_retries": 1, "fault": fault}
    rows, asked = extract(QUESTIONS, remote(server, **how), RecordStore(tmp_path))
    assert len(rows) == 10 and dict(asked.failed) == {ERRORS[fault]: 2}
    tries = 1 if fault == 400 else 2  # a request that is wrong does not become right
    assert server.attempts["What is 3 + 3?"] == tries
    before = dict(server.attempts)
    bad.clear()
    rows, asked = extract(QUESTIONS, remote(server, **how), RecordStore(tmp_path))
    assert len(rows) == 12 and (asked.done, asked.known) == (2, 10)
    again = {question for question, count in server.attempts.items() if count > before[question]}
    assert again == {"What is 3 + 3?", "What is 7 + 7?"}


def test_killed_half_way_and_resumed_it_loses_and_repeats_nothing(serve, tmp_path):
    server = serve()

    def killed(items, total, what):
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        extract(QUESTIONS, remote(server, concurrency=1), RecordStore(tmp_path), progress=killed)
    part = tmp_path / "part-00000.jsonl"
    assert len(part.read_text().splitlines()) == 5
    part.write_text(part.read_text() + '{"key": "torn", "respo')  # as a kill in the midst of a line leaves it
    kept = set(RecordStore(tmp_path).load())
    before = dict(server.attempts)
    rows, asked = extract(QUESTIONS, remote(server), RecordStore(tmp_path))
    assert len(rows) == 12 and len({row["key"] for row in rows}) == 12
    assert asked.known == 5 and asked.done == 7 and kept <= {row["key"] for row in rows}
    finished = {row["question"] for row in RecordStore(tmp_path).load().values() if row["key"] in kept}
    assert all(server.attempts[question] == before[question] for question in finished)
    rows, asked = extract(QUESTIONS, remote(server), RecordStore(tmp_path))
    assert asked.done == 0 and len(rows) == 12


def test_other_settings_are_other_answers(serve, tmp_path):
    server = serve()
    extract(QUESTIONS, remote(server), RecordStore(tmp_path))
    _, asked = extract(QUESTIONS, remote(server, temperature=0.1), RecordStore(tmp_path))
    assert asked.done == 12 and asked.known == 0


def test_samples_are_asked_for_apart(serve, tmp_path):
    rows, asked = extract(QUESTIONS[:3], remote(serve()), RecordStore(tmp_path), samples=4)
    assert asked.done == 12 and sorted(row["provenance"]["sample"] for row in rows) == sorted([0, 1, 2, 3] * 3)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_everything_stops_at_once(serve, tmp_path, status):
    server = serve(lambda question, attempt: status)
    with pytest.raises(ConfigurationError, match=r"base_url.*OPENAI_API_KEY"):
        extract(QUESTIONS, remote(server), RecordStore(tmp_path))
    assert sum(server.attempts.values()) <= 8  # those in flight


def test_an_endpoint_that_answers_nobody_is_given_up(serve, tmp_path):
    many = [{"question": f"What is {n} + 0?"} for n in range(200)]
    server = serve(lambda question, attempt: 500)
    with pytest.raises(ConfigurationError, match="None of the first 20"):
        extract(many, remote(server, max_retries=0), RecordStore(tmp_path))
    assert len(server.attempts) < 40


def test_rate_limit(serve, tmp_path):
    server = serve()
    extract(QUESTIONS[:6], remote(server, requests_per_minute=1200), RecordStore(tmp_path))  # one in 50 ms
    times = sorted(server.times)
    assert times[-1] - times[0] >= 0.2


def test_the_budget_is_kept(serve, tmp_path):
    model = remote(serve(), concurrency=1, price_in=100.0, price_out=200.0, max_cost=0.005)  # 0.002 a request
    rows, asked = extract(QUESTIONS, model, RecordStore(tmp_path))
    assert 3 <= len(rows) <= 5 and asked.failed == {"budget spent": 12 - len(rows)}
    assert model.spent == pytest.approx(0.002 * len(rows))


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_KEY"])
def test_a_secret_is_sent_only_where_the_environment_says(serve, monkeypatch, name):
    server = serve()
    monkeypatch.setenv(name, "s3cret")
    for elsewhere in (None, "https://elsewhere.example", server.url.replace("http:", "https:"), "http://127.0.0.1:1"):
        if elsewhere is not None:
            monkeypatch.setenv(f"{name}_FOR", elsewhere)
        with pytest.raises(
            ConfigurationError, match=rf"{name} was to be sent to http://127.*{name}_FOR=http"
        ) as raised:
            remote(server, api_key_env=name)
        assert "s3cret" not in str(raised.value)
    monkeypatch.setenv(f"{name}_FOR", f"https://elsewhere.example, {server.url}")
    assert remote(server, api_key_env=name)._client.api_key == "s3cret"
    assert not server.headers


def test_the_key_of_openai_goes_to_openai(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.example")
    for base_url in (None, "https://api.openai.com/v1"):
        model = RemoteTextModel(EndpointSettings("m", base_url, api_key_env="OPENAI_API_KEY"))
        assert model._client.base_url.host == "api.openai.com" and model._client.api_key == "s3cret"
    with pytest.raises(ConfigurationError, match="http://api.openai.com:80"):
        RemoteTextModel(EndpointSettings("m", "http://api.openai.com/v1", api_key_env="OPENAI_API_KEY"))


def test_another_endpoint_gets_nothing_that_is_openai_s(serve, tmp_path, monkeypatch):
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", f"s3cret-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: s3cret")
    server = serve()
    _, asked = extract(QUESTIONS, remote(server), RecordStore(tmp_path))
    assert asked.done == 12 and server.keys == {"Bearer none"}
    assert "s3cret" not in str(server.headers)


@pytest.mark.parametrize("status", [302, 307, 308])
def test_prompts_do_not_follow_a_redirect(serve, tmp_path, status):
    server, other = serve(lambda question, attempt: status), serve()
    server.elsewhere = f"{other.url}/chat/completions"
    _, asked = extract(QUESTIONS, remote(server), RecordStore(tmp_path))
    assert asked.done == 0 and asked.failed == {f"status {status}": 12}
    assert not other.bodies


def test_openai_itself_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        RemoteTextModel(EndpointSettings("m"))
