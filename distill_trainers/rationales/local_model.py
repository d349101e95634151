"""A local model that completes prompts of text: batched rollouts, shared between processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import models
from ..rollouts.draws import rollout_rng
from ..rollouts.engines import DecodeEngine, RolloutEngine
from ..rollouts.sampling import SamplingSettings
from .prompts import as_text
from .records import Request, Response


class LocalTextModel:
    """Answers requests with a model of this process, or with one that is sharded over all of them.

    Args:
        model: prepared for the launch (see `models.prepare_frozen`).
        accelerator: of the launch.
        name: of the model, for provenance.
        weights: fingerprint of its weights, so that the answers of another model in the same folder are not taken.
        style: `chat`, `text`, or `auto`: chat where the tokenizer has a template.
        next_question: in style `text`, what begins a question that the model goes on with; nothing behind it counts.
        seed: of sampling; what a request gets depends on it, the model and the request's batch, not on when it is run.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: SamplingSettings,
        accelerator: Any,
        *,
        name: str,
        weights: str = "",
        batch_size: int = 16,
        style: str = "auto",
        next_question: str | None = "Q:",
        seed: int = 0,
        engine: RolloutEngine | None = None,
    ):
        self.model, self.tokenizer, self.sampling, self.accelerator = model, tokenizer, sampling, accelerator
        self.weights = weights
        self.name, self.batch_size, self.seed, self.next_question = name, batch_size, seed, next_question
        self.style = ("chat" if tokenizer.chat_template else "text") if style == "auto" else style
        self.engine = engine or DecodeEngine(tokenizer)

    def identity(self) -> dict[str, Any]:
        shown = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        sampling = {name: getattr(self.sampling, name) for name in shown}
        return {
            "teacher": self.name,
            "weights": self.weights,
            "style": self.style,
            "seed": self.seed,
            "sampling": sampling,
        }

    def complete(self, requests: Sequence[Request]) -> Iterator[Response]:
        """This process's share of the answers; all processes run equally many batches."""
        self.accelerator.wait_for_everyone()  # all have seen what is missing before anybody adds to it
        prompts = {request.key: self._ids(request) for request in requests}
        too_long = [key for key, ids in prompts.items() if len(ids) > self._room]
        for key in too_long:
            del prompts[key]
        keys = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
        batches = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for key in too_long[rank::world]:
            yield Response(key, error="prompt too long", attempts=0)
        for turn in range(-(-len(batches) // world)):
            place = turn * world + rank
            batch = batches[min(place, len(batches) - 1)]
            completions = self._generate([prompts[key] for key in batch], batch[0])
            if place < len(batches):
                for key, ids in zip(batch, completions, strict=True):
                    yield self._response(key, len(prompts[key]), ids)
        self.accelerator.wait_for_everyone()

    @property
    def _room(self) -> float:
        """Tokens that a prompt may have: where a model has learnt a vector for each position, there is none beyond."""
        causal_lm = models.causal_lm_of(self.model)
        positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
        tables = [m for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)]
        learnt = any(m.num_embeddings == positions for m in tables if m is not causal_lm.get_input_embeddings())
        return positions - self.sampling.max_new_tokens if learnt and positions is not None else float("inf")

    def _ids(self, request: Request) -> list[int]:
        if self.style == "chat":
            text = self.tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(as_text(request.messages))["input_ids"]

    def _generate(self, prompts: list[list[int]], first_key: str) -> list[list[int]]:
        width, pad, device = max(map(len, prompts)), self.sampling.pad_token_id, self.accelerator.device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with (
            models.generating(self.model, self.accelerator) as model,
            rollout_rng(self.seed, int(first_key[:12], 16), 0, device),
        ):
            return self.engine.generate(model, ids, mask, self.sampling)

    def _response(self, key: str, prompt_tokens: int, ids: list[int]) -> Response:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        goes_on = self.style == "text" and self.next_question is not None and f"\n{self.next_question}" in text
        ended = goes_on or ids[-1:] and ids[-1] in self.sampling.eos_token_ids
        error = None if text.strip() else "empty answer"
        return Response(key, text, "stop" if ended else "length", prompt_tokens, len(ids), error)
