"""Tokenizers: plain bytes, BPE trained here, ids of any modality, or any of Hugging Face's.

Text enters training as bytes and special tokens enter as ids: a document that spells out `<|endoftext|>` is encoded as
those thirteen characters, never as the end of a document (`headway.data.encoding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike, fspath

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from headway.data.hub_names import why_not_there
from headway.data.pieces import MAX_PIECE_BYTES as MAX_PIECE_BYTES
from headway.data.pieces import split_into_pieces as split_into_pieces
from headway.errors import ConfigError, DataError

BYTE_EOS_ID = 256
BYTE_PAD_ID = 257
BYTE_VOCABULARY_SIZE = 258
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
BYTES = "bytes"
"""The name under which `load_tokenizer` gives the byte tokenizer."""
INTEGERS = "integers:"
"""Followed by a number, the name under which `load_tokenizer` gives a tokenizer of so many ids."""


def _byte_symbols() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


_BYTE_SYMBOLS = _byte_symbols()


def _as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        # a decoder-only model continues at the right end, and takes no token types
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer whose ids 0..255 are the bytes, 256 is `<|endoftext|>` (eos and bos) and 257 `<|pad|>`.

    A byte-level BPE model without merges: `save_pretrained` and `AutoTokenizer.from_pretrained` round-trip it with no
    remote code. Decoding gives back every valid UTF-8 text exactly; ids that are not valid UTF-8 decode with the
    replacement character, see `decode_bytes`.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer("caf\u00e9")["input_ids"]
    [99, 97, 102, 195, 169]
    >>> tokenizer.decode([99, 97, 102, 195, 169])
    'caf\u00e9'
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(_BYTE_SYMBOLS)}
    vocabulary |= {END_OF_TEXT: BYTE_EOS_ID, PADDING: BYTE_PAD_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _as_pretrained(tokenizer)


def integer_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of ids that stand for no text: "17" is the id 17; end-of-text and padding are the two ids above.

    For raw ids of any modality (codes of images, sound, molecules): a text is numbers between blanks.

    >>> tokenizer = integer_tokenizer(1024)
    >>> tokenizer("17 1023")["input_ids"], tokenizer.decode([17, 1023]), tokenizer.eos_token_id
    ([17, 1023], '17 1023', 1024)

    Args:
        vocabulary_size: ids without the two special ones, at least 1.

    Raises:
        ConfigError: vocabulary_size < 1.
    """
    if vocabulary_size < 1:
        raise ConfigError(f"a vocabulary of ids has at least 1: got {vocabulary_size}; pass for example integers:1024")
    vocabulary = {str(number): number for number in range(vocabulary_size)}
    vocabulary |= {END_OF_TEXT: vocabulary_size, PADDING: vocabulary_size + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=PADDING))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return _as_pretrained(tokenizer)


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids 0..255 are the bytes and nothing but two special tokens follows (so that no merge can exist)."""
    return len(tokenizer) == BYTE_VOCABULARY_SIZE and tuple(
        tokenizer.convert_ids_to_tokens([*range(BYTE_VOCABULARY_SIZE)])
    ) == (*_BYTE_SYMBOLS, END_OF_TEXT, PADDING)


def encode_bytes(data: bytes) -> npt.NDArray[np.uint16]:
    r"""Byte ids, one per byte, for any bytes at all; equal to `byte_tokenizer()` on text without special tokens.

    >>> encode_bytes(b"a\xff").tolist()
    [97, 255]
    """
    return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)


def decode_bytes(token_ids: Iterable[int]) -> str:
    """The text of byte ids, as `bytes.decode("utf-8", errors="replace")` gives it.

    Bytes that are not UTF-8 (a window cut inside a character, a model's mistake) become U+FFFD and cannot be encoded
    back; end-of-text and padding ids are left out.

    >>> decode_bytes([97, 255, 98, 256])
    'a\ufffdb'

    Raises:
        DataError: an id outside 0..257.
    """
    ids = [int(token) for token in token_ids]
    if any(not 0 <= token < BYTE_VOCABULARY_SIZE for token in ids):
        raise DataError(
            f"byte ids must be in 0..{BYTE_VOCABULARY_SIZE - 1}: got {min(ids)}..{max(ids)}; "
            f"decode ids of another tokenizer with that tokenizer"
        )
    return bytes(token for token in ids if token < BYTE_EOS_ID).decode("utf-8", errors="replace")


def load_tokenizer(name_or_path: str | PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer called "bytes" or "integers:N", or the one of a folder or of a Hugging Face hub name.

    A folder that declares no class of its own is read from its `tokenizer.json` alone. `AutoTokenizer` may replace that
    with the class registered for the model type of a `config.json` in the same folder: beside a qwen2 model any
    tokenizer gets an NFC normaliser and another word split (transformers 5.23), and text no longer round-trips.

    Args:
        name_or_path: "bytes" is always the byte tokenizer and "integers:N" the one of N ids; write "./bytes" for a
            folder of that name.
        trust_remote_code: run the tokenizer code that the folder or repository brings along.

    Raises:
        DataError: nothing there that transformers can load.
    """
    if name_or_path == BYTES:
        return byte_tokenizer()
    name = fspath(name_or_path)
    if name.startswith(INTEGERS):
        count = name.removeprefix(INTEGERS)
        if not count.isdecimal():
            raise ConfigError(
                f"{INTEGERS} is followed by a number of ids: got {name!r}; pass for example integers:1024"
            )
        return integer_tokenizer(int(count))
    missing = why_not_there(name)
    if missing is not None:
        raise DataError(
            f"no tokenizer could be loaded from {name!r} ({missing}); pass 'bytes', a folder with tokenizer.json, "
            f"or the name of a Hugging Face repository that this machine can reach"
        )
    try:
        declared = get_tokenizer_config(name)
        generic = declared.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        if generic and "auto_map" not in declared:
            return PreTrainedTokenizerFast.from_pretrained(name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise a different type for each way a folder is broken
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"no tokenizer could be loaded from {name!r} ({reason}); pass 'bytes', a folder with tokenizer.json, "
            f"or the name of a Hugging Face repository that this machine can reach"
        ) from error


def train_bpe_tokenizer(documents: Iterable[bytes], *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from documents; the same documents give the same tokenizer.

    Ids 0 and 1 are `<|endoftext|>` (eos and bos) and `<|pad|>`; every byte has a token, so any valid UTF-8 text
    round-trips. Bytes that are not UTF-8 are learned as U+FFFD.

    Args:
        documents: raw bytes of each document.
        vocabulary_size: tokens, special ones included; at least 258. Text too short for that many merges gives fewer.

    Raises:
        ConfigError: vocabulary_size < 258.
        DataError: no text to learn from.
    """
    if vocabulary_size < BYTE_VOCABULARY_SIZE:
        raise ConfigError(
            f"vocabulary_size must be at least {BYTE_VOCABULARY_SIZE} (256 bytes and 2 special tokens): "
            f"got {vocabulary_size}; raise it, or use the tokenizer {BYTES!r}"
        )
    texts = _texts(documents)
    first = next(texts, None)
    if first is None:
        raise DataError("a BPE tokenizer cannot be learned from no text; pass documents that are not empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=list(_BYTE_SYMBOLS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chained(first, texts), trainer)
    return _as_pretrained(tokenizer)


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    for data in documents:
        for piece in split_into_pieces(data):
            yield piece.decode("utf-8", errors="replace")


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every id of the tokenizer: the largest id + 1 (ids may have gaps)."""
    return int(max(tokenizer.get_vocab().values())) + 1
