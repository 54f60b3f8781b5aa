"""Student and teacher that don't hold the same token ids: what they share, and whether the ids mean the same. No torch import."""

from collections.abc import Iterator
from pathlib import Path

from minitron_mcore.models.architecture import Architecture

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def shared(student: Architecture, teacher: Architecture | None) -> int:
    """Ids that both have: 0 up to the smaller vocabulary. Both softmaxes are over these; the larger one's other rows stand aside
    like padding, without a probability or a gradient."""
    return min(student.vocab, teacher.vocab) if teacher else student.vocab


def problems(
    student: Architecture, teacher: Architecture, student_hf: Path | None, teacher_hf: Path | None
) -> Iterator[str]:
    """What keeps the ids from being shared: an id that stands for two tokens; vocabularies of two sizes with no tokenizers to tell.

    Args:
        student_hf: folder with its tokenizer's files; None: it is not there yet. `teacher_hf` likewise.
    """
    sizes = f"the teacher's vocabulary has {teacher.vocab} tokens, the student's {student.vocab}"
    student_files, teacher_files = _tokenizer(student_hf), _tokenizer(teacher_hf)
    if not student_files or not teacher_files:
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

    mine, other = (tokenizer.load(hf).pieces() for hf in (student_hf, teacher_hf))
    differ = [n for n in range(shared(student, teacher)) if n in mine and n in other and mine[n] != other[n]]
    if differ:
        first = differ[0]
        yield (
            f"{sizes}, and their tokenizers differ in {len(differ)} of the ids that both have (id {first} is {other[first]!r} and "
            f"{mine[first]!r}): distillation on logits needs the same tokenizer; take a teacher that has the student's."
        )


def _tokenizer(hf: Path | None) -> dict[str, bytes]:
    return {name: (hf / name).read_bytes() for name in _FILES if hf and (hf / name).is_file()}
