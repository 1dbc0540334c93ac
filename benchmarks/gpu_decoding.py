"""Decoding on a CUDA device: steps with and without graphs beside the memory's bandwidth, speed-ups, exactness.

    python benchmarks/gpu_decoding.py [--model FOLDER --text FILE] [--output benchmarks/results/gpu_decoding.json]

Meant for ten minutes on a GPU with 40 GB. The document is written after each part, and printed last:

- bandwidth: bytes read and written per second while a large buffer is copied. What steps are held against.
- speed_measured, with --model: tokens per second with the heads' own drafts over none, on prompts from --text.
- steps, on a model of the shape of Llama 3.2 1B with random bfloat16 weights and three transformer heads: a plain step, and one
  that verifies three drafted tokens and drafts three; by the Hugging Face model ("eager"), by lean blocks under the host's loop
  ("lean"), as one static step without capture ("static"), as a CUDA graph ("graph"), and as one of a step that torch.compile
  has fused before ("compiled graph"). Share: bytes of all weights that the step needs and of its keys and values, each once,
  over time and bandwidth.
- speed_simulated: tokens per second after the prefill, the arms taking turns. Acceptance is simulated: so many drafts of a block
  stand as a table says, whatever the tokens are; costs are real.
- lossless: in float32, drafts that are right at 70 % of the places against the eager executor without drafts, near-ties counted;
  in bfloat16, replayed graphs against the same steps un-captured, which must be equal, and drafts against none, where
  differences are listed with their logit gaps, since products of one row and of four are different kernels.

Without a CUDA device it says so and ends with 2. --rehearse runs every part with a tiny model on the CPU, steps un-captured: a
test of this program, of which no figure means anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

import headway
from headway.decoding.blocks import stream_blocks
from headway.decoding.compare import NEAR_TIE_GAP, first_difference, top_two_gap
from headway.decoding.engine import decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.graphs import executor as graphs_executor
from headway.decoding.graphs.capture import Capture, CompiledCapture, CudaCapture, call_instead, graph_settings
from headway.decoding.graphs.emission import Emitted, GreedyChoice
from headway.decoding.graphs.executor import GraphExecutor
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.model import LeanModel
from headway.decoding.prompts import Prompts
from headway.model.config import MultiTokenConfig
from headway.provenance import provenance

DRAFTS = 3


@dataclass(frozen=True)
class Setting:
    """Sizes of a run.

    Attributes:
        device: where it runs.
        dtype: of the weights.
        shape: of the random model, as `LlamaConfig` names it.
        copied_bytes: of the buffer whose copy measures the bandwidth.
        context: tokens of a prompt.
        new: tokens generated per row.
        steps: timed steps per figure.
        turns: of the arms of the speed part.
        batches: rows.
        lengths: simulated tokens per forward.
    """

    device: torch.device
    dtype: torch.dtype
    shape: dict[str, int]
    copied_bytes: int
    context: int
    new: int
    steps: int
    turns: int
    batches: tuple[int, ...]
    lengths: tuple[float, ...]


LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def random_model(setting: Setting) -> Any:
    """The shape with random weights; heads come on top of its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **setting.shape,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2 if setting.shape is TINY else 0.02,
    )
    with torch.device(setting.device):
        model = headway.MultiTokenLM.from_config(
            config, MultiTokenConfig(num_future_tokens=DRAFTS + 1), shorten_trunk=False, dtype=setting.dtype
        )
    return model.to(setting.device).eval()


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a rehearsal"


# ------------------------------------------------------------------------------------------------------------ bandwidth


def bandwidth(setting: Setting) -> dict[str, float]:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(setting.copied_bytes // 4, device=setting.device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), setting.device) for _ in range(setting.steps + 3)][3:]
    return {
        "copied_bytes": setting.copied_bytes,
        "bytes_per_second": 2 * setting.copied_bytes / statistics.median(seconds),
    }


# ---------------------------------------------------------------------------------------------------------------- steps


def needed_bytes(model: Any, *, batch: int, context: int, drafts: int) -> int:
    """Bytes of what a step has to read: weights once, rows of the embedding, keys and values."""
    table = model.get_input_embeddings().weight
    weights = {id(parameter): parameter for parameter in model.base.parameters() if parameter is not table}
    unembedding = model.family.lm_head.weight
    weights[id(unembedding)] = unembedding
    if drafts:
        weights |= {id(parameter): parameter for parameter in model.heads.parameters()}
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layers = config.num_hidden_layers + (model.heads.cache_layers(drafts) if drafts else 0)
    size = unembedding.element_size()
    cache = 2 * batch * context * layers * width * size
    read: int = sum(weight.numel() * size for weight in weights.values())
    return int(read + batch * (1 + drafts) * table.shape[1] * size + cache)


def host_step(executor: EagerExecutor, block_BM: Tensor, context: int, drafts: int) -> None:
    """What the host's loop does in one step, at a fixed place."""
    rows = block_BM.shape[0]
    states = executor.block(block_BM, [context] * rows, num_offsets=1 + drafts)
    own = executor.logits(states.last_hidden_BTD).argmax(dim=-1)
    own.tolist()
    if drafts:
        executor.draft(states, [0] * rows, last_B=own[:, 0], count=drafts)


def static_steps(
    lean: LeanModel, prompts: Prompts, setting: Setting, capture: Capture | None, options: dict[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    """Seconds of steps of the graph executor, each waited for, and what its captures cost."""
    with graph_settings(capture=capture, ahead=0):
        run = GraphExecutor(lean, prompts, choice=GreedyChoice(), **options)
    run.begin()
    places = [position + len(record.tokens) - 1 for position, record in zip(prompts.lengths, run.read(), strict=True)]

    def step() -> None:
        run.launch(places)
        for row, record in enumerate(run.read()):
            places[row] += len(record.tokens)

    seconds = [timed(step, setting.device) for _ in range(setting.steps + 3)][3:]
    run.done = True
    return seconds, asdict(run.graphs.report)


def step_times(model: Any, lean: LeanModel, setting: Setting, *, batch: int, drafts: int) -> dict[str, Any]:
    """Milliseconds per step of every arm, and the share of the bandwidth that each reaches."""
    vocabulary = setting.shape["vocab_size"]
    ids_BP = torch.randint(0, vocabulary, (batch, setting.context), device=setting.device)
    prompts = Prompts(ids_BP, [setting.context] * batch)
    new = (setting.steps + 8) * (1 + drafts)
    block_BM = torch.randint(0, vocabulary, (batch, 1 + drafts), device=setting.device)
    seconds: dict[str, list[float]] = {}
    options: dict[str, Any] = {"max_new_tokens": new, "num_draft_tokens": drafts}
    for name, kind, run in (("eager", EagerExecutor, model), ("lean", LeanExecutor, lean)):
        executor = kind(run, prompts, **options)
        executor.prefill(num_offsets=1 + drafts)
        steps = [
            timed(lambda: host_step(executor, block_BM, setting.context, drafts), setting.device)  # noqa: B023
            for _ in range(setting.steps + 3)
        ]
        seconds[name] = steps[3:]
    reports: dict[str, dict[str, Any]] = {}
    on_cuda = setting.device.type == "cuda"
    captures: dict[str, Capture | None] = {"static": call_instead, "graph": None if on_cuda else call_instead}
    if on_cuda:
        captures["compiled graph"] = CompiledCapture(CudaCapture(setting.device))
    for name, capture in captures.items():
        try:
            seconds[name], reports[name] = static_steps(lean, prompts, setting, capture, options)
        except Exception as error:
            # The compiler is the one part of the four that a machine may lack something for.
            if name != "compiled graph":
                raise
            reports[name] = {"not_run": f"{type(error).__name__}: {error}"[:300]}
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "batch": batch,
        "drafted_tokens": drafts,
        "needed_bytes": needed_bytes(model, batch=batch, context=setting.context, drafts=drafts),
        "milliseconds": {name: median * 1000 for name, median in medians.items()},
        "quartiles": {
            name: [1000 * quarter for quarter in statistics.quantiles(own, n=4)] for name, own in seconds.items()
        },
        "graphs": reports,
    }


# ---------------------------------------------------------------------------------------------------------------- speed


def forget_graphs(model: Any) -> None:
    """Give back the graphs of a model, where it has any."""
    lean = lean_model(model)
    if isinstance(lean, LeanModel):
        graphs_executor.forget(lean)


@contextmanager
def simulated(model: Any, device: torch.device) -> Iterator[Callable[[float], None]]:
    """Let as many drafts of a block stand as a table says; the function that is given sets its mean tokens per forward."""
    table_T = torch.zeros(64, dtype=torch.long, device=device)
    real = GraphExecutor._emit

    def emit(self: GraphExecutor, block_BM: Tensor, target_BM: Tensor) -> Emitted:
        rooms_B = self.state.rooms_B
        accepted_B = table_T[self.state.made_B % len(table_T)].clamp(max=block_BM.shape[1] - 1)
        counts_B = torch.minimum(accepted_B + 1, rooms_B)
        return Emitted(counts_B, accepted_B, counts_B == rooms_B)

    def set_mean(mean: float) -> None:
        # What stands by the place: few or many drafts in turn, so that forwards have the mean that is asked for.
        few = int(mean) - 1
        places, at, owed = [few] * len(table_T), 0, 0.0
        while at < len(places):
            owed += mean - 1 - few
            places[at] = few + (owed >= 1)
            owed -= owed >= 1
            at += places[at] + 1
        table_T.copy_(torch.tensor(places))

    # Graphs that were captured with the true rule would go on with it, and the other way round.
    forget_graphs(model)
    GraphExecutor._emit = emit  # type: ignore[method-assign]
    try:
        yield set_mean
    finally:
        GraphExecutor._emit = real  # type: ignore[method-assign]
        forget_graphs(model)


def decode(model: Any, ids_BP: Tensor, *, new: int, **options: Any) -> tuple[float, Any]:
    """Tokens per second after the prefill, and the result."""
    stream = stream_blocks(
        model,
        ids_BP,
        attention_mask=torch.ones_like(ids_BP),
        max_new_tokens=new,
        eos_token_id=None,
        do_sample=False,
        **options,
    )
    next(stream)
    seconds = timed(lambda: list(stream), ids_BP.device)
    result = stream.result
    return int(result.acceptance.emitted_tokens.sum()) / seconds, result


def taking_turns(arms: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Figures of every arm, in an order that rotates; a first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            figure = arms[name]()
            if turn:
                found[name].append(figure)
    return found


def spread(figures: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(figures), "least": min(figures), "most": max(figures)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of figures of the same turns."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def simulated_speed(model: Any, setting: Setting, *, batch: int) -> dict[str, Any]:
    """Tokens per second without drafts by every arm, and with drafts at simulated acceptance."""
    ids_BP = torch.randint(0, setting.shape["vocab_size"], (batch, setting.context), device=setting.device)

    def undrafted(executor: str) -> float:
        return decode(model, ids_BP, new=setting.new, num_draft_tokens=0, executor=executor)[0]

    arms: dict[str, Callable[[], float]] = {
        f"plain, {name}": partial(undrafted, name) for name in ("eager", "lean", "graph")
    }
    with simulated(model, setting.device) as set_mean:
        per_forward: dict[float, float] = {}

        def drafted(mean: float) -> float:
            set_mean(mean)
            speed, result = decode(model, ids_BP, new=setting.new, executor="graph")
            per_forward[mean] = result.acceptance.mean_acceptance_length
            return speed

        arms |= {
            f"drafts, graph, {mean:g} tokens per forward (simulated)": partial(drafted, mean)
            for mean in setting.lengths
        }
        found = taking_turns(arms, setting.turns)
    return {
        "batch": batch,
        "tokens_per_forward": {f"{mean:g} (simulated)": own for mean, own in per_forward.items()},
        "tokens_per_second": {name: spread(own) for name, own in found.items()},
        "over_plain_graph": {name: ratios(own, found["plain, graph"]) for name, own in found.items()},
    }


def measured_speed(model: Any, prompts: Sequence[Tensor], setting: Setting) -> dict[str, Any]:
    """Tokens per second with the heads' own drafts over none, prompt by prompt."""
    lengths: list[float] = []
    rows: dict[str, list[float]] = {"plain": [], "drafts": []}
    identical = 0
    for ids_1P in prompts:
        texts: dict[str, list[int]] = {}

        def run(name: str, drafts: int | None, ids_1P: Tensor = ids_1P, texts: dict[str, list[int]] = texts) -> float:
            speed, result = decode(model, ids_1P, new=setting.new, num_draft_tokens=drafts, executor="graph")
            texts[name] = result.sequences[0].tolist()
            if name == "drafts":
                lengths.append(result.acceptance.mean_acceptance_length)
            return speed

        found = taking_turns({"plain": partial(run, "plain", 0), "drafts": partial(run, "drafts", None)}, setting.turns)
        for name, own in found.items():
            rows[name].append(statistics.median(own))
        identical += texts["plain"] == texts["drafts"]
    return {
        "prompts": len(prompts),
        "tokens_per_second": {name: spread(own) for name, own in rows.items()},
        "drafts_over_plain": ratios(rows["drafts"], rows["plain"]),
        "measured_tokens_per_forward": spread(lengths),
        "identical_texts": identical,
    }


# ------------------------------------------------------------------------------------------------------------- lossless


@contextmanager
def right_drafts(truth_BN: Tensor, *, share: float = 0.7) -> Iterator[None]:
    """Let drafts of the graph executor be the known continuation, wrong at some places; the heads run all the same."""
    original = EagerExecutor.draft
    generator = torch.Generator().manual_seed(1)
    wrong = (torch.rand(truth_BN.shape, generator=generator) > share).to(truth_BN.device)
    scripted_BN = torch.where(wrong, 1 + truth_BN % 7, truth_BN)

    def draft(self: EagerExecutor, states: Any, accepted: Any, *, last_B: Any = None, count: int) -> Tensor:
        own_BK = original(self, states, accepted, last_B=last_B, count=count)
        if not isinstance(self, GraphExecutor):
            return own_BK
        next_B1 = (self.state.made_B + accepted + 1)[: len(scripted_BN), None]
        places_BK = next_B1 + torch.arange(count, device=own_BK.device)
        own_BK = own_BK.clone()
        own_BK[: len(scripted_BN)] = scripted_BN.gather(1, places_BK.clamp(max=scripted_BN.shape[1] - 1))
        return own_BK

    EagerExecutor.draft = draft  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        EagerExecutor.draft = original  # type: ignore[method-assign]


def differences(model: Any, ids_BP: Tensor, found: Tensor, expected: Tensor) -> list[dict[str, Any]]:
    """Rows that differ: where, and how near the two best logits are there."""
    columns = ids_BP.shape[1]
    differing = []
    for row in range(len(ids_BP)):
        own, reference = found[row, columns:].tolist(), expected[row, columns:].tolist()
        place = first_difference(own, reference)
        if place is not None:
            gap = top_two_gap(model, [*ids_BP[row].tolist(), *reference[:place]])
            differing.append({"row": row, "new_token": place, "logit_gap": gap})
    return differing


def lossless(model: Any, setting: Setting) -> dict[str, Any]:
    """See the module's docstring."""
    ids_BP = torch.randint(0, model.config.vocab_size, (4, setting.context), device=setting.device)
    forget_graphs(model)
    _, replayed = decode(model, ids_BP, new=setting.new, executor="graph")
    with graph_settings(capture=call_instead):
        _, called = decode(model, ids_BP, new=setting.new, executor="graph")
    _, plain = decode(model, ids_BP, new=setting.new, num_draft_tokens=0, executor="graph")
    low = {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "replayed_equals_called": bool(torch.equal(replayed.sequences, called.sequences)),
        "rows_where_drafts_differ_from_none": differences(model, ids_BP, replayed.sequences, plain.sequences),
    }
    wide = model.float()
    _, eager = decode(wide, ids_BP, new=setting.new, num_draft_tokens=0, executor="eager")
    forget_graphs(wide)
    with right_drafts(eager.sequences[:, setting.context :]):
        _, drafted = decode(wide, ids_BP, new=setting.new, executor="graph")
    found = differences(wide, ids_BP, drafted.sequences, eager.sequences)
    near = sum(row["logit_gap"] < NEAR_TIE_GAP for row in found)
    high = {
        "dtype": "float32",
        "rows": len(ids_BP),
        "tokens_per_forward": drafted.acceptance.mean_acceptance_length,
        "rows_that_differ": found,
        "near_ties": near,
        "lossless": near == len(found),
    }
    return {"low_precision": low, "float32": high}


# ----------------------------------------------------------------------------------------------------------------- main


def prompts_from(folder: Path, text: Path, setting: Setting, *, count: int) -> list[Tensor]:
    """Pieces of a text, evenly spread over it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < count * setting.context:
        raise SystemExit(f"{text.name} has {len(ids)} tokens; {count} prompts of {setting.context} need more text")
    stride = len(ids) // count
    return [ids[None, at : at + setting.context].to(setting.device) for at in range(0, count * stride, stride)]


def setting_for(arguments: argparse.Namespace) -> Setting:
    """Sizes of the run that was asked for."""
    if arguments.rehearse:
        cpu = torch.device("cpu")
        return Setting(cpu, torch.bfloat16, TINY, 2**20, 12, 10, 2, 1, (1, 3), (1.5,))
    return Setting(
        torch.device("cuda"),
        torch.bfloat16,
        LLAMA_1B,
        2**31,
        arguments.context,
        arguments.tokens,
        arguments.steps,
        arguments.turns,
        tuple(arguments.batches),
        (1.5, 2.0, 2.5, 3.0),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; 2 where there is no device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a trained headway folder, whose acceptance is measured")
    parser.add_argument("--text", type=Path, help="with --model: text that prompts are cut from")
    parser.add_argument("--prompts", type=int, default=8, help="with --model: how many")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens per row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows per batch")
    parser.add_argument("--steps", type=int, default=50, help="timed steps per figure")
    parser.add_argument("--turns", type=int, default=5, help="of the arms of the speed part")
    parser.add_argument("--output", type=Path, help="also write the JSON document here, after every part")
    parser.add_argument("--rehearse", action="store_true", help="every part with a tiny model on the CPU")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text go together")
    if not arguments.rehearse and not torch.cuda.is_available():
        print("no CUDA device here: run this on a machine with one, or pass --rehearse", file=sys.stderr)
        return 2
    setting = setting_for(arguments)
    document: dict[str, Any] = {
        "benchmark": "gpu_decoding",
        "device": device_name(setting.device),
        "rehearsal": arguments.rehearse,
        "setting": {
            "shape": setting.shape,
            "weights": "random",
            "dtype": str(setting.dtype).removeprefix("torch."),
            "drafted_tokens": DRAFTS,
            "context": setting.context,
            "new_tokens": setting.new,
            "steps": setting.steps,
            "turns": setting.turns,
        },
    }

    def note(part: str, found: Any) -> None:
        document[part] = found
        document["provenance"] = provenance()
        print(json.dumps({part: found[-1] if isinstance(found, list) else found}), file=sys.stderr)
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    with ExitStack() as stack:
        if arguments.rehearse:
            stack.enter_context(graph_settings(capture=call_instead))
        note("bandwidth", bandwidth(setting))
        if arguments.model:
            trained = (
                headway.MultiTokenLM.from_pretrained(arguments.model, dtype=setting.dtype).to(setting.device).eval()
            )
            texts = prompts_from(arguments.model, arguments.text, setting, count=arguments.prompts)
            note("speed_measured", {"model": arguments.model.name, **measured_speed(trained, texts, setting)})
            del trained
        model = random_model(setting)
        lean = lean_model(model)
        if not isinstance(lean, LeanModel):
            print(f"no lean layers to capture: {lean}", file=sys.stderr)
            return 1
        rate = document["bandwidth"]["bytes_per_second"]
        steps: list[dict[str, Any]] = []
        with decoding_context(model):
            for batch in setting.batches:
                for drafts in (0, DRAFTS):
                    row = step_times(model, lean, setting, batch=batch, drafts=drafts)
                    row["share_of_bandwidth"] = {
                        name: row["needed_bytes"] / (own / 1000) / rate for name, own in row["milliseconds"].items()
                    }
                    note("steps", [*steps, row])
                    steps.append(row)
        speeds: list[dict[str, Any]] = []
        for batch in setting.batches:
            speeds.append(simulated_speed(model, setting, batch=batch))
            note("speed_simulated", speeds)
        note("lossless", lossless(model, setting))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
