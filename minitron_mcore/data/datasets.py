"""Training batches and calibration samples from text files or Megatron .bin/.idx pairs.

Documents are encoded with any BOS that the tokenizer adds, and end with EOS. Training uses megatron-core's GPTDataset and
BlendedDataset. Files without weights form one dataset. Files with weights ("0.3 path") are blended in exact proportions.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data.text_reader import Limits, check_readable, check_size, documents, is_prefix
from minitron_mcore.data.token_files import BLOCK, block_starts, check_ids, check_index, check_range, open_tokens
from minitron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reading import damage_as_user_error

from megatron.core.datasets.blended_dataset import BlendedDataset  # isort: skip
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # isort: skip
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # isort: skip
from megatron.core.datasets.utils import Split  # isort: skip

CACHE_REMEDY = "remove that folder, which is made again"
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def parse_blend(entries: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split entries like "0.3 path" into paths and weights. Weights are None if no entry has one.

    Raises:
        UserError: no entries, only some entries have a weight, or a weight is 0.
    """
    matches = [re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\s+)?(\S.*)", entry.strip()) for entry in entries]
    if not matches or not all(matches):
        raise UserError(f"The list of text files, {list(entries)}, has no or empty entries: give [a.jsonl,b.txt].")
    paths, weights = [match[2] for match in matches], [match[1] for match in matches]
    if not any(weights):
        return paths, None
    for path, weight in zip(paths, weights, strict=True):
        if weight is None or float(weight) == 0:
            raise UserError(f"{path} has weight {weight} in a blend: give every file one above 0, or none of them one.")
    return paths, [float(weight) for weight in weights]


def _create_folder(folder: str, fill: Callable[[str], object]) -> None:
    """Fill a temporary folder and rename it to `folder` when complete, so that `folder` is never partial."""
    if os.path.isdir(folder):
        return
    unfinished = f"{folder}.unfinished-{uuid.uuid4().hex[:8]}"
    try:
        os.makedirs(unfinished)
        fill(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not os.path.isdir(folder):  # otherwise another run created it first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenize_file(path: str, tokenizer: Tokenizer, limits: Limits, folder: str) -> None:
    name = os.path.basename(path)
    builder = IndexedDatasetBuilder(f"{folder}/tokens.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    lengths = builder.sequence_lengths
    progress = process_groups.Progress(f"tokenize {name}", round(os.path.getsize(path) / 1e6, 1), "MB")
    for texts, position in documents(path, limits):
        for ids in tokenizer.documents(texts):
            builder.add_document(ids, [len(ids)])
        progress.update(round(position / 1e6, 1))
    if not lengths:
        raise UserError(f"{path} holds no text.")
    builder.finalize(f"{folder}/tokens.idx")
    process_groups.log(f"tokenize {name}: {len(lengths):,} documents, {sum(lengths):,} tokens")


def _on_rank_0[T](work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the other ranks wait. All ranks return its result or raise its UserError (collective)."""
    if not dist.is_initialized():
        return work()
    # A separate group, because tokenisation can exceed the default group's timeout.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    result, message = None, None
    if process_groups.rank() == 0:
        try:
            result = work()
        except (UserError, OSError) as error:
            message = str(error)
    outcome = [result, message]
    dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    result, message = outcome
    if message is not None:
        raise UserError(message)
    return result


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
        _create_folder(folder, functools.partial(_tokenize_file, path, tokenizer, limits))
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
    prefixes = _on_rank_0(work)
    with process_groups.raise_on_all_ranks():
        for prefix in prefixes:
            if not is_prefix(prefix):
                raise UserError(
                    f"{prefix}.idx is missing on this node: put data.cache and the data on a shared file system."
                )
    return prefixes


def prepare(config: DataConfig, hf: str | os.PathLike, vocab_size: int) -> tuple[list[str], list[float] | None]:
    """Tokenise the files of `config.train` and return their .bin/.idx prefixes and blend weights (collective).

    Args:
        hf: the model's Hugging Face folder, which holds its tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: see `parse_blend`, `open_tokenizer`, `tokenize`.
    """
    files, weights = parse_blend(config.train)
    with process_groups.raise_on_all_ranks():
        tokenizer = None if all(map(is_prefix, files)) else open_tokenizer(config, hf, vocab_size)
    return tokenize(files, tokenizer, config.cache, Limits.of(config), vocab_size), weights


def data_hash(prefixes: Sequence[str]) -> str:
    """16 hex digits that identify the tokens of .bin/.idx pairs, independent of their paths.

    SHA-256 over each whole .idx and 64 evenly spaced blocks of each .bin.
    """
    digest = hashlib.sha256()
    for prefix in prefixes:
        with open(f"{prefix}.idx", "rb") as index, open(f"{prefix}.bin", "rb") as file:
            digest.update(hashlib.file_digest(index, "sha256").digest())
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for start in block_starts(size):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


class TokenStream:
    """Concatenation of .bin/.idx pairs, with the interface of megatron-core's low-level datasets.

    Raises:
        UserError: a damaged pair, when it is opened; a token id that is not below `vocab_size`, when it is read.
    """

    def __init__(self, prefixes: Sequence[str], vocab_size: int):
        self.prefixes, self.vocab_size = list(prefixes), vocab_size
        self.parts = [open_tokens(prefix) for prefix in prefixes]
        self.part_starts = np.cumsum([0, *map(len, self.parts)])
        self.sequence_lengths = np.concatenate([part.sequence_lengths for part in self.parts])
        self.num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        part = int(np.searchsorted(self.part_starts, document, side="right")) - 1
        ids = self.parts[part].get(int(document - self.part_starts[part]), offset, length)
        check_range(ids, self.vocab_size, self.prefixes[part])
        return ids

    def check_documents(self) -> None:
        """
        Raises:
            UserError: documents that consist of several sequences, whose boundaries samples do not show.
        """
        for prefix, part in zip(self.prefixes, self.parts, strict=True):
            if (documents := len(part.document_indices) - 1) != len(part):
                raise UserError(
                    f"{prefix}.idx has {documents} documents of {len(part)} sequences, but data.document_mask needs one sequence a "
                    "document: tokenise the text again without splitting sentences, or set it to false."
                )

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        return np.cumsum(self.sequence_lengths, dtype=np.int64) - self.sequence_lengths

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the concatenation, [count] int64."""
        pieces, document = [], int(np.searchsorted(self.document_starts, start, side="right")) - 1
        while count:
            offset = start - int(self.document_starts[document])
            length = min(count, int(self.sequence_lengths[document]) - offset)
            pieces.append(self.get(document, offset, length).astype(np.int64))
            start, count, document = start + length, count - length, document + 1
        return np.concatenate(pieces)


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into integers proportional to the weights, by the largest-remainder method."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """All that determines which training samples a run reads, and in which order. It is independent of the parallel layout."""

    prefixes: list[str]
    """Of the .bin/.idx pairs."""
    weights: list[float] | None
    """Blend weight of each prefix; None for one shuffled pool of documents."""
    seed: int
    sequence_length: int
    num_samples: int
    document_mask: bool = False
    """Samples have "document_starts" (see `Samples.batch`)."""

    def counts(self) -> list[int]:
        """Number of samples from each prefix; without weights, one number for all prefixes together."""
        return _largest_remainder(self.weights or [1.0], self.num_samples)

    def digest(self) -> str:
        """16 hex digits that identify the order, independent of the paths."""
        order = [data_hash(self.prefixes), self.weights, self.counts(), self.seed, self.sequence_length]
        order += ["document_mask"] if self.document_mask else []
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]


class Samples:
    """The training samples of a SampleOrder. The constructor is collective.

    Args:
        order: number and sequence of the samples.
        cache: folder for megatron-core's index files, which rank 0 builds.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: a dataset has fewer tokens than one sample (S + 1); documents of several sequences under `document_mask`; a
            token id is not below `vocab_size`, when it is read.
    """

    def __init__(self, order: SampleOrder, cache: str, vocab_size: int):
        self.order = order
        groups = [order.prefixes] if order.weights is None else [[prefix] for prefix in order.prefixes]
        self._streams = [TokenStream(group, vocab_size) for group in groups]
        for group, stream in zip(groups, self._streams, strict=True):
            if order.document_mask:
                stream.check_documents()
            if stream.num_tokens <= order.sequence_length:
                size = f"{stream.num_tokens} tokens are fewer than one sample of {order.sequence_length} + 1"
                raise UserError(f"{', '.join(group)}: {size}: give more text or a shorter sequence.")
        folder = os.path.join(cache, f"order-{order.digest()}")
        _on_rank_0(lambda: _create_folder(folder, self._build))
        with process_groups.raise_on_all_ranks(), damage_as_user_error(folder, CACHE_REMEDY):
            self._dataset = self._build(folder)

    def _build(self, cache: str):
        """megatron-core's dataset of the order's samples."""
        config = GPTDatasetConfig(
            random_seed=self.order.seed,
            sequence_length=self.order.sequence_length,
            blend=([str(i) for i in range(len(self._streams))], None),
            split="1,0,0",
            path_to_cache=cache,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            inter_document_masking=self.order.document_mask,
            # The dataset requires a tokenizer but does not use it: the data are token ids, and EOS is not masked.
            tokenizer=SimpleNamespace(eod=None, vocab_size=None, unique_identifiers={}),
        )
        counts = self.order.counts()
        datasets = [
            GPTDataset(stream, str(i), np.arange(len(stream), dtype=np.int32), count, Split.train, config)
            for i, (stream, count) in enumerate(zip(self._streams, counts, strict=True))
            if count
        ]
        return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, [c for c in counts if c], None, config)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The samples at these positions of the order as one microbatch of B = len(rows) samples, on this rank's device.

        Returns:
            tokens, labels (the next tokens) and position_ids [B, S] int64, loss_mask [B, S] float32, samples [B] int64 (`rows`).
            With the order's `document_mask` also document_starts [B, S] int64, the position in the sample at which each token's
            document begins; position_ids then count from it.
        """
        with damage_as_user_error(self._dataset.config.path_to_cache, CACHE_REMEDY):
            samples = [self._dataset[row] for row in rows]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in _FIELDS}
        batch["samples"] = torch.tensor(rows)
        if self.order.document_mask:
            batch["document_starts"] = torch.arange(self.order.sequence_length) - batch["position_ids"]
        return {key: tensor.to(process_groups.device()) for key, tensor in batch.items()}


def train_batches(
    samples: Samples,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    num_samples: int,
    consumed_samples: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """Microbatches of one data-parallel rank, as `Samples.batch` returns them.

    Global batch k holds samples k * GBS .. (k + 1) * GBS. In it, microbatch m of data-parallel rank r starts at sample
    (m * dp_size + r) * micro_batch_size, as in Megatron's sampler. All tensor-, context- and pipeline-parallel ranks of one
    data-parallel rank read the same microbatches.

    Args:
        num_samples: of the whole run. Beyond the end of `samples`, their order repeats from its start.
        consumed_samples: where a resumed run continues.

    Raises:
        UserError: `global_batch_size` is not a multiple of micro_batch_size * dp_size.
    """
    step = micro_batch_size * dp_size
    if global_batch_size % step:
        parts = f"microbatches of {micro_batch_size} on {dp_size} data-parallel ranks"
        raise UserError(f"A global batch of {global_batch_size} cannot be made of {parts}: give a multiple of {step}.")
    end = num_samples - (num_samples - consumed_samples) % global_batch_size
    starts = range(consumed_samples + dp_rank * micro_batch_size, end, step)
    total = samples.order.num_samples
    return (samples.batch([(start + n) % total for n in range(micro_batch_size)]) for start in starts)


def calibration(
    prefixes: Sequence[str],
    *,
    vocab_size: int,
    sequence_length: int,
    num_samples: int,
    seed: int,
    whole_documents: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw N samples at random without replacement from the concatenation of all pairs. Blend weights do not apply.

    A sample is one of the disjoint windows of S tokens or, with `whole_documents`, the first S tokens of a document.

    Returns:
        tokens [N, S] int64 and mask [N, S] bool (False on padding), on the CPU, identical on every rank.

    Raises:
        UserError: the data have fewer than N windows or documents; a token id is not below `vocab_size`.
    """
    stream = TokenStream(prefixes, vocab_size)
    available = len(stream) if whole_documents else stream.num_tokens // sequence_length
    if available < num_samples:
        kind = "documents" if whole_documents else f"windows of {sequence_length} tokens"
        raise UserError(f"The data holds {available} {kind}, not {num_samples}: take fewer samples or more text.")
    tokens = torch.zeros(num_samples, sequence_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, i in enumerate(np.random.default_rng(seed).choice(available, num_samples, replace=False).tolist()):
        length = min(sequence_length, int(stream.sequence_lengths[i])) if whole_documents else sequence_length
        start = int(stream.document_starts[i]) if whole_documents else i * sequence_length
        tokens[row, :length] = torch.from_numpy(stream.tokens(start, length))
        mask[row, :length] = True
    return tokens, mask
