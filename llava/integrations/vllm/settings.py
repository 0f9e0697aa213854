"""Settings of a server and of a request: an AdaVConfig that vLLM can run, or one sentence that says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.methods.inside_llm import dropper_names
from llava.methods.options import iswhole

KEY = "adav"  # in mm_processor_kwargs
STORE_BYTES = 256 << 20  # 200 tiles of CLIP ViT-L/14 at 336 pixels in half precision
#: Options whose value is a path or a hub name. A client must not make a server open files.
_PATHS = ("text_tower", "table")


def server_keys(given: object, refuse: Callable[[AdaVConfig], None] | None = None) -> dict[str, object]:
    """Return the keys that a server sets; {} where it sets none.

    given: an object of keys, the path of a configuration file, or None. refuse: the check of the model's family; None is
    `check`. UserError for anything that cannot be used.
    """
    where = f'--mm-processor-kwargs: "{KEY}"'
    if isinstance(given, str):
        keys = AdaVConfig.load(given).to_dict()
    elif isinstance(given, Mapping):
        keys = dict(given)
    elif given is None:
        return {}
    else:
        raise UserError(f"{where} is {given!r}, allowed is an object of keys or the path of a configuration file")
    (refuse or check)(AdaVConfig.from_keys(keys, where))
    return keys


def of_request(
    given: object, server: Mapping[str, object], refuse: Callable[[AdaVConfig], None] | None = None
) -> AdaVConfig:
    """Return the settings of a request. Its keys replace those of the server, key by key.

    given: the object that the request carries; server: as `server_keys` returns it; refuse: as in `server_keys`.
    UserError for anything else.
    """
    where = f'mm_processor_kwargs: "{KEY}"'
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {given!r}, allowed in a request is an object of keys")
    options = given.get("options")
    for name in _PATHS:
        if isinstance(options, Mapping) and name in options:
            raise UserError(f'{where} has "options.{name}", which is allowed on the server\'s command line alone')
    config = AdaVConfig.from_keys({**server, **given}, where)
    (refuse or check)(config)
    # A server's file may hold the options of several methods. In a request, such an option is a mistake.
    unused = [name for name in config.unused_options() if name in (options or ())]
    if unused:
        raise UserError(f'{where}: "options.{unused[0]}" is set, but method "{config.method}" does not use it')
    return config


def store_bytes(additional_config: object) -> int:
    """Return the size of the store of tower outputs. UserError for a value that is no size.

    additional_config: vLLM's --additional-config, of which {"adav": {"tower_bytes": N}} is ours.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping) or given.keys() - {"tower_bytes"}:
        raise UserError(f'--additional-config: "{KEY}" is {given!r}, allowed is an object with the key tower_bytes')
    size = given.get("tower_bytes", STORE_BYTES)
    if not iswhole(size) or size < 0:
        raise UserError(
            f'--additional-config: "{KEY}.tower_bytes" is {size!r}, allowed is a whole number of at least 0'
        )
    return size


def check_engine(config: AdaVConfig) -> None:
    """Raise UserError for settings that vLLM cannot run with any model."""
    if config.method == "no_image":
        raise UserError(
            'method "no_image" keeps no token, but vLLM needs one per image; leave the image out of the prompt'
        )
    if config.make_dropper() is not None:
        beside = '"prefill_filter_flag"' if config.prefill_filter_flag else '"options.second_stage"'
        setting = f'method "{config.method}"' if config.method in dropper_names() else beside
        raise UserError(
            f"{setting} drops tokens inside the LLM, but in vLLM all layers have one KV length; allowed are methods before the "
            "LLM"
        )
    for key in ("vision_adaptive_attention", "text_pruning_flag", "all_use_h2o"):
        if getattr(config, key):
            raise UserError(
                f'"{key}" is true, but in vLLM the KV cache of all layers and heads is one; allowed is false'
            )
    if config.h2o_heavy_share is not None:
        raise UserError('"h2o_heavy_share" is set, but vLLM evicts nothing from the KV cache; allowed is null')


def check(config: AdaVConfig) -> None:
    """Raise UserError for settings that vLLM cannot run with a LLaVA, or that no method can."""
    check_engine(config)
    if config.option("positions") != "reindexed":
        raise UserError(
            '"options.positions" is "original", but vLLM counts positions of a prompt one by one; allowed is "reindexed"'
        )
    if config.detail_share:
        raise UserError(
            f'"options.detail_share" is {config.detail_share}, but the plugin for vLLM does not rate the pixels of patches; '
            "allowed is 0"
        )
