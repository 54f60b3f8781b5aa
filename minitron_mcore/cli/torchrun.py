"""torchrun, with an exit status that says why the ranks ended: `python -m minitron_mcore.cli.torchrun` takes its arguments.

torchrun itself ends with status 1 whatever its ranks' statuses are. This one ends with the status of the rank that failed first
(see `errors`), and with STOPPED_STATUS after a signal.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from minitron_mcore.errors import STOPPED_STATUS


def main() -> None:
    """Run torchrun with this process's arguments."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is for the ranks, which install their own handlers
    try:
        torchrun()
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status > 0 else 1)  # negative: a rank was killed
    except SignalException:  # torchrun has passed the signal on and waited for the ranks
        sys.exit(STOPPED_STATUS)


if __name__ == "__main__":
    main()
