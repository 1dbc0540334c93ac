"""Where the model's own tokens stand among its heads' candidates.

Legend: W windows, T positions of one text, K heads, P positions of one chunk, V vocabulary, S tokens of a draft vocabulary.

The rank of a token at offset k from position t is how many tokens head k finds likelier there. Heads that draft in turn are
told the text's own tokens in between: a path of a tree goes on only below tokens that are right, and there they are told
just these. So one pass over a text gives the ranks for heads of every kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway.decoding.calibration.walk import RankedText
from headway.decoding.engine import ENGINE, decoding_context
from headway.errors import DataError

_CHUNK = 256
"""Positions whose logits are alive at once."""


def text_windows(tokens: Sequence[int], *, count: int, length: int) -> Tensor:
    """Windows [W, length], spread evenly over a text; fewer than `count` where it has no more places.

    Raises:
        DataError: a text of fewer tokens than one window.
    """
    places = len(tokens) - length + 1
    if places < 1:
        raise DataError(
            f"the text has {len(tokens)} tokens, one window takes {length}; pass a longer text, or shorter prompts and "
            f"continuations"
        )
    count = min(count, places)
    starts = [round(index * (places - 1) / max(1, count - 1)) for index in range(count)]
    return torch.tensor([list(tokens[start : start + length]) for start in starts])


def sampling_arguments(temperature: float, *, seed: int) -> dict[str, Any]:
    """Of `generate`: greedy at temperature 0, else drawn from the whole vocabulary."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": seed}


def own_continuations(
    model: Any,
    prompts_WT: Tensor,
    *,
    new_tokens: int,
    executor: str,
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Each prompt with the model's continuation, greedy or drawn.

    Args:
        model: a `MultiTokenLM`.
        prompts_WT: without padding.
        new_tokens: of each continuation; fewer where the model ends the text.
        executor: what runs the model.
        batch: rows decoded together.
        temperature: at which tokens are drawn; 0 for the likeliest.
        seed: of the first drawn batch; a batch's seed is this plus the number of the windows before it.
    """
    device = model.get_input_embeddings().weight.device
    texts: list[list[int]] = []
    for begin, prompts_BT in enumerate(_pieces(prompts_WT, batch)):
        result = ENGINE.generate(
            model,
            prompts_BT.to(device),
            attention_mask=torch.ones_like(prompts_BT, device=device),
            max_new_tokens=new_tokens,
            executor=executor,
            return_dict_in_generate=True,
            **sampling_arguments(temperature, seed=seed + begin * batch),
        )
        if result.acceptance.interrupted:
            # Half a text would be measured as if it were whole.
            raise KeyboardInterrupt
        lengths = result.num_new_tokens + prompts_BT.shape[1]
        texts += [row[:length].tolist() for row, length in zip(result.sequences, lengths.tolist(), strict=True)]
    return texts


def ranked_text(
    model: Any,
    tokens: Sequence[int],
    *,
    prompt_tokens: int,
    num_ranks: int,
    written: bool,
    draft_vocabularies: Sequence[Sequence[int] | None] = (None,),
) -> list[RankedText]:
    """Ranks along one text, one item for each draft vocabulary.

    Args:
        model: a `MultiTokenLM`.
        tokens: of the text.
        prompt_tokens: the first start is the last of these.
        num_ranks: higher ranks are -1.
        written: whether the model wrote the text after the prompt: its own tokens then are the text's. Else they are what it
            would have written at each position of the text.
        draft_vocabularies: ids that the heads score, None for all.

    Returns:
        Texts with the starts from which every offset has a token; none where the text is too short.
    """
    heads = model.num_future_tokens - 1
    device = model.get_input_embeddings().weight.device
    ids_1T = torch.tensor([list(tokens)], device=device)
    with decoding_context(model):
        states = model.offset_hidden_states(ids_1T, use_cache=False)
        chosen_T = torch.cat(
            [model.unembed(part_PD).argmax(dim=-1) for part_PD in _pieces(states.last_hidden_BTD[0], _CHUNK)]
        )
        # What the model says at position t is about place t + 1.
        choices_T = ids_1T[0] if written else torch.cat((ids_1T[0, :1], chosen_T))
        first = prompt_tokens - 1
        count = max(0, len(choices_T) - (heads + 1) - first)
        ranks_vTK = [torch.full((count, heads), -1) for _ in draft_vocabularies]
        for offset in range(2, heads + 2):
            hidden_TD = states.hidden[offset - 1][0, first : first + count]
            previous = states.previous[offset - 1]
            previous_T = None if previous is None else previous[0, first : first + count]
            target_T = choices_T[first + offset : first + offset + count]
            for begin in range(0, count, _CHUNK):
                rows = slice(begin, min(begin + _CHUNK, count))
                logits_PV = model.offset_logits(
                    hidden_TD[rows], offset=offset, previous=None if previous_T is None else previous_T[rows]
                )
                for ranks_TK, part in zip(ranks_vTK, draft_vocabularies, strict=True):
                    ranks_TK[rows, offset - 2] = _ranks(logits_PV, target_T[rows], part, num_ranks).cpu()
    return [
        RankedText(ranks_TK, tuple(tokens), tuple(choices_T.tolist()), first=prompt_tokens + 1)
        for ranks_TK in ranks_vTK
    ]


def _ranks(logits_PV: Tensor, target_P: Tensor, part: Sequence[int] | None, num_ranks: int) -> Tensor:
    own_P1 = logits_PV.gather(1, target_P[:, None])
    if part is None:
        rank_P = (logits_PV > own_P1).sum(dim=-1)
    else:
        part_S = torch.tensor(part, device=logits_PV.device)
        rank_P = (logits_PV[:, part_S] > own_P1).sum(dim=-1).masked_fill(~torch.isin(target_P, part_S), num_ranks)
    return rank_P.masked_fill(rank_P >= num_ranks, -1)


def _pieces(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[begin : begin + size] for begin in range(0, rows.shape[0], size)]
