"""The analysis of a text, on models whose distributions are known and against forwards made one at a time."""

import math

import pytest
import torch
from transformers import LlamaConfig

from head_cases import head_model
from headway.errors import ConfigError, DataError
from headway.evaluation.continuations import Continuations
from headway.evaluation.information import analyze_text
from headway.evaluation.offset_logits import evaluation_mode
from headway.functional.information import joint_log_probs, pair_information
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import FAMILIES, random_tokens, tiny_model

STATES = 5
# HF's RMSNorm computes in float32 even in a float64 model.
CLOSE = {"rel": 1e-5, "abs": 1e-6}


def chain(seed=0):
    """Transition probabilities of a Markov source, no two rows alike."""
    table = torch.rand(STATES, STATES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 0.02
    return table / table.sum(1, keepdim=True)


def markov_model(step, second):
    """A llama whose layers add nothing: its next token follows the chain `step`, its head 2 the table `second`."""
    width = 8
    config = LlamaConfig(
        vocab_size=STATES,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = MultiTokenLM.from_config(
        config, MultiTokenConfig(num_future_tokens=2, heads="replicated_unembedding")
    ).double()
    with torch.no_grad():
        for layer in model.family.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # One-hot embeddings, which the norm scales to sqrt(width): logits are the rows of the table.
        model.base.model.embed_tokens.weight.copy_(torch.eye(STATES, width))
        for matrix, table in ((model.family.lm_head, step), (model.heads.unembeddings[0], second)):
            matrix.weight.zero_()
            matrix.weight[:, :STATES] = table.log().T / math.sqrt(width)
    return model.eval()


@pytest.mark.parametrize("candidates", [None, STATES])
def test_a_markov_source_is_analysed_as_its_transition_table_says(candidates):
    step = chain()
    twice = step @ step
    text = torch.randint(0, STATES, (40,), generator=torch.Generator().manual_seed(1))
    result = analyze_text(markov_model(step, twice), text, candidates=candidates, context_tokens=16)
    assert result.exact
    assert result.positions == 38
    entropy = -(step * step.log()).sum(1)
    for index in range(result.positions):
        s, x, y = (int(text[index + ahead]) for ahead in range(3))
        entropy_y = float(-(twice[s] * twice[s].log()).sum())
        entropy_y_given_x = float(step[s] @ entropy)
        information = entropy_y - entropy_y_given_x
        assert result.belief.entropy_x[index] == pytest.approx(float(entropy[s]), **CLOSE)
        assert result.belief.entropy_y[index] == pytest.approx(entropy_y, **CLOSE)
        assert result.belief.entropy_y_given_x[index] == pytest.approx(entropy_y_given_x, **CLOSE)
        assert result.belief.mutual_information[index] == pytest.approx(information, **CLOSE)
        assert result.belief.entropy_x_given_y[index] == pytest.approx(float(entropy[s]) - information, **CLOSE)
        variance = float(step[s] @ entropy**2 - (step[s] @ entropy) ** 2)
        assert result.value_deviation[index] == pytest.approx(math.sqrt(variance), abs=1e-5)
        assert result.observed.entropy_x[index] == pytest.approx(-math.log(step[s, x]), **CLOSE)
        assert result.observed.entropy_y[index] == pytest.approx(-math.log(twice[s, y]), **CLOSE)
        assert result.observed.entropy_y_given_x[index] == pytest.approx(-math.log(step[x, y]), **CLOSE)
        assert result.observed.mutual_information[index] == pytest.approx(math.log(step[x, y] / twice[s, y]), **CLOSE)
        # Head 2 knows all that there is to know.
        assert result.second_head.divergence[index] == pytest.approx(0, abs=1e-6)
        assert result.second_head.nats[index] == pytest.approx(-math.log(twice[s, y]), **CLOSE)
        assert result.second_head.agrees[index]


def test_a_head_that_believes_something_else_is_as_far_off_as_its_divergence_says():
    step = chain()
    wrong = chain(seed=3)
    text = torch.randint(0, STATES, (12,), generator=torch.Generator().manual_seed(2))
    result = analyze_text(markov_model(step, wrong), text)
    twice = step @ step
    for index in range(result.positions):
        s = int(text[index])
        divergence = float((twice[s] * (twice[s] / wrong[s]).log()).sum())
        assert result.second_head.divergence[index] == pytest.approx(divergence, **CLOSE)
        assert result.second_head.agrees[index] == bool(twice[s].argmax() == wrong[s].argmax())
    assert min(result.second_head.divergence) > 0


def test_choice_points_are_where_the_next_token_decides_what_follows():
    # From state 0 the chain chooses between two loops, 1 2 1 2 ... and 3 4 3 4 ...; elsewhere nothing is decided.
    step = torch.full((STATES, STATES), 1e-6, dtype=torch.float64)
    step[0, 1] = step[0, 3] = 0.5
    for here, there in ((1, 2), (2, 1), (3, 4), (4, 3)):
        step[here, there] = 1.0
    step /= step.sum(1, keepdim=True)
    text = torch.tensor([1, 2, 0, 3, 4, 3, 4, 0, 1, 2, 1, 2])
    result = analyze_text(markov_model(step, step @ step), text)
    assert result.choice_points(0.2) == (2, 7)
    assert result.belief.mutual_information[2] == pytest.approx(math.log(2), abs=1e-3)
    assert result.belief.mutual_information[3] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "gemma3_text", "gpt2", "mistral-sliding"])
def test_continuations_equal_forwards_made_one_at_a_time(family):
    assert family in FAMILIES
    model = tiny_model(family, dtype=torch.float64)
    text = random_tokens(17, seed=3)
    positions, candidates = torch.tensor([0, 4, 5, 16]), random_tokens(4, 3, seed=4)
    with evaluation_mode(model):
        reader = Continuations(model, text, max_queries=12)
        found = [reader.log_probs(positions, candidates) for _ in range(2)]
        for row, position in enumerate(positions.tolist()):
            for column in range(3):
                whole = torch.cat((text[: position + 1], candidates[row, column, None]))[None]
                wanted = model.base(input_ids=whole, use_cache=False).logits[0, -1].double().log_softmax(-1)
                torch.testing.assert_close(found[0][row, column], wanted, rtol=1e-5, atol=1e-6)
    # The queries of a call leave nothing behind for the next one.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["transformer", "anticausal", "sequential", "hydra", "transformer-markov"])
def test_heads_of_every_kind_are_compared_with_what_they_can_know(architecture):
    model = head_model(architecture, dtype=torch.float64, num_future_tokens=3)
    text = random_tokens(9, seed=5)
    result = analyze_text(model, text, context_tokens=16)
    with torch.no_grad():
        logits = model(text[None], return_future_logits=True).future_logits[0].log_softmax(-1)
        for index in range(result.positions):
            rows = [model(torch.tensor([[*text[: index + 1].tolist(), x]])).logits[0, -1] for x in range(40)]
            after = torch.stack(rows).log_softmax(-1)
            joint = joint_log_probs(logits[index, 0], after)
            target = after[text[index + 1]] if model.heads.autoregressive else joint.logsumexp(0)
            divergence = float((target.exp() * (target - logits[index, 1])).sum())
            assert result.second_head.divergence[index] == pytest.approx(divergence, rel=1e-4, abs=1e-5)
            wanted = float(pair_information(joint).mutual_information)
            assert result.belief.mutual_information[index] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert result.second_head.reads_next_token == model.heads.autoregressive


def test_windows_change_the_context_and_nothing_else():
    model = tiny_model(num_future_tokens=1)
    text = random_tokens(30, seed=6)
    whole, cut = analyze_text(model, text), analyze_text(model, text, context_tokens=12)
    assert whole.second_head is None
    assert cut.positions == whole.positions == 28
    assert cut.belief.entropy_x[:10] == pytest.approx(whole.belief.entropy_x[:10], abs=1e-5)
    # Position 20 is read in a window that begins at 16: half a window of context.
    alone = analyze_text(model, text[4:16], context_tokens=12)
    assert cut.belief.entropy_x[10:14] == pytest.approx(alone.belief.entropy_x[6:10], abs=1e-5)


def test_fewer_candidates_leave_probability_out_and_keep_every_identity():
    model = tiny_model()
    text = random_tokens(12, seed=7)
    exact, few = analyze_text(model, text), analyze_text(model, text, candidates=5)
    assert exact.exact
    assert max(exact.left_out) < 1e-6
    assert not few.exact
    assert min(few.left_out) > 0
    with torch.no_grad():
        probs = model(text[None]).logits[0].double().softmax(-1)
    for index in range(few.positions):
        kept = set(probs[index].topk(5).indices.tolist())
        came = int(text[index + 1])
        if came not in kept:
            kept = set(probs[index].topk(4).indices.tolist()) | {came}
        mass = float(probs[index, sorted(kept)].sum())
        assert few.left_out[index] == pytest.approx(1 - mass, abs=1e-5)
        assert few.observed.entropy_x[index] == pytest.approx(-math.log(probs[index, came] / mass), abs=1e-4)
    for terms in (few.belief, few.observed):
        for x, y, x_y, y_x, information in zip(*vars(terms).values(), strict=True):
            assert x + y == pytest.approx(x_y + 2 * information + y_x, abs=1e-9)


def test_wrong_settings_name_their_limits():
    model = tiny_model()
    with pytest.raises(DataError, match="3 tokens or more"):
        analyze_text(model, random_tokens(2))
    with pytest.raises(ConfigError, match=r"1\.\.1024"):
        analyze_text(model, random_tokens(9), candidates=0)
    with pytest.raises(ConfigError, match="at least 8"):
        analyze_text(model, random_tokens(9), context_tokens=4)
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        analyze_text(model, random_tokens(9)).choice_points(1.5)
    with evaluation_mode(model):
        reader = Continuations(model, random_tokens(9), max_queries=4)
        with pytest.raises(ConfigError, match="pass fewer positions"):
            reader.log_probs(torch.tensor([1, 2]), random_tokens(2, 3))
        with pytest.raises(ConfigError, match=r"0\.\.8"):
            reader.log_probs(torch.tensor([9]), random_tokens(1, 3))


def test_a_large_vocabulary_is_tried_at_its_likeliest_tokens():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1500,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=2)).eval()
    text = torch.randint(0, 1500, (10,), generator=torch.Generator().manual_seed(1))
    result = analyze_text(model, text)
    assert (result.candidates, result.vocabulary_size, result.exact) == (64, 1500, False)
    assert 0 < min(result.left_out) <= max(result.left_out) < 1
    assert all(math.isfinite(nats) for nats in result.observed.entropy_x)
