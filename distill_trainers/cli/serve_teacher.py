"""`distill-trainers serve-teacher --model FOLDER`: answer trainers' questions about tokens over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..exceptions import ConfigurationError
from ..installing import pip_install
from . import report_errors, say, start_log

_EPILOG = """Trainers name it by its address: `teacher_model_name_or_path: http://127.0.0.1:8123`. If the environment
variable DISTILL_TEACHER_TOKEN is set, here and there, requests must bear its value. It speaks plain HTTP: between
machines, put it behind a tunnel or a proxy with TLS. SIGTERM and Ctrl-C finish what runs and stop."""


def make_parser() -> argparse.ArgumentParser:
    """Define the options, with their defaults."""
    from ..teachers.remote.service import Limits

    parser = argparse.ArgumentParser(
        prog="distill-trainers serve-teacher", description=__doc__, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="the teacher: a folder or Hub id")
    parser.add_argument("--dtype", default="auto", help="auto (that of the checkpoint), float32, bfloat16 or float16")
    parser.add_argument("--device", default=None, help="such as cpu or cuda:1; by default the first GPU, else the CPU")
    parser.add_argument("--device-map", default=None, help="auto spreads the teacher over all GPUs")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow a model with code of its own")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8123, help="port to listen on; 0 takes a free one (%(default)s)")
    parser.add_argument(
        "--no-token", action="store_true", help="let everybody in who reaches an address other than this machine's own"
    )
    parser.add_argument("--log-requests", action="store_true", help="a line for each request, with its status")
    helps = {
        "max_body_mib": "largest question",
        "max_rows": "rows of a question",
        "max_tokens": "tokens of a question",
        "max_answer_mib": "largest answer",
        "max_row_tokens": "tokens of a row (the model's positions)",
        "max_queue": "questions that wait; more are told to come again",
        "max_held_mib": "all questions and answers that are held at once; more are told to come again",
        "batch_tokens": "tokens of one forward, padding counted",
        "request_timeout": "seconds from question to answer",
        "slow_timeout": "seconds that a client may take to send its question or read its answer",
    }
    for name, text in helps.items():
        default = getattr(Limits(), name)
        kind: Any = float if isinstance(default, float) else int
        text = text if default is None else f"{text} (%(default)s)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    return parser


def main(argv: Sequence[str]) -> int:
    """Load the teacher, then serve it until the process is told to stop."""
    start_log()
    options = make_parser().parse_args(argv)
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise ConfigurationError(f"Serving a teacher needs FastAPI and uvicorn: {pip_install('serve')}.")
    from ..teachers.remote.dialects import TOKEN_ENV, token_from_environment
    from ..teachers.remote.http import bind, serve
    from ..teachers.remote.service import Limits

    limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
    token = token_from_environment()
    if token is None and not options.no_token and not _is_loopback(options.host):
        raise ConfigurationError(
            f"Got `--host {options.host}`, which other machines reach, and no token. Put one into the environment "
            f"variable {TOKEN_ENV}, or say `--no-token` if everybody there may use the teacher."
        )
    with bind(options.host, options.port) as bound:  # before minutes of loading
        service = load_service(options, limits)
        bound.listen(1024)  # whoever reads the line below may connect at once
        host, port = bound.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        say(f"Serving {service.info['teacher']} at http://{address}:{port}", flush=True)
        serve(service, bound, token, options.log_requests)
    with contextlib.suppress(BrokenPipeError):  # whoever started it may be gone
        print("Stopped.", flush=True)
    return 0


def load_service(options: Any, limits: Any) -> Any:
    """Load the teacher that the options name, as a service."""
    import torch

    from ..models import load_causal_lm, load_tokenizer
    from ..teachers import LocalTeacher
    from ..teachers.remote.service import TeacherService

    known = {"trust_remote_code": options.trust_remote_code}
    where = {} if options.device_map is None else {"device_map": options.device_map}
    model = load_causal_lm(options.model, role="teacher", dtype=options.dtype, **known, **where)
    tokenizer = load_tokenizer(options.model, **known)
    if options.device_map is None:
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = Path(options.model).name if os.path.exists(options.model) else options.model  # clients need not know paths
    return TeacherService(LocalTeacher(model), tokenizer, name, limits)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
