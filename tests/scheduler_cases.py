"""Random requests for the scheduler, what each of them gives alone, and drafts that are right at times."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from headway.decoding.drafting import Block
from headway.decoding.engine import Engine
from headway.decoding.requests import Completion, Request
from headway.decoding.rows import RowTexts
from headway.decoding.scheduler import Scheduler
from headway.functional.tree import Tree
from tiny_models import VOCABULARY

PENALTY = RepetitionPenaltyLogitsProcessor(1.3)


@st.composite
def requests(draw: Any, *, sampled: bool = True, longest: int = 14) -> Request:
    """Any request that `generate` can be asked too."""
    temperature = draw(st.sampled_from([0.0, 0.0, 0.7, 1.0])) if sampled else 0.0
    return Request(
        # Few different tokens, so that copies are found.
        prompt=tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=longest))),
        max_new_tokens=draw(st.sampled_from([1, 2, 3, 9, 24])),
        temperature=temperature,
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([None, 0.1])),
        seed=draw(st.integers(0, 99)),
        end_token_ids=tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))),
        stop_sequences=draw(st.sampled_from([(), ((3,),), ((7, 7), (1, 2, 3))])),
        logits_processors=draw(st.sampled_from([(), (), (PENALTY,)])),
    )


def alone(model: Any, request: Request, **drafts: Any) -> list[int]:
    """What decoding of this prompt and nothing else gives, plainly where no drafts are named."""
    options: dict[str, Any] = {"do_sample": request.sampled} | (drafts or {"num_draft_tokens": 0})
    if request.sampled:
        options |= {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
        options |= {"min_p": request.min_p, "seed": request.seed}
    out = model.generate(
        torch.tensor([list(request.prompt)]),
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.end_token_ids or ()) or None,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(request.prompt)),
        logits_processor=LogitsProcessorList(request.logits_processors),
        return_dict_in_generate=True,
        **options,
    )
    new: list[int] = out.sequences[0, len(request.prompt) :][: int(out.num_new_tokens[0])].tolist()
    for count in range(1, len(new) + 1):
        if any(new[:count][-len(stop) :] == list(stop) for stop in request.stop_sequences):
            return new[:count]
    return new


def serve(
    scheduler: Scheduler, arrivals: Sequence[tuple[int, Request]], *, cancel: Mapping[int, int] | None = None
) -> list[Completion]:
    """Submit each request so many steps after the one before it; cancel some of them so many steps later."""
    handles, step, due = [], 0, 0
    left = list(arrivals)
    cancelling: dict[int, int] = {}
    while left or not scheduler.idle:
        while left and step >= due + left[0][0]:
            due = step
            handles.append(scheduler.submit(left.pop(0)[1]))
            if cancel and handles[-1].id in cancel:
                cancelling[handles[-1].id] = step + cancel[handles[-1].id]
        for handle in handles:
            if cancelling.get(handle.id) == step:
                handle.cancel()
        scheduler.step()
        step += 1
        assert step < 2000
    completions = [handle.result() for handle in handles]
    for handle, completion in zip(handles, completions, strict=True):
        assert [token for part in handle for token in part] == completion.tokens
    return completions


class ScriptedDrafter:
    """The heads run and draft as ever, but what is verified is the true text, wrong here and there.

    Whether a place is wrong depends on the row's prompt and the place alone, so that a request has the same drafts whoever is
    beside it.
    """

    def __init__(self, drafter: Any, texts: RowTexts, truths: Mapping[tuple[int, ...], list[int]], seen: Any) -> None:
        self._drafter = drafter
        self._texts = texts
        self._truths = truths
        self._seen = seen

    def block(self, standing: Any, last_B1: Any, *, depth: int) -> Block:
        """See `Drafter.block`."""
        found: Block = self._drafter.block(standing, last_B1, depth=depth)
        tree = found.tree or Tree.chain(found.tokens_BM.shape[1] - 1)
        tokens_BM = found.tokens_BM.clone()
        for number in standing.live:
            prompt, made = tuple(self._texts.rows[number].request.prompt), standing.made[number]
            room = self._texts.rows[number].request.max_new_tokens - made
            shape = tree.of_row(number)
            kept = [node for node in range(1, len(shape)) if shape.depths[node] < room]
            self._seen.setdefault(prompt, {})[made] = tokens_BM[number, kept].tolist()
            for node in range(1, len(shape)):
                place = made + shape.depths[node] - 1
                truth = self._truths[prompt]
                right = truth[place] if place < len(truth) else 0
                siblings = shape.children[shape.parents[node]]
                taken = random.Random(f"{prompt} {place}").randrange(len(siblings) + 1)
                wrong = (right + 1 + siblings.index(node)) % VOCABULARY
                tokens_BM[number, node] = right if taken == siblings.index(node) else wrong
        return replace(found, tokens_BM=tokens_BM)


def script(patch: pytest.MonkeyPatch, model: Any, asked: Sequence[Request]) -> dict[tuple[int, ...], Any]:
    """Let drafts of these requests (of different prompts) be right at times; returns what the heads drafted where."""
    truths = {tuple(request.prompt): alone(model, request) for request in asked}
    seen: dict[tuple[int, ...], Any] = {}
    original = Engine.drafter

    def drafter(self: Engine, *arguments: Any) -> Any:
        texts = next((value for value in arguments if isinstance(value, RowTexts)), None)
        found = original(self, *arguments)
        return found if texts is None or found is None else ScriptedDrafter(found, texts, truths, seen)

    patch.setattr(Engine, "drafter", drafter)
    return seen
