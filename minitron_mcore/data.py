"""Token batches: text or Megatron .bin/.idx in, training batches and calibration samples out.

A document is encoded as the model's tokenizer does it (with the BOS that Llama's adds) and always ends with EOS. Training reads
through megatron-core's GPTDataset and BlendedDataset. Files without weights are one pool of documents, shuffled
together; files with weights ("0.3 path") are shuffled one by one and blended in exact shares.
"""

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

from minitron_mcore import runtime
from minitron_mcore.config import DataConfig
from minitron_mcore.errors import UserError
from minitron_mcore.reading import readable
from minitron_mcore.schedule import Batch
from minitron_mcore.textfiles import Limits, check_readable, check_size, documents, is_prefix
from minitron_mcore.tokenfiles import BLOCK, block_starts, check_ids, check_index, check_range, open_tokens
from minitron_mcore.tokenizer import Tokenizer, open_tokenizer

from megatron.core.datasets.blended_dataset import BlendedDataset  # isort: skip
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # isort: skip
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # isort: skip
from megatron.core.datasets.utils import Split  # isort: skip

REMEDY = "remove that folder, which is made again"
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def parse_blend(entries: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split entries like "0.3 path" into paths and weights; weights are None where no entry has one.

    Raises:
        UserError: no entry, some with a weight and some without, a weight of 0.
    """
    matches = [re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\s+)?(\S.*)", entry.strip()) for entry in entries]
    if not matches or not all(matches):
        raise UserError(f"The list of data files, {list(entries)}, is empty or has an empty entry: name text files.")
    paths, weights = [match[2] for match in matches], [match[1] for match in matches]
    if not any(weights):
        return paths, None
    for path, weight in zip(paths, weights, strict=True):
        if weight is None or float(weight) == 0:
            raise UserError(f"{path} has weight {weight} in a blend: give every file one above 0, or none of them one.")
    return paths, [float(weight) for weight in weights]


def _make_folder(folder: str, fill: Callable[[str], object]) -> None:
    """Fill a folder and name it when complete: what a killed run leaves is never taken for the whole."""
    if os.path.isdir(folder):
        return
    unfinished = f"{folder}.unfinished-{uuid.uuid4().hex[:8]}"
    try:
        os.makedirs(unfinished)
        fill(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not os.path.isdir(folder):  # else another run was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenize_file(path: str, tokenizer: Tokenizer, limits: Limits, folder: str) -> None:
    name = os.path.basename(path)
    builder = IndexedDatasetBuilder(f"{folder}/tokens.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    lengths = builder.sequence_lengths
    progress = runtime.Progress(f"tokenize {name}", round(os.path.getsize(path) / 1e6, 1), "MB")
    for texts, position in documents(path, limits):
        for ids in tokenizer.documents(texts):
            builder.add_document(ids, [len(ids)])
        progress.update(round(position / 1e6, 1))
    if not lengths:
        raise UserError(f"{path} holds no text.")
    builder.finalize(f"{folder}/tokens.idx")
    runtime.log(f"tokenize {name}: {len(lengths):,} documents, {sum(lengths):,} tokens")


def _on_rank_0[T](work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait; all return its result or raise its UserError (collective)."""
    if not dist.is_initialized():
        return work()
    # A group of its own: tokenising may outlast the minutes that the world's groups wait.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    box = [None, None]
    if runtime.rank() == 0:
        try:
            box[0] = work()
        except (UserError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def tokenize(
    files: Sequence[str],
    tokenizer: Tokenizer | None,
    cache: str,
    limits: Limits | None = None,
    vocab_size: int | None = None,
) -> list[str]:
    """The .bin/.idx prefix of each file, written into `cache` where missing; given prefixes pass through (collective).

    Without a text file there is no need of a tokenizer. Rank 0 writes and the others wait. The hash of the file's content
    and of the tokenizer is part of the name, so that a file that changed is a new one.

    Args:
        limits: of text files; None is the default ones.
        vocab_size: rows of the embedding that given ids must fit; None doesn't look at them.

    Raises:
        UserError: a file that is missing, of no known kind, damaged, too large or empty; ids that the embedding doesn't have;
            a cache that a rank doesn't see.
    """

    def tokens_of(path: str) -> str:
        if is_prefix(path):
            return path
        check_size(path, limits)
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        name = (
            f"{os.path.basename(path).split('.')[0]}-{hashlib.sha256(content + tokenizer.fingerprint).hexdigest()[:16]}"
        )
        folder = os.path.join(cache, name)
        _make_folder(folder, functools.partial(_tokenize_file, path, tokenizer, limits))
        return os.path.join(folder, "tokens")

    def work() -> list[str]:
        for path in files:
            check_readable(path)
            if is_prefix(path) and vocab_size is not None:
                check_ids(path, vocab_size)
        prefixes = [tokens_of(path) for path in files]
        for prefix in prefixes:
            check_index(prefix)
        return prefixes

    limits = limits or Limits()
    prefixes = _on_rank_0(work)
    with runtime.agreed():
        for prefix in prefixes:
            if not is_prefix(prefix):
                raise UserError(f"{prefix}.idx is not there: put data.cache and the data where all nodes see them.")
    return prefixes


def prepare(config: DataConfig, hf: str | os.PathLike, vocab_size: int) -> tuple[list[str], list[float] | None]:
    """`config.train` tokenised for a model: prefixes and blend weights (collective).

    Args:
        config: says what to read.
        hf: the model's Hugging Face folder, with its tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: see `parse_blend`, `open_tokenizer`, `tokenize`.
    """
    files, weights = parse_blend(config.train)
    tokenized = [path for path in files if is_prefix(path)]
    with runtime.agreed():
        tokenizer = open_tokenizer(config, hf, vocab_size) if len(tokenized) < len(files) else None
    return tokenize(files, tokenizer, config.cache, Limits.of(config), vocab_size), weights


def data_hash(prefixes: Sequence[str]) -> str:
    """16 hex digits that name the data for lineage, wherever it lies.

    SHA-256 over each whole .idx and 64 blocks spread over each .bin.
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
    """Several .bin/.idx pairs one after the other: a low-level dataset of megatron-core, also read token by token.

    Reading an id that an embedding of `vocab_size` rows doesn't have is a UserError; so is opening a damaged pair.
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

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        return np.cumsum(self.sequence_lengths, dtype=np.int64) - self.sequence_lengths

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the whole stream, int64."""
        pieces, document = [], int(np.searchsorted(self.document_starts, start, side="right")) - 1
        while count:
            offset = start - int(self.document_starts[document])
            length = min(count, int(self.sequence_lengths[document]) - offset)
            pieces.append(self.get(document, offset, length).astype(np.int64))
            start, count, document = start + length, count - length, document + 1
        return np.concatenate(pieces)


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to the weights, by largest remainder."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def _dataset(streams: list[TokenStream], counts: list[int], sequence_length: int, seed: int, cache: str):
    """megatron-core's dataset of sum(counts) samples, of which counts[i] come from streams[i]."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(i) for i in range(len(streams))], None),
        split="1,0,0",
        path_to_cache=cache,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # Samples are read, never encoded, and nothing is masked at EOS: there is nothing to ask of a tokenizer.
        tokenizer=SimpleNamespace(eod=None, vocab_size=None, unique_identifiers={}),
    )
    datasets = [
        GPTDataset(stream, str(i), np.arange(len(stream), dtype=np.int32), count, Split.train, config)
        for i, (stream, count) in enumerate(zip(streams, counts, strict=True))
        if count
    ]
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, [c for c in counts if c], None, config)


def order_hash(
    prefixes: Sequence[str], weights: Sequence[float] | None, *, seed: int, sequence_length: int, num_samples: int
) -> str:
    """16 hex digits that name the order of samples of `ordered`, wherever its data lie."""
    order = json.dumps([data_hash(prefixes), weights, _counts(weights, num_samples), seed, sequence_length])
    return hashlib.sha256(order.encode()).hexdigest()[:16]


def _counts(weights: Sequence[float] | None, num_samples: int) -> list[int]:
    return _apportion(weights or [1.0], num_samples)


def ordered(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    *,
    cache: str,
    vocab_size: int,
    seed: int,
    sequence_length: int,
    num_samples: int,
):
    """The dataset of `num_samples` samples, for `batch_of` (collective). All but `cache` and `vocab_size` fix their one order,
    whatever the layout.

    Raises:
        UserError: data below one sample (S + 1 tokens); when it is read, an id of `vocab_size` or more.
    """
    groups = [list(prefixes)] if weights is None else [[prefix] for prefix in prefixes]
    streams = [TokenStream(group, vocab_size) for group in groups]
    for group, stream in zip(groups, streams, strict=True):
        if stream.num_tokens <= sequence_length:
            size = f"{stream.num_tokens} tokens are fewer than one sample of {sequence_length} + 1"
            raise UserError(f"{', '.join(group)}: {size}: give more text or a shorter sequence.")
    name = order_hash(prefixes, weights, seed=seed, sequence_length=sequence_length, num_samples=num_samples)
    folder = os.path.join(cache, f"order-{name}")
    build = functools.partial(_dataset, streams, _counts(weights, num_samples), sequence_length, seed)
    _on_rank_0(lambda: _make_folder(folder, build))
    with runtime.agreed(), readable(folder, REMEDY):
        return build(folder)


def train_batches(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    *,
    cache: str,
    vocab_size: int,
    seed: int,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    num_samples: int,
    order_samples: int | None = None,
    consumed_samples: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """Microbatches of one data-parallel rank, from sample `consumed_samples` to `num_samples` (collective).

    Data, weights, seed, sequence length and num_samples fix one order of samples, whatever the layout. Global batch k
    is samples k * GBS .. (k + 1) * GBS; microbatch m of rank r starts (m * dp_size + r) * micro_batch_size into it, as
    in Megatron's sampler. Tensor- and pipeline-parallel ranks of one dp_rank read the same. num_samples is that of
    the whole run, so that a resumed run goes on in the same order. With `order_samples` the order is that of a run of so many
    samples, and begins again after its last.

    Yields:
        tokens, labels (the tokens that follow) and position_ids [B, S] int64, loss_mask [B, S] float32, samples [B] int64 (places
        in the order), on the device.

    Raises:
        UserError: a global batch that micro_batch_size * dp_size doesn't divide; see `ordered`.
    """
    step = micro_batch_size * dp_size
    if global_batch_size % step:
        parts = f"microbatches of {micro_batch_size} on {dp_size} data-parallel ranks"
        raise UserError(f"A global batch of {global_batch_size} cannot be made of {parts}: give a multiple of {step}.")
    samples = order_samples or num_samples
    order = dict(cache=cache, vocab_size=vocab_size, seed=seed, sequence_length=sequence_length, num_samples=samples)
    dataset = ordered(prefixes, weights, **order)
    end = num_samples - (num_samples - consumed_samples) % global_batch_size
    starts = range(consumed_samples + dp_rank * micro_batch_size, end, step)
    return (batch_of(dataset, [(start + n) % samples for n in range(micro_batch_size)]) for start in starts)


def batch_of(dataset, rows: Sequence[int]) -> Batch:
    """These samples of a dataset of `ordered` as one microbatch (see `train_batches`)."""
    with readable(dataset.config.path_to_cache, REMEDY):
        samples = [dataset[row] for row in rows]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in _FIELDS} | {"samples": torch.tensor(rows)}
    return {key: tensor.to(runtime.device()) for key, tensor in batch.items()}


def calibration(
    prefixes: Sequence[str],
    *,
    vocab_size: int,
    sequence_length: int,
    num_samples: int,
    seed: int,
    whole_documents: bool = False,
) -> tuple[Tensor, Tensor]:
    """N samples drawn at random, without repetition, from all the data in proportion to its tokens (blend or not).

    A sample is one of the disjoint stretches of S tokens or, with `whole_documents`, the first S tokens of a document.

    Returns:
        tokens [N, S] int64 and mask [N, S] bool, False on the padding at the end; on the CPU, the same on every rank.

    Raises:
        UserError: fewer stretches or documents than num_samples; an id of `vocab_size` or more.
    """
    stream = TokenStream(prefixes, vocab_size)
    available = len(stream) if whole_documents else stream.num_tokens // sequence_length
    if available < num_samples:
        kind = "documents" if whole_documents else f"stretches of {sequence_length} tokens"
        raise UserError(f"The data holds {available} {kind}, not {num_samples}: take fewer samples or more text.")
    tokens = torch.zeros(num_samples, sequence_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, i in enumerate(np.random.default_rng(seed).choice(available, num_samples, replace=False).tolist()):
        length = min(sequence_length, int(stream.sequence_lengths[i])) if whole_documents else sequence_length
        start = int(stream.document_starts[i]) if whole_documents else i * sequence_length
        tokens[row, :length] = torch.from_numpy(stream.tokens(start, length))
        mask[row, :length] = True
    return tokens, mask
