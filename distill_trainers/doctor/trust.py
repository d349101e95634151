"""What a recipe runs beside this package, and what it sends where: told before a run, for its user to judge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..exceptions import ConfigurationError
from ..recipe.checks import student_and_teacher
from ..recipe.parse import Recipe
from ..teachers.loading import each_teacher, has_files, kind_of
from ..teachers.members import read_members
from .findings import Finding, note

_STAYS_HERE = ("none", "tensorboard", "codecarbon", "flyte")  # of `report_to`
_READ_ON = "docs/security.md says what is trusted with what."


def check_trust(recipe: Recipe) -> Iterator[Finding]:
    """Find code that is none of this package's, and addresses that data, texts or weights are sent to."""
    yield from _code(recipe)
    yield from _sent(recipe)


def _members(teacher: Any, args: Any) -> list[Any]:
    """Each teacher of the recipe; none where what it says of several cannot be read, which is another finding."""
    try:
        return list(each_teacher(read_members(teacher, args), args))
    except ConfigurationError:
        return []


def _code(recipe: Recipe) -> Iterator[Finding]:
    student, teacher = student_and_teacher(recipe)
    roles = [("student", student, recipe.args, "model_init_kwargs")]
    for _, member in _members(teacher, recipe.args):
        if has_files(member.given, member.options):
            roles.append(("teacher", member.given, member.options, "teacher_model_init_kwargs"))
    for role, name, args, setting in roles:
        kwargs: Any = getattr(args, setting) or {}
        if kwargs.get("trust_remote_code", args.trust_remote_code):
            what = f"This recipe runs code that comes with the {role} {name!r}, if it has some (`trust_remote_code`)."
            yield note("trust", what, f"Read that code first, or leave the setting out. {_READ_ON}")
        given = recipe.model.attn_implementation if role == "student" else None
        for kernel in {str(kwargs.get("attn_implementation", given)), str(kwargs.get("experts_implementation"))}:
            if "/" in kernel:
                what = f"This recipe runs compiled code of the Hub's {kernel!r} in the {role} (`attn_implementation`)."
                yield note("trust", what, f"Take `sdpa`, which comes with torch. {_READ_ON}")
        if kwargs.get("use_kernels"):
            what = f"This recipe runs compiled code of the Hub in the {role} (`use_kernels`)."
            yield note("trust", what, f"Leave it out of `{setting}`. {_READ_ON}")


def _sent(recipe: Recipe) -> Iterator[Finding]:
    _, teacher = student_and_teacher(recipe)
    args: Any = recipe.args
    for _, member in _members(teacher, args):
        if kind_of(member.given, member.options).may_be_away:
            what = f"This recipe sends the token ids of its rows, and of what the student writes, to {member.given}."
            yield note("trust", what, f"See that it is the server that you mean. {_READ_ON}")
    options = args.vllm_kwargs or {}
    if args.rollout_engine == "vllm" and options.get("mode") == "server":
        place = options.get("server_base_url") or f"{options.get('server_host', '0.0.0.0')}, the vLLM server"
        what = f"This recipe sends its prompts and the student's weights to {place}."
        yield note("trust", what, f"See that it is the server that you mean. {_READ_ON}")
    trackers = [str(name) for name in args.report_to if name not in _STAYS_HERE]
    if trackers:
        what = f"This recipe sends settings, metrics and some texts of the run to {', '.join(trackers)} (`report_to`)."
        yield note("trust", what, f"Set `report_to: none` to keep them here. {_READ_ON}")
    if args.push_to_hub:
        what = f"This recipe uploads the student to the Hub ({args.hub_model_id or 'named after `output_dir`'})."
        yield note("trust", what, f"Leave `push_to_hub` out to keep it here. {_READ_ON}")
