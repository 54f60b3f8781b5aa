"""The hang watchdog on real ranks: a failure means that a hang is not noticed, or that a slow run is taken for one."""

import os
import signal
import sys
import threading
import time

import pytest
import torch.distributed as dist

from minitron_mcore.config.performance import HangConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import HUNG_STATUS, STOPPED_STATUS, Stopped
from minitron_mcore.testing import RankError, on_ranks


def work_wait_and_hang(log, hanging):
    """Rank 0 works while rank 1 waits for it and the teacher's rank, 2, waits for a request; then rank `hanging`, 0 or 2, hangs."""
    from minitron_mcore.parallel import hang_watchdog, process_groups
    from minitron_mcore.parallel.hang_watchdog import Phase

    bridge = process_groups.bridge()
    if bridge.is_teacher:
        with hang_watchdog.phase(Phase.idle, lambda: "the wait for requests"):
            for _ in bridge.receive_requests():
                with hang_watchdog.phase(Phase.step, lambda: "the teacher's pass"):
                    time.sleep(600)
    for _ in range(15 if process_groups.rank() == 0 else 0):
        time.sleep(0.1)
        hang_watchdog.beat()
    dist.barrier()
    log.write_text("worked")
    hang_watchdog._on_hang = lambda message, ranks: log.write_text(f"{ranks} {message}")
    if hanging == 0 and process_groups.rank() == 0:
        time.sleep(600)
    bridge.send_request({})
    bridge.group.barrier().wait()


@pytest.mark.default_cases("2")
@pytest.mark.parametrize("hanging", [2, 0])
def test_ranks_wait_for_one_that_works_and_not_for_one_that_hangs(tmp_path, hanging):
    hang = HangConfig(setup_minutes=0.01, step_minutes=0.01)
    with pytest.raises(RankError) as lost:
        on_ranks(
            work_wait_and_hang, 3, ParallelConfig(), tmp_path / "log", hanging, teacher_ranks=1, hang=hang, timeout=60
        )
    assert lost.value.reason == f"died with exit code {HUNG_STATUS}", lost.value
    told = (tmp_path / "log").read_text()
    named = f"rank {hanging} is in work_wait_and_hang"
    assert told.startswith(f"[{hanging}] no progress for") and named in told and told.count("rank ") == 1
    assert " in setup: " in told or " in the teacher's pass: " in told


def wait_after_sigterm(log):
    """Rank 0 gets SIGTERM while rank 1 keeps it waiting: in a save for a while, then for ever."""
    from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal

    hang_watchdog.STOP_SECONDS, is_late = 1.0, process_groups.rank() == 1
    with stop_signal.at_stop_points():
        if not is_late:
            sys.stderr = log.with_name("stderr").open("w")
            for seconds in (0.2, 0.8):
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with hang_watchdog.phase(hang_watchdog.Phase.save, lambda: "a save"):
            time.sleep(3 * is_late)
            dist.barrier()
        log.write_text("saved")
        time.sleep(600 * is_late)
        dist.barrier()


def test_sigterm_ends_a_rank_that_waits_for_ever(tmp_path):
    with pytest.raises(RankError) as lost:
        on_ranks(wait_after_sigterm, 2, ParallelConfig(), tmp_path / "log", timeout=30)
    assert (lost.value.rank, lost.value.reason) == (0, f"died with exit code {STOPPED_STATUS}")
    assert (tmp_path / "log").read_text() == "saved"
    told = (tmp_path / "stderr").read_text()
    assert "Traceback" not in told
    assert "rank 0 stops: after a signal it waited for other ranks for 1 s in setup: " in told
    assert (
        "barrier (distributed/distributed_c10d.py:" in told
        and "< wait_after_sigterm (parallel/test_hang_watchdog.py:" in told
    )


def stop_alone() -> str:
    """Rank 1 gets a signal outside of stop points while rank 0 works; how this rank ends."""
    from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal

    store = dist.PrefixStore("alone", dist.distributed_c10d._get_default_store())
    watchdog = hang_watchdog.HangWatchdog(HangConfig(setup_minutes=0.1), store, process_groups.rank(), 2)
    try:
        with stop_signal.at_once(), watchdog:
            if process_groups.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)
    except Stopped as error:
        return str(error)
    return "not stopped"


def test_a_rank_that_stops_alone_stops_the_others():
    first, second = on_ranks(stop_alone, 2, ParallelConfig())
    assert first.startswith("stopped by SIGTERM") and second.startswith("stopped by SIGUSR1")
