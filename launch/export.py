"""Export a checkpoint as a Hugging Face folder with model card, for llama.cpp, or for Megatron-LM.

A Hugging Face folder is written by one process and checked against transformers, vLLM and TensorRT-LLM. `format=gguf` writes one
file for llama.cpp, on one process too. `format=gpt` writes a checkpoint of Megatron-Core's GPTModel on any number of processes.

minitron export +model=smollm2_135m
minitron export +model=smollm2_135m format=gguf gguf_type=q8_0
minitron export --nproc 8 +model=llama31_8b format=gpt parallel=tp8
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import ExportRun
from minitron_mcore.errors import refuse
from minitron_mcore.parallel.rendezvous import is_rank_zero


@entry("export")
def main(config: ExportRun) -> None:
    from minitron_mcore.checkpoint import claim, run_folder
    from minitron_mcore.export import gguf_export, model_card
    from minitron_mcore.formats import gguf_layout, hf_convert, megatron_gpt
    from minitron_mcore.models import architecture
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.reporting import tables

    source, dtype = run_folder.open_checkpoint(config.source, step=config.step), config.dtype.value
    if config.format == "gpt":
        options = config.parallel, dtype, config.names.value, config.vocab_multiple
        with (
            process_groups.stage_context(config),
            claim.new_run_folder(config.out_dir, resolved(config)) as folder,
        ):
            parameters = megatron_gpt.export_folder(source, folder, *options)
    elif not is_rank_zero():
        return
    elif config.format == "gguf":
        refuse(gguf_layout.problems(source.arch))
        with claim.new_run_folder(config.out_dir, resolved(config)) as folder:
            parameters = gguf_export.export_file(source, folder, config.gguf_type.value)
    else:
        architecture.check_exportable(source.arch)
        with claim.new_run_folder(config.out_dir, resolved(config)) as folder:
            parameters = hf_convert.export_folder(source, folder, dtype)
            loaded = model_card.complete_folder(model_card.checkpoint_origin(source), folder)
        process_groups.log(f"transformers loads {config.out_dir}: {loaded}")
    tables.table("exported", [{"parameters": parameters, "dtype": dtype, "folder": config.out_dir}])


if __name__ == "__main__":
    main()
