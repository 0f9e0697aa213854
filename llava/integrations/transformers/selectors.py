"""Which methods before the LLM work on towers other than CLIP, whose tokens keep their positions in the whole prompt."""

from __future__ import annotations

from llava.common.errors import UserError
from llava.config import AdaVConfig


def check_selector(config: AdaVConfig, family: str) -> None:
    """Raise UserError for a method or an option that needs a CLIP tower or tiles, or that numbers positions anew.

    family: name of the models, for messages. `compress` and the plugin for vLLM share this check.
    """
    method, name, given = config.make_method(), config.method, config.options
    if method.resizes:
        raise UserError(
            f'method "{name}" makes the image smaller before a CLIP tower, which {family} does not have; its processor has '
            "max_pixels for that"
        )
    if method.zooms:
        raise UserError(
            f'method "{name}" encodes only some crops of an image, but {family} encodes all of it at once; allowed are '
            "methods over all tokens, such as adav"
        )
    needed = method.tower_states
    if needed:
        raise UserError(
            f'method "{name}" reads {" and ".join(needed)} of a CLIP tower with [CLS] and square tiles, which {family} '
            "does not have"
        )
    if getattr(method, "makes_tokens", False):
        raise UserError(
            f'method "{name}" makes tokens that stood nowhere in the image, allowed for {family} are methods that keep '
            "tokens of the image"
        )
    if given.get("positions") == "reindexed":
        raise UserError(f'"options.positions" is "reindexed", allowed for {family} is "original", its default there')
    for option, value in (("compat", "public"), ("anyres", "fastervlm")):
        if given.get(option) == value:
            raise UserError(f'"options.{option}" is "{value}", a rule for LLaVA\'s tiles, which {family} does not have')
    if config.detail_share:
        raise UserError(
            f'"options.detail_share" is {config.detail_share}, which rates the pixels of patches in LLaVA\'s tiles; allowed '
            f"for {family} is 0"
        )
