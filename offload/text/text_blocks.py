"""Cuts long texts for libllama's tokenizer, or refuses them. Apart: it knows libllama's faults and nothing else.

libllama copies all tokens found so far at each character that it spells out in bytes, so the time of a long text
grows with its square; and where it splits words by std::regex, each character of an unbroken run takes stack.
"""

import re
from collections.abc import Iterable, Iterator

from slimoe.offload.errors import UsageError

BLOCK = 4096
"""Characters of a block at least; the square of so many is a millisecond."""
MAX_RUN = 8192
"""Characters of a run; five times as many overflow a stack of 8 MiB."""

_RUNS = re.compile(rf"(?<!\w)\w{{{MAX_RUN + 1}}}|(?<!\s)\s{{{MAX_RUN + 1}}}|(?<![^\w\s])[^\w\s]{{{MAX_RUN + 1}}}")


class TextBlocks:
    """Blocks of the texts for a sentencepiece vocabulary, whose merges join neighbours into what is a token."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """`tokens` are all texts that merges may come to."""
        joined = {character for token in tokens if len(token) > 1 for character in token} | {" "}
        self._joined = "".join(map(re.escape, sorted(joined)))
        self._block: re.Pattern[str] | None = None

    def cut(self, text: str) -> Iterator[str]:
        """The text in blocks that end with a character that is in no token of several characters."""
        at = 0
        while len(text) - at > BLOCK:
            # Made when it is first needed: most texts are short.
            self._block = self._block or re.compile(rf"(?s:.{{{BLOCK}}}.*?[^{self._joined}])")
            match = self._block.match(text, at)
            if match is None:
                break
            yield match.group()
            at = match.end()
        yield text[at:]


def check_runs(text: str) -> None:
    """Raises UsageError for a text with a longer run of letters, blanks or other marks than std::regex can take."""
    if len(text) > MAX_RUN and _RUNS.search(text):
        raise UsageError(
            f"The text has more than {MAX_RUN} letters, blanks or marks in one run, which the tokenizer of this model "
            "cannot split. Put blanks between them."
        )
