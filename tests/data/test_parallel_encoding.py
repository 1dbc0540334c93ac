import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from headway.data import encoding_pool
from headway.data.encoding import DocumentEncoder, Piece
from headway.data.encoding_pool import encode_in_order
from headway.data.sources import Document
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import byte_tokenizer, train_bpe_tokenizer
from headway.errors import DataError

WORDS = [b"def ", b"function", b"(value)", b":\n", b"    return ", b"caf\xc3\xa9 ", b"\xff", b"<|endoftext|>"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer([b"".join(WORDS[:6]) * 50], vocabulary_size=300)


def documents(count=60, size=4000):
    rng = np.random.default_rng(0)
    for number in range(count):
        text = b"".join(WORDS[word] for word in rng.integers(0, len(WORDS), int(rng.integers(0, size))))
        yield Document(f"{number}", "g", text, prompt_bytes=len(text) // 3 if number % 3 == 0 else 0)
    yield Document("ids", "g", np.arange(200, dtype="<u4").tobytes(), is_tokens=True)
    yield Document("long", "g", b"word " * 500_000)


@pytest.fixture(autouse=True)
def pool_at_once(monkeypatch):
    monkeypatch.setattr(encoding_pool, "POOL_FROM_BYTES", 1)


def test_any_number_of_workers_gives_the_same_cache(tmp_path, bpe):
    built = [build_token_cache(documents(), bpe, tmp_path / f"{workers}", workers=workers) for workers in (0, 1, 2, 3)]
    assert len({cache.metadata for cache in built}) == 1
    for name in ("tokens.bin", "documents.npy", "prompts.npy", "metadata.json"):
        assert len({(cache.directory / name).read_bytes() for cache in built}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


def test_a_tokenizer_without_a_rust_backend_is_sent_whole(tmp_path):
    slow = ByT5Tokenizer()
    texts = [Document(f"{number}", "g", b"text %d " % number * 2000) for number in range(150)]
    one, two = (build_token_cache(texts, slow, tmp_path / f"{workers}", workers=workers) for workers in (1, 2))
    assert one.metadata == two.metadata


def test_small_texts_and_bytes_start_no_process(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(encoding_pool, "_EncoderPool", lambda *_: pytest.fail("started"))
    build_token_cache(documents(), byte_tokenizer(), tmp_path / "bytes", workers=4)
    monkeypatch.setattr(encoding_pool, "POOL_FROM_BYTES", 1 << 30)
    build_token_cache(documents(), bpe, tmp_path / "small", workers=4)


def test_batches_are_read_only_a_few_ahead(bpe):
    read = 0

    def batches():
        nonlocal read
        for _ in range(40):
            read += 1
            yield [Piece(b"text", ends_document=True)]

    encoded = encode_in_order(batches(), DocumentEncoder(bpe), workers=2)
    for given, _ in enumerate(encoded, start=1):
        assert read - given <= 6
    assert read == given == 40


def test_a_worker_that_is_killed_is_one_clear_error_and_leaves_nothing(tmp_path, bpe, monkeypatch):
    started = []
    start = encoding_pool._EncoderPool._start

    def remembered(pool):
        started.append(start(pool))
        return started[-1]

    monkeypatch.setattr(encoding_pool._EncoderPool, "_start", remembered)

    def killing():
        for number, document in enumerate(itertools.chain(documents(), documents(), documents())):
            if number == 70:
                for process in started:
                    os.kill(process.pid, signal.SIGKILL)
            yield document

    with pytest.raises(DataError, match=r"worker process that encodes text ended .*fewer workers"):
        build_token_cache(killing(), bpe, tmp_path / "cache", workers=2)
    assert [*tmp_path.iterdir()] == []
    assert all(process.poll() is not None for process in started)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoding")]


def test_workers_end_with_the_process_that_started_them(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from headway.data import encoding_pool\n"
        "from headway.data.encoding import DocumentEncoder\n"
        "from headway.data.tokenizers import train_bpe_tokenizer\n"
        "pool = encoding_pool._EncoderPool(DocumentEncoder(train_bpe_tokenizer([b'ab'], vocabulary_size=258)), 2)\n"
        "[pool.submit([b'text']).result() for _ in range(4)]\n"
        "print(*(process.pid for process in pool._processes), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    for _ in range(200):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.05)
    pytest.fail("workers outlive their process")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - a pseudo file
            return file.read().split()[2] != "Z"
    except OSError:
        return False


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from headway.data import encoding_pool\n"
        "from headway.data.sources import Document\n"
        "from headway.data.token_cache import build_token_cache\n"
        "from headway.data.tokenizers import train_bpe_tokenizer\n"
        "encoding_pool.POOL_FROM_BYTES = 1\n"
        "print('once')\n"
        "texts = [Document(str(n), 'g', b'word ' * 300_000) for n in range(4)]\n"
        "bpe = train_bpe_tokenizer([b'word'], vocabulary_size=258)\n"
        "print(build_token_cache(texts, bpe, sys.argv[1], workers=2).num_documents)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cache")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["once", "4"]
    assert done.stderr == ""
