"""What the scripts stand on: annotations and images in, models and captions out.

from captioning import Captioner          # any trained or pretrained model: docs/python.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioning.captioners.attention import Captioner

__all__ = ["HUB_MODEL", "Captioner"]

HUB_MODEL = "Salesforce/blip-image-captioning-base"  # the pretrained captioner that scripts take by default


def __getattr__(name: str) -> type[Captioner]:
    """`Captioner`, imported on first use, as it imports torch."""
    if name != "Captioner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from captioning.captioners.attention import Captioner

    return Captioner
