"""Measures a demo checkpoint for its model card, with the code that evaluation uses.

The checkpoint is loaded by load_pretrained_model. Tiles, tower, selection and LLM are those of `model.generate`.
Pictures are encoded once and used by every method. The first answer token is read from one forward pass. `agreement`
says how often `model.generate` gives the same answer.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image

from llava.common.progress import progress_bar
from llava.conversation import conv_templates
from llava.methods.before_llm import select
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.prepared import StageClock
from llava.shapes.dataset import write_dataset
from llava.shapes.vocabulary import QUESTION_TYPES

_BATCH = 32


class Exam:
    """A checkpoint on the CPU, and one question file of the demo task with its encoded pictures.

    limit: only the first so many questions.
    """

    def __init__(self, checkpoint, folder, limit=None):
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(checkpoint, device_map="cpu")
        folder = Path(folder)
        questions = _read_lines(folder / "questions.jsonl")[:limit]
        self.answers = [row["answer"] for row in _read_lines(folder / "labels.jsonl")[:limit]]
        self.categories = [row["category"] for row in questions]
        self.names = [row["image"] for row in questions]
        self.rows = [self._ids(row["text"]) for row in questions]
        self.images = self._encode(folder / "images")

    def _ids(self, text):
        """(ids before the image, ids after the image) of the prompt for one question."""
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], f"<image>\n{text}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer)
        place = ids.index(-200)
        return ids[:place], ids[place + 1 :]

    @torch.no_grad()
    def _encode(self, folder):
        """ImageTokens by file name."""
        encoded, names = {}, sorted(set(self.names))
        for start in range(0, len(names), _BATCH):
            part = names[start : start + _BATCH]
            images = [Image.open(folder / name).convert("RGB") for name in part]
            encoded.update(zip(part, self.image_tokens(images), strict=True))
        return encoded

    @torch.no_grad()
    def image_tokens(self, images):
        """List of ImageTokens of PIL images."""
        pixels = process_images(images, self.processor, self.model.config)
        pixels = [p if p.dim() == 4 else p[None] for p in pixels]
        plans = self.model._plans(pixels, [image.size for image in images], "official")[1]
        encoded = self.model.encode_images(pixels, StageClock(torch.device("cpu")))
        return [
            self.model.image_tokens(features, saliency, plan)
            for (features, saliency, _), plan in zip(encoded, plans, strict=True)
        ]

    @torch.no_grad()
    def answer(self, method="none", budget=1, positions="reindexed", images=None, texts=None, **options):
        """List of answer words.

        positions: "reindexed" or "original" positions of the kept tokens. images: ImageTokens per question, instead of
        its own. texts: per question, ids [m] that the selector reads, instead of the question's. options: the method's.
        """
        embed, words = self.model.get_input_embeddings(), []
        for start in range(0, len(self.rows), _BATCH):
            parts = []
            for number in range(start, min(start + _BATCH, len(self.rows))):
                before, after = self.rows[number]
                tokens = images[number] if images else self.images[self.names[number]]
                tokens.key = number  # seeds the method `random`: questions about one picture get different tokens
                text = embed(torch.tensor(texts[number] if texts else after))
                kept = select(method, tokens, text, budget, **options)
                parts.append(self._sequence(embed, before, kept, after, positions))
            words += self._next_words(parts)
        return words

    def _sequence(self, embed, before, kept, after, positions):
        where = kept.indices if positions == "original" else torch.arange(len(kept.indices))
        end = kept.total if positions == "original" else len(kept.indices)
        ids = torch.tensor(before + after)
        head, tail = embed(ids).split([len(before), len(after)])
        index = [torch.arange(len(before)), len(before) + where, len(before) + end + torch.arange(len(after))]
        return torch.cat([head, kept.features, tail]), torch.cat(index)

    def _next_words(self, parts):
        # Padding on the left: the last slot is then every row's last token.
        length = max(len(embeds) for embeds, _ in parts)
        inputs = torch.zeros(len(parts), length, parts[0][0].shape[-1])
        mask, where = (
            torch.zeros(len(parts), length, dtype=torch.long),
            torch.zeros(len(parts), length, dtype=torch.long),
        )
        for row, (embeds, index) in enumerate(parts):
            inputs[row, length - len(embeds) :] = embeds
            mask[row, length - len(embeds) :] = 1
            where[row, length - len(embeds) :] = index
        logits = self.model(inputs_embeds=inputs, attention_mask=mask, position_ids=where, logits_to_keep=1).logits
        return self.tokenizer.batch_decode(logits[:, -1:].argmax(-1))

    def other_questions(self):
        """Per question, token ids [m] of a question about another picture, for `texts`."""
        # Four questions share a picture, so five questions on is always another picture.
        return [self.rows[(number + 5) % len(self.rows)][1] for number in range(len(self.rows))]

    def score(self, words):
        """Share of right answers: of all questions ("all"), and of each question type."""
        hits = defaultdict(list)
        for word, answer, category in zip(words, self.answers, self.categories, strict=True):
            hits["all"].append(word == answer)
            hits[category].append(word == answer)
        return {name: sum(hits[name]) / len(hits[name]) for name in ("all", *QUESTION_TYPES) if hits[name]}

    def prior(self):
        """Accuracy of the most frequent answer of each question type."""
        counts = defaultdict(Counter)
        for answer, category in zip(self.answers, self.categories, strict=True):
            counts[category][answer] += 1
        return sum(counter.most_common(1)[0][1] for counter in counts.values()) / len(self.answers)


def all_token_figures(checkpoint, family, work, questions=4000):
    """One row per test set: accuracy with all tokens, and the prior. The three sets are disjoint."""
    rows = []
    for seed_set in progress_bar("test sets", range(3), unit=" sets"):
        folder = write_dataset(family, "test", questions, Path(work) / f"card-{family}-{seed_set}", seed_set)
        exam = Exam(checkpoint, folder)
        rows.append({"set": seed_set, "questions": questions, "prior": exam.prior(), **exam.score(exam.answer())})
    return rows


def method_figures(checkpoint, family, work, budgets, methods, questions=2000):
    """Accuracy of each method at each budget under both kinds of positions, and the controls.

    Measured on the first `questions` questions of set 0.
    """
    # 1. Methods. `random` is a mean over three seeds.
    folder = write_dataset(family, "test", 4000, Path(work) / f"card-{family}-0", 0)
    exam = Exam(checkpoint, folder, questions)
    table = []
    for budget in progress_bar("budgets", budgets, unit=" budgets"):
        for method in methods:
            for positions in ("reindexed", "original"):
                seeds = range(3) if method == "random" else (None,)
                options = [{} if seed is None else {"seed": seed} for seed in seeds]
                scores = [exam.score(exam.answer(method, budget, positions, **o))["all"] for o in options]
                table.append(
                    {"method": method, "budget": budget, "positions": positions, "all": sum(scores) / len(scores)}
                )
        # A control: if text guidance works, the question of another picture must make it worse.
        others = exam.other_questions()
        for positions in ("reindexed", "original"):
            score = exam.score(exam.answer("t2i", budget, positions, texts=others))["all"]
            table.append({"method": "t2i, wrong question", "budget": budget, "positions": positions, "all": score})
    own, words = [exam.images[name] for name in exam.names], exam.answer()
    # 2. Controls. The colour is CLIP's mean, which normalisation turns into about zero.
    blank = exam.image_tokens([Image.new("RGB", (96, 96), (122, 116, 104))])[0]
    return {
        "questions": questions,
        "prior": exam.prior(),
        "all_tokens": exam.score(words)["all"],
        "tokens_mean": sum(len(tokens.tile) for tokens in own) / len(own),
        # Eight questions on: the picture after the next one.
        "wrong_image": exam.score(exam.answer(images=own[8:] + own[:8]))["all"],
        "blank_image": exam.score(exam.answer(images=[blank] * len(own)))["all"],
        "table": table,
        "agreement": agreement(exam, folder / "images", words),
    }


@torch.no_grad()
def agreement(exam, folder, words, count=200):
    """Share of the first `count` questions for which model.generate gives the same word. words: what exam.answer() gave."""
    same = 0
    for number in progress_bar("agreement", range(min(count, len(exam.rows))), unit=" questions"):
        image = Image.open(folder / exam.names[number]).convert("RGB")
        before, after = exam.rows[number]
        pixels = process_images([image], exam.processor, exam.model.config)
        new = exam.model.generate(
            torch.tensor([[*before, -200, *after]]),
            images=pixels,
            image_sizes=[image.size],
            max_new_tokens=4,
            do_sample=False,
        )
        same += exam.tokenizer.decode(new[0], skip_special_tokens=True).strip() == words[number]
    return same / min(count, len(exam.rows))


def _read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
