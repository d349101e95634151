"""What the rows of a teacher cache depend on beside their tokens: recorded when it is made, compared at every use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.token_bytes import TokenBytes
from ...exceptions import CacheError, ConfigurationError
from ...models import looks_like_path
from ...redaction import hidden, is_secret
from ...storage import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
_IDENTITY, _LEARNT = "identity.json", "teacher.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*", "*.py")
# Keyword arguments of `from_pretrained` that say where and how fast a model runs, not what it answers.
_WITHOUT_EFFECT = {
    "attn_implementation",
    "cache_dir",
    "device_map",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "revision",  # the commit tells
    "token",
    "trust_remote_code",
}

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CacheIdentity:
    """All that must be equal for two runs to share a cache.

    Attributes:
        kind: `hidden`, `topk`, `sampled`, `next_bytes` or `token_logprobs`.
        dtype: of what is stored; None keeps hidden states as the teacher gives them, and log-probabilities in float32.
        top_k, draws, seed: of the sparse kinds; None where they mean nothing.
        vocab_size: ids in the teacher's softmax; for `hidden`, rows of its head.
        tokenizer: `tokenizer_fingerprint` of the ids in the rows; of `next_bytes` also `first_bytes_fingerprint`.
        autocast: precision that the teacher computes in beside its own: `no`, `bf16` or `fp16`.
        teacher_rows: rows of the teacher's head.
        teacher_settings: keyword arguments of `from_pretrained` that change its answers.
        teacher: its name, for messages only.
        files: what tells its weights without loading them (see `describe_source`), for a teacher given by name.
        weights: its fingerprint in memory, for a teacher given as a model.
    """

    kind: str
    vocab_size: int
    tokenizer: str
    autocast: str
    teacher_rows: int
    dtype: str | None = None
    top_k: int | None = None
    draws: int | None = None
    seed: int | None = None
    teacher_settings: dict[str, str] = field(default_factory=dict)
    teacher: str = ""
    files: Files | None = None
    weights: str | None = None
    format: int = FORMAT

    def stamp(self) -> str:
        """Return a short name for the identity, written into every shard."""
        content = {k: v for k, v in asdict(self).items() if k not in ("teacher", "files")}
        # Times and sizes are short cuts to the same contents.
        content["contents"] = {name: facts.get("sha256", facts) for name, facts in (self.files or {}).items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_MEANINGS = {
    "format": "format of the cache",
    "kind": "teacher_cache_kind",
    "dtype": "teacher_cache_dtype",
    "top_k": "teacher_cache_top_k",
    "draws": "teacher_cache_draws",
    "seed": "seed",
    "tokenizer": "tokenizer (which id stands for which token)",
    "vocab_size": "vocabulary size",
    "teacher_rows": "rows of the teacher's head",
    "teacher_settings": "teacher_model_init_kwargs",
    "autocast": "mixed precision (bf16, fp16)",
}


def read_identity(folder: str | Path) -> CacheIdentity | None:
    """Read the identity of the cache in `folder`; None if there is no cache.

    Raises:
        CacheError: the file is there but is not an identity that this version knows.
    """
    file = Path(folder) / _IDENTITY
    if not file.is_file():
        return None
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if recorded.get("format") != FORMAT:
            raise ValueError(f"it has format {recorded.get('format')}, this version reads {FORMAT}")
        return CacheIdentity(**recorded)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{file} does not describe a teacher cache: {error}. Delete the folder, or name another in `teacher_cache`."
        ) from error


def write_identity(folder: str | Path, identity: CacheIdentity) -> None:
    """Record what a new cache depends on."""
    write_atomically(Path(folder) / _IDENTITY, json.dumps(asdict(identity), indent=2, sort_keys=True).encode())


def read_learnt(folder: str | Path) -> dict[str, Any]:
    """Read what was learnt when the teacher was loaded, `weights` and `eos_token_ids`; empty before that."""
    file = Path(folder) / _LEARNT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_learnt(folder: str | Path, learnt: Mapping[str, Any]) -> None:
    """Record what only a loaded teacher tells, so that later runs need not load it."""
    write_atomically(Path(folder) / _LEARNT, json.dumps(dict(learnt), indent=2, sort_keys=True).encode())


def refuse_differences(
    folder: str | Path, recorded: CacheIdentity, now: CacheIdentity, setting: str = "teacher_cache"
) -> None:
    """Refuse a cache that was made under other settings, tokenizer or teacher than those of this run.

    Args:
        setting: the one that names the folder, for the message.

    Raises:
        ConfigurationError: naming all that differs.
    """
    differences = [
        f"{meaning}: {_told(recorded, name)!r} then, {_told(now, name)!r} now"
        for name, meaning in _MEANINGS.items()
        if _told(recorded, name) != _told(now, name)
        and (name != "teacher_settings" or now.weights is None)  # a model's weights show what they did to it
    ]
    differences += _teacher_differences(folder, recorded, now)
    if differences:
        raise ConfigurationError(
            f"The teacher cache {str(folder)!r} was made by {recorded.teacher!r} under other conditions, so its "
            f"answers are not this run's: {'; '.join(differences)}. Name another folder in `{setting}` "
            "(or delete this one), or set back what was changed."
        )


def _told(identity: CacheIdentity, name: str) -> Any:
    """What is compared; caches made by earlier versions may hold more than that."""
    value = getattr(identity, name)
    if name == "dtype" and identity.kind != "hidden":
        return value or "float32"
    return answering_settings(value) if name == "teacher_settings" else value


def _teacher_differences(folder: str | Path, recorded: CacheIdentity, now: CacheIdentity) -> list[str]:
    if now.files is not None and recorded.files is not None:
        return [f"teacher {now.teacher!r}: {difference}" for difference in _file_differences(recorded.files, now.files)]
    if now.weights is not None:
        then = recorded.weights or read_learnt(folder).get("weights")
        same = then == now.weights
        return [] if same else [f"weights or configuration of the teacher: {then} then, {now.weights} now"]
    return ["the teacher was given as a model then and by name now, which cannot be compared"]


def _file_differences(recorded: Files, now: Files) -> list[str]:
    if recorded.keys() != now.keys():
        return [f"its files were {sorted(recorded)} and are {sorted(now)}"]
    differences = []
    for name, then in recorded.items():
        current = now[name]
        if "path" in current and all(then.get(key) == current[key] for key in ("size", "mtime_ns")):
            continue
        known = current.get("sha256") or current.get("commit")
        if known is None and then.get("size") == current["size"]:
            known = _sha256(Path(current["path"]))  # moved or copied, perhaps
        if known is None or known != (then.get("sha256") or then.get("commit")):
            differences.append(f"{name} has changed")
    return differences


def describe_source(name: str, revision: str | None = None) -> Files:
    """Tell, file by file, the weights of a model folder or Hub repository, without loading them.

    Local weight files come with size, time of change and path; `hashed` adds their contents. Configurations come with
    the hash of what they say. A Hub repository is told by its commit.

    Raises:
        ConfigurationError: the folder holds no weights, or the Hub's copy here does not say its commit.
    """
    if not looks_like_path(name):
        return {f"Hub repository {name}": {"commit": _commit(name, revision)}}
    folder = Path(os.path.expanduser(name))
    paths = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    if not any(path.suffix != ".py" for path in paths):
        raise ConfigurationError(
            f"The teacher folder {name!r} holds no weights ({', '.join(_WEIGHTS[:3])}), by which a teacher cache is "
            "known to be its. Point to the whole model; its weights are compared, not loaded."
        )
    files: Files = {}
    for path in paths:
        status = path.stat()
        files[path.name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "path": str(path)}
    for config in ("config.json", "adapter_config.json"):
        if (folder / config).is_file():
            content = json.loads((folder / config).read_text(encoding="utf-8"))
            for noise in ("transformers_version", "_name_or_path"):
                content.pop(noise, None)
            files[config] = {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
            if base := content.get("base_model_name_or_path"):
                files |= {f"base model's {name}": facts for name, facts in describe_source(base).items()}
    return files


def hashed(files: Files) -> Files:
    """Return `files` as they are recorded: with the SHA-256 of every weight file, without paths."""
    done: Files = {}
    for name, facts in files.items():
        done[name] = {key: value for key, value in facts.items() if key != "path"}
        if "path" in facts:
            done[name]["sha256"] = _sha256(Path(facts["path"]))
    return done


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(name: str, revision: str | None) -> str:
    from transformers.utils import cached_file

    file = cached_file(name, "config.json", revision=revision)
    snapshot = Path(file).parent if file else Path()
    if snapshot.parent.name != "snapshots":
        raise ConfigurationError(
            f"The copy of {name!r} on this machine does not say its commit (got {file}), by which a teacher cache is "
            "known to be its. Download the model into a folder and name that as the teacher."
        )
    return snapshot.name


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identify which id stands for which token, all that stored answers depend on."""
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def first_bytes_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Identify with which byte each id begins, and which ids end a text; None of a tokenizer that loses text."""
    tokens = TokenBytes.of_readable(tokenizer)
    return None if tokens is None else hashlib.sha256(tokens.first_bytes().numpy().tobytes()).hexdigest()[:16]


def answering_settings(init_kwargs: Mapping[str, Any] | None) -> dict[str, str]:
    """Write the keyword arguments of `from_pretrained` that change what a model answers as text."""
    given = {k: v for k, v in (init_kwargs or {}).items() if k not in _WITHOUT_EFFECT and not is_secret(k)}
    return {name: str(hidden(given[name])).removeprefix("torch.") for name in sorted(given)}
