"""What heads are trained towards, as options; needs no torch.

Legend: p the teacher's distribution, q a head's, y the token of the text, a = sum_v min(p(v), q(v)) their acceptance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from headway.errors import ConfigError

Divergence = Literal["cross_entropy", "kl", "reverse_kl", "total_variation", "log_acceptance", "hybrid"]
DetachTrunk = Literal["off", "on", "hidden-states"]


@dataclass(frozen=True, kw_only=True)
class TrainingObjective:
    """The loss of offsets beyond the next token, and what of the base feels it. A default asks for nothing.

    Offset 1 is trained with cross-entropy, unless `distill_next_token` says otherwise.

    Attributes:
        divergence: from the teacher's distribution p to the head's q. "cross_entropy": -log q(y), no teacher; "kl":
            KL(p||q); "reverse_kl": KL(q||p); "total_variation": 1 - a; "log_acceptance": -log a; "hybrid":
            w KL(p||q) + (1 - w) (1 - a) with w = exp(-3 a), w not differentiated.
        cross_entropy_share: c of the loss c (-log q(y)) + (1 - c) divergence.
        temperature: p and q of the divergence are softmax(logits / temperature), as for sampling at that temperature; the
            cross-entropy is at 1. The loss is not multiplied by its square (Hinton et al. 2015 do).
        distill_next_token: distil offset 1 too; needs another model as the teacher.
        detach_trunk: "on": nothing of the base feels the heads, whose losses reach only their own weights; "hidden-states":
            what heads read is cut off (hidden states, embeddings), the final norm and the unembedding that they share with
            the base still learn from them.
        train_on_drafts: heads that read the tokens before an offset (sequential, hydra) read their own drafts, as in
            decoding, instead of the text's tokens (training-time test; `headway.heads.lanes`).

    Raises:
        ConfigError: a value out of range or in conflict with another.

    Source: LK losses (arXiv:2602.23881) for "log_acceptance" and "hybrid", as in speculators and SpecForge;
    detaching: Megatron-LM's `mtp_detach_heads`; drafts: EAGLE-3 (arXiv:2503.01840), section 3.2.
    """

    divergence: Divergence = "cross_entropy"
    cross_entropy_share: float = 0.0
    temperature: float = 1.0
    distill_next_token: bool = False
    detach_trunk: DetachTrunk = "off"
    train_on_drafts: bool = False

    def __post_init__(self) -> None:
        _check_choice("divergence", self.divergence, get_args(Divergence))
        _check_choice("detach_trunk", self.detach_trunk, get_args(DetachTrunk))
        if not 0 <= self.cross_entropy_share < 1:
            raise ConfigError(
                f"cross_entropy_share is the part of the cross-entropy in a distilled loss, 0 <= share < 1: got "
                f"{self.cross_entropy_share}; leave the divergence at cross_entropy for all of it"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be positive: got {self.temperature}; 1 leaves the logits as they are")
        if self.divergence == "cross_entropy":
            for name, default in (("cross_entropy_share", 0.0), ("temperature", 1.0), ("distill_next_token", False)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} belongs to a distilled loss: got the divergence cross_entropy; "
                        f"choose another, such as kl, or leave {name} out"
                    )

    @property
    def distills(self) -> bool:
        """Whether there is a teacher."""
        return self.divergence != "cross_entropy"


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(choices)}: got {value!r}{hint}")
