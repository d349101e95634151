"""The stages from questions to training rows, each a function of rows that goes on where it was stopped.

extract: questions -> responses     parse: responses -> chains and answers
verify: -> right rows, wrong rows, and why rows were dropped     dual: right and wrong rows -> pairs
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..answers.formats import parse_response
from ..answers.verify import RIGHT, WRONG, majority_answer, verify_answer
from ..exceptions import DatasetError
from ..storage import Record, RecordStore, content_key
from . import prompts
from .dual import as_exemplar, by_question, closest, pair
from .records import Request, Response, TextModel

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_FLUSHED_TOGETHER = 500  # verdicts that take no time
_CARRIED = ("id", "question", "choices", "answer", "task")


@dataclass
class Asked:
    """What became of the requests of a stage."""

    done: int = 0
    known: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0


def _quiet(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items


def ask(
    model: TextModel,
    prompts_of: Sequence[tuple[Record, list[dict[str, str]], int]],
    store: RecordStore,
    kind: str,
    progress: Progress = _quiet,
) -> tuple[list[Record], Asked]:
    """Ask a teacher for what the store lacks, and keep each answer as it comes.

    Args:
        prompts_of: for each request what is carried to its row, the messages, and the number of the sample.
        kind: of prompt, for the provenance.

    Returns:
        the rows of all requests that have been answered, by now or earlier, in the order of the requests; and counts.
    """
    identity = model.identity()
    requests: dict[str, tuple[Record, Request]] = {}
    for row, messages, sample in prompts_of:
        key = content_key(identity, messages, sample)
        requests.setdefault(key, (row, Request(key, messages, sample)))
    known = store.load()
    todo = [request for key, (_, request) in requests.items() if key not in known]
    asked = Asked(known=len(requests) - len(todo))
    for response in progress(model.complete(todo), len(todo), kind):
        asked.prompt_tokens += response.prompt_tokens
        asked.completion_tokens += response.completion_tokens
        if response.error is not None:
            asked.failed[response.error] += 1
            continue
        row, request = requests[response.key]
        known[response.key] = _answered(row, request, response, identity, kind)
        store.append([known[response.key]])
        asked.done += 1
    known |= store.load()  # of other processes, which have answered their share
    return [known[key] for key in requests if key in known], asked


def _answered(row: Record, request: Request, response: Response, identity: Mapping[str, Any], kind: str) -> Record:
    carried = {name: row[name] for name in row if name in _CARRIED and row[name] is not None}
    provenance = {
        **identity,
        "prompt": f"{kind} {prompts.VERSION}",
        "sample": request.sample,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return {
        "key": request.key,
        **carried,
        "response": response.text,
        "finish": response.finish,
        "completion_tokens": response.completion_tokens,
        "provenance": provenance,
    }


def extract(
    questions: Sequence[Record],
    model: TextModel,
    store: RecordStore,
    *,
    samples: int = 1,
    exemplars: Sequence[Mapping[str, Any]] = (),
    progress: Progress = _quiet,
) -> tuple[list[Record], Asked]:
    """Ask for `samples` few-shot chains of thought for every question."""
    _require_columns(questions, ("question",), "questions")
    shots = [dict(exemplar) for exemplar in exemplars]
    prompts_of = [(row, prompts.cot_prompt(row, shots), sample) for row in questions for sample in range(samples)]
    return ask(model, prompts_of, store, "cot", progress)


def parse(rows: Sequence[Record], formats: Sequence[str] = (), next_question: str | None = "Q:") -> list[Record]:
    """Take the `response` of rows apart into `rationale`, `parsed_answer` and `answer_format`."""
    _require_columns(rows, ("response",), "responses")
    parsed_rows = []
    for row in rows:
        chosen = formats or (("choice", "hash", "boxed", "answer_is") if row.get("choices") else ())
        parsed = parse_response(str(row["response"] or ""), chosen, next_question=next_question)
        rest = {"rationale": parsed.rationale, "parsed_answer": parsed.answer, "answer_format": parsed.format}
        parsed_rows.append({**row, **rest})
    return parsed_rows


@dataclass
class Verified:
    """Rows by verdict, and counts: of every verdict, and of why right rows were dropped."""

    right: list[Record]
    wrong: list[Record]
    counts: Counter[str]


def verify(
    rows: Sequence[Record],
    *,
    kind: str = "auto",
    majority_share: float = 0.5,
    store: RecordStore | None = None,
    progress: Progress = _quiet,
) -> Verified:
    """Judge parsed rows by their reference, or by the majority of their question's samples where there is none.

    Args:
        majority_share: of all samples of a question that must agree, more than this; and two at least.
        store: keeps verdicts, so that a run goes on where it was stopped.
    """
    _require_columns(rows, ("question", "rationale", "parsed_answer"), "parsed rows")
    voted = _votes([row for row in rows if row.get("answer") in (None, "")], kind, majority_share)
    known = store.load() if store else {}
    new: list[Record] = []
    right, wrong, counts = [], [], Counter[str]()
    seen: set[tuple[str, ...]] = set()
    for row in progress(rows, len(rows), "verify"):
        reference = row.get("answer")
        by_vote = reference in (None, "")
        if by_vote:
            reference = voted.get(_question_key(row))
            if reference is None:
                counts["no majority"] += 1
                continue
        key = content_key(row["parsed_answer"], reference, kind, row.get("choices"))
        if key not in known:
            verdict = verify_answer(row["parsed_answer"], str(reference), kind, row.get("choices"))
            known[key] = {"key": key, "reason": verdict.reason, "how": verdict.how}
            new.append(known[key])
            if store and (len(new) >= _FLUSHED_TOGETHER or verdict.how == "math"):
                store.append(new)
                new = []
        reason = known[key]["reason"]
        same = (*_question_key(row), row["rationale"], str(row["parsed_answer"]))
        if reason in (RIGHT, WRONG) and (same in seen or not row["rationale"]):
            reason = "duplicate" if same in seen else "no rationale"
        seen.add(same)
        counts[reason] += 1
        judged = {
            **row,
            "answer": str(reference),
            "verdict": reason,
            "verified_by": "vote" if by_vote else known[key]["how"],
        }
        if reason == RIGHT:
            right.append(judged)
        elif reason == WRONG:
            wrong.append(judged)
    if store and new:
        store.append(new)
    return Verified(right, wrong, counts)


def _votes(rows: Sequence[Record], kind: str, share: float) -> dict[tuple[str, ...], str]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(_question_key(row), []).append(row)
    answers = {}
    for key, group in groups.items():
        answer, agreeing = majority_answer([row["parsed_answer"] for row in group], kind, group[0].get("choices"))
        if answer is not None and agreeing > share and round(agreeing * len(group)) > 1:  # one sample is no vote
            answers[key] = answer
    return answers


def _question_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(row["question"]), *(row.get("choices") or ()))


@dataclass
class Dual:
    """Pairs for key-step learning, right rows for fine-tuning before it (D+ and D−+), and counts."""

    pairs: list[Record]
    right: list[Record]
    counts: Counter[str]
    asked: dict[str, Asked]


def dual(
    right: Sequence[Record],
    wrong: Sequence[Record],
    model: TextModel | None,
    store: RecordStore,
    *,
    exemplars: Sequence[Mapping[str, Any]] = (),
    formats: Sequence[str] = (),
    kind: str = "auto",
    next_question: str | None = "Q:",
    progress: Progress = _quiet,
) -> Dual:
    """Pair right and wrong chains; a teacher writes the missing halves, which are verified like all others.

    Args:
        right, wrong: rows as `verify` judged them.
        model: writes D−+ (answer as a hint) and D+− (contrastive); None only pairs what is there.
    """
    shots = [dict(exemplar) for exemplar in exemplars]
    groups = by_question(right, wrong)
    chains = Dual([], list(right), Counter(), {})
    for group in groups:
        if group.right and group.wrong:
            chains.pairs += [pair(closest(group.right, failed), failed, "D+/D-") for failed in group.wrong]
    judge: dict[str, Any] = {"formats": formats, "kind": kind, "next_question": next_question}
    alone = [group for group in groups if not group.right]
    if model is not None and alone:
        prompts_of = [(group.question, prompts.hint_prompt(group.question, shots), 0) for group in alone]
        rows, chains.asked["hint"] = ask(model, prompts_of, store, "hint", progress)
        hinted = _judged(rows, chains.counts, "hint", RIGHT, **judge)
        for group in alone:
            for helped in hinted.get(_question_key(group.question), []):
                chains.pairs += [pair(helped, failed, "D-+/D-") for failed in group.wrong]
                chains.right.append(helped)
    alone = [group for group in groups if not group.wrong]
    if model is not None and alone:
        shown = [as_exemplar(row) for row in chains.pairs[: len(shots)]]
        prompts_of = []
        for group in alone:
            text = prompts.chain_text(group.right[0]["rationale"], group.right[0]["answer"])
            prompts_of.append((group.question, prompts.contrastive_prompt(group.question, text, shown, shots), 0))
        rows, chains.asked["contrast"] = ask(model, prompts_of, store, "contrast", progress)
        spoiled = _judged(rows, chains.counts, "contrast", WRONG, **judge)
        for group in alone:
            for spoilt in spoiled.get(_question_key(group.question), []):
                chains.pairs.append(pair(group.right[0], spoilt, "D+/D+-"))
    chains.counts.update(f"pair {row['source']}" for row in chains.pairs)
    return chains


def _judged(
    rows: Sequence[Record],
    counts: Counter[str],
    prompt: str,
    verdict: str,
    *,
    formats: Any,
    kind: str,
    next_question: Any,
) -> dict[tuple[str, ...], list[Record]]:
    """Rows with the wanted verdict by question; the others are counted."""
    result = verify(parse(rows, formats, next_question), kind=kind) if rows else Verified([], [], Counter())
    counts.update({f"{prompt}: {reason}": count for reason, count in result.counts.items()})
    by_key: dict[tuple[str, ...], list[Record]] = {}
    for row in result.right if verdict == RIGHT else result.wrong:
        by_key.setdefault(_question_key(row), []).append(row)
    return by_key


def _require_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str], what: str) -> None:
    if not rows:
        raise DatasetError(f"Got no {what}; expected at least one row.")
    missing = [name for name in names if name not in rows[0]]
    if missing:
        raise DatasetError(
            f"The {what} have the columns {sorted(rows[0])}, but no {' and no '.join(missing)}. Rename columns with "
            "column_mapping, or run the stage before this one."
        )
