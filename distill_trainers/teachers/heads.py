"""A teacher's output head, taken apart for a file or for the wire, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..exceptions import CacheError
from ..signals import Head
from ..storage import tensor_bytes, write_atomically
from .cache.shards import row_checksum


def head_parts(head: Head) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take a whole head apart: tensors on the CPU, and what the model does to its logits, as text."""
    tensors = {"weight": head.weight.detach().to("cpu").contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().to("cpu").contiguous()
    return tensors, {"scale": repr(head.scale), "soft_cap": repr(head.soft_cap)}


def head_of(tensors: Mapping[str, Tensor], facts: Mapping[str, str], device: torch.device) -> Head:
    """Put the head together that `head_parts` took apart.

    Raises:
        KeyError, ValueError, TypeError: these are no parts of a head.
    """
    weight, bias = tensors["weight"].to(device), tensors.get("bias")
    soft_cap = None if facts["soft_cap"] == "None" else float(facts["soft_cap"])
    return Head(weight, None if bias is None else bias.to(device), float(facts["scale"]), soft_cap)


def write_head(path: Path, head: Head) -> None:
    """Save a whole head with all that belongs to it."""
    tensors, facts = head_parts(head)
    write_atomically(path, tensor_bytes(tensors, {**facts, "checksum": str(row_checksum(b"", tensors))}))


def read_head_file(path: Path, device: torch.device) -> Head:
    """Read the head that `write_head` saved.

    Raises:
        CacheError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["checksum"] != str(row_checksum(b"", tensors)):
            raise ValueError("its bytes do not have the checksum they were written with")
        return head_of(tensors, facts, device)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CacheError(
            f"The teacher's head {path} cannot be read: {error}. Delete this file and run `distill-trainers "
            "cache-teacher` again with the teacher at hand: it writes the head anew and keeps the rows."
        ) from error
