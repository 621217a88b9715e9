"""Bad words: texts that must not be generated, as token sequences.

The sampler forbids the last token of a sequence when the ones before it were just generated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine.sampling import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, InvalidRequest

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Tokenise bad words, each as the start of a text and after a space (as vLLM does).

    Other ways to spell a word in tokens remain possible: this bans token sequences, which
    discourages a word, and is not a filter.

    Args:
      tokenizer: the model's.
      words: texts that are not empty. Spaces before a word are ignored: both forms count.

    Returns:
      Different token sequences, in the order of the words.

    Raises:
      InvalidRequest: a word takes more than MAX_BAD_WORD_TOKENS tokens, or there are more
        than MAX_BAD_WORDS sequences.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        for form in (bare, f" {bare}") if bare else (word,):
            ids = tuple(tokenizer.encode(form, add_special_tokens=False, field="bad_words"))
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise InvalidRequest(
                    "bad_words",
                    f"{form!r:.80} takes {len(ids)} tokens, but at most {MAX_BAD_WORD_TOKENS} "
                    "are possible; give a shorter text",
                )
            if ids:
                sequences[ids] = None
    if len(sequences) > MAX_BAD_WORDS:
        raise InvalidRequest(
            "bad_words",
            f"make {len(sequences)} token sequences (with and without a leading space), but "
            f"at most {MAX_BAD_WORDS} are possible; give fewer words",
        )
    return tuple(sequences)
