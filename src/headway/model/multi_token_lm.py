"""`MultiTokenLM`: an intact causal LM with heads for the tokens after the next one.

Legend: B batch, T positions, D width, V vocabulary, N future tokens, L layers of the base.

    input_ids -> [ base: embed -> layers 1..L-1 -> (z) -> layer L -> norm -> lm_head ] -> logits           offset 1
                                                    |
                                                    +-> heads[0] -> same norm -> same lm_head              offset 2
                                                    +-> heads[1] -> ...                                    offset 3
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from headway.errors import ConfigError
from headway.functional.targets import IGNORE_INDEX
from headway.heads.auxiliary import RegisterTokens
from headway.heads.build import build_heads
from headway.heads.parts import BaseParts
from headway.losses.chunked import MultiTokenLoss
from headway.losses.objective import TrainingObjective
from headway.model.checkpoint import load_model, save_heads, save_model
from headway.model.config import MultiTokenConfig
from headway.model.decoding_engine import registered_engine
from headway.model.documents import AttentionMask, isolating_mask_or_cache, positions_from_documents
from headway.model.families import check_config, check_parity, resolve_family
from headway.model.objective import check_objective, last_scored, model_loss, scored_weights
from headway.model.output import MultiTokenOutput, OffsetHiddenStates
from headway.model.registers import registers_beside
from headway.model.resuming import restore_heads_too
from headway.model.tap import BaseTap
from headway.model.teacher import CausalTeacher
from headway.model.trunk import trunk_config
from headway.model.trunk_and_heads import offset_hidden_states


class MultiTokenLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal LM that predicts the next n tokens at every position.

    With `num_future_tokens=1` it is its base: bit-equal logits, equal loss and gradients.

    Attributes:
        base: the Hugging Face model, untouched.
        heads: one architecture (`headway.heads`) for offsets 2..n; item i of transformer heads predicts offset i + 2.
        mtp_config: what was added.
        family: the parts of the base that the heads use.
        tensor_names: names of the state dict as the model was made, adapters and wrappers not counted.
        objective: what the heads are trained towards; set it with `train_towards`. Not saved.
        teacher: whom they learn from, where it is another model. Not saved.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2.
    """

    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    main_input_name = "input_ids"
    config: PreTrainedConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = True
    _can_compile_fullgraph = False
    _is_stateful: ClassVar[bool] = False

    def __init__(self, base: Any, mtp_config: MultiTokenConfig) -> None:
        """Attach heads to `base`; see `headway.attach_heads` and `from_config`.

        Raises:
            IncompatibleModelError: see `headway.model.families`.
            ConfigError: heads that change the next-token path without leave to do so, or that read a layer which the
                base does not have.
        """
        family = resolve_family(base)
        mtp_config.check_attachable(num_layers=len(family.layers))
        super().__init__(base.config)
        self.mtp_config = mtp_config
        self.family = family
        parts = BaseParts(
            last_layer=family.last_layer,
            norm=family.norm,
            unembedding=family.lm_head,
            num_layers=len(family.layers),
            initialize=base._init_weights,
            fresh=mtp_config.head_init == "fresh",
        )
        self.heads = build_heads(
            mtp_config.heads,
            mtp_config.head_options,
            parts,
            num_heads=mtp_config.num_future_tokens - 1,
            auxiliary=mtp_config.auxiliary,
        )
        self.base = base
        self.generation_config = base.generation_config
        self.name_or_path = base.name_or_path
        self._tap = BaseTap(family.layers, family.norm, self.heads.reading)
        self.post_init()
        self.objective = TrainingObjective()
        self.teacher: CausalTeacher | None = None
        # So that the Trainer counts the targets of the next token, as it does for the base.
        self.loss_type = "ForCausalLM"
        self.tensor_names = frozenset(self.state_dict())
        self.register_load_state_dict_pre_hook(restore_heads_too)
        self.train(base.training)
        check_parity(base, family, self._parity_logits)

    def init_weights(self) -> None:
        """Nothing: the base comes with its weights and the heads were made from it."""

    @property
    def num_future_tokens(self) -> int:
        """N, the next token included."""
        return self.mtp_config.num_future_tokens

    def train_towards(self, objective: TrainingObjective, *, teacher: Any | None = None) -> None:
        """Choose the objective of every loss from here on, whoever's training loop asks for it.

        Args:
            objective: see `headway.losses.objective.TrainingObjective`.
            teacher: another causal LM with the same vocabulary, where the heads shall learn from it instead of from the
                model's own next-token distribution. It is frozen, used as it is (device, precision), and not saved.

        Raises:
            ConfigError: an objective that does not fit the model or the teacher.
            IncompatibleModelError: a teacher of an unsupported family.
        """
        chosen = None if teacher is None else CausalTeacher(teacher)
        check_objective(self, objective, chosen)
        self.objective, self.teacher = objective, chosen

    # ------------------------------------------------------------------------------------------------ building

    @classmethod
    def from_config(
        cls, base_config: Any, mtp_config: MultiTokenConfig, *, shorten_trunk: bool = True, **kwargs: Any
    ) -> MultiTokenLM:
        """A model with random weights; with transformer heads its parameter count is that of an L-layer plain model.

        Args:
            base_config: `num_hidden_layers` is L in all; the base gets L less the decoder layers of the heads (L - n + 1
                with one per head), lists with one entry per layer are cut with it. The configuration given is not
                changed.
            mtp_config: heads are always drawn fresh here.
            shorten_trunk: off, the base keeps all L layers and the heads come on top (the "+3 layers" rows of the paper's
                Tables S4 and S6).
            kwargs: for `AutoModelForCausalLM.from_config`, such as dtype or attn_implementation.

        Raises:
            ConfigError: n is larger than the layers allow.
            IncompatibleModelError: an unsupported family.

        Source: Gloeckle et al. 2024, section 3 (equal parameter counts: n - 1 head layers, n - 1 trunk layers fewer).
        """
        shape = trunk_config(base_config, mtp_config) if shorten_trunk else copy.deepcopy(base_config)
        check_config(shape)
        base = AutoModelForCausalLM.from_config(shape, **kwargs)
        fresh = replace(mtp_config, head_init="fresh", allow_base_change=mtp_config.changes_base)
        return cls(base, fresh)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *, base: Any = None, **kwargs: Any
    ) -> MultiTokenLM:
        """Load a folder that `save_pretrained` or `save_heads` wrote, or such a repository of the hub.

        Args:
            pretrained_model_name_or_path: the folder, or a hub name.
            base: an already loaded base for a heads-only folder; without it the base is loaded under the name that the
                heads were saved with.
            kwargs: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, attn_implementation,
                trust_remote_code (off unless asked), revision, token, cache_dir, local_files_only.

        Returns:
            The model in eval mode, logits bit-equal to those of the saved one at every offset.

        Raises:
            CheckpointError: a missing, truncated, mismatched or half-written file, or heads of another base.
        """
        return cast(MultiTokenLM, load_model(cls, pretrained_model_name_or_path, base=base, **kwargs))

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool | None = None,
        state_dict: dict[str, Tensor] | None = None,
        *,
        overwrite: bool | None = None,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> None:
        """Write the plain base at the top of a folder and the heads under `mtp/`.

        The folder is a plain checkpoint of the base for every other program. It is written aside and moved, so that an
        interrupted save leaves nothing that looks complete.

        Args:
            save_directory: the folder; its other files are kept.
            is_main_process: False writes nothing. Training loops pass it (the Hugging Face Trainer, Accelerate); such a loop
                owns its folder, so that what it passes there is replaced unless `overwrite` is False.
            state_dict: weights to write instead of the model's own (as the Hugging Face Trainer passes them).
            overwrite: replace a model that is already there; off by default.
            max_shard_size: largest safetensors file of the base.
            kwargs: accepted for the Trainer's sake and passed to the base's own `save_pretrained`.

        Raises:
            CheckpointError: the folder holds a model and `overwrite` is off, or cannot be written.
        """
        if is_main_process is not False:
            save_model(
                self,
                save_directory,
                state_dict=state_dict,
                overwrite=is_main_process is not None if overwrite is None else overwrite,
                max_shard_size=max_shard_size,
                **kwargs,
            )

    def save_heads(self, save_directory: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the heads alone, with the name and the fingerprint of their base, as one shares a LoRA.

        Raises:
            CheckpointError: the folder holds heads already and `overwrite` is off, or cannot be written.
        """
        save_heads(self, save_directory, overwrite=overwrite)

    # ------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        document_ids: Tensor | None = None,
        num_valid_targets: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        offset_weights: Sequence[float] | None = None,
        return_logits: bool | None = None,
        return_future_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultiTokenOutput | tuple[Any, ...]:
        """Logits of offset 1; with `labels` the loss over all offsets; on request the logits of all offsets.

        Args:
            input_ids: tokens [B, T].
            attention_mask: 1 for tokens, 0 for padding [B, T]; or the whole mask [B, 1, T, T], per layer type if need be.
            position_ids: positions [B, T]; a restart starts another document, which neither sees nor predicts across it.
            past_key_values: a cache of the base; future logits need one that the heads have filled too.
            inputs_embeds: embeddings [B, T, D] instead of tokens.
            labels: unshifted token ids [B, T], -100 ignored (nobody pre-shifts).
            use_cache: build or extend a cache; off with labels and with several documents in a row.
            document_ids: any integers that differ between neighbouring documents; without position ids, positions restart
                where they change.
            num_valid_targets: counts [N] to divide by instead of this batch's own, so that the loss is the mean over a
                whole optimizer step (`headway.functional.targets.count_valid_targets`, summed over micro-batches, ranks).
            num_items_in_batch: the Hugging Face Trainer's single count of a whole optimizer step, used for every offset
                where `num_valid_targets` is not given. In eval mode the output then is a plain model's, loss and logits,
                since the Trainer's evaluation gathers whatever else is there as predictions.
            offset_weights: loss weights [N] of this pass instead of the configuration's. Heads beyond the last offset with a
                weight do not run, and no offset with weight 0 is unembedded: its loss is reported as NaN. Without heads
                (n = 1), further weights score the next-token logits against later tokens.
            return_logits: with labels, logits are None unless asked for.
            return_future_logits: also [B, T, N, V].
            logits_to_keep: only the last so many positions' logits (0 keeps all), or these positions.
            return_dict: False returns the tuple of the fields that are not None.
            kwargs: for the base's own forward.

        Returns:
            `MultiTokenOutput`.

        Raises:
            ValueError: labels or ids of a wrong shape.
            DataError: a label outside the vocabulary.
            ConfigError: packed documents with a cache that already holds tokens, or with an attention implementation
                that takes no mask per token pair; a count of targets without labels.
            IncompatibleModelError: the unembedding or the final norm was wrapped or replaced.
        """
        if num_items_in_batch is not None and labels is None:
            raise ConfigError(
                "the training loop counts targets (num_items_in_batch) but keeps the labels to itself, for label smoothing or "
                "a loss function of its own: no head would be trained; leave label_smoothing_factor at 0 and "
                "compute_loss_func unset"
            )
        plain_output = num_items_in_batch is not None and num_valid_targets is None and not self.training
        source = input_ids if input_ids is not None else inputs_embeds
        if source is None or (input_ids is not None and inputs_embeds is not None):
            raise ConfigError("pass exactly one of input_ids and inputs_embeds")
        shape = (source.shape[0], source.shape[1])
        if document_ids is not None and position_ids is None:
            position_ids = positions_from_documents(document_ids)
        padding_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        mask = isolating_mask_or_cache(
            self.config,
            shape=shape,
            dtype=self.family.lm_head.weight.dtype,
            device=source.device,
            attention_mask=attention_mask,
            position_ids_BT=position_ids,
            document_ids_BT=document_ids,
            past_key_values=past_key_values,
        )
        if mask is not attention_mask or (labels is not None and use_cache is None):
            use_cache = False
        weights = scored_weights(self, offset_weights)
        num_offsets = self.num_future_tokens
        if not return_future_logits:
            num_offsets = 1 if labels is None else min(num_offsets, last_scored(weights))
        registers = None
        if labels is not None and self.training and isinstance(self.heads.auxiliary, RegisterTokens):
            embedded_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            registers = registers_beside(self, embedded_BTD, attention_mask, position_ids, document_ids)
        states = self.offset_hidden_states(
            input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_offsets=num_offsets,
            document_ids=document_ids,
            padding_mask=padding_mask,
            on_drafts=labels is not None and self.objective.train_on_drafts,
            registers=registers,
            **kwargs,
        )
        loss: MultiTokenLoss | None = None
        if labels is not None:
            loss = model_loss(
                self,
                states,
                labels,
                weights=weights,
                input_ids_BT=input_ids,
                registers=registers,
                attention_mask=attention_mask,
                position_ids_BT=position_ids,
                document_ids_BT=document_ids,
                num_valid_targets_N=num_valid_targets,
                num_items_in_batch=num_items_in_batch,
            )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        future_logits = logits = None
        if return_future_logits:
            per_offset = [
                self.offset_logits(
                    hidden_BTD[:, keep], offset=k, previous=None if previous_BT is None else previous_BT[:, keep]
                )
                for k, (hidden_BTD, previous_BT) in enumerate(zip(states.hidden, states.previous, strict=True), start=1)
            ]
            future_logits = torch.stack(per_offset, dim=2)
            logits = future_logits[:, :, 0]
        elif labels is None or (plain_output if return_logits is None else return_logits):
            logits = self.unembed(states.last_hidden_BTD[:, keep])
        output = MultiTokenOutput(
            loss=None if loss is None else loss.total,
            auxiliary_loss=None if loss is None else loss.auxiliary,
            logits=logits,
            loss_per_offset=None if loss is None or plain_output else loss.per_offset_N,
            num_correct_per_offset=None if loss is None or plain_output else loss.num_correct_N,
            objective_per_offset=None
            if loss is None or plain_output or not self.objective.distills
            else loss.objective_per_offset_N,
            future_logits=future_logits,
            past_key_values=states.past_key_values,
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )
        wants_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if wants_dict else cast(tuple[Any, ...], output.to_tuple())

    def offset_hidden_states(self, input_ids: Tensor | None = None, **kwargs: Any) -> OffsetHiddenStates:
        """One pass through trunk and heads, without unembedding: `headway.model.trunk_and_heads.offset_hidden_states`."""
        return offset_hidden_states(self, input_ids, **kwargs)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The base's final norm, shared by all offsets."""
        return cast(Tensor, self.family.norm(hidden))

    def unembed(self, hidden: Tensor) -> Tensor:
        """Offset-1 logits of normed hidden states [..., D] -> [..., V], with the family's soft-capping."""
        return self.family.soft_cap(self.family.lm_head(hidden))

    def unembedding(self, offset: int) -> nn.Linear:
        """The output matrix of an offset: its own where the heads have one each, else the base's."""
        return self.heads.unembedding(offset) or self.family.lm_head

    def before_unembedding(self, hidden: Tensor, *, offset: int) -> Tensor:
        """Hidden states as `offset_hidden_states` gives them -> what the unembedding of their offset multiplies."""
        return hidden if offset == 1 or not self.heads.uses_final_norm else self.final_norm(hidden)

    def offset_logits(self, hidden: Tensor, *, offset: int, previous: Tensor | None = None) -> Tensor:
        """Logits of one offset: norm, unembedding, bias of the previous token and soft-capping, as its heads have them.

        Args:
            hidden: [..., D] of this offset, as `offset_hidden_states` gives them.
            offset: from 1.
            previous: token at the previous offset [...], for heads that draft in turn; where it is -100, there is none and
                the logits are NaN.

        Raises:
            ConfigError: no previous tokens for a biased head.
        """
        markov = None if offset == 1 else self.heads.markov
        logits = self.unembedding(offset)(self.before_unembedding(hidden, offset=offset))
        if markov is not None:
            if previous is None:
                raise ConfigError(
                    f"the logits of offset {offset} need the tokens at offset {offset - 1}; pass previous="
                )
            logits = logits + markov(previous)
        logits = self.family.soft_cap(logits)
        if previous is None or offset == 1:
            return logits
        return logits.masked_fill((previous == IGNORE_INDEX)[..., None], torch.nan)

    def _parity_logits(self, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        with self._tap.armed():
            last_hidden_BTD = self.family.decoder(input_ids=input_ids_BT, use_cache=False)[0]
            replayed_BTD = self._tap.call.replay(self.family.last_layer)
        return self.unembed(last_hidden_BTD), self.unembed(self.final_norm(replayed_BTD))

    # ------------------------------------------------------------------------------------------------ generation

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as `base.generate` would, with several tokens per forward.

        The signature is Hugging Face's; `num_draft_tokens` (0..n-1, default n-1) limits the draft, 0 decodes plainly;
        further options (trees, copied drafts, seeds, acceptance) are in `headway.decoding.options.DecodingOptions`.
        Greedy output equals plain greedy output token for token. See `headway.decoding.engine`.

        Raises:
            DecodingError: a request that the engine refuses; names the way out.
        """
        return registered_engine().generate(self, inputs, **kwargs)

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        return registered_engine().sample(
            self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base's own preparation of a forward's arguments."""
        return cast(dict[str, Any], self.base.prepare_inputs_for_generation(*args, **kwargs))

    # ------------------------------------------------------------------------------------------------ plumbing

    def get_input_embeddings(self) -> nn.Module:
        """The base's token embeddings."""
        return cast(nn.Module, self.base.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's token embeddings."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The base's unembedding, shared by all offsets."""
        return cast(nn.Module, self.base.get_output_embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the unembedding of the base and so of every offset that shares it.

        Raises:
            ConfigError: another number of tokens where heads have matrices of the vocabulary's size themselves.
        """
        rows = cast(Tensor, new_embeddings.weight).shape[0]
        if self.heads.vocabulary_matrices and rows != self.family.lm_head.weight.shape[0]:
            raise ConfigError(
                f"a vocabulary of {rows} tokens does not fit heads that have matrices for "
                f"{self.family.lm_head.weight.shape[0]}; resize the base first and attach the heads then"
            )
        self.base.set_output_embeddings(new_embeddings)
        self.family = resolve_family(self.base)
