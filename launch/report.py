"""Write one HTML page about all stages in a work folder.

minitron report work_dir=runs/demo
minitron report +recipe=smollm2_100m html=/path/report.html figures=[throughput.jsonl]
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import ReportRun
from minitron_mcore.parallel.rendezvous import is_rank_zero


@entry("report")
def main(config: ReportRun) -> None:
    from minitron_mcore.export import model_card
    from minitron_mcore.reporting import page, tables

    cards: list[str] = []
    if not is_rank_zero():
        return
    if config.dry_run:
        rows, note = page.contents(page.collect(config.work_dir, config.figures)), "would go into"
    else:
        rows, note = page.write(config.work_dir, config.html, config.figures), "page:"
        cards = [f"model card: {card}" for card in model_card.update_results(config.work_dir)]
    tables.table(f"report on {config.work_dir}", rows, [f"{note} {config.html}", *cards])


if __name__ == "__main__":
    main()
