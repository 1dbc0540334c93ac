"""The benchmark of decoding: its figures by hand, its rounds on a clock of the test's own, its prompts and its page."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from headway.data.tokenizers import byte_tokenizer
from headway.decoding.lean.few_rows import kernel_for
from headway.errors import ConfigError, DataError
from headway.experiments.bench.arms import ArmOptions, build_arms
from headway.experiments.bench.charts import batch_chart, batch_curves, standalone, waterfall
from headway.experiments.bench.figures import break_even, break_even_batch, estimate, paired_ratio, until_end
from headway.experiments.bench.folder import check_folder, write_folder
from headway.experiments.bench.generation import Arm, Generation, Limits
from headway.experiments.bench.measure import Clock, run_rounds
from headway.experiments.bench.other_engines import llama_cpp, own_exports
from headway.experiments.bench.page import bench_page
from headway.experiments.bench.prompts import BenchPrompts, prompt_batches, read_prompts
from headway.experiments.bench.run import BenchOptions, run_bench
from headway.experiments.bench.steps import head_floors, plain_step_parameters, weight_reader
from headway.experiments.bench.table import break_even_line, headline_lines, verdict
from headway.functional.repetition import loops
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import tiny_base, tiny_model


class Hands:
    """A clock that only the test moves; two CPU seconds pass with each of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def clock(self, *, per_read: float = 0.0) -> Clock:
        def wall() -> float:
            self.now += per_read
            return self.now

        return Clock(wall=wall, cpu=lambda: 2 * self.now)


def slow_arm(name: str, hands: Hands, *, prefill: float, decode: float, tokens: list[int], **fields) -> Arm:
    def run(batch, first_token):
        hands.now += prefill
        first_token()
        hands.now += decode
        return Generation([tokens] * batch.rows, first=1, forwards=len(tokens) - 1)

    return Arm(name, fields.pop("engine", "headway"), "eager", True, run, **fields)


def batches(*rows: list[int], batch: int = 1):
    return prompt_batches(rows, batch=batch, pad_token_id=0, device="cpu")


def byte_ids(data: bytes) -> list[int]:
    return list(data)


# Figures


def test_an_estimate_holds_the_median_and_an_interval_within_the_rounds():
    found = estimate([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.median == 3.0
    assert 1.0 <= found.low < 3.0 < found.high <= 100.0
    assert found == estimate([1.0, 2.0, 3.0, 4.0, 100.0])
    assert math.isnan(estimate([]).median)
    assert math.isnan(estimate([1.0, math.nan]).low)


def test_the_interval_narrows_with_the_rounds_and_covers_the_median():
    generator = torch.Generator().manual_seed(0)
    covered, widths = 0, {10: 0.0, 80: 0.0}
    for count in widths:
        for trial in range(40):
            found = estimate(torch.randn(count, generator=generator).tolist(), seed=trial)
            widths[count] += found.high - found.low
            covered += found.low <= 0 <= found.high
    assert widths[80] < 0.6 * widths[10]
    assert covered >= 66  # of 80; 95 % would be 76


def test_a_ratio_is_of_the_same_round():
    # The machine slows down fourfold in the second round; the ratio does not see it.
    assert paired_ratio([20.0, 5.0, 22.0], [10.0, 2.5, 11.0]) == estimate([2.0, 2.0, 2.0])
    assert math.isnan(paired_ratio([1.0], [0.0]).median)


def test_break_even_is_where_the_ratio_would_be_one():
    assert break_even(3.0, 1.5) == 2.0
    assert math.isnan(break_even(3.0, math.nan))


def test_loops_and_ends():
    assert loops([7] * 20)
    assert not loops(list(range(20)))
    assert until_end([3, 9, 4, 9], frozenset({9})) == [3, 9]
    assert until_end([3, 4], frozenset()) == [3, 4]


# Rounds


def test_prefill_and_decoding_are_timed_apart_in_both_kinds_of_seconds():
    hands = Hands()
    arms = [
        slow_arm("a", hands, prefill=3.0, decode=2.0, tokens=[1, 2, 3, 4, 5]),
        slow_arm("b", hands, prefill=1.0, decode=8.0, tokens=[1, 2, 3, 4, 5]),
    ]
    rounds = run_rounds(arms, batches([1], [2]), rounds=4, warmup=1, clock=hands.clock())
    a, b = rounds.records
    assert len(a.timings) == 4
    assert a.speeds([0, 1]) == [2.0] * 4  # 4 tokens after the prefill in 2 s
    assert a.whole_speeds([0, 1]) == [1.0] * 4  # 5 tokens in 5 s
    assert a.cpu_per_token([0]) == [1.0] * 4
    assert a.prefill_seconds([0, 1]) == [3.0] * 4
    assert b.step_seconds([1]) == [2.0] * 4
    assert paired_ratio(a.speeds([0]), b.speeds([0])).median == 4.0


def test_every_arm_goes_first_in_turn():
    order: list[str] = []

    def arm(name: str) -> Arm:
        def run(batch, first_token):
            order.append(name)
            first_token()
            return Generation([[1, 2]], first=1, forwards=1)

        return Arm(name, "headway", "eager", True, run)

    run_rounds([arm("a"), arm("b"), arm("c")], batches([1]), rounds=3, warmup=0, clock=Hands().clock())
    assert order == ["a", "b", "c", "a", "b", "c", "b", "c", "a", "c", "a", "b"]  # first calls, then three rounds


def test_arms_that_cannot_are_skipped_with_the_reason_and_ours_never_hide_a_failure():
    def fail(batch, first_token):
        raise ValueError("no such cache\nand more")

    hands = Hands()
    good = slow_arm("plain", hands, prefill=1, decode=1, tokens=[1, 2])
    alone = slow_arm("hf-lookup", hands, prefill=1, decode=1, tokens=[1, 2], engine="transformers", one_row=True)
    broken = Arm("hf-static", "transformers", None, True, fail)
    groups = batches([1], [2], batch=2)
    rounds = run_rounds([good, alone, broken], groups, rounds=1, warmup=0, clock=hands.clock())
    assert [record.arm.name for record in rounds.records] == ["plain"]
    assert [(one.arm, one.batch) for one in rounds.skipped] == [("hf-lookup", 2), ("hf-static", 2)]
    assert rounds.skipped[1].reason == "transformers failed: ValueError: no such cache"
    with pytest.raises(ValueError, match="no such cache"):
        run_rounds([Arm("plain", "headway", "eager", True, fail)], groups, rounds=1, warmup=0, clock=hands.clock())


def test_a_text_that_changes_between_rounds_is_told():
    texts = iter([[1, 2], [1, 2], [1, 3]])

    def run(batch, first_token):
        first_token()
        return Generation([next(texts)], first=1, forwards=1)

    rounds = run_rounds(
        [Arm("a", "headway", "eager", True, run)], batches([1]), rounds=2, warmup=0, clock=Hands().clock()
    )
    assert rounds.records[0].changed


# Prompts


def test_a_text_is_cut_evenly_from_its_first_to_its_last_token(tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(100)))
    found = read_prompts(file, byte_ids, count=3, prompt_tokens=10, new_tokens=5, field=None)
    assert [prompt[0] for prompt in found.prompts] == [0, 45, 90]
    assert [len(prompt) for prompt in found.prompts] == [10, 10, 10]
    assert found.texts[1] == tuple(range(45, 60))
    with pytest.raises(DataError, match="has 100 tokens, a prompt needs 101"):
        read_prompts(file, byte_ids, count=3, prompt_tokens=101, new_tokens=5, field=None)


def test_json_lines_give_their_text_and_spec_bench_its_first_turn(tmp_path: Path):
    file = tmp_path / "question.jsonl"
    lines = [{"question_id": n, "category": "c", "turns": [f"first {n}", "second"]} for n in range(6)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_prompts(file, byte_ids, count=3, prompt_tokens=50, new_tokens=5, field=None)
    assert [bytes(prompt) for prompt in found.prompts] == [b"first 0", b"first 2", b"first 4"]
    named = read_prompts(file, byte_ids, count=9, prompt_tokens=50, new_tokens=5, field="category")
    assert [bytes(prompt) for prompt in named.prompts] == [b"c"] * 6


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "line 1: not JSON"), ("[1]", "line 1: not an object"), ('{"a": "b"}', r"it has a\); name one with --field")],
)
def test_json_lines_without_a_prompt_are_refused(tmp_path: Path, line: str, said: str):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=said):
        read_prompts(file, byte_ids, count=1, prompt_tokens=5, new_tokens=5, field=None)


def test_the_default_is_held_out_library_code():
    found = read_prompts(None, byte_ids, count=2, prompt_tokens=40, new_tokens=8, field=None)
    assert "holds out" in found.source
    assert [len(text) for text in found.texts] == [48, 48]
    assert found.texts[0][:40] == found.prompts[0]
    assert b"def " in bytes(found.prompts[0])


def test_batches_are_full_and_padded_on_the_left():
    first, second = batches([1, 2, 3], [4], [5, 6], batch=2)
    assert first.ids_BT.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert first.mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.prompt(1) == [4]
    assert second.prompt(0) == [5, 6]
    assert second.prompt(1) == [1, 2, 3]


# Arms

LIMITS = Limits(max_new_tokens=12, end_token_ids=(), pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa-tied", num_future_tokens=3).eval()


def test_names_expand_and_what_cannot_run_has_a_reason(model):
    arms, skipped = build_arms(model, ArmOptions(), LIMITS)
    names = [arm.name for arm in arms]
    assert names[:4] == ["plain", "chain-1", "chain-2", "tree"]
    assert {"auto", "lookup", "heads+lookup", "plain/lean", "chain-2/lean", "hf", "hf-static", "hf-lookup"} <= set(
        names
    )
    reasons = {one.arm: one.reason for one in skipped}
    assert "--assistant" in reasons["hf-assisted"]
    assert "llama_cpp" in reasons["llama.cpp"] or "--gguf" in reasons["llama.cpp"]


def test_a_model_without_heads_still_has_its_plain_arms_and_copies():
    model = tiny_model("gpt_neox", num_future_tokens=1).eval()
    arms, skipped = build_arms(model, ArmOptions(names=("plain", "chain", "tree", "lookup")), LIMITS)
    assert [arm.name for arm in arms] == ["plain", "lookup"]
    reasons = {one.arm: one.reason for one in skipped}
    assert reasons["chain"] == "the model has no heads that draft"
    assert reasons["plain/lean"].startswith("no lean executor: the lean block is written for")


@pytest.mark.skipif(kernel_for(torch.zeros(1, 1)) is None, reason="no C++ compiler for the kernel")
def test_int8_weights_are_measured_as_another_model_that_no_headline_counts(model):
    ids = tuple(range(3, 12))
    document = run_bench(
        model,
        BenchPrompts("ids", (ids,), (ids,)),
        BenchOptions(ArmOptions(names=("int8", "plain", "chain-2"), executors=("lean",)), rounds=2, warmup=0),
        LIMITS,
        name="tiny",
    )
    (batch,) = document["batches"]
    figures = {one["arm"]: one for one in batch["arms"]}
    assert list(figures) == ["int8/lean", "int8-auto/lean", "plain/lean", "chain-2/lean"]
    assert [name for name, one in figures.items() if one["other_model"]] == ["int8/lean", "int8-auto/lean"]
    assert document["equal"]
    assert batch["fastest_plain"] == "plain/lean"
    assert (batch["headline"] or {"best": "chain-2/lean"})["best"] == "chain-2/lean"
    assert figures["chain-2/lean"]["differing_rows"] == 0
    # Rounded weights too give one text, with and without drafts.
    for one in (figures["int8/lean"], figures["int8-auto/lean"]):
        assert "another model" in one["note"]
        assert one["unexplained_differences"] == 0
        assert one["step"]["bytes"] is None
        assert one["differing_rows"] == figures["int8/lean"]["differing_rows"]
    assert "over_own_plain" in figures["int8-auto/lean"]
    assert [curve for curve, _ in batch_curves(document)] == ["chain-2/lean"]


def test_int8_weights_have_a_reason_where_they_cannot_be_and_nobody_gets_them_unasked(model, monkeypatch):
    assert "int8" not in ArmOptions().names
    monkeypatch.setattr(
        "headway.experiments.bench.arms.lean_model",
        lambda model, weights="own": "no compiler" if weights == "int8" else 1,
    )
    for executors, arms_skipped in ((("eager",), {"int8"}), (("eager", "lean"), {"int8/lean", "int8-auto/lean"})):
        arms, skipped = build_arms(model, ArmOptions(names=("plain", "int8"), executors=executors), LIMITS)
        assert {one.arm for one in skipped} == arms_skipped
        assert not any(arm.other_model for arm in arms)


@pytest.mark.parametrize("names", [("plain", "chains"), ("chain",), ("plain", "chain-0")])
def test_arms_that_do_not_exist_or_leave_out_plain_are_refused(names):
    with pytest.raises(ConfigError, match="arm"):
        ArmOptions(names=names)


def test_llama_cpp_is_stepped_until_the_end(model, tmp_path: Path, monkeypatch):
    class Llama:
        def __init__(self, **options) -> None:
            self.options = options

        def reset(self) -> None:
            pass

        def generate(self, prompt, **options):
            assert options["temp"] == 0.0
            yield from [prompt[0] + 1, 7, 9, 5, 5, 5]

    package = types.ModuleType("llama_cpp")
    package.Llama = Llama  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace(name="llama_cpp")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    (tmp_path / "q8.gguf").write_bytes(b"")
    limits = Limits(max_new_tokens=12, end_token_ids=(9,), pad_token_id=0)
    options = ArmOptions(names=("plain", "llama.cpp"), gguf=(tmp_path / "q8.gguf", tmp_path / "none.gguf"))
    arms, skipped = build_arms(model, options, limits)
    arm = next(arm for arm in arms if arm.engine == "llama.cpp")
    marks: list[int] = []
    made = arm.decode(batches([4, 2])[0], lambda: marks.append(1))
    assert (arm.name, arm.other_weights, made.tokens, marks) == ("llama.cpp q8", True, [[5, 7, 9]], [1])
    assert [(one.arm, one.reason) for one in skipped] == [("llama.cpp none", "there is no file none.gguf")]


def test_reading_the_weights_reads_those_of_a_plain_step(model):
    read, size = weight_reader(model)
    assert size == sum(p.numel() * 4 for p in model.base.parameters()) // 8 * 8  # tied: the table is the unembedding
    assert read() is not None


# The whole


@pytest.fixture(scope="module")
def document(model):
    hands = Hands()
    prompts = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(3)).tolist()
    texts = tuple(tuple(row) for row in prompts)
    return run_bench(
        model,
        BenchPrompts("random ids", texts, texts),
        BenchOptions(ArmOptions(num_lookup_tokens=4, tree=5), batches=(1, 2), rounds=2, warmup=0),
        LIMITS,
        name="tiny <b>",
        clock=hands.clock(per_read=1.0),
    )


def test_every_greedy_text_is_the_plain_one_and_every_arm_has_figures(document):
    assert document["equal"] is True
    for batch in document["batches"]:
        for figures in batch["arms"]:
            assert verdict(figures) == "identical"
            assert figures["changed_between_rounds"] is False
            assert figures["all_texts"]["new_tokens"] == 12 * batch["rows"]
    first, second = document["batches"]
    assert (first["batch"], first["calls"], second["batch"], second["calls"], second["rows"]) == (1, 3, 2, 2, 4)
    assert {one["arm"] for one in document["skipped"] if one["batch"] == 2} == {"hf-lookup"}


def test_forwards_and_acceptance_are_consistent(document):
    for figures in document["batches"][0]["arms"]:
        texts = figures["all_texts"]
        if figures["plain"]:
            assert texts["tokens_per_forward"] == 1.0
            assert texts["forwards"] == 3 * 11
        elif figures["engine"] == "headway":
            assert texts["tokens_per_forward"] == pytest.approx(3 * 11 / texts["forwards"])
            assert texts["break_even_tokens_per_forward"] * texts["over_fastest_plain"]["median"] == pytest.approx(
                texts["tokens_per_forward"]
            )
            assert figures["sampled_tokens_per_forward"] >= 1.0
    assert [walk["num_draft_tokens"] for walk in document["walk"]] == [1, 2]


def test_on_a_clock_that_ticks_with_each_reading_the_document_follows(document):
    # Each call reads the clock at its start, its first token and its end: a second each.
    plain = next(figures for figures in document["batches"][0]["arms"] if figures["arm"] == "plain")
    assert plain["all_texts"]["tokens_per_second"] == {"median": 11.0, "low": 11.0, "high": 11.0}
    assert plain["all_texts"]["whole_call_tokens_per_second"]["median"] == 6.0
    assert plain["all_texts"]["prefill_ms"]["median"] == 1000.0
    # A plain forward calls block and logits, a second each, on its own two readings.
    assert plain["step"]["parts_ms"] == {"verify": 2000.0, "draft": 0.0, "rest": 3000.0}


def test_the_document_is_json_and_the_page_stands_alone(document, tmp_path: Path):
    page = write_folder(document, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["model"] == "tiny <b>"
    text = page.read_text()
    assert "tiny &lt;b&gt;" in text
    assert "tiny <b>" not in text
    assert "<script" not in text
    assert "http" not in text
    assert text == bench_page(document)
    assert (tmp_path / "out" / "speedup_over_batch.svg").read_text().startswith("<svg viewBox")
    with pytest.raises(ConfigError, match="--overwrite"):
        check_folder(tmp_path / "out", overwrite=False)
    check_folder(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ConfigError, match="no benchmark wrote"):
        check_folder(tmp_path / "out", overwrite=True)


def test_curves_run_over_the_batches_and_the_waterfall_over_the_gains(document):
    curves = dict(batch_curves(document))
    assert [place for place, _ in curves["chain-2"]] == [1.0, 2.0]
    assert "plain" not in curves
    assert batch_chart(document | {"batches": document["batches"][:1]}) == ""
    headline = document["batches"][0]["headline"]
    assert headline is not None
    drawing = waterfall(document)
    assert f"drafts: {headline['best']}" in drawing
    assert 'xmlns="http://www.w3.org/2000/svg"' in standalone(drawing)


def test_the_headline_names_its_denominator(document):
    lines = headline_lines(document["batches"][0])
    assert any("engine gain, plain over Hugging Face generate" in line for line in lines)
    assert any("over the fastest plain engine (" in line for line in lines)


def test_where_every_text_loops_there_is_no_headline(model):
    limits = Limits(max_new_tokens=60, end_token_ids=(), pad_token_id=0)
    looping = ((5,) * 9,)
    found = run_bench(
        model,
        BenchPrompts("loops", looping, looping),
        BenchOptions(ArmOptions(names=("plain", "chain-2", "hf"), executors=("eager",)), rounds=1, warmup=0),
        limits,
        name="m",
        clock=Hands().clock(per_read=1.0),
    )
    batch = found["batches"][0]
    plain = batch["arms"][0]
    if batch["looping_rows"]:
        assert batch["headline"] is None
        assert plain["texts_without_loops"] is None
        assert "no headline" in headline_lines(batch)[0]
        assert waterfall(found) == ""
    else:
        pytest.fail("a random model of 40 tokens was expected to loop within 60; choose another seed")


def test_a_difference_is_told_with_its_gap():
    figures = {"compared": True, "differing_rows": 3, "near_ties": 1, "largest_gap": 0.25}
    assert verdict(figures) == "3 rows differ, 1 near-ties, gap 0.25"
    assert (
        verdict({"compared": True, "differing_rows": 1, "near_ties": 1, "largest_gap": 1e-7})
        == "1 row differs: near-tie"
    )


# Walks, floors, break-even


def test_trees_and_copies_are_walked_along_the_prompts_text_too(document):
    for figures in document["batches"][0]["arms"]:
        walked = figures["arm"].partition("/")[0] not in ("plain", "auto", "dynamic") and figures["engine"] == "headway"
        assert (figures["walk_tokens_per_forward"] is not None) == walked, figures["arm"]
        if walked:
            expected = figures["walk_tokens_per_forward"] / figures["all_texts"]["break_even_tokens_per_forward"]
            assert figures["expected_over_fastest_plain_along_text"] == pytest.approx(expected)


def test_drafts_break_even_between_the_batches_where_they_win_and_lose(document):
    assert break_even_batch([(1, 2.0), (2, 1.5), (8, 0.5)]) == pytest.approx(4.0)
    assert set(document["break_even_batch"]) <= {figures["arm"] for figures in document["batches"][0]["arms"]}
    one = break_even_line(document | {"break_even_batch": {"chain-1": None, "tree": 0.0, "auto": 5.2}})
    assert one == "drafts pay up to a batch of: chain-1 more than 2, tree none, auto 5.2"
    assert break_even_line(document | {"break_even_batch": {}}) is None


def test_the_byte_floor_of_each_kind_of_heads_is_that_of_heads_that_exist(model):
    floors = {floor.heads: floor for floor in head_floors(model, num_draft_tokens=2)}
    heads = sum(parameter.numel() for parameter in model.heads.parameters())  # two transformer layers
    assert floors["parallel"].bytes == 4 * (plain_step_parameters(model) + heads)
    assert floors["linear"].over_plain < floors["parallel"].over_plain
    assert floors["sequential-shared"].bytes < floors["sequential"].bytes


def test_a_quantized_file_is_no_denominator(model, tmp_path: Path, monkeypatch):
    package = types.ModuleType("llama_cpp")
    package.__spec__ = types.SimpleNamespace(name="llama_cpp")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    base = tiny_base("llama", vocab_size=258, hidden_size=32, intermediate_size=64)
    wide = attach_heads(base, MultiTokenConfig(num_future_tokens=2))
    made = llama_cpp((), LIMITS, export=lambda: own_exports(wide, byte_tokenizer(), tmp_path))
    assert [(arm.name, arm.other_model) for arm in made] == [("llama.cpp f32", False), ("llama.cpp q8_0", True)]
    refused = llama_cpp((), LIMITS, export=lambda: own_exports(tiny_model("qwen2"), byte_tokenizer(), tmp_path))
    assert "llama and mistral" in refused[0].reason
