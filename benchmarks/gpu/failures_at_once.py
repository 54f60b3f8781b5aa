"""A pytest plugin that prints each failure when it happens, so that the log of a run that is stopped early has it."""


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}", flush=True)
