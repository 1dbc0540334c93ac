"""Pages of the reference model, written from its record and measurements: no figure is typed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.experiments.reference.drawings import CURVES, TRADE_OFF, acceptance_curve, loss_curve, trade_off
from headway.experiments.reference.place import FOLDER, reference_record

CARD = FOLDER / "README.md"
PAGE = Path("docs") / "experiments" / "reference.md"
DRAWING = Path("docs") / "figures" / TRADE_OFF
_HEADS = {"linear": "linear heads", "transformer": "one decoder layer per head"}


def write_pages(root: Path, results: Path) -> list[Path]:
    """Write everything that can be written from what is there: the card and the curves, and with results the docs page.

    Args:
        root: the top of a repository that holds `reference/`.
        results: document of `benchmarks/reference.py measure`; may be missing or incomplete.

    Returns:
        What was written.

    Raises:
        CheckpointError: no record.
    """
    record = reference_record(root / FOLDER)
    measured = results_of(record, results)
    evaluations = _lines(root / "reference" / "training" / "evaluations.jsonl")
    pages: dict[Path, str] = {CARD: card(record, measured)}
    if evaluations:
        pages |= dict(zip(CURVES, (loss_curve(evaluations), acceptance_curve(evaluations)), strict=True))
    if measured is not None:
        pages[PAGE] = page(record, measured)
        if "trade-off" in measured["parts"]:
            pages[DRAWING] = trade_off(trade_off_points(measured))
    for path, text in pages.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return [root / path for path in pages]


def results_of(record: Mapping[str, Any], results: Path) -> dict[str, Any] | None:
    """What was measured of these weights; None where there is no such file, or it is of others."""
    if not results.is_file():
        return None
    measured: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return measured if measured["setting"]["weights_sha256"] == record["sha256"]["model.safetensors"] else None


def card(record: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """The model card."""
    shape, training, data, stored = (record[name] for name in ("architecture", "training", "data", "stored"))
    made = record["trained_with"]
    last = training["last_evaluation"]
    heads = shape["num_future_tokens"] - 1
    bias = f" with a Markov bias of rank {shape['markov_rank']}" if shape["markov_rank"] else ""
    parts = [
        "---\nlicense: apache-2.0\nlibrary_name: headway\ntags: [multi-token prediction, bytes, python]\n---",
        "# The reference model of headway",
        f"A byte model of {record['parameters']['all'] / 1e6:.2f} million parameters ({record['parameters']['heads'] / 1e6:.2f} "
        f"million of them in {heads} heads) that predicts {shape['num_future_tokens']} bytes at once: "
        f"{shape['num_hidden_layers']} {shape['model_type']} layers of width {shape['hidden_size']}, "
        f"{_HEADS.get(shape['heads'], shape['heads'])}{bias}. It writes code like the standard library of CPython, badly, and "
        f"exists to show and to test decoding: `headway race` runs it.",
        '```python\nfrom headway import MultiTokenLM\n\nmodel = MultiTokenLM.from_pretrained("reference/model")   # float32\n```',
        f"The weights are stored in {stored['dtype']} ({stored['bytes'] / 1e6:.1f} MB; rounding moved no weight by more than "
        f"{stored['largest_rounding']:.2g}) and load as {stored['loads_as']}, in which text with drafts is the text without, "
        f"token for token. The folder is a plain checkpoint of the base, with the heads under `mtp/`.",
        "## Training",
        _table(
            ("", ""),
            [
                ("recipe", f"`headway train --recipe {record['recipe']}`, seed {record['seed']}"),
                (
                    "data",
                    f"{data['source']} {made['versions']['python']}, {data['train']['bytes']:,} bytes in "
                    f"{data['train']['documents']} files ({data['near_duplicates_dropped']} near-duplicates dropped)",
                ),
                (
                    "held out",
                    f"{data['held_out']['bytes']:,} bytes: "
                    + ", ".join(f"`{name}`" for name in data["held_out_packages"]),
                ),
                (
                    "fingerprints",
                    f"training {data['train']['token_fingerprint'][:16]}, held out "
                    f"{data['held_out']['token_fingerprint'][:16]} (whole in reference.json)",
                ),
                (
                    "steps",
                    f"{training['steps']} of {training['batch_size']} x {training['sequence_length']} bytes: "
                    f"{training['tokens']:,} bytes, {training['tokens'] / data['train']['bytes']:.2f} epochs, "
                    f"{training['flops']:.3g} operations",
                ),
                ("optimizer", f"{training['optimizer']}, {training['precision']}"),
                (
                    "time",
                    f"{training['seconds'] / 60:.0f} minutes on {made['machine']['threads']} thread of {made['machine']['cpu']}",
                ),
                ("code", f"headway at commit {str(made['commit'])[:12]}, torch {made['versions']['torch']}"),
            ],
        ),
    ]
    if not record["finished"]:
        parts.append(
            f"**A checkpoint of an unfinished run** ({training['steps']} of {training['planned_steps']} steps)."
        )
    if last is not None:
        parts += [
            f"Its own last evaluation (step {last['step']}), on held-out windows:",
            _table(
                ("offset", *(str(number) for number in range(1, len(last["nats"]) + 1))),
                [
                    ("bits per byte", *(f"{value:.3f}" for value in last["bits_per_byte"])),
                    ("accuracy", *(f"{100 * value:.1f} %" for value in last["accuracy"])),
                ],
                right=True,
            ),
            "Heads are told the bytes between a position and their offset: their losses are of that task.",
            "![Held-out loss while it trained](../curve-loss.svg)",
            "![Tokens per forward while it trained](../curve-acceptance.svg)",
            "`headway report reference/training` draws all its curves from the run's own records.",
        ]
    parts.append("## Measured")
    if measured is None:
        parts.append(
            "Not measured yet: `python benchmarks/reference.py measure`, then `python benchmarks/reference.py pages`."
        )
    else:
        parts += [*_headlines(measured), "All figures: `docs/experiments/reference.md`."]
    parts += [
        "## Limits",
        "It knows nothing but the shape of library code, writes nonsense that looks like Python, and falls into loops when it "
        "decodes greedily; loops are easy to draft for, so no headline here counts them. Weights and card are under the "
        "project's licence; the text it learnt from is CPython's (PSF licence).",
    ]
    return "\n\n".join(parts) + "\n"


def page(record: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The docs page."""
    setting, parts = measured["setting"], measured["parts"]
    machine = measured["provenance"]["machine"]
    written = [
        "# The reference model: loss, acceptance, speed",
        "<!-- written by `python benchmarks/reference.py pages` from benchmarks/results/reference.json; do not edit -->",
        f"`python benchmarks/reference.py measure` measured the [reference model](../../reference/model/README.md) "
        f"({record['parameters']['all'] / 1e6:.2f} million parameters, n = {record['architecture']['num_future_tokens']}) on "
        f"{machine['cpu']}, {setting['threads']} thread{'' if setting['threads'] == 1 else 's'}, float32, batch 1, commit "
        f"{str(measured['provenance']['commit'])[:12]}, {str(measured['provenance']['date'])[:10]}. All arms took turns; speeds "
        f"are after the prefill; brackets are 95 % intervals. Texts that loop are counted and left out wherever others are left.",
        *([] if measured["complete"] else ["**Incomplete:** the measurement was stopped before its end."]),
        "## In short",
        *_headlines(measured),
    ]
    if "trade-off" in parts:
        written += ["## Loss against speed", *_trade_off(measured)]
    texts = {name.partition(": ")[2]: part for name, part in parts.items() if name.startswith("text: ")}
    if texts:
        written += ["## Acceptance along real text", *_walks(texts)]
    for name, part in parts.items():
        kind, _, corpus = name.partition(": ")
        if kind in ("speed", "drawn"):
            title = f"Speed on {corpus}" + (
                f", drawn at temperature {part['setting']['temperature']:g}" if kind == "drawn" else ""
            )
            written += [f"## {title}", *_speed(part)]
    return "\n\n".join(written) + "\n"


def trade_off_points(measured: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """(model, arm, tokens per second, bits per byte) of each plain model, and of the reference with its fastest draft."""
    bits = next(part for name, part in measured["parts"].items() if name.startswith("text: "))["bits_per_byte"]
    points = measured["parts"]["trade-off"]["points"]
    fastest: dict[tuple[str, bool], Mapping[str, Any]] = {}
    for point in points:
        key = (point["model"], point["arm"].endswith(": plain"))
        if key not in fastest or _median(point["tokens_per_second"]) > _median(fastest[key]["tokens_per_second"]):
            fastest[key] = point
    return [
        (model, point["arm"].partition(": ")[2], _median(point["tokens_per_second"]), float(bits[model]["mean"]))
        for (model, _), point in fastest.items()
    ]


def _headlines(measured: Mapping[str, Any]) -> Iterator[str]:
    lines = []
    for name, part in measured["parts"].items():
        kind, _, corpus = name.partition(": ")
        if kind not in ("speed", "drawn"):
            continue
        others = part["over_others"]
        best = next(arm for arm in part["arms"] if arm["arm"] == others["best"])
        texts = f"{part['rows']} texts, none loops"
        if others["texts"] != "texts_without_loops":
            texts = f"all {part['rows']} texts loop, so this flatters"
        elif part["looping_rows"]:
            texts = f"{part['rows'] - part['looping_rows']} of {part['rows']} texts; the others loop and are left out"
        how = "greedy" if kind == "speed" else f"drawn at temperature {part['setting']['temperature']:g}"
        other = {arm["arm"] for arm in part["arms"] if arm["other_model"]}
        ratios = "; ".join(
            f"{arm}{' (quantized, another model)' if arm in other else ''} {_interval(ratio, 'x')}"
            for arm, ratio in others["over"].items()
        )
        same = "the same tokens" if part["equal"] else "**tokens differ**"
        lines.append(
            f"- {corpus}, {how} ({texts}): `{others['best']}` {best['tokens_per_forward']:.2f} tokens per forward, {same}. "
            f"Speed over {ratios}"
        )
    yield "\n".join(lines) if lines else "No speed was measured."


def _trade_off(measured: Mapping[str, Any]) -> Iterator[str]:
    part = measured["parts"]["trade-off"]
    texts = {name.partition(": ")[2]: one for name, one in measured["parts"].items() if name.startswith("text: ")}
    yield (
        "The question of a buyer: what do the heads cost in quality, and what does the same speed cost without them? All models "
        "read the same bytes in the same order, with the same optimizer; tokens per second of drawn text "
        f"(temperature {part['temperature']:g}, {part['prompts']} held-out prompts, {part['new_bytes']} bytes each)."
    )
    rows = [
        (
            point["arm"],
            f"{part['parameters'][point['model']] / 1e6:.2f} M",
            *(_spread(one["bits_per_byte"][point["model"]]) for one in texts.values()),
            _interval(point["tokens_per_second"], "", digits=0),
            _interval(point["over_reference_plain"], "x"),
            f"{point['tokens_per_forward']:.2f}",
        )
        for point in part["points"]
    ]
    columns = (
        "",
        "parameters",
        *(f"bits per byte, {name}" for name in texts),
        "tokens/s",
        "over reference: plain",
        "tokens per forward",
    )
    yield _table(columns, rows, right=True)
    paired = [
        f"{name} {_spread(difference, signed=True)} on {corpus}"
        for corpus, one in texts.items()
        for name, difference in one["bits_per_byte_over_reference"].items()
    ]
    if paired:
        yield f"Bits per byte over the reference's, paired by window: {'; '.join(paired)}."
    yield f"![Loss against speed](../figures/{TRADE_OFF})"


def _walks(texts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    first = next(iter(texts.values()))
    yield (
        f"Tokens per forward when every block is checked against what the model would choose along text that it did not write "
        f"({first['windows']} windows of {first['window_bytes']} bytes per corpus). Heads are told their own drafts, as in "
        f"decoding."
    )
    rows = [
        (draft, *(f"{one['walk'][draft]['tokens_per_forward']:.2f}" for one in texts.values()))
        for draft in first["walk"]
    ]
    yield _table(("draft", *texts), rows, right=True)


def _speed(part: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            arm["arm"],
            _interval(arm["tokens_per_second"], "", digits=0),
            _interval(arm["over_fastest_plain"], "x"),
            f"{arm['tokens_per_forward']:.2f}",
            "-" if arm["sampled_tokens_per_forward"] is None else f"{arm['sampled_tokens_per_forward']:.2f}",
            "-" if arm["break_even_tokens_per_forward"] is None else f"{arm['break_even_tokens_per_forward']:.2f}",
            _text(arm),
        )
        for arm in part["arms"]
    ]
    named = (
        "arm",
        "tokens/s",
        f"over {part['fastest_plain']}",
        "tokens per forward",
        "at temperature 1",
        "breaks even at",
        "text",
    )
    yield f"{part['rows']} texts, {part['looping_rows']} loop; figures of {part['counted_calls'] or part['calls']} calls."
    yield _table(named, rows, right=True)
    if part["calibration"] is not None:
        best, plain = part["calibration"]["best"], part["calibration"]["plain"]
        along = (
            "along real text" if part["calibration"].get("against", "text") == "text" else "in its own continuations"
        )
        yield (
            f"`calibrated` was fitted to the held-out windows in the same process; it expected {best['tokens_per_forward']:.2f} "
            f"tokens per forward {along} and {best['tokens_per_second']:.0f} tokens/s, beside "
            f"{plain['tokens_per_second']:.0f} of plain decoding."
        )
    if part["skipped"]:
        yield "Not measured: " + "; ".join(f"{one['arm']} ({one['reason']})" for one in part["skipped"]) + "."


def _text(arm: Mapping[str, Any]) -> str:
    if arm["differing_rows"] is None:
        return "drawn anew"
    if not arm["differing_rows"]:
        return "identical, another model" if arm["other_model"] else "identical"
    near = f", {arm['near_ties']} of them near-ties" if arm["near_ties"] else ""
    return f"{arm['differing_rows']} differ{near}"


def _median(figure: Mapping[str, Any]) -> float:
    return float(figure["median"] or 0.0)


def _interval(figure: Mapping[str, Any], unit: str, *, digits: int = 2) -> str:
    if figure["median"] is None:
        return "-"
    return f"{figure['median']:.{digits}f}{unit} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _spread(figure: Mapping[str, Any], *, signed: bool = False) -> str:
    half = (figure["high"] - figure["low"]) / 2
    return f"{figure['mean']:{'+' if signed else ''}.3f} +- {half:.3f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    rule = "|".join(["---", *(["---:"] if right else ["---"]) * (len(columns) - 1)])
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
