"""Students on a Hub, over HTTP: pushed, interrupted, refused, pulled, and the same as before."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, pipeline

from distill_trainers import hub as hub_module
from distill_trainers.exceptions import ConfigurationError, HubError
from distill_trainers.toy import addition_dataset

PROMPT = "37+58="
PUSH = {"push_to_hub": True, "hub_model_id": "me/student", "hub_strategy": "end", "lmbda": 0.0}


def _tokens(model, tokenizer, count=12):
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    return model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)


def _lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _names(hub, name="me/student", **where):
    return set(hub.files(name, **where))


# ---- There and back -------------------------------------------------------------------------------------------------


def test_a_student_comes_back_and_writes_the_same(make_trainer, hub, tokenizer):
    trainer = make_trainer(eval_dataset=addition_dataset(8, seed=5), learning_rate=1e-2, max_steps=10, **PUSH)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    pulled, its = AutoModelForCausalLM.from_pretrained("me/student"), AutoTokenizer.from_pretrained("me/student")
    assert its(PROMPT).input_ids == tokenizer(PROMPT).input_ids
    written = _tokens(trainer.model, tokenizer)
    assert torch.equal(_tokens(pulled, its), written)
    text = pipeline("text-generation", model="me/student")(PROMPT, max_new_tokens=12, do_sample=False)
    assert text[0]["generated_text"] == tokenizer.decode(written[0], skip_special_tokens=True)
    card = ModelCard.load("me/student")
    assert {result.metric_type for result in card.data.eval_results} >= {"kl", "top1_agreement", "perplexity"}
    assert "model.safetensors" in _names(hub) and hub.repos[("models", "me/student")].private is False


def test_the_uploaded_card_says_what_push_to_hub_was_told(make_trainer, hub):
    """As TRL's scripts call it, with `dataset_name`; other words are those of `create_model_card`."""
    trainer = make_trainer(max_steps=1, **PUSH)
    trainer.train()
    trainer.push_to_hub(dataset_name="org/rows", language="en", tags="sums")
    data = ModelCard.load("me/student").data
    assert data.datasets == ["org/rows"] and data.language == "en" and "sums" in data.tags


def test_an_adapter_comes_back_on_a_base_of_the_hub(make_trainer, make_student, hub, tokenizer, tmp_path):
    make_student().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    hub_module.upload(tmp_path / "base", "me/base", message="base")
    trainer = make_trainer("me/base", peft_config=_lora(), learning_rate=3e-2, max_steps=10, **PUSH)
    trainer.train()
    trainer.push_to_hub()
    names = _names(hub)
    assert "adapter_model.safetensors" in names and not any(name.startswith("model") for name in names)
    assert ModelCard.load("me/student").data.base_model == "me/base"
    written = _tokens(trainer.model, tokenizer)
    assert torch.equal(_tokens(AutoModelForCausalLM.from_pretrained("me/student"), tokenizer), written)
    assert not torch.equal(written, _tokens(make_student(), tokenizer))  # the adapter does something


def test_a_merged_student_has_the_adapters_logits(make_trainer, hub, tokenizer):
    trainer = make_trainer(peft_config=_lora(), merge_adapter=True, learning_rate=3e-2, max_steps=10, **PUSH)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.push_to_hub()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    names = _names(hub)
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    pulled, ids = AutoModelForCausalLM.from_pretrained("me/student"), torch.tensor([[4, 5, 12, 6, 13]])
    assert torch.allclose(pulled(ids).logits, trainer.model.eval()(ids).logits, atol=1e-4)
    assert torch.equal(_tokens(pulled, tokenizer), _tokens(trainer.model, tokenizer))
    assert not any("forward" in vars(module) for module in pulled.modules())


def test_a_chat_student_ends_its_turns_on_first_load(make_trainer, make_student, hub, tokenizer):
    """The template ends turns with a token that neither tokenizer nor model call an end."""
    chatting = copy.deepcopy(tokenizer)
    chatting.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    chatting.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}={% else %}{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}"
    )
    student = make_student()
    student.resize_token_embeddings(len(chatting))
    student.generation_config.temperature = 0.7  # transformers refuses to save it without do_sample
    trainer = make_trainer(student, teacher=copy.deepcopy(student), tok=chatting, **PUSH)
    trainer.train()
    trainer.push_to_hub()
    end = chatting.convert_tokens_to_ids("<|end|>")
    pulled = AutoModelForCausalLM.from_pretrained("me/student")
    assert set(pulled.generation_config.eos_token_id) == {end, tokenizer.eos_token_id}
    assert pulled.generation_config.pad_token_id == tokenizer.pad_token_id
    its = AutoTokenizer.from_pretrained("me/student")
    assert its.chat_template == chatting.chat_template
    pulled.lm_head = torch.nn.Linear(pulled.config.hidden_size, len(its))  # it always says <|end|>, and stops there
    torch.nn.init.zeros_(pulled.lm_head.weight)
    pulled.lm_head.bias.data = torch.nn.functional.one_hot(torch.tensor(end), len(its)).float()
    ids = its.apply_chat_template([{"role": "user", "content": "1+2"}], return_tensors="pt", return_dict=True)
    assert pulled.generate(**ids, max_new_tokens=5, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 1


# ---- While training -------------------------------------------------------------------------------------------------


def test_checkpoints_are_uploaded_while_training(make_trainer, hub):
    settings = {
        **PUSH,
        "hub_strategy": "checkpoint",
        "save_strategy": "steps",
        "save_steps": 2,
        "hub_always_push": True,
    }
    trainer = make_trainer(max_steps=4, **settings)
    trainer.train()
    trainer._finish_current_push()
    messages = hub.repos[("models", "me/student")].messages
    assert any("Training in progress, step 2" in message for message in messages)
    names = _names(hub)
    assert {
        "model.safetensors",
        "README.md",
        "last-checkpoint/optimizer.pt",
        "last-checkpoint/trainer_state.json",
    } <= names
    assert not any(name.endswith("training_args.bin") for name in names)
    folder = snapshot_download("me/student", allow_patterns="last-checkpoint/*")
    again = make_trainer(max_steps=6, lmbda=0.0, resume_anyway=True)
    again.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    assert again.state.global_step == 6


@pytest.mark.parametrize("always", [True, False])
def test_files_are_not_rewritten_while_they_are_uploaded(make_trainer, hub, monkeypatch, always):
    trainer = make_trainer(**{**PUSH, "hub_strategy": "every_save", "hub_always_push": always})
    happened = []

    class Running:
        def is_done(self):
            return "waited" in happened

        def wait_until_done(self):
            happened.append("waited")

    trainer.push_in_progress = Running()
    monkeypatch.setattr(trainer, "create_model_card", lambda: happened.append("card"))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: happened.append("files"))
    trainer._push_from_checkpoint("checkpoint-2")
    assert happened == (["waited", "card", "files"] if always else [])


def test_a_failed_upload_beside_training_is_told_and_costs_no_training(make_trainer, hub, caplog):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1, **{**PUSH, "hub_strategy": "every_save"})
    hub.breaks = 1000
    with caplog.at_level(logging.WARNING, "distill_trainers"):
        trainer.train()
        trainer._finish_current_push()
    assert trainer.state.global_step == 2
    assert "An upload to 'me/student' failed, and training goes on: the Hub cannot be reached" in caplog.text
    hub.breaks = 0
    trainer.push_to_hub()
    assert "model.safetensors" in _names(hub)


# ---- Interrupted ----------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_once_is_tried_again(make_trainer, hub):
    trainer = make_trainer(**PUSH)
    trainer.train()
    hub.breaks = 2
    trainer.push_to_hub()
    assert hub.breaks == 0 and "model.safetensors" in _names(hub)


def test_an_interrupted_upload_goes_on_where_it_stopped(make_trainer, hub, tmp_path, tokenizer):
    """Weights in several files: those that arrived are not sent again, and the student is there all the while."""
    trainer = make_trainer(**PUSH)
    trainer.train()
    folder = tmp_path / "parts"
    trainer.model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) >= 3

    # All but the last arrive; then the connection breaks for good, halfway in a file.
    count = len(parts)
    hub.break_after = count - 1
    with pytest.raises(HubError, match=r"Could not upload to 'me/parts'.*connection broke.*same command goes on"):
        hub_module.upload(folder, "me/parts", message="first try")
    arrived = list(hub.received)
    assert 0 < len(arrived) < count and "config.json" not in _names(hub, "me/parts")
    assert all(part.is_file() for part in parts)
    hub.break_after = None
    hub_module.upload(folder, "me/parts", message="second try")
    assert sorted(set(hub.received)) == sorted(hub.received), "a file that had arrived was sent again"
    assert len(hub.received) == count
    pulled = AutoModelForCausalLM.from_pretrained("me/parts")
    assert torch.equal(_tokens(pulled, tokenizer), _tokens(trainer.model, tokenizer))


def test_what_has_not_changed_is_not_sent_again(make_trainer, hub):
    trainer = make_trainer(**PUSH)
    trainer.train()
    trainer.push_to_hub()
    sent = len(hub.received)
    trainer.push_to_hub()
    assert sent == len(hub.received)


def test_weights_of_another_kind_do_not_stay_behind(make_trainer, hub, tmp_path):
    """A repository that held an adapter, or weights in parts, would be loaded as that."""
    repo = hub.add("me/student", "---\nlicense: mit\n---\n")
    file = type(next(iter(repo.commits[repo.branches["main"]].values())))
    old = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "notes.md"]
    old += ["model.safetensors.index.json", "last-checkpoint/adapter_model.safetensors"]
    repo.commit("main", {name: file(b"{}", False) for name in old}, "old")
    trainer = make_trainer(**PUSH)
    trainer.train()
    trainer.push_to_hub()
    left = _names(hub) & set(old)
    assert left == {"notes.md", "last-checkpoint/adapter_model.safetensors"}


# ---- Private --------------------------------------------------------------------------------------------------------


def test_nothing_private_is_uploaded(make_trainer, hub, tmp_path):
    folder = tmp_path / "out"
    trainer = make_trainer(hub_token="hf_writer", seq_kd=True, teacher_cache=str(folder / "cache"), **PUSH)
    trainer.train()
    for name in ("pairs.jsonl", "evaluation.json", "notes.txt", "secret.py", "student_init/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    trainer.save_state()
    trainer.push_to_hub()
    assert any((folder / "completions").iterdir()) and any((folder / "cache").iterdir())
    names = _names(hub)
    assert names == {name for name in names if "/" not in name or name.startswith("plots/")}
    assert not names & {"pairs.jsonl", "evaluation.json", "notes.txt", "secret.py", "training_args.bin", "run.json"}
    assert b"hf_writer" not in (folder / "training_args.bin").read_bytes() and trainer.args.hub_token == "hf_writer"
    for content in hub.files("me/student").values():
        assert str(tmp_path).encode() not in content and b"hf_writer" not in content


@pytest.mark.parametrize("planted", ["model.safetensors", "README.md", "plots/loss.png", "notes.model"])
def test_links_out_of_the_folder_are_not_followed(hub, make_student, tmp_path, planted):
    """Neither of a file nor of a folder; a link within is only another name."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    make_student().save_pretrained(folder)
    (folder / "copy.tiktoken").symlink_to(folder / "config.json")
    assert "copy.tiktoken" in hub_module.published_files(folder)
    outside.mkdir()
    (outside / "loss.png").write_bytes(b"private")
    if "/" in planted:
        (folder / "plots").symlink_to(outside)
    else:
        (folder / planted).unlink(missing_ok=True)
        (folder / planted).symlink_to(outside / "loss.png")
    with pytest.raises(ConfigurationError, match=f"'{planted}' in .*is a link to a place outside"):
        hub_module.upload(folder, "me/linked", message="x")
    assert ("models", "me/linked") not in hub.repos
    with pytest.raises(ConfigurationError, match="is a link to a place outside"):
        hub_module.checkpoint_files(folder)


def test_what_is_never_uploaded(tmp_path):
    code = {
        "modeling_own.py": "from .helping import x\n",
        "helping.py": "x = 1\n",
        "notes.py": "",
        "configuration_own.py": "",
    }
    files = {
        ".env",
        "server.pem",
        "a.key",
        ".hidden.model",
        "b.model.tmp",
        "c.lock",
        "id_rsa",
        "training_args.bin",
        "plots/.env",
    }
    files |= {"optimizer.pt", "pytorch_model_fsdp_0/.metadata", ".cache/x.safetensors", "plots/x.pem", "plots/loss.png"}
    files |= {"additional_chat_templates/tool_use.jinja", "additional_chat_templates/.jinja.swp", "tokenizer.model"}
    for name in files | code.keys():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code.get(name, ""))
    maps = {
        "AutoConfig": "configuration_own.Own",
        "AutoModel": "modeling_own.Own",
        "AutoX": "org/else--modeling_else.Own",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": maps}))
    own = ["configuration_own.py", "helping.py", "modeling_own.py"]
    kept = ["additional_chat_templates/tool_use.jinja", "config.json", "plots/loss.png", "tokenizer.model"]
    assert hub_module.published_files(tmp_path) == sorted([*own, *kept])
    assert hub_module.checkpoint_files(tmp_path) == sorted(
        [*own, *kept, "notes.py", "optimizer.pt", "pytorch_model_fsdp_0/.metadata"]
    )


def test_an_adapter_of_a_folder_is_uploaded_at_the_end_alone(
    make_trainer, make_student, hub, tokenizer, tmp_path, caplog
):
    """PEFT writes the base's path into the adapter's configuration and card."""
    make_student().save_pretrained(tmp_path / "anna" / "base")
    tokenizer.save_pretrained(tmp_path / "anna" / "base")
    settings = {**PUSH, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(str(tmp_path / "anna" / "base"), peft_config=_lora(), merge_adapter=True, **settings)
    trainer.train()
    trainer._finish_current_push()
    assert not hub.files("me/student") and caplog.text.count("Nothing is uploaded before the end") == 1
    trainer.push_to_hub()
    assert "model.safetensors" in _names(hub)
    for files in hub.repos[("models", "me/student")].commits.values():
        assert not any(b"anna" in file.content for file in files.values())


def test_a_private_repository_is_seen_by_nobody_else(make_trainer, hub, monkeypatch):
    trainer = make_trainer(hub_private_repo=True, **PUSH)
    trainer.train()
    trainer.push_to_hub()
    assert hub.repos[("models", "me/student")].private
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(OSError, match="me/student"):
        AutoModelForCausalLM.from_pretrained("me/student", cache_dir=str(trainer.args.output_dir))
    assert not HfApi().repo_exists("me/student")


# ---- Refused before anything is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token, settings, message",
    [
        ("hf_wrong", {}, r"does not accept the token \(401\).*hf auth login"),
        (None, {}, "there is no token.*hf auth login"),
        ("hf_reader", {}, "may only read"),
        ("hf_writer", {"hub_model_id": "other/student"}, "no repository 'other/student'.*me, team"),
        ("hf_writer", {"hub_model_id": "other/taken"}, r"may not write there \(403\)"),
        ("hf_writer", {"hub_model_id": "a b/c!"}, "expected `owner/name`"),
        ("hf_writer", {"hub_model_id": "me/open", "hub_private_repo": True}, "'me/open' is there and public"),
        ("hf_writer", {"peft_config": _lora()}, "a model in memory, which nobody else can load.*merge_adapter"),
        ("hf_writer", {"merge_adapter": True}, "the student has no adapter"),
    ],
)
def test_refused_before_training(make_trainer, make_student, hub, monkeypatch, token, settings, message):
    hub.add("other/taken", "")
    hub.add("me/open", "")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(make_student(), **{**PUSH, **settings})


def test_a_hub_that_is_away_is_no_fault_of_the_settings(make_trainer, hub):
    hub.away = True
    with pytest.raises(HubError, match="Could not ask the Hub about 'me/student': the Hub answered 503"):
        make_trainer(**PUSH)
    hub.close()
    with pytest.raises(HubError, match="cannot be reached"):
        make_trainer(**PUSH)


def test_offline_is_told(make_trainer, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on. Unset HF_HUB_OFFLINE"):
        make_trainer(**PUSH)


def test_a_push_that_fails_loses_nothing(make_trainer, hub, monkeypatch, tmp_path):
    trainer = make_trainer(**PUSH)
    trainer.train()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")  # revoked meanwhile
    with pytest.raises(HubError, match=r"saved in '.*out'; upload it later with `distill-trainers push .*out --repo"):
        trainer.push_to_hub()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in saved.items())


def test_a_branch_is_made_where_there_is_none(make_trainer, hub):
    trainer = make_trainer(hub_revision="try-1", **PUSH)
    trainer.train()
    trainer.push_to_hub()
    make_trainer(hub_revision="try-1", **PUSH)  # the branch is there now
    assert "model.safetensors" in _names(hub, branch="try-1") and "model.safetensors" not in _names(hub)
