"""Text files tokenised into .bin/.idx pairs below `data.cache`, which are named by content and reused."""

import functools
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data.blend import expand, parse_blend, split_entries
from minitron_mcore.data.pair_writer import PAIR, create_folder, encode
from minitron_mcore.data.text_reader import Limits, check_readable, check_size, is_prefix
from minitron_mcore.data.token_files import check_ids, check_index, sequence_lengths
from minitron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups


def _tokenize_file(path: str, tokenizer: Tokenizer, limits: Limits, folder: str) -> None:
    name = os.path.basename(path)
    progress = process_groups.Progress(f"tokenize {name}", round(os.path.getsize(path) / 1e6, 1), "MB")

    def on_batch(tokens: int, position: int) -> None:
        progress.update(round(position / 1e6, 1))

    count, tokens = encode(path, tokenizer, os.path.join(folder, PAIR), limits, on_batch=on_batch)
    if not count:
        raise UserError(f"{path} holds no text.")
    process_groups.log(f"tokenize {name}: {count:,} documents, {tokens:,} tokens")


def tokenize(
    files: Sequence[str],
    tokenizer: Tokenizer | None,
    cache: str,
    limits: Limits | None = None,
    vocab_size: int | None = None,
) -> list[str]:
    """Tokenise text files into .bin/.idx pairs below `cache`, on rank 0 (collective).

    A pair's folder is named by the file's name and a hash of the file's content and the tokenizer. An existing pair is reused.

    Args:
        files: text files, or prefixes of .bin/.idx pairs, which are checked only.
        tokenizer: may be None if all files are prefixes.
        limits: size limits of text files; None for the defaults.
        vocab_size: rows of the model's embedding, which all ids must fit; None skips this check.

    Returns:
        The prefix of each file's pair.

    Raises:
        UserError: a file is missing, of unknown type, damaged, too large or empty; a token id is not below `vocab_size`; a rank
            cannot see the cache.
    """

    def prefix_of(path: str) -> str:
        if is_prefix(path):
            return path
        check_size(path, limits)
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        name = (
            f"{os.path.basename(path).split('.')[0]}-{hashlib.sha256(content + tokenizer.fingerprint).hexdigest()[:16]}"
        )
        folder = os.path.join(cache, name)
        create_folder(folder, functools.partial(_tokenize_file, path, tokenizer, limits))
        return os.path.join(folder, "tokens")

    def work() -> list[str]:
        for path in files:
            check_readable(path)
            if is_prefix(path) and vocab_size is not None:
                check_ids(path, vocab_size)
        prefixes = [prefix_of(path) for path in files]
        for path, prefix in zip(files, prefixes, strict=True):
            check_index(prefix)
            # It may have been tokenised for a model with more rows.
            if path != prefix and vocab_size is not None and tokenizer.vocab_size > vocab_size:
                check_ids(prefix, vocab_size)
        return prefixes

    limits = limits or Limits()
    prefixes = process_groups.on_rank_0(work)
    with process_groups.raise_on_all_ranks():
        for prefix in prefixes:
            if not is_prefix(prefix):
                raise UserError(
                    f"{prefix}.idx is missing on this node: put data.cache and the data on a shared file system."
                )
    return prefixes


def prepare(
    config: DataConfig, tokenizer: str | os.PathLike | Tokenizer, vocab_size: int, split: str = "train"
) -> tuple[list[str], list[float] | None]:
    """Tokenise the text of a split, and return its .bin/.idx prefixes and blend weights (collective).

    The documents of a split within these pairs are those of `token_files.split_share`.

    The weight of a folder or pattern is shared among its files in proportion to their tokens.

    Args:
        tokenizer: opened, or the model's Hugging Face folder, which is read if there is text to tokenise.
        vocab_size: rows of the model's embedding.
        split: "train" or "valid".

    Raises:
        UserError: see `parse_blend`, `expand`, `open_tokenizer`, `tokenize`.
    """
    with process_groups.raise_on_all_ranks():
        paths, weights = parse_blend(split_entries(config.train, config.splits_file, split))
    files = process_groups.on_rank_0(lambda: [expand(path) for path in paths])
    with process_groups.raise_on_all_ranks():
        every = [file for group in files for file in group]
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = None if all(map(is_prefix, every)) else open_tokenizer(config, tokenizer, vocab_size)
    prefixes = tokenize(every, tokenizer, config.cache, Limits.of(config), vocab_size)
    return prefixes, weights and _file_weights(prefixes, list(map(len, files)), weights)


def _file_weights(prefixes: list[str], counts: list[int], weights: list[float]) -> list[float]:
    """Weight of each pair, from the number of pairs and the weight of each entry of a blend."""
    rest, result = iter(prefixes), []
    for count, weight in zip(counts, weights, strict=True):
        group = [next(rest) for _ in range(count)]
        tokens = [int(sequence_lengths(prefix).sum(dtype=np.int64)) for prefix in group]
        result += [weight * (each / sum(tokens)) for each in tokens]
    return result
