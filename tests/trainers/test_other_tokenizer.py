"""A teacher with a tokenizer of its own, through every method and place of a teacher.

The student reads one token a digit, the teacher two digits where it can: `123<eos>` is 1|2|3|<eos> and 12|3|<eos>.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.losses.reduction import trained_mask
from distill_trainers.toy import addition_dataset, tiny_llama
from distill_trainers.trainers import METHODS

OWN = {"teacher_tokenizer": "own", "lmbda": 0.0, "divergence": "forward_kl"}


def digits_tokenizer():
    """Two digits are one token; no id but by accident stands for what it does to the character tokenizer."""
    characters = ["=", "+", *"9876543210"]
    pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
    vocab = {token: i for i, token in enumerate([*characters, *(a + b for a, b in pairs), "<pad>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<pad>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def numbers(count=12, seed=0):
    """Prompts and completions of one to five digits."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: "".join(map(str, torch.randint(10, (k,), generator=generator).tolist()))  # noqa: E731
    return Dataset.from_list([{"prompt": f"{draw(1 + i % 4)}+", "completion": draw(1 + i % 5)} for i in range(count)])


@pytest.fixture(scope="module")
def digits():
    return digits_tokenizer()


@pytest.fixture
def own(make_trainer, make_student, digits):
    """A trainer of float64 models with a teacher that reads two digits at once."""

    def make(student=None, teacher=None, train="default", **settings):
        student = make_student(initializer_range=0.2).double() if student is None else student
        if teacher is None:
            teacher = tiny_llama(digits, 48, 2, seed=7, initializer_range=0.25).double()
        train = numbers() if isinstance(train, str) else train
        settings = {"teacher_processing_class": digits, **OWN, **settings}
        if settings.get("method", "gkd") != "gkd":
            settings = {k: v for k, v in settings.items() if k not in ("lmbda", "divergence") or v != OWN[k]}
        return make_trainer(student=student, teacher=teacher, train=train, **settings)

    return make


def loss_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


# ---- The loss, from texts --------------------------------------------------------------------------------------------


def spans(tokens):
    """Where each token begins and ends in the text, an end of text being one more character."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + (1 if token.startswith("<") else len(token)))
    return list(zip(ends, ends[1:], strict=False))


def logps_of(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return F.log_softmax(logits, -1)


def next_character(logps, tokenizer):
    """Log-probabilities of the next character, of the end of the text and of padding: sums over tokens."""
    tokens = tokenizer.convert_ids_to_tokens(range(logps.shape[-1]))
    order = ["=", "+", *"0123456789", tokenizer.eos_token, tokenizer.pad_token]
    groups = [[i for i, t in enumerate(tokens) if (t if t.startswith("<") else t[0]) == symbol] for symbol in order]
    return torch.stack([logps[:, group].logsumexp(-1) for group in groups], -1)


def naive(student, teacher, tokenizer, digits, rows, tau=1.0, weights=(1.0, 1.0)):
    """`alm` and `next_byte` (forward KL) over the student's tokens, a row at a time, and their gradient."""
    student = copy.deepcopy(student).train(False)
    student.zero_grad()
    total, count = 0.0, 0
    for row in rows:
        sides = []
        for model, tok in ((student, tokenizer), (teacher, digits)):
            prompt = tok(row["prompt"], add_special_tokens=False)["input_ids"]
            ids = [*tok(row["completion"], add_special_tokens=False)["input_ids"], tok.eos_token_id]
            logps = logps_of(model, prompt, ids)
            sides.append((spans(tok.convert_ids_to_tokens(ids)), logps, logps[range(len(ids)), ids], tok))
        (ours, q, q_given, _), (theirs, p, p_given, _) = sides
        shared = sorted({0} | ({end for _, end in ours} & {end for _, end in theirs}))
        text_end = len(row["completion"])
        safe = {0, text_end, text_end + 1}  # everywhere else a token of two digits may cross
        for begin, end in zip(shared, shared[1:], strict=False):
            if {begin, end} <= safe:
                a = sum(value for (s, e), value in zip(theirs, p_given, strict=True) if begin <= s and e <= end).detach()
                b = sum(value for (s, e), value in zip(ours, q_given, strict=True) if begin <= s and e <= end)
                pt, qt = (a / tau).exp(), (b / tau).exp()
                event = pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()
                total = total + weights[0] * tau * event
            i, j = ([s for s, _ in side].index(begin) for side in (ours, theirs))
            pc, qc = next_character(p[j : j + 1], digits).detach(), next_character(q[i : i + 1], tokenizer)
            total = total + weights[1] * (pc.exp() * (pc - qc)).sum()
        count += len(ours)
    loss = total / count
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize(("tau", "weights"), [(1.0, (1.0, 1.0)), (10.0, (0.5, 2.0)), (1.0, (1.0, 0.0))])
def test_loss_and_gradient_are_those_of_the_definition(own, batch_of, tokenizer, digits, tau, weights):
    terms = {name: weight for name, weight in zip(("alm", "next_byte"), weights, strict=True) if weight}
    trainer = own(cross_tokenizer=terms, alm_temperature=tau)
    expected, gradient = naive(trainer.model, trainer.teacher.model, tokenizer, digits, numbers(), tau, weights)
    loss, found = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == pytest.approx(expected, rel=1e-7) and abs(expected) > 1e-3
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)


def test_padding_order_and_accumulation_change_nothing(own, batch_of):
    trainer = own(pad_to_multiple_of=4)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    parts = [[7, 2, 11], [0], [5, 3, 1, 4, 6, 8, 9, 10]]
    counts = [int((batch_of(trainer, part)["labels"] != -100).sum()) for part in parts]
    found = [loss_and_gradient(trainer, batch_of(trainer, part)) for part in parts]
    shares = [count / sum(counts) for count in counts]
    assert sum(share * part[0] for share, part in zip(shares, found, strict=True)) == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(sum(s * part[1] for s, part in zip(shares, found, strict=True)), gradient)
    batch = batch_of(trainer)
    for name, mask in (("input_ids", "attention_mask"), ("teacher_completion_ids", "teacher_completion_mask")):
        batch[name][batch[mask] == 0] = 5
    batch["teacher_prompt_ids"][batch["teacher_prompt_mask"] == 0] = 5
    assert loss_and_gradient(trainer, batch)[0] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("terms", [{"alm": 1.0}, {"next_byte": 1.0}, {"exact_overlap": 1.0}, {"uld": 1.0}])
def test_equal_models_of_one_tokenizer_teach_nothing(own, batch_of, tokenizer, make_student, terms):
    for tau in (1.0, float("inf")):
        student = make_student(initializer_range=0.2).double()
        settings = {"teacher_processing_class": tokenizer, "cross_tokenizer": terms, "alm_temperature": tau}
        trainer = own(student, copy.deepcopy(student), **settings)
        loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
        assert max(abs(loss), gradient.abs().max().item()) < 1e-9


def test_with_one_tokenizer_terms_are_at_most_the_divergence_of_tokens(own, make_trainer, batch_of, tokenizer):
    trainer = own(teacher=tiny_llama(tokenizer, 48, 2, seed=7, initializer_range=0.25).double(),
                  teacher_processing_class=tokenizer)  # fmt: skip
    shared = make_trainer(trainer.model, trainer.teacher.model, numbers(), lmbda=0.0, divergence="forward_kl")
    found = {}
    for run in (trainer, shared):
        found |= run.compute_loss(run.model, batch_of(run), return_outputs=True)[1]
    # One character a token: the next byte is the next token.
    torch.testing.assert_close(found["next_byte"], found["divergence"])
    assert (found["alm"] <= found["divergence"] + 1e-12).all() and found["alm"].max() > 0


def test_rows_add_up_to_the_likelihood_of_both_texts(own, batch_of, tokenizer, digits):
    trainer = own()
    batch = batch_of(trainer)
    logps, _ = trainer.two_models.frozen_logps(trainer.teacher, batch)
    rows = trained_mask(batch["labels"]).nonzero()[:, 0]
    sums = torch.zeros(12, dtype=logps.dtype).index_add(0, rows, logps)
    for row, total in zip(numbers(), sums, strict=True):
        prompt = digits(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = [*digits(row["completion"], add_special_tokens=False)["input_ids"], digits.eos_token_id]
        given = logps_of(trainer.teacher.model, prompt, ids)[range(len(ids)), ids].sum()
        assert total.item() == pytest.approx(given.item(), abs=1e-9)


def test_a_head_that_cannot_be_fused_gives_the_same(own, batch_of, monkeypatch):
    trainer = own()
    expected = loss_and_gradient(trainer, batch_of(trainer))
    trainer.two_models.head_is_fused = False
    trainer.teacher._fused = False
    found = loss_and_gradient(trainer, batch_of(trainer))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)  # these logits are float32


# ---- Every method ----------------------------------------------------------------------------------------------------


class Asked:
    """Writes down what a teacher is asked, as text: what it reads, and what of it is predicted."""

    def __init__(self, trainer, digits):
        self.questions = []
        ask = trainer.teacher.signal

        def signal(inputs, predicts, vocab_size):
            for ids, mask, trained in zip(inputs["input_ids"], inputs["attention_mask"].bool(), predicts, strict=True):
                if trained.any():
                    self.questions.append((digits.decode(ids[mask]), digits.decode(ids[1:][trained])))
            return ask(inputs, predicts, vocab_size)

        trainer.teacher.signal = signal


def pairs(count=12):
    return Dataset.from_list([
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"] + "7"}
        for row in numbers(count)
    ])  # fmt: skip


WAYS = {
    "given": ("gkd", {}),
    "sampled": ("gkd", {"lmbda": 1.0}),
    "replayed": ("gkd", {"lmbda": 0.9, "replay_buffer_size": 8}),
    "written by the teacher": ("gkd", {"seq_kd": True}),
    "with a system prompt": ("gkd", {"teacher_prompt": "{prompt}+"}),
    "minillm, tokens": ("minillm", {"objective": "token"}),
    "minillm, sampled": ("minillm", {"estimator": "sampled", "teacher_mix_alpha": 0.0}),
    "minillm, hf": ("minillm", {"estimator": "sampled", "teacher_mix_alpha": 0.0, "rollout_engine": "hf"}),
    "minillm, cycles": (
        "minillm",
        {"estimator": "sampled", "objective": "token", "num_minibatches": 2, "num_inner_epochs": 2},
    ),
    "dpkd": ("dpkd", {}),
    "dpkd, chosen": ("dpkd", {"chosen": "dataset", "refresh_steps": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_teacher_reads_the_students_text_in_its_own_tokens(own, digits, tokenizer, way):
    method, settings = WAYS[way]
    trainer = own(method=method, train=numbers(), max_steps=2, seed=1, **settings)
    asked = Asked(trainer, digits)
    texts = []
    compute = trainer.compute_loss

    def listened(model, inputs, *args, **kwargs):
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            text = tokenizer.decode(ids[labels != -100]).replace("<eos>", "<end>")
            texts.append(text)
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = listened
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    predicted = [answer for _, answer in asked.questions]
    assert set(predicted) == {text for text in texts if text.replace("<pad>", "")}
    extra = settings.get("teacher_prompt", "")[8:]
    prompts = {row["prompt"] + extra for row in numbers()}
    assert all(read.removesuffix(answer) in prompts for read, answer in asked.questions)
