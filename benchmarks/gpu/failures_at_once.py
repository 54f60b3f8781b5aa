"""A pytest plugin: what failed is printed when it fails, so that a run that is cut short has told it."""


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}", flush=True)
