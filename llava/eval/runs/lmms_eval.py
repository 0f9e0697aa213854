"""Runs of lmms-eval in processes of their own: one task under one configuration each, which is done or not done.

lmms-eval is never imported here. It writes its results when a task is finished. The model notes each batch of answers in the
folder of the run (model argument `answers`), so the same command continues after any interruption.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, digest_of, read_json, write_json
from llava.common.find_checkpoint import EvalCheckpoint
from llava.config import AdaVConfig
from llava.eval.runs.worker_processes import signals_raise
from llava.methods.plugins import plugin_of

LOG = "lmms_eval.log"


@dataclass(frozen=True)
class LmmsRun:
    """One task of lmms-eval under one configuration.

    label: the name of the configuration in tables. output: folder of all runs. limit: only the first N documents, or
    None. flags: further flags of lmms-eval. ranks, batch_size: processes, and prompts per call; both change no answer.
    """

    task: str
    label: str
    config: AdaVConfig
    checkpoint: EvalCheckpoint
    output: Path
    limit: int | None = None
    dtype: str = "auto"
    flags: tuple[str, ...] = ()
    ranks: int = 1
    batch_size: int = 8

    @cached_property
    def folder(self) -> Path:
        """Folder of the results. Its name has a digest of everything that the answers depend on."""
        plugin = plugin_of(self.config.method)
        named = {"configuration": self.config.to_dict(), "limit": self.limit, "dtype": self.dtype, "flags": self.flags}
        named |= {"checkpoint": self.checkpoint.identity, "plugin": plugin and plugin.digest}
        return self.output / "lmms_eval" / self.checkpoint.short_name / self.task / f"{self.label}-{digest_of(named)}"

    def results(self) -> dict | None:
        """Return what lmms-eval wrote about the task; None where the run is not finished."""
        # lmms-eval ends with exit code 0 and writes a file even if a task failed, which is then missing in it.
        for path in sorted(self.folder.rglob("*_results.json"), reverse=True):
            found = read_json(path)
            if isinstance(found, dict) and found.get("results", {}).get(self.task):
                return found["results"][self.task]
        return None

    def documents(self) -> dict[str, dict]:
        """Return the logged row of each document, by its number, of a finished run. UserError where there are none."""
        logged = sorted(self.folder.rglob(f"*_samples_{self.task}.jsonl"))
        if not logged:
            raise UserError(f"{self.folder}: lmms-eval logged no documents of {self.task}")
        rows = [json.loads(line) for line in logged[-1].read_text(encoding="utf-8").splitlines()]
        return {str(row["doc_id"]): row for row in rows}

    def command(self) -> list[str]:
        """Return the command that runs it. Its configuration is read from config.json of the folder."""
        plugin = plugin_of(self.config.method)
        given = {"pretrained": self.checkpoint.folder or self.checkpoint.name, "config": self.folder / "config.json"}
        given |= {"answers": self.folder / "answers"}
        given |= {"dtype": self.dtype} if self.dtype != "auto" else {}
        given |= {"plugin": plugin.file} if plugin else {}
        for name, value in given.items():
            if "," in str(value):
                raise UserError(f"{value}: has a comma, at which lmms-eval splits its arguments ({name}); rename it")
        launcher = [sys.executable, "-m"]
        if self.ranks > 1:
            launcher += ["llava.common.torchrun", "--standalone", "--nproc-per-node", str(self.ranks), "-m"]
        arguments = [
            "--model",
            "adav_llava",
            "--model_args",
            ",".join(f"{name}={value}" for name, value in given.items()),
        ]
        arguments += ["--tasks", self.task, "--batch_size", str(self.batch_size), "--log_samples"]
        arguments += ["--output_path", str(self.folder)]
        arguments += ["--limit", str(self.limit)] if self.limit else []
        return [*launcher, "llava.integrations.lmms_eval.command", *arguments, *self.flags]

    def run(self) -> None:
        """Run it, with all output in lmms_eval.log of the folder. UserError if no results come of it.

        Raises Interrupted for SIGINT, SIGTERM and SIGHUP, after the process has ended.
        """
        write_json(self.folder / "config.json", self.config.to_dict())
        log = self.folder / LOG
        with as_user_error_on_write(log), open(log, "w", encoding="utf-8") as file, signals_raise():
            # A session of its own: a signal at the keyboard reaches this process alone, which passes it on.
            process = subprocess.Popen(self.command(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
        if self.results() is None:
            raise UserError(f"{self.task} under {self.label}: lmms-eval gave no results{_reason(log, code)}; see {log}")


def _reason(log: Path, code: int) -> str:
    """Return the last error that a log tells, or the exit code, in brackets."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return f" ({(told or raised)[-1]})" if told or raised else f" (exit code {code})"
