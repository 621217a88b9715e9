"""Stop strings, against a naive search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import StopChecker


def oracle(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the match that is complete first (the longest of several), and it."""
    for end in range(1, len(text) + 1):
        found = [word for word in stop if text[:end].endswith(word)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def may_still_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest suffix that is a proper beginning of a stop string."""
    return max(
        (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0
    )


WORDS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)
PIECES = st.lists(st.text("abc", max_size=6), max_size=10)


@settings(max_examples=1000, deadline=None)
@given(stop=WORDS, pieces=PIECES)
def test_pieces_give_what_a_search_of_the_whole_text_gives(
    stop: tuple[str, ...], pieces: list[str]
):
    checker = StopChecker(stop)
    released, match = "", None
    for i, piece in enumerate(pieces):
        text, match = checker.push(piece)
        released += text
        so_far = "".join(pieces[: i + 1])
        expected, expected_match = oracle(so_far, stop)
        assert match == expected_match
        if match is None:  # as much as possible is released, and no more
            assert released == so_far[: len(so_far) - may_still_stop(so_far, stop)]
        else:
            assert released == expected
    released += checker.flush()
    assert (released, match) == oracle("".join(pieces), stop)


def test_a_stop_string_across_pieces_never_leaks():
    checker = StopChecker(("<end>",))
    assert checker.push("hi <e") == ("hi ", None)
    assert checker.push("n") == ("", None)
    assert checker.push("d> more") == ("", "<end>")
    assert checker.push("even more") == ("", "<end>")
    assert checker.flush() == ""


def test_a_false_start_is_released_as_soon_as_it_is_known():
    checker = StopChecker(("abcd", "bce"))
    assert checker.push("abc") == ("", None)
    assert checker.push("x") == ("abcx", None)
    assert checker.push("abc") == ("", None)
    assert checker.push("e") == ("a", "bce")


def test_the_longest_of_the_matches_that_end_together_wins():
    assert StopChecker(("b", "ab")).push("xab") == ("x", "ab")
    assert StopChecker(("ab", "abc")).push("xabc") == ("x", "ab")


def test_what_is_held_back_comes_at_the_end():
    checker = StopChecker(("stop",))
    assert checker.push("full st") == ("full ", None)
    assert checker.flush() == "st"
    assert checker.flush() == ""


def test_without_stop_strings_nothing_is_held_back():
    assert StopChecker(()).push("anything") == ("anything", None)


def test_a_long_text_is_not_scanned_again_for_each_piece():
    class CountedText(str):
        reads = 0

        def __getitem__(self, key):  # type: ignore[override]
            CountedText.reads += 1
            return super().__getitem__(key)

        def __radd__(self, other: str):
            return CountedText(other + str(self))

    checker = StopChecker(("aaab",))
    for _ in range(1000):
        checker.push(CountedText("aaa"))
    # Each of the 3,000 characters once, and two slices a piece.
    assert CountedText.reads == 3000 + 2000


def test_an_empty_stop_string_is_an_error():
    with pytest.raises(ValueError, match="must not be empty"):
        StopChecker(("",))
