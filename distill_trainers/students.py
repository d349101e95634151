"""Make a student out of its teacher by keeping some of its decoder layers.

A student that starts from the teacher's own layers needs far less training than one that starts from nothing
(DistilBERT, arXiv 1910.01108, section 3; Minitron, arXiv 2407.14679). Which layers: evenly spaced ones, or the ones
that matter most on a few batches of text. Shapes: B rows, T tokens, N measured tokens, D hidden size, L layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .exceptions import ConfigurationError
from .models import is_peft, read_head

STRATEGIES = ("even", "importance")

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int], None]
_Call = tuple[Tensor, Any]  # a layer's input, and its output in the form it gives it: a tensor or a tuple


def prune_layers(model: PreTrainedModel, keep: int | Sequence[int], *, copy: bool = True) -> PreTrainedModel:
    """Make a model of the same architecture with only some of the decoder layers.

    Args:
        model: a causal LM whose decoder layers are one `ModuleList` (Llama, Qwen, GPT-2, GPT-NeoX, ...).
        keep: how many layers to keep, evenly spaced with the first and the last among them; or which, ascending.
        copy: leave `model` as it is and return new weights; False prunes `model` itself.

    Returns:
        An ordinary model, trainable throughout: config and layer numbers are its own, tied weights stay tied.

    Raises:
        ConfigurationError: layers that do not exist; a quantised, adapted or sharded model; an architecture whose
            layers cannot be found, or cannot be described by its config after pruning.
    """
    _refuse_unprunable(model)
    path, layers = find_decoder_layers(model)
    indices = kept_layers(len(layers), keep)

    model.set_submodule(path, nn.ModuleList(layers[index] for index in indices))
    student = model
    if copy:
        try:
            student = deepcopy(model)  # while the dropped layers are out of it: they are never copied
        finally:
            model.set_submodule(path, layers)
    _renumber(cast(nn.ModuleList, student.get_submodule(path)))
    _shrink_config(student.config.get_text_config(decoder=True), indices, len(layers))
    _check_config_describes(student)
    return student.requires_grad_(True)


def kept_layers(total: int, keep: int | Sequence[int]) -> list[int]:
    """Choose which of `total` layers `prune_layers` keeps.

    Raises:
        ConfigurationError: layers that do not exist, or are named twice or out of order.
    """
    return even_layers(total, keep) if isinstance(keep, int) else _checked_layers(keep, total)


def even_layers(total: int, keep: int) -> list[int]:
    """Choose `keep` of `total` layers, evenly spaced, first and last among them (the first alone if 1)."""
    _check_count(total, keep)
    if keep == 1:
        return [0]
    gaps = keep - 1
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(keep)]  # rounds half up


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers and where they are: the outermost `ModuleList` with `num_hidden_layers` items."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # Experts or heads inside a layer may happen to be as many as the layers.
        inside_another = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside_another:
            lists[name] = module
    if len(lists) != 1:
        raise ConfigurationError(
            f"{type(model).__name__} has {len(lists)} lists of {count} modules ({', '.join(lists) or 'none'}); "
            "expected one, the decoder layers. Layers of this architecture cannot be chosen; use a ready-made student."
        )
    return next(iter(lists.items()))


def _check_count(total: int, keep: int) -> None:
    if isinstance(keep, bool) or not 1 <= keep <= total:
        raise ConfigurationError(f"Asked to keep {keep!r} of {total} layers; expected 1 to {total}.")


def _checked_layers(keep: Sequence[int], total: int) -> list[int]:
    indices = list(keep)
    ascending = all(isinstance(index, int) for index in indices) and indices == sorted(set(indices))
    if not indices or not ascending or indices[0] < 0 or indices[-1] >= total:
        raise ConfigurationError(
            f"Asked to keep the layers {indices}; expected different numbers from 0 to {total - 1}, ascending."
        )
    return indices


def _refuse_unprunable(model: PreTrainedModel) -> None:
    if is_peft(model):
        raise ConfigurationError(
            "Got a PEFT model; layers are taken from a plain one. Call `model.merge_and_unload()` first."
        )
    if getattr(model, "is_quantized", False):
        raise ConfigurationError(
            "Got a quantised model, whose layers cannot be trained; load the teacher in bfloat16 or float32 to take "
            "layers from it."
        )
    if any(hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ConfigurationError("Got a sharded model; take the layers before DeepSpeed or FSDP wraps the teacher.")


def _renumber(layers: nn.ModuleList) -> None:
    """The KV cache is addressed by `layer_idx`, which attention modules got when the larger model was built."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]  # torch types attributes as tensors or modules


def _shrink_config(config: PretrainedConfig, indices: list[int], total: int) -> None:
    config.num_hidden_layers = len(indices)
    for name in config.to_dict():
        value = getattr(config, name, None)  # several EOS ids may happen to be as many as the layers
        if isinstance(value, list) and len(value) == total and not name.endswith("_token_id"):
            setattr(config, name, [value[index] for index in indices])


def _check_config_describes(model: PreTrainedModel) -> None:
    """Refuse a model that would come back different from disk."""
    with torch.device("meta"):
        rebuilt = type(model)(deepcopy(model.config))
    expected = {name: value.shape for name, value in rebuilt.state_dict().items()}
    got = {name: value.shape for name, value in model.state_dict().items()}
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ConfigurationError(
            f"The config of {type(model).__name__} does not describe the kept layers ({', '.join(differing[:4])}): it "
            "says by number which layers are special. Keep the first layers, or use a ready-made student."
        )


@torch.no_grad()
def layer_importance(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    measure: str = "kl",
    autocast_dtype: torch.dtype | None = None,
    chunk_size: int = 256,
    progress: Progress | None = None,
) -> list[float]:
    """Measure how much each decoder layer matters on some text; larger is more important.

    Measures:
        "kl": forward KL of the whole model to the model without that one layer, in nats per token. Costs 1 + L/2
            forward passes, as the layers below are not run again, and holds the L layer inputs `[B, T, D]` of a batch.
        "angular": 1 - cosine of a layer's input and output, the Block Influence of ShortGPT (arXiv 2403.03853).
            Costs one forward pass, and does not look at what the change is for.

    Args:
        model: a causal LM; its weights and mode are left as they were.
        batches: dicts with `input_ids [B, T]` and, optionally, `attention_mask` and unshifted `labels` (-100 where not
            measured). Without labels every attended token after the first is measured.
        measure: "kl" or "angular".
        autocast_dtype: run under autocast, e.g. `torch.bfloat16`.
        chunk_size: tokens projected to the vocabulary at a time.
        progress: called as `progress(batches done, layers done in this batch)`.

    Returns:
        L values, a mean over all measured tokens.

    Raises:
        ConfigurationError: unknown measure, or no token to measure.
    """
    if measure not in _MEASURES:
        raise ConfigurationError(f"measure={measure!r} is not known; choose one of {', '.join(_MEASURES)}.")
    _, layers = find_decoder_layers(model)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()
    was_training = model.training
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    model.eval()
    try:
        for done, batch in enumerate(batches):
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
            predicts = _predicting_positions(batch).to(device)
            if not predicts.any():
                continue
            tokens += int(predicts.sum())
            with autocast:
                for index, value in enumerate(_MEASURES[measure](model, layers, inputs, predicts, chunk_size)):
                    sums[index] += value
                    if progress is not None:
                        progress(done, index + 1)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ConfigurationError(
            "Layer importance got no token to measure: no batches, or all labels -100. Give it batches with text."
        )
    return (sums / tokens).tolist()


def choose_layers(importance: Sequence[float], keep: int) -> list[int]:
    """Choose the `keep` layers of largest importance, ascending; of equals the lower one is kept."""
    _check_count(len(importance), keep)
    by_importance = sorted(range(len(importance)), key=lambda index: (-importance[index], index))
    return sorted(by_importance[:keep])


def _predicting_positions(batch: Batch) -> Tensor:
    """`[B, T]`, true where the hidden state predicts a measured token, which is the next one."""
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    measured = batch["labels"] != -100 if "labels" in batch else attended
    # The first token of a left-padded row has only padding before it: nothing predicts it.
    return F.pad(measured[:, 1:] & attended[:, :-1], (0, 1))


def _last_hidden(model: PreTrainedModel, inputs: Batch) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _recorded_pass(model: PreTrainedModel, layers: nn.ModuleList, inputs: Batch) -> tuple[Tensor, list[_Call]]:
    """Last hidden states `[B, T, D]` of the whole model, and each layer's input and output on the way."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], output))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        return _last_hidden(model, inputs), calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_layer(layers: nn.ModuleList, index: int, calls: list[_Call]) -> Iterator[None]:
    """Layer `index` hands on its recorded input, and the layers below, whose work that input is, do nothing."""
    hidden, _ = calls[index]
    forwards = [layer.__dict__.get("forward") for layer in layers]  # offloading hooks put a forward of theirs there
    try:
        for layer, (_, output) in zip(layers[: index + 1], calls, strict=False):
            result = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            layer.forward = lambda *args, _result=result, **kwargs: _result
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _removal_kl(
    model: PreTrainedModel, layers: nn.ModuleList, inputs: Batch, predicts: Tensor, chunk_size: int
) -> Iterator[float]:
    """Summed forward KL to the model without layer 0, 1, ..., over the N measured tokens."""
    hidden, calls = _recorded_pass(model, layers, inputs)
    whole_ND = hidden[predicts]
    for index in range(len(layers)):
        with _without_layer(layers, index, calls):
            pruned_ND = _last_hidden(model, inputs)[predicts]
        yield summed_forward_kl(model, whole_ND, model, pruned_ND, chunk_size)


def _block_influence(
    model: PreTrainedModel, layers: nn.ModuleList, inputs: Batch, predicts: Tensor, chunk_size: int
) -> Iterator[float]:
    """Summed 1 - cosine of each layer's input and output over the N measured tokens."""
    _, calls = _recorded_pass(model, layers, inputs)
    for before, output in calls:
        after = output[0] if isinstance(output, tuple) else output
        yield (1 - F.cosine_similarity(before[predicts].float(), after[predicts].float(), dim=-1)).sum().item()


_MEASURES: dict[str, Callable[..., Iterator[float]]] = {"kl": _removal_kl, "angular": _block_influence}


def summed_forward_kl(
    teacher: PreTrainedModel, teacher_ND: Tensor, student: PreTrainedModel, student_ND: Tensor, chunk_size: int = 256
) -> float:
    """Sum KL(teacher || student) in nats over N tokens, from last hidden states `[N, D]`, chunk by chunk."""
    teacher_head, student_head = read_head(teacher), read_head(student)
    total = 0.0
    for whole, pruned in zip(teacher_ND.split(chunk_size), student_ND.split(chunk_size), strict=True):
        teacher_logps = teacher_head.logits(whole).float().log_softmax(-1)
        student_logps = student_head.logits(pruned).float().log_softmax(-1)
        total += F.kl_div(student_logps, teacher_logps, reduction="sum", log_target=True).item()
    return total


def make_student(
    teacher: PreTrainedModel,
    keep_layers: int | Sequence[int],
    strategy: str = "even",
    *,
    batches: Iterable[Batch] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Make a student of some of the teacher's layers; the teacher stays as it is.

    On SmolLM2-135M (20 of 30 layers, untrained) the KL to the teacher was 7.7 nats per token with "even" and 2.0 with
    "importance": prefer the latter wherever there is text to measure on.

    Args:
        teacher: see `prune_layers`.
        keep_layers: how many layers, or which.
        strategy: "even" spaces them; "importance" measures every layer on `batches` and keeps the best.
        batches, options: for `layer_importance`; used by "importance" alone.

    Raises:
        ConfigurationError: settings that contradict each other, or what `prune_layers` refuses.
    """
    _check_strategy(keep_layers, strategy)
    if strategy == "even" or not isinstance(keep_layers, int):  # only "even" may name the layers
        return prune_layers(teacher, keep_layers)
    if batches is None:
        raise ConfigurationError('strategy="importance" measures layers on text; give `batches`, or use "even".')
    _refuse_unprunable(teacher)  # before anything is measured in vain
    _check_count(len(find_decoder_layers(teacher)[1]), keep_layers)
    return prune_layers(teacher, choose_layers(layer_importance(teacher, batches, **options), keep_layers))


@dataclass(frozen=True)
class StudentInit:
    """How a recipe makes its student: `student_init: {from_teacher: true, keep_layers: 12}`.

    Args:
        keep_layers: how many of the teacher's layers, or which.
        from_teacher: must be true; written out in recipes because it says where the weights come from.
        strategy: "even" or "importance".
        measure: "kl" or "angular", see `layer_importance`; used by "importance" alone.
        importance_batches: batches of training data that "importance" measures on.

    Raises:
        ConfigurationError: settings that contradict each other.
    """

    keep_layers: int | list[int]
    from_teacher: bool = True
    strategy: str = "even"
    measure: str = "kl"
    importance_batches: int = 4

    def __post_init__(self) -> None:
        _check_strategy(self.keep_layers, self.strategy)
        if self.from_teacher is not True:
            raise ConfigurationError(
                f"student_init has from_teacher={self.from_teacher!r}, but the teacher is the only source of layers; "
                "set it to true, or leave student_init out and name a student model."
            )
        if self.measure not in _MEASURES:
            raise ConfigurationError(f"measure={self.measure!r} is not known; choose one of {', '.join(_MEASURES)}.")
        if self.importance_batches < 1:
            raise ConfigurationError(f"importance_batches={self.importance_batches}; expected 1 or more.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> StudentInit:
        """Read a recipe's mapping; a name that is no setting is refused with the nearest one that is."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
                raise ConfigurationError(f"student_init has no setting {name!r}; {hint}")
        if "keep_layers" not in settings:
            raise ConfigurationError("student_init lacks keep_layers: how many of the teacher's layers, or a list.")
        return cls(**settings)

    def build(
        self, teacher: PreTrainedModel, batches: Iterable[Batch] | None = None, **options: Any
    ) -> PreTrainedModel:
        """Make the student, from the first `importance_batches` of `batches` if the strategy needs them.

        `options` (`autocast_dtype`, `progress`) go to `layer_importance`.
        """
        first = None if batches is None else islice(batches, self.importance_batches)
        return make_student(teacher, self.keep_layers, self.strategy, batches=first, measure=self.measure, **options)


def _check_strategy(keep_layers: int | Sequence[int], strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"strategy={strategy!r} is not known; choose one of {', '.join(STRATEGIES)}.")
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, (int, Sequence)) or isinstance(keep_layers, str):
        raise ConfigurationError(f"keep_layers={keep_layers!r}; expected a number of layers or a list of them.")
    if strategy == "importance" and not isinstance(keep_layers, int):
        raise ConfigurationError(
            f'keep_layers={list(keep_layers)} names the layers, which leaves strategy="importance" nothing to choose; '
            'give a number of layers, or use strategy="even".'
        )
