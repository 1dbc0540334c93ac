"""The head architectures that are compared: a name, what it stands for, and the options that make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from headway.errors import ConfigError

MARKOV_RANK = 32
"""Rank of the Markov bias here: the usual 256 would be nearly the whole of a vocabulary of 258 bytes."""


@dataclass(frozen=True)
class HeadVariant:
    """One row of the comparison.

    Attributes:
        name: in tables and on the command line.
        source: where the architecture comes from.
        fields: options of `TrainConfig` that make it.
    """

    name: str
    source: str
    fields: Mapping[str, Any]


def _variant(name: str, source: str, **fields: Any) -> HeadVariant:
    return HeadVariant(name, source, MappingProxyType(fields))


PLAIN = "plain"
"""The baseline without heads: n = 1."""

VARIANTS: dict[str, HeadVariant] = {
    variant.name: variant
    for variant in (
        _variant(PLAIN, "n = 1, no heads", num_future_tokens=1),
        _variant("parallel", "Gloeckle et al. 2024, section 2"),
        _variant("causal", "Gloeckle et al. 2024, appendix B", wiring="causal"),
        _variant("anticausal", "Gloeckle et al. 2024, appendix B", wiring="anticausal"),
        _variant("parallel-markov", "parallel with DSpark's bias from the token before", markov_rank=MARKOV_RANK),
        _variant("linear", "Gloeckle et al. 2024, appendix B", heads="linear"),
        _variant("replicated", "Gloeckle et al. 2024, appendix B", heads="replicated_unembedding"),
        _variant("medusa", "Cai et al. 2024, section 2.1.1", heads="medusa"),
        _variant("hydra", "Ankner et al. 2024", heads="hydra"),
        _variant("sequential", "DeepSeek-V3, section 2.2", heads="sequential"),
        _variant("sequential-shared", "FastMTP", heads="sequential", share_modules=True),
        _variant("sequential-fused", "EAGLE-3's three fused layers", heads="sequential", fuse_layers=True),
    )
}
"""Name -> variant, in the order of the tables."""


def chosen_variants(names: Sequence[str]) -> tuple[HeadVariant, ...]:
    """The variants of these names in the order of the tables; all where there are none.

    Raises:
        ConfigError: an unknown name.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"no such variant of heads: {unknown[0]!r}; choose among {', '.join(VARIANTS)}")
    return tuple(variant for variant in VARIANTS.values() if not names or variant.name in names)
