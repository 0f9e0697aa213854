"""Soft VQA accuracy against ten human answers: the official rule of VQAv2 and VizWiz, and TextVQA's.

An answer is compared with the people's, each left out in turn: min(matches among the others / 3, 1), averaged.
The two rules differ in what is normalised before (arXiv 1505.00468; GT-Vision-Lab/VQA, vqaEval.py).
"""

from __future__ import annotations

from llava.eval.scoring.evalai_normalisation import normalise, normalise_words, strip_punctuation
from llava.eval.scoring.match_answers import mean


def leave_one_out(answer: str, people: list[str]) -> float:
    """Mean over people of min(matches among the others / 3, 1). ValueError where there are fewer than two people."""
    if len(people) < 2:
        raise ValueError(f"{len(people)} reference answers, at least two are needed")
    matches = people.count(answer)
    return mean(min((matches - (person == answer)) / 3, 1.0) for person in people)


def official_accuracy(answer: str, people: list[str]) -> float:
    """The rule of the VQA evaluation (VQAv2, VizWiz).

    Line breaks and outer spaces go first. Only where the people disagree are punctuation, number words, articles and
    contractions normalised, on both sides; where all ten say the same, the answer must be that very string.
    """
    answer, people = _one_line(answer), [_one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, *people = (normalise_words(strip_punctuation(text)) for text in (answer, *people))
    return leave_one_out(answer, people)


def textvqa_accuracy(answer: str, people: list[str]) -> float:
    """TextVQA's rule, as in LLaVA's evaluation: both sides in EvalAI's normal form."""
    return leave_one_out(normalise(answer), [normalise(person) for person in people])


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
