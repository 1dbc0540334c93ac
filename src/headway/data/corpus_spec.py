"""Which text a run trains on and which it holds out, before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from headway.data.shares import block_counts
from headway.data.source_spec import SourceSpec
from headway.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """Which text is trained on, and which is held out.

    Attributes:
        sources: trained on, in this order; with weights they are mixed, without they are one.
        held_out: held out as a whole; where there is any, `held_out_fraction` is not used.
        held_out_fraction: of the bytes of the sources, in whole groups; 0 holds out nothing.
        split_seed: of the choice of groups.
        drop_near_duplicates: of held-out text, from the sources.
        suffixes: of files in folders and globs; None takes all.

    Raises:
        ConfigError: weights for some of the sources only, or for held-out text.
    """

    sources: tuple[SourceSpec, ...]
    held_out: tuple[SourceSpec, ...] = ()
    held_out_fraction: float = 0.0
    split_seed: int = 0
    drop_near_duplicates: bool = True
    suffixes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        without = [spec.path for spec in self.sources if spec.weight is None]
        if without and len(without) < len(self.sources):
            raise ConfigError(
                f"every source of a mixture needs a weight: {', '.join(map(repr, without))} has none; add weight to it, "
                f"or drop the weights of the others"
            )
        for spec in self.held_out:
            if spec.weight is not None:
                raise ConfigError(f"held-out text is not mixed: drop the weight of {spec.path!r}")
        if self.is_mixture:
            block_counts([spec.weight or 0.0 for spec in self.sources])

    @property
    def is_mixture(self) -> bool:
        """Whether sources have shares of their own."""
        return len(self.sources) > 1 and self.sources[0].weight is not None
