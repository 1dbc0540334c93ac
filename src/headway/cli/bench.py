"""`headway bench`: every way to decode one model, on this machine, taking turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from headway.cli.console import DTYPES, emit_json, human_console, note
from headway.cli.drafting import drafting_arguments
from headway.errors import ConfigError, DecodingError

if TYPE_CHECKING:
    from headway.cli.models import LoadedModel
    from headway.experiments.bench.generation import Limits

EXIT_DIFFERENT = 1


@click.command("bench")
@click.argument("model")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A text, cut into prompts evenly; or .jsonl, one prompt per line, Spec-Bench's question.jsonl too. Default: "
    "library code that the demo holds out.",
)
@click.option("--field", help="Field of a JSON line that holds the prompt. Default: turns, prompt, question or text.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts per round.")
@click.option("--prompt-tokens", type=click.IntRange(min=2), help="Length of a prompt. Default: 128, or what fits.")
@click.option("--max-new-tokens", type=click.IntRange(min=2), help="Per prompt. Default: 128, or what fits.")
@click.option(
    "--arms",
    metavar="NAME,...",
    help="plain, chain (every length; chain-2: one), tree, calibrated, dynamic, auto, lookup, heads+lookup, hf, hf-static, "
    "hf-lookup, hf-assisted, llama.cpp, int8 (rounded weights: another model). Default: all but int8; what cannot run here is "
    "listed with the reason.",
)
@click.option("--executors", metavar="NAME,...", default="eager,lean", show_default=True, help="Of this engine's arms.")
@click.option("--batch", metavar="NUMBER,...", default="1", show_default=True, help="Rows decoded together.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Timed; the arms take turns.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Rounds before them.")
@click.option(
    "--tree",
    metavar="NODES|JSON|calibrated",
    default="12",
    show_default=True,
    help="Of the arms with a tree; calibrated is what `headway calibrate` stored for this machine.",
)
@click.option(
    "--num-lookup-tokens", type=click.IntRange(min=1), default=8, show_default=True, help="That copies draft."
)
@click.option(
    "--assistant",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a smaller model, for hf-assisted.",
)
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Export of the model, for llama.cpp. Repeatable. Default: its plain part, exported here in its own precision and "
    "in Q8_0 (llama and mistral models).",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. Default: as saved.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="Time drawn texts instead of greedy ones, which small models loop in. Default: greedy.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn texts.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="New folder for bench.json, the page bench.html and the plots.",
)
@click.option("--overwrite", is_flag=True, help="Replace the benchmark in the folder named by --output.")
def bench_command(
    model: str,
    prompts_file: Path | None,
    field: str | None,
    num_prompts: int,
    prompt_tokens: int | None,
    max_new_tokens: int | None,
    arms: str | None,
    executors: str,
    batch: str,
    rounds: int,
    warmup: int,
    tree: str,
    num_lookup_tokens: int,
    assistant: Path | None,
    gguf: tuple[Path, ...],
    dtype: str | None,
    threads: int | None,
    temperature: float | None,
    seed: int,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Measure every way to decode a model on this machine.

    MODEL is a headway folder; a plain Hugging Face folder works too. The arms take turns, prompt by prompt, and are
    compared within rounds: medians with 95 % intervals. Speed-ups are over the fastest plain engine of the run,
    prefill apart. Token ids are counted, none behind an end of text; texts that loop are counted and left out of the
    headline (--temperature gives texts that do not). Arms that cannot run are listed with the reason.

    The last line of stdout is one JSON document. The status is 1 where a greedy text differs from plain decoding's by
    more than a near-tie (float32 and float64; in half precision differences are counted only).
    """
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    import torch

    from headway.cli.models import load_model_folder
    from headway.cli.prompt import encode_prompt
    from headway.experiments.bench.arms import ARMS, ArmOptions
    from headway.experiments.bench.folder import check_folder, write_folder
    from headway.experiments.bench.other_engines import own_exports
    from headway.experiments.bench.prompts import read_prompts
    from headway.experiments.bench.run import BenchOptions, run_bench
    from headway.experiments.bench.table import bench_tables

    options = BenchOptions(
        arms=ArmOptions(
            names=ARMS if arms is None else _names(arms, "--arms"),
            executors=_names(executors, "--executors"),
            tree=drafting_arguments({"tree": tree})["tree"],
            num_lookup_tokens=num_lookup_tokens,
            assistant=assistant,
            gguf=gguf,
        ),
        batches=_numbers(batch, "--batch"),
        rounds=rounds,
        warmup=warmup,
    )
    if output is not None:
        check_folder(output, overwrite=overwrite)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model_folder(model, dtype=dtype)
    prompt_tokens, max_new_tokens = _lengths(loaded, prompt_tokens, max_new_tokens)

    def encode(data: bytes) -> list[int]:
        ids: list[int] = encode_prompt(data, loaded.tokenizer)[0].tolist()
        return ids

    prompts = read_prompts(
        prompts_file,
        encode,
        count=num_prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=max_new_tokens,
        field=field,
    )
    console = human_console()
    with console.status("loading") as status, TemporaryDirectory() as exports:
        arms_with_export = replace(
            options.arms, export=lambda: own_exports(loaded.model, loaded.tokenizer, Path(exports))
        )
        document = run_bench(
            loaded.model,
            prompts,
            replace(options, arms=arms_with_export),
            _limits(loaded, max_new_tokens, temperature, seed),
            name=loaded.name,
            progress=lambda line: status.update(line),
        )
    for part in bench_tables(document):
        console.print(part)
    if output is not None:
        note(f"page: {write_folder(document, output)}")
    emit_json(document)
    if not document["equal"]:
        raise click.exceptions.Exit(EXIT_DIFFERENT)


def _names(text: str, flag: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"{flag} takes names separated by commas: got {text!r}")
    return names


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise ConfigError(f"{flag} takes whole numbers separated by commas: got {text!r}") from None
    if min(numbers) < 1:
        raise ConfigError(f"{flag} takes numbers of at least 1: got {text!r}")
    return numbers


def _lengths(loaded: LoadedModel, prompt_tokens: int | None, max_new_tokens: int | None) -> tuple[int, int]:
    context = int(loaded.model.config.max_position_embeddings)
    prompt = prompt_tokens or min(128, context // 2)
    new = max_new_tokens or min(128, context - prompt)
    if prompt + new > context or new < 2:
        raise DecodingError(
            f"{loaded.name} was built for {context} tokens: a prompt of {prompt} and {new} new ones do not fit; lower "
            f"--prompt-tokens or --max-new-tokens"
        )
    return prompt, new


def _limits(loaded: LoadedModel, max_new_tokens: int, temperature: float | None, seed: int) -> Limits:
    from headway.experiments.bench.generation import Limits

    end = loaded.model.generation_config.eos_token_id
    if end is None:
        end = loaded.tokenizer.eos_token_id
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    pad = loaded.tokenizer.pad_token_id
    fill = pad if pad is not None else ends[0] if ends else 0
    return Limits(max_new_tokens, ends, fill, temperature, seed)
