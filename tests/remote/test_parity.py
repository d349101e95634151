"""A teacher behind HTTP is the local one: losses of whole runs, over real HTTP."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

from distill_trainers.data.token_bytes import TokenBytes
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses.reduction import trained_mask
from distill_trainers.signals import HiddenStates, NextBytes, TokenLogprobs, TopK
from distill_trainers.teachers import LocalTeacher, RemoteTeacher
from distill_trainers.teachers.remote import RemoteSettings
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.given.best_metric import scores_of

RUN = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def losses_and_norms(trainer, by_step):
    trainer.train()
    return [by_step(trainer, name) for name in ("loss", "grad_norm")]


def assert_same(found, expected, rel):
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) >= 3 and ours == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("gkd", {"lmbda": 0.0}, {}),
        ("gkd", {"lmbda": 0.0, "packing": True}, {}),
        ("gkd", {"lmbda": 0.5, "teacher_prompt": "9+{prompt}"}, {}),
        ("gkd", {"lmbda": 0.0, "data_collator": DataCollatorWithFlattening()}, {}),
        ("gkd", {"lmbda": 0.5, "divergence": "forward_kl", "kd_temperature": 2.0}, {}),
        ("gkd", {"lmbda": 1.0}, {"teacher_server_kind": "topk", "teacher_server_top_k": 99}),
        (
            "minillm",
            {"objective": "token", "estimator": "sampled"},
            {"teacher_server_kind": "token_logprobs"},
        ),
        ("minillm", {"teacher_mix_alpha": 0.0}, {}),
        ("dpkd", {"chosen": "dataset"}, {}),
    ],
)
def test_a_run_is_that_of_the_local_teacher(make_trainer, serve, by_step, make_teacher, method, settings, told):
    local = losses_and_norms(make_trainer(method=method, teacher=make_teacher(), **RUN, **settings), by_step)
    trainer = make_trainer(method=method, teacher=serve().url, **RUN, **settings, **told)
    assert isinstance(trainer.teacher, RemoteTeacher)
    assert_same(losses_and_norms(trainer, by_step), local, 1e-4)


def test_evaluation_is_that_of_the_local_teacher(make_trainer, serve, make_teacher):
    rows = addition_dataset(10, seed=5)
    local = make_trainer(teacher=make_teacher(), eval_dataset=rows, lmbda=0.0).evaluate()
    remote = make_trainer(teacher=serve().url, eval_dataset=rows, lmbda=0.0).evaluate()
    for name in ("eval_loss", "eval_kl", "eval_teacher_perplexity", "eval_top1_agreement", "eval_acceptance"):
        assert remote[name] == pytest.approx(local[name], rel=1e-5)


def test_a_server_that_tells_given_tokens_alone_has_no_divergence_to_choose_the_best_by(make_trainer, serve):
    rows, sampled = addition_dataset(4, seed=5), {"method": "minillm", "objective": "token", "estimator": "sampled"}
    sampled |= {"teacher": serve().url, "teacher_server_kind": "token_logprobs", "eval_dataset": rows}
    trainer = make_trainer(**sampled)
    found = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert found - {"epoch", "model_preparation_time"} == scores_of(trainer.args, {trainer.teacher.tells})
    with pytest.raises(ConfigurationError, match="metric_for_best_model: eval_kl"):
        make_trainer(**sampled, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_kl")


def test_padded_vocabularies_and_heads_with_more_to_them(make_trainer, serve, by_step, make_teacher):
    """Ids that no tokenizer defines leave the softmax on the server; bias and scale of the head come along."""
    for config in ({"vocab_size": 20}, {"vocab_size": 20, "tie_word_embeddings": False}):
        for told in ({}, {"teacher_server_kind": "topk", "teacher_server_top_k": 14}):
            local = make_trainer(teacher=make_teacher(**config), lmbda=0.0, **padded())
            remote = make_trainer(teacher=serve(make_teacher(**config)).url, lmbda=0.0, **told)
            assert remote.vocab_size == local.vocab_size == 14
            assert_same(losses_and_norms(remote, by_step), losses_and_norms(local, by_step), 1e-4)


def padded():
    from distill_trainers.toy import character_tokenizer

    return {"teacher_processing_class": character_tokenizer()}


def batch(tokens=7):
    torch.manual_seed(3)
    ids = torch.randint(2, 14, (3, tokens))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    labels[2] = -100  # nothing is asked of this row
    return {"input_ids": ids, "attention_mask": mask}, trained_mask(labels), ids


@pytest.mark.parametrize("fused", [True, False])
def test_each_kind_says_what_the_teacher_says(serve, make_teacher, tokenizer, monkeypatch, fused):
    model = make_teacher()
    if not fused:
        monkeypatch.setattr("distill_trainers.models.head_is_fusable", lambda model: False)
    served, (inputs, predicts, ids) = serve(model), batch()
    local = LocalTeacher(copy.deepcopy(model))
    truth = local.signal(inputs, predicts, None).chunk(slice(None)).logps()
    labels = ids[:, 1:][predicts]
    assert served.service.info["kinds"] == ["hidden"] * fused + ["topk", "sampled", "next_bytes", "token_logprobs"]
    for kind in served.service.info["kinds"]:
        teacher = RemoteTeacher(served.url, RemoteSettings(kind, top_k=5, draws=20000, seed=1))
        said = teacher.signal(inputs, predicts, None)
        assert len(said) == int(predicts.sum())
        if isinstance(said, HiddenStates):
            torch.testing.assert_close(said.chunk(slice(None)).logps(), truth, atol=1e-4, rtol=1e-4)
        elif isinstance(said, TokenLogprobs):
            torch.testing.assert_close(said.values, truth.gather(-1, labels[:, None]).squeeze(-1), atol=1e-4, rtol=1e-4)
            if isinstance(said, NextBytes):
                first = TokenBytes.of(tokenizer).first_bytes(truth.shape[-1])
                shares = truth.exp() @ F.one_hot(first, 258).to(truth)
                torch.testing.assert_close(said.buckets.exp(), shares, atol=1e-4, rtol=1e-4)
        elif isinstance(said, TopK):
            best = truth.topk(5)
            assert torch.equal(said.ids.long(), best.indices)
            torch.testing.assert_close(said.logps, best.values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(said.tail_logps.exp(), 1 - best.values.exp().sum(-1), atol=1e-5, rtol=1e-5)
        else:
            shares = torch.zeros_like(truth).scatter_add_(-1, said.ids.long(), said.weights)
            torch.testing.assert_close(shares, truth.exp(), atol=0.02, rtol=0)  # 5 standard errors
        teacher.close()


def test_answers_do_not_depend_on_parts_servers_or_company(serve, make_teacher):
    """Small limits, two servers, and forwards of two rows at most: the same tokens in the same order."""
    inputs, predicts, _ = batch(12)
    limits = {"max_rows": 1, "batch_tokens": 24, "max_tokens": 12}
    servers = f"{serve(**limits).url},{serve(**limits).url}/v1/"
    expected = LocalTeacher(make_teacher()).signal(inputs, predicts, 12)
    teacher = RemoteTeacher(servers)
    for _ in range(3):
        found = teacher.signal(inputs, predicts, 12)
        torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-4, rtol=1e-4)
        assert found.head.num_ids == 12
    teacher.close()


def test_hidden_states_may_be_sent_narrower(serve):
    inputs, predicts, _ = batch()
    teacher = RemoteTeacher(serve().url, RemoteSettings(dtype="bfloat16"))
    assert teacher.signal(inputs, predicts, None).hidden.dtype == torch.bfloat16
    teacher.close()


def test_nothing_is_asked_where_nothing_is_trained(serve):
    inputs, predicts, _ = batch()
    for kind in ("hidden", "topk", "sampled", "next_bytes", "token_logprobs"):
        teacher = RemoteTeacher(serve().url, RemoteSettings(kind))
        said = teacher.signal(inputs, torch.zeros_like(predicts), None)
        assert len(said) == 0
        teacher.close()


def test_micro_batches_of_a_window_are_asked_for_together(make_trainer, serve, batch_of):
    """All of a window's questions are there before the first answer is taken, and each is asked once."""
    served = serve()
    trainer = make_trainer(teacher=served.url, lmbda=0.0, **RUN)
    most = []
    real = trainer.teacher.signal

    def signal(inputs, predicts, vocab_size):
        if not trainer.teacher._announcing:
            most.append(len(trainer.teacher._ahead))
        return real(inputs, predicts, vocab_size)

    trainer.teacher.signal = signal
    trainer.train()
    assert most == [2, 1] * 3  # before each of the two micro-batches of three steps
    assert not trainer.teacher._ahead and served.service.counted["questions"] == 6
