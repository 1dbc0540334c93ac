"""Prompts of a batch, brought to the form in which slot equals position.

Legend: B rows, T columns as given, P columns after the padding is taken out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.errors import DecodingError


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts in three views.

    Attributes:
        given_BT: the ids as the caller passed them, padding kept.
        history_BT: the same with padding at the end moved to the front, which is what logits processors and stopping
            criteria of transformers expect.
        ids_BP: the tokens alone, row by row from slot 0; shorter rows are filled by repeating their last token.
        lengths: number of tokens of each row.
    """

    given_BT: Tensor
    history_BT: Tensor
    ids_BP: Tensor
    lengths: list[int]

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)


def align_prompts(input_ids_BT: Tensor, attention_mask_BT: Tensor | None, *, vocabulary: int) -> Prompts:
    """Take the padding out of every row, wherever it is.

    >>> ids, mask = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    >>> prompts = align_prompts(ids, mask, vocabulary=10)
    >>> prompts.ids_BP
    tensor([[1, 2, 2],
            [3, 4, 5]])
    >>> prompts.history_BT
    tensor([[9, 9, 1, 2],
            [9, 3, 4, 5]])

    Args:
        input_ids_BT: token ids.
        attention_mask_BT: nonzero for tokens; None means that everything is a token.
        vocabulary: ids must be below it, padding excepted.

    Raises:
        DecodingError: no tokens at all, a row without tokens, ids outside the vocabulary, or shapes that differ.
    """
    if input_ids_BT.ndim != 2 or input_ids_BT.is_floating_point():
        raise DecodingError(
            f"input_ids must be whole numbers of shape [batch, positions]: got {tuple(input_ids_BT.shape)} of "
            f"{input_ids_BT.dtype}; pass tokenizer(text, return_tensors='pt').input_ids"
        )
    batch, columns = input_ids_BT.shape
    if batch == 0 or columns == 0:
        raise DecodingError(
            f"a prompt needs at least one token: got input_ids of shape {(batch, columns)}; start an empty text with "
            f"the tokenizer's bos or eos token"
        )
    given_BT = input_ids_BT.long()
    if attention_mask_BT is None:
        prompts = Prompts(given_BT, given_BT, given_BT, [columns] * batch)
    else:
        prompts = _without_padding(given_BT, attention_mask_BT)
    low, high = int(prompts.ids_BP.min()), int(prompts.ids_BP.max())
    if low < 0 or high >= vocabulary:
        raise DecodingError(
            f"token ids must be in 0..{vocabulary - 1}: got {low if low < 0 else high}; use the tokenizer the model was "
            f"trained with, and mask padding ids with attention_mask"
        )
    return prompts


def _without_padding(given_BT: Tensor, attention_mask_BT: Tensor) -> Prompts:
    if attention_mask_BT.shape != given_BT.shape:
        raise DecodingError(
            f"attention_mask must have the shape of input_ids: got {tuple(attention_mask_BT.shape)} for "
            f"{tuple(given_BT.shape)}; pass one 0 or 1 per token"
        )
    present_BT = attention_mask_BT.to(given_BT.device).bool()
    lengths_B = present_BT.sum(dim=1)
    lengths: list[int] = lengths_B.tolist()
    if min(lengths) == 0:
        raise DecodingError(
            f"row {lengths.index(0)} of the batch has no token: its attention_mask is all 0; give it at least one "
            f"token (bos or eos) or leave the row out"
        )
    longest = max(lengths)
    # A stable sort by "is padding" moves the tokens to the front in their order.
    order_BT = (~present_BT).to(torch.uint8).argsort(dim=1, stable=True)
    columns_BP = torch.arange(longest, device=given_BT.device).minimum(lengths_B[:, None] - 1)
    ids_BP = given_BT.gather(1, order_BT).gather(1, columns_BP)
    trailing_B = present_BT.flip(1).to(torch.uint8).argmax(dim=1)
    columns = given_BT.shape[1]
    rolled_BT = (torch.arange(columns, device=given_BT.device) - trailing_B[:, None]) % columns
    return Prompts(given_BT, given_BT.gather(1, rolled_BT), ids_BP, lengths)


def has_inner_padding(attention_mask_BT: Tensor | None) -> bool:
    """Whether some row has masked tokens between its first and its last unmasked one.

    >>> has_inner_padding(torch.tensor([[0, 1, 1, 0]])), has_inner_padding(torch.tensor([[1, 0, 1, 1]]))
    (False, True)
    """
    if attention_mask_BT is None:
        return False
    present_BT = attention_mask_BT.bool().to(torch.uint8)
    seen_before = present_BT.cummax(dim=1).values
    seen_after = present_BT.flip(1).cummax(dim=1).values.flip(1)
    return bool(((seen_before & seen_after) > present_BT).any())
