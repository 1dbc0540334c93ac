"""`attach_heads`: give a pretrained causal LM heads for the tokens after the next one."""

from __future__ import annotations

from typing import Any

from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM


def attach_heads(causal_lm: Any, mtp_config: MultiTokenConfig) -> MultiTokenLM:
    """Wrap a Hugging Face causal LM in place with heads for offsets 2..n.

    The base is neither copied nor changed: `model.base is causal_lm`, and its logits stay what they were. Heads start as
    copies of its last layer, or as the family draws new layers with `head_init="fresh"`.

    Args:
        causal_lm: a model of one of the supported families (`headway.model.families.SUPPORTED_FAMILIES`).
        mtp_config: number of future tokens, architecture, weights.

    Returns:
        The multi-token model.

    Raises:
        IncompatibleModelError: an unsupported family or configuration, or logits that the heads' path does not
            reproduce; the message names what differs.
    """
    return MultiTokenLM(causal_lm, mtp_config)
