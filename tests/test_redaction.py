"""What counts as a secret, by name and by shape, and what does not."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import time
from pathlib import Path

import pytest

from distill_trainers import GKDConfig, MiniLLMConfig
from distill_trainers.exceptions import BAD_INPUT, FAILURES, ConfigurationError, TeacherServerError
from distill_trainers.redaction import NOT_SHOWN, Redacting, hidden, is_secret, redacted, without_secrets
from distill_trainers.run_files import shown
from distill_trainers.settings import require
from distill_trainers.teachers.cache.identity import CacheIdentity, answering_settings, refuse_differences

CORE = "Zq7SecretCore7x9"
SECRETS = [
    f"hf_{CORE}AbCd",
    f"sk-proj-{CORE}0123",
    f"ghp_{CORE}0123",
    f"github_pat_{CORE}_x",
    "AKIAZQ7SECRETCORE7X9",
    f"glpat-{CORE}",
    f"xoxb-1234-{CORE}",
    f"Authorization: Bearer {CORE}",
    f"'Authorization', 'Basic {CORE}='",
    f"Illegal header value b'Bearer {CORE}\\n'",
    f"eyJhbGciOiJI.{CORE}.{CORE}",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CORE}\n-----END OPENSSH PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY-----\\n{CORE}",
    f"http://me:{CORE}@host:3128",
    f"http://me:a/{CORE}@host:3128/path",
    f"http://me:a@{CORE}@host",
    f"http://me:%2F%40{CORE}@host",
    f"https://{CORE}@host.example/path",
    f"https://to/{CORE}@host.example",
    f"postgres://me:{CORE}@db/x",
    f"http%3A%2F%2Fme%3A{CORE}%40host",
    f"proxy me:{CORE}@proxy.example:3128",
    f"https://host/x?a=1&token={CORE}&b=2",
    f"https://s3/x?X-Amz-Signature={CORE}",
    f"https://blob/x?sv=2&sig={CORE}",
    f"password={CORE}",
    f"--hub_token {CORE} --seed 1",
    f"--api-key={CORE}",
    f"{{'token': '{CORE}', 'dtype': 'float32'}}",
    f'{{"client_secret": "{CORE}"}}',
    f'{{\\"token\\": \\"{CORE}\\"}}',
    f"Config(hub_token='{CORE}', seed=1)",
    f"headers={{'X-Anything': '{CORE}'}}",
    f"{{'headers': {{'X': {{'deep': '{CORE}'}}}}}}",
    f"line\n  hub_token: {CORE}",
    f"Got `password: {CORE}`",
]
ORDINARY = [
    "eos_token: </s>",
    "{'pad_token': '[PAD]', 'eos_token': '</s>', 'image_token': '<image>'}",
    "max_new_tokens: 128",
    "tokenizer=org/model",
    "teacher_token_env=DISTILL_TEACHER_TOKEN",
    "api_key_env: OPENAI_API_KEY",
    "http://127.0.0.1:8000/v1",
    "http://teacher.example:8000/models/big@main",
    "https://huggingface.co/org/model",
    "git+https://github.com/owner/repo@v1.0",
    "git+ssh://git@github.com/owner/repo",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "hf_transfer",
    "hf_internal_testing/tiny",
    "nats/token: 1.23",
    "stop_strings: ['</s>', '###']",
    "Basic settings are fine",
    "Bearer tokens are sent",
    "there is no token. Log in with `hf auth login`, set HF_TOKEN, or pass `hub_token`.",
    "expected one of 'token', 'hub_token', 'secret'",
    "python:3.11@sha256:9fabc",
    "anna@example.org",
    "token_type_ids=1",
    "revision: 9c1d2e3f4a5b6c7d8e9f00112233445566778899",
    "sk-learn-compatible-estimators",
    "Question: {question}\nAnswer:",
    "decoder_start_token: <s>",
    "/data/models/big",
    "lora_target_modules=['q_proj', 'v_proj']",
    "torch.float32",
    "authorization, which is needed",
    "hub_token=None use_auth_token=True",
    "skip_special_tokens=True",
    "per_token=0.5",
]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("around", ["{}", "Got `x: {}`; expected y.", "['a', {!r}]", "\n{}\n"])
def test_secrets_are_not_shown_whatever_stands_around_them(text, around):
    told = redacted(around.format(text))
    assert CORE not in told and "SECRETCORE" not in told and NOT_SHOWN in told
    assert redacted(told) == told, "a second time changes nothing"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_shown_as_it_is(text):
    assert redacted(text) == text and hidden(text, "setting") == text


OF_SECRETS = """
    token hub_token hubToken api_key apiKey API-KEY AWS_SECRET_ACCESS_KEY password proxies Cookie credentials
    use_auth_token x-auth client.secret
""".split()
OF_OTHERS = """
    max_new_tokens pad_token eos_token tokenizer teacher_token_env author key sort_key token_ids keys bos_token_id
    password_file stop_tokens image_token api_key_env
""".split()


@pytest.mark.parametrize("name", OF_SECRETS)
def test_names_of_secrets(name):
    assert is_secret(name) and hidden({name: 12}) == {name: NOT_SHOWN}
    assert without_secrets({name: "x", "a": 1}) == {"a": 1}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_names_of_other_things(name):
    assert not is_secret(name) and hidden({name: "word"}) == {name: "word"}


def test_what_holds_no_secret_comes_as_it_is():
    config = GKDConfig(output_dir="out", use_cpu=True, model_init_kwargs={"dtype": "float32"}, stop_strings=["</s>"])
    for value in (1, 0.5, None, True, (1, "a"), ["a"], {"a"}, {"a": [1]}, Path("a"), config.accelerator_config, ""):
        assert hidden(value) == value and type(hidden(value)) is type(value)
    assert hidden([("Authorization", CORE), {f"hf_{CORE}AbCd": 1}]) == [("Authorization", NOT_SHOWN), {NOT_SHOWN: 1}]


def test_a_cache_of_an_earlier_version_that_recorded_proxies_is_read_and_not_quoted(tmp_path):
    settings = {"dtype": "float32", "proxies": f"{{'https': 'http://me:{CORE}@host'}}"}
    old = CacheIdentity("hidden", 9, "t", "no", 9, teacher_settings=settings, weights="w")
    now = dataclasses.replace(old, teacher_settings=answering_settings({"dtype": "float32", "proxies": {"https": "x"}}))
    assert now.teacher_settings == {"dtype": "float32"}
    refuse_differences(tmp_path, old, now)
    with pytest.raises(ConfigurationError, match="vocabulary size: 9 then, 8 now") as raised:
        refuse_differences(tmp_path, old, dataclasses.replace(now, vocab_size=8))
    assert CORE not in str(raised.value)


def test_values_of_the_environment_are_not_repeated(monkeypatch):
    """A server may answer with the token that it was sent, which has no shape of its own."""
    monkeypatch.setenv("DISTILL_TEACHER_TOKEN", "correct horse battery")
    monkeypatch.setenv("PWD", "/srv/place")
    assert redacted("401: correct horse battery in /srv/place") == f"401: {NOT_SHOWN} in /srv/place"


@pytest.mark.parametrize("kind", [*BAD_INPUT, *FAILURES])
def test_no_error_of_the_package_tells_a_secret(kind):
    error = kind(f"Got `http://me:{CORE}@host`\x1b[31m; expected \u202eless.")
    assert str(error) == f"Got `http://{NOT_SHOWN}@host`‹U+001B›[31m; expected ‹U+202E›less."
    assert CORE not in repr(error) and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_keeps_what_else_it_has():
    assert TeacherServerError("away", 503).status == 503
    with pytest.raises(ConfigurationError, match=r"^Got `hub_token: \(not shown\)`; expected text\.$"):
        require(False, "hub_token", 12345, "text")


@pytest.mark.parametrize(
    "token", [1234567, ["hf_x"], {"a": "hf_x"}, Path("hf_x"), b"hf_x", True, "two words", "hf_x\n"]
)
def test_a_hub_token_of_another_kind_is_refused_unseen(token):
    with pytest.raises(ConfigurationError, match="hub_token") as raised:
        GKDConfig(output_dir="out", hub_token=token)
    assert "hf_x" not in str(raised.value) and "1234567" not in str(raised.value)


def test_a_config_tells_trackers_and_readers_no_secret():
    class Own(MiniLLMConfig):
        pass

    for config_class in (GKDConfig, MiniLLMConfig, Own):
        proxies = {"https": f"http://me:{CORE}@host"}
        args = config_class(output_dir="out", hub_token=CORE, model_init_kwargs={"proxies": proxies, "dtype": "auto"})
        for told in (str(args), repr(args), args.to_json_string(), json.dumps(args.to_sanitized_dict(), default=str)):
            assert CORE not in told and "float32" not in told and "dtype" in told
        assert copy.deepcopy(args).hub_token == args.hub_token == CORE and args.model_init_kwargs["proxies"] == proxies


def test_the_log_of_a_command_tells_no_secret(capsys):
    handler = logging.StreamHandler()
    handler.addFilter(Redacting())
    record = logging.makeLogRecord({"msg": "away: %s", "args": (f"http://me:{CORE}@host\x1b[0m",), "levelno": 30})
    handler.handle(record)
    assert capsys.readouterr().err == f"away: http://{NOT_SHOWN}@host‹U+001B›[0m\n"


@pytest.mark.parametrize(
    "part", ["a", "\n", "://", "'", "\\", "--", "a:", "{", "token=", "eyJ", "http://a:", '\\"', "Bearer "]
)
def test_no_text_takes_long(part):
    started = time.monotonic()
    redacted(part * (100_000 // len(part)))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "given, told",
    [
        ("org/model", "org/model"),
        ("/home/anna/models/big", "big"),
        ("/home/anna", "~"),
        ("/home/anna smith/my model", "my model"),
        ("~/models/big", "big"),
        ("http://10.0.0.3:8000", "(a server)"),
        ("http://10.0.0.3:8000, http://10.0.0.4:8000", "(a server)"),
        ("s3://bucket/rows", "(a server)"),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("hf://datasets/org/rows", "hf://datasets/org/rows"),
        ("/no_think Answer briefly.", "/no_think Answer briefly."),
        ("Answer briefly. " * 20, "Answer briefly. " * 20),  # longer than the name of a file may be
        ("no_think" + "!" * 300, "no_think" + "!" * 300),
        ("See /home/anna/notes for C:\\Users\\anna\\x", "See ~/notes for ~\\x"),
    ],
)
def test_places_are_not_published(given, told):
    assert shown(given) == told
