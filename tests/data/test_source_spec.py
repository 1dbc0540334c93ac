import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.data.source_spec import SourceSpec, parse_source, source_lines
from headway.errors import ConfigError

WORDS = st.text(st.sampled_from("ab,\\=:\n\t é?*"), min_size=1, max_size=8)


def test_a_line_names_a_path_and_its_options():
    spec = parse_source("books.jsonl.xz::field=body,weight=0.5,take=7,name=novels")
    assert spec == SourceSpec(path="books.jsonl.xz", field="body", weight=0.5, take=7, name="novels")
    assert parse_source("notes/**/*.md") == SourceSpec(path="notes/**/*.md")
    assert parse_source({"path": "a.bin", "dtype": "uint16", "weight": 2}).weight == 2.0
    assert parse_source("hf:owner/name::streaming=true,take=10").streaming


@given(path=WORDS, correct=WORDS, name=WORDS, weight=st.none() | st.floats(1e-6, 1e6), streaming=st.booleans())
def test_every_source_is_read_back_from_its_line(path, correct, name, weight, streaming):
    spec = SourceSpec(
        path=f"hf:{path}" if streaming else path,
        prompt="p",
        completion="c",
        correct=correct,
        name=name,
        weight=weight,
        streaming=streaming,
        take=3 if streaming else None,
    )
    assert parse_source(str(spec)) == spec


def test_paths_that_look_like_options_are_paths():
    assert parse_source("C:/texts").path == "C:/texts"
    assert parse_source("a::b").path == "a::b"
    assert parse_source(str(SourceSpec(path="x::field=y"))).path == "x::field=y"


def test_lists_of_lines_and_mappings_become_lists_of_lines():
    assert source_lines(["a", {"path": "b", "weight": 1.0}]) == ["a", "b::weight=1.0"]
    assert source_lines("a") == "a"
    assert source_lines(None) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a::weigth=1", "unknown option 'weigth'.*did you mean 'weight'"),
        ("a::weight=-1", "weight of the source 'a' takes a number above 0: got -1"),
        ("a::weight=much", "takes a number above 0: got 'much'"),
        ("a::take=0", "whole number above 0"),
        ("a::format=xml", "one of auto, text, jsonl"),
        ("a::field=x,field=y", "stands twice"),
        ("a::field=x,y", "written '\\\\,'"),
        ("a::field=x,prompt=p,completion=c", "field for plain text"),
        ("a::prompt=p", "has no completion"),
        ("a::reward=r", "no prompt and completion"),
        ("a::dtype=float32", "no type of whole numbers"),
        ("a::dtype=uint16,format=jsonl", "belongs to raw ids"),
        ("a::streaming=true,take=5", "datasets of the hub"),
        ("hf:a::streaming=true", "say with take how many"),
        ("hf:a::streaming=maybe,take=1", "true or false"),
        ("hf:a::format=text", "drop the format"),
        ("hf:a::shuffle_buffer=1000", "lost when a run is killed.*headway shuffles all rows"),
        ("hf:", "has no path"),
        ("", "has no path"),
        ({"field": "x"}, "needs a path"),
        ({"path": 3}, "takes text: got 3"),
        ({"path": "a", "streaming": 1}, "true or false"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_source(line)


def test_records_are_read_by_the_fields_that_are_named():
    assert SourceSpec(path="a").needed_fields == ("text",)
    assert SourceSpec(path="a", field="x", group="g").needed_fields == ("x", "g")
    examples = SourceSpec(path="a", prompt="p", completion="c", reward="r")
    assert examples.needed_fields == ("p", "c", "r")
    assert examples.is_examples
    assert not dataclasses.replace(examples, prompt=None, completion=None, reward=None).is_examples
