"""What a stage's folder was made from and what it holds, by content. No torch import.

inputs.json   written when the folder is claimed: path and fingerprint of each input
.complete     written when the stage has finished: size of each file, SHA-256 of small ones, seconds, ranks and device
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from minitron_mcore.checkpoint import disk, steps
from minitron_mcore.data import blend
from minitron_mcore.errors import UserError
from minitron_mcore.reading import FORMAT_VERSION, check_format_version, damage_as_user_error, read_json

CONFIG, COMPLETE, INPUTS = "config.yaml", ".complete", "inputs.json"
READ_BYTES = 1 << 30
"""Hashed of an input, in equal shares of its files: a second or two. Times and sizes would take none, but copies and git change
times, and another content may have the same size."""
_BLOCK = 1 << 20
_DAMAGED = "restore it, or remove the folder and run again"
_HASHED_BYTES = 1 << 20
"""Outputs up to this size are compared by SHA-256, larger ones by size."""
_FILE_OF = {"scores": "scores.safetensors", "study": "depth.json", "plan": "plan.json"}
_MODELS = ("source", "student", "teacher")
_HF_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".gguf")
_TEXTS = {
    "depth": ("heldout",),
    "evaluate": ("heldout",),
    "search": ("train", "heldout"),
    "synthesize": (),
    "benchmark": (),
    "tokenizetext": (),
}
"""Files of the section `data` that a stage reads; other stages read `train`."""
_REWRITTEN = (CONFIG, "model.json", "README.md")
"""Files that change after their stage has finished: settings, command and versions when it is started again, and results in the
model card. They must only exist."""
_LOGS = ("tensorboard", "profile", "wandb", "mlruns")


class Input(NamedTuple):
    path: str
    fingerprint: str | None
    """None if there is nothing at the path."""


def inputs(config: Mapping[str, Any]) -> dict[str, Input]:
    """Everything that a stage reads, by the name of its setting.

    A checkpoint's fingerprint is that in its model.json, with its newest step. Scores, studies, plans, caches and text are hashed.

    Args:
        config: the content of the stage's config.yaml.

    Raises:
        UserError: a damaged model.json.
    """
    read = {role: config[role] for role in (*_MODELS, *_FILE_OF) if config.get(role)}
    if config.get("teachers"):
        read.pop("teacher", None)
    if config.get("stage") in ("convert", "cut"):
        read |= {f"model.{key}": path for key in ("hf", "weights") if (path := config["model"].get(key))}
    if choices := config.get("depth", {}).get("choices"):
        read["depth.choices"] = choices
    data = config.get("data", {})
    if data.get("tokenizer"):
        read["data.tokenizer"] = data["tokenizer"]
    found = {name: Input(str(path), _fingerprint(name, Path(path))) for name, path in read.items()}
    paths, weights = blend.parse_blend(config["teachers"], "teachers") if config.get("teachers") else ([], None)
    for number, path in enumerate(paths):
        share = weights[number] if weights else 1.0
        found[f"teachers[{number}]"] = Input(path, f"{share:g} x {_fingerprint('teacher', Path(path))}")
    answered = config.get("distill", {}).get("on_policy", {})
    for number, path in enumerate(answered["prompts"] if answered.get("share") else []):
        found[f"distill.on_policy.prompts[{number}]"] = Input(path, _text_fingerprint(path))
    for key in _TEXTS.get(config.get("stage", ""), ("train",)):
        entries, split = data.get(key) or [], "train" if key == "train" else "valid"
        if key == "train" or (not entries and (data.get("split") or data.get("splits_file"))):
            entries = blend.split_entries(data.get("train") or [], data.get("splits_file"), split)
        paths, weights = blend.parse_blend(entries) if entries else ([], None)
        for number, path in enumerate(paths):
            content, weight = _text_fingerprint(path), weights and f"{weights[number]:g}"
            found[f"data.{key}[{number}]"] = Input(path, f"{weight} x {content}" if weight and content else content)
    return found


def _text_fingerprint(entry: str) -> str | None:
    """`_fingerprint` of a text file or pair, or of all files of a folder or pattern."""
    try:
        files = blend.expand(entry)
    except UserError:  # the stage that reads the text refuses it
        return None
    each = [_fingerprint("data", Path(file), READ_BYTES // len(files)) for file in files]
    known = [part for part in each if part is not None]
    if len(each) == 1 or len(known) < len(each):
        return each[0] if len(each) == 1 else None
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]


def _fingerprint(role: str, path: Path, read_bytes: int = READ_BYTES) -> str | None:
    """16 hex digits that identify what is at a path, without the path; None for nothing."""
    if role in _MODELS and (path / "model.json").is_file():
        remedy = "make the checkpoint again"
        with damage_as_user_error(path / "model.json", remedy):
            newest = next(iter(steps.published(path)), None)
            return (
                f"{read_json(path / 'model.json', remedy)['fingerprint']} {newest.path.name if newest else 'no step'}"
            )
    if path.is_dir():
        only = path / _FILE_OF.get(role, "index.json")
        files = [only] if role in _FILE_OF or only.is_file() else _model_files(path)
    else:
        files = [path] if path.is_file() else [path.with_name(f"{path.name}{suffix}") for suffix in (".idx", ".bin")]
    if not files or not all(map(Path.is_file, files)):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path) if path.is_dir() else file.suffix} ".encode())
        digest.update(_content_hash(file, read_bytes // len(files)))
    return digest.hexdigest()[:16]


def _model_files(folder: Path) -> list[Path]:
    """Weights, config and tokenizer of a Hugging Face folder; of a folder without config.json, all files below it."""
    if (folder / "config.json").is_file():
        return sorted(path for path in folder.iterdir() if path.suffix in _HF_SUFFIXES and path.name != INPUTS)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _content_hash(path: Path, read_bytes: int) -> bytes:
    """SHA-256 of a file's size and content; of a file above `read_bytes`, of at least two evenly spaced blocks of it."""
    size, count = path.stat().st_size, max(2, read_bytes // _BLOCK)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= max(read_bytes, 2 * _BLOCK):
            digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            for block in range(count):
                file.seek((size - _BLOCK) * block // (count - 1))
                digest.update(file.read(_BLOCK))
    return digest.digest()


def record_inputs(out_dir: str | Path, present: Mapping[str, Input]) -> None:
    """Write INPUTS into a claimed folder, unless it has a record (one process)."""
    if not (path := Path(out_dir) / INPUTS).is_file():
        record = {"format_version": FORMAT_VERSION, "inputs": {name: each._asdict() for name, each in present.items()}}
        disk.write_json(path, record)


def recorded_inputs(out_dir: str | Path) -> dict[str, Input]:
    """The inputs that a folder was made from; none without a record, as earlier versions left folders.

    Raises:
        UserError: the record is damaged.
    """
    path, remedy = Path(out_dir) / INPUTS, f"remove {out_dir} and run again"
    if not path.is_file():
        return {}
    content = read_json(path, remedy)
    check_format_version(content, path, remedy)
    with damage_as_user_error(path, remedy):
        return {name: Input(**each) for name, each in content["inputs"].items()}


def changed_inputs(out_dir: str | Path, present: Mapping[str, Input]) -> list[str]:
    """One sentence for each input of a folder's stage that has another content now, or was none then.

    Args:
        present: `inputs` of the stage's config; inputs that do not exist are not compared.

    Returns:
        [] for a folder without a record.

    Raises:
        UserError: see `recorded_inputs`.
    """
    if not (Path(out_dir) / INPUTS).is_file():
        return []
    recorded = recorded_inputs(out_dir)
    sentences = []
    for name in dict.fromkeys([*recorded, *present]):
        old, new = recorded.get(name, Input("", None)), present.get(name, Input("", None))
        if old.fingerprint != new.fingerprint and not (name in present and new.fingerprint is None):
            sentences.append(
                f"{out_dir} was made from {name} {_named(old)}, which is {_named(new)} now: restore the old one, or remove "
                f"{out_dir} and run again."
            )
    return sentences


def _named(each: Input) -> str:
    return f"{each.path} ({each.fingerprint})" if each.fingerprint else "nothing"


def finish(out_dir: str | Path, machine: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Mark a stage as finished (one process): write the manifest of its files. That of a stage which was finished before and made
    nothing new stays, with its seconds.

    Args:
        machine: "ranks" and "device" of the stage, if they are known.
    """
    out_dir = Path(out_dir)
    files = {str(path.relative_to(out_dir)): _seen(path) for path in _outputs(out_dir)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        if json.loads((out_dir / COMPLETE).read_text())["files"] == files:
            return
    begun = out_dir / CONFIG  # written when the stage starts
    took = {"seconds": round(time.time() - begun.stat().st_mtime, 1)} if begun.is_file() else {}
    disk.write_json(out_dir / COMPLETE, {"format_version": FORMAT_VERSION, **took, **machine, "files": files})


def costs(out_dir: Path) -> dict[str, Any]:
    """Seconds from a finished stage's last start to its end, its ranks and their device; None where COMPLETE does not hold them.

    Raises:
        UserError: the manifest is damaged.
    """
    path, content = out_dir / COMPLETE, {}
    if is_complete(out_dir) and os.path.getsize(path):
        content = read_json(path, _DAMAGED)
        check_format_version(content, path, _DAMAGED)
    with damage_as_user_error(path, _DAMAGED):
        kinds = {"seconds": float, "ranks": int, "device": str}
        return {key: None if content.get(key) is None else kind(content[key]) for key, kind in kinds.items()}


def _seen(path: Path) -> dict[str, Any]:
    """What the manifest holds about a file."""
    if path.name in _REWRITTEN:
        return {}
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": disk.sha256(path)} if size <= _HASHED_BYTES else {})


def _outputs(out_dir: Path) -> Iterator[Path]:
    """The files that readers of a finished folder use: without logs and without older steps."""
    older = {step.path.name for step in steps.published(out_dir)[1:]}
    for path in sorted(out_dir.rglob("*")):
        top = path.relative_to(out_dir).parts[0]
        if path.is_file() and top not in (*_LOGS, *older) and path.suffix != ".part" and not top.startswith("."):
            yield path


def is_complete(out_dir: str | Path) -> bool:
    """Whether the stage that wrote a folder has finished."""
    return (Path(out_dir) / COMPLETE).is_file()


def damaged_outputs(out_dir: str | Path) -> list[str]:
    """One sentence for each file of a finished folder that is missing or is not what the stage wrote.

    An earlier version left COMPLETE empty; nothing is compared then.

    Raises:
        UserError: the manifest is damaged.
    """
    path, remedy = Path(out_dir) / COMPLETE, f"restore it, or remove {out_dir} and run again"
    if not os.path.getsize(path):
        return []
    content = read_json(path, remedy)
    check_format_version(content, path, remedy)
    sentences = []
    with damage_as_user_error(path, remedy):
        for name, written in content["files"].items():
            written = {} if os.path.basename(name) in _REWRITTEN else written
            file = path.parent / name
            seen = _seen(file) if file.is_file() else None
            if seen is None:
                sentences.append(f"{file} is missing, although its stage has finished: {remedy}.")
            elif seen.get("bytes") != written.get("bytes"):
                sizes = f"{seen['bytes']:,} bytes, but its stage wrote {written['bytes']:,}"
                sentences.append(f"{file} has {sizes}: {remedy}.")
            elif seen != written:
                sentences.append(f"{file} has another content than its stage wrote: {remedy}.")
    return sentences
