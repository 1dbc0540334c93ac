"""Fingerprints of text and of tokenizers: equal exactly when training would see the same ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from headway.data.document import Document


class DataDigest:
    """SHA-256 over the names and contents of documents, in order.

    The content enters by its own SHA-256, so that documents whose digest is known need not be read again.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Take in the next document."""
        self.add_parts(document, num_bytes=document.num_bytes, sha256=document.sha256())

    def add_parts(self, document: Document, *, num_bytes: int, sha256: bytes) -> None:
        """Take in the next document, of which length and digest of the content are known."""
        name = document.name.encode(errors="surrogatepass")
        # lengths go in first, so that no two lists of documents read the same
        kind = b"tokens" if document.is_tokens else b"text"
        self._sha256.update(b"%d %d %d %s\n" % (len(name), num_bytes, document.prompt_bytes, kind))
        self._sha256.update(name)
        self._sha256.update(sha256)

    def hexdigest(self) -> str:
        """The fingerprint of the documents so far."""
        return self._sha256.hexdigest()


def data_fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the names and contents of documents, in order."""
    digest = DataDigest()
    for document in documents:
        digest.add(document)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which ids a text gets, the end-of-sequence id included.

    Equal before and after saving and loading. For tokenizers without a `tokenizers` backend it covers the class, the
    vocabulary and the ids of a probe text.
    """
    content: dict[str, Any]
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # how the last caller asked for truncation and padding is not part of the tokenizer
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        probe = tokenizer("The naive caf\u00e9\n\tx+=1 \u4f60\u597d", add_special_tokens=False)["input_ids"]
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "probe": list(probe)}
    canonical = json.dumps([content, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
