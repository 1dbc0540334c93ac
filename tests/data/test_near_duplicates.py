import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.data import near_duplicates
from headway.data.near_duplicates import drop_near_duplicates
from headway.data.sources import Document
from headway.errors import ConfigError


def document(text, name="a"):
    return Document(name, name, text.encode())


def numbered(start, stop):
    return " ".join(f"w{number}" for number in range(start, stop))


def overlap_by_definition(text, held_out, ngram):
    def grams(words):
        width = min(ngram, len(words))
        return {tuple(words[place : place + width]) for place in range(len(words) - width + 1)} if words else set()

    own = grams(text.split())
    known = set().union(*(grams(other.split()) for other in held_out))
    return len(own & known) / len(own) if own else 0.0


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12).map(" ".join)


@given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=3), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.5]))
def test_overlap_is_the_share_of_own_distinct_ngrams(train, held_out, ngram, max_overlap):
    report = drop_near_duplicates(
        [document(text, f"{number}") for number, text in enumerate(train)],
        [document(text) for text in held_out],
        ngram=ngram,
        max_overlap=max_overlap,
    )
    overlaps = {f"{number}": overlap_by_definition(text, held_out, ngram) for number, text in enumerate(train)}
    assert dict(report.dropped) == {name: share for name, share in overlaps.items() if share > max_overlap}
    assert [kept.name for kept in report.kept] == [name for name, share in overlaps.items() if share <= max_overlap]


def test_a_copy_with_other_whitespace_is_dropped_and_a_quotation_is_kept():
    held_out = document(numbered(0, 100), "held")
    copy = document(numbered(0, 100).replace(" ", "\n\t "), "copy")
    longer_copy = document(numbered(0, 100) + " " + numbered(200, 280), "longer")
    quotation = document(numbered(200, 400) + " " + numbered(10, 40), "quotation")
    report = drop_near_duplicates([copy, longer_copy, quotation], [held_out])
    assert [kept.name for kept in report.kept] == ["quotation"]
    assert report.dropped == (("copy", 1.0), ("longer", 88 / 168))
    assert report.describe() == (
        "2 training documents dropped as near-duplicates of held-out text ('copy' 100 %, 'longer' 52 %)"
    )


def test_a_long_text_is_read_in_blocks_to_the_same_end(monkeypatch):
    texts = [document(numbered(0, 90) + " " + numbered(0, count), f"{count}") for count in (1, 20, 21, 75)]
    held_out = [document(numbered(30, 80) + " " + numbered(0, 40))]
    whole = drop_near_duplicates(texts, held_out, max_overlap=0.0)
    for block in (1, 13, 14, 30):
        monkeypatch.setattr(near_duplicates, "_WORDS_PER_BLOCK", block)
        assert drop_near_duplicates(texts, held_out, max_overlap=0.0).dropped == whole.dropped
    assert len(whole.dropped) == 4


def test_short_documents_are_compared_whole():
    held_out = [document("one two three"), document(numbered(0, 50))]
    same, part, inside = document("one  two three\n", "same"), document("one two", "part"), document("w3 w4", "inside")
    report = drop_near_duplicates([same, part, inside], held_out)
    assert report.dropped == (("same", 1.0),)


def test_nothing_held_out_drops_nothing_and_strange_bytes_are_words():
    strange = Document("s", "s", b"\xff\x00 \xfe " * 20)
    assert drop_near_duplicates([strange, document("", "empty")], []).kept == [strange, document("", "empty")]
    assert drop_near_duplicates([strange], [strange]).dropped == (("s", 1.0),)


@pytest.mark.parametrize("options", [{"ngram": 0}, {"max_overlap": 1.5}, {"max_overlap": -0.1}])
def test_senseless_limits_are_refused(options):
    with pytest.raises(ConfigError, match=r"the usual are 13 and 0\.5"):
        drop_near_duplicates([], [], **options)
