"""Methods that choose vision tokens before the first LLM layer: one file per method, chosen by name.

    from llava.methods.before_llm import SELECTORS, ImageTokens, Selection, select
    selection = select("adav", image, text, budget=144)

Importing this package imports no torch: the launcher and the configuration check method names with `selector_names`
and use no tensor. SELECTORS and the classes are imported on first access.
"""

from __future__ import annotations

from llava.methods.lazy_names import LazyNames

__all__ = [
    "SELECTORS",
    "ImageTokens",
    "Selection",
    "Selector",
    "TowerStates",
    "option_names",
    "select",
    "select_all",
    "selector_names",
]

# method name -> file and class. A new method is one file and one line here.
_CLASSES = {
    "none": "none:KeepAll",
    "no_image": "no_image:NoImage",
    "random": "random:Random",
    "cls": "cls:Cls",
    "t2i": "t2i:T2I",
    "mix": "mix:Mix",
    "downsample": "downsample:Downsample",
    "fastervlm": "fastervlm:FasterVLM",
    "visionzip": "visionzip:VisionZip",
    "divprune": "divprune:DivPrune",
    "hiprune": "hiprune:HiPrune",
    "apet": "apet:ApET",
    "cdpruner": "cdpruner:CDPruner",
    "scope": "scope:Scope",
    "mmtok": "mmtok:MMTok",
    "vispruner": "vispruner:VisPruner",
    "holov": "holov:HoloV",
    "prunesid": "prunesid:PruneSID",
    "adav": "adav:AdaV",
    "adav_cover": "adav_cover:AdaVCover",
    "adav_zoom": "adav_zoom:AdaVZoom",
}


_OTHERS = {name: f"base:{name}" for name in ("ImageTokens", "Selection", "Selector", "TowerStates")}
_OTHERS |= {name: f"selection:{name}" for name in ("option_names", "select", "select_all")}
__getattr__ = _names = LazyNames(__name__, "SELECTORS", _CLASSES, _OTHERS, base="Selector")


def selector_names() -> tuple[str, ...]:
    """Return the names of all selectors without importing torch; methods that a user added are included."""
    return _names.names()
