"""What was saved answers as what was trained: the folder is loaded again, and both read some tokens of the first batch.

Nothing is proved where it cannot be, and the log says so: without a training step, of a quantised student (its base
would be quantised anew), of an adapter whose base has no name, and where a second model does not fit into memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ... import models
from ...data.packing import unpacked
from ...exceptions import UnlikeModelError
from ..protocol import Run

logger = logging.getLogger(__name__)

_ROWS, _TOKENS = 2, 64


class Proof:
    """Keeps some tokens of the first batch, and compares the model that was saved with the one in memory.

    Args:
        run: whose student it is.
    """

    def __init__(self, run: Run):
        self.run = run
        self.inputs: dict[str, Tensor] | None = None

    def look(self, batch: Mapping[str, Any]) -> None:
        """Remember a few tokens of the first batch that is trained on."""
        if self.inputs is None and self.run.args.verify_saved:
            inputs = models.forward_inputs(unpacked(batch))
            self.inputs = {name: value[:_ROWS, :_TOKENS].detach().clone() for name, value in inputs.items()}

    def check(self, folder: Path) -> None:
        """Compare the model in `folder` with the student; all processes must call it.

        Raises:
            UnlikeModelError: on all processes, where their logits differ by more than rounding.
        """
        run, accelerator = self.run, self.run.accelerator
        if self.inputs is None or not run.args.verify_saved:
            return
        sharded = models.zero_stage(accelerator) == 3 or models.fsdp_version(accelerator) == 2
        expected = models.logits_of(run.model_wrapped if sharded else run.model, self.inputs, sharded=sharded)
        failure = [self._failure(folder, expected, sharded) if accelerator.is_main_process else None]
        if accelerator.num_processes > 1:
            broadcast_object_list(failure)
        if failure[0] is not None:
            raise UnlikeModelError(failure[0])

    def _failure(self, folder: Path, expected: Tensor, sharded: bool) -> str | None:
        """What differs, in words. Only a comparison fails: a run does not end because it could not be made."""
        assert self.inputs is not None
        obstacle = self._obstacle(folder)
        if obstacle is not None:
            logger.info("What was saved in %s is not compared with what was trained: %s.", folder, obstacle)
            return None
        try:
            saved = self._load(folder, sharded)
        except Exception as error:
            what = f"What was saved in {str(folder)!r} cannot be loaded again: {type(error).__name__}: {error}"
            if _holds_adapter(folder):  # its base may be out of reach by now
                logger.info("%s. It is not compared with what was trained.", what)
                return None
            return f"{what}. The student is in memory still, and in the run's checkpoints."
        try:
            answers = models.logits_of(saved, self.inputs)
        except Exception as error:  # kernels for GPUs alone: Liger leaves its RoPE in the whole architecture
            why = f"it does not run on the CPU ({type(error).__name__}: {error})"
            logger.warning("What was saved in %s is not compared with what was trained: %s.", folder, why)
            return None
        dtypes = [saved.dtype] + [torch.bfloat16] * bool(sharded and self.run.args.mixed_precision != "no")
        remedy = (
            "Do not use it. What was trained is in the run's checkpoints. `verify_saved: false` leaves this comparison "
            "out."
        )
        try:
            gap = models.check_alike(
                answers,
                expected,
                max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
                f"The model in {str(folder)!r}",
                remedy,
            )
        except UnlikeModelError as error:
            return str(error)
        logger.info(
            "The model in %s answers as the trained one: its logits differ by %.2g of their spread.", folder, gap
        )
        return None

    def _load(self, folder: Path, sharded: bool) -> Any:
        student: Any = models.causal_lm_of(self.run.model)
        kwargs: dict[str, Any] = {"dtype": student.dtype, "trust_remote_code": self.run.args.trust_remote_code}
        load: Any = models.load_adapted if _holds_adapter(folder) else models.load_causal_lm
        if not sharded and not _holds_adapter(folder):
            kwargs["kind"] = type(student)  # a class of the user's own, too; FSDP2 has changed it
        with torch.random.fork_rng(devices=[]), models.whole_loading():
            return load(str(folder), **kwargs)

    def _obstacle(self, folder: Path) -> str | None:
        """Why the comparison cannot be made."""
        student: Any = models.causal_lm_of(self.run.model)
        if getattr(student, "is_quantized", False):
            return "the student is quantised, and its base would be quantised anew"
        size = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
        if not size:
            return "it holds no weights that can be loaded without DeepSpeed or FSDP"
        if _holds_adapter(folder):
            if not models.source_of(student):
                return "the adapter's base was made in memory and has no name"
            size += student.num_parameters() * student.dtype.itemsize
        free = _free_memory()
        return None if size < 0.8 * free else f"it takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"


_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _free_memory() -> int:
    import psutil  # accelerate needs it, too

    return int(psutil.virtual_memory().available)
