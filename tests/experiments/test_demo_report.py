import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from headway.experiments.demo.report import report_page, write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Balance(HTMLParser):
    """Every tag that is opened is closed in order; text, tags and attributes are kept."""

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack[-1:] == [tag], f"</{tag}> closes nothing"
        self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.stack == []
    return parser


def test_the_page_is_well_formed_and_needs_nothing_from_outside(demo_result):
    page = report_page(demo_result)
    parser = parsed(page)
    assert "script" not in parser.tags
    assert not {"img", "link", "iframe", "object"} & set(parser.tags)
    for tag, name, value in parser.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), f"<{tag} {name}={value}> leaves the page"
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_shows_every_figure(demo_result):
    text = "".join(parsed(report_page(demo_result)).text)
    for figure in ("2.20", "1.50x", "2.00x", "2.160", "40.0 %", "identical: yes", "12,345 bytes", "1 min 1 s"):
        assert figure in text, figure
    assert "<wsgiref>" in text
    assert "copy<of>.py" in text
    assert "the standard library of Python <3.11>" in text


def test_every_forward_pass_is_one_coloured_piece(demo_result, comparison):
    page = report_page(replace(demo_result, comparisons=(comparison,)))
    pieces = re.findall(r'<span class="f(\d)" title="([^"]*)">([^<]*)</span>', page)
    fast = pieces[len(comparison.plain.lengths) :]
    assert [title for _, title, _ in fast[:2]] == ["prefill: 1 token", "forward pass 1: 3 tokens"]
    assert "".join(text for _, _, text in fast) == "if x&lt;y:\n  go"
    assert all(left[0] != right[0] for left, right in pairwise(fast))


def test_hostile_text_stays_text(demo_result, hostile_comparison):
    page = report_page(replace(demo_result, comparisons=(hostile_comparison,)))
    parser = parsed(page)
    assert "script" not in parser.tags
    assert not {"\x1b", "\x07", "\x00", "\r"} & set(page)
    assert "identical: no" in "".join(parser.text)


def test_figures_are_valid_svg_in_the_colours_of_the_page(demo_result):
    drawings = re.findall(r"<svg.*?</svg>", report_page(demo_result), flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "currentColor" in drawing
        assert "#010203" not in drawing
    identifiers = re.findall(r'<clipPath id="([^"]+)"', "".join(drawings))
    assert len(identifiers) == len(set(identifiers)), "figures of one page must not share clip paths"


def test_the_page_is_the_same_for_the_same_result(demo_result):
    assert report_page(demo_result) == report_page(demo_result)


def test_no_generated_block_and_no_dropped_file_still_make_a_page(demo_result, comparison):
    short = replace(
        comparison,
        self_speculative=replace(comparison.self_speculative, lengths=(12,), moments=(0.1,), forwards=0),
    )
    page = report_page(replace(demo_result, comparisons=(short,), corpus=replace(demo_result.corpus, dropped=())))
    parsed(page)
    assert page.rstrip().endswith("</html>")


def test_the_json_document_is_strict_json_with_every_figure(demo_result):
    document = json.loads(json.dumps(demo_result.to_json(), allow_nan=False))
    assert document["identical"] is True
    assert document["mean_acceptance_length"] == 2.2
    assert document["speedup_over_plain"] == 1.5
    # 2 tokens per forward made it 1.5 times faster, so 2.2 would make it 1.65 times faster
    assert document["speedup_at_loop_free_acceptance"] == pytest.approx(1.65)
    assert document["plain_over_hugging_face"] == 2.0
    assert document["likelihood"]["nats"] == [1.5, 2.0, 2.25, None]
    assert document["acceptance"]["generated"]["distinct_8grams"] == 0.5
    assert document["prompts"][0]["forwards"] == {"plain": 11, "self-speculative": 5}
    assert document["seconds"]["total"] == 70.0


def test_the_report_is_written_whole(tmp_path, demo_result):
    write_report(demo_result, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().endswith("</html>\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
