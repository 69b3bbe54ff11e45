"""The nouns that `explain` uses without texts."""

from __future__ import annotations

from importlib.resources import files


def vocabulary() -> list[str]:
    """Returns the nouns that the embedded model learned, in the singular: objects, materials, places and backgrounds of photographs."""
    text = files("iclip_hf.hub_configs").joinpath("iclip-dinov2-s14-minilm", "nouns.txt").read_text(encoding="utf-8")
    return [line.removesuffix("(background)").strip() for line in text.splitlines() if line.strip()]
