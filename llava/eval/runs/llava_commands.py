"""LLaVA's answer commands, as its users type them: a question file in, an answers file out, by the one worker.

    python -m llava.eval.model_vqa_loader --model-path M --question-file Q.jsonl --image-folder DIR
        --answers-file A.jsonl [--num-chunks N --chunk-idx I] [--conv-mode C] [--visual-token-num K] [--temperature 0]
        [flags]

The other commands are model_vqa, model_vqa_science and model_vqa_mmbench. They differ in the question file that they
read. A.jsonl is written when all questions are answered. It has one row per question, in the order of the questions:
{question_id, prompt, text, answer_id, model_id, metadata}. Until then the answers are in A.jsonl.run/, and the same
command continues from there. A command with other settings refuses to overwrite A.jsonl. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from llava.common.command_line import Parser, add_checkpoint_flags, existing_file, existing_folder, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import as_user_error_on_write, digest_of, read_json, write_atomically
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.config import AdaVConfig, add_config_flags, config_of_flags
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_conversation
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.mmbench import LETTERS, MMBench, question
from llava.eval.benchmarks.mmbench_cn import MMBenchCN
from llava.eval.benchmarks.questions import Sample, make_samples
from llava.eval.benchmarks.sqa import ScienceQA
from llava.eval.runs.evaluate import evaluate_or_exit
from llava.eval.runs.run import BATCH_SIZE_HELP, Run
from llava.eval.runs.shard_answers import merge
from llava.eval.runs.work_order import Generation
from llava.eval.runs.worker_processes import device_groups


def chunk(samples: list, chunks: int, index: int) -> list:
    """Return chunk `index` of `chunks`, divided as LLaVA's get_chunk does: ceil(n / chunks) samples in each.

    The last chunks may be shorter or empty.
    """
    size = -(-len(samples) // chunks)
    return samples[index * size : (index + 1) * size]


class QuestionFile(Benchmark):
    """A chunk of a question file in LLaVA's format. Its answers are written, not scored."""

    name = "questions"

    def __init__(self, args: argparse.Namespace, checkpoint: EvalCheckpoint):
        super().__init__(args.question_file.parent, checkpoint)
        self.args = args

    @property
    def question_file(self) -> Path:
        return self.args.question_file

    @property
    def image_folder(self) -> Path:
        return self.args.image_folder

    def annotation_files(self) -> list[Path]:
        return []

    def annotations(self) -> None:
        """Whoever scores the file brings the labels."""

    def read(self) -> list[Sample]:
        return chunk(super().read(), self.args.num_chunks, self.args.chunk_idx)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return {}

    def row(self, sample: Sample, row: dict) -> dict:
        """Return a row of merge.jsonl in the format of LLaVA's command."""
        return {**row, "prompt": sample.text}


class ScienceFile(QuestionFile, ScienceQA):
    """ScienceQA's list of conversations. With --single-pred-prompt, the prompt asks for the letter of the option."""

    def prompt(self, row: dict) -> str:
        return super().prompt(row) if self.args.single_pred_prompt else row["text"]

    def row(self, sample: Sample, row: dict) -> dict:
        """Return a row of merge.jsonl in the format of LLaVA's command."""
        # The placeholder must be in the prompt: LLaVA's eval_science_qa finds the questions with an image by it.
        return {**row, "prompt": (DEFAULT_IMAGE_TOKEN + "\n" if sample.image else "") + sample.prompt}


class MMBenchFile(QuestionFile, MMBench):
    """MMBench's table, which contains the images.

    With --single-pred-prompt, the prompt asks for the letter of the option, in the language --lang.
    """

    @property
    def folder(self) -> Path:
        return self.question_file.parent

    @property
    def image_folder(self) -> Path:
        return self.folder / "images"

    def read(self) -> list[Sample]:
        """With --all-rounds each question once per option, its options rotated by one place each time."""
        samples = super().read()
        if not self.args.all_rounds or not samples:
            return samples
        rounds = [rotated(sample.row, turn) for sample in samples for turn in range(len(letters_of(sample.row)))]
        return make_samples(list(enumerate(rounds, 1)), self.question_file, self.prompt, unit="round")

    def prompt(self, row: dict) -> str:
        instruction = {"en": MMBench, "cn": MMBenchCN}[self.args.lang].instruction
        return row["text"] + (instruction if self.args.single_pred_prompt else "")

    def row(self, sample: Sample, row: dict) -> dict:
        letters, turn = letters_of(sample.row), sample.row.get("round_id", 0)
        options = [sample.row[letter] for letter in letters]
        told = {"round_id": turn, "options": options, "option_char": letters[turn:] + letters[:turn]}
        return {**super().row(sample, row), **told}


def letters_of(row: dict) -> list[str]:
    """The letters of a question's options, up to the first that is missing."""
    return list(takewhile(row.__contains__, LETTERS))


def rotated(row: dict, turn: int) -> dict:
    """A question of MMBench with its options moved `turn` places to the front."""
    letters = letters_of(row)
    options = [row[letter] for letter in letters]
    row = {**row, **dict(zip(letters, options[turn:] + options[:turn], strict=True)), "round_id": turn}
    return {**row, "text": question(row)}


@dataclass(frozen=True)
class Command:
    """One of LLaVA's answer commands. reads: the format of its question file."""

    reads: type[QuestionFile]
    max_new_tokens: int


# The defaults of --max_new_tokens are those of LLaVA's scripts.
COMMANDS = {
    "model_vqa_loader": Command(QuestionFile, 128),
    "model_vqa": Command(QuestionFile, 1024),
    "model_vqa_science": Command(ScienceFile, 1024),
    "model_vqa_mmbench": Command(MMBenchFile, 1024),
}


class FileRun(Run):
    """A run that belongs to an answers file A.jsonl. Its folder is A.jsonl.run, beside the file."""

    def __init__(self, answers_file: Path, benchmark, config, checkpoint, generation, model_base=None):
        super().__init__(benchmark, config, checkpoint, generation, answers_file.parent, model_base)
        # The folder's name has no digest of the settings, so `open` has to compare them.
        self.answers_file = answers_file
        self.folder = answers_file.with_name(answers_file.name + ".run")
        self.shards = self.folder / "shards"

    def open(self, fresh: bool = False) -> None:
        """Take over or make the folder. Raises UserError if it, or the answers file, belongs to another run."""
        record = self.folder / "identity.json"
        # The identity goes through JSON before it is compared: JSON has no tuples, so a tuple becomes a list.
        if record.is_file() and read_json(record) != json.loads(json.dumps(self.identity)):
            raise UserError(
                f"{self.answers_file}: holds answers of another run ({_difference(read_json(record), self.identity)} differ); "
                f"name another --answers-file, or remove it and {self.folder.name}"
            )
        if not record.is_file() and self.answers_file.exists():
            raise UserError(
                f"{self.answers_file}: is there already and was not written by this command; name another --answers-file, "
                "or remove it"
            )
        super().open(fresh)

    def finish(self, partial: bool = False) -> dict:
        """Merge the answers and write the answers file. The score is empty."""
        self.refresh()
        samples = self._readable(partial)
        answered = {sample.key: self.answered[sample.key] for sample in samples if sample.key in self.answered}
        rows = merge(samples, answered, self.merged, self.checkpoint.short_name, digest_of(self.identity))
        rows = [self.benchmark.row(sample, row) for sample, row in zip(samples, rows, strict=True)]
        # Written last and at once: if A.jsonl exists, it is complete.
        write_atomically(self.answers_file, "".join(json.dumps(row) + "\n" for row in rows))
        return {}


def _difference(before: dict, now: dict) -> str:
    """Return the names of the parts of an identity that differ, with commas between them."""
    now = json.loads(json.dumps(now))
    return ", ".join(name for name in now if before.get(name) != now[name])


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all of LLaVA's commands share, and the flags of the configuration."""
    parser.add_argument("--model-path", required=True, help="folder or hub name")
    add_checkpoint_flags(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, as LLaVA's scripts ask (0)")
    parser.add_argument("--top_p", "--top-p", type=float)
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1, help="only 1")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument(
        "--visual-token-num",
        "--visual_token_num",
        type=positive,
        help="vision tokens per image, all tiles together: overall_tokens",
    )
    add_config_flags(parser)


def configuration(args: argparse.Namespace) -> AdaVConfig:
    """The configuration file with the command line's overrides; says what --visual-token-num means."""
    tokens = args.visual_token_num
    config = config_of_flags(args, tokens, "--visual-token-num")
    if tokens:
        print(
            f"note: --visual-token-num {tokens} means overall_tokens: {tokens} per image, all tiles together",
            file=sys.stderr,
        )
    return config


def sampling(args: argparse.Namespace) -> dict:
    """Return temperature, top_p and seed for Generation; {} for greedy decoding.

    Raises UserError for values out of range and for beam search.
    """
    if args.num_beams != 1:
        raise UserError(f"--num_beams is {args.num_beams}, allowed is 1: answers are greedy or sampled, not searched")
    if args.temperature < 0 or (args.top_p is not None and not 0 < args.top_p <= 1):
        raise UserError("--temperature is at least 0, and --top_p above 0 and at most 1")
    # Settings without effect stay at their defaults. They are part of the run's identity, and another seed would
    # otherwise answer all questions again.
    if args.temperature == 0:
        return {}
    return {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}


def parse(name: str, argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m llava.eval.{name}", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    table = COMMANDS[name].reads is MMBenchFile
    parser.add_argument("--question-file", type=existing_file, required=True)
    parser.add_argument("--answers-file", type=Path, required=True)
    if not table:
        parser.add_argument("--image-folder", type=existing_folder, required=True)
    parser.add_argument("--num-chunks", type=positive, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0, help="from 0")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=positive, default=COMMANDS[name].max_new_tokens)
    parser.add_argument(
        "--gpus-per-model",
        type=positive,
        default=os.environ.get("GPUS_PER_MODEL", "1"),
        help="devices per process (default: $GPUS_PER_MODEL, else 1)",
    )
    parser.add_argument("--batch-size", type=positive, help=f"samples per batch (default: {BATCH_SIZE_HELP})")
    parser.add_argument("--fresh", action="store_true", help="answer everything anew")
    if COMMANDS[name].reads in (ScienceFile, MMBenchFile):
        parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    if table:
        parser.add_argument(
            "--all-rounds", action="store_true", help="ask each question once per rotation of its options"
        )
        parser.add_argument("--lang", choices=("en", "cn"), default="en", help="of --single-pred-prompt (en)")
    return parser.parse_args(argv)


@exits_cleanly
def main(name: str, argv: list[str] | None = None) -> None:
    args = parse(name, argv)
    if not 0 <= args.chunk_idx < args.num_chunks:
        raise UserError(f"--chunk-idx is {args.chunk_idx}, allowed is 0 to {args.num_chunks - 1} (of --num-chunks)")
    # 1. Check all input here, where no model is loaded yet. get_conversation raises for an unknown template.
    config, decoding = configuration(args), sampling(args)
    if args.conv_mode is not None:
        get_conversation(args.conv_mode)
    devices = device_groups(args.gpus_per_model)
    checkpoint = find_checkpoint(args.model_path)
    model_base = find_checkpoint(args.model_base) if args.model_base else None
    # 2. The run of this answers file.
    device = "cuda" if devices else "cpu"
    generation = Generation(args.max_new_tokens, args.conv_mode, args.dtype, device, **decoding)
    with as_user_error_on_write(args.answers_file):
        args.answers_file.parent.mkdir(parents=True, exist_ok=True)
    benchmark = COMMANDS[name].reads(args, checkpoint)
    run = FileRun(args.answers_file, benchmark, config, checkpoint, generation, model_base)
    # 3. Answer, and write the answers file.
    title = f"{args.question_file.name} {config.method}"
    # One process on a CPU: users of LLaVA's commands start several of them, with --num-chunks.
    shards = max(1, len(devices))
    evaluate_or_exit([run], shards, devices, args.batch_size, args.fresh, title, threads=args.threads)
    print(f"{len(run.samples)} answers in {args.answers_file}")
