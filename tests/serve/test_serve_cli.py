"""The terminal chat, as a process: piped, and on a pseudo-terminal with Ctrl-C and Ctrl-D."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from serve_cases import coloured_pictures, ended_by

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.serve.service.cost_text import cost_line
from llava.serve.service.reply import Answered
from llava.serve.terminal.chat import COMMANDS, Chat, Leave
from llava.serve.terminal.lines import Lines, broken

pytestmark = pytest.mark.usefixtures("warm")
REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = str(REPOSITORY / "playground" / "llava-shapes-v1.5")
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
PATIENCE = 120  # seconds after which a process counts as stuck
COST = re.compile(r"^\d+ of 144 vision tokens \| first token .* \| KV cache [\d.]+ kB$", re.M)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return coloured_pictures("v1.5", tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """Never says its end token: its answers are as long as they may be."""
    return ended_by(tmp_path_factory.mktemp("models") / "talkative", "<pad>")


@pytest.fixture(scope="module")
def silent(tmp_path_factory, pictures):
    """Ends with what it would answer about the first picture: its answer there is empty."""
    return ended_by(tmp_path_factory.mktemp("models") / "silent", pictures[0][2])


def command(*flags) -> list[str]:
    return [sys.executable, "-m", "llava.serve.cli", *flags]


def piped(text, *flags):
    """(exit code, stdout, stderr) of the chat with `text` as its input."""
    words = command("--model-path", MODEL, "--method", "none", "--max-new-tokens", "2", *flags)
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run(words, input=data, capture_output=True, cwd=REPOSITORY, env=ENVIRONMENT, timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def session(pictures):
    """A chat through a pipe in which nothing goes wrong."""
    (path, question, _), (other, other_question, _) = pictures
    lines = [f"/image {path}", question, "", question, "/history", "/reset"]
    lines += [f"/image '{other}'", other_question, "/reset"]
    lines += [f"/image {path}", "/method adav 14", question, "/reset", f"/image {path}", "/tokens 30", question]
    return piped("\n".join(lines).encode() + b"\n\xff\xfe\x00?")  # the last is no text, and has no end of line


def test_piped_answers_alone_go_to_stdout(session, pictures):
    code, out, err = session
    assert code == 0
    assert out.count("\n") == 6 and out.endswith("\n")
    answers = out.split("\n")
    assert (answers[0], answers[2]) == (pictures[0][2], pictures[1][2])
    assert len(COST.findall(err)) == 6
    assert "> " not in out + err and "Traceback" not in err  # no prompt


def test_settings_change_what_is_kept(session):
    kept = [line.split(" of 144")[0] for line in session[2].splitlines() if COST.match(line)]
    assert kept == ["144", "144", "144", "14", "30", "30"]


def test_a_chat_reads_all_of_its_turns(session, pictures):
    """A second question about the same picture: the picture is still there, and the prompt is longer."""
    err, (path, question, answer) = session[2], pictures[0]
    live = [float(re.search(r"([\d.]+) kB", line)[1]) for line in err.splitlines() if COST.match(line)]
    assert live[1] > live[0]
    assert f"you: [{path.name}] {question}\nmodel: {answer}\nyou: {question}\n" in err
    assert live[2] == live[0]  # after /reset: one picture, one question


def test_bad_lines_are_one_sentence_each_and_the_chat_goes_on(pictures, tmp_path):
    path, question, answer = pictures[0]
    (tmp_path / "text.png").write_text("no picture")
    lines = ["/nonsense", "/image", f"/image {tmp_path}/none.png", f"/image {tmp_path}/text.png", "/method adaf"]
    lines += ["/tokens many", "/tokens 0", "/config overall_token 3", "/config vision_adaptive_attention_rate 2"]
    lines += ["/reset now", "what <image> is this?"]
    code, out, err = piped("\n".join([*lines, f"/image {path}", question]) + "\n")
    assert code == 2
    assert out.strip().split("\n")[-1] == answer
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == len(lines), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--model-path", "playground/no-such-model"),
        ("--method", "adaf"),
        ("--temperature", "-1"),
        ("--image", "no-such-picture.png"),
        ("--nonsense",),
    ],
)
def test_a_bad_start_is_one_sentence_and_exit_code_2(flags):
    done = subprocess.run(
        command("--model-path", MODEL, *flags),
        input=b"hello\n",
        capture_output=True,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: ") and done.stderr.count(b"\n") == 1
    assert done.stdout == b""


def test_a_bad_start_names_what_was_given_and_no_default_of_the_demo():
    done = subprocess.run(command("--method", "adaf"), capture_output=True, cwd=REPOSITORY, timeout=PATIENCE)
    assert done.returncode == 2 and b" with method overridden: " in done.stderr


def test_an_empty_answer_is_told(pictures, silent):
    path, question, _ = pictures[0]
    code, out, err = piped(f"{question}\n/history\n", "--model-path", str(silent), "--image", str(path))
    assert (code, out) == (0, "\n")
    assert "(an empty answer; " in err and f"with the next question: {path.name}" in err and "you: " not in err


def test_json_has_one_object_for_each_question(pictures, cold):
    (path, question, answer), (other, other_question, other_answer) = pictures
    lines = [f"/image {path}", question, "what <image> is this?", "/reset", f"/image {other}", other_question]
    code, out, err = piped("\n".join(lines), "--json")
    first, refused, second = map(json.loads, out.splitlines())
    assert (first["question"], first["answer"]) == (question, answer) and second["answer"] == other_answer
    assert first["vision_tokens"] == {"kept": 144, "of": 144} and first["method"] == "none" and first["finish"]
    assert first["seconds"]["first_token"] > 0 and first["kv_bytes"]["live"] > 0
    assert code == 2 and refused == {"question": lines[2], "error": err.split("error: ")[1].split("\n")[0]}


class OnTerminal:
    """The chat on a pseudo-terminal."""

    def __init__(self, *flags):
        self.process, self.screen = None, ""
        self.master, slave = pty.openpty()
        environment = ENVIRONMENT | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command(*flags), stdin=slave, stdout=slave, stderr=slave, cwd=REPOSITORY, env=environment,
            preexec_fn=self._take_terminal,
        )  # fmt: skip
        os.close(slave)

    @staticmethod
    def _take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background of a shell ignore it, and hand that on

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt_prompt(self, done):
        """Ctrl-C at the prompt until `done()`: Python's readline overlooks a signal that comes just before its select(),
        until the next one."""
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, f"no Ctrl-C was heard; the screen:\n{self.screen}"
            with suppress(OSError):  # it has ended
                self.type("\x03")
            heard = time.monotonic() + 5
            while not done() and time.monotonic() < heard and self._read(0.2):
                pass

    def wait_for(self, pattern, start=0):
        """Read until the pattern is on the screen behind position `start`; returns the position behind it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = re.compile(pattern, re.M).search(self.screen, start)
            if found:
                return found.end()
            if not self._read(1):
                break
        raise AssertionError(f"{pattern!r} never came; the screen:\n{self.screen[start:]}")

    def _read(self, seconds):
        """What comes within some seconds; False once the other side is closed."""
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.screen += os.read(self.master, 4096).decode(errors="replace").replace("\r", "")
            except OSError:
                return False
        return True

    def code(self):
        """The exit code, once everything has been said."""
        code = self.process.wait(PATIENCE)
        while select.select([self.master], [], [], 0)[0] and self._read(0):
            pass
        return code

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_on_a_terminal(pictures):
    path, question, answer = pictures[0]
    with OnTerminal("--model-path", MODEL, "--method", "none", "--max-new-tokens", "2") as chat:
        at = chat.wait_for(r"^> ")
        assert "Loading weights" not in chat.screen
        assert "demo checkpoint" in chat.screen and "cannot answer questions about photographs" in " ".join(
            chat.screen.split()
        )
        chat.type("/help\n")
        at = chat.wait_for(r"^> ", at)
        assert all(name in chat.screen for name in COMMANDS)
        chat.type(f"/image {path}\n")
        at = chat.wait_for(r"96 x 96 pixels, with the next question\n> ", at)
        chat.type(f"{question}\n")
        at = chat.wait_for(rf"^{answer}\n\d+ of 144 vision tokens.*\n> ", at)
        chat.type("\x1b[A\n")  # arrow up: readline's history
        at = chat.wait_for(r"vision tokens.*\n> ", at)
        chat.type("/history\n")
        at = chat.wait_for(rf"^you: {re.escape(question)}$", at)
        chat.wait_for(r"^> ", at)
        chat.type("\x04")
        assert chat.code() == 0


def test_ctrl_c_ends_an_answer_and_twice_the_chat(pictures, talkative):
    path, question, _ = pictures[0]
    with OnTerminal("--model-path", str(talkative), "--max-new-tokens", "1500", "--image", str(path)) as chat:
        at = chat.wait_for(r"^> ")
        chat.type(f"{question}\n")
        at = chat.wait_for(r"^\w+", chat.wait_for(re.escape(question), at))  # the first word; 1,499 tokens to go
        chat.type("\x03")
        at = chat.wait_for(r"stopped.*\n> ", at)
        chat.type("/history\n")  # the question was not asked, and the picture waits for the next one
        at = chat.wait_for(r"^with the next question: scene \d+.png\n> ", at)
        chat.type("half a line")
        at = chat.wait_for("half a line", at)
        chat.interrupt_prompt(lambda: re.search(r"once more.*\n> ", chat.screen[at:]))
        chat.interrupt_prompt(lambda: chat.process.poll() is not None)
        assert chat.code() == 130
        assert "Traceback" not in chat.screen


def test_an_interrupt_while_it_loads_is_no_traceback(cold):
    with OnTerminal("--model-path", MODEL) as chat:
        chat.wait_for("loading")
        os.killpg(chat.process.pid, signal.SIGINT)
        assert (chat.code(), chat.screen.split("...")[-1].strip()) == (130, "")


# --- what is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, lines",
    [
        ("The red circle is left of a square.", ["The red", "circle is", "left of a", "square."]),
        ("exactly twelve", ["exactly", "twelve"]),
        ("twelve chars", ["twelve chars"]),
        ("one\n\n  two three four", ["one", "", "  two three", "four"]),
        ("Donaudampfschifffahrt ahoy", ["Donaudampfsc", "hifffahrt", "ahoy"]),  # a word longer than a line
        ("红色的圆在左边 ok", ["红色的圆在左", "边 ok"]),  # two columns each, and no spaces
        ("café cafe\u0301 noir", ["café cafe\u0301", "noir"]),
        ("ends with a blank ", ["ends with a", "blank "]),
    ],
)
def test_words_are_not_broken(text, lines):
    assert broken(text, 12).split("\n") == lines
    for size in (1, 2, 5):  # in pieces, as tokens come
        written = []
        pieces = Lines(written.append, 12)
        for at in range(0, len(text), size):
            pieces.add(text[at : at + size])
        pieces.end()
        assert "".join(written).split("\n") == lines
    assert broken(text, 0) == text


def test_a_rate_that_there_is_not_is_not_shown():
    answered = Answered(
        "", "stop", new_tokens=1, vision_tokens=(9, 144), seconds={"first_token": 0.0714}, kv_bytes=(156_000, 0)
    )
    assert cost_line(answered) == "9 of 144 vision tokens | first token 71 ms | KV cache 156 kB"


# --- the commands themselves ----------------------------------------------------------------------------------------


def make_chat():
    return Chat(AdaVConfig(), lambda path: Image.open(path).convert("RGB"))


def test_every_command_is_there_and_explained():
    chat = make_chat()
    assert [line.split()[0] for line in chat.command("/help").splitlines()] == list(COMMANDS)
    with pytest.raises(Leave):
        chat.command("/quit")


def test_a_refused_change_changes_nothing():
    chat = make_chat()
    for line in (
        "/tokens 0",
        "/tokens x",
        "/method none 0",
        "/config text_rule nothing",
        "/config options 3",
        "/image x",
    ):
        before = chat.config, list(chat.turns), list(chat.pictures)
        with pytest.raises((UserError, OSError)):
            chat.command(line)
        assert (chat.config, chat.turns, chat.pictures) == before


def test_changes_are_those_of_the_configuration_file():
    chat = make_chat()
    chat.command("/method fastervlm 20")
    chat.command("/config vision_adaptive_attention true")
    chat.command('/config options {"positions": "original"}')
    chat.command("/config text_rule direct")
    expected = AdaVConfig(
        method="fastervlm", overall_tokens=20, vision_adaptive_attention=True, text_rule="direct",
        options={"positions": "original"},
    )  # fmt: skip
    assert chat.config == expected


@pytest.mark.parametrize("written", ["{}", "'{}'", '"{}"'])
def test_paths_with_spaces(written, tmp_path):
    path = tmp_path / "a picture.png"
    Image.new("RGB", (3, 4)).save(path)
    for text in (written.format(path), str(path).replace(" ", "\\ ")):
        chat = make_chat()
        chat.command(f"/image {text}")
        assert chat.pictures[0].size == (3, 4)


def test_an_answer_joins_the_conversation_only_when_it_is_said(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (3, 4)).save(path)
    chat = make_chat()
    chat.command(f"/image {path}")
    first = chat.request("one?", None)
    assert chat.request("one again?", None).turns[0].images == first.turns[0].images  # the first was never answered
    assert chat.answered("yes")
    third = chat.request("two?", None)
    assert [(turn.role, turn.text, len(turn.images)) for turn in third.turns] == [
        ("user", "one again?", 1), ("assistant", "yes", 0), ("user", "two?", 0)
    ]  # fmt: skip
    assert not chat.answered("  ")  # nothing was said
    assert len(chat.turns) == 2
    chat.command("/reset")
    assert chat.request("three?", None).turns == (third.turns[-1].__class__("user", "three?"),)
