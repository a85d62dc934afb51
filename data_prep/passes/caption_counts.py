"""How many captions a data set has, how long they are, and how many occur twice: counted as they come by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megapix.shards.captions import Caption

EXAMPLES = 3
"""Captions that are shown."""
SHOWN = 60
"""Characters of a caption that are shown."""


@dataclass
class CaptionCounts:
    """Counts over the samples of a folder; of the captions themselves only hashes are kept."""

    samples: Counter[int] = field(default_factory=Counter)
    """Captions of a sample -> samples."""
    characters: Counter[int] = field(default_factory=Counter)
    """Length of a caption -> captions."""
    words: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    """Hash of each caption."""
    examples: list[str] = field(default_factory=list)
    """The first different captions."""
    longest: tuple[int, str] = (0, "")
    """Number of the sample with the longest caption, in characters, and that caption."""

    def add(self, sample: int, captions: Sequence[Caption]) -> None:
        """Count the captions of a sample; a blank one is none."""
        texts = [caption.text for caption in captions if caption.text.strip()]
        self.samples[len(texts)] += 1
        for text in texts:
            self.characters[len(text)] += 1
            self.words[len(text.split())] += 1
            self.seen.add(hash(text))
            if len(text) > len(self.longest[1]):
                self.longest = sample, text
            if len(self.examples) < EXAMPLES and text not in self.examples:
                self.examples.append(text)

    def lines(self, shard_of: Callable[[int], str]) -> Iterator[str]:
        """What was counted, a line for each aspect; `shard_of` names the shard of a sample."""
        total, none = self.characters.total(), self.samples[0]
        each = Counter({count: samples for count, samples in self.samples.items() if samples})
        yield (
            f"{total:,} in {self.samples.total():,} samples: {min(each)} fewest, {_percentile(each, 50)} median, "
            f"{max(each)} most of a sample; {none:,} samples without any"
        )
        yield f"{len(self.seen):,} different, {total - len(self.seen):,} duplicates"
        if not total:
            return
        yield f"characters: {_spread(self.characters)}"
        yield f"words: {_spread(self.words)}"
        sample, text = self.longest
        yield f"longest: sample {sample:,} in {shard_of(sample)}, {shown(text)}"
        yield f"such as {', '.join(map(shown, self.examples))}"


def shown(text: str) -> str:
    """A caption in quotation marks on one line, cut where it is long."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"


def _spread(lengths: Counter[int]) -> str:
    median, most = _percentile(lengths, 50), _percentile(lengths, 95)
    return f"{min(lengths):,} shortest, {median:,} median, {most:,} 95th percentile, {max(lengths):,} longest"


def _percentile(counts: Counter[int], percent: int) -> int:
    """The smallest value that `percent` in a hundred values, or more, do not exceed."""
    total, below = counts.total(), 0
    for value in sorted(counts):
        below += counts[value]
        if 100 * below >= percent * total:
            return value
    raise AssertionError("there are values")
