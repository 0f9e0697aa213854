"""Chat with a checkpoint in the terminal, about pictures by path.

    python -m llava.serve.cli [--model-path M] [--image cat.png] [flags of adav_configs.json]
    printf '/image cat.png\\nWhat is on the mat?\\n' | python -m llava.serve.cli --json > answers.jsonl

Without --model-path it loads the demo checkpoint. /help lists the commands. Ctrl-C ends a running answer. Ctrl-C twice,
or Ctrl-D, leaves the program. Answers go to stdout, all other text goes to stderr. If stdin is no terminal, there is no
prompt, every line is a question or a command, and the exit code is 2 if one of them failed. With --json, each question gets
one JSON object on its own line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.common.threads import wait_passively
from llava.methods.index import method_names
from llava.serve.service.cost_text import cost_line, measured
from llava.serve.service.image_input import ImageLimits, picture_from_file
from llava.serve.service.reply import Failed
from llava.serve.service.start import add_model_flags, checkpoint_of, configuration, limits_of, load, sampling
from llava.serve.terminal.chat import COMMANDS, Chat, Leave
from llava.serve.terminal.lines import Lines, broken, width_of

PROMPT = "> "


class Terminal:
    """A chat with one service on stdin, stdout and stderr. as_json: each answer is a JSON object on its own line."""

    def __init__(self, service, chat: Chat, sampling, as_json: bool = False):
        self.service, self.chat, self.sampling, self.as_json = service, chat, sampling, as_json
        self.interactive = sys.stdin.isatty()
        self.failures = 0  # lines that ended with an error
        self._interrupted = False  # the last input was Ctrl-C

    def run(self) -> int:
        """Read lines until the end of the input, /quit or a second Ctrl-C. Returns the exit code."""
        while True:
            try:
                line = self._read()
                self._interrupted = False
                if line is not None and line.strip():
                    self.take(line.strip())
            except KeyboardInterrupt:
                if self._interrupted or not self.interactive:
                    say("")
                    return 130
                self._interrupted = True
                say("\n(Ctrl-C once more leaves, as do Ctrl-D and /quit)")
            except (EOFError, Leave):
                break
        return 2 if self.failures and not self.interactive else 0

    def take(self, line: str) -> None:
        """Carry out one line: a command or a question. An error is printed and counted."""
        try:
            if line.startswith("/"):
                say(self.chat.command(line))
            else:
                self._answer(line)
        except (UserError, Failed) as error:
            self.failures += 1
            say(f"error: {error}")
            if self.as_json and not line.startswith("/"):
                print(json.dumps({"question": line, "error": str(error)}), flush=True)

    def _answer(self, text: str) -> None:
        """Ask a question, print the answer while it is generated, then its cost. Ctrl-C ends the answer."""
        reply = self.service.submit(self.chat.request(text, self.sampling))
        try:
            try:
                if self.as_json:
                    reply.result()
                else:
                    _stream(reply)
            except KeyboardInterrupt:
                reply.cancel()
            # The row ends at the next decode step. Without this wait, its last text could come after the next prompt.
            answered = reply.result()
        finally:
            if not self.as_json:
                print(flush=True)
        if self.as_json:
            said = {"question": text, "answer": answered.text.strip(), "finish": answered.finish}
            print(json.dumps(said | measured(answered, self.chat.config)), flush=True)
        if answered.finish == "cancelled":
            say("(stopped; the question is as if it had not been asked)")
            self._interrupted = True
            return
        say(cost_line(answered))
        if answered.finish == "length":
            say(f"(ended by --max-new-tokens {answered.new_tokens})")
        if not self.chat.answered(answered.text):
            say("(an empty answer; the question is as if it had not been asked)")

    def _read(self) -> str:
        """The next line of stdin. EOFError at the end of the input."""
        # input() offers line editing, but it prints its prompt to stdout, where only answers belong.
        if self.interactive and sys.stdout.isatty():
            return input(PROMPT)
        if self.interactive:
            say(PROMPT, end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line


def _stream(reply) -> None:
    """Print the words of an answer as they come, without the space before the first one."""
    lines, begun = Lines(partial(print, end="", flush=True), width_of(sys.stdout)), False
    try:
        for piece in reply:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            lines.add(piece)
    finally:
        lines.end()


def say(text: str, end: str = "\n") -> None:
    print(broken(text, width_of(sys.stderr)), end=end, file=sys.stderr, flush=True)


def _complete(text: str, nth: int) -> str | None:
    """The nth completion of `text` for readline: commands, methods after /method, files after /image."""
    import readline

    line = readline.get_line_buffer()
    if " " not in line:
        found = [name for name in COMMANDS if name.startswith(text)]
    elif line.startswith("/method "):
        found = [name for name in method_names() if name.startswith(text)]
    elif line.startswith("/image "):
        found = sorted(_paths(text))
    else:
        found = []
    return found[nth] if nth < len(found) else None


def _paths(text: str) -> Iterator[str]:
    """Paths that begin with `text`; folders end in "/". A folder that cannot be read has none."""
    folder, name = os.path.split(text)
    with suppress(OSError):
        for path in Path(folder or ".").expanduser().iterdir():
            if path.name.startswith(name):
                yield os.path.join(folder, path.name) + ("/" if path.is_dir() else "")


def _edit_lines() -> None:
    """Switch on line editing, history and completion. Some builds of Python have no readline."""
    with suppress(ImportError):
        import readline

        readline.set_completer_delims(" ")
        readline.set_completer(_complete)
        readline.parse_and_bind("tab: complete")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint and chat until the input ends; exits with the code of the chat."""
    # 1. Arguments and images. Their errors come before the checkpoint is loaded.
    parser = Parser(prog="python -m llava.serve.cli", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument(
        "--image", action="append", default=[], help="a picture for the first question; again for several"
    )
    parser.add_argument("--json", action="store_true", help="answers as JSON objects with their costs, one a line")
    args = parser.parse_args(argv)
    wait_passively()
    sys.stdin.reconfigure(errors="replace")
    try:
        config, decoding, checkpoint = configuration(args), sampling(args), checkpoint_of(args)
        chat = Chat(config, lambda path: picture_from_file(path, ImageLimits()))
        for path in args.image:
            chat.command(f"/image {path}")
        if sys.stdin.isatty():
            _edit_lines()
            say(f"loading {checkpoint.short_name} ...")
        with load(checkpoint, args, config) as service:
            if sys.stdin.isatty():
                say(limits_of(service.model.tokenizer))
                say(
                    f"{checkpoint.short_name}, {chat.command('/method')}\n/image PATH shows a picture, /help lists the commands"
                )
            code = Terminal(service, chat, decoding, args.json).run()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the program that reads the answers has closed its end, as `head` does
        # Python flushes stdout at exit, which would raise again and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
