"""A Hugging Face Trainer that sees every offset: its loss in the logs, divided by its own targets.

Not needed to train: `transformers.Trainer` itself trains, saves and resumes a `MultiTokenLM`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from headway.errors import ConfigError
from headway.functional.targets import count_valid_targets
from headway.model.multi_token_lm import MultiTokenLM


class MultiTokenTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with the loss as this library defines it, per offset in every log and evaluation.

    A plain Trainer hands the model one count per optimizer step, its targets of the next token, and every offset is
    divided by that. This one counts each offset's own targets over the whole step, all micro-batches and processes, so
    that the loss is the sum over offsets of weight x mean nats. Logs gain `loss_offset_1` .. `loss_offset_n`, metrics
    `eval_loss_offset_1` .. (mean nats over everything since the last log, over the whole evaluation set); any of them can
    be `metric_for_best_model`. To combine it with another Trainer: `class Mine(MultiTokenTrainer, SFTTrainer): ...`.

    Raises:
        ConfigError: the model is no `MultiTokenLM` and has none inside, or is to be split over threads
            (`DataParallel`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = [module for module in self.model.modules() if isinstance(module, MultiTokenLM)]
        if not found:
            raise ConfigError(
                f"MultiTokenTrainer trains a MultiTokenLM, wrapped or not: got {type(self.model).__name__}; give it heads "
                f"with attach_heads, or use transformers.Trainer"
            )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"DataParallel over {self.args.n_gpu} GPUs would split the counts of targets; start one process per GPU "
                f"with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self._num_offsets = found[0].num_future_tokens
        self._trained, self._evaluated = self._no_sums(), self._no_sums()

    # ------------------------------------------------------------------------------------------------ the loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, each with the step's targets per offset."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        with_labels = [batch for batch in batches if "labels" in batch]
        if with_labels:
            counts_N = self._count(with_labels, device)
            for batch in with_labels:
                batch["num_valid_targets"] = counts_N
        return batches, num_items_in_batch

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own, while the losses per offset are kept for the next log."""
        own_N = self._own_targets(inputs) if "labels" in inputs else None
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if own_N is not None and outputs.loss_per_offset is not None:
            sums_2N = self._trained if model.training else self._evaluated
            nats_N = outputs.loss_per_offset.detach().double() * own_N
            sums_2N += torch.stack([nats_N, own_N.double()]).to(sums_2N.device)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The Trainer's own; predictions are the logits of offset 1, as with a plain model."""
        if inputs.get("labels") is not None:
            counts_N = self._count([inputs], self.args.device)
            inputs = {**inputs, "num_valid_targets": counts_N, "return_logits": not prediction_loss_only}
        if ignore_keys is None:
            ignore_keys = list(getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"]))
        own = ["loss_per_offset", "num_correct_per_offset", "objective_per_offset", "auxiliary_loss"]
        return super().prediction_step(model, inputs, prediction_loss_only, [*ignore_keys, *own])

    # ------------------------------------------------------------------------------------------------ what is seen

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's own, with the training loss of every offset beside `loss`."""
        if "loss" in logs:
            logs.update(self._means(self._trained, "loss"))
            self._trained = self._no_sums()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's own, with the loss of every offset among the metrics."""
        self._evaluated = self._no_sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._means(self._evaluated, f"{metric_key_prefix}_loss"))
        return output

    # ------------------------------------------------------------------------------------------------ counting

    def _own_targets(self, batch: Mapping[str, Any]) -> Tensor:
        mask = batch.get("attention_mask")
        return count_valid_targets(
            batch["labels"],
            num_future_tokens=self._num_offsets,
            position_ids_BT=batch.get("position_ids"),
            document_ids_BT=batch.get("document_ids"),
            attention_mask_BT=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        )

    def _count(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        counts_N = torch.stack([self._own_targets(batch).to(device) for batch in batches]).sum(dim=0)
        return self._over_processes(counts_N) if self.args.average_tokens_across_devices else counts_N

    def _over_processes(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, reduction="sum"))

    def _means(self, sums_2N: Tensor, name: str) -> dict[str, float]:
        nats_N, targets_N = self._over_processes(sums_2N).tolist()
        return {
            f"{name}_offset_{offset}": nats / targets
            for offset, (nats, targets) in enumerate(zip(nats_N, targets_N, strict=True), start=1)
            if targets and not math.isnan(nats)  # an offset without a weight is not computed
        }

    def _no_sums(self) -> Tensor:
        return torch.zeros(2, self._num_offsets, dtype=torch.float64, device=self.args.device)
