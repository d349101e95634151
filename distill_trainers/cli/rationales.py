"""Chains of thought from a teacher, stage by stage: extract, parse, verify, dual.

distill-trainers rationales STAGE --config rationales.yaml
accelerate launch [--config_file …] -m distill_trainers.cli.rationales extract --config rationales.yaml
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..escaping import visible
from ..exceptions import ConfigurationError, DatasetError
from ..locks import holding_run
from ..redaction import redacted
from . import report_errors, say, shows_usage
from .rationale_settings import PipelineArguments, parse_arguments

if TYPE_CHECKING:
    from ..rationales.records import TextModel
    from ..rationales.stages import Asked

_REMEDY = "The rows themselves are kept: free some space and start again."
STAGES = ("extract", "parse", "verify", "dual")

_USAGE = """usage: distill-trainers rationales STAGE --config FILE [--KEY VALUE]

  extract   ask a teacher for chains of thought              questions          -> FOLDER/responses.jsonl
  parse     take responses apart into rationale and answer   responses.jsonl    -> FOLDER/parsed.jsonl
  verify    keep right answers, and say what was dropped     parsed.jsonl       -> FOLDER/verified.jsonl, wrong.jsonl
  dual      pair right with wrong chains                     verified, wrong    -> FOLDER/dual.jsonl, sft.jsonl

Each stage goes on where it was stopped. `dual --inspect` shows the pairs with their key steps. The settings are in
docs/rationales.md."""


def main(argv: Sequence[str]) -> int:
    """Run one stage; exit status 1 if some requests failed, which another run asks again."""
    if shows_usage(argv, _USAGE):
        return 0
    stage, options = argv[0], argv[1:]
    if stage not in STAGES:
        raise ConfigurationError(f"Got the stage {stage!r}; expected one of {', '.join(STAGES)}.")
    args = parse_arguments(options)
    if args.inspect and stage == "dual":
        return _inspect(args)
    with holding_run(args.folder, "folder"):
        return {"extract": _extract, "parse": _parse, "verify": _verify, "dual": _dual}[stage](args)


# ---- Stages ---------------------------------------------------------------------------------------------------------


def _extract(args: PipelineArguments) -> int:
    from ..rationales.stages import extract
    from ..storage import RecordStore

    questions = _questions(args)
    model, rank = _teacher(args)
    store = RecordStore(args.path("responses"), rank)
    rows, spent = extract(
        questions, model, store, samples=args.samples, exemplars=_exemplars(args), progress=_progress(rank)
    )
    if rank == 0:
        _export(args, "responses", rows)
        _tell_files(args, "responses.jsonl")
    return _report(args, "extract", {"cot": spent}, model, rank)


@contextlib.contextmanager
def _naming(file: Any) -> Iterator[None]:
    """Say which file rows came from that a stage refuses."""
    try:
        yield
    except DatasetError as error:
        if str(file) in str(error):
            raise
        raise DatasetError(f"{str(file)!r}: {error}") from error


def _parse(args: PipelineArguments) -> int:
    from ..rationales.stages import parse
    from ..storage import read_rows

    file = args.input or args.path("responses.jsonl")
    with _naming(file):
        parsed = parse(read_rows(file), args.answer_formats or (), args.next_question)
    _export(args, "parsed", parsed)
    counts = Counter(row["answer_format"] or "no answer" for row in parsed)
    _print_counts(f"{len(parsed)} responses", counts)
    _tell_files(args, "parsed.jsonl")
    if counts["no answer"] == len(parsed):
        _warn(f"No answer was found in any of the {len(parsed)} responses: `verify` will keep none. Set "
              "`answer_formats`, and look at a response.")  # fmt: skip
    return 0


def _verify(args: PipelineArguments) -> int:
    from ..rationales.stages import verify
    from ..storage import RecordStore, read_rows, write_rows

    file = args.input or args.path("parsed.jsonl")
    rows = read_rows(file)
    settings: dict[str, Any] = {
        "kind": args.answer_kind,
        "majority_share": args.majority_share,
        "progress": _progress(0),
    }
    with _naming(file):
        judged = verify(rows, store=RecordStore(args.path("verdicts")), **settings)
    _export(args, "verified", judged.right)
    write_rows(args.path("wrong.jsonl"), judged.wrong)
    _write_report(args, "verify", {"rows": len(rows), **judged.counts})
    _print_counts(f"{len(rows)} responses", judged.counts)
    _tell_files(args, "verified.jsonl", "wrong.jsonl")
    if not judged.right:
        told = ", ".join(f"{count:,} {reason}" for reason, count in judged.counts.most_common())
        _warn(f"None of the {len(rows)} responses was kept ({told}), so {args.path('verified.jsonl')} is empty. Look "
              "at `answer_kind`, and at the answers in the rows before and behind it.")  # fmt: skip
    return 0


def _dual(args: PipelineArguments) -> int:
    from ..rationales.stages import dual
    from ..storage import RecordStore, read_rows, write_rows

    right, wrong = read_rows(args.path("verified.jsonl")), read_rows(args.path("wrong.jsonl"))
    model, rank = _teacher(args) if args.ask_for_pairs else (None, 0)
    chains = dual(
        right,
        wrong,
        model,
        RecordStore(args.path("dual"), rank),
        exemplars=_exemplars(args),
        formats=args.answer_formats or (),
        kind=args.answer_kind,
        next_question=args.next_question,
        progress=_progress(rank),
    )
    if rank == 0:
        _export(args, "dual", chains.pairs)
        write_rows(args.path("sft.jsonl"), chains.right)
        _print_counts(f"{len(right)} right and {len(wrong)} wrong chains", chains.counts)
        _tell_files(args, "dual.jsonl", "sft.jsonl")
        if not chains.pairs:
            _warn("No question has a right and a wrong chain, so there are no pairs. Take more `samples` of each "
                  "question, or let a teacher write what is missing (`ask_for_pairs: true`).")  # fmt: skip
    return _report(args, "dual", chains.asked, model, rank)


def _inspect(args: PipelineArguments) -> int:
    from rich.console import Console

    from ..rationales.show import html_page, terminal_lines, words
    from ..storage import read_rows, write_file

    rows = read_rows(args.input or args.path("dual.jsonl"))
    split = words if args.tokenizer is None else _token_split(args.tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    for row in rows[: args.inspect_rows]:
        for line in terminal_lines(row, split):
            console.print(line)
        console.print()
    page = write_file(args.path("dual.html"), html_page(rows, split), "the page of pairs", _REMEDY)
    say(f"All {len(rows)} pairs: {page}")
    return 0


def _token_split(name: str) -> Any:
    from ..models import tokenizer_of

    tokenizer = tokenizer_of(name, "inspected")

    def split(text: str) -> list[str]:
        ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
        return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if b > a]

    return split


# ---- What stages share ----------------------------------------------------------------------------------------------


def _questions(args: PipelineArguments) -> list[dict[str, Any]]:
    from ..answers.formats import find_format
    from ..data import load_split

    if not args.questions:
        raise ConfigurationError("No questions were named; set `questions` to a file, a folder or a Hub id.")
    data = load_split(
        args.questions,
        name=args.questions_config,
        split=args.questions_split,
        column_mapping=args.column_mapping,  # type: ignore[arg-type]  # parsed by now
    )
    rows = [dict(row) for row in (data if args.max_questions is None else data.take(args.max_questions))]
    if args.reference_format:
        find = find_format(args.reference_format)
        for row in rows:
            answer_at = find(str(row.get("answer") or ""))
            row["answer"] = answer_at[1] if answer_at else None
    return rows


def _exemplars(args: PipelineArguments) -> list[dict[str, Any]]:
    from ..data import load_split
    from ..rationales.exemplars import EXEMPLARS
    from ..rationales.prompts import exemplars_of

    source = args.exemplars if args.exemplars in EXEMPLARS else [dict(row) for row in load_split(args.exemplars)]
    return exemplars_of(source, args.shots)


def _teacher(args: PipelineArguments) -> tuple[TextModel, int]:
    """The teacher, and the number of this process; an endpoint is asked by the first one alone."""
    if not args.teacher:
        raise ConfigurationError(
            "No teacher was named; set `teacher` to a folder or Hub id, or, with `base_url`, to the name of a served "
            "model. (`dual` pairs what is there with `ask_for_pairs: false`.)"
        )
    if args.base_url:
        from ..rationales.endpoint_model import EndpointSettings, RemoteTextModel

        shared = {f.name for f in fields(EndpointSettings)} & {f.name for f in fields(args)} - {"base_url"}
        settings = {name: getattr(args, name) for name in shared}
        base_url = None if args.base_url == "openai" else args.base_url
        return RemoteTextModel(EndpointSettings(args.teacher, base_url, max_tokens=args.max_new_tokens, **settings)), 0
    from accelerate import Accelerator

    from .. import models
    from ..randomness import Purpose, Role, Stream
    from ..rationales.local_model import LocalTextModel
    from ..rollouts import CompletionSettings, DecodeEngine, SamplingSettings
    from ..teachers import LocalTeacher

    if any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("DEEPSPEED", "FSDP")):
        raise ConfigurationError(
            "Got a launch configuration with DeepSpeed or FSDP; expected plain processes, such as "
            "accelerate_configs/ddp.yaml. A teacher that writes is whole on every process, so shards save no memory. "
            "For one too large for a device: `teacher_init_kwargs: {device_map: auto}`, or an endpoint (`base_url`)."
        )
    accelerator = Accelerator(cpu=args.use_cpu)
    tokenizer = models.tokenizer_of(args.teacher, "teacher", trust_remote_code=args.trust_remote_code)
    extra_kwargs: Any = args.teacher_init_kwargs or {}  # parsed by now
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **extra_kwargs}
    model = models.load_causal_lm(args.teacher, role="teacher", **init_kwargs)
    sampling = SamplingSettings(
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        eos_token_ids=models.eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    weights = LocalTeacher(model).fingerprint()
    stream = Stream(args.seed, Role.TEACHER, Purpose.RATIONALE)
    local = LocalTextModel(
        models.prepare_frozen(model, accelerator),
        tokenizer,
        CompletionSettings(sampling, stream, args.batch_size, DecodeEngine(tokenizer)),
        accelerator,
        name=args.teacher,
        weights=weights,
        style=args.prompt_style,
        next_question=args.next_question,
    )
    return local, accelerator.process_index


def _progress(rank: int) -> Any:
    from tqdm.auto import tqdm

    def show(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        return tqdm(items, total=total, desc=what, disable=rank != 0 or total == 0)

    return show


def _export(args: PipelineArguments, name: str, rows: list[dict[str, Any]]) -> None:
    from ..rationales.records import dataset_of
    from ..storage import write_rows, writing_folder

    write_rows(args.path(f"{name}.jsonl"), rows)
    if rows and args.save_as == "dataset":
        with writing_folder(args.path(f"{name}_dataset"), "the dataset", _REMEDY) as whole:
            dataset_of(rows).save_to_disk(str(whole))
    if rows and args.push_to_hub:
        from ..cards.dataset_card import Writers, push_rows

        teacher = None if args.base_url else args.teacher  # a served model has no card of that name
        writers = Writers(teacher, args.questions)
        place = push_rows(rows, args.push_to_hub, writers, private=args.hub_private_repo, token=args.hub_token)
        say(f"Uploaded to {place}.")


def _report(args: PipelineArguments, stage: str, spent: dict[str, Asked], model: Any, rank: int) -> int:
    """What was asked, answered, spent, and why requests failed: printed, and kept beside the rows."""
    from accelerate.utils import gather_object

    several = not args.base_url and model is not None and model.accelerator.num_processes > 1
    shares = gather_object([spent]) if several else [spent]
    failed = sum((entry.failed for share in shares for entry in share.values()), Counter[str]())
    totals: dict[str, Any] = {
        name: sum(getattr(entry, name) for share in shares for entry in share.values())
        for name in ("done", "prompt_tokens", "completion_tokens")
    }
    totals["known"] = sum(entry.known for entry in spent.values())
    cost = (totals["prompt_tokens"] * args.price_in + totals["completion_tokens"] * args.price_out) / 1e6
    if rank == 0 and model is not None:
        _write_report(args, stage, {**totals, "cost": cost, "failed": dict(failed)})
        print(
            f"{totals['done']:,} answered now, {totals['known']:,} before, {failed.total():,} failed; "
            f"{totals['prompt_tokens']:,} prompt and {totals['completion_tokens']:,} completion tokens"
            + (f", cost {cost:.4f}" if args.price_in or args.price_out else "")
        )
        if failed:
            _print_counts("Failed, and asked again by another run", failed)
    if several:
        model.accelerator.wait_for_everyone()  # the first process to leave with status 1 has the others ended
    return 1 if failed else 0


def _write_report(args: PipelineArguments, stage: str, report: dict[str, Any]) -> None:
    from ..storage import write_file

    text = json.dumps(report, indent=2, sort_keys=True)
    write_file(args.path(f"{stage}-report.json"), text, "the report of the stage", _REMEDY)


def _tell_files(args: PipelineArguments, *names: str) -> None:
    say(f"Written: {', '.join(str(args.path(name)) for name in names)}.")


def _warn(text: str) -> None:
    print(f"warning: {visible(redacted(text))}", file=sys.stderr)


def _print_counts(what: str, counts: Counter[str]) -> None:
    say(f"{what}: " + ", ".join(f"{count:,} {name}" for name, count in counts.most_common()))


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
