"""Everything that one demo measured: what the last line of stdout and the report are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.evaluation.acceptance import WalkAcceptance
from headway.evaluation.json_ready import json_ready
from headway.evaluation.likelihood import OffsetLikelihood
from headway.evaluation.speed import HUGGING_FACE, PLAIN, SELF_SPECULATIVE, DecodingSpeed
from headway.experiments.demo.generation import Comparison, GeneratedAcceptance


@dataclass(frozen=True)
class CorpusSummary:
    """The text that was trained and tested on.

    Attributes:
        source: what the corpus is, in words.
        train_documents: files trained on, near-duplicates of held-out text dropped.
        train_bytes: their bytes.
        held_out_documents: files held out.
        held_out_bytes: their bytes.
        held_out_packages: the packages and modules held out whole.
        dropped: (file, share of its n-grams that are in held-out text) dropped from training.
    """

    source: str
    train_documents: int
    train_bytes: int
    held_out_documents: int
    held_out_bytes: int
    held_out_packages: tuple[str, ...]
    dropped: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class CurvePoint:
    """Training loss in nats per offset at one optimizer step."""

    step: int
    loss_per_offset: tuple[float, ...]


@dataclass(frozen=True)
class TrainingSummary:
    """What the training run was.

    Attributes:
        recipe: name of its recipe.
        steps: optimizer steps.
        tokens: tokens trained on.
        seconds: of the training loop.
        tokens_per_second: over the whole loop.
        parameters: of the model, heads included.
        head_parameters: of the heads.
        num_future_tokens: n.
        curve: training loss over steps.
    """

    recipe: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    head_parameters: int
    num_future_tokens: int
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class DemoResult:
    """Every figure of a demo.

    Attributes:
        corpus: the text.
        training: the run.
        likelihood: held-out loss and accuracy per offset.
        walk: acceptance along held-out text (loop-free).
        comparisons: prompts decoded both ways.
        generated: acceptance on the text that these gave.
        speed: the arms side by side.
        seconds: wall time of each part, and `total`.
        options: the options that the demo ran with.
        provenance: versions, machine, commit, date.
    """

    corpus: CorpusSummary
    training: TrainingSummary
    likelihood: OffsetLikelihood
    walk: WalkAcceptance
    comparisons: tuple[Comparison, ...]
    generated: GeneratedAcceptance
    speed: DecodingSpeed
    seconds: dict[str, float]
    options: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def identical(self) -> bool:
        """Whether self-speculative decoding changed not one token of any prompt."""
        return all(comparison.identical for comparison in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """Every figure; NaN becomes None. Generated texts stay in the report."""
        return {
            "command": "demo",
            "identical": self.identical,
            "mean_acceptance_length": json_ready(self.walk.mean_acceptance_length),
            "speedup_over_plain": self.speed.ratio(SELF_SPECULATIVE, PLAIN).median,
            "speedup_at_loop_free_acceptance": json_ready(self.speed.speedup_at(self.walk.mean_acceptance_length)),
            "plain_over_hugging_face": self.speed.ratio(PLAIN, HUGGING_FACE).median,
            "likelihood": self.likelihood.to_json(),
            "acceptance": {"held_out": self.walk.to_json(), "generated": self.generated.to_json()},
            "prompts": [_comparison_json(comparison) for comparison in self.comparisons],
            "speed": self.speed.to_json(),
            "corpus": json_ready(self.corpus),
            "training": json_ready(self.training),
            "seconds": json_ready(self.seconds),
            "options": json_ready(self.options),
            "provenance": json_ready(self.provenance),
        }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "source": comparison.prompt.source,
        "prompt_tokens": len(comparison.prompt.tokens),
        "new_tokens": len(comparison.plain.tokens),
        "identical": comparison.identical,
        "tokens_per_forward": json_ready(comparison.self_speculative.tokens_per_forward),
        "forwards": {
            PLAIN: comparison.plain.forwards,
            SELF_SPECULATIVE: comparison.self_speculative.forwards,
        },
        "tokens_per_second": {
            PLAIN: comparison.plain.tokens_per_second,
            SELF_SPECULATIVE: comparison.self_speculative.tokens_per_second,
        },
    }
