"""The calibrated tree against the best chain, the default tree and heads with lookup: expected and measured.

The first half of the file calibrates (`headway calibrate`, nothing is stored), the second half gives the prompts. The arms
take turns, prompt by prompt, in an order that rotates; a ratio is of seconds after the prefill within one round, for the same
tokens. "Expected" is what the calibration says on its own half; "tokens_per_forward" is counted while the prompts are decoded.

    python benchmarks/calibrated_tree.py MODEL FILE [--output benchmarks/results/calibrated_tree.json]

About five minutes on two quiet cores for a byte model of 9M parameters. One JSON document last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headway.cli.models import load_model_folder
from headway.cli.prompt import encode_prompt
from headway.decoding.blocks import stream_blocks
from headway.decoding.calibration.ranks import text_windows
from headway.decoding.calibration.run import CalibrationOptions, CalibrationResult, calibrate
from headway.decoding.calibration.solve import Expectation, fastest
from headway.provenance import provenance

DEFAULT_TREE = 12


def arms_of(
    result: CalibrationResult, options: CalibrationOptions
) -> dict[str, tuple[Expectation | None, dict[str, Any]]]:
    """Per arm what is expected of it, and arguments of `generate`."""
    chain, tree = fastest(list(result.chains)), fastest(list(result.trees)) if result.trees else None
    arms: dict[str, tuple[Expectation | None, dict[str, Any]]] = {
        "plain": (result.plain, {"num_draft_tokens": 0}),
        "best chain": (chain, {"num_draft_tokens": chain.nodes}),
    }
    copied = {"drafts": "heads+lookup", "num_lookup_tokens": options.num_lookup_tokens}
    if tree is not None:
        arms["calibrated tree"] = tree, {"tree": tree.tree.choices}
        arms[f"default tree of {DEFAULT_TREE}"] = None, {"tree": DEFAULT_TREE}
        arms["best chain + lookup"] = None, copied | {"num_draft_tokens": chain.nodes}
    if result.beside_lookup:
        beside = fastest(list(result.beside_lookup))
        arms["calibrated tree + lookup"] = beside, copied | {"tree": beside.tree.choices}
    arms["lookup"] = None, {"drafts": "lookup", "num_lookup_tokens": options.num_lookup_tokens}
    return arms


def decode(model: Any, prompt_1T: torch.Tensor, arguments: Mapping[str, Any], *, new: int, executor: str) -> Any:
    """Seconds after the prefill, the new tokens, and the forwards after it."""
    stream = stream_blocks(model, prompt_1T, max_new_tokens=new, do_sample=False, executor=executor, **arguments)
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    seconds = time.perf_counter() - start
    result = stream.result
    return seconds, result.sequences[0, prompt_1T.shape[1] :].tolist(), int(result.acceptance.forwards[0])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": round(statistics.median(values), 4),
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "rounds": [round(value, 4) for value in values],
    }


def summary(
    arms: Mapping[str, tuple[Expectation | None, dict[str, Any]]],
    seconds: Mapping[str, Sequence[float]],
    counts: Mapping[str, tuple[int, int]],
    differing: Mapping[str, int],
    plain: Expectation,
) -> list[dict[str, Any]]:
    """One row per arm."""
    rows = []
    for name, (expected, arguments) in arms.items():
        tokens, forwards = counts[name]
        ratios = [before / after for before, after in zip(seconds["plain"], seconds[name], strict=True)]
        rows.append(
            {
                "arm": name,
                "arguments": arguments,
                "tokens_per_second": spread([tokens / own for own in seconds[name]]),
                "over_plain": spread(ratios),
                "tokens_per_forward": round(tokens / forwards, 4),
                "forward_ms": round(statistics.median(seconds[name]) / forwards * 1000, 4),
                "expected": None
                if expected is None
                else {
                    "tokens_per_forward": round(expected.tokens_per_forward, 4),
                    "forward_ms": round(expected.forward_seconds * 1000, 4),
                    "tokens_per_second": round(expected.tokens_per_second, 2),
                    "over_plain": round(expected.tokens_per_second / plain.tokens_per_second, 4),
                },
                "prompts_that_differ_from_plain": differing[name],
            }
        )
    return rows


def main() -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="headway folder")
    parser.add_argument("file", type=Path, help="text: half of it calibrates, half of it is continued")
    parser.add_argument("--output", type=Path, help="also write the JSON document here, after every round")
    parser.add_argument("--prompts", type=int, default=8, help="pieces of the second half")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a piece")
    parser.add_argument("--new-tokens", type=int, default=128, help="per prompt")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, at least 2")
    parser.add_argument("--windows", type=int, default=16, help="pieces of the first half")
    parser.add_argument("--against", default="continuation", choices=["continuation", "text"], help="see calibrate")
    parser.add_argument("--executor", default="lean", choices=["eager", "lean"], help="what runs the model")
    parser.add_argument("--dtype", help="of the weights; default: as saved")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats needs at least 2, for a spread")
    torch.set_num_threads(arguments.threads)
    loaded = load_model_folder(arguments.model, dtype=arguments.dtype)
    ids = encode_prompt(arguments.file.read_bytes(), loaded.tokenizer)[0].tolist()
    options = CalibrationOptions(
        executor=arguments.executor,
        against=arguments.against,
        windows=arguments.windows,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens + 64,
        lookup=True,
    )
    result = calibrate(
        loaded.model,
        ids[: len(ids) // 2],
        options,
        store=False,
        progress=lambda line: print(line, file=sys.stderr),
    )
    arms = arms_of(result, options)
    part = result.calibration.draft_vocabulary
    if part is not None:
        arms = {
            name: (expected, own if "tree" not in own else own | {"draft_vocabulary": part})
            for name, (expected, own) in arms.items()
        }
    prompts_WT = text_windows(ids[len(ids) // 2 :], count=arguments.prompts, length=arguments.prompt_tokens)
    document: dict[str, Any] = {
        "benchmark": "calibrated_tree",
        "setting": {
            "model": loaded.name,
            "file": arguments.file.name,
            "prompts": len(prompts_WT),
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "repeats": arguments.repeats,
            "executor": result.calibration.key.executor,
            "dtype": result.calibration.key.dtype,
            "threads": arguments.threads,
            "batch": 1,
        },
        "calibration": {name: value for name, value in result.calibration.report.items() if name != "provenance"},
        "provenance": provenance(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    counts, differing = {}, {}
    for repeat in range(arguments.repeats + 1):
        spent = dict.fromkeys(arms, 0.0)
        made: dict[str, list[Any]] = {name: [] for name in arms}
        forwards = dict.fromkeys(arms, 0)
        for number, prompt_T in enumerate(prompts_WT):
            turn = (repeat + number) % len(arms)
            for name in [*arms][turn:] + [*arms][:turn]:
                took, tokens, steps = decode(
                    loaded.model,
                    prompt_T[None],
                    arms[name][1],
                    new=arguments.new_tokens,
                    executor=arguments.executor,
                )
                spent[name] += took
                made[name].append(tokens)
                forwards[name] += steps
        if not repeat:  # warms up
            continue
        for name in arms:
            seconds[name].append(spent[name])
            # The prefill's token is in no forward.
            counts[name] = sum(len(tokens) - 1 for tokens in made[name]), forwards[name]
            differing[name] = sum(own != plain for own, plain in zip(made[name], made["plain"], strict=True))
        document["rows"] = summary(arms, seconds, counts, differing, result.plain)
        document["rounds"] = repeat
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["rows"]:
        expected = row["expected"] or {}
        print(
            f"{row['arm']:26} x{row['over_plain']['median']:.3f} {row['over_plain']['quartiles']} over plain "
            f"(expected x{expected.get('over_plain', float('nan')):.3f}), {row['tokens_per_forward']:.2f} tokens per forward "
            f"(expected {expected.get('tokens_per_forward', float('nan')):.2f})",
            file=sys.stderr,
        )
    print(json.dumps(document))


if __name__ == "__main__":
    main()
