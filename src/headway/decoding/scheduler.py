"""Continuous admission: requests come and go, and no text depends on who else is there.

    submit -> queue -> reading (own forwards, one piece of a prompt per step) -> batch under way -> completion
                 ^ first come, first served           one forward per step for all its rows ^   |
                 +--------- refused: never fits, queue full           cancelled, ended, failed -+

A step is at most two forwards: one that reads the prompts of newcomers, or a piece of a long one, and one block of every row
under way. A long prompt therefore delays the others by one piece per step and not by its length.

What holds:

* A text is what `model.generate` gives for its prompt alone, with its own limit, seed, sampling, ends and processors: in float64
  always, in float32 up to rounding. Drafts, acceptance rule and executor are the scheduler's (`DecodingOptions`).
* Memory stays within the limit: rows are admitted only where the batch fits with every row at its own limit
  (`headway.decoding.cache_budget`); what can never fit is refused when it is submitted.
* `submit` and `cancel` may be called from any thread while one thread steps; they do not wait for a forward. Two threads that
  step take turns.
* What goes wrong in a request's own processors and criteria ends that request; what goes wrong in a forward ends the requests
  that were in it. The scheduler goes on with the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from threading import RLock
from typing import Any

import torch

from headway.decoding.cache_budget import CacheBudget
from headway.decoding.calibration.use import with_calibration
from headway.decoding.changing_batch import ChangingBatch
from headway.decoding.controller import DraftController, Experience
from headway.decoding.draft_places import block_slots
from headway.decoding.engine import ENGINE, decoding_context, keeps_state
from headway.decoding.executor import most_repeated_tokens
from headway.decoding.forward_costs import ForwardCosts
from headway.decoding.handles import RequestHandle
from headway.decoding.options import acceptance_rule, lossy_note, plan_drafts, take_options
from headway.decoding.prompts import Prompts
from headway.decoding.refusals import check_positions
from headway.decoding.request_book import RequestBook
from headway.decoding.requests import Completion, FinishReason, Request, StoppingCriterion
from headway.decoding.row_chooser import RowChooser
from headway.decoding.rows import Row, RowTexts
from headway.decoding.scheduler_report import Emitted, SchedulerReport, SchedulerStatistics, StepReport, Window
from headway.decoding.stop_texts import stop_strings_criterion
from headway.errors import DecodingError

KEPT_LENGTHS = 1024
"""Decisions of a controller that are remembered; a scheduler may run for ever."""


class Scheduler:
    """Decodes requests as they come.

    Example::

        scheduler = Scheduler(model, max_rows=8, executor="lean")
        handle = scheduler.submit(Request(prompt=ids, max_new_tokens=64, temperature=0.7, seed=1))
        for tokens in handle:
            show(tokens)
        handle.result().acceptance.mean_acceptance_length
    """

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int = 16,
        max_waiting: int = 256,
        max_cache_tokens: int | None = None,
        max_cache_bytes: int | None = None,
        tokenizer: Any = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        """Prepare; nothing runs before the first step.

        Args:
            model: a `MultiTokenLM`, whose weights must not change while requests are under way.
            max_rows: the most requests that are decoded together, at least 1.
            max_waiting: the most requests in the queue, at least 1.
            max_cache_tokens: limit on rows x slots of the cache; see `headway.decoding.cache_budget`.
            max_cache_bytes: the same in bytes; with neither, half of the memory that is free now.
            tokenizer: for stop strings.
            clock: seconds.
            options: `headway.decoding.options.DecodingOptions`, for all requests; a seed is a request's own.

        Raises:
            DecodingError: options that do not exist, do not go together, or that a changing batch cannot have.
        """
        self._options = take_options(options)
        if options:
            raise DecodingError(f"a scheduler has no option {', '.join(sorted(options))}; sampling is a request's own")
        if self._options.seed is not None:
            raise DecodingError("a seed is a request's own: pass Request(seed=...)")
        if self._options.executor == "graph":
            raise DecodingError("executor='graph' needs batches that do not change; pass 'lean' or 'eager'")
        for name, least in (("max_rows", max_rows), ("max_waiting", max_waiting)):
            if least < 1:
                raise DecodingError(f"{name} must be at least 1: got {least}")
        self._model = model
        self._modules = tuple(model.modules())
        self._options, ignored = with_calibration(self._options, model, batch=max_rows)
        self._notes = {ignored, lossy_note(self._options, do_sample=True) if self._options.lossy else None}
        self._plan = plan_drafts(self._options, model, do_sample=self._options.sample_drafts, batch=max_rows)
        self._extra_slots = (
            block_slots(model.heads, self._plan.heads, self._plan.widest)
            - 1
            + most_repeated_tokens(model.heads, self._plan.heads, changing=self._plan.controlled)
        )
        self._budget = CacheBudget.of(
            model,
            num_head_layers=model.heads.cache_layers(self._plan.heads),
            max_cache_tokens=max_cache_tokens,
            max_cache_bytes=max_cache_bytes,
        )
        self._max_rows = max_rows
        self._tokenizer = tokenizer
        self._clock = clock
        # Held for the length of a step: whoever holds it owns the batches.
        self._stepping = RLock()
        # Its lock is held for moments, never for a forward.
        self._book = RequestBook(
            clock, max_waiting=max_waiting, longest_draft=max(model.num_future_tokens - 1, self._plan.depth)
        )
        self._drivers = 0
        self._reading: ChangingBatch | None = None
        self._batch: ChangingBatch | None = None
        self._controllers: dict[int, DraftController] = {}
        self._window = Window()
        self._statistics = SchedulerStatistics(cache_tokens_limit=self._budget.tokens)

    # ------------------------------------------------------------------------------------------------------- from any thread

    def submit(self, request: Request) -> RequestHandle:
        """Put a request at the end of the queue.

        Raises:
            DecodingError: it could never be served; the message has the numbers.
            QueueFullError: `max_waiting` requests are waiting.
        """
        return self._book.enter(self._row(request), self)

    def cancel(self, id: int) -> bool:
        """Give a request up; its tokens so far stay. One that is under way leaves at the next step.

        Returns:
            Whether it had not ended yet.
        """
        return self._book.cancel(id)

    @property
    def running(self) -> bool:
        """Whether some thread is in `run`."""
        return self._drivers > 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._book.empty

    @property
    def note(self) -> str | None:
        """Why something is not as it was asked for, or that the acceptance rule is lossy; None where nothing is to be said."""
        return "; ".join(sorted(note for note in self._notes if note)) or None

    @property
    def statistics(self) -> SchedulerStatistics:
        """After the last step."""
        return self._statistics

    def report(self) -> SchedulerReport:
        """The statistics, and what the controllers decided; waits for the step that is under way."""
        with self._stepping:
            decided = {rows: own.report() for rows, own in self._controllers.items() if own.lengths}
            return SchedulerReport(self._statistics, decided)

    def close(self) -> None:
        """End `run`, cancel everything that is waiting or under way, and free the cache."""
        self._book.close()
        with self._stepping:
            under_way = [row for batch in (self._reading, self._batch) if batch for row in batch.members]
            for row in [*under_way, *self._book.waiting]:
                if self._book.has(row):
                    self._book.finish(row, "cancelled")
            self._book.waiting.clear()
            self._reading = self._batch = None

    # ----------------------------------------------------------------------------------------------------- whoever steps

    def run(self) -> None:
        """Step while there is something to do, wait where there is not, until `close`; for a thread of its own."""
        book = self._book
        with book.changed:
            self._drivers += 1
        try:
            while True:
                with book.changed:
                    book.changed.wait_for(lambda: book.closed or not book.empty)
                    if book.closed:
                        return
                self.step()
        finally:
            with book.changed:
                self._drivers -= 1
                book.changed.notify_all()

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Serve requests to their ends, in the order of their submission; the queue may be shorter than they are many."""
        handles: list[RequestHandle] = []
        for request in requests:
            while self._book.full:
                self.step()
            handles.append(self.submit(request))
        return [handle.result() for handle in handles]

    def step(self) -> StepReport:
        """Let cancelled rows go, admit newcomers, read one piece of prompts, and run one forward of the rows under way.

        Errors of a forward end the requests in it and are kept in their completions.
        """
        with self._stepping:
            begin = self._clock()
            emitted: list[Emitted] = []
            with torch.inference_mode():
                self._let_cancelled_go(emitted)
            self._admit(emitted)
            rows = decoded = 0
            if self._reading is not None or self._batch is not None:
                with decoding_context(self._model, self._modules):
                    self._read(emitted)
                    rows, decoded = self._decode(emitted)
            tokens = sum(len(part.tokens) for part in emitted)
            self._window.add(self._clock() - begin, tokens, rows=rows, decoded=decoded)
            self._statistics = self._measure(self._clock() - begin)
            return StepReport(emitted, self._statistics)

    # ---------------------------------------------------------------------------------------------------------- admission

    def _row(self, request: Request) -> Row:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        prompt = [int(token) for token in request.prompt]
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise DecodingError(f"token ids must be in 0..{vocabulary - 1}: got {wrong}; use the model's own tokenizer")
        check_positions(self._model.config, [len(prompt)], request.max_new_tokens)
        for processor in request.logits_processors:
            if self._plan.depth and keeps_state(processor):
                raise DecodingError(
                    f"{type(processor).__name__} keeps a state from token to token, which drafted tokens would disturb; use a "
                    f"scheduler with num_draft_tokens=0"
                )
        slots = len(prompt) + request.max_new_tokens + self._extra_slots
        if not self._budget.fits([slots]):
            limit = self._budget.tokens or 0
            raise DecodingError(
                f"a prompt of {len(prompt)} tokens with max_new_tokens={request.max_new_tokens} needs {slots} slots of the "
                f"cache ({self._extra_slots} for drafts), the limit is {limit} ({self._budget.bytes_per_token} bytes each); "
                f"pass max_new_tokens={max(limit - self._extra_slots - len(prompt), 0)} or less, a shorter prompt, or a larger "
                f"limit"
            )
        ends = request.end_token_ids
        if ends is None:
            own = self._model.generation_config.eos_token_id
            ends = [] if own is None else torch.as_tensor(own).reshape(-1).tolist()
        seed = request.seed
        if seed is None:
            seed = int(torch.randint(2**62, ())) if request.sampled else 0
        return Row(-1, request, frozenset(ends), self._criteria(request), seed, slots)

    def _criteria(self, request: Request) -> Sequence[StoppingCriterion]:
        if not request.stop_strings:
            return request.stopping_criteria
        if self._tokenizer is None:
            raise DecodingError("stop_strings need the tokenizer: pass Scheduler(model, tokenizer=...)")
        strings = stop_strings_criterion(self._tokenizer, tuple(request.stop_strings))
        return (*request.stopping_criteria, strings)

    def _let_cancelled_go(self, emitted: list[Emitted]) -> None:
        cancelled = self._book.take_cancelled()
        for batch in (self._reading, self._batch):
            for row in batch.members if batch else ():
                if row.id in cancelled and not row.cancelled:
                    row.cancelled = True
                    self._end(row, "cancelled", emitted)
        if self._reading is not None and all(row.cancelled for row in self._reading.members):
            self._reading = None
        self._let_ended_go()

    def _let_ended_go(self) -> None:
        if self._batch is None:
            return
        if self._batch.live():
            self._batch.keep_live()
        else:
            self._batch = None

    def _admit(self, emitted: list[Emitted]) -> None:
        """Take from the head of the queue what fits, as many prompts as one piece holds or one longer than that."""
        if self._reading is not None:
            return
        slots = [row.slots for row in self._batch.members] if self._batch else []
        group: list[Row] = []
        chunk = self._options.prefill_chunk_tokens

        def fits(row: Row) -> bool:
            columns = max(len(other.request.prompt) for other in [*group, row])
            together = not group or (chunk is not None and columns * (len(group) + 1) <= chunk)
            return len(slots) < self._max_rows and together and self._budget.fits([*slots, row.slots])

        while (row := self._book.take(fits)) is not None:
            group.append(row)
            slots.append(row.slots)
        if group:
            try:
                with torch.inference_mode():
                    self._make_room_for(group)
                    self._reading = self._newcomers(group)
            except Exception as error:
                self._fail(group, error, emitted)

    def _make_room_for(self, group: list[Row]) -> None:
        """Rows kept for newcomers are given up where the caches that newcomers are read into would not fit beside them."""
        if self._batch is not None and self._budget.tokens is not None:
            apart = len(group) * max(row.slots for row in group)
            rows = (self._budget.tokens - apart) // self._batch.capacity
            cache = self._batch.executor.cache
            cache.allocate_rows(min(cache.allocated_rows, rows))

    def _newcomers(self, rows: list[Row]) -> ChangingBatch:
        lengths = [len(row.request.prompt) for row in rows]
        filled = [
            [*row.request.prompt, *[row.request.prompt[-1]] * (max(lengths) - length)]
            for row, length in zip(rows, lengths, strict=True)
        ]
        prompts = Prompts(torch.tensor(filled, dtype=torch.long), lengths)
        most = max(length + row.request.max_new_tokens for row, length in zip(rows, lengths, strict=True))
        plan, options = self._plan, self._options
        executor, note = ENGINE.executor(self._model, prompts, options, plan, most - max(lengths))
        self._notes.add(note)
        texts = RowTexts(rows)
        controlled = self._controller(len(rows) + len(self._batch.members if self._batch else ()))
        return ChangingBatch(
            executor=executor,
            chooser=RowChooser(texts, lambda sampled: acceptance_rule(options, plan, do_sample=sampled)),
            prompts=prompts,
            given_BT=prompts.ids_BP,
            num_future_tokens=self._model.num_future_tokens,
            drafter=ENGINE.drafter(plan, options, executor, prompts, texts, texts, texts.end_token_ids),
            num_draft_tokens=plan.depth if controlled is None else controlled.length,
            num_heads=plan.heads,
            max_new_tokens=most - max(lengths),
            pad_token_id=0,
            members=rows,
            reads_all_heads=plan.controlled,
        )

    def _controller(self, rows: int) -> DraftController | None:
        """One for batches of about this size: costs and what pays depend on it."""
        if not self._plan.controlled:
            return None
        size = 1 << (rows - 1).bit_length()
        if size not in self._controllers:
            # How often a drawn draft is accepted cannot be seen from the text.
            self._controllers[size] = DraftController(
                self._plan.depth, experience=Experience(ForwardCosts(batch=size)), trials=not self._plan.sampled
            )
        controller = self._controllers[size]
        if len(controller.lengths) > 2 * KEPT_LENGTHS:
            del controller.lengths[:-KEPT_LENGTHS]
        return controller

    # ----------------------------------------------------------------------------------------------------------- forwards

    def _read(self, emitted: list[Emitted]) -> None:
        """One forward over prompts; the rows that are through join the batch."""
        reading = self._reading
        if reading is None:
            return
        try:
            if reading.executor.pieces_left:
                reading.executor.read_piece()
                if reading.executor.pieces_left:
                    return
            self._reading = None
            tokens = reading.step()
            self._tell(reading, tokens, emitted)
            if not reading.live():
                return
            reading.keep_live()
            if self._batch is None:
                reading.num_draft_tokens = self._plan.depth
                self._batch = reading
                return
        except BaseException as error:
            self._reading = None
            self._fail(reading.members, error, emitted)
            return
        self._join(self._batch, reading, emitted)

    def _join(self, batch: ChangingBatch, newcomers: ChangingBatch, emitted: list[Emitted]) -> None:
        rows = len(batch.members) + len(newcomers.members)
        capacity = max(batch.capacity, newcomers.capacity)
        allocated = batch.executor.cache.allocated_rows
        if rows > allocated or not self._budget.fits([capacity] * allocated):
            allocated = self._budget.rows_to_allocate(rows, capacity, most=self._max_rows)
        try:
            batch.absorb(newcomers, rows=allocated)
        except BaseException as error:
            # Nobody can tell how far it got.
            self._batch = None
            self._fail({row.id: row for row in (*batch.members, *newcomers.members)}.values(), error, emitted)

    def _decode(self, emitted: list[Emitted]) -> tuple[int, int]:
        """One forward of the rows under way; returns how many there were, and their new tokens."""
        batch = self._batch
        if batch is None:
            return 0, 0
        batch.controller = self._controller(len(batch.members))
        try:
            tokens = batch.step()
            self._tell(batch, tokens, emitted)
            self._let_ended_go()
        except BaseException as error:
            self._batch = None
            self._fail(batch.members, error, emitted)
            return 0, 0
        return len(tokens), sum(map(len, tokens))

    # ----------------------------------------------------------------------------------------------------------- telling

    def _tell(self, batch: ChangingBatch, tokens: list[list[int]], emitted: list[Emitted]) -> None:
        live = set(batch.live())
        for number, (row, new) in enumerate(zip(batch.members, tokens, strict=True)):
            if row.cancelled:
                continue
            reason: FinishReason | None = None
            if row.error is not None:
                reason = "error"
            elif number not in live:
                reason = "length" if row.stopped_by is None else "stop"
            emitted.append(Emitted(row.id, new, reason))
            if new:
                self._book.put(row, new)
            if reason is not None:
                self._book.finish(row, reason)

    def _end(self, row: Row, reason: FinishReason, emitted: list[Emitted]) -> None:
        emitted.append(Emitted(row.id, [], reason))
        self._book.finish(row, reason)

    def _fail(self, rows: Iterable[Row], error: BaseException, emitted: list[Emitted]) -> None:
        """End rows whose forward failed; what is no error but an interrupt goes on to the caller."""
        cause = error if isinstance(error, Exception) else DecodingError(f"interrupted by {type(error).__name__}")
        for row in rows:
            if self._book.has(row):
                row.error = row.error or cause
                self._end(row, "error", emitted)
        if cause is not error:
            raise error

    def _measure(self, seconds: float) -> SchedulerStatistics:
        speed, acceptance = self._window.averages()
        batches = [batch for batch in (self._reading, self._batch) if batch is not None]
        allocated = sum(batch.executor.cache.allocated * batch.executor.cache.allocated_rows for batch in batches)
        before = self._statistics
        return SchedulerStatistics(
            steps=before.steps + 1,
            live_rows=len(self._batch.members) if self._batch else 0,
            reading_rows=len(self._reading.members) if self._reading else 0,
            waiting=len(self._book.waiting),
            finished=self._book.finished,
            emitted_tokens=self._book.emitted_tokens,
            tokens_per_second=speed,
            mean_acceptance_length=acceptance,
            draft_length=self._batch.draft_length if self._batch else 0,
            step_seconds=seconds,
            cache_tokens_used=sum(batch.used_slots for batch in batches),
            cache_tokens_allocated=allocated,
            cache_tokens_limit=self._budget.tokens,
            cache_bytes_allocated=allocated * self._budget.bytes_per_token,
        )
