"""The option that an answer to a multiple-choice question names, for benchmarks without a rule of their own."""

from __future__ import annotations

import re


def option_letter(text: str, letters: str) -> str | None:
    """Return the letter of `letters` that an answer names, or None.

    The letter stands alone, or at the start with brackets around it or one of . : ) , behind it: "B", "(B)", "B.",
    "B) red". A word is no letter: "A dog" names no option.
    """
    found = re.match(rf"\(?([{letters}])(?:$|[.:),])", text.strip())
    return found[1] if found else None


def lenient_letter(text: str, letters: str) -> str | None:
    """Return the letter of `option_letter`, or else the first letter after "The answer is".

    LLaVA's rules for ScienceQA and SEED-Bench are stricter. This reading makes the scores called "lenient".
    """
    found = re.search(rf"The answer is \(?([{letters}])\b", text)
    return option_letter(text, letters) or (found[1] if found else None)
