"""`headway generate`: continue a prompt, plainly, self-speculatively, or both to compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headway.cli.console import DTYPES, emit_json, note
from headway.cli.drafting import DRAFT_LENGTH, drafting_arguments, drafting_flags
from headway.cli.prompt import encode_prompt, read_prompt
from headway.errors import ConfigError, DecodingError
from headway.provenance import provenance

if TYPE_CHECKING:
    from torch import Tensor

    from headway.cli.models import LoadedModel
    from headway.cli.timed_generation import Session

DEFAULT_NEW_TOKENS = 256
EXIT_DIFFERENT = 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedy where no field is set."""

    temperature: float | None
    top_p: float | None
    seed: int | None
    top_k: int | None = None
    min_p: float | None = None

    @property
    def asked_for(self) -> bool:
        """Whether anything but the most likely token can be chosen."""
        return self.temperature != 0 and any(
            value is not None for value in (self.temperature, self.top_p, self.seed, self.top_k, self.min_p)
        )

    def arguments(self) -> dict[str, Any]:
        """For `generate`; overrides what the folder's generation_config.json says about sampling."""
        if not self.asked_for:
            return {"do_sample": False}
        arguments = {
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
        }
        optional = {"min_p": self.min_p, "seed": self.seed}
        return arguments | {name: value for name, value in optional.items() if value is not None}


GREEDY = Sampling(temperature=None, top_p=None, seed=None)


@click.command("generate")
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="Read the prompt from this file. Without it and without PROMPT: from stdin.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Limit of new tokens. Default: 256, or what is left of the model's longest context.",
)
@click.option(
    "--num-draft-tokens",
    type=DRAFT_LENGTH,
    help="Drafted tokens per forward. Default: one per head; 0 decodes plainly; auto measures costs and acceptance while it "
    "decodes and drafts as much as pays, down to nothing.",
)
@click.option("--compare", is_flag=True, help="Decode plainly, then self-speculatively, and compare tokens and speed.")
@click.option(
    "--show-blocks",
    is_flag=True,
    help="Show which forward pass gave what: by colour on a terminal, else by [brackets].",
)
@click.option("--stop", multiple=True, metavar="STRING", help="End after this string; may be given several times.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample at this temperature; 0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Sample from the smallest set of tokens with this share of the probability.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from so many most likely tokens.")
@click.option(
    "--min-p",
    type=click.FloatRange(min=0, max=1),
    help="Sample from tokens at least so likely, as a share of the most likely one.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Sample, reproducibly.")
@drafting_flags
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. Default: as saved.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
@click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON document.")
def generate_command(
    model: str,
    prompt: str | None,
    file: Path | None,
    max_new_tokens: int | None,
    num_draft_tokens: int | str | None,
    compare: bool,
    show_blocks: bool,
    stop: tuple[str, ...],
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    seed: int | None,
    dtype: str | None,
    threads: int | None,
    as_json: bool,
    **drafting: Any,
) -> None:
    """Continue a prompt, faster, with not one token changed.

    MODEL is a headway folder; a plain Hugging Face folder works too, with one token per forward. The prompt is PROMPT,
    a file, or stdin, taken as it is. The new text goes to stdout while it comes, everything else to stderr; with
    --compare or --json the last line of stdout is one JSON document.

    Greedy decoding drafts with the heads and gives the tokens of plain decoding; --compare shows it, and ends with
    status 1 where a token differs. Sampling (--temperature, --top-p, --top-k, --min-p, --seed) follows the model's own
    distribution, and one seed gives one text, with and without drafts.
    """
    sampling = Sampling(temperature, top_p, seed, top_k, min_p)
    if compare:
        _check_comparable(sampling, num_draft_tokens)
    if drafting["sample_drafts"] and not sampling.asked_for:
        raise ConfigError(
            "--sample-drafts is for sampling: pass --temperature, --top-p, --top-k, --min-p or --seed with it"
        )
    if any(not string for string in stop):
        raise ConfigError("--stop got an empty string, which ends every text at once; pass at least one character")

    data = read_prompt(prompt, file)
    session = open_session(
        model,
        data,
        sampling,
        dtype=dtype,
        threads=threads,
        stop=stop,
        limit=max_new_tokens,
        show_blocks=show_blocks,
        drafting=drafting_arguments(drafting),
    )
    document = describe(session)
    if compare:
        document |= _compared(session, num_draft_tokens)
    else:
        document |= _generated(session, num_draft_tokens)
    if compare or as_json:
        emit_json(document)
    if document.get("interrupted"):
        raise click.Abort
    if not document.get("identical", True):
        raise click.exceptions.Exit(EXIT_DIFFERENT)


def open_session(
    model: str,
    data: bytes,
    sampling: Sampling,
    *,
    dtype: str | None,
    threads: int | None,
    stop: tuple[str, ...],
    limit: int | None,
    show_blocks: bool,
    drafting: dict[str, Any] | None = None,
) -> Session:
    """A loaded model and its prompt, ready to generate; `drafting` holds further arguments of `generate`.

    Raises:
        HeadwayError: the folder, the prompt or the limits cannot be used.
    """
    import torch

    from headway.cli.models import load_model_folder
    from headway.cli.timed_generation import Session

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model_folder(model, dtype=dtype)
    input_ids_1T = encode_prompt(data, loaded.tokenizer)
    arguments = _generation_arguments(loaded, input_ids_1T, limit, stop) | sampling.arguments() | (drafting or {})
    return Session(loaded, input_ids_1T, arguments, show_blocks)


def _generated(session: Session, num_draft_tokens: int | str | None) -> dict[str, Any]:
    if not session.loaded.has_heads and not session.copies:
        note(f"{session.loaded.name} has no heads: one token per forward")
    generation = session.run(num_draft_tokens)
    if generation.result.note:
        note(generation.result.note)
    note(generation.summary())
    return generation.to_json()


def _compared(session: Session, num_draft_tokens: int | str | None) -> dict[str, Any]:
    from headway.cli.compare import compare_decoding

    if not session.loaded.has_heads and not session.copies:
        raise DecodingError(
            f"{session.loaded.name} has no heads, so there is nothing to compare; leave --compare out, pass a headway "
            f"folder, or draft by --drafts lookup"
        )
    comparison = compare_decoding(session, num_draft_tokens)
    for line in comparison.lines():
        note(line)
    return comparison.to_json()


def _check_comparable(sampling: Sampling, num_draft_tokens: int | str | None) -> None:
    if sampling.asked_for:
        raise ConfigError(
            "--compare is for greedy decoding, whose tokens must be equal: leave --temperature, --top-p, --top-k, --min-p "
            "and --seed out"
        )
    if num_draft_tokens == 0:
        raise ConfigError(
            "--compare with --num-draft-tokens 0 would compare plain decoding with itself; pass 1 or more"
        )


def _generation_arguments(
    loaded: LoadedModel, input_ids_1T: Tensor, max_new_tokens: int | None, stop: tuple[str, ...]
) -> dict[str, Any]:
    length = input_ids_1T.shape[1]
    limit = int(loaded.model.config.max_position_embeddings)
    # The last new token is never fed back, so it needs no position.
    room = limit - length + 1
    if length > limit:
        raise DecodingError(
            f"the prompt has {length} tokens, this model was built for {limit}; shorten it by at least {length - limit}"
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise DecodingError(
            f"a prompt of {length} tokens leaves room for {room} new ones of the {limit} that this model was built "
            f"for: got --max-new-tokens {max_new_tokens}; lower it, or shorten the prompt"
        )
    config = loaded.model.generation_config
    end = loaded.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or min(DEFAULT_NEW_TOKENS, room),
        "eos_token_id": end,
        "pad_token_id": loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else end,
    }
    if stop:
        arguments |= {"stop_strings": list(stop), "tokenizer": loaded.tokenizer}
    return arguments


def describe(session: Session) -> dict[str, Any]:
    """Model, machine and limits of a session, JSON-ready."""
    import torch

    weight = next(session.loaded.model.parameters())
    return {
        "model": session.loaded.name,
        "num_future_tokens": session.loaded.model.num_future_tokens,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "threads": torch.get_num_threads(),
        "prompt_tokens": session.input_ids_1T.shape[1],
        "max_new_tokens": session.max_new_tokens,
        "provenance": provenance(),
    }
