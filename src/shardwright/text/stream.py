"""Text out of token ids that arrive one at a time.

Decides when text is complete enough to be shown. Knows nothing of models or of where ids come from.
"""

from collections.abc import Callable, Sequence

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet one."""


class TextStream:
    """Text piece by piece; the pieces of all steps and of `finish` together are `decode(ids)`.

    Ids are decoded together with those of the latest piece, because a decoder may treat the first token of a text
    differently (SentencePiece drops its leading space). A byte-fallback decoder takes back an ASCII byte that an
    invalid one follows; what was shown stays. `tokenizers.decoders.DecodeStream` raises there, and cannot say what is
    pending at the end: hence not that one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown_ids = 0
        self._shown_text = ""

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes: none while a character is still missing bytes."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        return "" if text.endswith(HALF) else self._show(text)

    def finish(self) -> str:
        """What no further id will complete, broken characters as U+FFFD."""
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown_text) :]
        if piece:
            self._ids = self._ids[self._shown_ids :]
            self._shown_ids = len(self._ids)
            self._shown_text = self._decode(self._ids)
        return piece
