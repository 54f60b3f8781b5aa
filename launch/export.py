"""Sharded checkpoint -> Hugging Face folder with its model card, held against the runtimes that will load it (one process), or a
folder that Megatron-LM's GPTModel loads (any number); a piece at a time.

python launch/export.py +model=smollm2_135m
torchrun --nproc-per-node 8 launch/export.py +model=llama31_8b format=gpt parallel=tp8
"""

from minitron_mcore.launching import alone, entry, plain
from minitron_mcore.runs import ExportRun


@entry("export")
def main(config: ExportRun) -> None:
    from minitron_mcore import checkpoint, delivery, report, runtime
    from minitron_mcore.models import architecture, gpt, hf

    source, dtype = checkpoint.open_checkpoint(config.source), config.dtype.value
    if config.format == "gpt":
        options = config.parallel, dtype, config.names.value, config.vocab_multiple
        with runtime.distributed(config.parallel, config.seed), checkpoint.claimed(config.out_dir, plain(config)):
            parameters = gpt.export_folder(source, config.out_dir, *options)
    elif not alone():
        return
    else:
        architecture.check_exportable(source.arch)
        with checkpoint.claimed(config.out_dir, plain(config)):
            parameters = hf.export_folder(source, config.out_dir, dtype)
            taken = delivery.deliver(delivery.exported(source), config.out_dir)
        report.table("loaders (every block has the same sizes)", taken)
    report.table("exported", [{"parameters": parameters, "dtype": dtype, "folder": config.out_dir}])


if __name__ == "__main__":
    main()
