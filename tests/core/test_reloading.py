"""Exchanging the weights: who goes on, who waits, and that nothing of the old ones is found."""

from __future__ import annotations

import pytest

from engine.core import reloading
from engine.core.scheduler import SchedulerState
from tests.core.driver import Driver, make_request, rows_of


def reload(driver: Driver, fingerprint: str = "other") -> None:
    """Exchange the weights, of the limits too."""
    driver.state = reloading.reload(driver.state, fingerprint)
    driver.limits = type(driver.limits)(
        **{
            name: getattr(driver.limits, name)
            for name in driver.limits.__slots__
            if name != "fingerprint"
        },
        fingerprint=fingerprint,
    )
    driver.state.check()


def close_queue(driver: Driver) -> None:
    driver.state = reloading.close_queue(driver.state)
    driver.state.check()


def test_what_has_begun_goes_on_and_others_wait() -> None:
    driver = Driver()
    driver.admit(make_request("a", 5, max_tokens=3))
    driver.step()
    driver.admit(make_request("b", 5))
    close_queue(driver)
    driver.admit(make_request("c", 5, priority=-1))
    assert not reloading.has_drained(driver.state)
    with pytest.raises(ValueError, match="have not ended"):
        reload(driver)
    assert [rows_of(driver.step()) for _ in range(3)] == [[("a", 5, 1)], [("a", 6, 1)], []]
    assert reloading.has_drained(driver.state)
    reload(driver)
    assert [name for name, *_ in rows_of(driver.step())] == ["c", "b"]


def test_a_step_on_its_way_is_waited_for() -> None:
    driver = Driver()
    driver.admit(make_request("a", 5, max_tokens=1))
    plan = driver.schedule()
    close_queue(driver)
    assert not reloading.has_drained(driver.state)
    driver.commit(plan)
    assert reloading.has_drained(driver.state)


def test_who_was_preempted_ends_first_even_behind_others() -> None:
    driver = Driver()
    driver.admit(make_request("a", 5, max_tokens=4))
    driver.step()
    driver.admit(make_request("b", 5, priority=-1))
    driver.fail()  # all that ran are in the queue again
    close_queue(driver)
    assert not reloading.has_drained(driver.state)
    plans = [driver.step() for _ in range(3)]
    assert [[name for name, *_ in rows_of(plan)] for plan in plans] == [["a"]] * 3
    assert driver.tokens_of("a") == [7] * 4
    assert reloading.has_drained(driver.state)


def test_nothing_that_is_cached_is_found_afterwards() -> None:
    driver = Driver(host_blocks=8)
    driver.admit(make_request("a", range(9), max_tokens=2))
    driver.run()
    assert driver.state.pool.cached
    driver.admit(make_request("b", range(9), max_tokens=2))  # its keys may be worked out already
    close_queue(driver)
    driver.schedule()
    reload(driver)
    assert driver.state.pool.cached == 0
    assert rows_of(driver.step()) == [("b", 0, 9)]
    driver.run()
    driver.admit(make_request("c", range(9), max_tokens=2))
    assert rows_of(driver.step()) == [("c", 8, 1)]  # which shares with the new ones
    assert driver.state.core.sequences["c"].keys[0] != root_child("weights")


def root_child(fingerprint: str) -> bytes:
    """The key of the first block of those requests."""
    from engine.core.block_keys import child_key, root_key
    from engine.types import Domain

    return child_key(root_key(Domain(), fingerprint), range(4))


def test_what_lay_in_host_memory_is_erased() -> None:
    driver = Driver(host_blocks=8, num_blocks=4)
    driver.admit(make_request("a", range(9), max_tokens=2))
    driver.run()
    driver.admit(make_request("b", range(100, 112), max_tokens=2))  # takes its blocks
    driver.run()
    used = driver.state.core.host.used_slots().tolist()
    assert used
    close_queue(driver)
    reload(driver)
    assert not len(driver.state.core.host)
    assert sorted(driver.schedule().erased_slots) == used


def test_public_prefixes_are_computed_again_under_new_names() -> None:
    driver = Driver()
    public = make_request("public", range(8), max_tokens=1, is_public=True)
    driver.admit(public)
    driver.run()
    old = set(driver.state.core.public.keys)
    assert driver.state.core.public.num_blocks == 2
    close_queue(driver)
    reload(driver)
    assert driver.state.core.public.num_blocks == 0
    driver.run()
    assert driver.state.core.public.num_blocks == 2
    assert not old & driver.state.core.public.keys
    driver.admit(make_request("a", range(9), max_tokens=1))
    assert rows_of(driver.step()) == [("a", 8, 1)]


def test_a_copy_of_a_closed_queue_is_closed() -> None:
    driver = Driver()
    close_queue(driver)
    driver.admit(make_request("a", 5))
    copy: SchedulerState = driver.state.copy()
    assert copy.snapshot() == driver.state.snapshot()
    driver.state = copy
    assert not driver.step().rows
