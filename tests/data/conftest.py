import pytest

from headway.data.sources import Document
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def byte_cache(tmp_path, tokenizer):
    """Builds a byte cache from texts; each call in a folder of its own."""
    count = 0

    def build(*texts):
        nonlocal count
        count += 1
        documents = [Document(f"{number}", f"{number}", text) for number, text in enumerate(texts)]
        return build_token_cache(documents, tokenizer, tmp_path / f"cache-{count}")

    return build
