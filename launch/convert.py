"""Hugging Face folder -> sharded Megatron checkpoint.

torchrun --nproc-per-node 3 launch/convert.py +model=smollm2_135m model.hf=/path/to/folder parallel=tp3
"""

from minitron_mcore.config import ConvertRun
from minitron_mcore.launching import entry, plain


@entry("convert")
def main(config: ConvertRun) -> None:
    from minitron_mcore import checkpoint, report, runtime
    from minitron_mcore.models import architecture, hf, table

    wanted = architecture.given(config.model.architecture)
    with runtime.distributed(config.parallel, config.seed):
        with checkpoint.claimed(config.out_dir, plain(config)):
            arch = hf.import_folder(config.model.hf, config.out_dir, config.parallel, wanted)
        report.table(
            "converted",
            [{"parameters": table.count(arch), "blocks": arch.blocks, "hidden": arch.hidden, "ffn": arch.ffn}],
            [f"checkpoint: {config.out_dir}"],
        )


if __name__ == "__main__":
    main()
