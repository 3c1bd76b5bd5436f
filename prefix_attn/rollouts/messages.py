"""Turns text and messages into token ids, or into bytes, and keeps what was not counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# ShareGPT's names of roles.
ROLES = {"human": "user", "gpt": "assistant"}
# What a message says apart from its content, before and after it.
BEFORE = ("reasoning_content", "reasoning", "thinking")
AFTER = ("tool_calls", "function_call")
# Beginnings of the types of parts that have no text.
MEDIA = ("image", "input_image", "audio", "input_audio", "video", "file", "input_file", "document")
# Types of parts that are text.
TEXTS = ("text", "input_text", "output_text")
# Types of items that OpenAI's Responses put among messages.
CALL, CALL_OUTPUT, REASONING = "function_call", "function_call_output", "reasoning"


@dataclass
class Chat:
    """Encodes text and messages, and keeps what became of them.

    Attributes:
        tokenizer: of transformers, or None.
        tools: those that the messages to come were written with, or None.
        is_plain: whether messages were written out without a chat template.
        media: pictures and the like, of which one digest each was counted.
        dropped: for each field of messages, how many the chat template left out.
        unread: fields of messages that are not counted without a template.
    """

    tokenizer: Any
    tools: Any = None
    is_plain: bool = False
    media: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unread: set[str] = field(default_factory=set)

    def encode(self, part: Any, *, is_first: bool) -> np.ndarray:
        """Token ids (int32), or bytes (uint8) of text without a tokenizer.

        Args:
            part: text, token ids or messages.
            is_first: whether text begins with special tokens; those of messages are the template's.

        Raises:
            ValueError: if the template refuses the messages.
        """
        if is_messages(part):
            is_first, part = False, self._text([self._message(x) for x in part])
        if isinstance(part, str):
            if self.tokenizer is None:
                # Lone surrogates are legal in JSON.
                return np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)
            part = self.tokenizer(part, add_special_tokens=is_first)["input_ids"]
        return np.array(part, dtype=np.int32)

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with a role and content, without nulls, which Parquet puts into its gaps."""
        message = _as_message(_without_nulls(message))
        message.setdefault("content", None)
        if "value" in message and message["content"] is None:
            name, message["content"] = str(message.pop("from")), message.pop("value")
            message["role"] = ROLES.get(name, name)
        if isinstance(message["content"], list):
            message["content"] = [self._part(x) for x in message["content"]]
        return message

    def _part(self, part: Any) -> Any:
        """A part of a content: media become a text that is the same for the same media."""
        if not isinstance(part, dict):
            return part
        if not str(part.get("type")).startswith(MEDIA):
            if isinstance(part.get("content"), list):  # what a tool found
                return {**part, "content": [self._part(x) for x in part["content"]]}
            return part
        self.media += 1
        digest = hashlib.sha256(_json(part).encode("utf-8", "surrogatepass")).hexdigest()
        return {"type": "text", "text": f"<{part['type']} {digest[:16]}>"}

    def _text(self, messages: list[dict[str, Any]]) -> str:
        """Messages as text: by the chat template of the tokenizer, or each after its role."""
        if getattr(self.tokenizer, "chat_template", None):
            try:
                text = self._templated(messages)
            except Exception as error:  # templates raise errors of their own
                raise ValueError(f"the chat template refuses the messages: {error}") from None
            for name in (*BEFORE, *AFTER):
                self.dropped[name] += self._missing(name, messages, text)
            return text
        self.is_plain = True
        start = f"<tools>\n{_json(self._parsed_tools())}\n" if self.tools else ""
        return start + "".join(map(self._plain, messages))

    def _parsed_tools(self) -> Any:
        """Tools, which some data sets keep as JSON."""
        try:
            return json.loads(self.tools) if isinstance(self.tools, str) else self.tools
        except ValueError:
            return self.tools

    def _templated(self, messages: list[dict[str, Any]]) -> str:
        more = {"tools": self._parsed_tools()} if self.tools else {}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **more))

    def _missing(self, name: str, messages: list[dict[str, Any]], text: str) -> int:
        """Of how many messages the template left out a field: its text, or any trace of it."""
        said = [message[name] for message in messages if message.get(name)]
        if all(isinstance(x, str) for x in said):
            return sum(x.strip() not in text for x in said)
        try:
            bare = self._templated([{k: x for k, x in m.items() if k != name} for m in messages])
        except Exception:  # it misses the field, so it reads it
            return 0
        return len(said) if bare == text else 0

    def _plain(self, message: dict[str, Any]) -> str:
        """A message after its role, with all that it says."""
        self.unread |= set(message) - {"role", "content", *BEFORE, *AFTER}
        content = message["content"]
        parts = content if isinstance(content, list) else [content or ""]
        return "".join(
            [
                f"<{message.get('role')}>\n",
                *(f"<{name}>\n{_written(message[name])}\n" for name in BEFORE if message.get(name)),
                *map(_written, parts),
                "\n",
                *(f"<{name}>\n{_written(message[name])}\n" for name in AFTER if message.get(name)),
            ]
        )


def is_messages(value: Any) -> bool:
    """Whether this is a list of messages: with a role or content, ShareGPT's keys, or a call."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(x, dict)
            and (
                x.keys() & {"content", "role"}
                or {"from", "value"} <= set(x)
                or x.get("type") in (CALL, CALL_OUTPUT, REASONING)
            )
            for x in value
        )
    )


def is_text_parts(value: Any) -> bool:
    """Whether this is a list of parts of a content that are text, such as Anthropic's system."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(x, dict) and x.get("type") in TEXTS and isinstance(x.get("text"), str)
            for x in value
        )
    )


def _as_message(item: dict[str, Any]) -> dict[str, Any]:
    """An item of OpenAI's Responses as the message that Chat Completions have for it."""
    kind = None if "role" in item else item.get("type")
    if kind == CALL:
        call = {name: item[name] for name in ("name", "arguments") if name in item}
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    if kind == CALL_OUTPUT:
        return {"role": "tool", "content": item.get("output")}
    if kind == REASONING:
        said = item.get("content") or item.get("summary") or item.get("encrypted_content") or ""
        parts = said if isinstance(said, list) else [said]
        return {"role": "assistant", "reasoning_content": "\n".join(map(_written, parts))}
    return dict(item)


def _written(part: Any) -> str:
    """Text as it is, or that of a part; all else as JSON."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else _json(part)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(x) for k, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
