"""Soft VQA accuracy against ten human answers: the official rule of VQAv2 and VizWiz, and the rule of TextVQA.

Each of the ten people is left out in turn. The accuracy is the mean of min(matches among the others / 3, 1). The two
rules differ only in the normalisation before that (arXiv 1505.00468; GT-Vision-Lab/VQA, vqaEval.py).
"""

from __future__ import annotations

from llava.eval.scoring.evalai_normalisation import normalise, normalise_words, strip_punctuation
from llava.eval.scoring.match_answers import mean


def leave_one_out(answer: str, people: list[str]) -> float:
    """Return the mean over people of min(matches among the others / 3, 1). ValueError for fewer than two people."""
    if len(people) < 2:
        raise ValueError(f"{len(people)} reference answers, at least two are needed")
    matches = people.count(answer)
    return mean(min((matches - (person == answer)) / 3, 1.0) for person in people)


def official_accuracy(answer: str, people: list[str]) -> float:
    """Return the accuracy of an answer by the rule of the VQA evaluation (VQAv2, VizWiz).

    Line breaks and outer spaces are removed. If the people disagree, punctuation, number words, articles and
    contractions are normalised on both sides. If all people gave the same answer, the answer must be equal to it.
    """
    answer, people = _one_line(answer), [_one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, *people = (normalise_words(strip_punctuation(text)) for text in (answer, *people))
    return leave_one_out(answer, people)


def textvqa_accuracy(answer: str, people: list[str]) -> float:
    """Return the accuracy of an answer by TextVQA's rule, as in LLaVA: both sides are in EvalAI's normal form."""
    return leave_one_out(normalise(answer), [normalise(person) for person in people])


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
