"""Conversion between the tokenizer in a GGUF file and a transformers tokenizer.

transformers 5.17 converts most of them incorrectly: it ignores the pre-tokenizer, swaps BOS and EOS, and decodes U+2581 as a
space in vocabularies without that convention.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from minitron_mcore.data.tokenizer import load_fast
from minitron_mcore.errors import UserError

if TYPE_CHECKING:
    from minitron_mcore.formats.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
REMEDY = "give the model's Hugging Face config and tokenizer (model.hf=/path/to/folder) beside model.weights=/path/to/file.gguf."
EXPORT_REMEDY = "export a Hugging Face folder (format=hf) and convert it with llama.cpp's convert_hf_to_gguf.py."
GPT4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(expression: str) -> list:
    return [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": _split(GPT4_SPLIT.replace("NUMBER", "{1,3}")),
    "qwen2": _split(GPT4_SPLIT.replace("NUMBER", "")),
    "tekken": _split(TEKKEN_SPLIT),
}
"""tokenizer.ggml.pre -> pre-tokenizers, which split the text before byte pairs are merged within each part."""
WITH_BOS = ("llama-bpe", "tekken")
"""Vocabularies with tokens that no sequence of merges produces. llama.cpp adds BOS to them if the file does not say."""
PROBE = (
    "I'LL don't  say \u2581 3.14159 or 1234567890, naïve café 日本語 Ωmega 😀🚀\n\n\tdef f(x):\r\n    return x['a'] // 2 != 0  \n"
    " McDonald HTTPServer iPhone /path/to\n\n\n   !?... ＦＵＬＬ cafe\u0301 and/or\n/x"
)
"""Text whose tokens show a tokenizer's rules for digits, case, spaces, punctuation and other scripts."""


def read(file: "GGUFFile") -> PreTrainedTokenizerFast:
    """Read the tokenizer of a GGUF file, with special tokens and chat template.

    Raises:
        UserError: the file has no tokenizer, a damaged one, or one with an unsupported pre-tokenizer.
    """
    kind, pre = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2") or file.field("tokenizer.ggml.tokens") is None:
        raise UserError(f"{file.path} holds a tokenizer of kind {kind}; supported: llama, gpt2: {REMEDY}")
    if kind == "gpt2" and pre not in SPLITS:
        raise UserError(f"{file.path} has the pre-tokenizer {pre!r}; supported: {', '.join(SPLITS)}: {REMEDY}")
    try:
        return _build(file, kind, pre)
    except Exception as error:  # damaged fields fail in many ways, and tokenizers raises nothing narrower
        raise UserError(
            f"the tokenizer in {file.path} is damaged ({type(error).__name__} {error}): {REMEDY}"
        ) from error


def _build(file: "GGUFFile", kind: str, pre: str | None) -> PreTrainedTokenizerFast:
    tokens, types = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: file.field(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    common = {
        "model_max_length": file.field("*.context_length"),
        "chat_template": file.field("tokenizer.chat_template"),
        "extra_special_tokens": [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL],
        **{role: tokens[i] for role, i in ids.items() if i is not None},
    }
    tokenizer = _sentencepiece(file, tokens, types) if kind == "llama" else _byte_pairs(file, tokens, pre)
    add_bos = file.field("tokenizer.ggml.add_bos_token")
    if add_bos or (add_bos is None and (kind == "llama" or pre in WITH_BOS)):
        bos = common["bos_token"]
        template = f"{bos} $A", f"{bos} $A {bos} $B", [(bos, ids["bos_token"])]
        tokenizer.post_processor = processors.TemplateProcessing(*template)
    converted = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **common)
    added = [token for token, kind in zip(tokens, types, strict=True) if kind == USER]
    converted.add_tokens([AddedToken(token, normalized=False) for token in added])
    return converted


def _byte_pairs(file: "GGUFFile", tokens: list[str], pre: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WITH_BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(file: "GGUFFile", tokens: list[str], types: list[int]) -> Tokenizer:
    """Llama 2's tokenizer: merges are ordered by scores, spaces become U+2581, and a space is prepended to the text."""
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, file.field("tokenizer.ggml.scores"), strict=True))
    unmerged = {token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, BYTE)}
    merges = generate_merges(vocab, scores, skip_tokens=unmerged)
    unknown = tokens[file.field("tokenizer.ggml.unknown_token_id") or 0]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.field("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def write(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer of a Hugging Face folder, with special tokens and chat template; `vocab_size` counts the embedding's rows.

    Raises:
        UserError: a tokenizer that is not fast, not a BPE, larger than the embedding, or whose rules have no name in llama.cpp.
    """
    tokenizer = load_fast(folder)
    backend = tokenizer.backend_tokenizer
    bpe = json.loads(backend.to_str())["model"]
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    if bpe["type"] != "BPE":
        raise UserError(f"the tokenizer in {folder} is a {bpe['type']} model; format=gguf writes BPE: {EXPORT_REMEDY}")
    if max(pieces) >= vocab_size:
        raise UserError(f"the tokenizer in {folder} has token {max(pieces)}, but the embedding {vocab_size} rows.")
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in bpe["merges"]]
    if bpe["byte_fallback"]:  # sentencepiece's kind: a pair's rank becomes the score of the token that it makes
        ranks = {left + right: -rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([float(ranks.get(pieces.get(i), -len(merges))) for i in range(vocab_size)])
        first = backend.encode("a", add_special_tokens=False).tokens[0]
        writer.add_add_space_prefix(first.startswith("\u2581"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_name(backend, folder))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list([pieces.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([_token_type(tokenizer, pieces.get(i), i, bpe["byte_fallback"]) for i in range(vocab_size)])
    for role in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if template := tokenizer.chat_template:
        named = (
            [{"name": name, "template": text} for name, text in template.items()]
            if isinstance(template, dict)
            else None
        )
        writer.add_chat_template(named or template)


def _token_type(tokenizer: PreTrainedTokenizerFast, piece: str | None, number: int, sentencepiece: bool) -> int:
    added = tokenizer.added_tokens_decoder.get(number)
    if piece is None:
        return UNUSED
    if sentencepiece and piece == tokenizer.unk_token:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER
    return BYTE if sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL


def _pre_name(backend: Tokenizer, folder: Path) -> str:
    """llama.cpp's name of the rules by which a tokenizer splits text, found by what they make of PROBE."""
    if backend.pre_tokenizer is not None:
        parts = backend.pre_tokenizer.pre_tokenize_str(PROBE)
        for name, split in SPLITS.items():
            if pre_tokenizers.Sequence(split).pre_tokenize_str(PROBE) == parts:
                return name
    raise UserError(
        f"the tokenizer in {folder} splits text in none of the ways that format=gguf can name ({', '.join(SPLITS)}): "
        f"{EXPORT_REMEDY}"
    )


def check(file: "GGUFFile", folder: Path) -> None:
    """Raise UserError if the file's tokenizer gives other token ids for PROBE than the one in a Hugging Face folder."""
    found, expected = (tokenizer(PROBE).input_ids for tokenizer in (read(file), load_fast(folder)))
    if found != expected:
        at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(expected))
        raise UserError(
            f"llama.cpp's kinds of tokenizers cannot do what the one in {folder} does (token {at} of a test text differs): "
            f"{EXPORT_REMEDY}"
        )
