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
MEDIA = ("image", "input_image", "audio", "input_audio", "video", "file", "input_file")


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
    unread: dict[str, None] = field(default_factory=dict)

    def encode(self, part: Any, *, is_first: bool) -> np.ndarray:
        """Token ids (int32), or bytes (uint8) of text without a tokenizer.

        Args:
            part: text, token ids or messages.
            is_first: whether text begins with special tokens; those of messages are the template's.

        Raises:
            ValueError: if the template refuses the messages.
        """
        if is_messages(part):
            is_first = False
            part = self._text([self._message(x) for x in part])
        if isinstance(part, str):
            if self.tokenizer is None:
                # Lone surrogates are legal in JSON.
                return np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)
            part = self.tokenizer(part, add_special_tokens=is_first)["input_ids"]
        return np.array(part, dtype=np.int32)

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with a role and content, without nulls, which Parquet puts into its gaps."""
        if "role" not in message and "from" in message:
            name = str(message["from"])
            message = {"role": ROLES.get(name, name), "content": message["value"]}
        content = message.get("content")
        if isinstance(content, list):
            content = [self._part(x) for x in content]
        return {**_without_nulls(message), "content": content}

    def _part(self, part: Any) -> Any:
        """A part of a content: media become a text that is the same for the same media."""
        if not isinstance(part, dict) or not str(part.get("type")).startswith(MEDIA):
            return part
        self.media += 1
        digest = hashlib.sha256(_json(part).encode("utf-8", "surrogatepass")).hexdigest()
        return {"type": "text", "text": f"<{part['type']} {digest[:16]}>"}

    def _text(self, messages: list[dict[str, Any]]) -> str:
        """Messages as text: by the chat template of the tokenizer, or each after its role."""
        tools = json.loads(self.tools) if isinstance(self.tools, str) else self.tools
        if not getattr(self.tokenizer, "chat_template", None):
            self.is_plain = True
            start = f"<tools>\n{_json(tools)}\n" if tools else ""
            return start + "".join(map(self._plain, messages))
        more = {"tools": tools} if tools else {}

        def rendered(messages: list[dict[str, Any]]) -> str:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **more))

        try:
            text = rendered(messages)
        except Exception as error:  # templates raise errors of their own
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        for name in (*BEFORE, *AFTER):
            said = [message[name] for message in messages if message.get(name)]
            if said and all(isinstance(x, str) for x in said):
                missing = sum(x.strip() not in text for x in said)
            else:
                bare = [{k: x for k, x in m.items() if k != name} for m in messages]
                missing = len(said) if said and _same(rendered, bare, text) else 0
            if missing:
                self.dropped[name] += missing
        return text

    def _plain(self, message: dict[str, Any]) -> str:
        """A message after its role, with all that it says."""
        self.unread |= dict.fromkeys(set(message) - {"role", "content", *BEFORE, *AFTER})
        content = message["content"]
        if isinstance(content, list):
            content = "".join(map(_part_text, content))
        text = f"<{message.get('role')}>\n"
        text += "".join(_field(name, message) for name in BEFORE)
        text += f"{'' if content is None else _part_text(content)}\n"
        return text + "".join(_field(name, message) for name in AFTER)


def is_messages(value: Any) -> bool:
    """Whether this is a list of messages, with a role or content, or ShareGPT's two keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(x, dict) and ("content" in x or "role" in x or {"from", "value"} <= set(x))
            for x in value
        )
    )


def _same(rendered: Any, messages: list[dict[str, Any]], text: str) -> bool:
    """Whether a template gives this text; one that misses something does read it."""
    try:
        return bool(rendered(messages) == text)
    except Exception:  # templates raise errors of their own
        return False


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return _json(part)


def _field(name: str, message: dict[str, Any]) -> str:
    value = message.get(name)
    return f"<{name}>\n{value if isinstance(value, str) else _json(value)}\n" if value else ""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(x) for k, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
