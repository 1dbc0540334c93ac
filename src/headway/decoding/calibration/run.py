"""`calibrate`: measure a model on this machine, solve for its fastest draft, and store that.

Legend: W windows of a text, V vocabulary, K heads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from headway.decoding.calibration.cost import CostTable, StepSeconds, measure_steps, monotone, monotone_costs
from headway.decoding.calibration.paths import PathValues
from headway.decoding.calibration.ranks import own_continuations, ranked_text, sampling_arguments, text_windows
from headway.decoding.calibration.solve import Expectation, Lookup, fastest, solve_trees
from headway.decoding.calibration.stored import Calibration, MachineKey, heads_fingerprint, store_calibration
from headway.decoding.calibration.walk import RankedText, starts_of, walk_tree
from headway.decoding.lean.admission import lean_model
from headway.errors import DecodingError
from headway.functional.repetition import loops
from headway.functional.tree import LARGEST_DEFAULT_RANK, Tree
from headway.model.checkpoint import loaded_from
from headway.provenance import provenance

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Drafted tokens at which costs are measured, and the limits of depth that trees are grown for."""
DEPTHS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 31)
SMALLEST_SLICED_VOCABULARY = 4096
"""Below it a head's rows of the unembedding are too few for their reading to count beside the rest of a forward."""
PART_MUST_GAIN = 1.01
"""How much faster a draft vocabulary must look before it is taken: half a step's noise."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What is measured, and for which way to decode.

    Attributes:
        executor: what runs the model.
        batch: rows decoded together.
        against: "continuation": the model's own continuation of pieces of the text; "text": what it would choose at each
            position of the text itself, which suits models whose continuations all loop.
        temperature: at which continuations are drawn and costs are measured, for decoding at that temperature; 0 for greedy
            ones. A drafted token stands where it is the drawn one, so ranks of drawn tokens are what sampling accepts.
        seed: of drawn continuations.
        keep_loops: count continuations that loop (fewer than half of their 8-grams distinct) too; they are easy to draft
            for, and left out otherwise.
        windows: pieces of the text.
        prompt_tokens: of each piece that is continued; also the context at which costs are measured.
        new_tokens: of each continuation, or of the text after the prompt.
        most_nodes: drafted tokens of the largest tree.
        num_ranks: candidates per head that trees may take.
        lookup: also measure trees beside a copied branch.
        num_lookup_tokens: of the copy.
        lookup_ngram: most tokens of its match.
        draft_vocabularies: sizes to try for the part of the vocabulary that the heads score; None for halves of V down to
            1024 where V is at least `SMALLEST_SLICED_VOCABULARY`, and none below; () for none.
        rounds: generations of each draft when costs are measured.
        steps: timed in each of them.
    """

    executor: Literal["eager", "lean"] = "lean"
    batch: int = 1
    against: Literal["continuation", "text"] = "continuation"
    temperature: float = 0.0
    seed: int = 0
    keep_loops: bool = False
    windows: int = 16
    prompt_tokens: int = 128
    new_tokens: int = 192
    most_nodes: int = 32
    num_ranks: int = LARGEST_DEFAULT_RANK
    lookup: bool = False
    num_lookup_tokens: int = 8
    lookup_ngram: int = 3
    draft_vocabularies: tuple[int, ...] | None = None
    rounds: int = 7
    steps: int = 6

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "windows",
            "prompt_tokens",
            "new_tokens",
            "most_nodes",
            "num_ranks",
            "num_lookup_tokens",
            "lookup_ngram",
            "rounds",
            "steps",
        ):
            if getattr(self, name) < 1:
                raise DecodingError(f"{name} must be at least 1: got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise DecodingError(f"temperature must be 0, for greedy texts, or more: got {self.temperature}")
        if self.temperature and self.against == "text":
            raise DecodingError(
                f"against='text' reads a text that the model does not write, so nothing is drawn: got temperature="
                f"{self.temperature}; leave it out, or take against='continuation'"
            )


@dataclass(frozen=True)
class CalibrationResult:
    """What was found.

    Attributes:
        calibration: the entry, as it is stored.
        accuracy: [K, R] per offset and rank (`PathValues.accuracy`), at all positions.
        plain: decoding without drafts.
        chains: per length.
        trees: per size, the best.
        beside_lookup: per size, the best tree beside a copied branch; empty where that was not asked for.
        texts: what was walked, per window.
        looping: continuations that loop; left out of `texts` unless they were to be kept.
    """

    calibration: Calibration
    accuracy: tuple[tuple[float, ...], ...]
    plain: Expectation
    chains: tuple[Expectation, ...]
    trees: tuple[Expectation, ...]
    beside_lookup: tuple[Expectation, ...]
    texts: tuple[RankedText, ...]
    looping: int

    @property
    def best(self) -> Expectation:
        """The fastest of plain decoding, chains and trees."""
        return fastest([self.plain, *self.chains, *self.trees])


def calibrate(
    model: Any,
    text: Sequence[int],
    options: CalibrationOptions | None = None,
    *,
    store: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> CalibrationResult:
    """Measure acceptance and costs, choose the fastest draft, and store it as `mtp/calibration.json`.

    Example::

        model = MultiTokenLM.from_pretrained(folder)
        calibrate(model, tokenizer(text)["input_ids"], CalibrationOptions(executor="lean"))
        model.generate(input_ids, tree="calibrated", executor="lean")

    Args:
        model: a `MultiTokenLM` loaded from a folder.
        text: token ids of a text like those that will be decoded.
        options: what is measured.
        store: write the entry into the model's folder; nothing else there changes.
        progress: is told what is going on, line by line.

    Returns:
        What was measured, expected and stored.

    Raises:
        DecodingError: a model without heads, not loaded from a folder, that ends its texts at once, or whose continuations all
            loop; texts too long for it.
        DataError: a text shorter than one window.
        CheckpointError: the folder cannot be written.
    """
    options = options or CalibrationOptions()
    heads = model.num_future_tokens - 1
    if heads < 1:
        raise DecodingError("this model has no heads, so there are no drafts to calibrate; attach heads and train them")
    folder = loaded_from(model)
    if folder is None:
        raise DecodingError(
            "a calibration is stored with the checkpoint and this model was not loaded from a folder; save it and load "
            "it with MultiTokenLM.from_pretrained"
        )
    longest = int(model.config.max_position_embeddings)
    if options.prompt_tokens + options.new_tokens > longest:
        raise DecodingError(
            f"prompts of {options.prompt_tokens} tokens and {options.new_tokens} new ones do not fit into the {longest} "
            f"positions of this model; lower prompt_tokens or new_tokens"
        )
    if options.executor == "lean" and isinstance(reason := lean_model(model), str):
        progress(f"no lean executor, the model runs eagerly: {reason}")
        options = replace(options, executor="eager")
    measured = _Measurement(model, options, text, progress)
    part, vocabulary_report = measured.choose_draft_vocabulary()
    texts = measured.texts(part)
    values = PathValues(starts_of(texts), num_ranks=options.num_ranks)
    chain_seconds, tables, step_report = measured.costs(values, part)
    plain = Expectation.of(Tree.chain(0), 1.0, chain_seconds[0], batch=options.batch)
    chains = tuple(
        Expectation.of(
            Tree.chain(length), walk_tree(texts, Tree.chain(length)).tokens_per_forward, seconds, batch=options.batch
        )
        for length, seconds in sorted(chain_seconds.items())
        if length
    )

    def solved(lookup: Lookup | None) -> tuple[Expectation, ...]:
        if not tables:
            return ()
        found = solve_trees(
            texts,
            tables,
            num_ranks=options.num_ranks,
            most_nodes=options.most_nodes,
            batch=options.batch,
            lookup=lookup,
        )
        return tuple(found.values())

    trees = solved(None)
    beside = solved(Lookup(options.num_lookup_tokens, options.lookup_ngram)) if options.lookup else ()
    best = fastest([plain, *chains, *trees])
    report = {
        "options": asdict(options),
        "text_tokens": len(text),
        "windows": len(texts),
        "looping": measured.looping,
        "starts": sum(len(own.ranks_TK) for own in texts),
        "accuracy": [[round(share, 5) for share in ranks] for ranks in values.accuracy],
        "steps": step_report,
        "draft_vocabulary": vocabulary_report,
        "plain": _to_json(plain),
        "chains": [_to_json(one) for one in chains],
        "trees": [_to_json(one) for one in trees],
        "beside_lookup": [_to_json(one) for one in beside],
        "best": _to_json(best),
        "provenance": {name: value for name, value in provenance().items() if name != "argv"},
    }
    entry = Calibration(
        key=MachineKey.here(model, executor=options.executor, batch=options.batch),
        heads=heads_fingerprint(folder),
        tree=best.tree.choices,
        tree_beside_lookup=fastest(list(beside)).tree.choices if beside else None,
        draft_vocabulary=part,
        report=report,
    )
    if store:
        store_calibration(folder, entry)
    return CalibrationResult(entry, values.accuracy, plain, chains, trees, beside, tuple(texts), measured.looping)


class _Measurement:
    """The windows of one text, and what is measured with them."""

    def __init__(
        self, model: Any, options: CalibrationOptions, text: Sequence[int], progress: Callable[[str], None]
    ) -> None:
        self._model = model
        self._options = options
        self._progress = progress
        self._heads: int = model.num_future_tokens - 1
        length = options.prompt_tokens + (options.new_tokens if options.against == "text" else 0)
        windows_WT = text_windows(text, count=options.windows, length=length)
        self._prompts_WP = windows_WT[:, : options.prompt_tokens]
        self._written = options.against == "continuation"
        self._texts = windows_WT.tolist()
        self._sampling = sampling_arguments(options.temperature, seed=options.seed)
        self.looping = 0
        if self._written:
            progress(f"continuing {len(windows_WT)} pieces of the text")
            self._texts = self._continuations()
        # Of a draft vocabulary only what was not counted for it may say how good it is.
        self._counted = Counter(text) + Counter(token for own in self._texts[::2] for token in own)

    def _continuations(self) -> list[list[int]]:
        """The model's own, without those that loop."""
        options = self._options
        texts = own_continuations(
            self._model,
            self._prompts_WP,
            new_tokens=options.new_tokens,
            executor=options.executor,
            batch=options.batch,
            temperature=options.temperature,
            seed=options.seed,
        )
        straight = [own for own in texts if not loops(own[options.prompt_tokens :])]
        self.looping = len(texts) - len(straight)
        if options.keep_loops:
            return texts
        if not straight:
            raise DecodingError(
                f"all {len(texts)} continuations loop, which is easy to draft for and tells nothing of other texts; pass "
                f"temperature=0.8 (--temperature 0.8) to draw them, against='text' (--against text) for the text itself, or "
                f"keep_loops=True (--keep-loops) to count loops"
            )
        return straight

    def choose_draft_vocabulary(self) -> tuple[tuple[int, ...] | None, list[dict[str, Any]]]:
        """The part of the vocabulary with which the longest chain is fastest, None for all of it, and what was compared."""
        options, vocabulary = self._options, self._model.family.lm_head.weight.shape[0]
        sizes = options.draft_vocabularies
        if sizes is None:
            sizes = ()
            if vocabulary >= SMALLEST_SLICED_VOCABULARY:
                sizes = tuple(vocabulary // divisor for divisor in (2, 4, 8, 16) if vocabulary // divisor >= 1024)
        sizes = tuple(size for size in sizes if options.num_ranks <= size < vocabulary)
        if not sizes or len(self._texts) < 2:
            return None, []
        # Of equally frequent tokens the smaller ids: byte pair encodings number frequent merges first.
        order = sorted(range(vocabulary), key=lambda token: (-self._counted[token], token))
        parts: list[tuple[int, ...] | None] = [None, *(tuple(sorted(order[:size])) for size in sizes)]
        self._progress("draft vocabularies")
        texts = self._ranked(self._texts[1::2], parts)
        seconds = measure_steps(
            self._model,
            self._prompts(),
            {
                part: {"num_draft_tokens": self._heads} | ({} if part is None else {"draft_vocabulary": part})
                for part in parts
            },
            executor=options.executor,
            rounds=options.rounds,
            steps=options.steps,
            sampling=self._sampling,
            progress=self._progress,
        )
        chain = Tree.chain(self._heads)
        rates, report = {}, []
        for part, own in zip(parts, texts, strict=True):
            length = walk_tree(own, chain).tokens_per_forward
            rates[part] = length / seconds[part].median
            report.append(
                {
                    "tokens": vocabulary if part is None else len(part),
                    "tokens_per_forward": length,
                    "tokens_per_second": options.batch * rates[part],
                    **seconds[part].to_json(),
                }
            )
        best = max(parts, key=lambda part: rates[part])
        return best if rates[best] > PART_MUST_GAIN * rates[None] else None, report

    def texts(self, part: tuple[int, ...] | None) -> list[RankedText]:
        """Ranks under a draft vocabulary; of the windows that did not choose it, where there is one."""
        self._progress("ranks of the model's tokens")
        found = self._ranked(self._texts if part is None else self._texts[1::2], [part])[0]
        if not found:
            raise DecodingError(
                "the model ends its texts before a draft could be seen whole; pass another text or against='text'"
            )
        return found

    def costs(
        self, values: PathValues, part: tuple[int, ...] | None
    ) -> tuple[dict[int, float], dict[int, CostTable], list[dict[str, Any]]]:
        """Seconds of chains by length, 0 for plain decoding; tables of trees by limit of depth; and every figure."""
        options = self._options
        widest = options.most_nodes + (options.num_lookup_tokens if options.lookup else 0)
        lengths = [length for length in range(self._heads + 1) if length in {0, *DEPTHS, self._heads}]
        arms: dict[tuple[tuple[int, ...], ...], dict[str, Any]] = {
            Tree.chain(length).choices: {"num_draft_tokens": length} for length in lengths
        }
        places: dict[int, dict[int, tuple[tuple[int, ...], ...]]] = {}
        for depth in lengths[1:]:
            growth = values.grow(nodes=widest, depth=depth)
            for width in sorted({*(width for width in WIDTHS if width < len(growth)), len(growth)}):
                tree = growth.tree(width)
                if not tree.is_chain:
                    places.setdefault(depth, {})[width] = tree.choices
                    arms[tree.choices] = {"tree": tree.choices}
        if part is not None:
            arms = {choices: own | {"draft_vocabulary": part} for choices, own in arms.items()}
            arms[()] = {"num_draft_tokens": 0}
        found = measure_steps(
            self._model,
            self._prompts(),
            arms,
            executor=options.executor,
            rounds=options.rounds,
            steps=options.steps,
            sampling=self._sampling,
            progress=self._progress,
        )
        rising = monotone([found[Tree.chain(length).choices].median for length in lengths])
        tables = monotone_costs(
            {depth: {width: found[own].median for width, own in row.items()} for depth, row in places.items()}
        )
        return dict(zip(lengths, rising, strict=True)), tables, [_step_json(own, found[own]) for own in arms]

    def _prompts(self) -> Any:
        batch = self._options.batch
        repeats = -(-batch // len(self._prompts_WP))
        return self._prompts_WP.repeat(repeats, 1)[:batch]

    def _ranked(
        self, texts: Sequence[Sequence[int]], parts: Sequence[tuple[int, ...] | None]
    ) -> list[list[RankedText]]:
        rows = [
            ranked_text(
                self._model,
                own,
                prompt_tokens=self._options.prompt_tokens,
                num_ranks=self._options.num_ranks,
                written=self._written,
                draft_vocabularies=parts,
            )
            for own in texts
        ]
        return [[row[place] for row in rows if len(row[place].ranks_TK)] for place in range(len(parts))]


def _step_json(choices: tuple[tuple[int, ...], ...], seconds: StepSeconds) -> dict[str, Any]:
    tree = Tree.from_choices(choices)
    return {"nodes": len(choices), "depth": tree.depth, "chain": tree.is_chain, **seconds.to_json()}


def _to_json(one: Expectation) -> dict[str, Any]:
    return {
        "nodes": one.nodes,
        "depth": one.tree.depth,
        "tree": [list(path) for path in one.tree.choices],
        "tokens_per_forward": one.tokens_per_forward,
        "forward_ms": one.forward_seconds * 1000,
        "tokens_per_second": one.tokens_per_second,
    }
