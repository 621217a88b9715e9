"""Signals that come while the server starts."""

from __future__ import annotations

import signal

import pytest

from engine.serve.signals import Signals, StoppedEarly


def load(signals: Signals, *, is_interrupted: bool) -> None:
    with signals.interrupting():
        assert is_interrupted, "it began"
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("comes_before", [True, False])
def test_the_first_signal_ends_the_loading_whenever_it_came(comes_before: bool) -> None:
    with Signals() as signals:
        if comes_before:  # while the server begins to listen
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedEarly):
            load(signals, is_interrupted=not comes_before)
        assert signals.wait(lambda: False)
