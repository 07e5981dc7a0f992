"""The text of an answer while its tokens come: decoded piece by piece, cut before the first stop string."""

from collections.abc import Callable

__all__ = ["AnswerText", "Decode"]

Decode = Callable[[list[int]], str]


MOST_PENDING = 8  # tokens without a complete character at their end; one has four bytes at most
UNFINISHED = 3  # of them may be the beginning of a character


class AnswerText:
    """Grows token by token; what it costs does not depend on how long the answer already is.

    A token's text may depend on the one before it (leading spaces, characters of several tokens), so each step
    decodes the tokens since the last but one character boundary, not the token alone, and not the whole answer.
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...] = ()):
        """decode: token ids -> text, ending in U+FFFD where the last character is not complete."""
        self.text = ""  # complete characters, never past a stop string
        self.stopped_by: str | None = None
        self._decode, self._stop = decode, stop
        self._window: list[int] = []  # tokens from the last but one boundary on
        self._boundary = 0  # tokens of the window whose text is in self.text
        self._may_stop = True  # whether the token pushed last may

    def push(self, tokens: list[int], may_stop: bool = True) -> str | None:
        """Take in tokens; the stop string that they complete. The text is then cut before it, and complete.

        Stop strings that end in tokens pushed with may_stop=False are not seen, then or later. To know which token
        completes a stop string, push one at a time.
        """
        self._window += tokens
        self._may_stop = may_stop
        text, count = self._decode(self._window), len(self._window)
        if text.endswith("\ufffd"):
            if count - self._boundary < MOST_PENDING:
                return None
            count -= UNFINISHED  # bytes that are no text: what lies before the last few will not become any
            text, whole = self._decode(self._window[:count]), text
            if text + self._decode(self._window[count:]) != whole:
                return None
        self._append(text, count)
        return self.stopped_by

    def finish(self) -> str:
        """The whole text, no token follows: a character that stayed incomplete becomes U+FFFD. What `push` would have
        returned is in `stopped_by` then."""
        if self.stopped_by is None and self._boundary < len(self._window):
            self._append(self._decode(self._window), len(self._window))
        return self.text

    @property
    def certain(self) -> str:
        """The text without an ending that may be the beginning of a stop string: what can be streamed."""
        beginnings = (length for stop in self._stop for length in range(len(stop)) if self.text.endswith(stop[:length]))
        held = max(beginnings, default=0)
        return self.text[: len(self.text) - held]

    def _append(self, window_text: str, count: int) -> None:
        """The text of the window's first `count` tokens is complete."""
        before = len(self.text)
        self.text += window_text[len(self._decode(self._window[: self._boundary])) :]
        self._window, self._boundary = self._window[self._boundary :], count - self._boundary
        if self._may_stop:  # a stop string that is new ends in the new text
            found = [(self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop]
            start, self.stopped_by = min((pair for pair in found if pair[0] >= 0), default=(None, None))
            self.text = self.text[:start]
