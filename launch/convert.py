"""Hugging Face folder, GGUF file or GPTModel checkpoint -> sharded Megatron checkpoint.

torchrun --nproc-per-node 3 launch/convert.py +model=smollm2_135m model.hf=/path/to/folder parallel=tp3
torchrun --nproc-per-node 8 launch/convert.py +model=llama31_8b model.weights=/path/to/megatron/checkpoint parallel=tp8
"""

from minitron_mcore.launching import entry, plain
from minitron_mcore.runs import ConvertRun


@entry("convert")
def main(config: ConvertRun) -> None:
    from minitron_mcore import checkpoint, report, runtime
    from minitron_mcore.models import architecture, build, hf, sources, table

    wanted = architecture.given(config.model.architecture)
    with runtime.distributed(config.parallel, config.seed):
        model, dtype = config.model, build.DTYPES[config.dtype.value]
        with (
            checkpoint.claimed(config.out_dir, plain(config)),
            sources.opened(model.hf, model.weights or model.hf, dtype) as (folder, weights),
        ):
            arch = hf.import_folder(folder, config.out_dir, config.parallel, wanted, weights)
        report.table(
            "converted",
            [{"parameters": table.count(arch), "blocks": arch.blocks, "hidden": arch.hidden, "ffn": arch.ffn}],
            [f"checkpoint: {config.out_dir}"],
        )


if __name__ == "__main__":
    main()
