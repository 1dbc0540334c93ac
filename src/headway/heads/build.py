"""From the name of an architecture to its heads."""

from __future__ import annotations

from headway.heads.base import Heads
from headway.heads.hydra import HydraHeads
from headway.heads.linear import LinearHeads
from headway.heads.markov import MarkovBias
from headway.heads.medusa import MedusaHeads
from headway.heads.options import HeadArchitecture, HeadOptions, Wiring, check_options
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


def build_heads(heads: HeadArchitecture, options: HeadOptions, parts: BaseParts, *, num_heads: int) -> Heads:
    """Heads for offsets 2..num_heads + 1 of a base.

    Raises:
        ConfigError: an unknown name, or options that do not belong to it.
    """
    check_options(heads, options)
    if heads in _IN_TURN:
        return _IN_TURN[heads](parts, options, num_heads=num_heads)
    architecture = _TRANSFORMERS[options.wiring] if heads == "transformer" else _PARALLEL[heads]
    built = architecture(parts, options, num_heads=num_heads)
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
