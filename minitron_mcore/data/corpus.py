"""Text files tokenised by parallel processes, each into a .bin/.idx pair that does not depend on the number of processes.

    out_dir/
      NAME_text_document.bin, .idx   the pair of NAME.jsonl, named as Megatron-LM names it
      NAME_text_document.mask.*      its loss mask, if some of its tokens do not count (see `loss_mask`)
      tokens.json                    what was made: written last
      unfinished/KEY/N/              pair and figures of part N of a file; KEY identifies content, tokenizer and part size
      unfinished/KEY/whole/          figures of a file whose pair is in its place

Every folder below unfinished/ is complete: it was renamed after its last byte was on disk. After a kill the same command makes
the others.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from minitron_mcore.config import ranges
from minitron_mcore.config.stages import TokenizeTextRun
from minitron_mcore.data.blend import UNFINISHED, expand
from minitron_mcore.data.pair_writer import PAIR, concatenate, create_folder, encode
from minitron_mcore.data.text_reader import MASK_SUFFIX, Limits, Part, check_readable, check_size, is_prefix, parts
from minitron_mcore.data.token_files import BLOCK, DType, block_starts, check_index
from minitron_mcore.data.tokenizer import open_tokenizer
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.parallel import process_groups, process_tree
from minitron_mcore.reading import read_json

PART_BYTES = 64 << 20
TOKENS = "tokens.json"
_WHOLE, _FIGURES = "whole", "figures.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A text file to tokenise."""

    path: str
    name: str
    """Of its pair, below the output folder."""
    key: str
    """Identifies content, tokenizer and part size: size, time of change and 64 blocks of the file count."""
    parts: list[Part]

    @property
    def bytes(self) -> int:
        return os.path.getsize(self.path)


class Corpus:
    """The files of a tokenize_text stage, checked.

    Raises:
        UserError: no files; one that is missing, of unknown kind or too large, or is no text; files whose pairs have one name; an
            output folder that was made of other content; see `expand`, `parts` and `open_tokenizer`.
    """

    def __init__(self, config: TokenizeTextRun, part_bytes: int = PART_BYTES):
        refuse(ranges.text_files("files", config.files))
        if not (config.data.tokenizer or config.model.hf):
            raise UserError("no tokenizer is set: give model.hf=/path/to/folder or data.tokenizer=/path.")
        self.out_dir, self.column, self.limits = Path(config.out_dir), config.column, Limits.of(config.data)
        self.processes = config.processes or len(os.sched_getaffinity(0))
        vocab = config.model.architecture and config.model.architecture.vocab
        self.tokenizer = open_tokenizer(config.data, config.model.hf, vocab)
        self.sources = self._sources(config.files, part_bytes)
        self.finished = self._finished_rows() if (self.out_dir / TOKENS).is_file() else None

    def _sources(self, entries: Sequence[str], part_bytes: int) -> list[Source]:
        paths = [path for entry in entries for path in expand(entry)]
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        sources, names = [], {}
        for path in paths:
            if is_prefix(path):
                raise UserError(f"{path} is a .bin/.idx pair, which is tokenised already: leave it out.")
            check_readable(path)
            check_size(path, self.limits)
            stem = os.path.basename(path).split(".")[0]
            folder = os.path.relpath(os.path.dirname(os.path.abspath(path)), root)
            name = os.path.normpath(os.path.join(folder, f"{stem}_{self.column}_document"))
            if name in names:
                raise UserError(
                    f"{names[name]} and {path} would both become {name}.bin: rename one, or give one of them."
                )
            names[name] = path
            sources.append(Source(path, name, self._key(path, part_bytes), parts(path, part_bytes, self.column)))
        return sources

    def _key(self, path: str, part_bytes: int) -> str:
        state = os.stat(path)
        settings = [path, state.st_size, state.st_mtime_ns, self.column, part_bytes]
        digest = hashlib.sha256(self.tokenizer.fingerprint + json.dumps(settings).encode())
        with open(path, "rb") as file:
            for start in block_starts(state.st_size):
                file.seek(start)
                digest.update(file.read(BLOCK))
        return digest.hexdigest()[:16]

    def rows(self) -> list[dict[str, Any]]:
        """Rows for a table of what will be tokenised."""
        return [
            {"file": source.path, "bytes": source.bytes, "parts": len(source.parts), "pair": source.name}
            for source in self.sources
        ]

    def tokenize(self) -> list[dict[str, Any]]:
        """Write the pairs that are missing; rows for a table, in the order of the files, which are also written to TOKENS.

        Raises:
            UserError: a file is damaged or holds no text (see `documents`); a process was killed. The same command continues.
        """
        if self.finished:
            return self.finished
        unfinished = self.out_dir / UNFINISHED
        for folder in unfinished.glob("*/*.unfinished-*"):  # of a killed run
            shutil.rmtree(folder)
        left = {number: self._missing_parts(source) for number, source in enumerate(self.sources)}
        for number, missing in left.items():
            if not missing:
                self._publish(self.sources[number])
        for number, part in self._encoded([(number, part) for number, missing in left.items() for part in missing]):
            left[number].remove(part)
            if not left[number]:
                self._publish(self.sources[number])
        rows = [
            {"file": source.path} | read_json(self._folder(source, _WHOLE) / _FIGURES, f"remove {unfinished}")
            for source in self.sources
        ]
        record = unfinished / TOKENS
        record.write_text(json.dumps({"keys": [source.key for source in self.sources], "files": rows}, indent=1) + "\n")
        os.replace(record, self.out_dir / TOKENS)
        shutil.rmtree(unfinished)
        return rows

    def _finished_rows(self) -> list[dict[str, Any]]:
        path, remedy = self.out_dir / TOKENS, f"choose another out_dir, or remove {self.out_dir}"
        record = read_json(path, remedy)
        if record.get("keys") != [source.key for source in self.sources]:
            raise UserError(f"{path} is of text files or a tokenizer that have changed: {remedy}.")
        return record["files"]

    def _folder(self, source: Source, name: object) -> Path:
        return self.out_dir / UNFINISHED / source.key / str(name)

    def _missing_parts(self, source: Source) -> set[int]:
        if self._folder(source, _WHOLE).is_dir():
            return set()
        return {part for part in range(len(source.parts)) if not self._folder(source, part).is_dir()}

    def _encoded(self, jobs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Encode (source, part) in processes, the largest first; yields each when it is done."""
        size = {job: self.sources[job[0]].bytes / len(self.sources[job[0]].parts) for job in jobs}
        progress = process_groups.Progress("tokenize", round(sum(size.values()) / 1e6, 3), "MB")
        fork = multiprocessing.get_context("fork")  # the processes share the tokenizer's memory
        # Without a lock, which a killed process would keep.
        counters = fork.RawArray("q", 2 * len(jobs) + 1)
        count = max(1, min(self.processes, len(jobs)))
        with futures.ProcessPoolExecutor(count, fork, _begin_worker, (self, counters)) as pool:
            try:
                ordered = sorted(jobs, key=lambda job: -size[job])
                waiting = {pool.submit(_encode_part, *job, slot): job for slot, job in enumerate(ordered)}
                while waiting:
                    for future in futures.wait(waiting, 1, futures.FIRST_COMPLETED).done:
                        future.result()
                        yield waiting.pop(future)
                    progress.update(round(sum(counters[:-1:2]) / 1e6, 3), f", {sum(counters[1:-1:2]):,} tokens")
            except BrokenProcessPool as error:
                raise UserError(
                    f"one of {count} processes was killed, perhaps because memory ran out: the same command continues; processes=N "
                    "gives fewer."
                ) from error
            finally:
                counters[-1] = True
                pool.shutdown(cancel_futures=True)

    def encode_part(self, number: int, part: int, slot: int, counters: Any) -> None:
        """Tokenise a part of a source into its folder.

        Args:
            counters: of all processes: bytes read and tokens made in each slot; and, last, whether they are to stop.

        Raises:
            UserError: see `encode`.
        """
        source, start = self.sources[number], time.monotonic()

        def on_batch(tokens: int, position: int) -> None:
            counters[2 * slot : 2 * slot + 2] = position, tokens
            if counters[-1]:
                raise _Stopped

        def fill(folder: str) -> None:
            pair = os.path.join(folder, PAIR)
            counts = encode(source.path, self.tokenizer, pair, self.limits, source.parts[part], self.column, on_batch)
            _write_figures(folder, *counts, time.monotonic() - start)

        create_folder(self._folder(source, part), fill)

    def _publish(self, source: Source) -> None:
        """Join the parts of a source, and move the pair to its place. Goes on where a killed run stopped."""
        whole, pair = self._folder(source, _WHOLE), self.out_dir / source.name
        create_folder(whole, functools.partial(self._join, source))
        pair.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (f"{MASK_SUFFIX}.bin", f"{MASK_SUFFIX}.idx", ".bin", ".idx"):
            if (made := whole / f"{PAIR}{suffix}").is_file():
                os.replace(made, f"{pair}{suffix}")
        check_index(str(pair))
        for part in range(len(source.parts)):
            shutil.rmtree(self._folder(source, part), ignore_errors=True)

    def _join(self, source: Source, folder: str) -> None:
        parts = [self._folder(source, part) for part in range(len(source.parts))]
        figures = [read_json(part / _FIGURES, f"remove {part}") for part in parts]
        documents, tokens, seconds = (sum(row[key] for row in figures) for key in ("documents", "tokens", "seconds"))
        if not documents:
            raise UserError(f"{source.path} holds no text.")
        dtype = np.dtype(DType.optimal_dtype(self.tokenizer.vocab_size))
        concatenate([str(part / PAIR) for part in parts], os.path.join(folder, PAIR), dtype)
        _write_figures(folder, documents, tokens, seconds, bytes=source.bytes, pair=f"{self.out_dir / source.name}")


class _Stopped(Exception):
    """In a process that is to stop because another failed or the command was interrupted."""


def _write_figures(folder: str, documents: int, tokens: int, seconds: float, **more: object) -> None:
    figures = {"documents": documents, "tokens": tokens, "seconds": round(seconds, 3), **more}
    Path(folder, _FIGURES).write_text(json.dumps(figures))


_worker: tuple[Corpus, Any]
"""Of a process that tokenises: the corpus and the shared counters."""


def _begin_worker(corpus: Corpus, counters: Any) -> None:
    global _worker
    _worker = corpus, counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells the others to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    corpus.tokenizer.use_one_thread()
    process_tree.end_with_parent()


def _encode_part(number: int, part: int, slot: int) -> None:
    corpus, counters = _worker
    corpus.encode_part(number, part, slot, counters)
