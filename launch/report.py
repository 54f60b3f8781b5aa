"""report.html: everything that the stages left in a work_dir on one page, and who was made from whom.

python launch/report.py work_dir=runs/demo
python launch/report.py +recipe=smollm2_100m html=/path/report.html
"""

from minitron_mcore.launching import alone, entry
from minitron_mcore.runs import ReportRun


@entry("report")
def main(config: ReportRun) -> None:
    from minitron_mcore import report
    from minitron_mcore.page import write

    if not alone():
        return
    if config.dry_run:
        rows, note = write.contents(write.collect(config.work_dir)), "would go into"
    else:
        rows, note = write.write(config.work_dir, config.html), "page:"
    report.table(f"report on {config.work_dir}", rows, [f"{note} {config.html}"])


if __name__ == "__main__":
    main()
