"""TRL 1.16's `GKDTrainer` and ours on the same models and data in one process.

Where both are right they must agree: on one batch in value and gradient, and over a training run in losses and
weights. Where they differ, a test pins down what TRL does and an independent float64 reference says who is right; if
TRL changes, that test fails and the claim made in docs/log.md has to be looked at again.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import warnings
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from distill_trainers import GKDConfig, GKDTrainer
from distill_trainers.toy import addition_rows, character_tokenizer, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl_gkd = pytest.importorskip("trl.experimental.gkd")

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# TRL's `beta` and what it is called here.
DIVERGENCES = [(0.0, "forward_kl"), (0.2, "jsd"), (0.5, "jsd"), (1.0, "reverse_kl")]

GKD_SETTINGS = {"max_length": 48, "max_new_tokens": 12, "activation_checkpointing": False}
GKD_SETTINGS |= {"lmbda": 0.0, "temperature": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = character_tokenizer()
    headers = ["<|im_start|>user", "<|im_start|>assistant"]
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": headers})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def both(tokenizer, settings_of_both):
    """A function that builds TRL's trainer and ours from one set of settings, each with its own copy of the models."""

    def build(beta=0.5, divergence="jsd", student=None, teacher=None, dataset=None, ours=None, theirs=None, **settings):
        # Sharp distributions, so that divergences are far from zero and from each other. In float64, where TRL's
        # mixture and AdamW do not blow rounding up: Llama normalises in float32, which leaves 1e-7 or so.
        student = student or tiny_llama(tokenizer, 32, 2, seed=1, initializer_range=0.3).double()
        teacher = teacher or tiny_llama(tokenizer, 48, 2, seed=2, initializer_range=0.3).double()
        settings = settings_of_both(**{**GKD_SETTINGS, **settings})
        own = {"divergence": divergence, **({"beta": beta} if divergence == "jsd" else {}), **(ours or {})}
        dataset = messages_dataset() if dataset is None else dataset
        made = []
        for trainer_class, args in (
            (RecordingTRL, trl_gkd.GKDConfig(**settings, beta=beta, bf16=False, **(theirs or {}))),
            (RecordingOurs, GKDConfig(**settings, **own)),
        ):
            models = copy.deepcopy((student, teacher))
            made.append(trainer_class(*models, args=args, train_dataset=dataset, processing_class=tokenizer))
        return made

    return build


def messages_dataset(count=32):
    rows = addition_rows(count)
    turns = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in rows]
    return Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns])


class Recording:
    """Keeps what `compute_loss` was given in training, and what it answered, by optimiser step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.seen = getattr(self, "seen", defaultdict(list))
        kept = {name: inputs[name].clone() for name in ("input_ids", "attention_mask", "labels")}
        count = None if num_items_in_batch is None else float(num_items_in_batch)
        self.seen[self.state.global_step].append((kept, count, loss.detach() if not return_outputs else None))
        return loss


class RecordingOurs(Recording, GKDTrainer):
    pass


class RecordingTRL(Recording, trl_gkd.GKDTrainer):
    generated = 0

    @staticmethod
    def generate_on_policy_outputs(model, inputs, generation_config):
        RecordingTRL.generated += 1
        return trl_gkd.GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)


def reference_sum(student, teacher, batch, beta, temperature=1.0):
    """Sum over trained tokens of the divergence, in float64, row by row without any padding.

    Generalized JSD of arXiv 2306.13649 as a plain sum over the vocabulary; beta 0 and 1 are KL(p||q) and KL(q||p).
    """
    total = torch.zeros((), dtype=torch.float64)
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        real = mask.bool()
        logits = [
            model.double()(input_ids=ids[real][None]).logits[0, :-1] / temperature for model in (student, teacher)
        ]
        trained = labels[real][1:] != -100
        q, p = (F.softmax(each[trained], -1) for each in logits)
        mix = beta * p + (1 - beta) * q
        if beta == 0.0:
            values = p * (p / q).log()
        elif beta == 1.0:
            values = q * (q / p).log()
        else:
            values = beta * p * (p / mix).log() + (1 - beta) * q * (q / mix).log()
        total = total + values.sum()
    return total


def trained(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def first_batch(trainer, rows=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.double() for name, p in trainer.model.named_parameters()}


# ---- Where both are right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "divergence"), DIVERGENCES)
@pytest.mark.parametrize("collated_by", ["trl", "ours"])  # padded on the left, on the right
def test_same_loss_and_gradient_on_one_batch(both, beta, divergence, collated_by):
    theirs, ours = both(beta, divergence)
    batch = first_batch(theirs if collated_by == "trl" else ours)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert (batch["attention_mask"] == 0).any(), "the batch must have padding"
    student, teacher = copy.deepcopy((ours.model, ours.teacher.model))
    exact = reference_sum(student, teacher, batch, beta) / trained(batch)
    exact.backward()
    reference = {name: p.grad for name, p in student.named_parameters()}
    assert exact > 0.05
    for trainer in (theirs, ours):
        for count in (None, torch.tensor(3 * trained(batch))):  # alone, and as a third of an accumulation window
            share = 1 if count is None else 1 / 3
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
            assert loss.item() == pytest.approx(exact.item() * share, rel=1e-5)
            got = gradients(trainer, loss)
            for name, expected in reference.items():
                assert (got[name] - expected * share).norm() < 1e-5 * (expected * share).norm(), name


def test_same_tokens_and_labels_from_messages(both):
    theirs, ours = both(lmbda=1.0)
    left, right = first_batch(theirs, 8), first_batch(ours, 8)
    for i in range(8):
        real = {"theirs": left["attention_mask"][i].bool(), "ours": right["attention_mask"][i].bool()}
        for key in ("input_ids", "labels"):
            assert left[key][i][real["theirs"]].tolist() == right[key][i][real["ours"]].tolist()
        prompts = [left["prompts"][i][left["prompt_attention_mask"][i].bool()].tolist()]
        prompts.append(right["prompt_ids"][i][right["prompt_mask"][i].bool()].tolist())
        assert prompts[0] == prompts[1]
    assert left["labels"][0].tolist()[-1] == right["input_ids"][0][right["attention_mask"][0].bool()][-1], (
        "EOS is trained"
    )


@pytest.mark.parametrize(("beta", "divergence"), [(0.5, "jsd"), (1.0, "reverse_kl")])
def test_same_losses_and_weights_over_a_training_run(both, beta, divergence):
    theirs, ours = both(beta, divergence, max_steps=8, gradient_accumulation_steps=2)
    for trainer in (theirs, ours):
        trainer.train()
    logs = [[e for e in trainer.state.log_history if "loss" in e] for trainer in (theirs, ours)]
    assert len(logs[0]) == len(logs[1]) == 8 and logs[0][0]["loss"] > 1.2 * logs[0][-1]["loss"]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for (name, a), b in zip(theirs.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


# ---- Where TRL differs ----------------------------------------------------------------------------------------------


def test_temperature_reaches_only_our_loss(both):
    """TRL's one `temperature` samples and never softens; here `kd_temperature` softens and `temperature` samples."""
    theirs, ours = both(temperature=2.5, ours={"kd_temperature": 2.5})
    plain_theirs, plain_ours = both(temperature=0.4)
    batch = first_batch(ours)
    models = copy.deepcopy((ours.model, ours.teacher.model))
    soft = reference_sum(*models, batch, 0.5, temperature=2.5).item() / trained(batch)
    hard = reference_sum(*models, batch, 0.5).item() / trained(batch)
    assert abs(soft - hard) > 0.1 * hard

    def loss(trainer):
        return trainer.compute_loss(trainer.model, dict(batch)).item()

    assert loss(theirs) == loss(plain_theirs) == pytest.approx(hard, rel=1e-5)
    assert loss(ours) == pytest.approx(soft, rel=1e-5)
    assert loss(plain_ours) == pytest.approx(hard, rel=1e-5)
    assert theirs.generation_config.temperature == ours.sampling.temperature == 2.5


def test_on_policy_loss_is_divided_by_the_tokens_it_trains(both):
    """TRL divides by the dataset's token count while it trains on rollouts: its loss is off by their ratio."""
    theirs, ours = both(lmbda=1.0, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0)
    gold = {}
    for trainer in (theirs, ours):
        trainer.train()
        (window,) = trainer.seen.values()
        generated, counts = sum(trained(batch) for batch, _, _ in window), {count for _, count, _ in window}
        assert len(window) == 2 and len(counts) == 1
        total = sum(reference_sum(*_doubles(trainer), batch, 0.5) for batch, _, _ in window).item()
        logged = trainer.state.log_history[0]["loss"]
        assert logged == pytest.approx(total / counts.pop(), rel=1e-4)
        gold[trainer] = (total / generated, logged, generated)
    mean, logged, generated = gold[ours]
    assert logged == pytest.approx(mean, rel=1e-4)
    mean, logged, generated = gold[theirs]
    (window,) = theirs.seen.values()
    dataset_tokens = window[0][1]
    assert generated > 1.2 * dataset_tokens  # sums have 2-3 digits and an EOS; this student goes on for up to 12 tokens
    assert logged == pytest.approx(mean * generated / dataset_tokens, rel=1e-4)


def _doubles(trainer):
    teacher = trainer.teacher.model if isinstance(trainer, GKDTrainer) else trainer.teacher_model
    return copy.deepcopy((trainer.accelerator.unwrap_model(trainer.model), teacher))


class DrawsFromPython(TrainerCallback):
    """What a random augmentation in a collator does on one process and not on another."""

    def on_step_begin(self, *args, **kwargs):
        random.random()


def test_lambda_is_drawn_once_per_step_and_from_nothing_but_the_seed(both):
    """TRL draws per micro-batch from Python's global state; here a step is one or the other, on every process."""
    patterns = []
    for disturbed in (False, True):
        theirs, ours = both(lmbda=0.5, max_steps=6, gradient_accumulation_steps=4, max_new_tokens=2)
        for trainer in (theirs, ours):
            if disturbed:
                trainer.add_callback(DrawsFromPython())
            trainer.train()
        patterns.append([_on_policy_pattern(theirs), _on_policy_pattern(ours)])
    (their_steps, our_steps), (their_disturbed, our_disturbed) = patterns
    assert any(0 < sum(step) < 4 for step in their_steps), "TRL mixes both sources within an optimiser step"
    assert all(sum(step) in (0, 4) for step in our_steps) and {sum(step) for step in our_steps} == {0, 4}
    assert their_disturbed != their_steps
    assert our_disturbed == our_steps


def _on_policy_pattern(trainer):
    """For each step, for each micro-batch, whether its completions are not those of the dataset."""
    rows = (first_batch(trainer, len(trainer.train_dataset)),)
    known = {tuple(labels[labels != -100].tolist()) for batch in rows for labels in batch["labels"]}
    return [
        [any(tuple(row[row != -100].tolist()) not in known for row in batch["labels"]) for batch, _, _ in window]
        for window in trainer.seen.values()
    ]


def test_gradient_of_two_ranks_is_that_of_one(both, monkeypatch):
    """Data parallelism averages gradients. TRL divides by the tokens of all ranks and leaves it at that: half of it.

    Each rank's loss is computed here in turn, with the count that `get_batch_samples` would have gathered.
    """
    theirs, ours = both()
    batch = first_batch(ours, 8)
    count = torch.tensor(trained(batch))
    halves = [{name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")} for rows in _halves(8)]
    assert trained(halves[0]) != trained(halves[1])
    assert theirs.args.average_tokens_across_devices  # TRL's default: the count is gathered over ranks
    whole = gradients(ours, ours.compute_loss(ours.model, dict(batch), num_items_in_batch=count))
    for trainer, share in ((theirs, 0.5), (ours, 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
            ranks = [
                gradients(trainer, trainer.compute_loss(trainer.model, half, num_items_in_batch=count))
                for half in halves
            ]
        for name, expected in whole.items():
            averaged = (ranks[0][name] + ranks[1][name]) / 2
            torch.testing.assert_close(averaged, share * expected, rtol=1e-4, atol=1e-6, msg=name)


def _halves(rows):
    return slice(0, rows // 2), slice(rows // 2, rows)


@pytest.mark.filterwarnings("ignore")
def test_rollouts_use_the_kv_cache_under_checkpointing(both):
    """TRL feeds the whole sequence again for each new token, and checkpointing is on by default there."""
    assert trl_gkd.GKDConfig(output_dir="x", use_cpu=True, bf16=False).activation_checkpointing
    theirs, ours = both(lmbda=1.0, max_steps=1, activation_checkpointing=True)
    widths = {}
    for trainer in (theirs, ours):
        widths[trainer] = seen = []
        layer = trainer.model.get_input_embeddings()
        hook = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
        trainer.train()
        hook.remove()
    prompt = widths[theirs][0]
    assert widths[theirs][1:12] == [prompt + 1 + i for i in range(11)]
    after_prompts = itertools.dropwhile(lambda width: width > 1, widths[ours])  # and after the probe of both models
    ours_new = list(itertools.takewhile(lambda width: width == 1, after_prompts))  # until every row has ended
    assert 5 <= len(ours_new) <= 11


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def test_no_tensor_of_the_size_of_all_logits(both, tokenizer):
    """TRL holds [2, B, T-1, V] in the mixture; here nothing is larger than the head or one chunk."""
    wide = {"vocab_size": 4096, "pad_token_id": 0}
    models = [tiny_llama(tokenizer, 16, 1, seed=seed, **wide) for seed in (1, 2)]
    theirs, ours = both(student=models[0], teacher=models[1], ours={"loss_chunk_mib": 0.125})
    rows = torch.randint(2, 4096, (4, 48), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[:, :24] = -100  # half of it prompt
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}
    largest = {}
    for trainer in (theirs, ours):
        trainer.compute_loss(trainer.model, dict(batch))  # what is checked once, is checked here
        with LargestTensor() as seen:
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        largest[trainer] = seen.elements
    assert largest[theirs] == 2 * 4 * 47 * 4096
    assert largest[ours] == 16 * 4096  # the gradient of the head, [V, D]


def test_bfloat16_models_get_a_float32_loss(both, tokenizer):
    """TRL's softmax keeps the dtype of the logits: with bfloat16 weights its loss is rounded to 8 bits."""
    models = [
        tiny_llama(tokenizer, 32, 2, seed=seed).bfloat16() for seed in (1, 2)
    ]  # close to each other, as after SFT
    theirs, ours = both(student=models[0], teacher=models[1])
    batch = first_batch(ours)
    exact = reference_sum(*copy.deepcopy(models), batch, 0.5).item() / trained(batch)
    errors = []
    for trainer in (theirs, ours):
        loss = trainer.compute_loss(trainer.model, dict(batch))
        errors.append(abs(loss.item() - exact) / exact)
        assert loss.dtype == (torch.bfloat16 if trainer is theirs else torch.float32)
    assert errors[1] < 0.02 and errors[0] > 10 * errors[1]  # 0.15 % and 6.5 % on one processor


def test_left_padding_shifts_absolute_positions(both, tokenizer):
    """TRL pads on the left and passes no positions: right for rotary models, wrong for GPT-2's learned ones."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    theirs, ours = both(student=student, teacher=teacher)
    errors = []
    for trainer in (theirs, ours):
        batch = first_batch(trainer)
        assert (batch["attention_mask"] == 0).any()
        exact = reference_sum(*copy.deepcopy((student, teacher)), batch, 0.5).item() / trained(batch)
        loss = trainer.compute_loss(trainer.model, batch).item()
        errors.append(abs(loss - exact) / exact)
    assert errors[1] < 1e-5 and errors[0] > 0.005


def test_prompt_and_completion_columns_work_only_here(both):
    dataset = Dataset.from_list(addition_rows(8))
    theirs, ours = both(dataset=dataset, max_steps=1)
    with pytest.raises(KeyError, match="messages"):
        theirs.train()
    ours.train()
    assert math.isfinite(ours.state.log_history[0]["loss"])


def test_a_long_completion_stops_trl_and_is_cut_here(both):
    """TRL keeps the end of a row and refuses a row without prompt, in the middle of a run."""
    rows = messages_dataset(8).to_list()
    rows[3]["messages"][1]["content"] = "1234567890" * 6
    theirs, ours = both(dataset=Dataset.from_list(rows), max_steps=2, lmbda=0.0)
    with pytest.raises(ValueError, match="no prompt tokens left"):
        theirs.train()
    ours.train()
    row = ours.train_dataset[3]
    assert len(row["input_ids"]) <= 48 and row["prompt_length"] >= 4 and any(label != -100 for label in row["labels"])


def test_a_template_without_eos_trains_eos_only_here(both, tokenizer, monkeypatch):
    """TRL trusts the chat template: where it writes no EOS, the student never learns to stop."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<|im_end|>", ""))
    for trainer, expected in zip(both(), (0, 4), strict=True):
        assert int((first_batch(trainer)["labels"] == tokenizer.eos_token_id).sum()) == expected


def test_padded_vocabularies_work_only_here(both, tokenizer, settings_of_both):
    """151936 and 152064 rows of one tokenizer, in small: TRL refuses, here padding ids leave both softmaxes."""
    student = tiny_llama(tokenizer, 32, 2, seed=1, initializer_range=0.3)
    teacher = tiny_llama(tokenizer, 48, 2, seed=2, initializer_range=0.3, vocab_size=len(tokenizer) + 5)
    with pytest.raises(ValueError, match="vocab_size"):
        both(student=student, teacher=teacher)
    cut = copy.deepcopy(teacher)
    cut.resize_token_embeddings(len(tokenizer))
    ours = GKDTrainer(
        copy.deepcopy(student),
        teacher,
        args=GKDConfig(**settings_of_both(**GKD_SETTINGS)),
        train_dataset=messages_dataset(),
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )
    batch = first_batch(ours)
    exact = reference_sum(copy.deepcopy(student), cut, batch, 0.5).item() / trained(batch)
    assert ours.compute_loss(ours.model, batch).item() == pytest.approx(exact, rel=1e-5)


# ---- Faults of other trainers that TRL 1.16 does not have -----------------------------------------------------------


def test_trl_is_right_about_accumulation_eos_and_the_teacher(both, tokenizer):
    """Off-policy accumulation, EOS where pad = eos, and a teacher that stays as it was: not claimed as faults."""
    losses = []
    for rows, steps in ((8, 1), (2, 4)):
        theirs, _ = both(per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=2)
        before = copy.deepcopy(theirs.teacher_model.state_dict())
        theirs.train()
        losses.append([e["loss"] for e in theirs.state.log_history if "loss" in e])
        assert all(
            torch.equal(a, b) for a, b in zip(before.values(), theirs.teacher_model.state_dict().values(), strict=True)
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    batch = type(theirs.data_collator)(tokenizer=same, max_length=48)([messages_dataset(2)[i] for i in range(2)])
    assert (batch["labels"][:, -1] == same.eos_token_id).all()
