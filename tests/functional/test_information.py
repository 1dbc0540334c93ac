"""The decomposition of two tokens' entropies, against sums written out and against sources known in closed form."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.functional.information import (
    joint_log_probs,
    observed_pair_information,
    pair_information,
    relative_pair_information,
    value_deviation,
)

TERMS = ("entropy_x", "entropy_y", "entropy_x_given_y", "entropy_y_given_x", "mutual_information")
EXACT = {"rel": 1e-12, "abs": 1e-12}


def random_joint(seed, rows=4, columns=5, *, zeros=False):
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(rows, columns, generator=generator, dtype=torch.float64) ** 3
    if zeros:
        table[0, 1] = 0
        table[:, 2] = 0
        table[3, :] = 0
    return table / table.sum()


def by_definition(p, q):
    """Definitions L.1 and L.2 with Python's own sums: cross-entropies, and a difference of two divergences."""
    rows, columns = range(p.shape[0]), range(p.shape[1])
    p, q = p.tolist(), q.tolist()
    px, py = [sum(row) for row in p], [sum(row[y] for row in p) for y in columns]
    qx, qy = [sum(row) for row in q], [sum(row[y] for row in q) for y in columns]
    cells = [(x, y) for x, y in itertools.product(rows, columns) if p[x][y]]

    def divergence(model):
        return math.fsum(p[x][y] * math.log(p[x][y] / model(x, y)) for x, y in cells)

    return {
        "entropy_x": -math.fsum(px[x] * math.log(qx[x]) for x in rows if px[x]),
        "entropy_y": -math.fsum(py[y] * math.log(qy[y]) for y in columns if py[y]),
        "entropy_x_given_y": math.fsum(
            py[y] * -math.fsum(p[x][y] / py[y] * math.log(q[x][y] / qy[y]) for x in rows if p[x][y])
            for y in columns
            if py[y]
        ),
        "entropy_y_given_x": math.fsum(
            px[x] * -math.fsum(p[x][y] / px[x] * math.log(q[x][y] / qx[x]) for y in columns if p[x][y])
            for x in rows
            if px[x]
        ),
        "mutual_information": divergence(lambda x, y: qx[x] * qy[y]) - divergence(lambda x, y: q[x][y]),
    }


@pytest.mark.parametrize("zeros", [False, True])
def test_every_term_equals_its_definition(zeros):
    truth, model = random_joint(1, zeros=zeros), random_joint(2, zeros=zeros)
    wanted = by_definition(truth, model)
    found = relative_pair_information(truth.log(), model.log())
    for term in TERMS:
        assert float(getattr(found, term)) == pytest.approx(wanted[term], **EXACT), term
    assert abs(wanted["mutual_information"]) > 1e-3


def test_of_one_distribution_they_are_entropies_and_mutual_information():
    joint = random_joint(3, zeros=True)
    wanted = by_definition(joint, joint)
    found = pair_information(joint.log())
    for term in TERMS:
        assert float(getattr(found, term)) == pytest.approx(wanted[term], **EXACT), term
    assert float(found.mutual_information) > 0


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_loss_of_two_tokens_splits_as_equation_3_and_lemma_l3_say(truth_seed, model_seed):
    truth, model = random_joint(truth_seed).log(), random_joint(model_seed).log()
    for terms in (relative_pair_information(truth, model), pair_information(truth)):
        information = terms.mutual_information
        assert float(terms.entropy_x - terms.entropy_x_given_y - information) == pytest.approx(0, abs=1e-12)
        assert float(terms.entropy_y - terms.entropy_y_given_x - information) == pytest.approx(0, abs=1e-12)
        whole = terms.entropy_x_given_y + 2 * information + terms.entropy_y_given_x
        assert float(terms.entropy_x + terms.entropy_y - whole) == pytest.approx(0, abs=1e-12)


def test_relative_information_is_symmetric_and_may_be_negative():
    truth, model = random_joint(4).log(), random_joint(5).log()
    forth = relative_pair_information(truth, model).mutual_information
    back = relative_pair_information(truth.T, model.T).mutual_information
    assert float(forth) == pytest.approx(float(back), **EXACT)
    together, apart = torch.tensor([[0.49, 0.01], [0.01, 0.49]]).double(), torch.tensor([[0.01, 0.49], [0.49, 0.01]])
    assert float(relative_pair_information(apart.double().log(), together.log()).mutual_information) < -1


def test_an_observed_pair_is_a_truth_that_is_certain_of_it():
    model = torch.stack([random_joint(seed) for seed in range(3)]).log()
    x, y = torch.tensor([0, 3, 2]), torch.tensor([4, 0, 1])
    found = observed_pair_information(model, x, y)
    for place in range(3):
        truth = torch.zeros(4, 5, dtype=torch.float64)
        truth[x[place], y[place]] = 1
        wanted = relative_pair_information(truth.log(), model[place])
        for term in TERMS:
            assert float(getattr(found, term)[place]) == pytest.approx(float(getattr(wanted, term)), **EXACT), term


def test_observed_pairs_average_to_the_terms_of_their_empirical_distribution():
    model = random_joint(7).log()
    pairs = [(0, 1), (0, 1), (2, 4), (3, 0), (2, 2)]
    empirical = torch.zeros(4, 5, dtype=torch.float64)
    for x, y in pairs:
        empirical[x, y] += 1 / len(pairs)
    wanted = relative_pair_information(empirical.log(), model)
    found = observed_pair_information(model.expand(5, 4, 5), *torch.tensor(pairs).T)
    for term in TERMS:
        assert float(getattr(found, term).mean()) == pytest.approx(float(getattr(wanted, term)), **EXACT), term


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.3, 0.5])
def test_a_binary_symmetric_source_has_its_terms_in_closed_form(flip):
    def h(e):
        return -sum(p * math.log(p) for p in (e, 1 - e) if p)

    step = torch.tensor([[1 - flip, flip], [flip, 1 - flip]], dtype=torch.float64).log()
    found = pair_information(joint_log_probs(step[0], step))
    twice = 2 * flip * (1 - flip)
    assert float(found.entropy_x) == pytest.approx(h(flip), **EXACT)
    assert float(found.entropy_y) == pytest.approx(h(twice), **EXACT)
    assert float(found.entropy_y_given_x) == pytest.approx(h(flip), **EXACT)
    assert float(found.mutual_information) == pytest.approx(h(twice) - h(flip), **EXACT)
    assert float(found.entropy_x_given_y) == pytest.approx(2 * h(flip) - h(twice), **EXACT)


def test_what_decides_everything_has_all_the_information_and_what_decides_nothing_none():
    first = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    deciding = pair_information(joint_log_probs(first, torch.eye(3, dtype=torch.float64).log()))
    assert float(deciding.mutual_information) == pytest.approx(float(deciding.entropy_x), **EXACT)
    assert float(deciding.entropy_y_given_x) == 0
    idle = pair_information(joint_log_probs(first, first.expand(3, 3)))
    assert float(idle.mutual_information) == pytest.approx(0, abs=1e-12)


def test_sigma_is_the_deviation_of_what_the_next_token_leaves_open():
    first = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).log()
    after = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    # Values -ln 2 with probability 1/4 and 0 with 3/4.
    wanted = math.log(2) * math.sqrt(0.25 * 0.75)
    assert float(value_deviation(joint_log_probs(first, after))) == pytest.approx(wanted, **EXACT)
    # Two tokens that settle different things equally well: no deviation, all the information.
    swap = joint_log_probs(first, torch.eye(3, dtype=torch.float64).log())
    assert float(value_deviation(swap)) == 0
    assert float(pair_information(swap).mutual_information) > 0.5
