"""AdaVConfig: reads, validates and prints adav_configs.json, the one file that a user edits.

    python -m llava.config [FILE] [--method adav --overall-tokens 144 ...]

The command prints the configuration that would be used, or one sentence that says what is wrong with it. This module
does not import torch, so that the launcher and --help start fast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.strict_json import read_json_object
from llava.methods.index import method_class, method_names
from llava.methods.inside_llm import dropper_names
from llava.methods.options import (
    BOOL,
    COMMON_OPTIONS,
    OBJECT,
    OPTION_RULES,
    OPTIONAL_SHARE,
    PUBLIC_TILES,
    RATE,
    SHARE,
    Rule,
    one_of,
    whole,
)
from llava.methods.plugins import register

if TYPE_CHECKING:
    from llava.methods.inside_llm.base import Dropper
    from llava.methods.kv_cache.base import CachePolicy

#: None where pip installed the package as a wheel: the defaults of AdaVConfig hold then.
DEFAULT_FILE = REPOSITORY and REPOSITORY / "adav_configs.json"


class ConfigError(UserError):
    """Raised for a configuration that cannot be used.

    The message is one sentence. It names the file, the key, the value that was found and the values that are allowed.
    """


def _key(default, rule: Rule | None, help: str):
    """A dataclass field that carries its rule and its help text, so that checks and flags need no second table."""
    metadata = {"rule": rule, "help": help}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AdaVConfig:
    """The whole configuration of a run. The fields are the keys of adav_configs.json, in the order of the file.

    Keys with the help text "A-VL" are settings of arXiv 2409.14846, those with "H2O" of arXiv 2306.14048.
    Raises ConfigError (one sentence) for a value that cannot be used.
    """

    # The rule of `method` is None: its values come from the index of methods, which may grow at run time.
    method: str = _key("adav", None, "how vision tokens are chosen")
    overall_tokens: int = _key(144, whole(1), "vision tokens kept per image, all tiles together")
    vision_adaptive_attention: bool = _key(False, BOOL, "A-VL: split the vision KV cache into core, secondary, minor")
    vision_adaptive_attention_rate: float = _key(0.5, RATE, "A-VL: share of vision entries evicted after prefill")
    vision_adaptive_attention_compute_rate: float = _key(0.7, RATE, "A-VL: share of vision entries not read at a step")
    vision_adaptive_attention_update_interval: int = _key(3, whole(1, -1), "A-VL: steps between re-rankings, -1 never")
    prefill_filter_flag: bool = _key(False, BOOL, "A-VL: drop vision tokens during prefill")
    prefill_filter_layer: int = _key(3, whole(1), "A-VL: layers that still see every vision token")
    prefill_filter_rate: float = _key(0.5, RATE, "A-VL: share of vision tokens dropped during prefill")
    text_pruning_flag: bool = _key(False, BOOL, "A-VL: prune the text part of the KV cache")
    text_pruning_rate: float = _key(0.4, RATE, "A-VL: share of text entries pruned")
    text_init_cache: int = _key(20, whole(0), "A-VL: minimum size of the text cache")
    text_rule: str = _key("h2o", one_of("h2o", "history", "direct"), "A-VL: how text entries are ranked")
    text_heavy_share: float = _key(0.7, SHARE, "A-VL: heavy hitters' share of the text cache under rule h2o")
    all_use_h2o: bool = _key(False, BOOL, "A-VL's H2O baseline in place of A-VL")
    h2o_heavy_share: float | None = _key(None, OPTIONAL_SHARE, "H2O: heavy hitters as a share of the prompt")
    h2o_recent_share: float | None = _key(None, OPTIONAL_SHARE, "H2O: recent entries as a share of the prompt")
    options: dict = _key({}, OBJECT, "options of the method")

    def __post_init__(self):
        self._check("the configuration")

    def _check(self, where: str) -> None:
        """Raise ConfigError for the first value or combination that is not allowed. where: how the message begins."""
        # 1. Each key by its own rule. This comes first: the checks below compute with the values.
        for f in fields(self):
            value = getattr(self, f.name)
            rule = f.metadata["rule"] or one_of(*method_names())
            if not rule.test(value):
                raise ConfigError(
                    f'{where}: "{f.name}" is {json.dumps(value, default=repr)}, allowed is {rule.allowed}'
                )
        # 2. Options of the method. An unknown option passes: it may belong to a user's own method.
        for name, value in self.options.items():
            rule = OPTION_RULES.get(name)
            if rule and not rule.test(value):
                raise ConfigError(
                    f'{where}: "options.{name}" is {json.dumps(value, default=repr)}, allowed is {rule.allowed}'
                )
        # 3. A-VL's rates. Both are shares of the same vision tokens, so they limit each other.
        rate, compute = self.vision_adaptive_attention_rate, self.vision_adaptive_attention_compute_rate
        if compute < rate:
            raise ConfigError(
                f'{where}: "vision_adaptive_attention_compute_rate" is {compute}, allowed is at least '
                f'"vision_adaptive_attention_rate", which is {rate}: what is evicted cannot be read'
            )
        if self.vision_adaptive_attention and self.prefill_filter_flag and self.prefill_filter_rate > rate:
            raise ConfigError(
                f'{where}: "prefill_filter_rate" is {self.prefill_filter_rate}, allowed beside '
                f'"vision_adaptive_attention" is at most "vision_adaptive_attention_rate", which is {rate}'
            )
        # 4. H2O's shares come in pairs, and they replace the fixed shares of all_use_h2o.
        if (self.h2o_heavy_share is None) != (self.h2o_recent_share is None):
            raise ConfigError(f'{where}: "h2o_heavy_share" and "h2o_recent_share" go together, but only one is set')
        if self.h2o_heavy_share is not None and self.h2o_heavy_share + self.h2o_recent_share > 1:
            raise ConfigError(
                f'{where}: "h2o_heavy_share" + "h2o_recent_share" is '
                f"{self.h2o_heavy_share + self.h2o_recent_share:g}, allowed is at most 1"
            )
        if self.all_use_h2o and self.h2o_heavy_share is not None:
            raise ConfigError(
                f'{where}: "all_use_h2o" is true and "h2o_heavy_share" is {self.h2o_heavy_share}, allowed is one of them: '
                "the first stands for shares of its own"
            )
        # 5. Combinations of keys and options: two settings that contradict each other, or one that needs another.
        if self.prefill_filter_flag and self.method in dropper_names():
            raise ConfigError(
                f'{where}: "prefill_filter_flag" is true, but method "{self.method}" drops tokens inside the LLM itself; '
                "allowed beside the filter are methods before the LLM"
            )
        if self.method == "apet" and self.options.get("second_stage"):
            if self.prefill_filter_flag:
                raise ConfigError(
                    f'{where}: "prefill_filter_flag" and "options.second_stage" are true, but both drop tokens inside the '
                    "LLM; allowed is one of them"
                )
            if self.options.get("compat") == "public":
                raise ConfigError(
                    f'{where}: "options.compat" is "public" beside "options.second_stage", but the second stage does not '
                    "reproduce the public code; allowed is one of them"
                )
        if self._in_public_tiles and self.options.get("anyres", "fastervlm") != "fastervlm":
            raise ConfigError(
                f'{where}: "options.compat" is "public", which implies the tile path "fastervlm", '
                f'but "options.anyres" is "{self.options["anyres"]}"'
            )
        if self.options.get("compat") == "public" and self.options.get("detail_share"):
            raise ConfigError(
                f'{where}: "options.detail_share" is {self.options["detail_share"]}, but "options.compat" is "public", which '
                "keeps what the authors' code keeps; allowed is one of them"
            )
        for name in ("keep", "ratio"):
            if self.options.get("budget") == "mean" and name in self.options:
                raise ConfigError(
                    f'{where}: "options.{name}" states what is kept, so "options.budget" cannot be "mean" beside it'
                )
        if "crops" in self.options and "crop_share" in self.options:
            raise ConfigError(
                f'{where}: "options.crops" and "options.crop_share" both say how many crops are encoded, allowed is one of '
                "them"
            )
        if ("dominant" in self.options) != ("contextual" in self.options):
            raise ConfigError(
                f'{where}: "options.dominant" and "options.contextual" go together, but only one of them is set'
            )
        if self.options.get("relevance") == "clip" and "text_tower" not in self.options:
            raise ConfigError(
                f'{where}: "options.relevance" is "clip", but "options.text_tower" does not name a CLIP checkpoint'
            )

    @classmethod
    def load(cls, path: str | os.PathLike | None = None, **overrides) -> AdaVConfig:
        """Read a configuration file and return it with the keyword arguments in place of the file's values.

        path: a file; None means $ADAV_CONFIG where that is set, else the checkout's adav_configs.json. Without a checkout
            (an installed wheel) the defaults hold.
        Raises ConfigError for a missing file, JSON that cannot be read (with line and column), an unknown key,
        a wrong type or a value out of range.
        """
        path = path or os.environ.get("ADAV_CONFIG") or DEFAULT_FILE
        where = str(path) if path else "the defaults"
        values = read_json_object(Path(path), ConfigError) if path else {}
        _refuse_unknown(values, where)
        _refuse_unknown(overrides, "the overrides")
        changed = " with " + ", ".join(sorted(overrides)) + " overridden" if overrides else ""
        return cls.from_keys(values | overrides, where + changed)

    @classmethod
    def from_keys(cls, values: Mapping[str, object], where: str) -> AdaVConfig:
        """Return the configuration that has `values`, with the default of every other key.

        where: how the message of an error begins. ConfigError for an unknown key and a value that cannot be used.
        """
        _refuse_unknown(values, where)
        # Without __init__: its check would not know `where`, and the message must name it.
        config = object.__new__(cls)
        for f in fields(cls):
            default = f.default_factory() if f.default is MISSING else f.default
            object.__setattr__(config, f.name, values.get(f.name, default))
        config._check(where)
        return config

    def replaced(self, **overrides) -> AdaVConfig:
        """A copy with some keys changed. ConfigError for an unknown key and for a value that cannot be used."""
        _refuse_unknown(overrides, "the overrides")
        return replace(self, **overrides)

    def to_dict(self) -> dict:
        """Keys and values as in the file, with every default filled in."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Ten hex digits that identify the settings. Two configurations that differ have different digests."""
        # Sorted keys: the order of `options` in the file must not change the digest.
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:10]

    def option(self, name: str):
        """The value of an option of the prompt (options.COMMON_OPTIONS), or its default."""
        # compat "public" reproduces published numbers, which were measured with FasterVLM's tiles.
        if name == "anyres" and self._in_public_tiles:
            return "fastervlm"
        return self.options.get(name, COMMON_OPTIONS[name])

    @property
    def detail_share(self) -> float:
        """options.detail_share; 0 under a method that ignores it. This imports torch."""
        ignored = "detail_share" in self.method_class.ignored_options
        return 0.0 if ignored else self.option("detail_share")

    @property
    def _in_public_tiles(self) -> bool:
        """Whether options.compat asks for the tile path of public code."""
        return self.options.get("compat") == "public" and self.method in PUBLIC_TILES

    @property
    def method_class(self) -> type:
        """The class of the selector or dropper that `method` names. This imports torch."""
        return method_class(self.method)

    @property
    def method_options(self) -> dict:
        """The part of `options` that the method takes. A method is a dataclass, and its fields are its options."""
        names = {f.name for f in fields(self.method_class)}
        return {name: value for name, value in self.options.items() if name in names}

    def make_method(self):
        """A selector or dropper with its options. UserError for options that contradict each other."""
        return self.method_class(**self.method_options)

    def make_dropper(self) -> Dropper | None:
        """What drops tokens inside the LLM: the method, its second stage or A-VL's prefill filter; None where nothing does.

        UserError for options that contradict each other.
        """
        from llava.methods.inside_llm.apet_stage import ApETStage
        from llava.methods.inside_llm.prefill_filter import PrefillFilter

        if self.method in dropper_names():
            return self.make_method()
        return PrefillFilter.from_config(self) or ApETStage.from_config(self)

    def make_cache_policy(self) -> CachePolicy:
        """The KV cache policy with its settings. This imports torch."""
        from llava.methods.kv_cache import CACHES

        return CACHES[self.cache_policy].from_config(self)

    def unused_options(self) -> list[str]:
        """Names of options that neither the method nor the image path around it takes. They have no effect."""
        common = set(COMMON_OPTIONS) - set(getattr(self.method_class, "ignored_options", ()))
        return sorted(set(self.options) - common - set(self.method_options))

    def warn_of_unused_options(self) -> None:
        """Warn of each option that has no effect.

        It is a warning and no error, because one file may hold the options of several methods.
        """
        for name in self.unused_options():
            warnings.warn(f'options.{name} is set, but method "{self.method}" does not use it', stacklevel=3)

    def check_method_options(self) -> None:
        """Raise ConfigError if an option of the image path asks for something that the method cannot give."""
        if self.option("positions") == "original" and getattr(self.make_method(), "makes_tokens", False):
            raise ConfigError(
                f'"options.positions" is "original", but method "{self.method}" makes tokens that stood nowhere in the '
                'image; allowed is "reindexed"'
            )
        if self.detail_share and getattr(self.make_method(), "zooms", False):
            raise ConfigError(
                f'"options.detail_share" is {self.detail_share}, but method "{self.method}" leaves crops unencoded, and their '
                "detail is not rated; allowed is 0"
            )

    @property
    def cache_policy(self) -> str:
        """Name of the KV cache policy (a key of llava.methods.kv_cache.CACHES).

        H2O wins where both are switched on: in A-VL's code it is the baseline that replaces A-VL.
        """
        if self.all_use_h2o or self.h2o_heavy_share is not None:
            return "h2o"
        return "avl" if self.vision_adaptive_attention or self.text_pruning_flag else "full"

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def _refuse_unknown(values: Mapping[str, object], where: str) -> None:
    """Raise ConfigError for a key that is no field: a mistyped key would otherwise be ignored silently."""
    known = [f.name for f in fields(AdaVConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f'{where}: unknown key "{key}", allowed are {", ".join(known)}')


def add_config_flags(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add --config and one flag per key of adav_configs.json to a parser. A key without its flag keeps the file's value.

    default: a sentence about the command's own defaults, for the help of --config.
    """
    parser.add_argument(
        "--config", help=f"default: $ADAV_CONFIG, else adav_configs.json of the checkout{default and '; ' + default}"
    )
    _add_key_flags(parser)


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Add --plugin. A named file becomes a method while the command line is read, so that --method may name it."""
    parser.add_argument(
        "--plugin",
        type=register,
        action="append",
        metavar="FILE.py",
        help="a method of your own: one Selector or Dropper, called as the file; may be repeated",
    )


def _add_key_flags(parser: argparse.ArgumentParser) -> None:
    add_plugin_flag(parser)
    group = parser.add_argument_group("keys of adav_configs.json")
    for f in fields(AdaVConfig):
        flag = "--" + f.name.replace("_", "-")
        # Both spellings, --overall-tokens and --overall_tokens. dict.fromkeys removes the duplicate of a one-word key.
        spellings = dict.fromkeys((flag, "--" + f.name))
        group.add_argument(*spellings, dest=f.name, default=None, metavar="VALUE", help=f.metadata["help"])


def config_overrides(args: argparse.Namespace) -> dict:
    """The overrides that were given as flags. A value is read as JSON, or as a string if it is not JSON."""
    overrides = {}
    for f in fields(AdaVConfig):
        text = getattr(args, f.name, None)
        if text is None:
            continue
        try:
            overrides[f.name] = json.loads(text)
        except json.JSONDecodeError:
            overrides[f.name] = text
    return overrides


def config_of_flags(args: argparse.Namespace, tokens: int | None = None, flag: str = "", **overrides) -> AdaVConfig:
    """The configuration file that `args` name, with the overrides of its flags and of the caller.

    tokens: the budget from another argument of the command, whose name is `flag`. UserError where it differs from
    --overall-tokens.
    """
    overrides |= config_overrides(args)
    if tokens is not None:
        if overrides.get("overall_tokens", tokens) != tokens:
            raise UserError(
                f"{flag} is {tokens}, but --overall-tokens is {overrides['overall_tokens']}; give one of them"
            )
        overrides["overall_tokens"] = tokens
    return AdaVConfig.load(args.config, **overrides)


@exits_cleanly
def main() -> None:
    """Print the configuration that the arguments give."""
    parser = argparse.ArgumentParser(prog="python -m llava.config", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="default: $ADAV_CONFIG, else the checkout's adav_configs.json")
    _add_key_flags(parser)
    args = parser.parse_args()
    config = AdaVConfig.load(args.file, **config_overrides(args))
    if config.options:  # these checks import torch, which takes seconds
        config.check_method_options()
        config.warn_of_unused_options()
    print(config)


if __name__ == "__main__":
    main()
