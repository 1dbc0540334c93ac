"""Acceptance of any draft along real text: chains, candidate trees, copies, and trees beside copies.

`headway.evaluation.acceptance` walks with chains and tells every head the text's own tokens. Here a head with a Markov bias is
told what it will be told in decoding: the last known token, and after it the drafts that stood. So the figures of such heads
are those of the task that they have.

Legend: T positions, K drafted tokens of the longest path, C candidates per head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headway.decoding.lookup import TextIndex
from headway.errors import ConfigError, DataError
from headway.evaluation.offset_logits import evaluation_mode
from headway.functional.tree import Tree
from headway.model.multi_token_lm import MultiTokenLM

NO_CANDIDATE = -1


@dataclass(frozen=True)
class WalkedText:
    """Real text, and what the model would choose along it.

    Attributes:
        tokens: the text.
        choices: per position the model's own next token, the text up to there being read.
        ranks: per position and offset 2..K + 1 the rank of the model's choice at that offset among the head's candidates;
            `NO_CANDIDATE` where it is none of them, or lies behind the text's end.
    """

    tokens: tuple[int, ...]
    choices: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TextWalk:
    """What the blocks of a walk emitted.

    Attributes:
        tokens_per_forward: the model's own token included; NaN where no block fitted.
        blocks: walked.
        copied: share of them that held a copy.
        lengths: tokens of each block.
    """

    tokens_per_forward: float
    blocks: int
    copied: float
    lengths: tuple[int, ...] = ()


def can_walk(model: MultiTokenLM) -> bool:
    """Whether one pass over a text says what its heads would draft: not where they read their own drafts."""
    return not model.heads.reads_tokens


def read_text(model: MultiTokenLM, tokens: Sequence[int], *, num_candidates: int) -> WalkedText:
    """One pass of the model over a text.

    A draft stands while it is the model's own choice after the text so far, so the token before offset k is, for k = 2, the
    text's (the one that the block before has emitted), and for larger k the model's choice of offset k - 1.

    Args:
        model: evaluated in eval mode; modes and random state are as before the call.
        tokens: of one document, without padding.
        num_candidates: C.

    Raises:
        ConfigError: heads that read their own drafts (`can_walk`), or num_candidates < 1.
        DataError: a text without tokens.
    """
    if not can_walk(model):
        raise ConfigError(
            f"{model.mtp_config.heads} heads read their own drafts, which one pass over a text does not have; measure them "
            f"with first_block_acceptance"
        )
    if num_candidates < 1 or not tokens:
        raise (ConfigError if tokens else DataError)(
            f"a walk needs tokens and at least one candidate: got {len(tokens)} and {num_candidates}"
        )
    device = next(model.parameters()).device
    ids_T = torch.tensor(list(tokens), device=device)
    length, heads = len(tokens), model.num_future_tokens - 1
    with evaluation_mode(model):
        hidden = model.offset_hidden_states(ids_T[None], use_cache=False, num_offsets=model.num_future_tokens)
        choices_T = model.offset_logits(hidden.hidden[0][0], offset=1, previous=None).argmax(-1)
        ranks_KT = torch.full((heads, length), NO_CANDIDATE, dtype=torch.long, device=device)
        for offset in range(2, heads + 2):
            kept = length - (offset - 1)
            if kept < 1:
                break
            # The token before offset k at position t: x[t+1] for k = 2, then the model's choice for position t+k-1.
            before_P = ids_T[1 : kept + 1] if offset == 2 else choices_T[offset - 2 : offset - 2 + kept]
            logits_PV = model.offset_logits(
                hidden.hidden[offset - 1][0, :kept],
                offset=offset,
                previous=before_P if model.heads.markov is not None else None,
            )
            wanted_P1 = choices_T[offset - 1 :, None]
            found_PC = logits_PV.topk(min(num_candidates, logits_PV.shape[-1]), dim=-1).indices == wanted_P1
            ranks_KT[offset - 2, :kept] = torch.where(
                found_PC.any(-1), found_PC.to(torch.uint8).argmax(-1), torch.full_like(before_P, NO_CANDIDATE)
            )
    ranks: list[list[int]] = ranks_KT.T.tolist()
    return WalkedText(tuple(tokens), tuple(choices_T.tolist()), tuple(map(tuple, ranks)))


def walk_texts(
    texts: Sequence[WalkedText], tree: Tree, *, lookup: int = 0, ngram: int = 3, reach: int | None = None
) -> TextWalk:
    """Walk block by block: each emits the text's next token and the drafts that the model agrees with.

    >>> text = WalkedText((5, 6, 7, 8), (6, 7, 9, 9), ((0,), (-1,), (0,), (-1,)))
    >>> walk_texts([text], Tree.chain(1)).lengths
    (2,)

    A block counts where every token that it could emit lies in the text; whether it does depends on its place alone.

    Args:
        texts: of `read_text`; each rank that the tree names must have been among its candidates.
        tree: of the heads' candidates; `Tree.chain(0)` for copies alone.
        lookup: tokens of a copied branch, 0 for none.
        ngram: most tokens that its match takes.
        reach: drafted tokens that must fit behind a block's start; by default those of its longest path. The same for
            several drafts lets all be walked over the same places.
    """
    paths = {(): 0} | {choice: number for number, choice in enumerate(tree.choices, start=1)}
    longest = max(tree.depth, lookup) if reach is None else reach
    copies = 0
    lengths: list[int] = []
    for text in texts:
        copy = _copier(text, lookup, ngram) if lookup else None
        place, last = 0, len(text.tokens) - 2 - longest
        while place <= last:
            accepted = _agreed(text.ranks[place], paths)
            if copy is not None:
                right, found = copy(place)
                accepted, copies = max(accepted, right), copies + found
            lengths.append(1 + accepted)
            place += 1 + accepted
    blocks = len(lengths)
    per_block = (sum(lengths) / blocks, copies / blocks) if blocks else (math.nan, math.nan)
    return TextWalk(per_block[0], blocks, per_block[1], tuple(lengths))


def _agreed(ranks: Sequence[int], paths: dict[tuple[int, ...], int]) -> int:
    depth = 0
    while depth < len(ranks) and tuple(ranks[: depth + 1]) in paths:
        depth += 1
    return depth


def _copier(text: WalkedText, count: int, ngram: int) -> Callable[[int], tuple[int, bool]]:
    """A function of growing places: drafts of the copy there that the model agrees with, and whether there is a copy."""
    index = TextIndex((), longest=ngram)
    known = 0

    def at(place: int) -> tuple[int, bool]:
        nonlocal known
        # The block at a place has the token after it: the one that the model has just chosen, here the text's.
        index.extend(text.tokens[known : place + 2])
        known = place + 2
        copied = index.continuation(count)
        right = 0
        while right < len(copied) and copied[right] == text.choices[place + 1 + right]:
            right += 1
        return right, bool(copied)

    return at


def head_ranks(tree: Tree) -> int:
    """Candidates that a tree needs of each head."""
    return max((rank for rank in tree.ranks if rank >= 0), default=0) + 1
