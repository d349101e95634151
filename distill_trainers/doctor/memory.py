r"""How much memory a step takes on one rank: the only place where that is worked out.

**Notation.** P parameters, P_t of them trained; N ranks; b bytes of a weight as it is held, w of a number as it is
computed (2 under bf16 or fp16, else 4); B rows of L tokens in a micro-batch, n = B L; V ids, D hidden units, D_t the
teacher's; f units of an MLP, a of all query heads, k of the key heads. GPUs are counted without what the driver and
the allocator keep for themselves (see `RESERVED`).

**Held from the first step on.**

| launch | weights | gradients | Adam | beside them |
|---|---|---|---|---|
| single | b P | b P_t | 2 b P_t | |
| DDP | b P | b P_t | 2 b P_t | b P_t of buckets, in which gradients are summed |
| ZeRO-1 | b P | b P_t | 8 P_t / N | 4 P_t / N of float32 weights |
| ZeRO-2 | b P | b P_t / N | 8 P_t / N | 4 P_t / N of float32 weights |
| ZeRO-3 | b P / N | b P_t / N, never freed | 8 P_t / N | 4 P_t / N of float32 weights |
| FSDP2 | b P / N | b P_t / N | 2 b P_t / N | |

b is 4 unless the student is loaded narrower: under autocast weights stay in float32. DeepSpeed itself turns them into
16 bits, b = 2, and keeps the float32 weights of its share, also where b is 4. Offloaded shares count for the host.
Other optimisers: SGD and Adafactor keep (nearly) nothing, 8-bit Adam 2 bytes per parameter.

**Activations** of one decoder layer are what autograd saves, per token (`layer_bytes`, which a test holds against what
it does save): both norms keep their input, the normalised one and what the linear layers read, 2 * 3 D numbers; q, and
k and v repeated for all heads since padding needs a mask, the attention's result: 4 a w; gate, SiLU(gate), up and
their product: 4 f w (without a gate: input and output of GELU, and three steps between in its tanh form: 5 f w). Of
the 6 D numbers, in float32 all have 4 bytes, 24 D; under autocast the residual stream is float32, and each of the five
linear layers that read it casts it for itself, 26 D; in pure 16 bits the norms compute in float32, 16 D. Norms of
queries and keys (Qwen3) add 2 (a + k) numbers, one of them in float32 everywhere. The mask of B L^2 numbers is kept by
each layer.

Without checkpointing that is all, times the layers. With it, each layer keeps its input (4 D, or 2 D in pure 16 bits),
and one layer at a time is computed again. Under autocast the 16-bit copies of the weights are kept as well, 2 P; with
checkpointing those of the trained ones, 2 P_t. `quantize_student` keeps the rounded weights of all linear layers in
float32, with checkpointing those of one layer, and of all while it samples. Beside what is saved, a layer at work holds
about 2 D + 3 f numbers per token.

**Head and loss** (`losses/fused_linear.py`): at most three chunks of logits, min(4 n V, `loss_chunk_mib`) each: the
student's, the teacher's, the gradient; both models' last hidden states; in float32 the gradients of the student's, 4 n
D, and of the head, 4 V D where it is trained. `hidden_weight` keeps the teacher's states that each of the student's
layers is held against, and their float32 differences: n D (b_t + 4) for each. 16-bit heads are turned into float32 on
a CPU, which cannot multiply them with a wide result.

**Moments.** What is held, and the most of
- end of forward: activations + head and loss (+ gradients, from the second micro-batch of a step on);
- end of backward: gradients + the embedding's gradient, which is dense, beside the head's where both are one matrix;
- optimiser step: gradients, and for ZeRO their float32 copies, 4 P_t / N;
- the teacher's forward: a layer at work and its last hidden states (+ gradients, likewise);
- rollouts: keys and values of all sampled rows, 2 k w per layer and token; three times their next logits, 4 V a row;
  the prompts at work in a layer; the whole student where it is sharded (and the teacher, where it samples along).
Between forward and backward activations fall as gradients grow, so that the most is at one end.

**Gathered.** ZeRO-3 holds up to 10^9 parameters whole while it computes (DeepSpeed's `max_live_parameters`, also its
distance of reuse, so that smaller models stay whole through a step). Its bucket of 5 * 10^8 gradients is made once and
for all; that of ZeRO-2 at each backward. A teacher's engine (`models/frozen.py`) is told to hold about two layers, or
the embedding or head and a copy of it, in which it was gathered. FSDP2 holds two layers whole, and from forward to
backward the embedding and the head.

**Teacher**, by placement: `replicate` b P; `zero3`, `fsdp2` b P / N and what is gathered (FSDP2: two layers, the head);
`zero3_offload` the same with the shares on the host; `device_map` b P / GPUs of the machine; `quantized-8bit` and
`quantized-4bit` 1 and 0.52 bytes for the weights of linear layers, 2 for the rest; `adapter_off` and `live` no weights,
but a forward of the student; `ema` the same and 4 P_t (shared as the student's), and while it answers b P_t;
`cached` and `remote` the head, or nothing where the answers are sparse.

Sources: Korthikanti et al. (arXiv 2205.05198) count activations this way for a GPT with dropout; ZeRO is arXiv
1910.02054. How far the sums are from measured peaks is in docs/doctor.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .launch import SHARDED, Launch
from .shapes import ModelShape

RESERVED = 1.5 * 2**30  # of a GPU: context, NCCL, workspaces of matrix products
_LIVE, _BUCKET = 1e9, 5e8  # parameters; DeepSpeed's defaults, which accelerate leaves as they are
_QUANTIZED = {"quantized-8bit": 1.0, "quantized-4bit": 0.52}

OF_STUDENT = ("adapter_off", "live", "ema")  # placements of a teacher that is the student

Parts = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """What a step computes, per rank.

    Attributes:
        rows, length: of a micro-batch; tokens of a row, prompt and completion.
        weight_bytes: b of the student as it is loaded; frozen_bytes: of the weights below an adapter.
        mixed: bf16 or fp16 of the trainer.
        state_bytes: of the optimiser per trained parameter, where weights have 4 bytes (Adam: 8).
        rollout_rows, prompt, new_tokens: rows sampled together and their tokens; 0 rows without rollouts.
        teacher_samples: whether the teacher decodes beside the student.
        teacher_sparse: whether a cached or remote teacher answers without its head.
        padded: whether rows have different lengths, so that attention needs a mask.
        teacher_more: tokens that a row has for the teacher beyond the student's, where it has a prompt of its own.
        rounded: whether the student computes with rounded weights (`quantize_student`).
        matched: whether hidden states of all layers are compared (`hidden_weight`).
    """

    rows: int
    length: int
    accumulation: int = 1
    checkpointing: bool = False
    weight_bytes: float = 4.0
    frozen_bytes: float | None = None
    teacher_bytes: float = 2.0
    mixed: bool = False
    state_bytes: float = 8.0
    chunk_bytes: float = 2**30
    rollout_rows: int = 0
    prompt: int = 0
    new_tokens: int = 0
    teacher_samples: bool = False
    teacher_sparse: bool = False
    padded: bool = True
    teacher_more: int = 0
    rounded: bool = False
    matched: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def teacher_tokens(self) -> int:
        return self.rows * (self.length + self.teacher_more)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    Attributes:
        held: from the first step on, by name.
        moments: what each moment of a step adds, by name.
        host: on the machine's memory, of this rank.
    """

    held: Parts
    moments: dict[str, Parts]
    host: Parts = field(default_factory=dict)

    @property
    def highest(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + sum(self.moments[self.highest].values())


def estimate(
    student: ModelShape, teacher: ModelShape | None, work: Workload, launch: Launch, placement: str
) -> MemoryEstimate:
    """Estimate the memory of one rank; the docstring of the module derives it.

    Args:
        placement: of the teacher, one of `teachers.placement.PLACEMENTS` but `auto`.
    """
    ours = _Student(student, work, launch)
    if placement in OF_STUDENT:  # the student answers: nothing of its own, but a forward and its logits
        teacher, work = student, replace(work, teacher_bytes=ours.width)
    other = _Teacher(teacher, work, launch, placement)
    resident, offloaded = ours.held()
    moments = {
        "end of forward": {
            "activations": ours.activations(),
            **ours.loss(teacher),
            **ours.gathered(),
            **(ours.gradients() if work.accumulation > 1 else {}),
            "the teacher's head, whole": other.gathered_head(),
        },
        "end of backward": {**ours.gradients(), "embedding's gradient": ours.dense_embedding(), **ours.gathered()},
        "optimiser step": {**ours.gradients(), **ours.step()},
    }
    if teacher is not None:
        moments["teacher's forward"] = {
            **other.forward(),
            **(ours.gathered() if placement in OF_STUDENT and launch.strategy in SHARDED else {}),
            **(ours.set_aside() if placement == "ema" else {}),
            **(ours.gradients() if work.accumulation > 1 else {}),
        }
    if work.rollout_rows:
        moments["rollouts"] = {**ours.rollouts(), **other.rollouts()}
    average = ours.average() if placement == "ema" else 0.0
    return MemoryEstimate(
        held=_without_nothing({**resident, "teacher": other.held() + average}),
        moments={name: _without_nothing(parts) for name, parts in moments.items()},
        host=_without_nothing({**offloaded, "teacher": other.host()}),
    )


def layer_bytes(shape: ModelShape, work: Workload, compute: str) -> float:
    """Estimate what autograd saves of one decoder layer for a micro-batch.

    Args:
        compute: `float32`, `autocast` or `16 bits`.
    """
    w = 4 if compute == "float32" else 2
    norms, mlp = {"float32": 16, "autocast": 12, "16 bits": 8}, 5
    if shape.gated:
        norms, mlp = {"float32": 24, "autocast": 26, "16 bits": 16}, 4
    per_token = norms[compute] * shape.hidden + w * (4 * shape.attended + mlp * shape.intermediate)
    if shape.norms_queries:
        per_token += (4 + w) * (shape.attended + shape.kept)
    mask = w * work.rows * work.length**2 if work.padded else 0
    return work.tokens * per_token + mask


def at_work(shape: ModelShape, tokens: int, width: float) -> float:
    """Estimate what a layer holds for a moment, beside what it saves."""
    return tokens * (2 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate) * width


@dataclass(frozen=True)
class _Student:
    shape: ModelShape
    work: Workload
    launch: Launch

    @property
    def bytes(self) -> float:
        """b of trained weights."""
        return 2.0 if self.launch.by_deepspeed and self.work.mixed else self.work.weight_bytes

    @property
    def compute(self) -> str:
        if self.bytes < 4:
            return "16 bits"
        return "autocast" if self.work.mixed else "float32"

    @property
    def width(self) -> float:
        return 4.0 if self.compute == "float32" else 2.0

    @property
    def share(self) -> float:
        """Part of the weights that this rank holds."""
        return 1 / self.launch.processes if self.launch.strategy in SHARDED else 1.0

    def weights(self) -> float:
        frozen = self.shape.parameters - self.shape.trainable
        below = self.work.frozen_bytes if self.work.frozen_bytes is not None else self.bytes
        narrow = 2.0 if self.launch.by_deepspeed and self.work.mixed else below
        return self.shape.trainable * self.bytes + frozen * min(below, narrow)

    def held(self) -> tuple[Parts, Parts]:
        launch, trained = self.launch, self.shape.trainable
        weights = {"weights": self.weights() * self.share}
        ranks = launch.processes if launch.by_deepspeed or launch.strategy == "fsdp2" else 1
        states = self.work.state_bytes * (1.0 if launch.by_deepspeed else self.bytes / 4)
        optimiser = {"optimiser": trained * states / ranks}
        on_gpu: Parts = {}
        if launch.by_deepspeed:
            optimiser["float32 weights"] = 4 * trained / ranks
            if launch.strategy == "zero3":
                on_gpu["gradients' shares"] = self.bytes * trained / ranks
                on_gpu["bucket of gradients"] = min(_BUCKET, trained) * self.bytes
        if launch.strategy == "ddp":
            on_gpu["buckets"] = self.bytes * trained
        host: Parts = {}
        (host if launch.offloads_parameters else on_gpu).update(weights)
        (host if launch.offloads_optimizer or launch.offloads_parameters else on_gpu).update(optimiser)
        return on_gpu, host

    def average(self) -> float:
        """Of the trained weights, in float32."""
        return 4.0 * self.shape.trainable * self.share

    def set_aside(self) -> Parts:
        """The trained weights, while their average is in their place."""
        return {"student's weights": self.bytes * self.shape.trainable * self.share}

    def gradients(self) -> Parts:
        trained, launch = self.shape.trainable, self.launch
        if launch.strategy == "zero3":
            return {}  # held
        ranks = launch.processes if launch.strategy in ("zero2", "fsdp2") else 1
        return {"gradients": self.bytes * trained / ranks}

    def gathered(self) -> Parts:
        launch, shape = self.launch, self.shape
        if launch.strategy == "zero3":
            return {"gathered": min(shape.parameters, _LIVE) * self.width}
        if launch.by_deepspeed:
            return {"bucket of gradients": min(_BUCKET, shape.trainable) * self.bytes}
        if launch.strategy == "fsdp2":
            whole = 2 * shape.layer + shape.head + shape.embedding
            return {
                "gathered": min(shape.parameters, whole) * self.width,
                "layer's gradients": shape.layer * self.width,
            }
        return {}

    def step(self) -> Parts:
        if not self.launch.by_deepspeed:
            return {}
        return {"float32 gradients": 4 * self.shape.trainable / self.launch.processes}

    def activations(self) -> float:
        work, shape = self.work, self.shape
        layer = layer_bytes(shape, work, self.compute)
        busy = at_work(shape, work.tokens, self.width)
        copied = shape.trainable if work.checkpointing else shape.parameters
        copies = 2 * copied if self.compute == "autocast" else 0
        copies += 4 * min(shape.linear, shape.layer if work.checkpointing else shape.linear) * work.rounded
        if not work.checkpointing:
            return shape.layers * layer + busy + copies
        stream = 2 if self.compute == "16 bits" else 4
        return work.tokens * shape.hidden * stream * shape.layers + layer + busy + copies

    def loss(self, teacher: ModelShape | None) -> Parts:
        shape, n = self.shape, self.work.tokens
        chunk = min(self.work.chunk_bytes, 4 * n * shape.vocab)
        hidden = n * shape.hidden * (4 + self.width)
        teacher_hidden = 0 if teacher is None else n * teacher.hidden * self.work.teacher_bytes
        parts = {
            "chunks of logits": (3 if teacher is not None else 2) * chunk,
            "last hidden states": hidden + teacher_hidden,
            "head's gradient": 4.0 * shape.head if shape.head_trains else 0.0,
            "hidden states": self.work.matched * shape.layers * n * shape.hidden * (self.work.teacher_bytes + 4),
        }
        if self.launch.on_cpu:  # heads in 16 bits are converted
            parts["heads in float32"] = 4.0 * shape.head if self.bytes < 4 else 0.0
            if teacher is not None and self.work.teacher_bytes < 4:
                parts["heads in float32"] += 4.0 * teacher.head
        return parts

    def dense_embedding(self) -> float:
        full = self.shape.trainable == self.shape.parameters
        return self.bytes * self.shape.vocab * self.shape.hidden if full and self.shape.tied else 0.0

    def rollouts(self) -> Parts:
        work, shape = self.work, self.shape
        parts = _decoding(shape, work, self.width) | {"rounded weights": 4.0 * shape.linear * work.rounded}
        if self.launch.strategy in SHARDED:
            parts["student, whole"] = self.weights() * (self.width / self.bytes)
        return parts


@dataclass(frozen=True)
class _Teacher:
    shape: ModelShape | None
    work: Workload
    launch: Launch
    placement: str

    @property
    def sharded(self) -> bool:
        return self.placement in ("zero3", "zero3_offload", "fsdp2")

    def _resident(self) -> float:
        shape, b = self.shape, self.work.teacher_bytes
        if shape is None or self.placement in OF_STUDENT:
            return 0.0
        if self.placement in ("cached", "remote"):
            return 0.0 if self.work.teacher_sparse else shape.head * b
        if self.placement in _QUANTIZED:
            return shape.linear * _QUANTIZED[self.placement] + (shape.parameters - shape.linear) * 2.0
        if self.placement == "device_map":
            return shape.parameters * b / self.launch.per_machine
        return shape.parameters * b / (self.launch.processes if self.sharded else 1)

    def held(self) -> float:
        return 0.0 if self.placement == "zero3_offload" else self._resident()

    def host(self) -> float:
        return self._resident() if self.placement == "zero3_offload" else 0.0

    def gathered_head(self) -> float:
        return self.shape.head * self.work.teacher_bytes if self.shape and self.sharded else 0.0

    def forward(self) -> Parts:
        shape, work = self.shape, self.work
        assert shape is not None
        if self.placement in ("cached", "remote"):
            return {}
        parts = {
            "a layer at work": at_work(shape, work.teacher_tokens, max(2.0, work.teacher_bytes)),
            "last hidden states": work.teacher_tokens * shape.hidden * work.teacher_bytes,
        }
        if self.placement == "fsdp2":
            parts["gathered"] = min(shape.parameters, 2 * shape.layer + shape.head) * work.teacher_bytes
        elif self.sharded:
            live = 2 * max(shape.layer, shape.head, shape.embedding)
            parts["gathered"] = min(2 * shape.parameters, live) * work.teacher_bytes
        return parts

    def rollouts(self) -> Parts:
        if self.shape is None or not self.work.teacher_samples:
            return {}
        parts = {f"teacher's {name}": size for name, size in _decoding(self.shape, self.work, 2.0).items()}
        if self.sharded:
            parts["teacher, whole"] = self.shape.parameters * self.work.teacher_bytes
        return parts


def _decoding(shape: ModelShape, work: Workload, width: float) -> Parts:
    rows, tokens = work.rollout_rows, work.prompt + work.new_tokens
    return {
        "keys and values": 2.0 * shape.kept * width * shape.layers * rows * tokens,
        "next logits": 3.0 * 4 * shape.vocab * rows,
        "prompts at work": at_work(shape, rows * work.prompt, width),
    }


def _without_nothing(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size}
