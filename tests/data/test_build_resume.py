import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from headway.data import token_cache
from headway.data.cache_staging import staging
from headway.data.encoding import DocumentEncoder
from headway.data.sources import Document
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import byte_tokenizer, train_bpe_tokenizer
from headway.errors import DataError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")


def documents(count=40):
    rng = np.random.default_rng(1)
    return [
        Document(f"{number}", "g", rng.bytes(int(rng.integers(1, 60_000))), prompt_bytes=(number % 2) * 5)
        for number in range(count)
    ]


class Killed(BaseException):
    """Stands for what ends a process at once, where a test must go on."""


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(token_cache, "SAVE_EVERY_BYTES", 100_000)


def build_until(monkeypatch, count, target, error, workers=1):
    """Begin a build and stop it after so many batches."""
    encode = token_cache.encode_in_order

    def stopping(*args, **options):
        for number, batch in enumerate(encode(*args, **options)):
            if number == count:
                raise error
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_in_order", stopping)
        with pytest.raises(type(error)):
            build_token_cache(documents(), byte_tokenizer(), target, workers=workers)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def encoded(monkeypatch):
    """Bytes that were encoded."""
    seen = []
    encode = DocumentEncoder.encode
    monkeypatch.setattr(
        DocumentEncoder,
        "encode",
        lambda self, pieces: seen.append(sum(map(len, pieces))) or encode(self, pieces),
    )
    return seen


def test_an_interrupted_build_goes_on_where_it_was_saved(tmp_path, monkeypatch, encoded):
    whole = build_token_cache(documents(), byte_tokenizer(), tmp_path / "whole")
    build_until(monkeypatch, 1, tmp_path / "cache", KeyboardInterrupt())
    assert entries(tmp_path) == [".cache.partial", "whole"]
    encoded.clear()
    cache = build_token_cache(documents(), byte_tokenizer(), tmp_path / "cache")
    assert sum(encoded) < whole.metadata.num_bytes - 500_000
    assert cache.metadata == whole.metadata
    for name in entries(whole.directory):
        assert (cache.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    assert entries(tmp_path) == ["cache", "whole"]


@pytest.mark.parametrize("change", ["text", "order", "fewer", "tokenizer"])
def test_a_build_of_something_else_begins_anew(tmp_path, monkeypatch, change):
    build_until(monkeypatch, 1, tmp_path / "cache", KeyboardInterrupt())
    texts, tokenizer = documents(), byte_tokenizer()
    if change == "text":
        texts[3] = Document("3", "g", b"other")
    elif change == "order":
        texts[0], texts[1] = texts[1], texts[0]
    elif change == "fewer":
        texts = texts[:2]
    else:
        tokenizer = train_bpe_tokenizer([b"text"], vocabulary_size=258)
    expected = build_token_cache(texts, tokenizer, tmp_path / "expected")
    assert build_token_cache(texts, tokenizer, tmp_path / "cache").metadata == expected.metadata
    assert entries(tmp_path) == ["cache", "expected"]


def test_an_iterator_that_is_read_once_begins_anew(tmp_path, monkeypatch):
    build_until(monkeypatch, 1, tmp_path / "cache", KeyboardInterrupt())
    expected = build_token_cache(documents(), byte_tokenizer(), tmp_path / "expected")
    assert build_token_cache(iter(documents()), byte_tokenizer(), tmp_path / "cache").metadata == expected.metadata
    assert entries(tmp_path) == ["cache", "expected"]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "no progress"])
def test_damaged_progress_is_not_used(tmp_path, monkeypatch, damage):
    build_until(monkeypatch, 1, tmp_path / "cache", KeyboardInterrupt())
    partial = tmp_path / ".cache.partial"
    if damage == "truncate":
        (partial / "tokens.bin").write_bytes(b"x")
    elif damage == "garbage":
        (partial / "progress.json").write_text('{"documents": "many"}')
    else:
        (partial / "progress.json").unlink()
    expected = build_token_cache(documents(), byte_tokenizer(), tmp_path / "expected")
    assert build_token_cache(documents(), byte_tokenizer(), tmp_path / "cache").metadata == expected.metadata


def test_what_an_error_leaves_is_removed(tmp_path, monkeypatch):
    build_until(monkeypatch, 1, tmp_path / "cache", RuntimeError("a bug"))
    build_until(monkeypatch, 1, tmp_path / "cache", DataError("a text"))
    assert entries(tmp_path) == []


def test_a_second_builder_does_not_disturb_the_first(tmp_path):
    with staging(tmp_path / "cache") as first:
        (first.folder / "precious").write_text("x")
        cache = build_token_cache(documents(3), byte_tokenizer(), tmp_path / "cache")
        assert cache.num_documents == 3
        assert entries(tmp_path) == [".cache.partial", "cache"]
        assert (first.folder / "precious").exists()
    assert entries(tmp_path) == ["cache"]


def test_abandoned_folders_are_removed_and_those_in_use_are_not(tmp_path):
    old, new = tmp_path / ".cache.old.partial", tmp_path / ".cache.new.partial"
    for folder in (old, new, tmp_path / ".other.x.partial"):
        folder.mkdir()
    os.utime(old, (time.time() - 10_000, time.time() - 10_000))
    with staging(tmp_path / "cache"), staging(tmp_path / "cache") as second:
        build_token_cache(documents(3), byte_tokenizer(), tmp_path / "cache")
        assert second.folder.is_dir()
        assert not old.exists()
    assert entries(tmp_path) == [".cache.new.partial", ".other.x.partial", "cache"]


KILLED_PROGRAM = """
import sys
import numpy as np
from headway.data import encoding_pool, token_cache
from headway.data.sources import Document
from headway.data.tokenizers import train_bpe_tokenizer

token_cache.SAVE_EVERY_BYTES = 200_000
encoding_pool.POOL_FROM_BYTES = 1 << 20
rng = np.random.default_rng(1)
words = [b"%x " % word for word in rng.integers(0, 5000, 3000)]
bpe = train_bpe_tokenizer([b"".join(words)], vocabulary_size=400)
texts = [Document(str(n), "g", b"".join(words[w] for w in rng.integers(0, 3000, 40_000))) for n in range(40)]
print("ready", flush=True)
cache = token_cache.build_token_cache(texts, bpe, sys.argv[1], workers=int(sys.argv[2]))
print(cache.fingerprint, cache.metadata.tokens_sha256, flush=True)
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_and_leave_nothing(tmp_path):
    def start(name, workers=2):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED_PROGRAM, str(tmp_path / name), str(workers)],
            stdout=subprocess.PIPE,
            text=True,
        )

    with start("whole", workers=1) as process:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        expected = process.stdout.readline()
        seconds = time.monotonic() - began
    rng = random.Random(0)
    for _ in range(3):
        with start("cache") as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.1, 0.7) * seconds)
            process.kill()
    with start("cache") as process:
        process.stdout.readline()
        assert process.stdout.readline() == expected
    assert entries(tmp_path) == ["cache", "whole"]
