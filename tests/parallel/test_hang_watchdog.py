"""The hang watchdog on real ranks: a failure means that a hang is not noticed, or that a slow run is taken for one."""

import time

import pytest
import torch.distributed as dist

from minitron_mcore.config.performance import HangConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import HUNG_STATUS
from minitron_mcore.testing import RankError, on_ranks


def work_wait_and_hang(log):
    """Rank 0 works while rank 1 waits for it and the teacher's rank, 2, waits for a request; then rank 2 hangs in the request."""
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
    bridge.send_request({})
    dist.barrier()
    hang_watchdog._on_hang = lambda message, ranks: log.write_text(f"{ranks} {message}")
    bridge.group.barrier().wait()


def test_ranks_wait_for_one_that_works_and_not_for_one_that_hangs(tmp_path):
    hang = HangConfig(setup_minutes=0.01, step_minutes=0.01)
    with pytest.raises(RankError) as lost:
        on_ranks(work_wait_and_hang, 3, ParallelConfig(), tmp_path / "log", teacher_ranks=1, hang=hang, timeout=60)
    assert lost.value.reason == f"died with exit code {HUNG_STATUS}", lost.value
    told = (tmp_path / "log").read_text()
    assert told.startswith("[2] no progress for") and "rank 2 is in work_wait_and_hang" in told and "rank 0" not in told
    assert " in setup: " in told or " in the teacher's pass: " in told
