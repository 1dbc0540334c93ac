"""What a caller can ask beyond transformers' own options, and what follows.

Legend: K drafted tokens of the longest path, N future tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from headway.decoding.calibration.use import with_calibration
from headway.decoding.draft_vocabulary import check_draft_vocabulary
from headway.decoding.prefill import DEFAULT_CHUNK_TOKENS
from headway.decoding.refusals import resolve_num_draft_tokens
from headway.errors import DecodingError
from headway.functional.acceptance import (
    DistanceAcceptance,
    Rule,
    TopKAcceptance,
    TypicalAcceptance,
    block_verification,
    greedy_match,
    sample_and_match,
    speculative_sampling,
)
from headway.functional.row_trees import DynamicTree
from headway.functional.tree import Tree, default_tree

AcceptanceName = Literal["exact", "tokenwise", "typical", "top_k", "distance"]
DraftsName = Literal["heads", "lookup", "heads+lookup"]
ExecutorName = Literal["eager", "lean", "graph"]
WeightsName = Literal["own", "int8"]

DYNAMIC_NODES = 15
"""Drafted tokens of a dynamic tree: with the last known token a block of 16 positions, which costs little more than one of 8."""

DYNAMIC_WIDTH = 8
"""Candidates that a dynamic tree expands per depth."""

LOSSY: tuple[AcceptanceName, ...] = ("typical", "top_k", "distance")
"""Acceptance rules under which the text is not the model's own."""


@dataclass(frozen=True)
class DecodingOptions:
    """Arguments of `generate` that transformers does not know.

    Attributes:
        num_draft_tokens: tokens that the heads draft per forward, 0..n-1; None for n - 1; 0 decodes plainly, whatever else
            is asked; "auto" lets measured costs and acceptance choose before every forward, down to 0, how deep drafts
            of any kind go (`headway.decoding.controller`).
        drafts: where drafts come from: the model's "heads", "lookup" (copied from the text so far, after its last
            tokens' previous occurrence; needs no heads), or both in one tree, "heads+lookup".
        tree: candidates that one forward verifies: None for a chain, a number of drafted tokens for the default tree of
            that size, the tree itself as paths of ranks (Medusa's `tree_choices`), or "calibrated": the fastest draft that
            `headway calibrate` found for this checkpoint on this machine, with its draft vocabulary; "dynamic" for a
            shape that every row's draft probabilities make anew for every forward (EAGLE-2). A rank counts the candidates
            of a place, the most likely one being 0: of its offset where heads draft at once, of its offset after the tokens
            of the node's own path where they draft in turn (a Markov bias, Hydra, sequential modules).
        tree_nodes: drafted tokens that a dynamic tree keeps; None for DYNAMIC_NODES.
        tree_width: candidates per depth that a dynamic tree expands, and tokens that each is expanded by; None for
            DYNAMIC_WIDTH.
        draft_vocabulary: ids of the tokens that the heads score and draft from; None for all. Verification scores all
            tokens, so the output is the same; where a vocabulary is large, drafts cost less
            (`headway.decoding.draft_vocabulary`).
        sample_drafts: with `do_sample`, draw the drafts from the heads' distributions instead of taking their most
            likely tokens. Exact either way; drawn drafts are accepted more often where heads are good and temperature
            is high, and the tokens that a seed gives then depend on the draft.
        acceptance: which drafts stand. "exact" leaves the model's output (greedy) or its distribution (sampling)
            unchanged; "tokenwise" does too, with drawn chains decided token by token instead of as a block. LOSSY, the
            text may differ from the model's own: "typical" (Medusa), "top_k" and "distance" (Stern et al.).
        posterior_threshold: epsilon of "typical".
        posterior_alpha: delta of "typical".
        acceptance_top_k: k of "top_k".
        acceptance_distance: largest distance of token ids of "distance".
        num_lookup_tokens: tokens that a lookup copies.
        lookup_ngram: most tokens that have to match for a lookup; shorter matches are taken where there is no longer one.
        seed: of sampling. A number, of which every row has its own stream; or one number per row, whose row gets what
            it would get alone. None draws a number from torch's global generator.
        executor: what runs the model: "eager", the Hugging Face model as it is; "lean", fused blocks with the same
            weights in a layout that reads faster (`headway.decoding.lean`; takes the memory of a second copy of them).
            A model that has no lean form runs eagerly, and the result's note says why. "graph", on CUDA: lean blocks, with
            acceptance and the next draft on the device, and every step replayed as a CUDA graph
            (`headway.decoding.graphs`); what it does not serve, trees for example, it refuses.
        weights: what the lean executor multiplies by: "own", the model's; "int8", the model's rounded to eight bits with one
            scale per output. ANOTHER MODEL, whose text differs from the checkpoint's: `lossless` is then False and the
            result's note says so. Nothing chooses it by itself. Drafts do not change the rounded model's own text.
        prefill_chunk_tokens: the most tokens of a prompt that one forward reads: longer prompts are read in pieces, which
            keeps memory from growing with the square of their length; the text is the same. None reads any prompt in one
            forward, as do models whose rotary frequencies depend on the length ("dynamic", "longrope").
    """

    num_draft_tokens: int | Literal["auto"] | None = None
    drafts: DraftsName = "heads"
    tree: int | Sequence[Sequence[int]] | Literal["calibrated", "dynamic"] | None = None
    tree_nodes: int | None = None
    tree_width: int | None = None
    draft_vocabulary: Sequence[int] | None = None
    sample_drafts: bool = False
    acceptance: AcceptanceName = "exact"
    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3
    acceptance_top_k: int = 2
    acceptance_distance: int = 1
    num_lookup_tokens: int = 8
    lookup_ngram: int = 3
    seed: int | Sequence[int] | None = None
    executor: ExecutorName = "eager"
    weights: WeightsName = "own"
    prefill_chunk_tokens: int | None = DEFAULT_CHUNK_TOKENS

    def __post_init__(self) -> None:
        _check_choice("drafts", self.drafts, get_args(DraftsName))
        _check_choice("acceptance", self.acceptance, get_args(AcceptanceName))
        _check_choice("executor", self.executor, get_args(ExecutorName))
        _check_choice("weights", self.weights, get_args(WeightsName))
        if self.weights != "own" and self.executor != "lean":
            raise DecodingError(
                f"weights={self.weights!r} needs executor='lean': got executor={self.executor!r}; pass executor='lean' with it"
            )
        for name in ("acceptance_top_k", "num_lookup_tokens", "lookup_ngram"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise DecodingError(f"{name} must be a whole number of at least 1: got {getattr(self, name)!r}")
        chunk = self.prefill_chunk_tokens
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise DecodingError(
                f"prefill_chunk_tokens must be a whole number of at least 1, or None for prompts in one piece: got {chunk!r}"
            )
        for name in ("posterior_threshold", "posterior_alpha", "acceptance_distance"):
            if not isinstance(getattr(self, name), int | float) or getattr(self, name) < 0:
                raise DecodingError(f"{name} must be a number of at least 0: got {getattr(self, name)!r}")
        if self.tree is not None and self.drafts == "lookup":
            raise DecodingError(
                "a tree is made of the heads' candidates: pass drafts='heads' or 'heads+lookup' with it"
            )
        if self.draft_vocabulary is not None and self.drafts == "lookup":
            raise DecodingError(
                "draft_vocabulary is what the heads draft from: pass drafts='heads' or 'heads+lookup' with it"
            )
        for name in ("tree_nodes", "tree_width"):
            value = getattr(self, name)
            if value is not None and self.tree != "dynamic":
                raise DecodingError(
                    f"{name}={value} is for dynamic trees; pass tree='dynamic' with it, or leave it out"
                )
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise DecodingError(f"{name} must be a whole number of at least 1: got {value!r}")
        if self.tree == "dynamic" and self.sample_drafts:
            raise DecodingError(
                "a dynamic tree keeps the likeliest candidates, so it cannot be drawn: leave sample_drafts out (the text is "
                "drawn from the model's distribution all the same), or pass another tree"
            )
        if self.acceptance == "tokenwise" and not self.sample_drafts:
            raise DecodingError("acceptance='tokenwise' decides about drawn drafts; pass sample_drafts=True with it")
        if self.sample_drafts and (self.drafts != "heads" or self.acceptance in LOSSY):
            raise DecodingError(
                f"sample_drafts=True is for drafts='heads' and an exact acceptance: got drafts={self.drafts!r} and "
                f"acceptance={self.acceptance!r}; leave sample_drafts out"
            )

    @property
    def lossy(self) -> bool:
        """Whether the acceptance rule may change the text."""
        return self.acceptance in LOSSY


OPTION_NAMES = tuple(field.name for field in fields(DecodingOptions))


def take_options(arguments: dict[str, Any]) -> DecodingOptions:
    """Take headway's own options out of the arguments of `generate`.

    Raises:
        DecodingError: values that do not exist or do not go together.
    """
    return DecodingOptions(**{name: arguments.pop(name) for name in OPTION_NAMES if name in arguments})


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise DecodingError(f"{name} must be one of {', '.join(known)}: got {value!r}")


@dataclass(frozen=True)
class DraftPlan:
    """What every block of a generation holds at most.

    Attributes:
        heads: heads that draft.
        tree: of the heads' candidates, without a copied branch.
        lookup: tokens of the copied branch, 0 where nothing is copied.
        sampled: whether drafts are drawn.
        controlled: whether a controller may shorten them.
    """

    heads: int
    tree: Tree | DynamicTree
    lookup: int
    sampled: bool
    controlled: bool = False

    @property
    def widest(self) -> Tree | DynamicTree:
        """The largest tree of a block."""
        if not self.lookup:
            return self.tree
        return self.tree.with_branch(self.lookup) if self.heads else Tree.chain(self.lookup)

    @property
    def depth(self) -> int:
        """K."""
        return max(self.tree.depth, self.lookup)


PLAIN = DraftPlan(0, Tree.chain(0), 0, sampled=False)
"""One token per forward."""


def plan_drafts(options: DecodingOptions, model: Any, *, do_sample: bool, batch: int = 1) -> DraftPlan:
    """Drafts of a model under the options; a calibrated tree is that of so many rows.

    Raises:
        DecodingError: more than the model's heads can draft.
    """
    if options.sample_drafts and not do_sample:
        raise DecodingError("sample_drafts=True needs do_sample=True; greedy decoding drafts the most likely tokens")
    options, _ = with_calibration(options, model, batch=batch)
    heads = resolve_num_draft_tokens(options.num_draft_tokens, num_future_tokens=model.num_future_tokens)
    if options.num_draft_tokens == 0:
        return PLAIN
    controlled = options.num_draft_tokens == "auto"
    lookup = 0 if options.drafts == "heads" else options.num_lookup_tokens
    if options.drafts == "lookup":
        if options.num_draft_tokens not in (None, "auto"):
            raise DecodingError(
                f"num_draft_tokens={options.num_draft_tokens} is for drafts of the heads; with drafts='lookup' pass "
                f"num_lookup_tokens"
            )
        return DraftPlan(0, Tree.chain(0), lookup, sampled=False, controlled=controlled)
    tree: Tree | DynamicTree = Tree.chain(heads)
    vocabulary = model.get_input_embeddings().num_embeddings
    if options.draft_vocabulary is not None:
        vocabulary = len(check_draft_vocabulary(options.draft_vocabulary, vocabulary=vocabulary))
    if options.tree is not None:
        if heads == 0:
            raise DecodingError("a tree needs heads that draft: this model has none; leave tree out")
        if options.tree == "dynamic":
            tree = DynamicTree(options.tree_nodes or DYNAMIC_NODES, options.tree_width or DYNAMIC_WIDTH, heads)
        else:
            tree = _asked_tree(options.tree, heads, vocabulary=vocabulary)
    if heads == 0:
        return DraftPlan(0, tree, lookup, sampled=False, controlled=controlled)
    return DraftPlan(tree.depth, tree, lookup, options.sample_drafts, controlled=controlled)


def _asked_tree(asked: int | str | Sequence[Sequence[int]], heads: int, *, vocabulary: int) -> Tree:
    if isinstance(asked, int):
        if isinstance(asked, bool) or asked < 1:
            raise DecodingError(f"a tree needs at least one drafted token: got tree={asked}; leave it out for a chain")
        tree = default_tree(heads, nodes=asked)
    else:
        try:
            tree = Tree.from_choices(asked)  # type: ignore[arg-type]  # a text is one of the things that are refused here
        except (TypeError, ValueError) as error:
            raise DecodingError(
                f"tree must be a number of nodes, a list of paths of ranks, 'calibrated' or 'dynamic': {error}"
            ) from None
    if len(tree) == 1:
        raise DecodingError("the tree has no path; leave tree out for a chain")
    if tree.depth > heads:
        raise DecodingError(
            f"the tree is {tree.depth} tokens deep, the heads draft {heads}; leave out its deeper paths"
        )
    if max(tree.ranks) >= vocabulary:
        raise DecodingError(f"the tree takes rank {max(tree.ranks)} of {vocabulary} tokens; ranks count from 0")
    return tree


def acceptance_rule(options: DecodingOptions, plan: DraftPlan, *, do_sample: bool) -> Rule:
    """The rule that the options ask for."""
    if options.acceptance == "top_k":
        return TopKAcceptance(options.acceptance_top_k, sampled=do_sample)
    if options.acceptance == "distance":
        return DistanceAcceptance(int(options.acceptance_distance), sampled=do_sample)
    if not do_sample:
        return greedy_match
    if options.acceptance == "typical":
        return TypicalAcceptance(options.posterior_threshold, options.posterior_alpha)
    if not plan.sampled:
        return sample_and_match
    chain = plan.tree.is_chain and options.acceptance != "tokenwise"
    return block_verification if chain else speculative_sampling


def lossy_note(options: DecodingOptions, *, do_sample: bool) -> str | None:
    """A sentence for the result where the text may differ from the model's own."""
    if not options.lossy or (options.acceptance == "typical" and not do_sample):
        return None
    what = "distribution" if do_sample else "greedy text"
    return f"acceptance={options.acceptance!r} is lossy: the text does not follow the model's own {what}"
