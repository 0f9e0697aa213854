"""A grader behind any OpenAI-compatible chat endpoint: one score between 0 and 1 per text, asked once and kept.

JUDGE_URL=https://.../v1 JUDGE_MODEL=gpt-4-0613 JUDGE_API_KEY=... (read from the environment, never stored or printed)
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import digest_of, repair, told_when_unwritable
from llava.common.progress import progress_bar
from llava.eval.benchmarks.questions import read_lines

TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)  # a reply that is no score is asked for again, a little warmer each time
BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Judge:
    """url: of the API (".../v1"); wait: seconds before the second try of a busy server, doubled each time."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    wait: float = 2.0

    @classmethod
    def from_environment(cls) -> Judge | None:
        """The judge that JUDGE_URL names, None where there is none."""
        url, model = os.environ.get("JUDGE_URL"), os.environ.get("JUDGE_MODEL")
        if not url:
            return None
        if not url.startswith(("http://", "https://")) or not model:
            raise UserError(f'JUDGE_URL is "{url}", allowed is a http(s) address, together with JUDGE_MODEL')
        return cls(url.rstrip("/"), model, os.environ.get("JUDGE_API_KEY", ""))

    def reply(self, prompt: str, temperature: float) -> str:
        """What the model says; UserError where the server does not answer."""
        body = {"model": self.model, "temperature": temperature, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(4):
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return json.load(response)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                if error.code not in BUSY or attempt == 3:
                    raise UserError(f"{self.url}: the judge refuses with HTTP {error.code} {error.reason}") from None
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                if attempt == 3:
                    raise UserError(f"{self.url}: no usable answer of the judge ({error})") from None
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def grade(self, prompt: str) -> float:
        """The score between 0 and 1 that the reply begins with; UserError where no temperature brings one."""
        for temperature in TEMPERATURES:
            words = (self.reply(prompt, temperature) or "").split()
            try:
                score = float(words[0])
            except (ValueError, IndexError):
                continue
            if 0 <= score <= 1:
                return score
        raise UserError(f"{self.url}: {len(TEMPERATURES)} replies of {self.model} are no score between 0 and 1")


def graded_as(model: str, prompt: str) -> str:
    """What a grade is kept under."""
    return digest_of([model, prompt])


def kept_grades(kept: Path) -> dict[str, float]:
    """`graded_as` -> grade, of a file that `grade_all` wrote; nothing where there is none."""
    return {row["prompt"]: row["grade"] for _, row in read_lines(kept)} if kept.is_file() else {}


def grade_all(judge: Judge, prompts: dict[str, str], kept: Path) -> dict[str, float]:
    """name -> grade. Every grade is written to `kept` (.jsonl) at once, and what it holds already is not asked again."""
    if kept.is_file():
        repair(kept)  # a line that a kill tore is asked for again
    known, grades = kept_grades(kept), {}
    with told_when_unwritable(kept), open(kept, "a", encoding="utf-8") as file:
        for name, prompt in progress_bar("judge", prompts.items(), unit=" answers"):
            digest = graded_as(judge.model, prompt)
            if digest not in known:
                known[digest] = judge.grade(prompt)
                file.write(json.dumps({"name": name, "prompt": digest, "grade": known[digest]}) + "\n")
                file.flush()
            grades[name] = known[digest]
    return grades
