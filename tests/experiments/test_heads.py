"""The comparison of heads: one command, every figure, and it goes on where it was killed."""

import contextlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from headway.cli import main as cli
from headway.errors import ConfigError
from headway.experiments.heads import run as heads_run
from headway.experiments.heads.folder import MARK
from headway.experiments.heads.options import HeadsOptions
from headway.experiments.heads.report import report_page
from headway.experiments.heads.result import HeadsResult, variant_result
from headway.experiments.heads.variants import VARIANTS
from small_runs import write_corpus

CHOSEN = ("plain", "parallel", "anticausal", "sequential")


@dataclass
class Outcome:
    folder: Path
    status: int
    stdout: str
    stderr: str

    @property
    def document(self):
        return json.loads(self.stdout.splitlines()[-1])


def compare(folder, corpus, *arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    variants = [word for name in CHOSEN for word in ("--variant", name)]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = cli.main(
            [
                *("experiments", "heads", "--smoke", "--quiet", "--threads", "1", "--seeds", "0,1"),
                *("--output", str(folder), "--data", str(corpus), *variants, *arguments),
            ]
        )
    return Outcome(folder, status, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, corpus):
    return compare(tmp_path_factory.mktemp("comparison") / "heads", corpus)


@pytest.mark.slow
def test_one_command_trains_decodes_and_measures_every_variant(outcome):
    assert outcome.status == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == 1
    document = outcome.document
    assert [row["name"] for row in document["variants"]] == list(CHOSEN)
    assert document["sound"]
    assert document["seeds"] == [0, 1]
    for row in document["variants"]:
        heads = 0 if row["name"] == "plain" else 2
        assert len(row["nats"]) == heads + 1
        assert all(len(offset["values"]) == 2 for offset in row["nats"])
        assert len(row["acceptance_rate"]) == heads
        assert 1 <= row["acceptance_length"]["mean"] <= heads + 1
        assert row["identical_rows"] + row["near_ties"] == row["lossless_rows"] == 4
        assert row["caches_right"]
        assert row["bytes_drafted"] > row["bytes_plain"] or not heads
        assert row["training_tokens_per_second"] > 0
        assert row["decoding"]["plain"]["tokens_per_second"] > 0
        assert set(row["untrained_nats"]) == ({"start", "copy"} if heads else set())
    assert document["variants"][1]["cached_head_layers"] == 2
    assert document["variants"][2]["untrained_acceptance_length"]["copy"]["mean"] is None
    assert [row["reads_tokens"] for row in document["variants"]] == [False, False, False, True]


@pytest.mark.slow
def test_the_folder_holds_the_page_the_drawings_and_the_figures(outcome):
    page = (outcome.folder / "report.md").read_text()
    for words in ("| parallel |", "| sequential * |", "16 of 16 decoded texts", "parity rule", "![Held-out loss"):
        assert words in page, words
    assert (outcome.folder / "loss.svg").read_text().startswith("<?xml")
    assert "offset 3" in (outcome.folder / "loss.svg").read_text()
    assert "untrained copies" in (outcome.folder / "acceptance.svg").read_text()
    saved = json.loads((outcome.folder / "heads.json").read_text())
    assert saved["variants"] == outcome.document["variants"]
    assert json.loads((outcome.folder / MARK).read_text())["finished"]


@pytest.mark.slow
def test_a_comparison_that_was_killed_trains_only_what_is_missing(outcome, corpus, tmp_path, monkeypatch):
    trained = []
    honest = heads_run.train

    def counted(config, **options):
        if len(trained) == 3 and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
        trained.append((config.heads, config.num_future_tokens, config.seed))
        return honest(config, **options)

    monkeypatch.setattr(heads_run, "train", counted)
    killed = compare(tmp_path / "heads", corpus)
    assert killed.status == 130
    assert killed.stdout == ""
    resumed = compare(tmp_path / "heads", corpus)
    assert resumed.status == 0, resumed.stderr
    assert len(trained) == len(set(trained)) + 2  # parallel and anticausal differ in their wiring only
    assert len(trained) == 8
    for mine, theirs in zip(resumed.document["variants"], outcome.document["variants"], strict=True):
        assert mine["nats"] == theirs["nats"]
        assert mine["acceptance_length"] == theirs["acceptance_length"]


@pytest.mark.slow
def test_a_finished_comparison_is_told_again_without_any_work(outcome, corpus, monkeypatch):
    for name in ("train", "measure_model", "training_speeds", "decoding_speeds"):
        monkeypatch.setattr(heads_run, name, None)
    again = compare(outcome.folder, corpus)
    assert again.status == 0, again.stderr
    assert again.document["variants"] == outcome.document["variants"]


@pytest.mark.slow
def test_another_training_is_refused_in_the_same_folder_and_named(outcome, corpus):
    refused = compare(outcome.folder, corpus, "--steps", "4", "--on-top")
    assert refused.status == 2
    assert "shorten_trunk was True, is False; steps was 3, is 4" in refused.stderr
    assert refused.stdout == ""


def test_a_folder_that_no_comparison_wrote_is_left_alone(tmp_path, corpus):
    (tmp_path / "mine.txt").write_text("mine")
    refused = compare(tmp_path, corpus, "--overwrite")
    assert refused.status == 2
    assert "mine.txt" in refused.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_runs_differ_in_their_heads_and_seed_alone():
    options = HeadsOptions()
    configs = {name: options.training_config(variant, 1).to_dict() for name, variant in VARIANTS.items()}
    for name, config in configs.items():
        different = {key for key, value in config.items() if value != configs["parallel"][key]}
        assert different <= {*VARIANTS[name].fields, "output"}, name
    assert all(config["seed"] == 1 for config in configs.values())
    assert {config["cache_directory"] for config in configs.values()} == {"out/heads/tokens"}


def test_the_variants_are_all_architectures_and_the_plain_model():
    heads = {
        (variant.fields.get("heads", "transformer"), variant.fields.get("wiring")) for variant in VARIANTS.values()
    }
    names = {architecture for architecture, _ in heads}
    assert names == {"transformer", "linear", "replicated_unembedding", "medusa", "hydra", "sequential"}
    assert {wiring for _, wiring in heads} == {None, "causal", "anticausal"}
    assert VARIANTS["plain"].fields["num_future_tokens"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variants": ("paralleled",)}, "choose among plain, parallel"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_options_that_cannot_work_say_why(options, words):
    with pytest.raises(ConfigError, match=words):
        HeadsOptions(**options)


def figures(nats, *, copies, drawn, length=1.5, identical=8, ties=0, right=True):
    walk = {"mean_acceptance_length": length, "acceptance_rate": [0.5]}
    untrained = {
        kind: {"nats": values, "walk": walk, "first_block": {"mean_acceptance_length": 1.1}}
        for kind, values in (("copy", copies), ("start", drawn))
    }
    return {
        "parameters": 100,
        "head_parameters": 20,
        "reads_tokens": False,
        "base_layers": 3,
        "held_out": {"nats": nats, "accuracy": [0.5, 0.4], "walk": walk, "first_block": walk},
        "untrained_heads": untrained,
        "bytes_per_step": {"plain": {"total": 400}, "drafted": {"total": 600}},
        "lossless": {"rows": 8, "identical_rows": identical, "near_ties": ties},
        "caches": {"relative": 1e-9, "head_layers": 1, "right": right},
    }


def row(*runs):
    decoding = {
        "plain": {"tokens_per_second": 100.0},
        "self_speculative": {"tokens_per_second": 120.0},
        "forward_cost": 1.25,
    }
    return variant_result(VARIANTS["parallel"], runs, training_speed=1000.0, decoding=decoding)


def whole(*rows):
    training = {"steps": 2, "batch_size": 1, "gradient_accumulation_steps": 1, "sequence_length": 8, "data": ["x"]}
    training |= {"hidden_size": 4, "num_layers": 2, "shorten_trunk": True}
    return HeadsResult(
        variants=rows,
        seeds=(0, 1),
        settings={"training": training, "evaluation": {"context_tokens": 4, "block_prompts": 2}},
        held_out_tokens=16,
        seconds={},
        provenance={"machine": {"cpu": "some", "threads": 2}},
        commits={},
    )


def test_a_row_tells_means_spread_and_the_smallest_margin_over_the_better_control():
    found = row(
        figures([2.0, 2.5], copies=[2.0, 3.5], drawn=[2.0, 4.0], length=1.5),
        figures([2.2, 2.7], copies=[2.2, 3.9], drawn=[2.2, 3.1], length=1.7),
    )
    assert found.nats[1].mean == pytest.approx(2.6)
    assert found.nats[1].deviation == pytest.approx(math.sqrt(0.02))
    assert (found.nats[1].low, found.nats[1].high) == (2.5, 2.7)
    # Seed 0: 3.5 - 2.5; seed 1: 3.1 - 2.7. Offset 1 has no control.
    assert found.margin_over_untrained == pytest.approx(0.4)
    assert found.speedup_at_loop_free_acceptance == pytest.approx(1.6 / 1.25)
    assert found.lossless
    assert whole(found).sound
    assert whole(found).beats_untrained


def test_what_went_wrong_is_said():
    lossy = row(figures([2.0, 2.5], copies=[2.0, 3.5], drawn=[2.0, 4.0], identical=7))
    tied = row(figures([2.0, 2.5], copies=[2.0, 3.5], drawn=[2.0, 4.0], identical=7, ties=1))
    wrong = row(figures([2.0, 2.5], copies=[2.0, 3.5], drawn=[2.0, 4.0], right=False))
    useless = row(figures([2.0, 2.5], copies=[2.0, 2.4], drawn=[2.0, 4.0]))
    assert not whole(lossy).sound
    assert whole(tied).sound
    assert not whole(wrong).sound
    assert whole(useless).sound
    assert not whole(useless).beats_untrained
    assert "CACHES ARE WRONG" in report_page(whole(wrong))
    assert "7 of 8 decoded texts" in report_page(whole(lossy))
    assert "1 part at a near-tie" in report_page(whole(tied))
