"""What a teacher's server does behind HTTP: questions wait in a bounded queue and are answered together.

One thread runs the model. While it computes, further questions come together; the next turn takes as many of them as
fit, sorts their rows by length and runs rows of similar length in one forward. So a single client is answered at
once, and many clients fill the batches of each other.
"""

from __future__ import annotations

import collections
import concurrent.futures as futures
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import __version__, models
from ...data.token_bytes import TokenBytes
from ...losses.reduction import trained_mask
from ...settings import require
from ...signals import HiddenStates, Logits
from ..cache.identity import first_bytes_fingerprint, tokenizer_fingerprint
from ..cache.kinds import ANSWER_KINDS
from ..cache.shards import Answer
from ..local import LocalTeacher
from ..rows import row_key
from .wire import NUMBER_DTYPES, PROTOCOL, Question, Wanted, answer_bytes, answer_identity, pack, pack_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_body_mib, max_rows, max_tokens: of a question.
        max_answer_mib: of an answer.
        max_row_tokens: of a row; None is what the model's positions allow.
        max_queue: questions that wait; more are told to come again.
        max_held_mib: of all questions that came or are coming, and of their answers until those are taken.
        batch_tokens: of one forward, padding counted.
        request_timeout: seconds from the end of a question to its answer.
        slow_timeout: seconds in which a client must have sent its question, or taken its answer.
    """

    max_body_mib: float = 16.0
    max_rows: int = 1024
    max_tokens: int = 65536
    max_answer_mib: float = 1024.0
    max_row_tokens: int | None = None
    max_queue: int = 256
    max_held_mib: float = 8192.0
    batch_tokens: int = 8192
    request_timeout: float = 120.0
    slow_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value is None or value > 0, field.name, value, "a number above 0")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)


class Refusal(Exception):
    """Why a question is not answered.

    Args:
        retry_after: seconds after which it may be asked again; None where that is of no use.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Held:
    """Bytes that one question takes up, given back when nobody refers to this any more.

    Args:
        total: one number for all questions of a server, of which each has its part.
    """

    _lock = threading.RLock()  # garbage is collected wherever it may be

    def __init__(self, total: list[int], most: int):
        self._total, self._most, self._own = total, most, 0

    def add(self, size: int) -> None:
        """Take more, if there is room for it beside what the others have.

        Raises:
            Refusal: there is none now.
        """
        with self._lock:
            others = self._total[0] - self._own
            if others and others + self._own + size > self._most:
                raise Refusal(
                    503, f"Questions and answers of {self._most:,} bytes are held here already.", retry_after=1.0
                )
            self._own += size
            self._total[0] += size

    def __del__(self) -> None:
        with self._lock:
            self._total[0] -= self._own


class _Job:
    """A question, and where its answer goes."""

    def __init__(self, question: Question):
        self.question = question
        self.tokens = sum(len(ids) for ids, _ in question.rows)
        self.rows: list[Answer | None] = [None] * len(question.rows)
        self.answer: futures.Future[bytes] = futures.Future()


class TeacherService:
    """Answers questions with a local teacher.

    Args:
        teacher: whole on this machine, prepared.
        tokenizer: that its clients must have.
        name: of the teacher, for clients' logs and model cards.
    """

    def __init__(
        self, teacher: LocalTeacher, tokenizer: PreTrainedTokenizerBase, name: str, limits: Limits | None = None
    ):
        self.teacher = teacher
        self.limits = limits or Limits()
        self.device = next(teacher.model.parameters()).device
        self.vocab_rows: int = teacher.config.get_text_config().vocab_size
        self.counted = {"questions": 0, "tokens": 0, "forwards": 0, "refused": 0}
        self._waiting: collections.deque[_Job] = collections.deque()
        self._running = 0
        self._held = [0]
        self._wake = threading.Condition()
        self._closed = False
        first = self._signal([torch.arange(min(4, self.vocab_rows)).numpy()])
        self.head = pack_head(first.head.cut_to(None)) if isinstance(first, HiddenStates) else None
        spelled = TokenBytes.of_readable(tokenizer)
        self._first_bytes = None if spelled is None else spelled.first_bytes(self.vocab_rows)
        self.info = self._describe(tokenizer, name, first)
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)
        self._thread.start()

    def _describe(self, tokenizer: PreTrainedTokenizerBase, name: str, first: Any) -> dict[str, Any]:
        """What a client must know, as JSON."""
        known = {"hidden": self.head, "next_bytes": self._first_bytes}  # what a kind takes beside distributions
        positions = getattr(self.teacher.config.get_text_config(), "max_position_embeddings", None)
        longest = [n for n in (self.limits.max_row_tokens, positions) if n]
        return {
            "protocol": PROTOCOL,
            "version": __version__,
            "teacher": name,
            "weights": self.teacher.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "vocab_rows": self.vocab_rows,
            "dtype": str(models.causal_lm_of(self.teacher.model).dtype).removeprefix("torch."),
            "first_bytes": first_bytes_fingerprint(tokenizer),
            "kinds": [kind for kind in NUMBER_DTYPES if known.get(kind, first) is not None],
            "hidden_size": first.hidden.shape[1] if isinstance(first, HiddenStates) else None,
            "head_sha256": None if self.head is None else hashlib.sha256(self.head).hexdigest(),
            "max_body_bytes": self.limits.max_body_bytes,
            "max_rows": self.limits.max_rows,
            "max_tokens": self.limits.max_tokens,
            "max_row_tokens": min(longest) if longest else self.limits.max_tokens,
            "max_answer_bytes": int(self.limits.max_answer_mib * 2**20),
        }

    # ---- Taking questions -------------------------------------------------------------------------------------------

    def hold(self) -> Held:
        """Count what one question takes up, from its first byte until its answer is gone."""
        return Held(self._held, int(self.limits.max_held_mib * 2**20))

    def check(self, question: Question) -> int:
        """Refuse a question that this teacher cannot answer; return how many bytes its answer has.

        Raises:
            Refusal: saying what was got, what was expected, and what to do.
        """
        wanted, info = question.wanted, self.info
        if question.tokenizer != info["tokenizer"]:
            raise Refusal(
                409,
                f"The ids are of the tokenizer {question.tokenizer}, this teacher's is {info['tokenizer']}: the same "
                "ids stand for other tokens. Use a student of the teacher's family, with its tokenizer.",
            )
        if wanted.kind not in info["kinds"]:
            raise Refusal(422, f"This teacher does not tell {wanted.kind}; it tells {', '.join(info['kinds'])}.")
        if wanted.dtype not in (None, *NUMBER_DTYPES[wanted.kind]):
            expected = ", ".join(NUMBER_DTYPES[wanted.kind])
            raise Refusal(422, f"{wanted.kind} is told in {expected}, not in {wanted.dtype}.")
        tokens = [len(ids) for ids, _ in question.rows]
        for name, got in (("max_rows", len(tokens)), ("max_tokens", sum(tokens)), ("max_row_tokens", max(tokens))):
            if got > info[name]:
                raise Refusal(413, f"The question has {got} where `{name}` allows {info[name]}. Ask in smaller parts.")
        size = answer_bytes(wanted, info) * sum(question.counts)
        if size > info["max_answer_bytes"]:
            raise Refusal(
                413, f"The answer would have {size:,.0f} bytes where {info['max_answer_bytes']:,} are allowed."
            )
        known = self.vocab_rows
        if wanted.kind == "token_logprobs":
            known = min(known, wanted.vocab_size or known)
        largest = max(int(ids.max()) for ids, _ in question.rows)
        if largest >= known:
            raise Refusal(422, f"The id {largest} is not in a vocabulary of {known}, which ends before it.")
        return int(size)

    def submit(self, question: Question) -> futures.Future[bytes]:
        """Queue a question that was checked; cancelling the future takes it out again.

        Raises:
            Refusal: the queue is full, or the server is stopping.
        """
        job = _Job(question)
        with self._wake:
            if self._closed:
                raise Refusal(503, "The server is stopping.", retry_after=5.0)
            if len(self._waiting) >= self.limits.max_queue:
                self.counted["refused"] += 1
                raise Refusal(503, f"{len(self._waiting)} questions are waiting already.", retry_after=1.0)
            self._waiting.append(job)
            self._wake.notify()
        return job.answer

    @property
    def load(self) -> dict[str, int]:
        """How much is waiting and running now, and what was done so far."""
        with self._wake:
            waiting = sum(not job.answer.cancelled() for job in self._waiting)
            return {"waiting": waiting, "running": self._running, **self.counted}

    def close(self) -> None:
        """Finish the running forward, refuse what waits, and end the thread."""
        with self._wake:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._wake.notify_all()
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Refusal(503, "The server is stopping.", retry_after=5.0))
        self._thread.join()

    # ---- Answering them ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while jobs := self._take():
            try:
                self._answer(jobs)
            except Exception as error:  # a question must not take the others, or the server, down with it
                if len(jobs) == 1:
                    self._fail(jobs[0], error)
                else:
                    for job in (job for job in jobs if not job.answer.done()):
                        try:
                            self._answer([job])
                        except Exception as failure:
                            self._fail(job, failure)
            with self._wake:
                self._running = 0

    def _take(self) -> list[_Job]:
        """The questions of the next turn, first come, first served; none once the service is closed."""
        taken: list[_Job] = []
        with self._wake:
            while not taken and not self._closed:
                while self._waiting:
                    fits = sum(job.tokens for job in taken) + self._waiting[0].tokens <= self.limits.batch_tokens
                    if taken and not fits:
                        break
                    job = self._waiting.popleft()
                    if job.answer.set_running_or_notify_cancel():
                        taken.append(job)
                if not taken:
                    self._wake.wait()
            self._running = len(taken)
        return taken

    @staticmethod
    def _fail(job: _Job, error: Exception) -> None:
        logger.error("A question could not be answered.", exc_info=error)
        if not job.answer.done():
            job.answer.set_exception(Refusal(500, f"The teacher failed with {type(error).__name__}."))

    @torch.no_grad()
    def _answer(self, jobs: Sequence[_Job]) -> None:
        started = time.monotonic()
        rows = [(job, number) for job in jobs for number in range(len(job.rows))]
        rows.sort(key=lambda job_row: len(job_row[0].question.rows[job_row[1]][0]))
        while rows:
            longest = len(rows[-1][0].question.rows[rows[-1][1]][0])
            count = max(1, self.limits.batch_tokens // longest)
            self._forward(rows[-count:])
            del rows[-count:]
        for job in jobs:
            parts = [row for row in job.rows if row is not None]
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            facts = {"weights": self.info["weights"], "milliseconds": round(1e3 * (time.monotonic() - started))}
            answer = pack(joined, facts)
            self.counted["questions"] += 1
            self.counted["tokens"] += job.tokens
            job.answer.set_result(answer)

    def _forward(self, rows: Sequence[tuple[_Job, int]]) -> None:
        """One forward of rows of any questions; each gets what its question wants."""
        token_rows = [job.question.rows[number] for job, number in rows]
        signal = self._signal([ids for ids, _ in token_rows], [positions for _, positions in token_rows])
        self.counted["forwards"] += 1
        ends = torch.tensor([len(positions) for _, positions in token_rows]).cumsum(0).tolist()
        places = [torch.arange(end - len(p), end) for end, (_, p) in zip(ends, token_rows, strict=True)]
        groups: dict[Wanted, list[int]] = {}
        for index, (job, _) in enumerate(rows):
            groups.setdefault(job.question.wanted, []).append(index)
        for wanted, members in groups.items():
            tokens = torch.cat([places[index] for index in members]).to(self.device)
            labels = [torch.from_numpy(token_rows[index][0][token_rows[index][1] + 1]) for index in members]
            keys = [row_key(*token_rows[index]) for index in members]
            for index, row in zip(members, self._say(signal, tokens, wanted, labels, keys), strict=True):
                job, number = rows[index]
                job.rows[number] = row

    def _signal(self, ids: Sequence[Any], positions: Sequence[Any] | None = None) -> HiddenStates | Logits:
        width = max(map(len, ids))
        batch = torch.zeros(len(ids), width, dtype=torch.long)
        mask, labels = torch.zeros_like(batch), torch.full_like(batch, -100)
        for number, row in enumerate(ids):
            batch[number, : len(row)] = torch.from_numpy(row)
            mask[number, : len(row)] = 1
            where = torch.arange(len(row) - 1) if positions is None else torch.from_numpy(positions[number])
            labels[number, where + 1] = 0
        inputs = {"input_ids": batch.to(self.device), "attention_mask": mask.to(self.device)}
        return self.teacher.signal(inputs, trained_mask(labels).to(self.device), None)  # type: ignore[return-value]

    def _say(
        self,
        signal: HiddenStates | Logits,
        tokens: Tensor,
        wanted: Wanted,
        labels: Sequence[Tensor],
        keys: Sequence[bytes],
    ) -> list[Answer]:
        """What is wanted of `some` of the signal's tokens, cut into rows."""
        if isinstance(signal, HiddenStates):
            signal = HiddenStates(signal.hidden[tokens], signal.head.cut_to(wanted.vocab_size))
        else:
            signal = Logits(signal.values[tokens][:, : wanted.vocab_size])
        counts, ids = [len(part) for part in labels], torch.cat(list(labels)).long().to(self.device)
        kind = ANSWER_KINDS[wanted.kind](answer_identity(wanted, self.info))
        return kind.store(kind.told(signal, ids, self._first_bytes), counts, keys)
