"""Next-token distributions after every candidate for the next token, many at once.

Legend: T positions of a text, P chosen positions, C candidates per position, Q = P * C queries, S slots, V vocabulary.

One pass over the text fills a cache; then all candidates of several positions run as one row of queries, of which each
sees the text up to its own position and itself. Nothing is copied: the cache of the text serves every candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.decoding.cache import RaggedCache, attention_windows
from headway.errors import ConfigError
from headway.model.documents import masks_by_layer_type
from headway.model.multi_token_lm import MultiTokenLM


class Continuations:
    """A text that the model has read, to be continued with one token anywhere.

    Use it inside `evaluation_mode`.
    """

    def __init__(self, model: MultiTokenLM, text_T: Tensor, *, max_queries: int = 2048) -> None:
        """Read the text.

        Args:
            model: any multi-token model.
            text_T: token ids, one document.
            max_queries: most candidates of one forward.

        Raises:
            ConfigError: an empty text, or max_queries < 1.
        """
        if text_T.ndim != 1 or not text_T.numel() or max_queries < 1:
            raise ConfigError(
                f"continuations need a text of at least one token and max_queries >= 1: got shape "
                f"{tuple(text_T.shape)} and {max_queries}"
            )
        self._model = model
        self._length = text_T.numel()
        self._max_queries = max_queries
        self._cache = RaggedCache(
            attention_windows(model.config, num_heads=model.heads.cache_layers(0)),
            batch=1,
            capacity=self._length + max_queries,
            device=text_T.device,
        )
        self._cache.begin_aligned(0, self._length)
        # Without a mask the family makes its own, causal or windowed.
        model.offset_hidden_states(
            text_T[None],
            position_ids=torch.arange(self._length, device=text_T.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            num_offsets=1,
        )

    def log_probs(self, positions_P: Tensor, candidates_PC: Tensor) -> Tensor:
        """Log p(y | text up to and with position t, x) as float64 [P, C, V].

        Equal to a plain forward over `text[: t + 1]` followed by x, for each position t and candidate x of it.

        Args:
            positions_P: positions t of the text.
            candidates_PC: token ids x.

        Raises:
            ConfigError: more than max_queries candidates, or a position outside the text.
        """
        num_queries = candidates_PC.numel()
        if not 1 <= num_queries <= self._max_queries:
            raise ConfigError(
                f"one forward takes 1 to {self._max_queries} candidates: got {num_queries}; pass fewer positions"
            )
        if int(positions_P.min()) < 0 or int(positions_P.max()) >= self._length:
            raise ConfigError(f"positions must lie in 0..{self._length - 1}: got {positions_P.tolist()}")
        own_Q = positions_P.repeat_interleave(candidates_PC.shape[1])
        slots_Q = torch.arange(num_queries, device=own_Q.device) + self._length
        self._cache.begin_ragged(slots_Q[None], first=int(own_Q.min()) + 1, end=self._length + num_queries)
        states = self._model.offset_hidden_states(
            candidates_PC.reshape(1, -1),
            attention_mask=masks_by_layer_type(self._model.config, lambda window: self._mask(own_Q, slots_Q, window)),
            position_ids=own_Q[None] + 1,
            past_key_values=self._cache,
            use_cache=True,
            num_offsets=1,
        )
        logits_QV = self._model.unembed(states.last_hidden_BTD[0])
        return logits_QV.double().log_softmax(-1).view(*candidates_PC.shape, -1)

    def _mask(self, own_Q: Tensor, slots_Q: Tensor, window: int | None) -> Tensor:
        """Additive [1, 1, Q, S]: a query stands at position own + 1 and sees the text up to `own`, and itself."""
        view = self._cache.views[window]
        slots_S = torch.arange(view.start, view.start + view.length, device=own_Q.device)
        seen_QS = slots_S <= own_Q[:, None]
        if window is not None:
            seen_QS &= slots_S > own_Q[:, None] + 1 - window
        seen_QS |= slots_S == slots_Q[:, None]
        dtype = self._model.get_input_embeddings().weight.dtype
        assert isinstance(dtype, torch.dtype)
        mask_QS = torch.zeros(seen_QS.shape, dtype=dtype, device=own_Q.device)
        return mask_QS.masked_fill_(~seen_QS, torch.finfo(dtype).min)[None, None]
