"""Block keys: what they depend on, and that nothing else can be mistaken for it."""

from __future__ import annotations

import itertools

import pytest

from engine.core.block_keys import child_key, root_key
from engine.types import Domain


def test_keys_are_the_published_digests():
    """A key names blocks that other processes may hold: another format is another version.

    Computed with `printf … | sha256sum`: the version, each part after its length in eight
    bytes (05 alice, 04 salt, 02 w1), and then that digest and 01000000 02000000 ff7f0000.
    """
    root = root_key(Domain("alice", "salt"), "w1")
    child = child_key(root, (1, 2, 32767))
    assert root.hex() == "e114dffc540c6cd3f137320dec667cbf772cb13a0b493d5e4397defa04627e4f"
    assert child.hex() == "63cf6873d14ccf3f0105e32048dd4653458ba98dda2a01a7a4cfe72dc7c03f53"


ZEROS = "\0" * 7  # of a length field
PARTS = ("", "a", "b", "ab", "ba", "a\0", "\0", "\0" + ZEROS, f"\x01{ZEROS}a", "é", "\ud800")


def test_roots_differ_unless_tenant_salt_and_fingerprint_are_all_equal():
    roots = {
        root_key(Domain(tenant, salt), fingerprint)
        for tenant, salt, fingerprint in itertools.product(PARTS, repeat=3)
    }
    assert len(roots) == len(PARTS) ** 3


def test_a_root_is_the_same_for_equal_domains():
    assert root_key(Domain("a", "b"), "w") == root_key(Domain("a", "b"), "w")


def test_parts_cannot_move_between_tenant_salt_and_extras():
    split = [("abc", "", ""), ("ab", "c", ""), ("a", "bc", ""), ("a", "b", "c"), ("", "", "abc")]
    assert len({root_key(Domain(t, s), e) for t, s, e in split}) == len(split)
    extras = [("x",), ("x", ""), ("", "x"), ("x", "y"), ("xy",), ()]
    assert len({root_key(Domain(), *parts) for parts in extras}) == len(extras)


def chain(tokens: list[int], block_size: int, domain: Domain) -> list[bytes]:
    keys = [root_key(domain, "weights")]
    for start in range(0, len(tokens), block_size):
        keys.append(child_key(keys[-1], tokens[start : start + block_size]))
    return keys[1:]


@pytest.mark.parametrize("changed", range(12))
def test_a_key_depends_on_every_earlier_token_and_on_no_later_one(changed: int):
    tokens = list(range(50, 62))
    other = tokens.copy()
    other[changed] += 1
    pairs = zip(chain(tokens, 4, Domain()), chain(other, 4, Domain()), strict=True)
    same = [ours == theirs for ours, theirs in pairs]
    assert same == [block < changed // 4 for block in range(3)]


def test_a_key_depends_on_the_order_of_tokens_and_of_blocks():
    orders = itertools.permutations((1, 2, 3, 4))
    assert len({chain(list(order), 2, Domain())[-1] for order in orders}) == 24


def test_chains_of_different_domains_never_meet():
    tokens = list(range(12))
    keys = [
        key
        for domain in (Domain("a"), Domain("b"), Domain("a", "s"), Domain("as"))
        for key in chain(tokens, 4, domain)
    ]
    assert len(set(keys)) == len(keys)


def test_equal_blocks_after_different_beginnings_have_different_keys():
    assert chain([1, 2, 9, 9], 2, Domain())[1] != chain([3, 4, 9, 9], 2, Domain())[1]


def test_the_division_into_blocks_is_part_of_the_key():
    assert chain([1, 2, 3, 4], 2, Domain())[-1] != chain([1, 2, 3, 4], 4, Domain())[-1]
