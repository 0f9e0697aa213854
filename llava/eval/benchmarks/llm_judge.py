"""Judge: an LLM behind an OpenAI-compatible chat endpoint that grades answers with a number between 0 and 1.

Each answer is graded once, and the grade is kept in a file. Settings come from the environment:
JUDGE_URL=https://.../v1 JUDGE_MODEL=gpt-4-0613 JUDGE_API_KEY=... (the key is never stored or printed)
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, digest_of, repair
from llava.common.progress import progress_bar
from llava.eval.benchmarks.questions import read_lines

# If a reply is no number, the judge is asked again at the next temperature: at the same one it would repeat itself.
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
# HTTP codes of a server that may answer later: too many requests, and errors of the server or a proxy.
BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Judge:
    """A judge. url: address of the API (".../v1"). wait: seconds before the second try, doubled for each later one."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    wait: float = 2.0

    @classmethod
    def from_environment(cls) -> Judge | None:
        """Return the judge that JUDGE_URL and JUDGE_MODEL name; None if JUDGE_URL is not set."""
        url, model = os.environ.get("JUDGE_URL"), os.environ.get("JUDGE_MODEL")
        if not url:
            return None
        if not url.startswith(("http://", "https://")) or not model:
            raise UserError(f'JUDGE_URL is "{url}", allowed is a http(s) address, together with JUDGE_MODEL')
        return cls(url.rstrip("/"), model, os.environ.get("JUDGE_API_KEY", ""))

    def reply(self, prompt: str, temperature: float) -> str:
        """Return the reply of the model. Raises UserError if the server refuses, or gives no reply in four tries."""
        body = {"model": self.model, "temperature": temperature, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(4):
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return json.load(response)["choices"][0]["message"]["content"]
            # HTTPError first: it is an OSError too, but a refusal (a wrong key, say) must not be tried again.
            except urllib.error.HTTPError as error:
                if error.code not in BUSY or attempt == 3:
                    raise UserError(f"{self.url}: the judge refuses with HTTP {error.code} {error.reason}") from None
            # HTTPException: a reply that breaks off in the middle.
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                if attempt == 3:
                    raise UserError(f"{self.url}: no usable answer of the judge ({error})") from None
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def grade(self, prompt: str) -> float:
        """Return the number between 0 and 1 that the reply starts with. Raises UserError if no reply has one."""
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
    """Return the key of a kept grade: a digest, so that a change of the model or the prompt asks again."""
    return digest_of([model, prompt])


def kept_grades(kept: Path) -> dict[str, float]:
    """Return `graded_as` -> grade of a file that `grade_all` wrote; {} if there is no such file."""
    return {row["prompt"]: row["grade"] for _, row in read_lines(kept)} if kept.is_file() else {}


def grade_all(judge: Judge, prompts: dict[str, str], kept: Path) -> dict[str, float]:
    """Grade prompts; return name -> grade.

    prompts: name -> prompt. kept: a .jsonl file. Each grade is written to it at once, and a grade that it has already
    is not asked for again, because calls of a judge cost money.
    """
    # A kill may have left a torn last line. It is removed, and its grade is asked for again.
    if kept.is_file():
        repair(kept)
    known, grades = kept_grades(kept), {}
    with as_user_error_on_write(kept), open(kept, "a", encoding="utf-8") as file:
        for name, prompt in progress_bar("judge", prompts.items(), unit=" answers"):
            digest = graded_as(judge.model, prompt)
            if digest not in known:
                known[digest] = judge.grade(prompt)
                file.write(json.dumps({"name": name, "prompt": digest, "grade": known[digest]}) + "\n")
                file.flush()
            grades[name] = known[digest]
    return grades
