"""Stop strings: find them across token boundaries, and release no part of one.

An Aho-Corasick automaton (Aho and Corasick, 1975) over the stop strings reads each character
once; its depth is the number of characters that may still become a stop string.
"""

from __future__ import annotations

import dataclasses
from collections import deque


@dataclasses.dataclass(slots=True)
class _Node:
    """The longest suffix of the text that begins some stop string."""

    depth: int
    next: dict[str, _Node] = dataclasses.field(default_factory=dict)
    fallback: _Node | None = None  # the longest proper suffix that begins one; root: None
    match: str | None = None  # the longest stop string that ends here


class StopChecker:
    """Watches one text for stop strings.

    The match that is complete first wins, however the text is cut into pieces; of several
    that end at the same character, the longest (so that the least text is released).

    Args:
      stop: texts of at least one character; may be empty.
    """

    def __init__(self, stop: tuple[str, ...]):
        self._root = _build(stop)
        self._node = self._root
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
          The text that may be released now, and the stop string that was found or None. What
          is released never holds a stop string, nor a beginning of one that the following
          text could complete. After a match nothing is released any more.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._root.next:
            return text, None
        text = self._held + text
        node = self._node
        for position in range(len(self._held), len(text)):
            character = text[position]
            while (following := node.next.get(character)) is None and node.fallback:
                node = node.fallback
            node = following or self._root
            if node.match is not None:
                self._matched, self._held = node.match, ""
                return text[: position + 1 - len(node.match)], node.match
        self._node = node
        released = len(text) - node.depth
        self._held = text[released:]
        return text[:released], None

    def flush(self) -> str:
        """End the text: release what was held back, unless a stop string was found."""
        released, self._held, self._node = self._held, "", self._root
        return released


def _build(stop: tuple[str, ...]) -> _Node:
    root = _Node(depth=0)
    for text in stop:
        if not text:
            raise ValueError("a stop string must not be empty")
        node = root
        for character in text:
            node = node.next.setdefault(character, _Node(node.depth + 1))
        node.match = text
    queue = deque([root])
    while queue:  # breadth first: a fallback is shallower, so it is complete already
        parent = queue.popleft()
        for character, node in parent.next.items():
            fallback = parent.fallback
            while fallback is not None and character not in fallback.next:
                fallback = fallback.fallback
            node.fallback = fallback.next[character] if fallback is not None else root
            if node.match is None:
                node.match = node.fallback.match
            queue.append(node)
    return root
