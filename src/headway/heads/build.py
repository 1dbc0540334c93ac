"""From the name of an architecture to its heads."""

from __future__ import annotations

from headway.heads.auxiliary import RegisterTokens, TokenOrderHead
from headway.heads.base import Heads
from headway.heads.hydra import HydraHeads
from headway.heads.linear import LinearHeads
from headway.heads.markov import MarkovBias
from headway.heads.medusa import MedusaHeads
from headway.heads.options import Auxiliary, HeadArchitecture, HeadOptions, Wiring, check_options
from headway.heads.parts import BaseParts
from headway.heads.replicated_unembedding import ReplicatedUnembeddings
from headway.heads.sequential import SequentialHeads
from headway.heads.transformer import (
    AnticausalTransformerHeads,
    CausalTransformerHeads,
    ParallelTransformerHeads,
    TransformerHeads,
)

_TRANSFORMERS: dict[Wiring, type[TransformerHeads]] = {
    "parallel": ParallelTransformerHeads,
    "causal": CausalTransformerHeads,
    "anticausal": AnticausalTransformerHeads,
}
_IN_TURN: dict[str, type[HydraHeads | SequentialHeads]] = {"hydra": HydraHeads, "sequential": SequentialHeads}
_PARALLEL: dict[str, type[LinearHeads | ReplicatedUnembeddings | MedusaHeads]] = {
    "linear": LinearHeads,
    "replicated_unembedding": ReplicatedUnembeddings,
    "medusa": MedusaHeads,
}


def build_heads(
    heads: HeadArchitecture,
    options: HeadOptions,
    parts: BaseParts,
    *,
    num_heads: int,
    auxiliary: Auxiliary = "none",
) -> Heads:
    """Heads for offsets 2..num_heads + 1 of a base, with what an auxiliary objective adds to them.

    Raises:
        ConfigError: an unknown name, or options that do not belong to it.
    """
    check_options(heads, options)
    built: Heads
    if heads in _IN_TURN:
        built = _IN_TURN[heads](parts, options, num_heads=num_heads)
    elif heads == "transformer":
        built = _TRANSFORMERS[options.wiring](parts, options, num_heads=num_heads)
    else:
        built = _PARALLEL[heads](parts, options, num_heads=num_heads)
    if auxiliary != "none":
        built.auxiliary = TokenOrderHead(parts) if auxiliary == "top" else RegisterTokens(parts)
    if options.markov_rank and num_heads:
        weight = parts.unembedding.weight
        built.markov = MarkovBias(
            parts.vocabulary,
            options.markov_rank,
            initialize=parts.initialize,
            device=weight.device,
            dtype=weight.dtype,
        )
    return built
