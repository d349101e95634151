"""The Hugging Face Hub: who may write there, what goes there, and what to do when it does not work."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .exceptions import ConfigurationError, HubError
from .redaction import redacted

# What of a run is published: files that loading the student or reading its card takes, and the scores. Anything else in
# the folder stays: answers of models, data, logs, and pickled arguments with paths and perhaps a token in them.
_NAMES = {"README.md", "metrics.json", "config.json", "generation_config.json", "adapter_config.json"}
_NAMES |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
_NAMES |= {"vocab.txt", "merges.txt", "normalizer.json", "tekken.json", "chat_template.jinja", "chat_template.json"}
_NAMES |= {"preprocessor_config.json", "processor_config.json"}
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors")
_PATTERNS = (*_WEIGHTS, "*.model", "*.tiktoken")
_FOLDERS = ("plots/*.png", "additional_chat_templates/*.jinja")
# Of a checkpoint everything goes that a run takes to go on, but for these: hidden files (those of shards aside), locks,
# half-written files, keys, and pickled arguments with paths of this machine.
_NEVER: tuple[str, ...] = (
    ".*",
    "*~",
    "*.lock",
    "*.tmp",
    "*.temp",
    "*.part",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
)
_NEVER += ("id_ed25519*", "training_args.bin")
# Weights that an upload replaces: left beside the new ones, they would be loaded in their place.
WEIGHTS = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*",
    "adapter_model*",
    "adapter_config.json",
]


def address_of(name: str) -> str:
    """Return the page of a model of that name."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def published_files(folder: str | Path) -> list[str]:
    """List what of a model's folder is uploaded, by its path in there.

    Raises:
        ConfigurationError: a file is a link to a place outside.
    """
    folder = Path(folder)
    files = [file for file in folder.iterdir() if file.is_file() and _is_published(file.name)]
    files += [file for pattern in _FOLDERS for file in folder.glob(pattern) if file.is_file()]
    return _within(folder, [*files, *_own_code(folder)])


def checkpoint_files(folder: str | Path) -> list[str]:
    """List what of a checkpoint is uploaded, by its path in there: all that a run goes on from.

    Raises:
        ConfigurationError: as `published_files`.
    """
    folder = Path(folder)
    kept = [file for file in folder.rglob("*") if not _is_never(file.relative_to(folder))]
    _within(folder, [file for file in kept if file.is_symlink()])  # of folders too, which `rglob` does not follow
    return _within(folder, [file for file in kept if file.is_file()])


def _is_published(name: str) -> bool:
    return name in _NAMES or (any(fnmatch.fnmatchcase(name, p) for p in _PATTERNS) and not _is_never(Path(name)))


def _is_never(path: Path) -> bool:
    if path.name == ".metadata" and path.parent.name:  # of FSDP2's shards
        path = path.parent
    return any(fnmatch.fnmatchcase(part, pattern) for part in path.parts for pattern in _NEVER)


def _own_code(folder: Path) -> set[Path]:
    """Modules that a model brings, by its configs' `auto_map`, and those beside them that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    maps = [read_json(folder / name).get("auto_map") for name in ("config.json", "tokenizer_config.json")]
    named = [re.findall(r"([\w.]+)\.\w+", json.dumps(found)) for found in maps if found]
    files = {folder / f"{module}.py" for modules in named for module in modules}
    files = {file for file in files if file.is_file()}
    for file in list(files):
        with contextlib.suppress(OSError):  # it imports what is not there
            files |= {Path(other) for other in get_relative_import_files(str(file))}
    return files


def _within(folder: Path, files: Iterable[Path]) -> list[str]:
    """Paths of files in their folder; a link to a place outside would publish what nobody put there."""
    names = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ConfigurationError(
                f"{name!r} in {str(folder)!r} is a link to a place outside of that folder, which is not uploaded. Put "
                "a copy of the file in its place, or take the link away."
            )
        names.append(name)
    return sorted(names)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none that can be read."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def patterns_of(names: Sequence[str]) -> list[str]:
    """Return patterns that match these names and no others."""
    return [glob.escape(name) for name in names]


def stale_weights(folder: str | Path) -> list[str]:
    """Return patterns of files to delete in a repository that gets `folder`'s weights; none without weights."""
    return list(WEIGHTS) if any(any(Path(folder).glob(pattern)) for pattern in _WEIGHTS) else []


@contextlib.contextmanager
def talking_to_hub(what: str, remedy: str = "") -> Iterator[None]:
    """Tell, within it, errors of the Hub and of the network with their cause and what to do.

    Raises:
        HubError: `what` could not be done.
    """
    try:
        yield
    except (HubError, ConfigurationError):
        raise
    except Exception as error:  # huggingface_hub passes on those of its HTTP and Xet clients, which change
        raise HubError(f"Could not {what}: {reason(error)} {remedy}".strip()) from error


def reason(error: BaseException) -> str:
    """Say why the Hub was not to be had, and what to do, in a sentence or two, without the token."""
    return redacted(_reason(error))


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled):
            return "offline mode is on. Unset HF_HUB_OFFLINE, or leave the upload out."
        if isinstance(link, LocalTokenNotFoundError):
            return "there is no token. Log in with `hf auth login`, set HF_TOKEN, or pass `hub_token`."
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            status = link.response.status_code
            if status == 401:
                return "the Hub does not accept the token (401). Log in anew with `hf auth login`, or fix HF_TOKEN."
            if status == 403:
                return "the token may not write there (403). Take one with write access, or a name of your own."
            message = (link.server_message or str(link)).strip().partition("\n")[0].rstrip(".")
            return f"the Hub answered {status}: {message}."
    broken = next((link for link in chain if type(link).__module__.startswith(("http", "ssl", "socket"))), None)
    shown = broken or error
    message = f"{type(shown).__name__}: {str(shown).strip().partition(chr(10))[0]}".rstrip(".")
    return f"the Hub cannot be reached, or the connection broke ({message})." if broken else f"{message}."


def check_access(
    repo_id: str,
    *,
    repo_type: str = "model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """See that the token may write into a repository, which need not be there yet; return its full name.

    Raises:
        ConfigurationError: the token is missing, wrong or may only read, the name cannot be one of the Hub's, the
            repository is another's, or it is public where a private one was asked for.
        HubError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(
            f"Got the repository {repo_id!r}; expected `owner/name`, of letters, digits, `-`, `_` and `.`. "
            "Set `hub_model_id`."
        ) from error
    api = HfApi(token=token)
    try:
        with talking_to_hub(f"ask the Hub about {repo_id!r}"):
            user = api.whoami()
            full = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
            if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
                raise ConfigurationError(
                    f"The token of {user['name']!r} may only read, so nothing can be uploaded to {full!r}. Make one "
                    "with write access, and log in with `hf auth login` or set HF_TOKEN."
                )
            if not api.repo_exists(full, repo_type=repo_type):
                _check_owner(full, user)
                return full
            api.auth_check(full, repo_type=repo_type, write=True)
            is_private = api.repo_info(full, repo_type=repo_type).private
            if revision is not None:
                api.create_branch(full, repo_type=repo_type, branch=revision, exist_ok=True)
    except HubError as error:
        cause = error.__cause__
        refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403)
        if refused or isinstance(cause, LocalTokenNotFoundError):
            raise ConfigurationError(str(error)) from cause  # to be fixed before anything is computed
        raise
    if private and is_private is False:
        raise ConfigurationError(
            f"A private repository was asked for, but {full!r} is there and public. Make it private in its settings, "
            "or name another."
        )
    return full


def _check_owner(repo_id: str, user: dict[str, Any]) -> None:
    owner = repo_id.partition("/")[0]
    known = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in known:
        raise ConfigurationError(
            f"There is no repository {repo_id!r}, and {user['name']!r} cannot make one there; expected an owner out of "
            f"{', '.join(known)}."
        )


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str,
    only: Sequence[str] | None = None,
) -> str:
    """Upload a folder, making the repository if need be; one that was interrupted goes on where it stopped.

    Files that are there already are not sent again. Weights in the repository that are not in the folder are deleted.

    Args:
        only: paths in the folder; by default `published_files`.

    Returns:
        the address of the repository.

    Raises:
        ConfigurationError, HubError: see `check_access`; and where the upload fails.
    """
    from huggingface_hub import HfApi

    names = published_files(folder) if only is None else only
    full = check_access(repo_id, repo_type=repo_type, token=token, private=private, revision=revision)
    api = HfApi(token=token)
    again = f"Nothing in {str(folder)!r} was changed; the same command goes on where this one stopped."
    with talking_to_hub(f"upload to {full!r}", again):
        url = api.create_repo(full, repo_type=repo_type, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(full, repo_type=repo_type, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=full,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            allow_patterns=patterns_of(names),
            delete_patterns=stale_weights(folder) if repo_type == "model" else None,
        )
    return str(url)


def hub_ids_of(dataset: Any) -> Iterator[str]:
    """Name the datasets of the Hub that rows came from, as far as `datasets` remembers it."""
    checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    matches = [re.match(r"hf://datasets/([^@]+)@", str(url)) for url in checksums]
    yield from dict.fromkeys(match[1] for match in matches if match)
