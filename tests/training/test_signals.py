"""Test that held signals are delayed and delivered on release."""

import os
import signal
import threading

import pytest

from gptj8.training.signals import HeldSignals


@pytest.fixture
def delivered():
    """Signals that were delivered; the previous handlers are restored afterwards."""
    found = []
    before = {
        number: signal.signal(number, lambda number, frame: found.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_signal_is_delayed_until_release(delivered, number):
    held = HeldSignals()
    held.hold()
    os.kill(os.getpid(), number)
    assert delivered == []
    held.release()
    assert delivered == [number]
    os.kill(os.getpid(), number)  # the previous handler is restored
    assert delivered == [number, number]


def test_hold_and_release_are_idempotent(delivered):
    held = HeldSignals()
    held.hold()
    held.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    held.release()
    held.release()
    assert delivered == [signal.SIGTERM]


def test_nested_holds_deliver_at_the_outer_release(delivered):
    with HeldSignals():
        with HeldSignals():
            os.kill(os.getpid(), signal.SIGINT)
        assert delivered == []
    assert delivered == [signal.SIGINT]


def test_error_inside_the_context_releases(delivered):
    with pytest.raises(ValueError), HeldSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError
    assert delivered == [signal.SIGTERM]


def test_hold_does_nothing_in_another_thread(delivered):
    thread = threading.Thread(target=lambda: HeldSignals().__enter__().release())
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert delivered == [signal.SIGTERM]
