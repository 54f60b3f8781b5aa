"""Work in threads, ahead of its consumer."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def run_ahead[T](jobs: Iterable[Callable[[], T]], threads: int = 4, ahead: int | None = None) -> Iterator[T]:
    """Run jobs in threads, ahead of the consumer, and yield their results in order; at most `ahead` + 1 results exist.

    An exception of a job is raised in place of its result. More threads than cores are useful, since jobs also wait for the disk.

    Args:
        ahead: None: `threads`.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[T]] = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > (ahead or threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
