"""The comparison from text to report; runs that are there are not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.data.tokenizers import load_tokenizer
from headway.errors import ConfigError, DataError
from headway.evaluation.json_ready import json_ready
from headway.experiments.demo.folder import write_json, write_text
from headway.experiments.heads.folder import claim_folder, finish_folder
from headway.experiments.heads.measure import HeldOut, measure_model
from headway.experiments.heads.options import TOKENS, HeadsOptions
from headway.experiments.heads.report import FIGURES, report_page
from headway.experiments.heads.result import HeadsResult, variant_result
from headway.experiments.heads.speeds import decoding_speeds, training_speeds
from headway.experiments.heads.variants import HeadVariant
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance
from headway.training.corpus import TrainingData, prepare_data
from headway.training.events import Listener
from headway.training.loop import train
from headway.training.run_directory import MODEL, RESULT
from headway.training.threads import thread_count

FIGURES_OF_RUN, SPEEDS, DOCUMENT, PAGE = "figures.json", "speeds.json", "heads.json", "report.md"


@dataclass(frozen=True)
class FinishedHeads:
    """Every figure, and where the report lies."""

    result: HeadsResult
    report: Path


def run_heads(
    options: HeadsOptions, *, say: Callable[[str], None] = lambda text: None, on_event: Listener | None = None
) -> FinishedHeads:
    """Train every variant with every seed on the same text, measure all of them, then their speeds, and report.

    torch's thread count is afterwards as it was before.

    Args:
        options: what the caller chose.
        say: told one sentence per finding.
        on_event: hears of the training runs.

    Raises:
        ConfigError: a folder that holds something else or a comparison with other settings, or options that cannot work.
        HeadwayError: see `headway.training.loop.train`; after an interruption the same call goes on.
    """
    # Of the code that is loaded: the checkout may have moved on by the time a run ends.
    origin = provenance()
    claim_folder(options.folder, options.training_settings(), overwrite=options.overwrite)
    with thread_count(options.threads):
        any_run = options.training_config(options.chosen[0], options.seeds[0])
        data = prepare_data(any_run, load_tokenizer(any_run.tokenizer_name), options.folder / TOKENS, notice=say)
        if data.held_out is None:
            raise DataError("a comparison needs held-out text; the sources gave none")
        held_out = HeldOut.of(data.held_out, options.scale)
        runs: dict[str, list[dict[str, Any]]] = {}
        # Seed by seed, so that a comparison cut short holds every architecture.
        for seed in options.seeds:
            for variant in options.chosen:
                figures = _one_run(options, variant, seed, held_out, origin, say, on_event)
                runs.setdefault(variant.name, []).append(figures)
        speeds = _speeds(options, data, held_out, say)
    rows = tuple(
        variant_result(
            variant,
            runs[variant.name],
            training_speed=speeds["training"][variant.name]["tokens_per_second"],
            decoding=speeds["decoding"][variant.name],
        )
        for variant in options.chosen
    )
    every_run = [run for figures in runs.values() for run in figures]
    result = HeadsResult(
        variants=rows,
        seeds=options.seeds,
        settings={"training": options.training_settings(), "evaluation": options.evaluation_settings()},
        held_out_tokens=int(held_out.windows.input_ids_BT.numel()),
        seconds={
            "training": sum(run["training_seconds"] for run in every_run),
            "measuring": sum(run["measuring_seconds"] for run in every_run),
            "speeds": speeds["seconds"],
        },
        provenance=origin,
        commits={part: tuple(sorted({str(run[part]) for run in every_run})) for part in ("trained_by", "measured_by")},
    )
    write_json(options.folder / DOCUMENT, result.to_json())
    for name, draw in FIGURES.items():
        write_text(options.folder / name, draw(result))
    write_text(options.folder / PAGE, report_page(result))
    finish_folder(options.folder, options.training_settings())
    return FinishedHeads(result, options.folder / PAGE)


def _one_run(
    options: HeadsOptions,
    variant: HeadVariant,
    seed: int,
    held_out: HeldOut,
    origin: Mapping[str, Any],
    say: Callable[[str], None],
    on_event: Listener | None,
) -> dict[str, Any]:
    """Train and measure one variant with one seed, or read what a former process did."""
    folder = options.run_folder(variant, seed)
    figures_file = folder / FIGURES_OF_RUN
    measured = _read_if_current(figures_file, options)
    if measured is not None:
        return measured
    if not (folder / RESULT).exists():
        say(f"{variant.name}, seed {seed}: training")
        train(options.training_config(variant, seed), on_event=on_event)
    with _stopwatch() as seconds:
        figures = measure_model(folder / MODEL, options.training_config(variant, seed), held_out, options.scale)
    trained = _read(folder / RESULT)
    figures |= {
        "evaluation": options.evaluation_settings(),
        "training_seconds": trained["elapsed_seconds"],
        "training_loss": trained["loss_per_offset"],
        "measuring_seconds": seconds(),
        "trained_by": trained["provenance"]["commit"],
        "measured_by": origin["commit"],
    }
    write_json(figures_file, figures)
    say(f"{variant.name}, seed {seed}: {_summary(figures)}")
    return figures


def _speeds(options: HeadsOptions, data: TrainingData, held_out: HeldOut, say: Callable[[str], None]) -> dict[str, Any]:
    file = options.folder / SPEEDS
    names = [variant.name for variant in options.chosen]
    saved = _read_if_current(file, options)
    if saved is not None and set(names) <= set(saved["training"]):
        return saved
    say("speeds: all variants taking turns")
    seed, scale = options.seeds[0], options.scale
    configs = {variant.name: options.training_config(variant, seed) for variant in options.chosen}
    models = {
        variant.name: MultiTokenLM.from_pretrained(options.run_folder(variant, seed) / MODEL).eval()
        for variant in options.chosen
    }
    with _stopwatch() as seconds:
        rows = data.rows(sequence_length=scale.fields["sequence_length"], seed=seed)
        speeds: dict[str, Any] = {
            "training": training_speeds(configs, rows, repeats=scale.training_repeats),
            "decoding": decoding_speeds(
                models,
                held_out.prompts_BT[: scale.speed_prompts],
                new_tokens=scale.speed_new_tokens,
                repeats=scale.speed_repeats,
            ),
        }
    speeds = json_ready(speeds | {"seconds": seconds(), "evaluation": options.evaluation_settings()})
    write_json(file, speeds)
    return speeds


@contextmanager
def _stopwatch() -> Iterator[Callable[[], float]]:
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


def _read_if_current(file: Path, options: HeadsOptions) -> dict[str, Any] | None:
    """Figures of a former process, where there are any and they were made under the same conditions."""
    if not file.exists():
        return None
    saved = _read(file)
    return saved if saved.get("evaluation") == options.evaluation_settings() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON document: {error}; delete it, and it is made again") from error
    return figures


def _summary(figures: Mapping[str, Any]) -> str:
    held_out, lossless = figures["held_out"], figures["lossless"]
    nats = " ".join(f"{value:.3f}" for value in held_out["nats"])
    return (
        f"held-out nats {nats}; {held_out['first_block']['mean_acceptance_length']:.3f} loop-free tokens per forward; "
        f"{lossless['identical_rows']} of {lossless['rows']} rows identical; caches off by "
        f"{figures['caches']['relative']:.1e}"
    )
