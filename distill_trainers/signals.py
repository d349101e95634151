"""What a teacher can say about a token, and the output head that turns hidden states into logits.

Shapes: N trained tokens, D hidden size, V vocabulary. A signal holds trained positions only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The last layer of a causal LM together with everything the model does to its logits.

    logits = soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap), cut to the first `vocab_size` ids.

    Args:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: factor on the raw logits (Cohere's `logit_scale`, Granite's `1 / logits_scaling`).
        soft_cap: bound on the logits (Gemma 2's `final_logit_softcapping`) or None.
        vocab_size: ids from here on are padding and leave the softmax; None keeps every row.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None

    @property
    def num_ids(self) -> int:
        """Number of ids in the softmax."""
        rows = self.weight.shape[0]
        return rows if self.vocab_size is None else min(rows, self.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, D]` hidden states to `[n, V]` logits, at least float32 whatever the operands' dtype."""
        raw = self.project(hidden)
        return self.finish(raw)

    def project(self, hidden: Tensor) -> Tensor:
        """The matrix product alone: `[n, D]` to `[n, V]`, at least float32."""
        weight = self.weight[: self.num_ids]
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        return hidden.to(dtype) @ weight.to(dtype).T

    def finish(self, raw: Tensor) -> Tensor:
        """What the model does after the product: bias, scale, soft cap."""
        logits = raw
        if self.bias is not None:
            logits = logits + self.bias[: self.num_ids].to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

    def cut_to(self, vocab_size: int | None) -> Head:
        """The same head with ids from `vocab_size` on treated as padding."""
        return replace(self, vocab_size=vocab_size)


@dataclass(frozen=True)
class TokenLogits:
    """Logits `[n, V]` of some tokens of one model, at least float32."""

    logits: Tensor

    def logps(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities `[n, V]` at `temperature`."""
        logits = self.logits if temperature == 1.0 else self.logits / temperature
        return F.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class HiddenStates:
    """The teacher's last hidden states `[N, D]` and its head: exact, and small."""

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def chunk(self, rows: slice) -> TokenLogits:
        return TokenLogits(self.head.logits(self.hidden[rows]))


@dataclass(frozen=True)
class Logits:
    """The teacher's full logits `[N, V]`: exact, and large."""

    values: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def chunk(self, rows: slice) -> TokenLogits:
        values = self.values[rows]
        return TokenLogits(values.to(torch.promote_types(values.dtype, torch.float32)))


TeacherSignal = HiddenStates | Logits
