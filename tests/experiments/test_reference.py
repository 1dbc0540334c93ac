"""The reference model: the committed folder keeps its promises, and a run becomes such a folder."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch

from headway.data.tokenizers import load_tokenizer
from headway.errors import CheckpointError, ConfigError, DataError
from headway.experiments.bench.prompts import BenchPrompts
from headway.experiments.reference import publish as publishing
from headway.experiments.reference.corpora import MeasuredText, named_text, pieces
from headway.experiments.reference.measure import Amounts, Measured, parts
from headway.experiments.reference.pages import PAGE, card, page, results_of, write_pages
from headway.experiments.reference.place import FOLDER, RECORD, checkout, reference_prompts, reference_record
from headway.experiments.reference.publish import MOST_BYTES, publish
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance
from tiny_models import tiny_base

MODEL = checkout() / FOLDER
SIDE = {"documents": 1, "bytes": 100, "token_fingerprint": "0" * 64}
DATA = {
    "source": "a text",
    "train": SIDE,
    "held_out": SIDE,
    "held_out_packages": ["b"],
    "near_duplicates_dropped": 0,
}
LEAST_ACCEPTANCE = 1.8
"""Tokens per forward on held-out functions; an untrained model of the same shape has 1.0 to 1.2."""

committed = pytest.mark.skipif(
    not (MODEL / RECORD).is_file(),
    reason="reference/model is not in this checkout: the package alone has no reference model",
)


@pytest.fixture(scope="module")
def reference() -> MultiTokenLM:
    return MultiTokenLM.from_pretrained(MODEL).eval()


def tiny_plain() -> MultiTokenLM:
    """A plain model of bytes."""
    return attach_heads(tiny_base("llama", vocab_size=258), MultiTokenConfig(num_future_tokens=1)).eval()


@committed
def test_its_files_are_those_of_its_record_and_small():
    record = reference_record(MODEL)
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in MODEL.rglob("*.safetensors")) == record["stored"]["bytes"] <= MOST_BYTES
    assert record["finished"] is True


@committed
def test_it_is_stored_in_bfloat16_and_computes_in_float32(reference):
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.float32}
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in reference.parameters())
    assert reference.num_parameters() == reference_record(MODEL)["parameters"]["all"]


@committed
@pytest.mark.parametrize("executor", ["eager", "lean"])
def test_held_out_functions_are_continued_identically_in_far_fewer_forwards(reference, executor: str):
    tokenizer = load_tokenizer(MODEL)
    prompts = reference_prompts(MODEL, count=4, prompt_bytes=96)
    ids = torch.tensor([prompt.tokens for prompt in prompts])
    options = {"max_new_tokens": 48, "do_sample": False, "executor": executor, "pad_token_id": tokenizer.pad_token_id}
    plain = reference.generate(ids, num_draft_tokens=0, **options)
    drafted = reference.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(drafted.sequences, plain)
    assert drafted.acceptance.mean_acceptance_length > LEAST_ACCEPTANCE


@committed
def test_sampled_text_is_the_same_with_and_without_drafts(reference):
    ids = torch.tensor([reference_prompts(MODEL, count=1, prompt_bytes=96)[0].tokens])
    options = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.8, "top_k": 0, "seed": 7}
    plain = reference.generate(ids, num_draft_tokens=0, **options)
    drafted = reference.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(drafted.sequences, plain)
    assert drafted.acceptance.mean_acceptance_length > 1.2


# Publishing


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of a few steps, its data a stand-in for the library."""
    from headway.training.config_file import resolve_config
    from headway.training.loop import train

    place = tmp_path_factory.mktemp("reference")
    for group, text in (("a", b"def f(x):\n    return x\n"), ("b", b"for i in range(3):\n    print(i)\n")):
        (place / "text" / group).mkdir(parents=True)
        (place / "text" / group / "one.py").write_bytes(text * 200)
    config = resolve_config(
        overrides={
            "data": [str(place / "text")],
            "tokenizer": "bytes",
            "held_out_fraction": 0.3,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 2,
            "num_future_tokens": 3,
            "heads": "linear",
            "markov_rank": 4,
            "sequence_length": 32,
            "batch_size": 2,
            "steps": 4,
            "eval_every_steps": 2,
            "checkpoint_every_steps": 2,
            "compile": "off",
            "precision": "float32",
            "tensorboard": False,
            "output": str(place / "run"),
        }
    )
    train(config)
    return place / "run"


def test_a_run_of_another_text_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(DataError, match="reads bytes of the standard library"):
        publish(run, tmp_path, recipe="none")


def test_a_run_becomes_a_folder_that_computes_in_float32(run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(publishing, "_data", lambda options, identity: {"held_out_packages": ["b"]})
    record = publish(run, tmp_path / "reference", recipe="none")
    folder = tmp_path / "reference" / "model"
    whole = MultiTokenLM.from_pretrained(run / "model")
    half = MultiTokenLM.from_pretrained(folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.to(torch.bfloat16).float())
    assert json.loads((folder / RECORD).read_text()) == record
    assert record["training"]["steps"] == 4
    assert record["training"]["tokens"] == 4 * 2 * 32
    assert record["stored"]["bytes"] < MOST_BYTES
    assert load_tokenizer(folder).eos_token_id == 256
    for file in (tmp_path / "reference").rglob("*.[jy]*"):
        assert str(tmp_path.parent) not in file.read_text(), file
    monkeypatch.setattr(publishing, "MOST_BYTES", 10)
    with pytest.raises(CheckpointError, match="bytes of weights"):
        publish(run, tmp_path / "reference", recipe="none")


def test_a_run_that_goes_on_is_refused_but_for_a_trial(run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(publishing, "_data", lambda options, identity: {"held_out_packages": ["b"]})
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    try:
        with pytest.raises(CheckpointError, match="has not ended"):
            publish(run, tmp_path, recipe="none")
        assert publish(run, tmp_path, recipe="none", checkpoint=True)["finished"] is False
    finally:
        (run / "result.json").write_bytes(result)


# Measuring and pages


@pytest.fixture(scope="module")
def measured_root(run: Path, tmp_path_factory) -> Path:
    """A small repository: a published model, and its results measured on text of a few lines."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "_data", lambda options, identity: DATA)
        record = publish(run, root / "reference", recipe="none")
    text = b"def f(x):\n    return x\nfor i in range(3):\n    print(i)\n" * 8
    model = MultiTokenLM.from_pretrained(root / FOLDER).eval()
    windows = pieces([text], count=2, size=40, name="text")
    rows = tuple(tuple(window[:12]) for window in windows)
    measured = Measured(
        reference=model,
        others={"plain, smaller": tiny_plain()},
        held_out=MeasuredText("held-out packages", windows, BenchPrompts("held out", rows, rows)),
        foreign=(MeasuredText("a corpus", windows, BenchPrompts("a corpus", rows, rows)),),
        export=None,
        pad_token_id=257,
        end_token_ids=(256,),
    )
    amounts = Amounts(windows=2, window_bytes=40, prompts=2, prompt_bytes=12, new_bytes=6, rounds=1)
    document = {
        "complete": True,
        "setting": {"threads": 1, "weights_sha256": record["sha256"]["model.safetensors"]},
        "parts": {name: part() for name, part in parts(measured, amounts).items()},
        "provenance": provenance(),
    }
    (root / "results.json").write_text(json.dumps(document))
    return root


def test_parts_hold_loss_acceptance_and_speed_of_every_model(measured_root: Path):
    found = json.loads((measured_root / "results.json").read_text())["parts"]
    assert list(found) == [
        "text: held-out packages",
        "text: a corpus",
        "speed: held-out packages",
        "trade-off",
        "speed: a corpus",
        "drawn: held-out packages",
    ]
    text = found["text: a corpus"]
    assert set(text["bits_per_byte"]) == {"reference", "plain, smaller"}
    assert set(text["walk"]) == {"chain-1", "chain-2", "lookup", "heads+lookup"}
    assert found["speed: a corpus"]["equal"] is True
    assert {"hf", "plain/lean"} <= set(found["speed: a corpus"]["over_others"]["over"])
    arms = {point["arm"] for point in found["trade-off"]["points"]}
    ours = {f"reference: {name}" for name in ("plain", "chain-1", "chain-2", "auto")}
    assert arms == {*ours, "plain, smaller: plain"}


def test_pages_are_written_from_the_record_and_the_results_alone(measured_root: Path):
    written = write_pages(measured_root, measured_root / "results.json")
    card, page = (
        (measured_root / name).read_text() for name in (FOLDER / "README.md", "docs/experiments/reference.md")
    )
    assert "seed 0" in card
    assert "Speed over" in card
    assert "## Loss against speed" in page
    assert "Speed on a corpus" in page
    assert {path.name for path in written} >= {"README.md", "reference.md", "reference-trade-off.svg"}
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in write_pages(measured_root, measured_root / "results.json")} == before


def test_results_of_other_weights_are_not_quoted(measured_root: Path):
    other = json.loads((measured_root / "results.json").read_text())
    other["setting"]["weights_sha256"] = "0" * 64
    (measured_root / "other.json").write_text(json.dumps(other))
    write_pages(measured_root, measured_root / "other.json")
    assert "Not measured yet" in (measured_root / FOLDER / "README.md").read_text()


@committed
def test_the_committed_pages_say_what_record_and_results_say():
    root = checkout()
    record = reference_record(MODEL)
    measured = results_of(record, root / "benchmarks" / "results" / "reference.json")
    assert (MODEL / "README.md").read_text() == card(record, measured)
    if measured is not None:
        assert (root / PAGE).read_text() == page(record, measured)


def test_corpora_are_named_with_their_fields(tmp_path: Path):
    lines = [{"prompt": f"def f{n}():\n", "body": f"    return {n}{'0' * 40}"} for n in range(3)]
    with gzip.open(tmp_path / "code.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    sizes = {"windows": 2, "window_bytes": 30, "prompts": 3, "prompt_bytes": 12}
    found = named_text(f"code={tmp_path / 'code.jsonl.gz'}:prompt+body", **sizes)
    assert found.name == "code"
    assert found.windows[0].startswith(b"def f0():\n")
    assert bytes(found.prompts.prompts[0])[:5] == b"def f"
    with pytest.raises(DataError, match="name those that hold its text"):
        named_text(f"code={tmp_path / 'code.jsonl.gz'}", **sizes)
    with pytest.raises(ConfigError, match="NAME=FILE"):
        named_text("code", **sizes)
    with pytest.raises(DataError, match="pieces of 30 bytes, 99 are wanted"):
        named_text(f"code={tmp_path / 'code.jsonl.gz'}:prompt+body", **(sizes | {"windows": 99}))
