"""Compute a teacher's outputs once and store them, for any number of students and layouts.

`kind` selects what is stored: topk (the largest log-probabilities), hidden (final hidden states) or hidden_int8. The same command
resumes.

minitron teacher_cache --nproc 8 +model=llama31_8b parallel=tp2_sp data.train=[text.jsonl] kind=topk top_k=64
minitron distill --nproc 8 +model=llama31_8b data.train=[text.jsonl] teacher=runs/llama31_8b/teacher_cache
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import TeacherCacheRun


@entry("teacher_cache")
def main(config: TeacherCacheRun) -> None:
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill import cache_writer
    from minitron_mcore.parallel import process_groups

    with process_groups.stage_context(config, config.sequence_length):
        cache_writer.run(config, run_folder.open_checkpoint(config.teacher, "teacher"))


if __name__ == "__main__":
    main()
