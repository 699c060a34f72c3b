"""Text of tokens as they come: whole characters only, and nothing that may yet turn out to be a stop."""

from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character


class Pieces:
    """The text of one answer, a piece at a time; all pieces together are what the tokenizer makes of all tokens.

    Args:
        tokenizer: of transformers.
        stop: texts that end the answer and are no part of it.

    Attributes:
        tokens: that were read.
        stopped: whether a stop was met.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.stopped = False
        self._start = self._told = (
            0  # tokens before both are told; those from the first on are decoded with what follows
        )
        self._held = ""  # text that may be the beginning of a stop

    def add(self, token: int) -> str:
        """One more token.

        Returns:
            The text that is certain now, perhaps none.
        """
        self.tokens.append(token)
        before, now = self._decode(self._start, self._told), self._decode(self._start, None)
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._start, self._told = self._told, len(self.tokens)
        return self._without_stop(now[len(before) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        rest = self._decode(self._start, None)[len(self._decode(self._start, self._told)) :]
        text = self._without_stop(rest)
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decode(self, start: int, end: int | None) -> str:
        ids = self.tokens[start:end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _without_stop(self, new: str) -> str:
        """Of the text held and the new one, what comes before a stop, or before what may be the beginning of one."""
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for place in map(text.find, self.stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
