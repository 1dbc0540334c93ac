"""Prompts of a batch, brought to the form in which slot equals position.

Legend: B rows, T columns as given, P columns after the padding is taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.errors import DecodingError


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts without padding.

    Attributes:
        ids_BP: the tokens of each row from slot 0 on; shorter rows are filled by repeating their last token.
        lengths: number of tokens of each row.
    """

    ids_BP: Tensor
    lengths: list[int]

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)


def check_ids(input_ids: Tensor) -> None:
    """Refuse what is not a batch of token ids.

    Raises:
        DecodingError: another shape or kind of number, or no token at all.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = f"{tuple(input_ids.shape)} of {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids)
        raise DecodingError(
            f"input_ids must be a tensor of whole numbers [batch, positions]: got {got}; pass "
            f"tokenizer(text, return_tensors='pt').input_ids"
        )
    if input_ids.numel() == 0:
        raise DecodingError(
            f"a prompt needs at least one token: got input_ids of shape {tuple(input_ids.shape)}; start an empty text "
            f"with the tokenizer's bos or eos token"
        )


def check_mask(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> None:
    """Refuse a mask that does not say for every token whether it counts, or under which a row is empty.

    Raises:
        DecodingError: another shape, or a row of zeros.
    """
    if attention_mask_BT.shape != input_ids_BT.shape:
        raise DecodingError(
            f"attention_mask must have the shape of input_ids: got {tuple(attention_mask_BT.shape)} for "
            f"{tuple(input_ids_BT.shape)}; pass one 0 or 1 per token"
        )
    lengths: list[int] = attention_mask_BT.bool().sum(dim=1).tolist()
    if min(lengths) == 0:
        raise DecodingError(
            f"row {lengths.index(0)} of the batch has no token: its attention_mask is all 0; give it at least one "
            f"token (bos or eos) or leave the row out"
        )


def infer_mask(input_ids_BT: Tensor, *, pad_token_id: int | None, eos_token_ids: Sequence[int]) -> Tensor | None:
    """The mask that transformers infers where none is given: every pad id is padding, unless it can also end a text.

    >>> infer_mask(torch.tensor([[0, 5, 0, 6]]), pad_token_id=0, eos_token_ids=[2])
    tensor([[0, 1, 0, 1]])
    >>> infer_mask(torch.tensor([[0, 5, 0, 6]]), pad_token_id=0, eos_token_ids=[2, 0]) is None
    True
    """
    if pad_token_id is None or pad_token_id in eos_token_ids:
        return None
    mask_BT = (input_ids_BT != pad_token_id).long()
    return None if bool(mask_BT.all()) else mask_BT


def pad_left(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding at the end of each row to its front, where transformers' processors expect it.

    >>> ids, mask = pad_left(torch.tensor([[9, 1, 2, 9]]), torch.tensor([[0, 1, 1, 0]]))
    >>> ids.tolist(), mask.tolist()
    ([[9, 9, 1, 2]], [[0, 0, 1, 1]])
    """
    columns = input_ids_BT.shape[1]
    trailing_B = attention_mask_BT.bool().flip(1).to(torch.uint8).argmax(dim=1)
    source_BT = (torch.arange(columns, device=input_ids_BT.device) - trailing_B[:, None]) % columns
    return input_ids_BT.gather(1, source_BT), attention_mask_BT.gather(1, source_BT)


def has_inner_padding(attention_mask_BT: Tensor) -> bool:
    """Whether some row has masked tokens between its first and its last unmasked one.

    >>> has_inner_padding(torch.tensor([[0, 1, 1, 0]])), has_inner_padding(torch.tensor([[1, 0, 1, 1]]))
    (False, True)
    """
    present_BT = attention_mask_BT.bool().to(torch.uint8)
    seen_before = present_BT.cummax(dim=1).values
    seen_after = present_BT.flip(1).cummax(dim=1).values.flip(1)
    return bool(((seen_before & seen_after) > present_BT).any())


def align_prompts(input_ids_BT: Tensor, attention_mask_BT: Tensor | None, *, vocabulary: int) -> Prompts:
    """Take the padding out of every row, wherever it is.

    >>> ids, mask = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    >>> align_prompts(ids, mask, vocabulary=10).ids_BP
    tensor([[1, 2, 2],
            [3, 4, 5]])

    Args:
        input_ids_BT: token ids.
        attention_mask_BT: nonzero for tokens; None means that everything is a token.
        vocabulary: ids must be below it, padding excepted.

    Raises:
        DecodingError: no tokens at all, a row without tokens, ids outside the vocabulary, or shapes that differ.
    """
    check_ids(input_ids_BT)
    batch, columns = input_ids_BT.shape
    prompts = Prompts(input_ids_BT.long(), [columns] * batch)
    if attention_mask_BT is not None:
        check_mask(input_ids_BT, attention_mask_BT)
        prompts = _without_padding(input_ids_BT.long(), attention_mask_BT.to(input_ids_BT.device).bool())
    low, high = int(prompts.ids_BP.min()), int(prompts.ids_BP.max())
    if low < 0 or high >= vocabulary:
        raise DecodingError(
            f"token ids must be in 0..{vocabulary - 1}: got {low if low < 0 else high}; use the tokenizer that the "
            f"model was trained with, and mask padding ids with attention_mask"
        )
    return prompts


def _without_padding(ids_BT: Tensor, present_BT: Tensor) -> Prompts:
    lengths_B = present_BT.sum(dim=1)
    # A stable sort by "is padding" moves the tokens to the front in their order.
    order_BT = (~present_BT).to(torch.uint8).argsort(dim=1, stable=True)
    columns_P = torch.arange(int(lengths_B.max()), device=ids_BT.device)
    columns_BP = columns_P.minimum(lengths_B[:, None] - 1)
    return Prompts(ids_BT.gather(1, order_BT).gather(1, columns_BP), lengths_B.tolist())
