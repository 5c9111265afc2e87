"""A training sample as a person reads it: harmony text with the labelled tokens marked by channel."""

from __future__ import annotations

from itertools import groupby

from gptoss_infer import harmony
from gptoss_train.data import CHANNELS, Sample

COLORS = {"analysis": "36", "commentary": "35", "final": "32", "tool_call": "33"}


def show(sample: Sample, *, color: bool) -> str:
    """Return the text of a sample; what carries loss stands in colour, or between ⟦channel: and ⟧."""
    parts = []
    pairs = zip(sample.channels.tolist(), sample.token_ids.tolist(), strict=True)
    for code, group in groupby(pairs, key=lambda pair: pair[0]):
        text = harmony.decode([token for _, token in group])
        if code == 0:
            parts.append(text)
            continue
        channel = CHANNELS[code - 1]
        parts.append(f"\x1b[{COLORS[channel]}m{text}\x1b[0m" if color else f"⟦{channel}: {text}⟧")
    return "".join(parts)
