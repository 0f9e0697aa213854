"""MMTok (arXiv 2508.18264): patches that together cover the words of the question and the patches of their tile."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.before_llm.base import ImageTokens, take
from llava.methods.before_llm.coverage import Coverage
from llava.methods.before_llm.greedy import GreedyInputs, GreedySelector
from llava.methods.before_llm.similarity import cosine_matrix, unit_rows
from llava.methods.before_llm.tiles import first_picks, members_of_tiles, split_evenly

# Temperatures of the softmax over patches, and the weight of the patches' coverage beside that of the words.
WORD_TEMPERATURE, PATCH_TEMPERATURE, PATCH_WEIGHT = 0.02, 0.2, 0.5
# Sentences of benchmark prompts, and words, that name nothing in an image; as in the authors' code.
FORMAT_SENTENCES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_STOP_WORDS = """
a an the is are was were be been being have has had do does did it they he she we you i
what where when why how who which and or but so if then question answer
to for with by from at into onto upon
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def content_words(question: str) -> str:
    """Return the words of a question without format sentences and stop words, separated by spaces.

    If no word is left, the question is returned without the format sentences.
    """
    for sentence in FORMAT_SENTENCES:
        question = question.replace(sentence, "")
    words = [word for word in re.findall(r"\w+", question) if word.lower() not in STOP_WORDS]
    return " ".join(words) if words else question


def cover_greedily(worth: Tensor, real: Tensor, blank: Tensor, count: int) -> Tensor:
    """Return `count` patches of each tile in the order of choice, [T, count]; each pick has the largest gain.

    worth [T, R, M] float32, at least 0: how well patch v covers row u, zero in the padding of the batch; real [T, M];
    blank [T, M]: patches that show only padding of the image, which are chosen after all others. A tile with fewer than
    `count` patches repeats patches at the end.
    """
    coverage = Coverage(worth, symmetric=False)
    # All rows together are worth at most 1 + PATCH_WEIGHT, so this puts blank patches behind every other patch.
    behind = blank.double() * 2 * (1 + PATCH_WEIGHT)
    free, picks = real.clone(), []
    for _ in range(count):
        best = (coverage.gain - behind).masked_fill(~free, -torch.inf).argmax(dim=-1)
        picks.append(best)
        free.scatter_(1, best[:, None], False)
        coverage.add(best)
    return torch.stack(picks, dim=1)


@dataclass
class MMTok(GreedySelector):
    """Greedy maximum coverage of words and patches at once; each tile on its own.

    A patch v covers word j by softmax_v(cosine / 0.02) / m, from the projected patch and the word embedding, and patch u
    by 0.5 softmax_v(cosine / 0.2) / M, from the tower's states. The coverage of a word or patch is that of the chosen
    patch which covers it best. Each pick adds the most coverage, summed over all words and patches. Saliency is not read.
    Without a question, only patches are covered. The cost is a cosine matrix [m + M, M] per tile.

    The words are the content words of the user's turn (`content_words`), tokenised one by one. Where the checkpoint has no
    tokenizer, they are all tokens of the question (option text_scope).

    The budget is per image and split evenly over the tiles; in the published code it is per tile. Patches that show only
    padding of a square (LLaVA-1.5) are chosen after all others. The published code repeats patch 0 where the budget is
    larger than the number of other patches.
    """

    tower_states = ("hidden",)

    def words(self, question: str) -> list[str]:
        return content_words(question).split()

    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        members, real, sizes = members_of_tiles(image)
        quota = split_evenly(budget, sizes)
        hidden = image.of_patches(image.tower.hidden[:, 1:])[members]
        features = unit_rows(image.features[image.patches][members])
        words = unit_rows(text.to(features.device)).expand(len(members), -1, -1)
        count = real.sum(dim=1)[:, None, None]
        # Rows of the padding cover nothing and are not covered.
        by_word = _shares(words @ features.mT, real, WORD_TEMPERATURE) / max(1, len(text))
        by_patch = _shares(cosine_matrix(hidden), real, PATCH_TEMPERATURE) * real[..., None] * (PATCH_WEIGHT / count)
        return GreedyInputs(
            torch.cat([by_word, by_patch], dim=1),
            real,
            (image.place("blank")[members],),
            quota,
            lambda picks: take(image, image.patches[first_picks(members, picks, quota)]),
        )

    def rule(
        self, similarity: Tensor, real: Tensor, blank: Tensor, *, counts: Tensor, fewest: int, most: int
    ) -> Tensor:
        return cover_greedily(similarity, real, blank, most)


def _shares(cosines: Tensor, real: Tensor, temperature: float) -> Tensor:
    """Return the softmax of cosines [T, R, M] / temperature over the real patches of each tile."""
    return torch.softmax((cosines / temperature).masked_fill(~real[:, None], -torch.inf), dim=2)
