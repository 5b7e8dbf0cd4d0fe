"""Between text and tokens: one user turn in, the answer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def conversation(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """The messages of a conversation that opens with ``prompt``."""
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": prompt}]


class Chat:
    """A model's tokenizer and chat template. A model without a template gets the bare text.

    ``system`` takes the place of the template's own system message, where it has one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None, system: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        config = None if model is None else model.generation_config
        ends = None if config is None else config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self.stop = tuple(sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None}))

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a conversation that opens with ``prompt`` and waits for the answer."""
        return self.encode_messages(conversation(prompt, self.system))

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The tokens of a conversation of (role, content) messages that waits for an answer.

        It gets the system message unless it opens with one of its own.
        """
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.tokenizer.chat_template is None:
            return self.encode_text("\n\n".join(message["content"] for message in messages))
        text = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The tokens of bare text."""
        return tuple(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self.tokenizer.decode([i for i in ids if i not in self.stop], skip_special_tokens=True))
