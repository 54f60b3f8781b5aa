"""Train a pruned student, or several, on its teacher's logits; the same command resumes.

minitron distill --nproc 8 +model=llama31_8b parallel=cp2 data.train=[text.jsonl]
minitron distill --nproc 8 +model=llama31_8b parallel=cp2 data.train=[text.jsonl] \\
    'students={width: runs/a/prune, depth: runs/b/prune}'
"""

from minitron_mcore.cli.main import entry
from minitron_mcore.config.stages import DistillRun


@entry("distill")
def main(config: DistillRun) -> None:
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.distill import remote_teacher, run, teachers
    from minitron_mcore.estimate import announce
    from minitron_mcore.evaluation import heldout, on_policy
    from minitron_mcore.parallel import process_groups

    settings = config.distill
    with process_groups.stage_context(
        config,
        settings.sequence_length,
        teacher_ranks=settings.teacher_ranks,
        teacher_parallel=settings.teacher_parallel,
    ):
        if (bridge := process_groups.bridge()) and bridge.is_teacher:
            teacher = run_folder.open_checkpoint(config.teacher, "teacher")
            return remote_teacher.serve(teacher, settings, config.parallel, config.dtype.value, config.performance)
        runs = config.each()
        students = [run_folder.open_checkpoint(run.student, "student") for run in runs]
        teacher = teachers.open_teachers(config)
        run.check_run(runs[0], settings, students, teacher)
        announce.print_memory(runs[0], settings, students, teacher)
        text = heldout.HeldOut(config, students[0]) if settings.eval_every else None
        answers = on_policy.StudentAnswers(config, students[0]) if settings.on_policy.share else None
        run.train(runs, settings, students, teacher, text, answers)


if __name__ == "__main__":
    main()
