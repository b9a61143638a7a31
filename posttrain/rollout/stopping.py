"""When a completion ends: stop token or string, repetition, length, the iteration's budget; in this
order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posttrain.rollout.engine import FinishReason, SamplingConfig

_TOKENS_PER_CHARACTER = 4  # a character can be spread over this many byte tokens


class StopRule:
    """``reason(prefix, drawn)`` after every token of a completion."""

    def __init__(
        self,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None,
    ) -> None:
        """``decode`` turns ids into text. Raises ValueError for stop strings without it."""
        if sampling.stop_strings and decode is None:
            raise ValueError("sampling.stop_strings need a tokenizer; give the engine one.")
        self._sampling, self._stop_ids, self._decode = sampling, frozenset(stop_ids), decode
        self._window = (
            max((len(s) for s in sampling.stop_strings), default=0) * _TOKENS_PER_CHARACTER
        )

    def reason(self, prefix: Sequence[int], drawn: Sequence[int]) -> FinishReason | None:
        """Why the completion ``prefix + drawn`` ends with its last token; None: it goes on."""
        s = self._sampling
        if drawn[-1] in self._stop_ids or self._ends_in_string(prefix, drawn):
            return "stop"
        needed = s.repeat_ngram * s.repeat_times
        if needed and repeats(
            [*prefix[-needed:], *drawn[-needed:]], ngram=s.repeat_ngram, times=s.repeat_times
        ):
            return "repeat"
        if len(prefix) + len(drawn) >= s.max_tokens:
            return "length"
        return "budget" if s.budget_tokens and len(drawn) >= s.budget_tokens else None

    def _ends_in_string(self, prefix: Sequence[int], drawn: Sequence[int]) -> bool:
        """A stop string ends in the text of the last token (it may begin in earlier ones, also of
        the prefix)."""
        if not self._sampling.stop_strings:
            return False
        assert self._decode is not None
        tail = [*prefix[-self._window :], *drawn[-self._window :]][-self._window :]
        text, before = self._decode(tail), self._decode(tail[:-1])
        return any(text.count(stop) > before.count(stop) for stop in self._sampling.stop_strings)


def repeats(token_ids: Sequence[int], *, ngram: int, times: int) -> bool:
    """Whether the last ``ngram`` tokens, or any shorter stretch of them, stand ``times`` times in a
    row at the end.

    A stretch shorter than ``ngram`` must fill as many tokens as ``times`` n-grams would.
    """
    needed = ngram * times
    if len(token_ids) < needed:
        return False
    end = list(token_ids[-needed:])
    return any(end[:-period] == end[period:] for period in range(1, ngram + 1))
