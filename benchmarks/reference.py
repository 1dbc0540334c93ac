"""The reference model: publish a finished run as the committed folder, measure it, write its pages.

    python benchmarks/reference.py publish RUN --recipe reference-10m    # -> reference/model, reference/training
    python benchmarks/reference.py measure --plain RUN/model --small RUN/model --corpus humaneval=FILE:prompt+canonical_solution \
        --corpus shakespeare=FILE --output benchmarks/results/reference.json
    python benchmarks/reference.py pages                                 # model card, docs page, drawings, from both

`measure` takes about 8 minutes on two quiet cores and keeps what is finished: killed, it goes on with the same command.
One JSON document last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from headway.cli.console import quiet_libraries
from headway.cli.models import load_model_folder
from headway.experiments.bench.other_engines import own_exports
from headway.experiments.reference.corpora import held_out_text, named_text
from headway.experiments.reference.measure import Amounts, Measured, parts
from headway.experiments.reference.pages import write_pages
from headway.experiments.reference.place import FOLDER, RECORD
from headway.experiments.reference.publish import publish
from headway.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reference.json"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts that the output file does not have yet."""
    quiet_libraries()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    amounts = Amounts(**{field.name: getattr(arguments, field.name) for field in fields(Amounts)})
    copies = (
        TemporaryDirectory()
    )  # of the model, which calibration writes into, and of llama.cpp's files; gone with the process
    loaded = load_model_folder(str(shutil.copytree(arguments.model, Path(copies.name) / "model")), dtype="float32")
    others = {"plain, equal parameters": arguments.plain, "plain, smaller": arguments.small}
    sizes = {"windows": amounts.windows, "window_bytes": amounts.window_bytes, "prompts": amounts.prompts}
    text = sizes | {"prompt_bytes": amounts.prompt_bytes}
    measured = Measured(
        reference=loaded.model,
        others={
            name: load_model_folder(str(folder), dtype="float32").model for name, folder in others.items() if folder
        },
        held_out=held_out_text(arguments.model, **text),
        foreign=tuple(named_text(corpus, **text) for corpus in arguments.corpus),
        export=lambda: own_exports(loaded.model, loaded.tokenizer, Path(copies.name)),
        pad_token_id=loaded.tokenizer.pad_token_id,
        end_token_ids=(loaded.tokenizer.eos_token_id,),
        calibrate=True,
    )
    record = json.loads((arguments.model / RECORD).read_text(encoding="utf-8"))
    setting = {
        "amounts": asdict(amounts),
        "threads": torch.get_num_threads(),
        "weights_sha256": record["sha256"]["model.safetensors"],
        "models": {"reference": loaded.model.num_parameters()}
        | {name: model.num_parameters() for name, model in measured.others.items()},
        "corpora": [measured.held_out.name, *(corpus.name for corpus in measured.foreign)],
    }
    document: dict[str, Any] = {"benchmark": "reference", "setting": setting, "parts": {}, "provenance": provenance()}
    if arguments.output.is_file():
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
        if earlier.get("setting") == setting and not earlier["complete"]:
            document["parts"] = earlier["parts"]
    wanted = parts(measured, amounts)
    for name, part in wanted.items():
        if name in document["parts"]:
            continue
        began = time.perf_counter()
        document["parts"][name] = part()
        seconds = time.perf_counter() - began
        document["parts"][name]["seconds"] = round(seconds, 1)
        document["complete"] = len(document["parts"]) == len(wanted)
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)
        _write(arguments.output, document)
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    publishing = commands.add_parser("publish", help="a run becomes reference/model")
    publishing.add_argument("run", type=Path, help="output folder of headway train")
    publishing.add_argument("--recipe", default="reference-10m")
    publishing.add_argument("--output", type=Path, default=ROOT / "reference")
    publishing.add_argument("--checkpoint", action="store_true", help="the newest checkpoint of an unfinished run")
    measuring = commands.add_parser("measure", help="the model's loss, acceptance and speed")
    measuring.add_argument("--model", type=Path, default=ROOT / FOLDER)
    measuring.add_argument("--plain", type=Path, help="a plain model of equal parameters, of the same text and tokens")
    measuring.add_argument("--small", type=Path, help="a smaller plain model of the same text and tokens")
    measuring.add_argument("--corpus", action="append", default=[], metavar="NAME=FILE[:FIELD+FIELD]")
    measuring.add_argument("--threads", type=int)
    measuring.add_argument("--output", type=Path, default=RESULTS)
    for field in fields(Amounts):
        flag = f"--{field.name.replace('_', '-')}"
        measuring.add_argument(flag, type=float if field.name == "temperature" else int, default=field.default)
    writing = commands.add_parser("pages", help="model card, docs page and drawings from the record and the figures")
    writing.add_argument("--results", type=Path, default=RESULTS)
    writing.add_argument("--root", type=Path, default=ROOT, help="the top of the repository that is written to")
    return parser.parse_args()


def main() -> None:
    """Run one of the commands."""
    arguments = _arguments()
    document: dict[str, Any]
    if arguments.command == "publish":
        document = publish(arguments.run, arguments.output, recipe=arguments.recipe, checkpoint=arguments.checkpoint)
    elif arguments.command == "measure":
        document = measure(arguments)
    else:
        document = {
            "written": [
                str(path.relative_to(arguments.root)) for path in write_pages(arguments.root, arguments.results)
            ]
        }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
