"""Sharded checkpoint -> Hugging Face folder with its model card, held against the runtimes that will load it. One process, a piece
at a time.

python launch/export.py +model=smollm2_135m
"""

from minitron_mcore.config import ExportRun
from minitron_mcore.launching import alone, entry, plain


@entry("export")
def main(config: ExportRun) -> None:
    from minitron_mcore import checkpoint, delivery, report
    from minitron_mcore.models import architecture, hf

    if not alone():
        return
    source = checkpoint.open_checkpoint(config.source)
    architecture.check_exportable(source.arch)
    with checkpoint.claimed(config.out_dir, plain(config)):
        parameters = hf.export_folder(source, config.out_dir, config.dtype.value)
        taken = delivery.deliver(source, config.out_dir)
    report.table("who loads it (every block has the same sizes)", taken)
    report.table("exported", [{"parameters": parameters, "dtype": config.dtype.value, "folder": config.out_dir}])


if __name__ == "__main__":
    main()
