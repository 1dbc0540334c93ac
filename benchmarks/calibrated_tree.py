"""The calibrated tree against the best chain, the default tree and heads with lookup: expected and measured.

The first half of a text calibrates (`headway calibrate`, nothing is stored), the second half gives the prompts. The text is
FILE, or without one the packages of this interpreter's library that the reference model has never seen. The arms
take turns, prompt by prompt, in an order that rotates; a ratio is of seconds after the prefill within one round, for the same
tokens. "Expected" is what the calibration says of continuations on its own half; "tokens_per_forward" is counted while the
prompts are decoded. Continuations that loop are left out of both: they are easy to draft for.

    python benchmarks/calibrated_tree.py reference/model --output benchmarks/results/calibrated_tree.json
    python benchmarks/calibrated_tree.py MODEL FILE --temperature 0.8

Two to four minutes on two quiet cores for the reference model. One JSON document last.
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
from headway.data.sources import standard_library
from headway.decoding.blocks import stream_blocks
from headway.decoding.calibration.ranks import sampling_arguments, text_windows
from headway.decoding.calibration.run import CalibrationOptions, CalibrationResult, calibrate
from headway.decoding.calibration.solve import Expectation, fastest
from headway.errors import DecodingError, HeadwayError
from headway.experiments.reference.corpora import HELD_OUT
from headway.experiments.reference.place import reference_record
from headway.functional.repetition import loops
from headway.provenance import provenance

DEFAULT_TREE = 12
ARMS = (
    "plain",
    "best chain",
    "calibrated tree",
    f"default tree of {DEFAULT_TREE}",
    "best chain + lookup",
    "calibrated tree + lookup",
    "lookup",
)


def held_out_packages(folder: Path) -> bytes:
    """Packages of this interpreter's library that the reference model has never seen, one behind the other."""
    packages = set(reference_record(folder)["data"]["held_out_packages"])
    return b"\n".join(document.data for document in standard_library() if document.group in packages)


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


def decode(
    model: Any, prompt_1T: torch.Tensor, arguments: Mapping[str, Any], *, new: int, executor: str
) -> tuple[float, list[int], int]:
    """Seconds after the prefill, the new tokens, and the forwards after it."""
    stream = stream_blocks(model, prompt_1T, max_new_tokens=new, executor=executor, **arguments)
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
                "arguments": {key: value for key, value in arguments.items() if key != "draft_vocabulary"},
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="headway folder")
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        help="text: half of it calibrates, half of it is continued; default: held-out packages",
    )
    parser.add_argument("--output", type=Path, help="also write the JSON document here, after every round")
    parser.add_argument("--prompts", type=int, default=16, help="pieces of the second half, some of which may loop")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a piece")
    parser.add_argument("--new-tokens", type=int, default=128, help="per prompt")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, at least 2")
    parser.add_argument("--windows", type=int, default=32, help="pieces of the first half, some of which may loop")
    parser.add_argument("--against", default="continuation", choices=["continuation", "text"], help="see calibrate")
    parser.add_argument("--temperature", type=float, default=0.0, help="at which texts are drawn; 0 for greedy ones")
    parser.add_argument("--executor", default="lean", choices=["eager", "lean"], help="what runs the model")
    parser.add_argument("--dtype", help="of the weights; default: as saved")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 2:
        parser.error("--repeats needs at least 2, for a spread")
    torch.set_num_threads(arguments.threads)
    try:
        document = measure(arguments)
    except HeadwayError as error:
        parser.error(str(error))
    for row in document["rows"]:
        expected, told = row["expected"], ""
        if expected is not None:
            told = f"; expected x{expected['over_plain']:.3f}, {expected['tokens_per_forward']:.2f} tokens per forward"
        print(
            f"{row['arm']:26} x{row['over_plain']['median']:.3f} {row['over_plain']['quartiles']} over plain, "
            f"{row['tokens_per_forward']:.2f} tokens per forward{told}",
            file=sys.stderr,
        )
    print(json.dumps(document))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, decode in turn, and say what came of it.

    Raises:
        HeadwayError: a model or a text that cannot be calibrated or whose continuations all loop.
    """
    loaded = load_model_folder(arguments.model, dtype=arguments.dtype)
    text = held_out_packages(Path(arguments.model)) if arguments.file is None else arguments.file.read_bytes()
    ids = encode_prompt(text, loaded.tokenizer)[0].tolist()
    options = CalibrationOptions(
        executor=arguments.executor,
        against=arguments.against,
        temperature=arguments.temperature if arguments.against == "continuation" else 0.0,
        windows=arguments.windows,
        prompt_tokens=arguments.prompt_tokens,
        # As much as is decoded, and what the last drafts reach beyond it: longer texts have more to copy from.
        new_tokens=arguments.new_tokens + loaded.model.num_future_tokens,
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
        # As it was calibrated: whatever the heads draft.
        arms = {
            name: (expected, own if name in ("plain", "lookup") else own | {"draft_vocabulary": part})
            for name, (expected, own) in arms.items()
        }
    sampling = sampling_arguments(arguments.temperature, seed=options.seed)
    arms = {name: (expected, own | sampling) for name, (expected, own) in arms.items()}
    prompts_WT = text_windows(ids[len(ids) // 2 :], count=arguments.prompts, length=arguments.prompt_tokens)
    document: dict[str, Any] = {
        "benchmark": "calibrated_tree",
        "setting": {
            "model": loaded.name,
            "text": HELD_OUT if arguments.file is None else arguments.file.name,
            "prompts": len(prompts_WT),
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "temperature": arguments.temperature,
            "repeats": arguments.repeats,
            "executor": result.calibration.key.executor,
            "dtype": result.calibration.key.dtype,
            "threads": arguments.threads,
            "batch": 1,
        },
        "calibration": {name: value for name, value in result.calibration.report.items() if name != "provenance"},
        "left_out": {
            name: "no candidate of these heads but their first was ever right" for name in ARMS if name not in arms
        },
        "provenance": provenance(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    prompts = list(prompts_WT)
    for repeat in range(arguments.repeats + 1):
        rounds: dict[str, list[tuple[float, list[int], int]]] = {name: [] for name in arms}
        for number, prompt_T in enumerate(prompts):
            turn = (repeat + number) % len(arms)
            for name in [*arms][turn:] + [*arms][:turn]:
                found = decode(
                    loaded.model,
                    prompt_T[None],
                    arms[name][1],
                    new=arguments.new_tokens,
                    executor=arguments.executor,
                )
                rounds[name].append(found)
        if not repeat:  # warms up, and shows which texts loop: every round gives the same ones
            prompts = [prompt for prompt, (_, text, _) in zip(prompts, rounds["plain"], strict=True) if not loops(text)]
            if not prompts:
                raise DecodingError(f"all {len(prompts_WT)} texts loop, so nothing can be said; pass --temperature 0.8")
            continue
        counts, differing = {}, {}
        for name, made in rounds.items():
            seconds[name].append(sum(took for took, _, _ in made))
            # The prefill's token is in no forward.
            counts[name] = sum(len(tokens) - 1 for _, tokens, _ in made), sum(steps for _, _, steps in made)
            differing[name] = sum(own[1] != plain[1] for own, plain in zip(made, rounds["plain"], strict=True))
        document["looping"] = len(prompts_WT) - len(prompts)
        document["rows"] = summary(arms, seconds, counts, differing, result.plain)
        document["rounds"] = repeat
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    main()
