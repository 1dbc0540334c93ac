"""Calibration: what is measured, stored and used, and that expectations are what decoding does."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.decoding.calibration import run as calibration_run
from headway.decoding.calibration import use
from headway.decoding.calibration.cost import StepSeconds, measure_steps
from headway.decoding.calibration.ranks import own_continuations, ranked_text, sampling_arguments, text_windows
from headway.decoding.calibration.run import CalibrationOptions, calibrate
from headway.decoding.calibration.stored import (
    CALIBRATION_FILE,
    Calibration,
    MachineKey,
    heads_fingerprint,
    read_calibrations,
    store_calibration,
)
from headway.decoding.calibration.walk import walk_tree
from headway.errors import CheckpointError, DataError, DecodingError
from headway.functional.tree import Tree
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import VOCABULARY, random_tokens, tiny_model

WORDS = torch.randint(1, VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(0))
OPTIONS = CalibrationOptions(
    executor="eager",
    keep_loops=True,
    windows=4,
    prompt_tokens=8,
    new_tokens=40,
    most_nodes=6,
    num_ranks=3,
    rounds=1,
    steps=2,
)


def text_of_words(count: int, *, seed: int) -> list[int]:
    """Text made of five words in random order."""
    picks = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(seed))
    return WORDS[picks].flatten().tolist()


TEXT = text_of_words(60, seed=9)


def train(model, steps=60):
    """A few steps on the words, so that heads guess well at times and badly at others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for step in range(steps):
        rows = torch.tensor([text_of_words(6, seed=100 * step + row) for row in range(8)])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory) -> Path:
    """A folder of a model with n = 4 that knows the words."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    train(tiny_model(heads="linear")).save_pretrained(folder)
    return folder


@pytest.fixture
def model(trained_folder, tmp_path) -> MultiTokenLM:
    """The same in a folder of its own, in float64."""
    folder = tmp_path / "model"
    loaded = MultiTokenLM.from_pretrained(trained_folder)
    loaded.save_pretrained(folder)
    return MultiTokenLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture
def even_costs(monkeypatch):
    """Costs that grow a little with the width, so that what is chosen does not depend on the machine's mood."""

    def steps(model, prompts_BT, drafts, **options):
        widths = {
            draft: len(own.get("tree", ())) or int(own.get("num_draft_tokens", 0)) for draft, own in drafts.items()
        }
        return {draft: StepSeconds(*[1.0 + 0.1 * width] * 3, 1) for draft, width in widths.items()}

    monkeypatch.setattr(calibration_run, "measure_steps", steps)


def folder_of(model) -> Path:
    return use.loaded_from(model)


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize(
    ("heads", "temperature"),
    [
        ({"heads": "linear"}, 0.0),
        ({"heads": "linear"}, 1.0),
        ({"heads": "linear", "markov_rank": 4}, 0.0),
        ({"heads": "hydra"}, 0.0),
    ],
)
def test_replayed_decoding_is_what_decoding_does_on_the_same_text(heads, temperature):
    """Tokens per forward of a chain and of trees, with and without copies: equal but for the end of each text."""
    model = train(tiny_model(dtype=torch.float64, **heads), steps=40)
    prompts_WT = text_windows(TEXT, count=4, length=8)
    new = 60
    texts = own_continuations(
        model,
        prompts_WT,
        new_tokens=new,
        executor="eager",
        batch=1 if temperature else 2,
        temperature=temperature,
        seed=5,
    )
    ranked = [one for own in texts for one in ranked_text(model, own, prompt_tokens=8, num_ranks=4, written=True)]
    branching = Tree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)])
    for tree, lookup in ((Tree.chain(3), 0), (branching, 0), (branching, 5)):
        walks = [walk_tree([own], tree, lookup=lookup, ngram=2) for own in ranked]
        decoded = []
        for window, (prompt_T, own, walk) in enumerate(zip(prompts_WT, ranked, walks, strict=True)):
            result = model.generate(
                prompt_T[None],
                **sampling_arguments(temperature, seed=5 + window),
                max_new_tokens=new,
                tree=tree.choices,
                drafts="heads+lookup" if lookup else "heads",
                num_lookup_tokens=5,
                lookup_ngram=2,
                return_dict_in_generate=True,
            )
            decoded += result.acceptance.lengths[0]
            # Without the last block of the walk, which decoding's limit may cut.
            walked = [after - before for before, after in zip(walk.starts[0], walk.starts[0][1:], strict=False)]
            assert result.acceptance.lengths[0][: len(walked)] == walked
            assert len(walked) > 8
            assert len(own.ranks_TK) == new + 1 - model.num_future_tokens
        expected = walk_tree(ranked, tree, lookup=lookup, ngram=2).tokens_per_forward
        # Told as the mean over blocks; decoding has a few more at the end of each text.
        assert statistics.fmean(decoded) == pytest.approx(expected, rel=0.1)


def test_along_a_text_the_models_tokens_are_its_choices_after_the_text_itself():
    model = tiny_model(heads="linear", dtype=torch.float64)
    tokens = random_tokens(1, 20)
    (ranked,) = ranked_text(model, tokens[0].tolist(), prompt_tokens=5, num_ranks=VOCABULARY, written=False)
    out = model(tokens, return_future_logits=True)
    chosen_T = out.logits[0].argmax(-1)
    assert ranked.choices[1:] == tuple(chosen_T.tolist())
    for start in range(len(ranked.ranks_TK)):
        at = 4 + start
        for offset in (2, 3, 4):
            order = out.future_logits[0, at, offset - 1].argsort(descending=True).tolist()
            # What the model says about place at + offset stands one position before it.
            assert order.index(int(chosen_T[at + offset - 1])) == int(ranked.ranks_TK[start, offset - 2])


def test_ranks_in_a_draft_vocabulary_count_its_tokens_only():
    model = tiny_model(heads="linear", dtype=torch.float64)
    tokens, part = random_tokens(30).tolist(), tuple(range(0, VOCABULARY, 2))
    whole, sliced = ranked_text(
        model, tokens, prompt_tokens=5, num_ranks=VOCABULARY, written=True, draft_vocabularies=[None, part]
    )
    logits = model(torch.tensor([tokens]), return_future_logits=True).future_logits[0]
    for start in range(len(whole.ranks_TK)):
        token = tokens[4 + start + 2]
        order = [one for one in logits[4 + start, 1].argsort(descending=True).tolist() if one in part]
        assert int(sliced.ranks_TK[start, 0]) == (order.index(token) if token in part else -1)


def test_steps_are_timed_for_every_draft_in_every_round():
    model = tiny_model(heads="linear")
    found = measure_steps(
        model,
        random_tokens(2, 6),
        {"plain": {"num_draft_tokens": 0}, "tree": {"tree": [(0,), (1,)]}},
        executor="eager",
        rounds=2,
        steps=3,
    )
    assert {name: seconds.steps for name, seconds in found.items()} == {"plain": 6, "tree": 6}
    assert all(0 < seconds.low <= seconds.median <= seconds.high for seconds in found.values())


# --------------------------------------------------------------------------------------------- what follows from it


@pytest.mark.parametrize("executor", ["eager", "lean"])
@pytest.mark.parametrize("lookup", [False, True])
def test_a_calibrated_tree_changes_no_token(model, executor, lookup, even_costs):
    result = calibrate(model, TEXT, replace(OPTIONS, executor=executor, lookup=lookup))
    assert result.best.nodes > 0
    prompt_1T = torch.tensor([TEXT[5:19]])
    drafts = "heads+lookup" if lookup else "heads"
    plain = model.generate(prompt_1T, max_new_tokens=40, num_draft_tokens=0)
    made = model.generate(
        prompt_1T, max_new_tokens=40, tree="calibrated", executor=executor, drafts=drafts, return_dict_in_generate=True
    )
    assert torch.equal(made.sequences, plain)
    assert made.note is None
    wanted = result.calibration.tree_beside_lookup if lookup else result.calibration.tree
    asked = model.generate(
        prompt_1T, max_new_tokens=40, tree=wanted, executor=executor, drafts=drafts, return_dict_in_generate=True
    )
    assert made.acceptance.lengths == asked.acceptance.lengths


def test_what_is_chosen_is_the_fastest_of_all_that_is_told(model, even_costs):
    result = calibrate(model, TEXT, OPTIONS, store=False)
    everything = [result.plain, *result.chains, *result.trees]
    assert result.best.tokens_per_second == max(one.tokens_per_second for one in everything)
    assert result.plain.tokens_per_forward == 1.0
    assert [one.nodes for one in result.chains] == [1, 2, 3]
    assert [one.nodes for one in result.trees] == [2, 3, 4, 5, 6]
    assert not (folder_of(model) / CALIBRATION_FILE).exists()
    told = result.calibration.report
    json.dumps(told, allow_nan=False)
    assert told["best"]["tokens_per_second"] == result.best.tokens_per_second
    assert len(told["accuracy"]) == 3


def test_where_drafting_never_pays_plain_decoding_is_chosen(model, monkeypatch):
    def steps(model, prompts_BT, drafts, **options):
        plain = {draft: own.get("num_draft_tokens") == 0 for draft, own in drafts.items()}
        return {draft: StepSeconds(*[1.0 if own else 50.0] * 3, 1) for draft, own in plain.items()}

    monkeypatch.setattr(calibration_run, "measure_steps", steps)
    result = calibrate(model, TEXT, OPTIONS)
    assert result.calibration.tree == ()
    made = model.generate(torch.tensor([TEXT[:9]]), max_new_tokens=9, tree="calibrated", return_dict_in_generate=True)
    assert made.mode == "plain"
    assert "plain decoding fastest" in made.note


def test_a_draft_vocabulary_is_taken_only_where_it_is_faster(model, monkeypatch):
    gain = {None: 1.0}

    def steps(model, prompts_BT, drafts, **options):
        return {
            draft: StepSeconds(*[gain.get(None if "draft_vocabulary" not in own else "part", 1.0)] * 3, 1)
            for draft, own in drafts.items()
        }

    monkeypatch.setattr(calibration_run, "measure_steps", steps)
    options = replace(OPTIONS, draft_vocabularies=(30,))
    gain["part"] = 1.0
    assert calibrate(model, TEXT, options, store=False).calibration.draft_vocabulary is None
    gain["part"] = 0.5
    found = calibrate(model, TEXT, options)
    assert len(found.calibration.draft_vocabulary) == 30
    assert {int(token) for token in WORDS.unique()} <= set(found.calibration.draft_vocabulary)
    assert [row["tokens"] for row in found.calibration.report["draft_vocabulary"]] == [VOCABULARY, 30]
    prompt_1T = torch.tensor([TEXT[5:19]])
    plain = model.generate(prompt_1T, max_new_tokens=30, num_draft_tokens=0)
    assert torch.equal(model.generate(prompt_1T, max_new_tokens=30, tree="calibrated"), plain)


def test_continuations_that_loop_are_left_out_and_counted(model, even_costs, monkeypatch):
    looping = [0]

    def loops_first(tokens):
        looping[0] += 1
        return looping[0] == 1

    monkeypatch.setattr(calibration_run, "loops", loops_first)
    options = replace(OPTIONS, keep_loops=False, temperature=1.0)
    found = calibrate(model, TEXT, options, store=False)
    assert (len(found.texts), found.looping) == (3, 1)
    assert found.calibration.report["looping"] == 1
    monkeypatch.setattr(calibration_run, "loops", lambda tokens: True)
    with pytest.raises(DecodingError, match=r"all 4 continuations loop.* pass temperature=0.8"):
        calibrate(model, TEXT, options, store=False)
    kept = calibrate(model, TEXT, replace(options, keep_loops=True), store=False)
    assert (len(kept.texts), kept.looping) == (4, 4)


def test_drawn_continuations_follow_the_seed_and_their_steps_are_drawn_too(model, monkeypatch):
    asked = []

    def steps(model, prompts_BT, drafts, *, sampling, **options):
        asked.append(sampling)
        return {draft: StepSeconds(1.0, 1.0, 1.0, 1) for draft in drafts}

    monkeypatch.setattr(calibration_run, "measure_steps", steps)
    texts = [
        [own.tokens for own in calibrate(model, TEXT, replace(OPTIONS, temperature=1.0, seed=seed), store=False).texts]
        for seed in (1, 1, 9)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(one["do_sample"] and one["temperature"] == 1.0 for one in asked)


def test_bytes_are_never_sliced():
    assert calibration_run.SMALLEST_SLICED_VOCABULARY > 300


def test_sequential_modules_get_trees_like_all_heads(tmp_path, even_costs):
    folder = tmp_path / "sequential"
    train(tiny_model(heads="sequential"), steps=20).save_pretrained(folder)
    model = MultiTokenLM.from_pretrained(folder)
    result = calibrate(model, TEXT, replace(OPTIONS, lookup=True))
    assert result.trees
    assert result.beside_lookup
    assert not Tree.from_choices(result.trees[-1].tree.choices).is_chain
    prompt_1T = torch.tensor([TEXT[:9]])
    assert torch.equal(
        model.generate(prompt_1T, max_new_tokens=20, tree="calibrated"),
        model.generate(prompt_1T, max_new_tokens=20, num_draft_tokens=0),
    )


# ------------------------------------------------------------------------------------------------- where it is kept


def entry_for(model, **changes) -> Calibration:
    key = replace(MachineKey.here(model, executor="eager", batch=1), **changes)
    return Calibration(key, heads_fingerprint(folder_of(model)), ((0,), (1,), (0, 0)), None, None, {"note": "test"})


def test_entries_are_kept_by_machine_and_nothing_else_changes(model):
    folder = folder_of(model)
    before = checksums(folder)
    first, other = entry_for(model), entry_for(model, threads=77)
    store_calibration(folder, first)
    store_calibration(folder, other)
    store_calibration(folder, replace(first, tree=((0,),)))
    assert read_calibrations(folder) == [other, replace(first, tree=((0,),))]
    after = checksums(folder)
    assert after.keys() - before.keys() == {CALIBRATION_FILE}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "changes", [{"processor": "another"}, {"threads": 99}, {"dtype": "bfloat16"}, {"executor": "lean"}, {"batch": 2}]
)
def test_a_calibration_of_elsewhere_is_ignored_with_one_notice(model, changes, caplog, monkeypatch):
    monkeypatch.setattr(use, "_said", set())
    store_calibration(folder_of(model), entry_for(model, **changes))
    prompt_1T = torch.tensor([TEXT[:9]])
    chain = model.generate(prompt_1T, max_new_tokens=20, return_dict_in_generate=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made = model.generate(prompt_1T, max_new_tokens=20, tree="calibrated", return_dict_in_generate=True)
            assert made.acceptance.lengths == chain.acceptance.lengths
            (name, value) = next(iter(changes.items()))
            assert f"instead of {value}" in made.note
            assert name in made.note
    assert len([record for record in caplog.records if "is ignored" in record.message]) == 1


def test_the_batch_of_a_generation_decides_which_entry_is_used(model, caplog):
    store_calibration(folder_of(model), entry_for(model))
    store_calibration(folder_of(model), replace(entry_for(model, batch=2), tree=((0,),)))
    for batch, most in ((1, 3), (2, 2)):
        prompts_BT = torch.tensor([TEXT[:9]] * batch)
        made = model.generate(prompts_BT, max_new_tokens=24, tree="calibrated", return_dict_in_generate=True)
        assert max(length for row in made.acceptance.lengths for length in row) <= most
        assert made.note is None
    assert not [record for record in caplog.records if "is ignored" in record.message]


def test_a_calibration_of_other_heads_is_not_used(model):
    folder = folder_of(model)
    store_calibration(folder, entry_for(model))
    train(MultiTokenLM.from_pretrained(folder), steps=2).save_pretrained(folder, overwrite=True)
    changed = MultiTokenLM.from_pretrained(folder, dtype=torch.float64)
    made = changed.generate(torch.tensor([TEXT[:9]]), max_new_tokens=5, tree="calibrated", return_dict_in_generate=True)
    assert "other heads" in made.note
    store_calibration(folder, entry_for(changed))
    assert len(read_calibrations(folder)) == 1


def test_a_missing_calibration_is_an_error_that_names_the_command(model):
    with pytest.raises(DecodingError, match=r"run `headway calibrate .*model TEXT`"):
        model.generate(torch.tensor([TEXT[:9]]), max_new_tokens=5, tree="calibrated")
    with pytest.raises(DecodingError, match="was not loaded from one"):
        tiny_model().generate(random_tokens(1, 4), max_new_tokens=5, tree="calibrated")
    assert model.generate(torch.tensor([TEXT[:9]]), max_new_tokens=5, tree="calibrated", num_draft_tokens=0).shape[1]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": "headway-calibration"}', '{"format": "x", "format_version": 1, "entries": []}']
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(model, content):
    (folder_of(model) / CALIBRATION_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="run headway calibrate again"):
        model.generate(torch.tensor([TEXT[:9]]), max_new_tokens=5, tree="calibrated")


def test_another_version_of_the_file_is_refused(model):
    (folder_of(model) / CALIBRATION_FILE).write_text('{"format": "headway-calibration", "format_version": 9}')
    with pytest.raises(CheckpointError, match="format version 9"):
        read_calibrations(folder_of(model))


def test_models_and_texts_that_cannot_be_calibrated_are_refused(model):
    with pytest.raises(DecodingError, match="no heads"):
        calibrate(tiny_model(num_future_tokens=1), TEXT)
    with pytest.raises(DecodingError, match="was not loaded from a folder"):
        calibrate(tiny_model(), TEXT)
    with pytest.raises(DataError, match="the text has 5 tokens, one window takes 8"):
        calibrate(model, TEXT[:5], OPTIONS)
    with pytest.raises(DecodingError, match="do not fit into the 256"):
        calibrate(model, TEXT, replace(OPTIONS, new_tokens=300))
    with pytest.raises(DecodingError, match="rounds must be at least 1"):
        CalibrationOptions(rounds=0)
    with pytest.raises(DecodingError, match="temperature must be 0"):
        CalibrationOptions(temperature=-1.0)
    with pytest.raises(DecodingError, match="nothing is drawn"):
        CalibrationOptions(temperature=1.0, against="text")
