"""Another causal LM as the teacher of a model's heads.

Legend: B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import ConfigError
from headway.losses.distillation import Teacher
from headway.model.documents import AttentionMask, isolating_mask
from headway.model.families import resolve_family


class CausalTeacher:
    """Next-token distributions of a frozen causal LM, as hidden states and unembedding: its logits are made chunk by chunk.

    Not a module: a model that has one neither trains nor saves it.

    Attributes:
        model: the causal LM, in eval mode, without gradients.
    """

    def __init__(self, model: Any) -> None:
        """Freeze the model; of one with heads, the base teaches.

        Raises:
            IncompatibleModelError: an unsupported family.
            ConfigError: heads that are part of the next-token path, without which the base is no model.
        """
        mtp_config = getattr(model, "mtp_config", None)
        if mtp_config is not None:
            if mtp_config.changes_base:
                raise ConfigError(
                    f"a teacher is a plain causal LM: got one with wiring={mtp_config.wiring!r}, whose next-token path "
                    f"runs through its heads; export it with headway convert --to hf first"
                )
            model = model.base
        self._family = resolve_family(model)
        self.model: nn.Module = model.requires_grad_(False).eval()

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self._family.lm_head.weight.shape[0])

    @torch.no_grad()
    def __call__(
        self,
        input_ids_BT: Tensor,
        *,
        attention_mask: AttentionMask = None,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Teacher:
        """What it says about a batch; documents are kept apart as they are for the student."""
        config: Any = self.model.config
        mask = isolating_mask(
            config,
            shape=(input_ids_BT.shape[0], input_ids_BT.shape[1]),
            dtype=self._family.lm_head.weight.dtype,
            device=input_ids_BT.device,
            attention_mask_BT=attention_mask,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
        )
        hidden_BTD = self._family.decoder(
            input_ids=input_ids_BT, attention_mask=mask, position_ids=position_ids_BT, use_cache=False
        )[0]
        return Teacher(hidden_BTD, self._family.lm_head.weight.detach(), self._family.soft_cap)
