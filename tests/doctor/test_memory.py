"""The memory formula: activations against what autograd saves, and how everything moves with launch and placement."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from distill_trainers.doctor import Launch, Workload, estimate, shape_of
from distill_trainers.doctor.memory import layer_bytes
from distill_trainers.doctor.several import TeacherOnPaper, estimate_several
from distill_trainers.teachers.placement import PLACEMENTS

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda n: LlamaConfig(num_hidden_layers=n, **SIZES),
    "qwen2": lambda n: Qwen2Config(num_hidden_layers=n, **SIZES),
    "qwen3": lambda n: Qwen3Config(num_hidden_layers=n, head_dim=32, **SIZES),
    "gpt2": lambda n: GPT2Config(
        vocab_size=512, n_embd=128, n_layer=n, n_head=8, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
        bos_token_id=1, eos_token_id=1,
    ),
}  # fmt: skip


def saved_bytes(model, rows, length, autocast):
    """Different memory that autograd keeps of a forward, without the weights and their 16-bit copies."""
    pieces = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    shapes |= {tuple(reversed(shape)) for shape in shapes}

    def pack(tensor):
        storage = tensor.untyped_storage()
        copy = autocast and tuple(tensor.shape) in shapes and tensor.shape[0] != rows * length
        if storage.data_ptr() not in weights and not copy:
            pieces[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(2, 500, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0  # padding, as real batches have
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in pieces.values())


@pytest.mark.parametrize("compute", ["float32", "autocast", "16 bits"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_layer_saves_what_the_formula_says(kind, compute):
    """The difference that one more layer makes, to 3 % (means, square roots and logsumexps are not counted)."""
    rows, length, saved = 3, 40, []
    for layers in (2, 3):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](layers)).train()
        model = model.bfloat16() if compute == "16 bits" else model
        saved.append(saved_bytes(model, rows, length, compute == "autocast"))
    counted = layer_bytes(shape_of(model), Workload(rows, length), compute)
    assert counted == pytest.approx(saved[1] - saved[0], rel=0.03)


@pytest.fixture(scope="module")
def shapes():
    """A student and a larger teacher on the meta device."""
    with torch.device("meta"):
        made = [
            AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "hidden_size": 128 * times}, num_hidden_layers=4))
            for times in (1, 2)
        ]
    return [shape_of(model) for model in made]


def test_sizes_are_those_of_the_model(shapes):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=4))
    student = shapes[0]
    assert student.parameters == student.trainable == sum(p.numel() for p in model.parameters())
    assert student.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert student.head == 512 * 128 and not student.tied and student.embedding == student.head
    assert student.linear == 4 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)


def held(shapes, launch, placement="replicate", **work):
    return estimate(*shapes, Workload(rows=2, length=64, **work), launch, placement).held


def test_what_is_held_follows_the_table(shapes):
    p, n = shapes[0].parameters, 4
    single = held(shapes, Launch())
    assert (single["weights"], single["optimiser"], single["teacher"]) == (4 * p, 8 * p, 2 * shapes[1].parameters)
    assert held(shapes, Launch(n, strategy="ddp"))["buckets"] == 4 * p
    zero2 = held(shapes, Launch(n, strategy="zero2"), mixed=True)
    assert (zero2["weights"], zero2["optimiser"], zero2["float32 weights"]) == (2 * p, 8 * p / n, 4 * p / n)
    zero3 = held(shapes, Launch(n, strategy="zero3"), "zero3", mixed=True)
    assert (zero3["weights"], zero3["gradients' shares"]) == (2 * p / n, 2 * p / n)
    assert zero3["bucket of gradients"] == 2 * p
    assert zero3["teacher"] == 2 * shapes[1].parameters / n
    fsdp = held(shapes, Launch(n, strategy="fsdp2"), "fsdp2", mixed=True)
    assert (fsdp["weights"], fsdp["optimiser"]) == (4 * p / n, 8 * p / n)


def test_what_is_offloaded_is_held_by_the_host(shapes):
    launch = Launch(4, strategy="zero3", offloads_optimizer=True, offloads_parameters=True)
    got = estimate(*shapes, Workload(2, 64, mixed=True), launch, "zero3_offload")
    assert "weights" not in got.held and "optimiser" not in got.held and "teacher" not in got.held
    assert got.host["weights"] == shapes[0].parameters * 2 / 4 and got.host["teacher"] == shapes[1].parameters * 2 / 4


def test_teachers_by_placement(shapes):
    sizes = {
        name: held(shapes, Launch(4, strategy="ddp"), name).get("teacher", 0.0) for name in PLACEMENTS if name != "auto"
    }
    whole = 2 * shapes[1].parameters
    assert sizes["replicate"] == whole and sizes["zero3"] == sizes["fsdp2"] == sizes["device_map"] == whole / 4
    assert sizes["quantized-4bit"] < sizes["quantized-8bit"] < whole
    assert sizes["adapter_off"] == sizes["zero3_offload"] == 0
    assert sizes["cached"] == sizes["remote"] == 2 * shapes[1].head
    assert "teacher" not in held(shapes, Launch(), "cached", teacher_sparse=True)


@pytest.mark.parametrize("strategy", ["single", "zero3"])
def test_a_base_that_teaches_has_no_weights_of_its_own_but_a_forward(shapes, strategy):
    launch, work = Launch(2, strategy=strategy), Workload(2, 64)
    own, alone = (estimate(shapes[0], None, work, launch, name) for name in ("adapter_off", "cached"))
    assert own.held == alone.held
    forward, loss = own.moments["teacher's forward"], own.moments["end of forward"]
    assert forward["a layer at work"] > 0 and ("gathered" in forward) == (strategy == "zero3")
    assert loss["chunks of logits"] == 1.5 * alone.moments["end of forward"]["chunks of logits"]


def test_a_partitioned_teacher_is_never_whole(shapes):
    work = Workload(2, 64)
    teacher = shapes[1]
    forward = estimate(*shapes, work, Launch(2, strategy="ddp"), "zero3").moments["teacher's forward"]
    assert forward["gathered"] == 2 * max(teacher.layer, teacher.head, teacher.embedding) * work.teacher_bytes


def test_checkpointing_and_small_chunks_take_less(shapes):
    work = Workload(rows=4, length=256, chunk_bytes=2**20)
    plain = estimate(*shapes, work, Launch(), "replicate")
    saving = estimate(*shapes, replace(work, checkpointing=True), Launch(), "replicate")
    assert plain.highest == "end of forward"
    assert saving.moments["end of forward"]["activations"] < 0.6 * plain.moments["end of forward"]["activations"]
    assert plain.moments["end of forward"]["chunks of logits"] == 3 * 2**20
    tiny = estimate(*shapes, replace(work, chunk_bytes=2**16), Launch(), "replicate")
    assert plain.peak - tiny.peak == 3 * (2**20 - 2**16)


def test_rollouts_take_keys_and_values(shapes):
    work = Workload(rows=2, length=64, rollout_rows=8, prompt=48, new_tokens=16)
    moment = estimate(*shapes, work, Launch(), "replicate").moments["rollouts"]
    assert moment["keys and values"] == 2 * 4 * (2 * 16) * 4 * 8 * 64
    sharded = estimate(*shapes, work, Launch(2, strategy="zero3"), "zero3").moments["rollouts"]
    assert sharded["student, whole"] == 4 * shapes[0].parameters


def test_rounded_weights_are_held_from_forward_to_backward_and_while_it_samples(shapes):
    work = Workload(2, 64, rollout_rows=8, prompt=48, new_tokens=16)
    plain, rounded = (estimate(*shapes, replace(work, rounded=on), Launch(), "replicate") for on in (False, True))
    for moment in ("end of forward", "rollouts"):
        more = sum(rounded.moments[moment].values()) - sum(plain.moments[moment].values())
        assert more == 4 * shapes[0].linear


def test_hidden_states_are_held_from_forward_to_backward(shapes):
    """Of each of the student's layers: the teacher's at the trained tokens, in its dtype, and the difference."""
    work = Workload(2, 64)
    plain, matched = (estimate(*shapes, replace(work, matched=on), Launch(), "replicate") for on in (False, True))
    student = shapes[0]
    more = sum(matched.moments["end of forward"].values()) - sum(plain.moments["end of forward"].values())
    assert more == student.layers * 2 * 64 * student.hidden * (work.teacher_bytes + 4)


def test_several_teachers_hold_their_sum_and_answer_one_after_the_other():
    student = shape_of(AutoModelForCausalLM.from_config(CONFIGS["llama"](2)))
    large = shape_of(AutoModelForCausalLM.from_config(CONFIGS["llama"](6)))
    work, launch = Workload(2, 64, weight_bytes=4.0, teacher_bytes=4.0), Launch()
    alone = {shape: estimate(student, shape, work, launch, "replicate") for shape in (student, large)}
    teachers = {
        "small": TeacherOnPaper(student, "replicate"),
        "large": TeacherOnPaper(large, "replicate"),
        "adapter": TeacherOnPaper(large, "replicate", shares=True),
        "start": TeacherOnPaper(None, "adapter_off", shares=True),
    }
    need = estimate_several(student, teachers, work, launch)
    held = {name: size for name, size in need.held.items() if name.startswith("teacher")}
    assert held == {f"teacher {name}": alone[s].held["teacher"] for name, s in (("small", student), ("large", large))}
    assert sum(need.held.values()) == sum(alone[large].held.values()) + held["teacher small"]
    for moment, parts in alone[large].moments.items():
        assert sum(need.moments[moment].values()) >= sum(parts.values())
    one = estimate_several(student, {"large": teachers["large"]}, work, launch)
    assert one.peak == alone[large].peak


def test_a_longer_row_of_the_teacher_counts_in_its_forward_alone():
    student = shape_of(AutoModelForCausalLM.from_config(CONFIGS["llama"](2)))
    plain, viewed = (
        estimate(student, student, Workload(2, 64, teacher_more=more), Launch(), "replicate").moments
        for more in (0, 32)
    )
    forwards = [sum(moments.pop("teacher's forward").values()) for moments in (plain, viewed)]
    assert forwards[1] == pytest.approx(1.5 * forwards[0]) and plain == viewed
