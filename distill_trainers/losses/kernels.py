"""When a divergence is computed by the Triton kernels, and their place in autograd.

They run on CUDA where the package `triton` is there, as it is with torch's CUDA builds. Each of them was compared with
float64 in Triton's interpreter, but a driver, a compiler or a GPU may do what no interpreter does. So the first chunk
of every kind on every device goes through `closed_form.py` as well: a kernel that fails or disagrees is not used again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..signals import TokenLogits
from .closed_form import Rule, closed_form_divergence, name_of
from .raw_logits import RawLogits
from .workspace import empty_like, graph_is_kept

if TYPE_CHECKING:
    from .triton_kernel import Form, Launch, Products

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPARED_ROWS = 16
_verdicts: dict[tuple[Any, ...], bool] = {}
_are_wanted = True


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Compute everything by torch's own operations within the context, for a comparison."""
    global _are_wanted
    before, _are_wanted = _are_wanted, False
    try:
        yield
    finally:
        _are_wanted = before


def may_run(device: torch.device) -> bool:
    """Tell whether the kernels can be tried on a device."""
    return _are_wanted and device.type == "cuda" and _module() is not None


@functools.cache
def _module() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module(".triton_kernel", __package__)
    except Exception as error:  # whatever a package of another version raises
        logger.warning("Triton cannot be used (%s): divergences are computed by torch's own operations.", error)
        return None


def kernel_divergence(rule: Rule, student: TokenLogits, teacher: TokenLogits, temperature: float) -> Tensor | None:
    """Return per-token values `[n]` of a rule of `closed_form.py`, differentiable once in the student's products.

    Returns:
        None where the kernels do not serve: another device or dtype, no rows, or they were found to fail.
    """
    products = _products(student)
    if not may_run(products.device) or not len(products):
        return None
    form, sides = _form(rule), (_side(student), _side(teacher))
    if form is None or any(side is None for side in sides):
        return None
    launch = _module().Launch(form, *sides, temperature)
    if not _can_be_trusted(launch, rule, student, teacher):
        return None
    if products.requires_grad and torch.is_grad_enabled():
        return _KernelDivergence.apply(products, launch, student)
    return launch.values()[0]


class _KernelDivergence(torch.autograd.Function):
    """Values in forward; the gradient in backward, when what it is multiplied with is known."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, launch: Launch, student: TokenLogits) -> Tensor:
        values, kept = launch.values()
        ctx.launch, ctx.student = launch, student
        ctx.save_for_backward(products, kept)  # and with it a check that nobody has changed the products
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        products, kept = ctx.saved_tensors
        in_place = getattr(ctx.student, "may_be_overwritten", False) and not graph_is_kept()
        out = products.detach() if in_place else empty_like(products, ctx.student.workspace)
        return ctx.launch.gradient(kept, upstream.float(), out), None, None


def _products(logits: TokenLogits) -> Tensor:
    return logits.products if isinstance(logits, RawLogits) else logits.logits


def _side(logits: TokenLogits) -> Products | None:
    """What a kernel reads of one side; None if it cannot."""
    products = _products(logits).detach()
    if products.dtype not in _DTYPES or products.stride(-1) != 1:
        return None
    if not isinstance(logits, RawLogits):
        return _module().Products(products)
    head = logits.head
    bias = None if head.bias is None else head.bias.detach()[: head.num_ids].contiguous()
    return _module().Products(products, bias, head.scale, head.soft_cap)


def _form(rule: Any) -> Form | None:
    """A rule as the kernels know it; None for one that they do not."""
    name, params = name_of(rule), rule.keywords
    weight = next(iter(params.values()), 0.0)
    if not isinstance(weight, (int, float)):
        return None  # each token has its own
    if name in ("jsd", "skew_forward_kl", "skew_reverse_kl") and weight in (0, 1):  # as in `closed_form.py`
        forward = name == "skew_forward_kl" or (name == "jsd" and weight == 0)
        name, weight = ("forward_kl" if forward else "reverse_kl"), 0.0
    if name == "lk" and weight in (0, 1):
        name, weight = ("forward_kl" if weight else "total_variation"), 0.0
    kind = _module().KINDS.get(name)
    return None if kind is None else _module().Form(kind, float(weight))


def _can_be_trusted(launch: Launch, rule: Rule, student: TokenLogits, teacher: TokenLogits) -> bool:
    """Whether kernels of this kind have agreed with `closed_form.py` on this device; the first chunk tells."""
    sides = ((side.values.dtype, side.bias is None, side.soft_cap) for side in (launch.student, launch.teacher))
    key = (launch.student.values.device, launch.form.kind, *sides)
    if key not in _verdicts:
        name = name_of(rule)
        try:
            agrees = _agrees(launch, rule, student, teacher)
        except Exception as error:  # a compiler that is not there, a GPU that is too old, ...
            logger.warning("The Triton kernel of %s failed (%s): torch's own operations are used.", name, error)
            agrees = False
        else:
            if agrees is None:
                return False  # nothing to compare yet
            if not agrees:
                logger.warning(
                    "The Triton kernel of %s differs from the same computed by torch on %s: it is not used. Please "
                    "report this, with the GPU and the versions of torch and triton.", name, key[0],
                )  # fmt: skip
        _verdicts[key] = agrees
    return _verdicts[key]


@torch.no_grad()
def _agrees(launch: Launch, rule: Rule, student: TokenLogits, teacher: TokenLogits) -> bool | None:
    """Whether value and gradient are about as near to float64 as torch's in float32; None without a finite row.

    The chunk's last rows are compared, whose addresses are the largest.
    """
    values, kept = launch.values()
    out = torch.empty_like(launch.student.values)
    gradient = launch.gradient(kept, torch.ones_like(values), out)
    rows = slice(max(0, len(values) - _COMPARED_ROWS), len(values))
    by_rule = functools.partial(_by_rule, rule, student, teacher, launch.temperature, rows)
    (exact, exact_gradient), (plain, plain_gradient) = by_rule(torch.float64), by_rule(torch.float32)

    def near(mine: Tensor, theirs: Tensor, expected: Tensor, least: float) -> Tensor:
        allowed = 10 * (theirs.double() - expected).norm(dim=-1) + 1e-3 * expected.norm(dim=-1) + least
        return (mine.double() - expected).norm(dim=-1) <= allowed

    rounding = torch.finfo(out.dtype).eps if out.dtype != torch.float32 else 0.0
    is_near = near(values[rows, None], plain[:, None], exact[:, None], 1e-6)
    is_near &= near(gradient[rows], plain_gradient, exact_gradient, 1e-6 + rounding)
    is_finite = plain.isfinite() & plain_gradient.isfinite().all(-1)
    return bool((is_near | ~is_finite).all()) if is_finite.any() else None


def _by_rule(
    rule: Rule, student: TokenLogits, teacher: TokenLogits, temperature: float, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values of some rows and their gradient in the student's products, by torch's own operations in `dtype`."""
    leaf = _products(student)[rows].detach().to(dtype).requires_grad_()
    theirs = _products(teacher)[rows].detach().to(dtype)
    with torch.enable_grad():
        logits = RawLogits(leaf, student.head).logits if isinstance(student, RawLogits) else leaf
        theirs = RawLogits(theirs, teacher.head).logits if isinstance(teacher, RawLogits) else theirs
        values = closed_form_divergence(rule, logits, theirs, temperature, None)
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]
