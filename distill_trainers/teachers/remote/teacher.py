"""A teacher behind HTTP: `distill-trainers serve-teacher`, or any OpenAI-compatible server with prompt log-probs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import models
from ...exceptions import ConfigurationError, TeacherServerError
from ...requirements import Requirements
from ...servers.endpoints import Again, Attempt, Endpoint, Servers, parse_servers
from ...servers.openai import Writer
from ...settings import shown
from ...signals import Head, TeacherSignal
from ..base import Pair, Teacher, is_remote, named
from ..cache.identity import first_bytes_fingerprint
from ..cache.kinds import ANSWER_KINDS, refuse_sparse, told_kind
from ..cache.shards import Answer
from ..rows import TokenRow, plain_rows, row_key, unpadded_rows
from ..vocabulary import shared_vocabulary
from .dialects import LIMITS, TOKEN_ENV, Dialect, OwnDialect, RemoteSettings, token_from_environment
from .openai import OpenAIDialect
from .wire import SERVER_KINDS, Question, Wanted, answer_bytes, answer_identity, empty_answer, problem_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from ..options import TeacherOptions

logger = logging.getLogger(__name__)

WRITING_KINDS = ("topk", "token_logprobs")  # those of the servers that also write completions


class RemoteTeacher(Teacher):
    """A teacher that answers over HTTP; every process asks for its own rows.

    Micro-batches that it is told of ahead (`asking_ahead`) are asked for at once and in the background, so that their
    answers are on their way while the student computes. A server that goes away is waited for.

    Args:
        servers: addresses, in one string with commas between or as a list; they must serve the same teacher.
        token: that the servers want; never part of a recipe.

    Raises:
        ConfigurationError: a server is not there, is not one, wants another token, or cannot tell what is asked for.
    """

    may_be_away = may_generate = True
    place = "behind HTTP"

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        if not is_remote(pair.teacher) and not isinstance(pair.teacher, cls):
            raise ConfigurationError(
                f"Got `teacher_placement: remote` with the teacher {named(pair.teacher)}; expected the address of a "
                "server, such as `http://127.0.0.1:8000`. Start one with `distill-trainers serve-teacher`."
            )
        if options.teacher_cache is not None:
            raise ConfigurationError(
                f"Got `teacher_cache: {shown(options.teacher_cache)}` with a teacher behind HTTP; expected one of "
                "them. Leave the cache out, or fill it where the teacher is and bring the folder here."
            )
        if wants.keeps_reference:
            raise ConfigurationError(
                "Got `reference_logps_dir` with a teacher behind HTTP as the reference; its log-probabilities are kept "
                "only of local models. Leave `reference_logps_dir` out."
            )
        if options.teacher_model_init_kwargs:
            raise ConfigurationError(
                "`teacher_model_init_kwargs` act while a teacher is loaded, but this one is behind HTTP. Give them to "
                "its server (`--dtype`, `--device-map`), and leave them out here: beside a recipe that has them, "
                "`--teacher_model_init_kwargs {}`."
            )
        if isinstance(pair.teacher, str):
            parse_servers(pair.teacher)
            kind = options.teacher_server_kind
        else:
            kind = pair.teacher.settings.kind
        told = "token_logprobs" if kind == "token_logprobs" else "distribution"
        missing = wants.needs - {told} - ({"token_logprobs"} if told == "distribution" else set())
        if wants.replaces_completions and kind not in WRITING_KINDS:
            missing |= {"completions"}
        if missing:
            less = (
                "`cross_tokenizer: {alm: 1.0}`" if options.has_own_tokenizer else "`teacher_mix_alpha: 0`, no `seq_kd`"
            )
            raise ConfigurationError(
                f"{wants.trainer} needs {sorted(missing)} of its teacher under these settings, but a teacher behind "
                f"HTTP with `teacher_server_kind: {kind}` gives its {told} alone. Use a local teacher, or settings "
                f"that need less ({less}, another `teacher_server_kind`)."
            )
        refuse_sparse(kind, "teacher_server_kind", wants)

    @classmethod
    def refuse_idle(cls, options: TeacherOptions) -> None:
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if field.name.startswith("teacher_server_") and value != field.default:
                raise ConfigurationError(
                    f"Got `{field.name}: {value}`; expected `teacher_model_name_or_path: http://…` beside it: the "
                    "address of a teacher's server."
                )

    @classmethod
    def opened(cls, pair: Pair, options: TeacherOptions) -> RemoteTeacher:
        """Return the teacher at an address, once its servers have told that they serve this student."""
        teacher = pair.teacher
        if not isinstance(teacher, cls):
            names = [field.name for field in dataclasses.fields(RemoteSettings) if field.name != "seed"]
            settings = {name: getattr(options, f"teacher_server_{name}") for name in names}
            token = token_from_environment(parse_servers(teacher))
            teacher = cls(teacher, RemoteSettings(**settings, seed=options.seed), token)
        # `max_length` counts the student's tokens; rows in the teacher's own are looked at one by one (`expects`).
        teacher.meet(pair.tokenizer, None if options.has_own_tokenizer else options.max_length)
        if getattr(options, "seq_kd", False):
            teacher.live()  # it says why it cannot write
        return teacher

    def __init__(self, servers: str | Sequence[str], settings: RemoteSettings | None = None, token: str | None = None):
        self.settings = settings = settings or RemoteSettings()
        if settings.kind not in SERVER_KINDS:
            raise ConfigurationError(f"Got the kind {settings.kind!r}; expected one of {', '.join(SERVER_KINDS)}.")
        urls = parse_servers(servers if isinstance(servers, str) else ",".join(servers))
        self.servers = Servers(urls, token, settings.concurrency, settings.timeout, settings.patience)
        self.provides = ANSWER_KINDS[settings.kind].tells  # type: ignore[misc]
        dialects = [self._connect(endpoint) for endpoint in self.servers.endpoints]
        self.dialect = dialects[0]
        self.can_generate = self.dialect.can_write  # type: ignore[misc]
        self.info = self.dialect.info
        for url, other in zip(urls, dialects, strict=True):
            if any(other.info[name] != self.info[name] for name in ("weights", "tokenizer", "vocab_rows")):
                raise ConfigurationError(
                    f"The servers {urls[0]} and {url} serve different teachers: {self.info['teacher']!r} "
                    f"({self.info['weights']}) and {other.info['teacher']!r} ({other.info['weights']}). Name servers "
                    "of one teacher."
                )
            if settings.kind not in other.info["kinds"]:
                raise ConfigurationError(
                    f"Got `teacher_server_kind: {settings.kind}`, but the server {url} tells only "
                    f"{', '.join(other.info['kinds'])}. Choose one of these."
                )
        for name in LIMITS:  # any of them may be asked any question
            limits = [dialect.info[name] for dialect in dialects if dialect.info[name] is not None]
            self.info[name] = min(limits) if limits else None
        self.name = self.info["teacher"]
        self.tells = told_kind(settings.kind, settings.top_k, settings.draws)
        self._device = torch.device("cpu")
        self._head: Head | None = None
        self._known_ids: int | None = self.info["vocab_rows"]
        self._ahead: dict[Any, list[Attempt[Answer]]] = {}
        self._announcing = self._holding = False

    def _connect(self, endpoint: Endpoint) -> Dialect:
        try:
            try:
                return OwnDialect(endpoint.json("/v1/info"), endpoint.url)
            except TeacherServerError as error:
                if error.status != 404:
                    raise
                return OpenAIDialect(endpoint, self.settings)
        except Again as error:
            raise ConfigurationError(
                f"The teacher's server {endpoint.url} does not answer ({error}). Start it with `distill-trainers "
                "serve-teacher --model …` and wait until it says that it serves, or fix `teacher_model_name_or_path`."
            ) from error
        except TeacherServerError as error:
            remedy = "Check the address"
            if error.status in (401, 403):
                remedy = f"Put its token into the environment variable {TOKEN_ENV}"
            raise ConfigurationError(f"{error}. {remedy}.") from error

    # ---- What a trainer tells it ------------------------------------------------------------------------------------

    def meet(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        """Compare the student's tokenizer and longest row with what the servers take.

        Raises:
            ConfigurationError: naming what differs.
        """
        for endpoint in self.servers.endpoints:
            try:
                self.dialect.compare_tokenizer(endpoint, tokenizer)
            except (Again, TeacherServerError) as error:
                raise ConfigurationError(f"The teacher's server {endpoint.url} failed: {error}.") from error
        if self.settings.kind == "next_bytes" and self.info.get("first_bytes") != first_bytes_fingerprint(tokenizer):
            raise ConfigurationError(
                f"Got `teacher_server_kind: next_bytes`, but the server {self.servers.names} reads other bytes, or "
                "other ends of a text, from its tokenizer than this run from that of `teacher_tokenizer`. Give both "
                "the same files, chat template included, or use `hidden`."
            )
        longest = self.info["max_row_tokens"]
        if longest is not None and max_length is not None and max_length > longest:
            raise ConfigurationError(
                f"Got `max_length: {max_length}`, but the teacher's server {self.servers.names} takes rows of "
                f"{longest} tokens. Set `max_length: {longest}`, or raise the server's limit."
            )

    def shared_ids(self, tokenizer: Any, student_rows: int, teacher_tokenizer: Any = None) -> int | None:
        rows = self.info["vocab_rows"]  # a server that does not tell leaves all of them in
        self._known_ids = student_rows if rows is None else min(rows, student_rows)  # others are refused
        return None if rows is None else shared_vocabulary(tokenizer, tokenizer, student_rows, rows)

    def prepare(self, accelerator: Accelerator) -> None:
        self._device = accelerator.device
        self.servers.start_with(accelerator.process_index)

    def expects(self, rows: Iterable[Mapping[str, Any]] | None, name: str) -> None:
        longest = self.info["max_row_tokens"]
        for number, row in enumerate(rows or () if longest is not None else ()):
            if "teacher_length" not in row:  # what the student reads as well is no longer than `max_length`
                return
            if row["teacher_length"] > longest:
                raise ConfigurationError(
                    f"Row {number} of the {name} rows may come to {row['teacher_length']} tokens for the teacher, "
                    f"whose server {self.servers.names} takes rows of {longest}. Shorten the teacher's own prompt, set "
                    f"`teacher_max_length: {longest}` with `teacher_too_long: drop`, or raise the server's limit."
                )

    @contextlib.contextmanager
    def asking_ahead(self) -> Iterator[bool]:
        """Let `signal`, within it, send its question and return None; asked once more, it takes up the answer."""
        self._forget()
        self._announcing = True
        try:
            yield True
        finally:
            self._announcing = False

    @contextlib.contextmanager
    def holding_failures(self) -> Iterator[None]:
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def stop_waiting(self) -> None:
        self.servers.stop_waiting()

    # ---- As a teacher -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        inputs, predicts = plain_rows(inputs, predicts, self.name)
        rows = [row for row in unpadded_rows(inputs, predicts) if len(row[1])]
        key = (vocab_size, *(row_key(*row) for row in rows))
        if self._announcing:
            if self.failure is None:
                self._ahead[key] = self._ask(rows, vocab_size)
            return None  # type: ignore[return-value]  # nobody looks at it
        if self.failure is None or not self._holding:
            try:
                attempts = self._ahead.pop(key, None) or self._ask(rows, vocab_size)
                return self._signal_of([attempt.result() for attempt in attempts], vocab_size, predicts.device)
            except TeacherServerError as error:
                if not self._holding or (self.settings.kind == "hidden" and self._head is None):
                    raise
                self.failure = error
        count, head = sum(len(positions) for _, positions in rows), self._head
        nothing = empty_answer(count, self._wanted(vocab_size), self.info, None if head is None else head.weight.dtype)
        return self._signal_of([nothing], vocab_size, predicts.device)

    # ---- What it writes ---------------------------------------------------------------------------------------------

    def live(self) -> Any:
        if not self.can_generate:
            raise ConfigurationError(
                f"The teacher's server {self.servers.names} writes no completions. Use vLLM's server with "
                f"`teacher_server_kind: {' or '.join(WRITING_KINDS)}`, give the dataset completions, or use a local "
                "teacher."
            )
        return self

    @contextlib.contextmanager
    def generating(self, accelerator: Accelerator | None = None) -> Iterator[Writer]:
        """Yield what writes the completions of many prompts at once."""
        self.live()
        assert isinstance(self.dialect, OpenAIDialect)
        yield Writer(self.servers, self.dialect.server, self._known_ids)

    def eos_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return models.eos_ids(None, tokenizer)  # the server adds those of the generation config, which it alone knows

    def fingerprint(self) -> str:
        return self.info["weights"]

    def close(self) -> None:
        self._forget()
        self.servers.close()

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        for attempt in (attempt for attempts in self._ahead.values() for attempt in attempts):
            attempt.cancel()
        self._ahead.clear()

    def _wanted(self, vocab_size: int | None) -> Wanted:
        settings = self.settings
        return Wanted(
            settings.kind,
            vocab_size,
            settings.dtype,
            top_k=settings.top_k if settings.kind == "topk" else None,
            draws=settings.draws if settings.kind == "sampled" else None,
            seed=settings.seed if settings.kind == "sampled" else None,
        )

    def _ask(self, rows: Sequence[TokenRow], vocab_size: int | None) -> list[Attempt[Answer]]:
        wanted = self._wanted(vocab_size)
        tokenizer = self.info["tokenizer"] or ""
        questions = [Question(wanted, tokenizer, part) for part in self._parts(rows, wanted)]
        return [Attempt(self.servers, functools.partial(self._checked, question)) for question in questions]

    def _parts(self, rows: Sequence[TokenRow], wanted: Wanted) -> list[list[TokenRow]]:
        """Rows in parts that a server takes, and as many parts as there are servers."""
        info, share = self.info, sum(len(ids) for ids, _ in rows) / len(self.servers.endpoints)
        token_bytes = answer_bytes(wanted, info) if info["vocab_rows"] else 0.0
        parts: list[list[TokenRow]] = []
        tokens, size = 0, 0.0
        for row in rows:
            grown, larger = tokens + len(row[0]), size + token_bytes * len(row[1])
            full = grown > info["max_tokens"] or larger > info["max_answer_bytes"] or tokens >= share
            if not parts or full or len(parts[-1]) >= info["max_rows"]:
                parts.append([])
                grown, larger = len(row[0]), token_bytes * len(row[1])
            parts[-1].append(row)
            tokens, size = grown, larger
        return parts

    def _checked(self, question: Question, endpoint: Endpoint) -> Answer:
        answer = self.dialect.ask(question, endpoint)
        wanted = question.wanted
        problem = problem_of(answer, sum(question.counts), wanted, self.info, wanted.vocab_size or self._known_ids)
        if problem:
            raise Again(f"{endpoint.url} answers nonsense: {problem}", broken=True)
        return answer

    def _signal_of(self, rows: list[Answer], vocab_size: int | None, device: torch.device) -> TeacherSignal:
        wanted = self._wanted(vocab_size)
        head = self._whole_head(device).cut_to(vocab_size) if wanted.kind == "hidden" else None
        info = {**self.info, "vocab_rows": self.info["vocab_rows"] or self._known_ids or wanted.top_k or 0}
        return ANSWER_KINDS[wanted.kind](answer_identity(wanted, info)).answer(rows, head, device)

    def _whole_head(self, device: torch.device) -> Head:
        """The teacher's head, fetched once."""
        if self._head is None:
            assert isinstance(self.dialect, OwnDialect)
            self._head = Attempt(self.servers, functools.partial(self.dialect.head, device)).result()
        return self._head
