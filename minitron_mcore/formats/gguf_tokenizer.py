"""Conversion of the tokenizer in a GGUF file to a transformers tokenizer.

transformers 5.17 converts most of them incorrectly: it ignores the pre-tokenizer, swaps BOS and EOS, and decodes U+2581 as a
space in vocabularies without that convention.
"""

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from minitron_mcore.errors import UserError

if TYPE_CHECKING:
    from minitron_mcore.formats.gguf_file import GGUFFile

CONTROL, USER, BYTE = 3, 4, 6  # values of tokenizer.ggml.token_type
REMEDY = "give the model's Hugging Face config and tokenizer (model.hf=/path/to/folder) beside model.weights=/path/to/file.gguf."
GPT4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt4_split(number: str) -> list[Any]:
    """GPT-4's split; `number` is the regular expression's quantifier of digits."""
    return [
        pre_tokenizers.Split(Regex(GPT4_SPLIT.replace("NUMBER", number)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": _gpt4_split("{1,3}"),
    "qwen2": _gpt4_split(""),
}
"""tokenizer.ggml.pre -> pre-tokenizers, which split the text before byte pairs are merged within each part."""


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
    if add_bos or (add_bos is None and (kind == "llama" or pre == "llama-bpe")):
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
    # Llama 3's vocabulary has tokens that no sequence of merges produces.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
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
