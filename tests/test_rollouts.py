"""Sampling, the λ draw, and completions kept on disk."""

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from distill_trainers.exceptions import CheckpointError
from distill_trainers.randomness import Purpose, Role, Stream
from distill_trainers.rollouts import (
    CompletionSettings,
    CompletionStore,
    SamplingSettings,
    complete_prompts,
    completing,
    draws_on_policy,
    generate_completions,
)
from distill_trainers.rollouts.store import prompt_key


def test_lambda_is_drawn_with_its_probability_and_only_from_seed_and_step():
    draws = [draws_on_policy(0.3, seed=1, step=s) for s in range(4000)]
    assert abs(sum(draws) / 4000 - 0.3) < 0.04  # 5 standard errors
    assert draws == [draws_on_policy(0.3, seed=1, step=s) for s in range(4000)]
    assert draws != [draws_on_policy(0.3, seed=2, step=s) for s in range(4000)]
    assert not any(draws_on_policy(0.0, 0, s) for s in range(500))
    assert all(draws_on_policy(1.0, 0, s) for s in range(500))


def test_completions_end_at_their_first_eos_and_do_not_depend_on_padding(make_teacher, tokenizer):
    model = make_teacher().eval()
    settings = SamplingSettings(6, temperature=0.0, eos_token_ids=[1, 9], pad_token_id=1)  # pad is an EOS
    prompts = [[3, 4, 12, 5, 13], [7, 12, 7, 13]]
    alone = [generate_completions(model, torch.tensor([p]), torch.ones(1, len(p)), settings)[0] for p in prompts]
    width = 8
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    assert generate_completions(model, ids, mask, settings) == alone
    assert generate_completions(model, ids, mask, settings, batch_size=1) == alone
    for completion in alone:
        assert all(token not in (1, 9) for token in completion[:-1]) and 1 <= len(completion) <= 6


def test_ids_beyond_the_vocabulary_are_never_sampled(make_teacher, streams):
    model = make_teacher().eval()
    settings = SamplingSettings(8, temperature=5.0, pad_token_id=0, suppress_from=6)
    prompts = torch.full((16, 3), 4), torch.ones(16, 3)
    completions = generate_completions(model, *prompts, settings, streams=streams(16))
    assert max(max(c) for c in completions) < 6


def test_store_survives_a_torn_line_and_finds_prompts_by_content(tmp_path):
    store = CompletionStore(tmp_path, {"teacher": "x"})
    keys = [prompt_key([1, 2]), prompt_key([1, 2, 3]), prompt_key([12])]
    assert len(set(keys)) == 3
    store.append([(keys[0], [5, 6])])
    with (store.folder / "part-00000.jsonl").open("a") as out:
        out.write('{"prompt": "half')
    store.append([(keys[1], [7])])
    assert store.load() == {keys[0]: [5, 6], keys[1]: [7]}
    CompletionStore(tmp_path, {"teacher": "x"}, rank=1).append([(keys[2], [8])])
    assert store.load()[keys[2]] == [8]
    assert CompletionStore(tmp_path, {"teacher": "y"}).load() == {}


def test_a_line_that_is_not_as_it_was_written_is_made_again(tmp_path, caplog):
    """Whichever byte of it: a changed number would be another text, and nobody would know."""
    store = CompletionStore(tmp_path, {"teacher": "x"})
    store.append([("a", [5, 6]), ("b", [7])])
    part = store.folder / "part-00000.jsonl"
    data = part.read_bytes()
    end = data.index(b"\n")
    for place in range(end):
        part.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert store.load() == {"b": [7]}, place
    assert "1 of the lines of" in caplog.text and "part-00000.jsonl" in caplog.text
    part.write_bytes(
        b'{"prompt": "a", "completion": [5, 6]}\n\xff\xfe\n' + data[end + 1 :]
    )  # of another writer; no text
    assert store.load() == {"b": [7]}


def test_a_store_that_cannot_be_read_is_named(tmp_path):
    store = CompletionStore(tmp_path, {"teacher": "x"})
    (store.folder / "part-00000.jsonl").mkdir()
    with pytest.raises(
        CheckpointError, match="Could not read the teacher's completions in .*part-00000.jsonl.*remove it"
    ):
        store.load()


@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_looks_late_leaves_nothing_out(tmp_path, monkeypatch, late):
    """One that has written before the other has looked would leave it with a shorter list, and other batches."""
    prompts = {prompt_key([n]): [n] for n in range(16)}
    barrier, parts, outcomes = threading.Barrier(2), [], [{}, {}]
    echo = SimpleNamespace(generate=lambda model, ids, mask, sampling, streams: ids[:, -1:].tolist())
    stream = Stream(0, Role.TEACHER, Purpose.COMPLETION)
    settings = CompletionSettings(SamplingSettings(1, eos_token_ids=[0], pad_token_id=0), stream, 2, echo)

    class LateStore(CompletionStore):
        def load(self):
            time.sleep(0.3)
            return super().load()

    def gather(own):
        parts.extend(own)
        barrier.wait()
        return parts

    def process(rank):
        store = (LateStore if rank == late else CompletionStore)(tmp_path, {"model": "one"}, rank)
        processes = SimpleNamespace(
            num_processes=2, process_index=rank, device=torch.device("cpu"), wait_for_everyone=barrier.wait
        )
        outcomes[rank] = complete_prompts(prompts, nullcontext(), processes, settings, store, progress=False)

    monkeypatch.setattr(completing, "gather_object", gather)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == [prompts, prompts]
    assert CompletionStore(tmp_path, {"model": "one"}, 2).load() == prompts
