"""Signals wait while they are held, and come then."""

import os
import signal
import threading

import pytest

from gptj8.training.signals import HeldSignals


@pytest.fixture
def came():
    """Signals that were delivered; the handlers of before are put back."""
    found = []
    before = {
        number: signal.signal(number, lambda number, frame: found.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_waits_until_it_is_released(came, number):
    held = HeldSignals()
    held.hold()
    os.kill(os.getpid(), number)
    assert came == []
    held.release()
    assert came == [number]
    os.kill(os.getpid(), number)  # the handler of before is back
    assert came == [number, number]


def test_holding_twice_and_releasing_twice_is_as_once(came):
    held = HeldSignals()
    held.hold()
    held.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    held.release()
    held.release()
    assert came == [signal.SIGTERM]


def test_one_inside_another_delivers_at_the_outer_end(came):
    with HeldSignals():
        with HeldSignals():
            os.kill(os.getpid(), signal.SIGINT)
        assert came == []
    assert came == [signal.SIGINT]


def test_an_error_inside_releases_too(came):
    with pytest.raises(ValueError), HeldSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError
    assert came == [signal.SIGTERM]


def test_in_another_thread_it_does_nothing(came):
    thread = threading.Thread(target=lambda: HeldSignals().__enter__().release())
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM]
