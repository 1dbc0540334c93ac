"""Sampling with drafts: the model's own distribution, the same text for the same seed."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from decoding_cases import new_tokens, ragged_batch
from headway.decoding.controller import DraftController
from headway.decoding.drafting import DrawnDrafter
from headway.decoding.loop import DecodingLoop
from headway.errors import DecodingError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import random_tokens, tiny_model

SETTINGS = {
    "temperature 1": {"top_k": 0},
    "temperature, top-k, top-p, min-p": {"temperature": 0.7, "top_k": 10, "top_p": 0.9, "min_p": 0.02},
    "repetition penalty": {"top_k": 0, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "several ends": {"top_k": 0, "eos_token_id": [3, 7, 11], "pad_token_id": 0},
    "custom criterion": {"top_k": 0, "stopping_criteria": [lambda ids, scores, **_: ids[:, -1] % 9 == 4]},
}
DRAFTS = {
    "chain": {},
    "one draft": {"num_draft_tokens": 1},
    "tree": {"tree": [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]},
    "lookup": {"drafts": "lookup", "num_lookup_tokens": 4},
    "heads and lookup": {"drafts": "heads+lookup", "num_lookup_tokens": 5},
}
BATCH = ragged_batch([3, 11, 7], "lrl")
DRAWN = {
    "block": {"sample_drafts": True},
    "tokenwise": {"sample_drafts": True, "acceptance": "tokenwise"},
    "drawn tree": {"sample_drafts": True, "tree": [(0,), (1,), (0, 0), (0, 1), (1, 0)]},
}


@pytest.fixture(scope="module")
def model():
    # Flat enough that sampling visits many tokens, peaked enough that drafts are accepted.
    return tiny_model()


def _sampled(model, batch=BATCH, **options):
    options = {"do_sample": True, "max_new_tokens": 24, "seed": 5, "return_dict_in_generate": True} | options
    result = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    return result, new_tokens(result, batch.input_ids.shape[1])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_the_same_seed_gives_the_same_text_with_and_without_drafts(drafts, setting, model):
    _, expected = _sampled(model, num_draft_tokens=0, **SETTINGS[setting])
    result, found = _sampled(model, **DRAFTS[drafts], **SETTINGS[setting])
    assert found == expected
    assert (result.mode, result.note, result.lossless) == ("self-speculative", None, True)


def test_drafts_are_accepted_while_sampling(model):
    result, _ = _sampled(model, top_k=0, temperature=0.3, max_new_tokens=60)
    assert result.acceptance.mean_acceptance_length > 1.05
    tree, _ = _sampled(model, top_k=0, temperature=0.3, max_new_tokens=60, tree=12)
    assert tree.acceptance.mean_acceptance_length > result.acceptance.mean_acceptance_length


@pytest.mark.parametrize("drafts", DRAFTS | DRAWN)
def test_a_row_gets_the_same_text_whatever_else_is_in_the_batch(drafts, model):
    options = (DRAFTS | DRAWN)[drafts] | {"top_k": 0, "temperature": 0.6}
    _, together = _sampled(model, seed=[8, 9, 10], **options)
    for row, seed in enumerate((8, 9, 10)):
        prompt = BATCH.rows()[row]
        alone = model.generate(prompt, do_sample=True, max_new_tokens=24, seed=seed, **options)
        assert alone[0, prompt.shape[1] :].tolist() == together[row]


def test_rows_of_one_seed_have_their_own_streams(model):
    prompt = random_tokens(1, 5)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "num_return_sequences": 4}
    out = model.generate(prompt, seed=3, **options)
    assert len({tuple(row.tolist()) for row in out}) == 4
    assert torch.equal(out, model.generate(prompt, seed=3, **options))
    assert not torch.equal(out, model.generate(prompt, seed=4, **options))
    assert torch.equal(model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=12, seed=3)[0], out[0])


def test_without_a_seed_torchs_generator_gives_one(model):
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    torch.manual_seed(11)
    first, second = (model.generate(random_tokens(1, 5), **options) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(model.generate(random_tokens(1, 5), **options), first)


def test_a_temperature_near_0_is_greedy(model):
    greedy = model.generate(random_tokens(2, 6), max_new_tokens=20)
    for options in (DRAFTS | DRAWN).values():
        cold = model.generate(
            random_tokens(2, 6), do_sample=True, temperature=1e-4, top_k=0, max_new_tokens=20, **options
        )
        assert torch.equal(cold, greedy)


def test_samples_of_padded_prompts_keep_the_prompts_as_given(model):
    batch = ragged_batch([3, 6], "lr")
    out = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, max_new_tokens=5, num_return_sequences=2
    )
    assert torch.equal(out[:, :6], batch.input_ids.repeat_interleave(2, dim=0))


def test_plain_sampling_says_so(model):
    result, _ = _sampled(model, num_draft_tokens=0)
    assert (result.mode, result.note) == ("plain", None)
    assert set(itertools.chain(*result.acceptance.lengths)) == {1}


def test_heads_that_draft_in_turn_draw_their_drafts_too():
    model = tiny_model(heads="hydra")
    _, plain = _sampled(model, top_k=0, temperature=0.4, num_draft_tokens=0)
    _, chain = _sampled(model, top_k=0, temperature=0.4)
    assert chain == plain
    drawn, _ = _sampled(model, top_k=0, temperature=0.4, sample_drafts=True)
    assert drawn.num_new_tokens.tolist() == [24] * 3
    _, tree = _sampled(model, top_k=0, temperature=0.4, tree=4)
    assert tree == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2]}, r"one for each of the 3 rows .* got 2"),
        ({"sample_drafts": True, "do_sample": False}, "needs do_sample=True"),
        ({"sample_drafts": True, "drafts": "lookup"}, "leave sample_drafts out"),
        ({"sample_drafts": True, "acceptance": "typical"}, "leave sample_drafts out"),
        ({"acceptance": "tokenwise"}, "pass sample_drafts=True"),
        ({"acceptance": "close"}, "acceptance must be one of exact, tokenwise"),
        ({"acceptance": "top_k", "acceptance_top_k": 0}, "acceptance_top_k must be a whole number of at least 1"),
        ({"posterior_alpha": -1}, "posterior_alpha must be a number of at least 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options, message, model):
    with pytest.raises(DecodingError, match=message):
        _sampled(model, **options)


class _Watermark(LogitsProcessor):
    pass


def test_a_processor_with_a_state_is_sampled_plainly_unless_drafts_were_asked_for(model, monkeypatch):
    monkeypatch.setattr("headway.decoding.engine._STATEFUL_PROCESSORS", (_Watermark,))
    monkeypatch.setattr(_Watermark, "__call__", lambda self, ids, scores: scores)
    processors = LogitsProcessorList([_Watermark()])
    result, _ = _sampled(model, logits_processor=processors)
    assert result.mode == "plain"
    assert "_Watermark keeps a state" in result.note
    with pytest.raises(DecodingError, match="pass num_draft_tokens=0"):
        _sampled(model, logits_processor=processors, num_draft_tokens=2)


# ----------------------------------------------------------------------------------------------- lossy acceptance


@pytest.mark.parametrize("acceptance", ["typical", "top_k", "distance"])
@pytest.mark.parametrize("tree", [None, 10])
def test_lossy_acceptance_says_so_and_accepts_more(acceptance, tree, model):
    exact, _ = _sampled(model, tree=tree, top_k=0, max_new_tokens=60)
    lossy, _ = _sampled(
        model, tree=tree, top_k=0, max_new_tokens=60, acceptance=acceptance, acceptance_top_k=6, acceptance_distance=4
    )
    assert (lossy.acceptance_rule, lossy.lossless) == (acceptance, False)
    assert "is lossy: the text does not follow the model's own distribution" in lossy.note
    assert lossy.acceptance.mean_acceptance_length > exact.acceptance.mean_acceptance_length


def test_typical_acceptance_at_temperature_0_is_the_exact_match(model):
    greedy = model.generate(BATCH.input_ids, attention_mask=BATCH.attention_mask, max_new_tokens=24)
    result, _ = _sampled(model, do_sample=False, acceptance="typical")
    assert torch.equal(result.sequences, greedy)
    assert (result.lossless, result.note) == (True, None)


@pytest.mark.parametrize("options", [{"acceptance": "top_k", "acceptance_top_k": 1}, {"acceptance": "distance"}])
def test_the_strictest_lossy_rules_are_greedy(options, model):
    greedy = model.generate(BATCH.input_ids, attention_mask=BATCH.attention_mask, max_new_tokens=24)
    result, _ = _sampled(model, do_sample=False, acceptance_distance=0, **options)
    assert torch.equal(result.sequences, greedy)
    assert "own greedy text" in result.note


# ---------------------------------------------------------------------------------------------- scores and logits


@pytest.mark.parametrize("drafts", DRAFTS)
def test_scores_and_logits_are_what_transformers_records(drafts, model):
    prompt = random_tokens(1, 6)
    options = {"max_new_tokens": 14, "repetition_penalty": 1.3, "return_dict_in_generate": True, "pad_token_id": 0}
    recorded = {"output_scores": True, "output_logits": True}
    theirs = model.base.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options, **recorded)
    ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **recorded, **DRAFTS[drafts])
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)
    assert model.generate(prompt, **options).scores is None


def test_scores_after_a_rows_end_are_not_numbers(model):
    out, texts = _sampled(model, eos_token_id=[3, 7, 11], pad_token_id=0, top_k=0, output_scores=True)
    lengths = [len(text) for text in texts]
    assert len(set(lengths)) > 1
    assert len(out.scores) == max(lengths)
    for row, length in enumerate(lengths):
        assert [bool(step[row].isnan().all()) for step in out.scores] == [at >= length for at in range(max(lengths))]


# ------------------------------------------------------------------------------ the model's own law, by chi-square

TOKENS, NEW, DRAWS = 4, 3, 900
LAWS = {
    "temperature 1": {"top_k": 0},
    "warm, top-p": {"top_k": 0, "temperature": 1.3, "top_p": 0.85},
    "cool, repetition penalty": {"top_k": 0, "temperature": 0.8, "repetition_penalty": 1.5},
}


def four_token_model_of(**heads):
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.75,
        max_position_embeddings=32,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config).eval()
    return attach_heads(base, MultiTokenConfig(num_future_tokens=4, head_init="fresh", **heads))


@pytest.fixture(scope="module")
def four_token_model():
    return four_token_model_of()


def _law(model, prompt, options):
    """Probability of every continuation, from transformers' own processed scores."""
    law = {(): 1.0}
    for _ in range(NEW):
        prefixes = torch.stack([torch.cat((prompt[0], torch.tensor(text, dtype=torch.long))) for text in law])
        out = model.base.generate(
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            max_new_tokens=1,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **options,
        )
        probs = out.scores[0].double().softmax(-1)
        law = {
            (*text, token): probability * float(probs[row, token])
            for row, (text, probability) in enumerate(law.items())
            for token in range(TOKENS)
        }
    return law


def _p_value(statistic, degrees):
    """Upper tail of chi-square, by Wilson and Hilferty's cube root."""
    place = ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(place / math.sqrt(2))


def _chi_square(texts, law):
    counts = dict.fromkeys(law, 0)
    for text in texts:
        counts[tuple(text)] += 1
    assert not any(counts[text] for text, probability in law.items() if probability == 0)
    expected = {text: probability * len(texts) for text, probability in law.items() if probability > 0}
    rare = [text for text in expected if expected[text] < 5]
    cells = [(counts[text], expected[text]) for text in expected if text not in rare]
    if rare:
        cells.append((sum(counts[text] for text in rare), sum(expected[text] for text in rare)))
    return _p_value(sum((found - wanted) ** 2 / wanted for found, wanted in cells), len(cells) - 1)


def _p_values(model, drafts, laws=LAWS):
    """One per setting and row of a batch of two prompts."""
    prompts = torch.tensor([[0, 2, 1], [3, 3, 0]])
    values = []
    for number, options in enumerate(LAWS[law] for law in laws):
        out = model.generate(
            prompts,
            do_sample=True,
            max_new_tokens=NEW,
            seed=40 + number,
            num_return_sequences=DRAWS,
            **options,
            **drafts,
        )
        for row in range(2):
            texts = out[row * DRAWS : (row + 1) * DRAWS, 3:].tolist()
            values.append(_chi_square(texts, _law(model, prompts[row : row + 1], options)))
    return values


def _holm(values, level=0.01):
    """Whether any null hypothesis is rejected."""
    return any(value < level / (len(values) - place) for place, value in enumerate(sorted(values)))


@pytest.mark.slow
def test_samples_follow_the_models_law_however_they_are_drafted(four_token_model):
    values = [
        value
        for drafts in ({}, {"tree": [(0,), (1,), (0, 0), (1, 0)]}, *DRAWN.values())
        for value in _p_values(four_token_model, drafts)
    ]
    assert len(values) == 30
    assert not _holm(values), sorted(values)[:5]


@pytest.mark.slow
def test_this_test_would_notice_a_wrong_residual(four_token_model, monkeypatch):
    monkeypatch.setattr("headway.functional.acceptance.residual", lambda target_V, draft_V, weight=1.0: target_V)
    assert _holm(_p_values(four_token_model, DRAWN["tokenwise"]))


@pytest.mark.slow
def test_this_test_would_notice_numbers_that_are_used_twice(four_token_model, monkeypatch):
    from headway.functional.sampling import KeyedDraws, inverse_cdf, keyed_uniform

    def reused(self, probs_V, place):
        # By absolute position: a block that looked at this draft may have decided because of it.
        return inverse_cdf(probs_V, keyed_uniform(self.seed, self.row, 0, self.made + place - 1))

    monkeypatch.setattr(KeyedDraws, "draft", reused)
    assert _holm(_p_values(four_token_model, DRAWN["tokenwise"]))


# A limit leaves one drawn draft fewer to decide about than it has room for, so only texts of four tokens reach a second depth.
PATHS = {
    "heads that draft at once": {"heads": "linear"},
    "a Markov bias": {"heads": "linear", "markov_rank": 4},
    "hydra": {"heads": "hydra"},
    "sequential modules": {"heads": "sequential"},
}
"""What the candidates of a node depend on: its depth, the token before, or its whole path."""
DRAWN_TREES = [
    ("heads that draft at once", "drawn tree", "warm, top-p"),
    ("a Markov bias", "drawn tree", "temperature 1"),
    ("hydra", "drawn tree", "cool, repetition penalty"),
    ("hydra", "block", "temperature 1"),
    ("sequential modules", "drawn tree", "temperature 1"),
]


def _p_values_of(heads, drafts, law):
    model = four_token_model_of(**PATHS[heads])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts at zero, as a Markov bias does, would let all paths say the same
        for parameter in model.heads.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
    return _p_values(model, DRAWN[drafts], [law])


@pytest.fixture
def two_depths(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "NEW", 4)
    monkeypatch.setattr(sys.modules[__name__], "DRAWS", 600)


@pytest.mark.usefixtures("two_depths")
def test_trees_drawn_by_heads_of_every_kind_follow_the_models_law():
    values = [value for case in DRAWN_TREES for value in _p_values_of(*case)]
    assert len(values) == 10
    assert not _holm(values), sorted(values)[:5]


@pytest.mark.usefixtures("two_depths")
@pytest.mark.parametrize("case", DRAWN_TREES[1:3], ids=lambda case: case[0])
def test_this_test_would_notice_draft_probabilities_of_another_path(case, monkeypatch):
    block = DrawnDrafter.block

    def crossed(self, standing, last_B1, *, depth):
        # The two nodes of the first depth account for their children by each other's distribution: no mistake, and not
        # noticed, where heads draft at once.
        found = block(self, standing, last_B1, depth=depth)
        probs = [
            {node: own.get({1: 2, 2: 1}.get(node, node), q) for node, q in own.items()} for own in found.draft_probs
        ]
        return replace(found, draft_probs=probs)

    monkeypatch.setattr(DrawnDrafter, "block", crossed)
    assert _holm(_p_values_of(*case))


# ------------------------------------------------------------------------------------- lengths that a controller chooses


def _lengths_from_the_past(monkeypatch):
    """Adversarial but allowed: how long a draft is depends on which tokens the forwards before gave."""

    def begin(self, remaining=0):
        self.length = getattr(self, "wanted", self.longest)
        self.lengths.append(self.length)
        return self.length

    tell = DecodingLoop._tell

    def told(self, controller, emissions, *args, **kwargs):
        controller.wanted = sum(self.rows[0][-1].tokens) % (controller.longest + 1)
        tell(self, controller, emissions, *args, **kwargs)

    monkeypatch.setattr(DraftController, "begin", begin)
    monkeypatch.setattr(DecodingLoop, "_tell", told)
    # One token more than elsewhere: the length of the first draft cannot depend on any token yet.
    monkeypatch.setattr(sys.modules[__name__], "NEW", 4)


@pytest.mark.slow
def test_drawn_drafts_follow_the_models_law_at_lengths_that_the_past_decides(four_token_model, monkeypatch):
    _lengths_from_the_past(monkeypatch)
    values = [
        value
        for drafts in DRAWN.values()
        for value in _p_values(four_token_model, drafts | {"num_draft_tokens": "auto"})
    ]
    assert not _holm(values), sorted(values)[:5]


@pytest.mark.slow
def test_this_test_would_notice_lengths_that_anticipate_the_draft(four_token_model, monkeypatch):
    _lengths_from_the_past(monkeypatch)
    block = DrawnDrafter.block

    def looking(self, standing, last_B1, *, depth):
        found = block(self, standing, last_B1, depth=depth)
        absent = [
            frozenset(range(1, len(row))) if len(row) > 1 and row[1] == 2 else own
            for row, own in zip(found.tokens_BM.tolist(), found.absent, strict=True)
        ]
        return replace(found, absent=absent)

    monkeypatch.setattr(DrawnDrafter, "block", looking)
    assert _holm(_p_values(four_token_model, DRAWN["tokenwise"] | {"num_draft_tokens": "auto"}))
