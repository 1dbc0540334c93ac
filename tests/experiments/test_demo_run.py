import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from headway.cli import main as cli
from headway.experiments.demo import run as demo_run
from headway.experiments.demo.folder import MARK
from headway.model.multi_token_lm import MultiTokenLM

pytestmark = pytest.mark.slow


@dataclass
class Outcome:
    folder: Path
    status: int
    stdout: str
    stderr: str


def run_demo_command(folder, *arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = cli.main(["demo", "--quick", "--output", str(folder), "--steps", "8", *arguments])
    return Outcome(folder, status, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run_demo_command(tmp_path_factory.mktemp("quick") / "demo")


@pytest.fixture
def document(outcome):
    return json.loads(outcome.stdout.splitlines()[-1])


def test_the_demo_ends_well_and_stdout_is_one_json_document(outcome, document):
    assert outcome.status == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == 1
    assert document["identical"] is True


def test_the_document_holds_every_figure(document):
    assert len(document["likelihood"]["nats"]) == 4
    assert len(document["likelihood"]["bits_per_byte"]) == 4
    assert len(document["likelihood"]["accuracy"]) == 4
    assert 1 <= document["mean_acceptance_length"] <= 4
    assert len(document["acceptance"]["held_out"]["acceptance_rate"]) == 3
    assert 0 < document["acceptance"]["generated"]["distinct_8grams"] <= 1
    assert [arm["name"] for arm in document["speed"]["arms"]] == ["plain", "self-speculative", "hugging-face"]
    assert document["speedup_over_plain"] > 0
    assert document["speed"]["identical"] is True
    assert document["training"]["steps"] == 8
    assert document["training"]["curve"][-1]["step"] == 8
    assert document["corpus"]["held_out_packages"]
    assert document["provenance"]["versions"]["torch"] == torch.__version__
    parts = {name: seconds for name, seconds in document["seconds"].items() if name != "total"}
    assert sum(parts.values()) <= document["seconds"]["total"]


def test_a_person_sees_the_text_the_verdict_the_tables_and_the_report(outcome):
    for words in (
        "step 8/8",
        "self-speculative decoding",
        "identical: yes",
        "tokens per forward",
        "bits per byte",
        "loop-free",
        "distinct 8-grams",
        "Time of each part",
        "report.html",
    ):
        assert words in outcome.stderr, words


def test_the_folder_holds_the_report_the_figures_and_a_model_that_loads(outcome, document):
    assert (outcome.folder / "report.html").read_text().startswith("<!doctype html>")
    saved = json.loads((outcome.folder / "result.json").read_text())
    assert saved["likelihood"] == document["likelihood"]
    assert json.loads((outcome.folder / MARK).read_text()) == {"finished": True}
    model = MultiTokenLM.from_pretrained(outcome.folder / "training" / "model")
    assert model.num_future_tokens == 4


def test_a_demo_in_a_named_folder_is_replaced_only_when_asked(outcome):
    refused = run_demo_command(outcome.folder)
    assert refused.status == 2
    assert "--overwrite" in refused.stderr
    assert refused.stdout == ""
    assert (outcome.folder / "report.html").exists()


def test_texts_that_differ_end_in_a_no_and_a_failing_status(tmp_path, monkeypatch):
    honest = demo_run.compare_prompt

    def tampered(*arguments, **options):
        comparison = honest(*arguments, **options)
        tokens = comparison.self_speculative.tokens
        wrong = replace(comparison.self_speculative, tokens=(*tokens[:-1], (tokens[-1] + 1) % 256))
        return replace(comparison, self_speculative=wrong)

    monkeypatch.setattr(demo_run, "compare_prompt", tampered)
    outcome = run_demo_command(tmp_path / "demo")
    assert outcome.status == 1
    assert "identical: no" in outcome.stderr
    assert json.loads(outcome.stdout.splitlines()[-1])["identical"] is False
    assert "identical: " in (tmp_path / "demo" / "report.html").read_text()
