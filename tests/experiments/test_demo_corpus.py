from types import SimpleNamespace

import pytest

from headway.data.fingerprint import data_fingerprint
from headway.data.sources import Document
from headway.errors import DataError
from headway.experiments.demo.corpus import DemoCorpus, check_same_text, held_out_prompts, read_corpus
from headway.experiments.demo.options import DemoOptions


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(DemoOptions(quick=True).training_config())


def document(name, group, size):
    line = f"# {name}\n".encode()
    return Document(name=name, group=group, data=line * (size // len(line) + 1))


def test_held_out_packages_are_whole_and_none_of_them_is_trained_on(corpus):
    held_out = {document.group for document in corpus.held_out}
    assert set(corpus.summary.held_out_packages) == held_out
    assert not held_out & {document.group for document in corpus.train}
    assert 0.02 < corpus.summary.held_out_bytes / corpus.summary.train_bytes < 0.1


def test_the_summary_counts_what_is_there(corpus):
    assert corpus.summary.train_documents == len(corpus.train)
    assert corpus.summary.train_bytes == sum(len(document.data) for document in corpus.train)
    dropped = {name for name, _ in corpus.summary.dropped}
    assert not dropped & {document.name for document in corpus.train}
    assert all(overlap > 0.5 for _, overlap in corpus.summary.dropped)


def test_prompts_are_verbatim_held_out_lines_of_different_packages(corpus):
    prompts = held_out_prompts(corpus.held_out, count=4, prompt_bytes=64)
    texts = {document.name: document for document in corpus.held_out}
    assert len({texts[prompt.source].group for prompt in prompts}) == 4
    for prompt in prompts:
        data, text = texts[prompt.source].data, bytes(prompt.tokens)
        assert len(text) == 64
        assert b"\n" + text in data
        assert text.lstrip(b" ").startswith(b"def ")


def test_prompts_are_the_same_every_time(corpus):
    first = held_out_prompts(corpus.held_out, count=4, prompt_bytes=64)
    assert first == held_out_prompts(list(reversed(corpus.held_out)), count=4, prompt_bytes=64)


def test_packages_are_used_again_only_when_all_have_given_a_prompt():
    documents = [
        document("big/a.py", "big", 4000),
        document("big/b.py", "big", 3000),
        document("small.py", "small", 500),
        document("tiny.py", "tiny", 10),
    ]
    prompts = held_out_prompts(documents, count=3, prompt_bytes=40)
    assert [prompt.source for prompt in prompts] == ["big/a.py", "small.py", "big/b.py"]


def test_a_file_without_a_function_gives_a_line_start():
    (prompt,) = held_out_prompts([document("table.py", "table", 500)], count=1, prompt_bytes=40)
    assert bytes(prompt.tokens).startswith(b"# table.py\n")


def test_too_little_held_out_text_is_an_error():
    with pytest.raises(DataError, match="hold out more text"):
        held_out_prompts([document("tiny.py", "tiny", 10)], count=1, prompt_bytes=40)


def test_caches_of_another_text_are_noticed(corpus):
    def cache(documents):
        return SimpleNamespace(metadata=SimpleNamespace(data_fingerprint=data_fingerprint(documents)))

    train, held_out = cache(corpus.train), cache(corpus.held_out)
    check_same_text(corpus, train=train, held_out=held_out)
    changed = DemoCorpus(train=corpus.train[1:], held_out=corpus.held_out, summary=corpus.summary)
    with pytest.raises(DataError, match="train text changed"):
        check_same_text(changed, train=train, held_out=held_out)
    with pytest.raises(DataError, match="held-out text changed"):
        check_same_text(corpus, train=train, held_out=None)
