"""Entropies and mutual information of the next token X and the one after it, Y.

Legend: ... any leading dimensions (positions of a text), C values of X, V values of Y.

All in nats. For one distribution (the model's own beliefs)

    H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X)

and for a truth p and a model q the same with cross-entropies and the relative mutual information of the paper's
Definition L.2, which is symmetric and may be negative:

    I_{p||q}(X;Y) = D(p || q_X q_Y) - D(p || q) = H(p_X, q_X) + H(p_Y, q_Y) - H(p, q)
    H(p_X, q_X) = H(p_{X|Y}, q_{X|Y}) + I_{p||q}(X;Y)                                            (Lemma L.3)

The left side of the first line is then the loss of 2-token prediction. H(Y|X) comes again at the next position, as that
position's H(X); predicting two tokens so counts twice what the next token tells about the one after it.

Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 5.2 (eq. 3) and appendix L.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairInformation:
    """The terms of the decomposition, each of the leading shape; cross-entropies where truth and model differ.

    Attributes:
        entropy_x: H(X).
        entropy_y: H(Y).
        entropy_x_given_y: H(X|Y).
        entropy_y_given_x: H(Y|X).
        mutual_information: I(X;Y).
    """

    entropy_x: Tensor
    entropy_y: Tensor
    entropy_x_given_y: Tensor
    entropy_y_given_x: Tensor
    mutual_information: Tensor


def joint_log_probs(log_x_C: Tensor, log_y_given_x_CV: Tensor) -> Tensor:
    """Log p(x, y) [..., C, V] from log p(x) [..., C] and log p(y|x) [..., C, V]."""
    return log_x_C[..., None] + log_y_given_x_CV


def pair_information(log_joint_CV: Tensor) -> PairInformation:
    """Entropies and mutual information of one joint distribution.

    >>> even = torch.full((2, 2), 0.25, dtype=torch.float64).log()  # two fair coins that know nothing of each other
    >>> float(pair_information(even).mutual_information), round(float(pair_information(even).entropy_x), 4)
    (0.0, 0.6931)

    Args:
        log_joint_CV: log p(x, y) [..., C, V], normalised; -inf where the probability is 0.
    """
    return relative_pair_information(log_joint_CV, log_joint_CV)


def relative_pair_information(log_truth_CV: Tensor, log_model_CV: Tensor) -> PairInformation:
    """Cross-entropies and relative mutual information of a truth p and a model q, both joint distributions.

    With p = q these are entropies and mutual information.

    Args:
        log_truth_CV: log p(x, y) [..., C, V].
        log_model_CV: log q(x, y) of the same shape; terms are infinite where it is 0 and p is not.
    """
    truth_CV = log_truth_CV.exp()
    model_x_C1 = log_model_CV.logsumexp(-1, keepdim=True)
    model_y_1V = log_model_CV.logsumexp(-2, keepdim=True)

    def expected(log_CV: Tensor) -> Tensor:
        # 0 log 0 is 0.
        return torch.where(truth_CV > 0, truth_CV * log_CV, 0.0).sum(dim=(-2, -1))

    return PairInformation(
        entropy_x=-expected(model_x_C1.expand_as(truth_CV)),
        entropy_y=-expected(model_y_1V.expand_as(truth_CV)),
        entropy_x_given_y=-expected(log_model_CV - model_y_1V),
        entropy_y_given_x=-expected(log_model_CV - model_x_C1),
        mutual_information=expected(log_model_CV - model_x_C1 - model_y_1V),
    )


def observed_pair_information(log_joint_CV: Tensor, x: Tensor, y: Tensor) -> PairInformation:
    """The terms for a truth that is one observed pair: what a text adds to the mean over its positions.

    Equal to `relative_pair_information` with a truth that is 1 at (x, y). Averaged over the positions of a text, the
    text's empirical distribution is the truth; the mutual information of one position is the pointwise one.

    Args:
        log_joint_CV: log q(x, y) [..., C, V].
        x: row of the token that came next, int64 [...].
        y: column of the one after it, int64 [...].
    """
    log_x_C, log_y_V = log_joint_CV.logsumexp(-1), log_joint_CV.logsumexp(-2)
    log_x = log_x_C.gather(-1, x[..., None])[..., 0]
    log_y = log_y_V.gather(-1, y[..., None])[..., 0]
    row_V = log_joint_CV.gather(-2, x[..., None, None].expand(*x.shape, 1, log_joint_CV.shape[-1]))[..., 0, :]
    log_xy = row_V.gather(-1, y[..., None])[..., 0]
    return PairInformation(
        entropy_x=-log_x,
        entropy_y=-log_y,
        entropy_x_given_y=log_y - log_xy,
        entropy_y_given_x=log_x - log_xy,
        mutual_information=log_xy - log_x - log_y,
    )


def value_deviation(log_joint_CV: Tensor) -> Tensor:
    """How much the value of the state depends on the next token: sigma(t) = sqrt(Var_{x ~ p}[V(x)]), shape [...].

    The paper calls a step with a large sigma a choice point, for the value V of any reward. Here the reward is the
    log-probability of the one token after the choice, so that V(x) = -H(Y | X = x): sigma is large where some next tokens
    settle what follows and others leave it open. It does not see two tokens that settle different things equally well;
    I(X;Y) does.

    Args:
        log_joint_CV: log p(x, y) [..., C, V].

    Source: Gloeckle et al. 2024, appendix L.3.
    """
    log_x_C = log_joint_CV.logsumexp(-1)
    probs_C = log_x_C.exp()
    log_y_given_x_CV = torch.where(probs_C[..., None] > 0, log_joint_CV - log_x_C[..., None], -torch.inf)
    value_C = torch.where(log_y_given_x_CV > -torch.inf, log_y_given_x_CV.exp() * log_y_given_x_CV, 0.0).sum(-1)
    mean = (probs_C * value_C).sum(-1, keepdim=True)
    return (probs_C * (value_C - mean).square()).sum(-1).sqrt()
