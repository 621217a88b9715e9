"""Text to token ids and back: tokenizers, chat templates, detokenisation, stop strings.

Importing this package costs nothing: each name is loaded on first use, because `tokenizers`
and `jinja2` are not needed by `octavo --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.text.bad_words import bad_word_ids
    from engine.text.chat_template import ChatTemplate, Message
    from engine.text.detokenizer import Detokenizer
    from engine.text.grammars import Grammars
    from engine.text.stop_strings import StopChecker
    from engine.text.tokenizer import Tokenizer, TokenizerError

_HOME = {
    "ChatTemplate": "chat_template",
    "Detokenizer": "detokenizer",
    "Grammars": "grammars",
    "Message": "chat_template",
    "StopChecker": "stop_strings",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "bad_word_ids": "bad_words",
}

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "Grammars",
    "Message",
    "StopChecker",
    "Tokenizer",
    "TokenizerError",
    "bad_word_ids",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'engine.text' has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.text.{_HOME[name]}"), name)
