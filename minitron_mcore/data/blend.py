"""The lists of text files and .bin/.idx pairs in `data`, in this package's form and in Megatron-LM's. No torch import."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from minitron_mcore.data.text_reader import MASK_SUFFIX, has_documents, is_prefix, is_text
from minitron_mcore.errors import UserError
from minitron_mcore.reading import read_json

UNFINISHED = "unfinished"
"""Folder of a tokenisation that has not reached its end, in its output folder."""


def parse_blend(entries: Sequence[str], what: str = "text files") -> tuple[list[str], list[float] | None]:
    """Split entries like "0.3 path", or weights and paths in turn as in Megatron-LM, into paths and weights.

    Weights are None if no entry has one. `what`: the entries are, for messages.

    Raises:
        UserError: no entries, only some entries have a weight, or a weight is 0.
    """
    entries = [entry.strip() for entry in entries]
    numbers = [bool(re.fullmatch(r"\d+\.?\d*|\.\d+", entry)) for entry in entries]
    if any(numbers):
        if numbers != [True, False] * (len(entries) // 2):
            raise UserError(
                f"The list of {what}, {entries}, has weights and paths that do not alternate: give [0.3,a.jsonl,0.7,b.jsonl]."
            )
        entries = [" ".join(pair) for pair in zip(entries[::2], entries[1::2], strict=True)]
    matches = [re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\s+)?(\S.*)", entry) for entry in entries]
    if not matches or not all(matches):
        raise UserError(f"The list of {what}, {list(entries)}, has no or empty entries: give [a.jsonl,b.txt].")
    paths, weights = ([match[group] for match in matches if match] for group in (2, 1))
    if not any(weights):
        return paths, None
    for path, weight in zip(paths, weights, strict=True):
        if weight is None or float(weight) == 0:
            raise UserError(f"{path} has weight {weight} in a blend: give every file one above 0, or none of them one.")
    return paths, [float(weight) for weight in weights]


def expand(path: str) -> list[str]:
    """The files that an entry stands for, sorted: text files, and prefixes of .bin/.idx pairs.

    A folder stands for all files with a document on each line or row and all pairs in it and in its folders. A pattern (*, ?, [])
    stands for all text files and pairs that it matches. Any other path stands for itself.

    Raises:
        UserError: nothing is found, text files and pairs are mixed, or a tokenisation into the folder has not finished.
    """
    if is_prefix(path) or os.path.isfile(path):
        return [path]
    if is_folder := os.path.isdir(path):
        paths = [str(file) for file in Path(path).rglob("*") if not file.relative_to(path).as_posix().startswith(".")]
        if any(os.path.basename(file) == UNFINISHED for file in paths):
            raise UserError(f"{path} holds tokens of a run that has not finished: run the same tokenize_text again.")
    elif glob.has_magic(path):
        paths = glob.glob(path, recursive=True)
    else:
        return [path]
    pairs = sorted({file[:-4] for file in paths if file.endswith((".bin", ".idx")) and is_prefix(file[:-4])})
    pairs = [pair for pair in pairs if not pair.endswith(MASK_SUFFIX)]
    texts = sorted(file for file in paths if (has_documents if is_folder else is_text)(file) and os.path.isfile(file))
    if pairs and texts:
        raise UserError(
            f"{path} stands for text files and for .bin/.idx pairs, {texts[0]} and {pairs[0]}: name one kind, as *.bin."
        )
    if not pairs and not texts:
        raise UserError(
            f"{path} stands for no text files or .bin/.idx pairs: check the path; name plain text in a folder by a pattern, *.txt."
        )
    return pairs or texts


def split_entries(train: list[str], splits_file: str | None, split: str = "train") -> list[str]:
    """The entries that hold a split: those listed for it in `data.splits_file`, a file as Megatron-LM's
    --per-split-data-args-path, otherwise `data.train`.

    Args:
        split: "train" or "valid".

    Raises:
        UserError: the file is damaged, or has no list or text of entries for the split.
    """
    if not splits_file:
        return train
    content = read_json(splits_file, 'write {"train": ["0.3", "a", "0.7", "b"], "valid": ["c"]}').get(split)
    entries = content.split() if isinstance(content, str) else content
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise UserError(
            f'{splits_file} has no list of paths under "{split}": write {{"{split}": ["0.3", "a", "0.7", "b"]}}.'
        )
    return entries
