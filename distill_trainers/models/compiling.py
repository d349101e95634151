"""Compiled models: each layer is compiled in place; embeddings, head, loss and sampling run as they are written.

Layers are alike, so one of them is compiled for all, in seconds. Around the whole model `torch.compile` would take the
loss in as well, which runs inside the head's call (`install_token_forward`), and it would be there while sampling,
where every token makes the cache one longer.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..exceptions import ConfigurationError
from ..settings import require
from .adapters import causal_lm_of, head_module_of, is_peft

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

# Kinds of calls of one layer, which are compiled apart: with and without gradient, padding, an adapter, a second row,
# and by the layer's kind of attention. What comes above torch's own limit of 8 would run uncompiled.
_VARIANTS = 64
_compilers: WeakKeyDictionary[Accelerator, Compiler] = WeakKeyDictionary()  # of launches whose students are compiled


def check_compiler(args: TrainingArguments) -> None:
    """Refuse a `torch_compile_backend` or `torch_compile_mode` that does not exist, before anything is loaded."""
    if not args.torch_compile:
        return
    from accelerate.utils import DynamoBackend

    backends = sorted(backend.value.lower() for backend in DynamoBackend)
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    require(str(backend).lower() in backends, "torch_compile_backend", backend, f"one of {', '.join(backends)}")
    if mode is not None:
        from torch._inductor import list_mode_options

        modes = sorted(list_mode_options())
        require(mode in modes, "torch_compile_mode", mode, f"one of {', '.join(modes)}")


def compile_for_launch(model: nn.Module, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Compile the layers of `model` if the run (`torch_compile`) or the launch (`--dynamo_backend`) asks for it."""
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin

    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    options = {name: value for name, value in plugin.to_kwargs().items() if name != "use_regional_compilation"}
    # Lengths differ from batch to batch: else the first batch would be compiled for its own length alone.
    options = {"dynamic": True, **options, "backend": plugin.backend.value.lower()}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _VARIANTS
    _compilers[accelerator] = functools.partial(torch.compile, **options)
    _compile_layers(model, _compilers[accelerator])
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")  # `prepare` would wrap the whole model
    if args.torch_compile:  # TrainingArguments left it there: later runs of this process would be compiled as well
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
        os.environ.pop("ACCELERATE_DYNAMO_MODE", None)


def compile_as_student(teacher: nn.Module, accelerator: Accelerator) -> None:
    """Compile the layers of a teacher that is whole here, as `compile_for_launch` did those of the student.

    Not those that are compiled, nor quantised, spread over devices or below adapters that are switched.
    """
    wrapped = is_peft(teacher) or getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
    compiled = any(module._compiled_call_impl is not None for module in teacher.modules())
    if accelerator in _compilers and not wrapped and not compiled:
        _compile_layers(teacher, _compilers[accelerator])


def compiled_by_layer(model: Any) -> Any:
    """Return the model that `torch.compile` was called on, its layers compiled in the same way, and nothing else.

    Args:
        model: anything; what is not compiled as a whole is returned as it is. `torch.compile(model)`, `model.compile()`
            and accelerate's `compile_regions(model)` are understood.

    Raises:
        ConfigurationError: this version of torch does not tell how the model was compiled.
    """
    from torch._dynamo import OptimizedModule

    if isinstance(model, OptimizedModule):
        compiler, model = model.dynamo_ctx, model._orig_mod
        model._compiled_call_impl = compiler(model._call_impl)  # as `model.compile()` has it
    if not isinstance(model, nn.Module):
        return model
    for parent in list(model.modules()):  # compiled parts: their parameters would have other names
        for name, child in parent._modules.items():
            if isinstance(child, OptimizedModule):
                parent._modules[name] = child._orig_mod
                child._orig_mod._compiled_call_impl = child.dynamo_ctx(child._orig_mod._call_impl)
    body = _body_of(model)
    whole = [module for module in model.modules() if module._compiled_call_impl is not None and _holds(module, body)]
    if whole:
        _compile_layers(model, _compiler_of(whole[0]))
    for module in [*whole, *_heads_of(model)]:  # the loss runs in the head's call
        module._compiled_call_impl = None
    return model


def _body_of(model: nn.Module) -> nn.Module:
    causal_lm = causal_lm_of(model)
    return getattr(causal_lm, "base_model", causal_lm)


def _heads_of(model: nn.Module) -> list[nn.Module]:
    head = head_module_of(causal_lm_of(model))
    return [] if head is None else list(head.modules())


def _holds(module: nn.Module, body: nn.Module) -> bool:
    return any(part is body for part in module.modules())


def _compiler_of(module: nn.Module) -> Compiler:
    """What compiled the module's call: torch keeps it in a closure alone."""
    compiler = inspect.getclosurevars(module._compiled_call_impl).nonlocals.get("self")  # type: ignore[arg-type]
    if not callable(compiler):
        raise ConfigurationError(
            f"Got a {type(module).__name__} compiled by `compile()`, and torch {torch.__version__} does not tell how. "
            "Pass it uncompiled, and set `torch_compile: true`."
        )
    return compiler


def _compile_layers(model: nn.Module, compiler: Compiler) -> None:
    """Compile every layer of the model's stacks of layers; without a stack, its whole body."""

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    # One for all layers, so that they share what is compiled. Torch counts variants by code: other models have theirs.
    compiled = compiler(FunctionType(call.__code__.replace(), globals()))

    def guarded(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Compiled code does not look whether hooks have come or gone, as those on a teacher do between two batches.
        if layer._forward_hooks and not torch.is_grad_enabled():
            return layer._call_impl(*args, **kwargs)
        try:
            return compiled(layer, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigurationError(
                f"{type(layer).__name__} cannot be compiled: {_reason(error)} The backend `inductor` needs a C++ "
                "compiler on CPUs and Triton on GPUs. Install it, take `torch_compile_backend: aot_eager`, or leave "
                "`torch_compile` off."
            ) from error

    body = _body_of(model)
    layers = [layer for stack in _outer_stacks(body) for layer in stack] or [body]
    for layer in layers:
        layer._compiled_call_impl = functools.partial(guarded, layer)


def _reason(error: BaseException) -> str:
    cause = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{lines[0].rstrip('.')}." if lines else f"{type(cause).__name__}."


def _outer_stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers that are in no other list, as the experts of a layer are."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [stack for child in module.children() for stack in _outer_stacks(child)]


def uncompiled() -> Any:
    """Let compiled layers run as they are written, within it."""
    return torch.compiler.set_stance("force_eager")
