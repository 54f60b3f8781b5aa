"""Signals of one process: a failure means that one is lost, or that the process keeps handlers that are not its own."""

import os
import signal
import subprocess
import sys

import pytest

from minitron_mcore.errors import STOPPED_STATUS, Stopped
from minitron_mcore.parallel import stop_signal

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.fixture(autouse=True)
def own_handlers():
    before = [signal.getsignal(number) for number in stop_signal.SIGNALS]
    yield
    stop_signal._received.clear()  # later tests fork this process
    assert [signal.getsignal(number) for number in stop_signal.SIGNALS] == before


@pytest.mark.parametrize("number", stop_signal.SIGNALS)
def test_setup_stops_at_once_and_a_long_stage_at_its_next_stop_point(number):
    with pytest.raises(Stopped, match=f"stopped by {number.name}"), stop_signal.at_once():
        os.kill(os.getpid(), number)
    with stop_signal.at_once():
        with pytest.raises(Stopped, match="after one: the same command continues"), stop_signal.at_stop_points():
            with stop_signal.at_stop_points(resumes=False):
                stop_signal.stop_point("after none")
                os.kill(os.getpid(), number)
            stop_signal.stop_point("after one")
        with (
            pytest.raises(Stopped, match="after two: the same command starts it again"),
            stop_signal.at_stop_points(False),
        ):
            stop_signal.stop_point("after two")  # the first stage's signal counts for the next one
    with stop_signal.at_stop_points():
        stop_signal.stop_point("of another command")


def test_a_signal_does_not_interrupt_a_stop_that_is_decided():
    """torchrun sends SIGTERM to all ranks when the first of them has stopped."""
    with stop_signal.at_once():
        with pytest.raises(Stopped, match="after one"), stop_signal.at_stop_points():
            os.kill(os.getpid(), TERM)
            stop_signal.stop_point("after one")
        os.kill(os.getpid(), TERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stop_signal.at_once():
        os.kill(os.getpid(), TERM)


@pytest.mark.parametrize("pair", [(INT, INT), (TERM, INT), (INT, TERM)])
def test_a_second_signal_interrupts_if_one_is_ctrl_c(pair):
    for block in (stop_signal.at_stop_points, stop_signal.ignored):
        with pytest.raises(KeyboardInterrupt), block():
            for number in pair:
                os.kill(os.getpid(), number)
    with stop_signal.ignored():
        for number in (USR1, TERM, TERM):
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(("child", "status"), [("raise SystemExit(0)", STOPPED_STATUS), ("raise SystemExit(3)", 3)])
def test_a_parent_passes_its_signal_on_and_takes_its_child_s_status(child, status):
    code = f"""
import os, signal, time
def stop(*unused): {child}
signal.signal(signal.SIGTERM, stop)
time.sleep(0.2)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    with stop_signal.at_once(), subprocess.Popen([sys.executable, "-c", code]) as process:
        assert stop_signal.wait_for(process) == status
