"""A local model that completes prompts of text: batched rollouts, shared between processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import models
from ..data.chat import Chat
from ..data.texts import text_ids
from ..rollouts.completing import CompletionSettings, share_batches
from .prompts import as_text
from .records import Request, Response


class LocalTextModel:
    """Answers requests with a model of this process, or with one that is sharded over all of them.

    Args:
        model: prepared for the launch (see `models.prepare_frozen`).
        settings: what a request gets depends on them, the model and the request's key alone.
        weights: fingerprint of its weights, so that the answers of another model in the same folder are not taken.
        style: `chat`, `text`, or `auto`: chat where the tokenizer has a template.
        next_question: in style `text`, what begins a question that the model goes on with; nothing behind it counts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: CompletionSettings,
        accelerator: Any,
        *,
        name: str,
        weights: str = "",
        style: str = "auto",
        next_question: str | None = "Q:",
    ):
        self.model, self.tokenizer, self.settings, self.accelerator = model, tokenizer, settings, accelerator
        self.sampling = settings.sampling
        self.name, self.weights, self.next_question = name, weights, next_question
        self.style = ("chat" if tokenizer.chat_template else "text") if style == "auto" else style

    def identity(self) -> dict[str, Any]:
        shown = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        sampling = {name: getattr(self.sampling, name) for name in shown}
        return {
            "teacher": self.name,
            "weights": self.weights,
            "style": self.style,
            "seed": self.settings.stream.seed,
            "sampling": sampling,
        }

    def complete(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Answer this process's share; all processes run equally many batches."""
        self.accelerator.wait_for_everyone()  # all have seen what is missing before anybody adds to it
        prompts = {request.key: self._ids(request) for request in requests}
        too_long = [key for key, ids in prompts.items() if len(ids) > self._room]
        for key in too_long:
            del prompts[key]
        for key in too_long[self.accelerator.process_index :: self.accelerator.num_processes]:
            yield Response(key, error="prompt too long", attempts=0)
        for batch, wanted in share_batches(prompts, self.accelerator, self.settings.batch_size):
            with models.generating(self.model, self.accelerator, who=f"The teacher {self.name!r}") as model:
                completions = self.settings.complete(model, batch, self.accelerator.device)
            if wanted:
                for key, ids in completions.items():
                    yield self._response(key, len(prompts[key]), ids)
        self.accelerator.wait_for_everyone()

    @property
    def _room(self) -> float:
        """Tokens that a prompt may have: where a model has learnt a vector for each position, there is none beyond."""
        positions = models.positions_of(models.causal_lm_of(self.model).config)
        if positions is None or not models.looks_positions_up(self.model):
            return float("inf")
        return positions - self.sampling.max_new_tokens

    def _ids(self, request: Request) -> list[int]:
        if self.style == "chat":
            chat = Chat(self.tokenizer)
            return chat.ids(chat.prompt(request.messages))
        return text_ids(as_text(request.messages), self.tokenizer)

    def _response(self, key: str, prompt_tokens: int, ids: list[int]) -> Response:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        goes_on = self.style == "text" and self.next_question is not None and f"\n{self.next_question}" in text
        ended = goes_on or ids[-1:] and ids[-1] in self.sampling.eos_token_ids
        error = None if text.strip() else "empty answer"
        return Response(key, text, "stop" if ended else "length", prompt_tokens, len(ids), error)
