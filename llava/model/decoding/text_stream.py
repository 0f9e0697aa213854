"""The text of an answer while its tokens arrive: whole characters only, and no beginning of a possible stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer. text: its certain part so far; stopped: whether a stop string has appeared."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._stop, self._held = tuple(stop), ""
        self._tokenizer = tokenizer.backend_tokenizer
        # It holds back the bytes of incomplete characters, and the space that a following token decides about.
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Return the text that the next token makes certain. The end that may begin a stop string is held back."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0))

    def end(self) -> str:
        """Return the text that was held back, when no token follows; "" if a stop string has appeared."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        new, self._held = self._held[:count], self._held[count:]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
