import pytest

from headway.data.collect import collect, open_sources
from headway.data.formats.token_file import TokenRules
from headway.data.source_spec import parse_source
from headway.data.sources import Document
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import byte_tokenizer

BYTE_RULES = TokenRules(end_token_id=256, vocabulary_size=258)


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


@pytest.fixture
def gather(tmp_path):
    """Collects sources given as lines: the collection and the reports."""

    def gathered(*lines, suffixes=None, rules=BYTE_RULES):
        sources = open_sources(
            [parse_source(line) for line in lines],
            token_rules=rules,
            stream_directory=tmp_path / "streams",
            suffixes=suffixes,
        )
        return collect(sources), [source.report for source in sources]

    return gathered
