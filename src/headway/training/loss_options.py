"""The loss as `TrainConfig` has it: weights, objective, exclusions.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from headway.errors import ConfigError
from headway.heads.options import CHANGES_BASE, READS_DRAFTS, AuxiliaryOptions, check_auxiliary
from headway.losses.objective import TrainingObjective
from headway.losses.weights import WeightPlan, full_weights

if TYPE_CHECKING:
    from headway.training.config import TrainConfig


def weight_plan(config: TrainConfig) -> WeightPlan:
    """The loss weights of every step of a run: a pure function of the step."""
    given = config.offset_weights
    if config.later_token_weights is not None:
        given = (1.0, *config.later_token_weights)
    return WeightPlan(
        weights=full_weights(
            config.num_future_tokens,
            given=given,
            decay=config.head_weight_decay,
            normalize=config.normalize_head_weights,
            head_weight=config.head_weight,
        ),
        schedule=config.weight_schedule,
        steps=max(1, round(config.weight_schedule_fraction * config.steps)),
        after=1.0
        if config.head_weight_after is None or not config.head_weight
        else config.head_weight_after / config.head_weight,
    )


def training_objective(config: TrainConfig) -> TrainingObjective:
    """What heads are trained towards.

    Raises:
        ConfigError: options that belong to another objective.
    """
    return TrainingObjective(
        divergence=config.objective,
        cross_entropy_share=config.cross_entropy_share,
        temperature=config.distillation_temperature,
        distill_next_token=config.distill_next_token,
        detach_trunk=config.detach_trunk,
        train_on_drafts=config.train_on_drafts,
    )


def check_loss_options(config: TrainConfig) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: names both fields and the way out.
    """
    num_future_tokens = config.num_future_tokens
    if config.offset_weights is not None and len(config.offset_weights) != num_future_tokens:
        raise ConfigError(
            f"offset_weights needs one weight per offset: got {len(config.offset_weights)} for "
            f"num_future_tokens={num_future_tokens}; pass {num_future_tokens} numbers, the next token first"
        )
    if config.later_token_weights is not None and num_future_tokens != 1:
        raise ConfigError(
            f"later_token_weights score the next-token logits of a model without heads: got num_future_tokens="
            f"{num_future_tokens}; set it to 1, or use offset_weights"
        )
    lists = [
        f"{name}={getattr(config, name)}"
        for name in ("offset_weights", "later_token_weights", "head_weight_decay")
        if getattr(config, name) is not None
    ]
    if len(lists) > 1:
        raise ConfigError(f"{' and '.join(lists)} both give the loss weights; set one of them to none")
    if (config.weight_schedule == "step") != (config.head_weight_after is not None):
        raise ConfigError(
            f"weight_schedule 'step' and head_weight_after go together: got weight_schedule={config.weight_schedule} and "
            f"head_weight_after={config.head_weight_after}; set both or neither"
        )
    if config.head_weight_after is not None and not config.head_weight:
        raise ConfigError(
            f"weight_schedule 'step' goes from head_weight to head_weight_after: got head_weight=0 and head_weight_after="
            f"{config.head_weight_after:g}; start above 0, or use weight_schedule linear"
        )
    if config.weight_schedule_fraction > 1:
        raise ConfigError(
            f"weight_schedule_fraction is a share of steps, at most 1: got {config.weight_schedule_fraction:g} for "
            f"weight_schedule={config.weight_schedule}; pass a number up to 1"
        )
    plan = weight_plan(config)
    if len(plan.weights) == 1:
        for name, default in (("weight_schedule", "constant"), ("detach_trunk", "off")):
            if getattr(config, name) != default:
                raise ConfigError(
                    f"{name}={getattr(config, name)} is about offsets beyond the next token: got num_future_tokens=1; leave "
                    f"it out, or raise num_future_tokens"
                )
    if not any(plan.weights):
        raise ConfigError(f"all offset_weights are 0, nothing would be trained: got {list(plan.weights)}; raise one")
    if config.sequence_length <= len(plan.weights):
        raise ConfigError(
            f"sequence_length must be more than the offsets that are scored: got sequence_length={config.sequence_length} "
            f"and {len(plan.weights)} offsets; raise sequence_length"
        )
    _check_objective(config)


def _check_objective(config: TrainConfig) -> None:
    objective = training_objective(config)
    if config.teacher is not None and not objective.distills:
        raise ConfigError(
            f"teacher={config.teacher} needs an objective with a teacher: got objective=cross_entropy; choose kl or another"
        )
    if objective.distill_next_token and config.teacher is None:
        raise ConfigError(
            "distill_next_token needs another model: got teacher=none, and a model's own next-token distribution cannot "
            "teach itself; set teacher"
        )
    if objective.distills and config.num_future_tokens == 1 and not objective.distill_next_token:
        raise ConfigError(
            f"objective={config.objective} trains offsets beyond the next token: got num_future_tokens=1; raise it, or set "
            f"teacher and distill_next_token"
        )
    if objective.detach_trunk != "off" and config.heads == "transformer" and config.wiring in CHANGES_BASE:
        raise ConfigError(
            f"detach_trunk={config.detach_trunk} cannot cut heads off with wiring={config.wiring}: the next-token path runs "
            f"through them; set one of them back"
        )
    if config.train_on_drafts and (config.num_future_tokens == 1 or config.heads not in READS_DRAFTS):
        raise ConfigError(
            f"train_on_drafts is for heads that read drafted tokens: got heads={config.heads} with num_future_tokens="
            f"{config.num_future_tokens}; choose heads {' or '.join(sorted(READS_DRAFTS))} with num_future_tokens of 2 or more"
        )
    check_auxiliary(AuxiliaryOptions(**{field.name: getattr(config, field.name) for field in fields(AuxiliaryOptions)}))
