"""Which drafted tokens stand: acceptance rules as pure functions of tokens.

Legend: B rows, K drafted tokens of a chain, M = K + 1 positions of a block (the last known token and the draft).
"""

from __future__ import annotations

from torch import Tensor


def accept_greedy_chain(draft_BK: Tensor, target_BM: Tensor) -> Tensor:
    """Number of drafted tokens, from the front, that greedy decoding would have chosen itself.

    Equal to: feed the tokens one by one and count until the first that differs from the model's own choice. A row then
    emits `accepted + 1` tokens, `target_BM[row, : accepted + 1]`: each accepted draft equals the target at its place,
    and the target after the last accepted one is the model's own next token. Draft tokens after the first wrong one
    never count, even where they happen to agree.

    >>> import torch
    >>> draft = torch.tensor([[5, 6, 7], [5, 9, 7], [9, 6, 7]])
    >>> target = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    >>> accept_greedy_chain(draft, target)
    tensor([3, 1, 0])

    Args:
        draft_BK: proposed tokens; item j is the proposal for the token that `target_BM[:, j]` decides.
        target_BM: the model's own choice after the last known token (item 0) and after each draft token.

    Returns:
        int64 [B], each 0..K.

    Raises:
        ValueError: shapes that do not belong together.

    Source: Stern et al. 2018 (arXiv:1811.03115), section 3, "verify" and "accept"; Gloeckle et al. 2024
    (arXiv:2404.19737), section 3.2, uses it with the model's own extra heads.
    """
    if draft_BK.ndim != 2 or target_BM.shape != (draft_BK.shape[0], draft_BK.shape[1] + 1):
        raise ValueError(
            f"a chain of K drafted tokens needs K + 1 targets per row: got draft {tuple(draft_BK.shape)} and target "
            f"{tuple(target_BM.shape)}; pass the target after the last known token and after every drafted one"
        )
    return (draft_BK == target_BM[:, :-1]).cumprod(dim=1).sum(dim=1)
