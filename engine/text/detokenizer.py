"""Incremental detokenisation: token ids in, whole characters out.

Tokens are bytes and a character may span several, so bytes that don't yet make a character
(at most three) are held back; all the text emitted is the decoding of all the tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    `tokenizers.decoders.DecodeStream` is not used: it holds back everything after bytes that
    never become a character, raises when a decoded prefix changes, and of SentencePiece's
    byte tokens it replaces a whole run when a single byte is wrong. Here a wrong byte costs
    one U+FFFD, as in SentencePiece itself and in Unicode's "maximal subpart" practice
    (The Unicode Standard, section 3.9), and is emitted at once.

    Args:
      tokenizer: whose tokens.
      prompt_ids: what came before. None of its text is emitted; it decides whether a leading
        space is the text's first, and it may end inside a character.
      skip_special_tokens: leave control tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ):
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        context = self._last_bytes(prompt_ids)
        self._decoder.decode(context)
        self._drop_space = self._bytes.strips_leading_space and not context

    def push(self, token_ids: Iterable[int]) -> str:
        """Take more tokens and return the text that is now certain; often empty."""
        return self._emit(self._join(token_ids), final=False)

    def flush(self) -> str:
        """End the text: an unfinished character becomes U+FFFD."""
        return self._emit(b"", final=True)

    def _emit(self, data: bytes, *, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text

    def _join(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in token_ids if i not in self._skipped)

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The last three or more bytes of a text, which fix the decoder's state after it."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= 3:
                break
            if token_id not in self._skipped:
                tail = self._bytes[token_id] + tail
        return tail
