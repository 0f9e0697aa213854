"""Which option an answer to a multiple-choice question names, where the protocol leaves it to the reader."""

from __future__ import annotations

import re


def option_letter(text: str, letters: str) -> str | None:
    """The letter of `letters` that an answer names, None where it names none.

    The letter alone or at the start, bracketed or followed by one of . : ) ,: "B", "(B)", "B.", "B) red". A word is no
    letter: "A dog" names no option.
    """
    found = re.match(rf"\(?([{letters}])(?:$|[.:),])", text.strip())
    return found[1] if found else None


def lenient_letter(text: str, letters: str) -> str | None:
    """As `option_letter`, or else the first letter after "The answer is".

    LLaVA's rules for ScienceQA and SEED-Bench are stricter. This reading makes the scores called "lenient".
    """
    found = re.search(rf"The answer is \(?([{letters}])\b", text)
    return option_letter(text, letters) or (found[1] if found else None)
