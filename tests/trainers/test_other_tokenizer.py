"""A teacher with a tokenizer of its own, through every method and place of a teacher.

The student reads one token a digit, the teacher two digits where it can: `123<eos>` is 1|2|3|<eos> and 12|3|<eos>.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from distill_trainers.data.views import ALIGNED_ENTRIES
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.losses.fused_linear import _Projection
from distill_trainers.losses.reduction import trained_mask
from distill_trainers.teachers import ComposedTeacher, LocalTeacher, RoutedTeacher
from distill_trainers.toy import addition_rationales, tiny_llama

OWN = {"teacher_tokenizer": "own", "lmbda": 0.0, "divergence": "forward_kl"}


def numbers(count=12, seed=0):
    """Prompts and completions of one to five digits."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: "".join(map(str, torch.randint(10, (k,), generator=generator).tolist()))  # noqa: E731
    return Dataset.from_list([{"prompt": f"{draw(1 + i % 4)}+", "completion": draw(1 + i % 5)} for i in range(count)])


@pytest.fixture
def own(make_trainer, make_student, digits):
    """A trainer of float64 models with a teacher that reads two digits at once."""

    def make(student=None, teacher="default", train="default", **settings):
        student = make_student(initializer_range=0.2).double() if student is None else student
        if isinstance(teacher, str) and teacher == "default":
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


def naive(student, teacher, tokenizer, digits, rows, tau=1.0, weights=(1.0, 1.0), more=None, reverse=False):
    """`alm` and `next_byte` (forward KL) over the student's tokens, a row at a time, and their gradient.

    Args:
        more: what else is in the loss, a function of the student.
    """
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
        text = row["completion"]
        within = {i for i in range(1, len(text)) if not text[i - 1 : i + 1].isdigit()}
        safe = {0, len(text), len(text) + 1} | within  # everywhere else a token of two digits may cross
        borders = [place for place in shared if place in safe]
        for begin, end in zip(borders, borders[1:], strict=False):
            a, b = (
                sum(value for (s, e), value in zip(side, given, strict=True) if begin <= s and e <= end)
                for side, given in ((theirs, p_given.detach()), (ours, q_given))
            )
            pt, qt = (a / tau).exp(), (b / tau).exp()
            event = pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()
            limit = a - b - a * (a / b).log()
            total = total + weights[0] * (limit if tau == float("inf") else tau * event)
        for begin in shared[:-1]:
            i, j = ([s for s, _ in side].index(begin) for side in (ours, theirs))
            pc, qc = next_character(p[j : j + 1], digits).detach(), next_character(q[i : i + 1], tokenizer)
            total = total + weights[1] * (qc.exp() * (qc - pc) if reverse else pc.exp() * (pc - qc)).sum()
        count += len(ours)
    loss = total / count + (more(student) if more else 0.0)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize(("tau", "weights"), [(1.0, (1.0, 1.0)), (10.0, (0.5, 2.0)), (float("inf"), (1.0, 0.0))])
def test_loss_and_gradient_are_those_of_the_definition(own, batch_of, tokenizer, digits, tau, weights):
    terms = {name: weight for name, weight in zip(("alm", "next_byte"), weights, strict=True) if weight}
    trainer = own(cross_tokenizer=terms, alm_temperature=None if tau == float("inf") else tau)
    expected, gradient = naive(trainer.model, trainer.teacher.model, tokenizer, digits, numbers(), tau, weights)
    loss, found = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == pytest.approx(expected, rel=1e-7) and abs(expected) > 1e-3
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)


def texts_of(model, tok, rows):
    """log-probabilities of the tokens of each completion, end included."""
    for row in rows:
        prompt, text = (tok(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion"))
        ids = [*text, tok.eos_token_id]
        yield logps_of(model, prompt, ids)[range(len(ids)), ids]


def test_minillms_token_objective_is_the_same_with_reverse_kl(own, batch_of, tokenizer, digits):
    trainer = own(method="minillm", objective="token", estimator="exact", teacher_mix_alpha=0.0, train=numbers())
    models = trainer.model, trainer.teacher.model
    expected, gradient = naive(*models, tokenizer, digits, numbers(), float("inf"), reverse=True)
    (batch,) = trainer.score([batch_of(trainer)])
    loss, found = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(expected, rel=1e-7)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)


def test_rationales_have_it_beside_their_cross_entropies(own, batch_of, tokenizer, digits):
    data = addition_rationales(3)
    trainer = own(method="rationale", train=data, divergence="reverse_kl", distill_weight=0.5)
    labels, chains = [
        [{"prompt": f"{mark}{row['question']}=", "completion": row[name]} for row in data]
        for mark, name in (("=", "answer"), ("+", "rationale"))
    ]

    def entropies(student):
        return -sum(torch.cat(list(texts_of(student, tokenizer, rows))).mean() for rows in (labels, chains))

    models, terms = (trainer.model, trainer.teacher.model), {"weights": (0.5, 0.5), "more": entropies, "reverse": True}
    expected, gradient = naive(*models, tokenizer, digits, labels + chains, float("inf"), **terms)
    loss, found = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalized", [True, False])
def test_preferences_are_by_likelihoods_of_the_texts_in_the_tokens_of_each(
    own, tokenizer, digits, batch_of, normalized
):
    settings = {"beta": 0.7, "length_normalized": normalized, "lm_loss_weight": 0.0}
    trainer = own(method="dpkd", train=pairs(8), **settings)
    student, losses = copy.deepcopy(trainer.model), []
    student.zero_grad()
    sides = [
        [{"prompt": row["prompt"], "completion": row[name]} for row in pairs(8)] for name in ("chosen", "rejected")
    ]
    told = [
        list(texts_of(m, t, side)) for side in sides for m, t in ((student, tokenizer), (trainer.teacher.model, digits))
    ]
    for q, p, other_q, other_p in zip(*told, strict=True):
        ratios = [(a.sum() - b.detach().sum()) / (len(a) if normalized else 1) for a, b in ((q, p), (other_q, other_p))]
        losses.append(-F.logsigmoid(0.7 * (ratios[0] - ratios[1])))
    expected = torch.stack(losses).mean()
    expected.backward()
    (batch,) = trainer.score([batch_of(trainer)])
    loss, found = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-7)
    gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
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


@pytest.mark.parametrize("tau", [1.0, float("inf")])
def test_equal_models_of_one_tokenizer_teach_nothing(own, batch_of, tokenizer, make_student, tau):
    student = make_student(initializer_range=0.2).double()
    terms = dict.fromkeys(("alm", "next_byte", "exact_overlap", "uld"), 1.0)
    settings = {"teacher_processing_class": tokenizer, "cross_tokenizer": terms, "alm_temperature": tau}
    trainer = own(student, copy.deepcopy(student), **settings)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    assert max(abs(loss), gradient.abs().max().item()) < 1e-9


def test_with_one_tokenizer_terms_are_at_most_the_divergence_of_tokens(own, make_trainer, batch_of, tokenizer):
    teacher = tiny_llama(tokenizer, 48, 2, seed=7, initializer_range=0.25).double()
    trainer = own(teacher=teacher, teacher_processing_class=tokenizer, alm_temperature=1.0)
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


@pytest.mark.parametrize("terms", [{"alm": 1.0}, {"alm": 1.0, "next_byte": 1.0}, {"next_byte": 1.0}])
def test_the_teachers_head_runs_once_over_its_tokens(own, batch_of, monkeypatch, terms):
    trainer, seen, products = own(cross_tokenizer=terms), [], _Projection.products
    batch = trainer.two_models.completed(batch_of(trainer))
    rows = trainer.teacher.model.get_output_embeddings().weight.shape[0]

    def counted(projection, part, workspace):
        seen.extend([part] if projection.head.num_ids == rows else [])
        return products(projection, part, workspace)

    monkeypatch.setattr(_Projection, "products", counted)
    loss, gradient = loss_and_gradient(trainer, batch)
    assert len(seen) == 1 and seen[0].stop == batch["teacher_completion_mask"].sum()
    trainer.two_models.aligned_loss = None  # distributions are read by the loss itself
    expected = loss_and_gradient(trainer, batch)
    assert len(seen) > 2 and loss == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-12)


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


# The others come in every run through the same places.
OFTEN = {"given", "sampled", "written by the teacher", "minillm, sampled", "dpkd"}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way in OFTEN else [pytest.mark.slow]) for way in WAYS])
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


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("minillm", {"estimator": "sampled", "teacher_mix_alpha": 0.0}),
        pytest.param("minillm", {"objective": "token", "estimator": "exact"}, marks=pytest.mark.slow),
        ("dpkd", {"chosen": "dataset"}),
        ("rationale", {"train": addition_rationales(16), "distill_weight": 0.5, "divergence": "reverse_kl"}),
    ],
)
def test_a_run_of_every_method_does_not_depend_on_micro_batches(own, make_student, method, settings):
    settings, found = {"teacher_mix_alpha": 0.0, **settings} if method == "minillm" else settings, []
    for size, accumulation in ((8, 1), (2, 4)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        train = settings.get("train", numbers(16))
        trainer = own(method=method, max_steps=2, **{"train": train, **settings}, **batches)
        trainer.train()
        found.append((trainer.state.log_history, torch.cat([p.flatten() for p in trainer.model.parameters()])))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-8)
    for one, other in zip(*(logs for logs, _ in found), strict=True):
        names = {"loss", "grad_norm", "trained_tokens", "shared_borders", "comparable"} & one.keys()
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-5)


def test_rewards_of_sequences_are_those_of_whole_chunks(own, batch_of):
    """Whatever the chunks, what follows them adds up to log p(y) - log q(y), and a token's return is its chunk's on."""
    settings = {"estimator": "sampled", "teacher_mix_alpha": 0.0, "length_normalization": False}
    trainer = own(method="minillm", max_steps=1, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    (batch,) = trainer.score(trainer.sample([batch]))
    teacher, _ = trainer.two_models.frozen_logps(trainer.teacher, batch)
    predicts = trained_mask(batch["labels"])
    rows, chunks = predicts.nonzero()[:, 0], batch["token_chunk"][:, 1:][predicts]
    student = batch["token_logps"][:, 1:][predicts]
    returns = (batch["token_long"] + batch["token_single"])[:, 1:][predicts]
    for row in range(len(predicts)):
        of_row = rows == row
        gap = (teacher - student)[of_row].sum()
        numbers, found = chunks[of_row], returns[of_row]
        assert found[0].item() == pytest.approx(gap.item(), rel=1e-5)
        inside = (numbers[1:] == numbers[:-1]) & (numbers[1:] > 0)
        torch.testing.assert_close(found[1:][inside], found[:-1][inside], rtol=1e-5, atol=1e-6)


def test_pairs_are_as_long_as_they_are_in_the_teachers_tokens(own):
    trainer = own(method="dpkd", train=pairs(), teacher_max_length=7)
    rows = trainer.train_dataset
    assert max(rows["teacher_length"]) == 7 < max(rows["length"])
    for row in rows:
        longer = max(len(row["teacher_completion_ids"]), len(row["rejected_teacher_ids"]))
        assert row["teacher_length"] == len(row["teacher_prompt_ids"]) + longer
    with pytest.raises(DatasetError, match=r"would read 7 tokens .* at most teacher_max_length=6"):
        own(method="dpkd", train=pairs(), teacher_max_length=6)


def test_what_a_method_adds_to_batches_leaves_the_alignment_as_it_is(own, batch_of):
    """MiniLLM has weights of its own for single tokens: `exact_overlap` is still on one token of both alone."""
    settings = {"objective": "token", "loss_reduction": "sequence", "cross_tokenizer": {"exact_overlap": 1.0}}
    trainer = own(method="minillm", **settings)
    batch = batch_of(trainer)
    (scored,) = trainer.score([batch])
    assert scored.keys() > batch.keys() and all(torch.equal(scored[name], batch[name]) for name in ALIGNED_ENTRIES)
    found = trainer.compute_loss(trainer.model, scored, return_outputs=True)[1]["exact_overlap"]
    alone = batch["token_alone"][:, 1:][trained_mask(batch["labels"])] > 0
    assert found[alone].abs().min() > 0 and not found[~alone].any() and 0 < alone.sum() < len(alone)


# ---- Caches ------------------------------------------------------------------------------------------------------


def losses(trainer, by_step):
    trainer.train()
    return by_step(trainer)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, digits):
    """Folders of a teacher with its tokenizer, and of the tokenizer alone."""
    root = tmp_path_factory.mktemp("digits")
    tiny_llama(digits, 48, 2, seed=7, initializer_range=0.25).save_pretrained(root / "teacher")
    digits.save_pretrained(root / "teacher")
    digits.save_pretrained(root / "tokenizer")
    return root


RUN = {"max_steps": 4, "gradient_accumulation_steps": 2, "teacher_processing_class": None}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gkd", {}),
        pytest.param("gkd", {"lmbda": 0.5, "teacher_prompt": "1+{prompt}"}, marks=pytest.mark.slow),
        pytest.param("dpkd", {"train": pairs(16)}, marks=pytest.mark.slow),
    ],
)
def test_a_cached_teacher_is_the_live_one(own, by_step, kept, make_student, tmp_path, method, settings):
    run = {**RUN, "method": method, "teacher": str(kept / "teacher"), **settings}
    live = losses(own(make_student(), **run), by_step)
    cache = {"teacher_cache": str(tmp_path / "cache")}
    filled = own(make_student(), **run, **cache)
    assert losses(filled, by_step) == pytest.approx(live, rel=1e-6)
    if not settings.get("lmbda"):
        alone = {**run, "teacher": None, **cache, "teacher_placement": "cached"}
        read = own(make_student(), **{**alone, "teacher_tokenizer": str(kept / "tokenizer")})
        assert losses(read, by_step) == pytest.approx(live, rel=1e-6) and not read.teacher.is_live
        with pytest.raises(ConfigurationError, match=r"made with another tokenizer than the teacher's"):
            own(make_student(), **{**alone, "teacher_processing_class": filled.processing_class})


@pytest.mark.parametrize(("dtype", "near"), [(None, 1e-6), ("float16", 1e-3)])
def test_a_cache_of_next_bytes_is_the_live_teacher(own, by_step, kept, make_student, tmp_path, dtype, near):
    run = {**RUN, "teacher": str(kept / "teacher"), "divergence": "jsd"}
    live = losses(own(make_student(), **run), by_step)
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": "next_bytes", "teacher_cache_dtype": dtype}
    filled = own(make_student(), **run, **cache)
    assert losses(filled, by_step) == pytest.approx(live, rel=near)
    alone = {**run, "teacher": None, **cache, "teacher_placement": "cached"}
    read = own(make_student(), **{**alone, "teacher_tokenizer": str(kept / "tokenizer")})
    assert losses(read, by_step) == pytest.approx(live, rel=near) and not read.teacher.is_live
    row = next(iter(read.teacher.cache.read(key) for key in read.teacher.cache.keys()))  # noqa: SIM118
    assert row["buckets"].shape == (len(row["logps"]), 258) and row.keys() == {"buckets", "logps"}
    # Other ids end a text, the same ids stand for the same tokens: other buckets.
    changed = copy.deepcopy(filled.requirements.teacher_tokenizer)
    changed.eos_token = "+"
    with pytest.raises(ConfigurationError, match=r"made with another tokenizer than the teacher's"):
        own(make_student(), **{**alone, "teacher_processing_class": changed})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gkd", {"cross_tokenizer": {"alm": 1.0}}),
        pytest.param("gkd", {"cross_tokenizer": {"alm": 1.0}, "lmbda": 0.5}, marks=pytest.mark.slow),
        pytest.param("dpkd", {"train": pairs(16)}, marks=pytest.mark.slow),
    ],
)
def test_a_cache_of_token_logprobs_is_the_live_teacher(own, by_step, kept, make_student, tmp_path, method, settings):
    """Four bytes a token of the teacher's, which is all that chunks of text and whole texts take."""
    run = {**RUN, "method": method, "teacher": str(kept / "teacher"), "eval_dataset": numbers(5, seed=3), **settings}
    run |= {"eval_dataset": pairs(5)} if method == "dpkd" else {}
    live = own(make_student(), **run)
    expected, scores = losses(live, by_step), live.evaluate()
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": "token_logprobs"}
    filled = own(make_student(), **run, **cache)
    assert losses(filled, by_step) == pytest.approx(expected, rel=1e-6)
    found = filled.evaluate()
    names = {"eval_loss", "eval_alm", "eval_bits_per_byte", "eval_teacher_perplexity"} & found.keys()
    assert {n: found[n] for n in names} == pytest.approx({n: scores[n] for n in names}, rel=1e-6) and names
    for row in (filled.teacher.cache.read(key) for key in filled.teacher.cache.keys()):  # noqa: SIM118
        assert row.keys() == {"logps"} and row["logps"].dtype == torch.float32
    if not settings.get("lmbda"):
        alone = {**run, "teacher": None, **cache, "teacher_placement": "cached"}
        read = own(make_student(), **{**alone, "teacher_tokenizer": str(kept / "tokenizer")})
        assert losses(read, by_step) == pytest.approx(expected, rel=1e-6) and not read.teacher.is_live


REWARDED = {"reward_funcs": "length:1", "num_generations": 2, "per_device_train_batch_size": 4}
KEPT = {"teacher_cache": "kept", "teacher_cache_kind": "next_bytes"}
GIVEN = {"teacher_cache": "kept", "teacher_cache_kind": "token_logprobs"}


# ---- What is refused, before anything is loaded ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher_processing_class": None}, "nothing says what the tokenizer .* Name its folder"),
        (
            {"teacher_tokenizer": "no/such", "teacher_processing_class": None},
            "no tokenizer could be read from 'no/such'|is no folder",
        ),
        ({"cross_tokenizer": {"alm": 0.0}}, "cross_tokenizer.*expected weights above 0 of any of alm"),
        ({"cross_tokenizer": {"kl": 1.0}}, "cross_tokenizer.*expected weights above 0 of any of alm"),
        ({"teacher_tokenizer": "shared", "cross_tokenizer": {"alm": 1.0}}, "expected `teacher_tokenizer: own` beside"),
        ({"teacher_tokenizer": "shared", "alm_temperature": 2.0}, "expected `teacher_tokenizer: own` beside"),
        ({"cross_tokenizer": {"uld": 1.0}, "alm_temperature": 2.0}, "alm_temperature.*none without the term alm"),
        (
            {"cross_tokenizer": {"alm": 1.0}, "kd_temperature": 2.0},
            "kd_temperature.*no temperature but `alm_temperature`",
        ),
        ({"method": "dpkd", "cross_tokenizer": {"uld": 1.0}}, "cross_tokenizer.*likelihoods of whole texts"),
        (
            {"method": "minillm", "estimator": "sampled", "teacher_mix_alpha": 0.0, "cross_tokenizer": {"alm": 1.0}},
            "cross_tokenizer.*likelihoods of whole texts",
        ),
        ({"packing": True}, "packed rows have no prompt"),
        ({**KEPT, "cross_tokenizer": {"alm": 1.0, "uld": 1.0}}, "next_bytes.*but alm and next_byte.*kind: hidden"),
        (GIVEN, "needs the teacher's whole distribution.*token_logprobs.*`cross_tokenizer: {alm: 1.0}`"),
        ({**GIVEN, "teacher_tokenizer": "shared"}, "needs the teacher's whole distribution.*Use .*kind: hidden`[.]"),
        ({**GIVEN, "teacher_cache_dtype": "int8"}, "one of float32, float16 for token_logprobs"),
        ({**KEPT, "kd_temperature": 2.0}, "next_bytes.*`kd_temperature: 1`"),
        ({**KEPT, "teacher_tokenizer": "shared"}, "next_bytes.*expected `teacher_tokenizer: own`"),
        ({**KEPT, "teacher_cache_dtype": "int8"}, "one of float32, float16 for next_bytes"),
        ({"divergence": "logit_mse"}, "logits are compared id by id"),
        ({"lmbda": 1.0, "sampler_correction": "mask"}, "are of one token each"),
        ({"lmbda": 1.0, "feedback": "default"}, "feedback .* is written for the teacher"),
        ({"lmbda": 1.0, "teacher_max_length": 9}, "is known once they are written"),
        ({"teacher": None}, "there is no teacher"),
        ({"teacher": None, "self_teacher": "initial"}, "the student is its own teacher"),
        ({"teacher": None, "self_teacher": "ema"}, "the student is its own teacher"),
        ({"teacher": None, "self_teacher": "live"}, "the student is its own teacher"),
        ({"teacher": {"a": "x", "b": "y"}}, "the answers of several teachers"),
        ({"teacher": {"a": "x", "b": "y"}, "teacher_mix": "geometric"}, "the answers of several .*Name one teacher"),
        ({"extrapolate": {"reference": "initial"}}, "the answers of several teachers"),
        ({"teacher": RoutedTeacher}, "the answers of several teachers"),
        ({"teacher": ComposedTeacher}, "the answers of several teachers"),
        ({"method": "minillm"}, "sample one text together"),
        ({"method": "minillm", "teacher_mix_alpha": 0.0}, "Single is a sum over one vocabulary"),
        ({"method": "minillm", "teacher_mix_alpha": 0.0, **REWARDED}, "rewards .* each sampled token"),
        ({"lmbda": 1.0, **REWARDED}, "rewards .* each sampled token"),
        ({"method": "rationale", "objective": "edit", "distill_weight": 0.5}, "single tokens of wrong chains"),
        ({"method": "rationale", "divergence": "logit_mse", "distill_weight": 0.5}, "logits are compared id by id"),
        ({"method": "dpkd", "loss_type": "contrastive_skew"}, "distributions of tokens are compared"),
        ({"method": "dpkd", "reference_logps_dir": "kept"}, "kept by the student's tokens"),
        ({"eval_measures": ["agreement"], "eval_dataset": numbers(4)}, "compares both models id by id"),
    ],
)
def test_what_cannot_work_is_refused_by_name(own, digits, monkeypatch, settings, says):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("distill_trainers.teachers.loading.load_teacher", load)
    if (kind := settings.get("teacher")) in (RoutedTeacher, ComposedTeacher):  # made by hand
        both = {name: LocalTeacher(tiny_llama(digits, 48, 1, seed=seed)) for seed, name in enumerate("ab")}
        settings = {**settings, "teacher": kind(both, *([{"a": 0.5, "b": 0.5}] if kind is ComposedTeacher else []))}
    with pytest.raises((ConfigurationError, DatasetError), match=says):
        own(**settings)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1, 2, 3]}, "of token ids for a teacher"),
        ({"messages": "chat"}, "expected one completion"),
        ({"messages": "without a template"}, "its tokenizer has no chat template; expected one"),
    ],
)
def test_rows_that_cannot_be_read_otherwise_are_refused(make_tokenizer, make_trainer, row, says):
    tokenizer = make_tokenizer()
    said = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    template, history = ({} if row.get("messages") == "chat" else {"template": None}), row.get("messages") == "chat"
    row = {"messages": said} if "messages" in row else row
    with pytest.raises((ConfigurationError, DatasetError), match=says):
        make_trainer(
            tiny_llama(tokenizer, 32, 2), tiny_llama(tokenizer, 32, 2), Dataset.from_list([row] * 2), tok=tokenizer,
            max_length=90, teacher_tokenizer="own", teacher_processing_class=make_tokenizer(**template), lmbda=0.0,
            assistant_only_loss=history,
        )  # fmt: skip


def test_a_tokenizer_that_loses_text_is_refused(make_trainer, tokenizer, digits):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens(["<end>", "<pad>"])
    lossy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    with pytest.raises(ConfigurationError, match="The tokenizer of the teacher loses upper case"):
        make_trainer(teacher=tiny_llama(lossy, 48, 2), teacher_processing_class=lossy, **OWN)
