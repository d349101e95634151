"""Is all that messages say in the text that a chat template made of them?

Each text is looked for behind the one before it. Templates may trim a text, write it as JSON, put the system message
elsewhere, and leave out what earlier turns thought. A short text may be found by chance, so `stand_ins` gives the same
conversation with texts that cannot be: a template that drops a message drops its stand-in.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from distill_trainers.data.messages import THINKING, Message

_SHOWN_PART = re.compile(r"""['"]type['"]: ?['"]text['"]""")
_THOUGHT = re.compile(r"</?think>")


@dataclass(frozen=True)
class Piece:
    """Something that a message says: its text, its thinking, or of a tool call the name, an argument's name or value.

    Attributes:
        what: one of `text`, `thinking`, `tool call`, `tool`.
    """

    number: int
    role: str
    what: str
    text: str
    spellings: tuple[str, ...] = ()


def lost_piece(
    messages: Sequence[Message], text: str, *, thinking: Collection[int] = (), tools: Any = None
) -> Piece | None:
    """Return the first piece of `messages` or `tools` that the rendered text lacks, or None.

    Args:
        thinking: numbers of the messages whose thinking must be there, too.
        tools: schemas of functions, whose names must be there.
    """
    for tool in tools or ():
        name = (tool.get("function") or tool).get("name") if isinstance(tool, Mapping) else None
        if isinstance(name, str) and name not in text:
            return Piece(-1, "tools", "tool", name)
    place = 0
    for group in _groups(messages, thinking):
        ends = [place]
        for piece in group:
            # Where the system message goes is the template's own business.
            end = _end_of(piece, text, 0 if piece.role in ("system", "developer") else place)
            if end is None:
                return piece
            if piece.role not in ("system", "developer"):
                ends.append(end)
        place = max(ends)
    return None


def is_garbled(form: Sequence[Message], text: str) -> bool:
    """Tell whether a form that is no usual one was shown as a value, instead of being read: a list, or JSON in JSON."""
    if any(isinstance(message["content"], list) for message in form) and _SHOWN_PART.search(text):
        return True
    calls = (call["function"]["arguments"] for message in form for call in message.get("tool_calls", ()))
    return any(isinstance(arguments, str) and arguments not in text for arguments in calls)


def stand_ins(messages: Sequence[Message]) -> list[Message]:
    """Put a text of its own for every text; roles, keys and numbers stay."""
    number = 0

    def stand_in(text: Any) -> Any:
        nonlocal number
        if not isinstance(text, str) or not text.strip():
            return text
        number += 1
        return f"Stand{number}in"

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else stand_in(value)

    copies = []
    for message in messages:
        copy = {key: stand_in(value) if key in (*THINKING, "content") else value for key, value in message.items()}
        if "tool_calls" in message:
            copy["tool_calls"] = [{**call, "function": replaced(call["function"])} for call in message["tool_calls"]]
        copies.append(copy)
    return copies


def _groups(messages: Sequence[Message], thinking: Collection[int]) -> Iterator[list[Piece]]:
    """Pieces between which no order is asked for: a message's own, and tool calls with the results that follow."""
    group: list[Piece] = []
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            yield group
            group = []
        group += _pieces(message, number, number in thinking)
    yield group


def _pieces(message: Message, number: int, thinks: bool) -> Iterator[Piece]:
    role, content = message["role"], message["content"]
    if thinks:
        for name in THINKING:
            if str(message.get(name, "")).strip():
                yield Piece(number, role, "thinking", message[name])
    if isinstance(content, str) and role == "assistant" and "</think>" in content:
        *thoughts, answer = filter(str.strip, _THOUGHT.split(content))
        if not content.rstrip().endswith("</think>"):
            yield Piece(number, role, "text", answer)
        else:
            thoughts.append(answer)
        yield from (Piece(number, role, "thinking", thought) for thought in thoughts if thinks)
    elif isinstance(content, str):
        yield Piece(number, role, "text", content)
    elif content is not None:
        indents = (json.dumps(content, ensure_ascii=False, indent=indent) for indent in (None, 2, 4))
        tight = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        yield Piece(number, role, "text", json.dumps(content), (*indents, tight))
    for call in message.get("tool_calls", ()):
        yield Piece(number, role, "tool call", call["function"]["name"])
        yield from (Piece(number, role, "tool call", *leaf) for leaf in _leaves(call["function"]["arguments"]))


def _leaves(value: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), ()
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield str(value), () if isinstance(value, str) else (json.dumps(value, default=str),)


def _end_of(piece: Piece, text: str, start: int) -> int | None:
    wanted = piece.text.strip()
    spellings = (wanted, *piece.spellings)
    if piece.what == "text" and not piece.spellings:
        place = text.find(wanted, start)
        if place >= 0:  # nearly always
            return place + len(wanted)
        spellings = tuple(json.dumps(wanted, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    # The first place of all spellings, so that a later one never hides what follows.
    ends = [place + len(spelling) for spelling in spellings if (place := text.find(spelling, start)) >= 0]
    if not (ends and wanted.isalnum()) and _pattern(wanted[:50]).search(text, start):  # patterns of long texts are slow
        found = _pattern(wanted).search(text, start)
        ends += [found.end()] if found else []
    return min(ends, default=None)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join(map(_escaped, text)))


@lru_cache(maxsize=4096)
def _escaped(character: str) -> str:
    """A pattern of a character as JSON, other languages' strings, or Jinja's filters write it."""
    plain = re.escape(character)
    if character.isascii() and character.isalnum():
        return plain
    ways = (json.dumps(character)[1:-1], f"\\{character}", f"\\u{ord(character):04x}", html.escape(character))
    return f"(?:{'|'.join(dict.fromkeys((*map(re.escape, ways), plain)))})"
