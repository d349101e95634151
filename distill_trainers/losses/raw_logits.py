"""A chunk's bare products and the head behind them, for kernels that finish logits as they read them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..signals import Head, TokenLogits
from .workspace import Workspace, empty_like


class RawLogits(TokenLogits):
    """Logits `[n, V]` that are made from `hidden @ weight.T` where somebody asks for them.

    Attributes:
        products: `[n, V]`, at least float32; with a gradient, the leaf that it is taken for.
        head: whose bias, scale and soft cap finish them.
        may_be_overwritten: whether the gradient may take the products' memory; see `release`.
    """

    products: Tensor
    head: Head
    may_be_overwritten: bool

    def __init__(self, products: Tensor, head: Head, workspace: Workspace | None = None) -> None:
        # The parent is frozen, and its field is a property here.
        self.__dict__.update(products=products, head=head, workspace=workspace, may_be_overwritten=False)

    @functools.cached_property
    def logits(self) -> Tensor:
        """The finished logits, differentiable once; the products themselves where the head does nothing to them."""
        if self.head.bias is None and self.head.scale == 1.0 and self.head.soft_cap is None:
            return self.products
        return _Finished.apply(self.products, self.head, self.workspace)

    @property
    def shape(self) -> torch.Size:
        """(n, V)."""
        return self.products.shape

    def release(self, total: Tensor) -> None:
        """Tell that nothing but the backward of `total` reads the products any more.

        They may be overwritten then, if one operation alone takes them: all others come later in the graph, and so
        earlier in backward. With a second one it is not known which of the two runs last.
        """
        self.__dict__["may_be_overwritten"] = _edges(total, self.products) == 1


def _edges(total: Tensor, leaf: Tensor) -> int:
    """How many operations in the graph of `total` take `leaf`, each as often as it does."""
    goal = torch.autograd.graph.get_gradient_edge(leaf).node
    waiting, seen, count = [total.grad_fn], set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            count += following is goal
            waiting.append(following)
    return count


class _Finished(torch.autograd.Function):
    """`Head.finish`, in memory of the workspace."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, head: Head, workspace: Workspace | None) -> Tensor:
        logits = head.finish_(empty_like(products, workspace).copy_(products))
        ctx.head = head
        ctx.save_for_backward(logits)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        gradient = upstream.clone(memory_format=torch.contiguous_format)
        return ctx.head.unfinish_(gradient, logits), None, None
