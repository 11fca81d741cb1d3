"""Needles: sentences with seven-digit numbers hidden in a long document, asked for afterwards.

After NVIDIA's RULER (multi-key needles). The questions come behind the context, so that whatever holds
the context cannot know what will be asked.
"""

from __future__ import annotations

WORDS = [
    "apple",
    "river",
    "castle",
    "violin",
    "planet",
    "garden",
    "pepper",
    "silver",
    "falcon",
    "marble",
    "bridge",
    "candle",
    "forest",
    "pirate",
    "rocket",
    "saddle",
    "tunnel",
    "walnut",
    "zebra",
    "anchor",
    "basket",
    "copper",
    "dragon",
    "engine",
]


def is_correct(text: str, answer: str) -> bool:
    """Whether the first number in a continuation is the answer."""
    return text.strip().replace(",", "").startswith(answer)
