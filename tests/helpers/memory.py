"""Peak memory of a call."""

import threading
from pathlib import Path


def peak_growth(call) -> int:
    """Bytes of anonymous memory that a call needs at its worst beyond those held before, sampled every millisecond."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before, samples, done = held(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            samples.append(held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(samples) - before
