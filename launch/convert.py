"""Convert a Hugging Face folder, GGUF file or GPTModel checkpoint to a sharded checkpoint.

minitron convert --nproc 3 model.hf=/path/to/folder parallel=tp3
minitron convert --nproc 8 +model=llama31_8b model.weights=/path/to/megatron/checkpoint parallel=tp8
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import ConvertRun


@entry("convert")
def main(config: ConvertRun) -> None:
    from minitron_mcore.checkpoint import claim
    from minitron_mcore.formats import hf_convert, sources
    from minitron_mcore.models import architecture, build, parameter_table
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.reporting import tables

    wanted = architecture.from_config(config.model.architecture)
    with process_groups.stage_context(config):
        model, dtype = config.model, build.DTYPES[config.dtype.value]
        with (
            claim.new_run_folder(config.out_dir, resolved(config)) as new,
            sources.open_source(model.hf, model.weights or model.hf, dtype) as (folder, weights),
        ):
            arch = hf_convert.import_folder(folder, new, config.parallel, wanted, weights)
        tables.table(
            "converted",
            [
                {
                    "parameters": parameter_table.count(arch),
                    "blocks": arch.blocks,
                    "hidden": arch.hidden,
                    "ffn": arch.ffn,
                }
            ],
            [f"checkpoint: {config.out_dir}"],
        )


if __name__ == "__main__":
    main()
