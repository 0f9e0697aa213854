"""A-VL's command line for lmms-eval, as its users write it, run with this code base's model.

    python -m llava.integrations.lmms_eval.command --model llava_hf --tasks docvqa \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,device_map=auto,attn_implementation=eager \
        --vision_adaptive_attention true --vision_adaptive_attention_rate 0.6 ...

A-VL's options become model arguments of `adav_llava` (llava.integrations.lmms_eval.model). All other arguments go to
lmms-eval unchanged. `--model llava_hf` without config= is A-VL alone: every vision token enters the LLM, and an option
that is not given has A-VL's own default. `--model adav_llava` takes the same options on top of the configuration file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.config import AdaVConfig
from llava.methods.plugins import register

# Options that are keys of adav_configs.json under the same name, with their defaults in A-VL's command line
# (github.com/2147483647-2/A-VL, lmms_eval/__main__.py). Some differ from the defaults of adav_configs.json.
SAME = {
    "vision_adaptive_attention": False,
    "vision_adaptive_attention_rate": 0.5,
    "vision_adaptive_attention_compute_rate": 0.6,
    "vision_adaptive_attention_update_interval": -1,
    "text_pruning_flag": False,
    "text_pruning_rate": 0.5,
    "text_init_cache": 20,
    "prefill_filter_flag": False,
    "prefill_filter_layer": 3,
    "prefill_filter_rate": 0.5,
    "all_use_h2o": False,
}
# Options whose keys have another name here: together they set text_rule and text_heavy_share. `h20` is A-VL's spelling.
RENAMED = ("text_use_h2o", "compare_text_direct_pruning", "text_h20_hh_rate_in_cache")
_NEITHER = "does nothing, here as in A-VL"
# Options without effect in A-VL's own code, with the reason. They are accepted, so that published command lines run.
DEAD = {
    "text_pruning_interval": f"{_NEITHER}: the text cache is looked at in every step",
    "h2o_hh_size": f"{_NEITHER}: all_use_h2o keeps 12.5 % heavy hitters; h2o_heavy_share= in model_args sets a share",
    "h2o_recent_size": f"{_NEITHER}: all_use_h2o keeps 37.5 % recent entries; h2o_recent_share= in model_args sets a share",
    "auto_half_h2o": f"{_NEITHER}, which never reads it",
    "weaken_factor": f"{_NEITHER}, which never reads it",
    "use_customized_cuda": f"{_NEITHER}, which never reads it and whose operator is not public",
}
MODELS = ("llava_hf", "adav_llava")


def split_model_args(text: str) -> list[str]:
    """The parts of model arguments such as `a=1,b={"c": 2, "d": 3}`, split at commas.

    A comma inside braces, brackets or quotes does not split: JSON values are allowed.
    """
    parts, depth, quote, begin = [], 0, None, 0
    for i, character in enumerate(text):
        if quote:
            quote = None if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise UserError(f'--{name} is "{text}", allowed are true and false')
    return text.lower() == "true"


def _parser() -> Parser:
    """The parser of A-VL's options. Values stay text: A-VL's types and messages are applied in `translate`."""
    parser = Parser(prog="python -m llava.integrations.lmms_eval.command", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llava_hf", help=" or ".join(MODELS))
    parser.add_argument("--model_args", default="", help="as lmms-eval takes them, and any key of adav_configs.json")
    parser.add_argument("--tasks", help="as lmms-eval takes them")
    group = parser.add_argument_group("A-VL's options")
    for name in (*SAME, *RENAMED, *DEAD):
        group.add_argument(f"--{name}", metavar="VALUE")
    return parser


def _instead(args) -> str:
    """Return a sentence about the model name to type in place of an unknown one."""
    if args.model.lower().startswith("llava"):
        rest = f" --model_args {args.model_args}" if args.model_args else ""
        return f"type --model adav_llava{rest} for a LLaVA checkpoint of either format"
    return "python -m lmms_eval runs any other model"


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """Translate A-VL's command line.

    Returns the arguments for lmms-eval, and notes on each option that has another name or no effect here.
    Raises UserError for a value that the configuration does not allow.
    """
    # 1. Split the arguments: A-VL's options, model arguments, and the rest, which is lmms-eval's.
    args, rest = _parser().parse_known_args(argv)
    unknown = [name for name in rest if name.startswith("--merge_")]
    if args.model not in MODELS:
        raise UserError(f'--model is "{args.model}", allowed are {" and ".join(MODELS)}; {_instead(args)}')
    model_args = split_model_args(args.model_args)
    given = dict(part.split("=", 1) for part in model_args if "=" in part)
    # 2. Without a configuration file, A-VL's own defaults are the starting point.
    keys, notes, defaults = {}, [], {}
    if args.model == "llava_hf" and "config" not in given:
        defaults = {"method": "none", **SAME}
        notes.append(
            "--model llava_hf is A-VL alone here: all vision tokens enter the LLM (method=none), and options that are "
            "not given have A-VL's defaults; config=FILE in model_args takes a configuration file instead"
        )
    # 3. Options that are on the command line: keys of the same name, and options without effect.
    written = {name: value for name in (*SAME, *RENAMED, *DEAD) if (value := getattr(args, name)) is not None}
    for name, text in written.items():
        if name in SAME:
            keys[name] = _value(name, text, SAME[name])
        elif name in DEAD:
            notes.append(f"--{name} {text} {DEAD[name]}")
    # 4. Options whose keys have another name.
    heavy = written.get("text_h20_hh_rate_in_cache")
    if heavy is not None:
        keys["text_heavy_share"] = _value("text_h20_hh_rate_in_cache", heavy, 0.7)
        notes.append(f"--text_h20_hh_rate_in_cache {heavy} is text_heavy_share={heavy} here")
    if "text_use_h2o" in written or "compare_text_direct_pruning" in written:
        # A-VL's default is H2O, so that --compare_text_direct_pruning false alone means "h2o".
        h2o = _boolean("text_use_h2o", written.get("text_use_h2o", "true"))
        direct = _boolean("compare_text_direct_pruning", written.get("compare_text_direct_pruning", "false"))
        if direct and h2o and "text_use_h2o" in written:
            raise UserError(
                "--text_use_h2o and --compare_text_direct_pruning are both true, allowed is one: each is a rule"
            )
        keys["text_rule"] = "direct" if direct else "h2o" if h2o else "history"
        names = " and ".join(f"--{name}" for name in RENAMED[:2] if name in written)
        notes.append(f"{names}: text_rule={keys['text_rule']} here")
    for name in unknown:
        notes.append(f"{name} {_NEITHER}, which never reads it")
    # 5. A model argument replaces a default of A-VL. Beside a written option of the same key it is an error.
    clash = sorted(set(given) & set(keys))
    if clash:
        raise UserError(f"{clash[0]} is set by an option and in --model_args as well; give one of them")
    keys = {name: value for name, value in (defaults | keys).items() if name not in given}
    # 6. Check the configuration here: lmms-eval needs long to start, and a mistake would show only after that.
    if "plugin" in given:
        register(given["plugin"])
    from_text = {name: _json(value) for name, value in given.items() if name in AdaVConfig.__dataclass_fields__}
    AdaVConfig.load(given.get("config"), **{**keys, **from_text})
    model_args += [f"{name}={_text(value)}" for name, value in keys.items()]
    command = ["--model", "adav_llava", "--model_args", ",".join(model_args)]
    command += ["--tasks", args.tasks] if args.tasks else []
    return command + _without(rest, "--merge_"), notes


def _without(rest: list[str], prefix: str) -> list[str]:
    """The arguments `rest` without options that begin with `prefix`, and without their values."""
    kept, skip = [], False
    for word in rest:
        if word.startswith(prefix):
            skip = "=" not in word
        elif skip and not word.startswith("--"):
            skip = False
        else:
            skip = False
            kept.append(word)
    return kept


def _json(text: str):
    """A model argument as JSON, else as text. lmms-eval also takes True and False, which are no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return {"true": True, "false": False}.get(text.lower(), text)


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _value(name: str, text: str, default):
    """The value of an option in the type of its default. UserError for text of another type."""
    if isinstance(default, bool):
        return _boolean(name, text)
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f'--{name} is "{text}", allowed is {kind}') from None


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Translate the command line and replace this process by lmms-eval."""
    command, notes = translate(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError("lmms_eval is not installed; make lmms-eval installs it and what it needs")
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    # exec, and no child process: signals and the exit code then are those of lmms-eval.
    os.execv(sys.executable, [sys.executable, "-m", "lmms_eval", *command])


if __name__ == "__main__":
    main()
