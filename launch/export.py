"""Sharded checkpoint -> Hugging Face folder. One process, a piece at a time.

python launch/export.py +model=smollm2_135m
"""

from minitron_mcore.config import ExportRun
from minitron_mcore.launching import alone, entry, plain


@entry("export")
def main(config: ExportRun) -> None:
    from minitron_mcore import checkpoint, report
    from minitron_mcore.models import architecture, hf

    if not alone():
        return
    source = checkpoint.open_checkpoint(config.source)
    architecture.check_exportable(source.arch)
    with checkpoint.claimed(config.out_dir, plain(config)):
        parameters = hf.export_folder(source, config.out_dir, config.dtype.value)
    report.table("exported", [{"parameters": parameters, "dtype": config.dtype.value, "folder": config.out_dir}])


if __name__ == "__main__":
    main()
