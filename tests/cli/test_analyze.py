"""`headway analyze` on a tiny byte model: the text in shades, the table, the page and one JSON document."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig

from headway.cli import main as cli
from headway.data.tokenizers import byte_tokenizer
from headway.evaluation.information import PairTerms, TextInformation
from headway.experiments.analysis.page import analysis_page
from headway.experiments.analysis.shading import MEASURE_NAMES, measures, shaded_text, strengths
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM

TEXT = 'def f(a):\n    return "<b>caf\u00e9</b>"\n'


@pytest.fixture(scope="module", params=[1, 2], ids=["plain", "two-tokens"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("models") / f"n{request.param}"
    MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=request.param)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_the_text_the_sums_the_page_and_one_document(folder, tmp_path, capsys):
    text, page = tmp_path / "text.py", tmp_path / "pages" / "text.html"
    text.write_text(TEXT)
    status = cli.main(["analyze", str(folder), "--file", str(text), "--html", str(page), "--choice-share", "0.2"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert len(out.splitlines()) == 1
    document = json.loads(out)
    positions = len(TEXT.encode()) - 2
    assert document["positions"] == positions == len(document["belief"]["mutual_information"])
    assert document["exact"]
    assert len(document["choice_points"]) == round(0.2 * positions + 0.499)
    means = document["means"]["observed"]
    whole = means["entropy_x_given_y"] + 2 * means["mutual_information"] + means["entropy_y_given_x"]
    assert means["entropy_x"] + means["entropy_y"] == pytest.approx(whole, abs=1e-9)
    heads = folder.name == "n2"
    assert (document["second_head"] is not None) == heads
    assert ("head 2" in err) == heads
    for words in ("all 258: exact", "I(X;Y)", "Strongest choice points", f"{positions} positions"):
        assert words in err, words
    shown = re.sub(r"[\[\]]", "", err)
    assert 'return "<b>caf\u00e9</b>"' in shown
    # A character of several bytes is shown, and marked, as its last one.
    shown_whole = TEXT.encode().index("\u00e9".encode()) - 1
    marked = [point for point in document["choice_points"] if point != shown_whole]
    assert page.read_text().count("class='t c'") == len(marked)


def test_long_texts_are_cut_and_few_candidates_are_said(folder, capsys):
    arguments = ["analyze", str(folder), "a" * 40, "--max-tokens", "12", "--candidates", "9", "--context-tokens", "8"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["positions"] == 10
    assert not document["exact"]
    assert "the first 12 of 40 tokens" in err
    assert "9 of 258" in err
    assert "% of the probability left out" in err


def test_what_cannot_be_done_is_one_line_and_status_2(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    cases = [
        (["--html", str(page)], "--overwrite"),
        (["--context-tokens", "4096"], "at most the model's longest context, 128"),
    ]
    if folder.name == "n1":
        cases.append((["--by", "head"], "has no heads to shade by"))
    for arguments, words in cases:
        assert cli.main(["analyze", str(folder), "some text", *arguments]) == 2
        out, err = capsys.readouterr()
        assert words in err
        assert (out, len(err.splitlines())) == ("", 1)
    assert page.read_text() == "mine"
    assert cli.main(["analyze", str(folder), "ab"]) == 2
    assert "3 tokens or more" in capsys.readouterr().err


def information(values, *, surprise=None):
    same = dict.fromkeys(("entropy_x", "entropy_y", "entropy_x_given_y", "entropy_y_given_x"), tuple(values))
    return TextInformation(
        tokens=(0,) * (len(values) + 2),
        candidates=3,
        vocabulary_size=3,
        belief=PairTerms(**same, mutual_information=tuple(values)),
        observed=PairTerms(**(same | {"entropy_x": tuple(surprise or values)}), mutual_information=tuple(values)),
        value_deviation=tuple(values),
        left_out=(0.0,) * len(values),
        second_head=None,
    )


def test_a_terminal_shades_tokens_and_underlines_choice_points():
    result = information([0.0, 1.0, 0.4])
    measure = measures(result)[0]
    text = shaded_text(["a", "b", "c\n", "d", "e"], measure, [1], colours=True)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert text.plain == "abc \nde"
    assert "b" not in styles
    assert styles["c \n"] == "white on #1e3a8a bold underline"
    assert styles["d"] == "black on #93c5fd"
    plain = shaded_text(["a", "b", "c\n", "d", "e"], measure, [1], colours=False)
    assert plain.plain == "ab[c\n]de"


def test_strengths_ignore_the_few_largest_and_survive_infinities_and_silence():
    assert strengths([0.0, 0.0]) == [0.0, 0.0]
    assert strengths([float("inf"), 1.0, 0.5]) == [1.0, 1.0, 0.5]
    many = [1.0] * 99 + [50.0]
    assert strengths(many)[:99] == [1.0] * 99


def test_the_page_holds_nothing_that_a_text_could_break():
    result = information([0.5, 0.2, 0.9], surprise=[0.5, float("inf"), 0.1])
    pieces = ["<", "<script>", "'\"", "&amp;", "</pre>"]
    origin = {"versions": {"headway": "1"}, "date": "today"}
    page = analysis_page(result, pieces, model="<model>", share=0.4, provenance=origin)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;model&gt;" in page
    assert page.count("</pre>") == 1
    assert page.count("type='radio'") == len(MEASURE_NAMES) - 1
    assert page.count("class='t c'") == 2
    assert "http" not in page.replace("http-equiv", "")
