"""Students and teachers with vocabularies of different sizes: the ids that both have, and whether these agree. No torch import."""

from collections.abc import Iterator
from pathlib import Path

from minitron_mcore.models.architecture import Architecture

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def shared(student: Architecture, teacher: Architecture | None) -> int:
    """Number of ids that both have: the smaller vocabulary. Both softmaxes are over these; other rows are treated as padding."""
    return min(student.vocab, teacher.vocab) if teacher else student.vocab


def problems(
    student: Architecture, teacher: Architecture, student_hf: Path | None, teacher_hf: Path | None
) -> Iterator[str]:
    """Problems of the shared ids: an id with two tokens; vocabularies of different sizes without tokenizers to compare.

    Args:
        student_hf, teacher_hf: folders with the tokenizers' files; None: not there yet.
    """
    sizes = f"the teacher's vocabulary has {teacher.vocab} tokens, the student's {student.vocab}"
    student_files, teacher_files = _tokenizer(student_hf), _tokenizer(teacher_hf)
    if not (student_hf and teacher_hf and student_files and teacher_files):
        if student.vocab != teacher.vocab:
            whose = "neither has a tokenizer" if not student_files and not teacher_files else "one has no tokenizer"
            yield (
                f"{sizes}, and {whose} to show that the ids that both have are the same tokens: put the files of both into their "
                "hf folders, or take a teacher of the student's vocabulary."
            )
        return
    if student_files == teacher_files:
        return
    from minitron_mcore.data import tokenizer  # imports transformers

    ours, theirs = (tokenizer.load(hf).pieces() for hf in (student_hf, teacher_hf))
    differ = [n for n in range(shared(student, teacher)) if n in ours and n in theirs and ours[n] != theirs[n]]
    if differ:
        first = differ[0]
        yield (
            f"{sizes}, and their tokenizers differ in {len(differ)} of the ids that both have (id {first} is {theirs[first]!r} and "
            f"{ours[first]!r}): distillation on logits needs the same tokenizer; take a teacher that has the student's."
        )


def _tokenizer(hf: Path | None) -> dict[str, bytes]:
    return {name: (hf / name).read_bytes() for name in _FILES if hf and (hf / name).is_file()}
