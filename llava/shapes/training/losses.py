"""The losses of the demo's training: [CLS] and captions, patches and words, answers; and a practice loss for lookup."""

import torch
import torch.nn.functional as F
from torch import nn

from llava.shapes.training.data import naming_table, word_id
from llava.shapes.vocabulary import COLOR_NAMES, KINDS, QUESTION_TYPES

# Four words name one object and share its feature, so cosines cannot be much above 0.5. Scale and bias fit that.
ALIGNMENT_SCALE, ALIGNMENT_BIAS = 20.0, -5.0


class Captioner(nn.Module):
    """Text encoder of loss 1, from a set of (colour, kind) words to one vector, with the head of [CLS].

    It takes the place of CLIP's text tower (InfoNCE, arXiv 2103.00020). It is not part of the checkpoint.
    """

    def __init__(self, width):
        super().__init__()
        self.pairs = nn.Embedding(len(KINDS) * len(COLOR_NAMES), width)
        self.kinds = nn.Embedding(len(KINDS), width)
        self.colors = nn.Embedding(len(COLOR_NAMES), width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.65))  # log of the scale; CLIP starts from log(1 / 0.07), about 2.66

    def forward(self, cls, kinds, colors, changed=0):
        """InfoNCE loss (a scalar) between [CLS] [B, D] and captions (kinds, colors int64 [B, 6], -1: no object).

        changed: number of extra wrong captions per picture. Each is the right one with one kind or colour changed.
        """
        image = F.normalize(self.head(self.norm(cls)), dim=-1)
        caption = self.caption(kinds, colors)
        scale = self.scale.exp().clamp(max=100.0)  # CLIP's limit, which keeps training stable
        logits = scale * image @ caption.T
        target = torch.arange(len(cls))
        back = F.cross_entropy(logits.T, target)
        for _ in range(changed):
            wrong = self.caption(*_change_a_word(kinds, colors))
            logits = torch.cat([logits, scale * (image * wrong).sum(-1, keepdim=True)], dim=1)
        return (F.cross_entropy(logits, target) + back) / 2

    def caption(self, kinds, colors):
        """Unit vectors [B, D] of captions (kinds, colors int64 [B, 6])."""
        there = (kinds >= 0).unsqueeze(-1)
        k, c = kinds.clamp_min(0), colors.clamp_min(0)
        words = self.pairs(k * len(COLOR_NAMES) + c) + self.kinds(k) + self.colors(c)
        return F.normalize(self.mlp((words * there).sum(1)), dim=-1)


def _change_a_word(kinds, colors):
    """Copies of (kinds, colors) in which one object of each row has another kind or another colour."""
    weights = (kinds >= 0).float() + 1e-6  # multinomial refuses a row without any weight
    place = torch.multinomial(weights, 1)
    new_kind = (kinds.gather(1, place) + torch.randint(1, len(KINDS), place.shape)) % len(KINDS)
    new_color = (colors.gather(1, place) + torch.randint(1, len(COLOR_NAMES), place.shape)) % len(COLOR_NAMES)
    recolor = torch.rand(place.shape) < 0.5
    kinds = kinds.scatter(1, place, torch.where(recolor, kinds.gather(1, place), new_kind))
    return kinds, colors.scatter(1, place, torch.where(recolor, new_color, colors.gather(1, place)))


def alignment_loss(projected, owners, kinds, colors, embeddings, flatness=100.0, evenness=0.0):
    """Loss 2: each patch is near the words of its object, and far from all other words.

    projected [T, P, D]; owners int64 [T, P], index of the object or -1; kinds, colors int64 [T, 6]; embeddings [V, D].
    The loss is binary cross-entropy on the scaled cosine, summed over words, per object patch. Two variances of the
    cosine are added. They matter because text guidance reads a softmax over patches at temperature 0.01, where a
    difference of 0.01 counts.

    flatness: weight of the variance over the picture for words that name nothing ("the", "?"), so that they attract no
    patch. evenness: weight of the variance over the patches that a word names, so that the word attracts all of them,
    not only the best one.
    """
    cosine = F.normalize(projected, dim=-1) @ F.normalize(embeddings, dim=-1).T
    rows = kinds * len(COLOR_NAMES) + colors
    row = rows.gather(1, owners.clamp_min(0))
    table = naming_table()
    positive = table[row.clamp_min(0)] * (owners >= 0).unsqueeze(-1)
    logits = ALIGNMENT_SCALE * cosine + ALIGNMENT_BIAS
    loss = F.binary_cross_entropy_with_logits(logits, positive, reduction="sum") / (owners >= 0).sum().clamp_min(1)
    silent = table.sum(0) == 0
    loss = loss + flatness * cosine[..., silent].var(dim=1).mean()
    if evenness:
        count = positive.sum(1, keepdim=True)
        mean = (cosine * positive).sum(1, keepdim=True) / count.clamp_min(1)
        spread = ((cosine - mean).square() * positive).sum(1, keepdim=True) / count.clamp_min(1)
        several = count > 1  # one patch has no variance, and would only make the mean smaller
        loss = loss + evenness * (spread * several).sum() / several.sum().clamp_min(1)
    return loss


def answer_loss(hidden, questions, cue, embeddings, end_id):
    """Loss 3: cross-entropy of the answer and of `</s>` after it. Returns (loss, right bool [B, Q]).

    hidden [B, Q, L, D]; questions int64 [B, Q, L]; cue int64 [B, Q], index of the token before the answer.
    """
    width = hidden.shape[-1]
    at = torch.stack([cue, cue + 1], dim=-1)
    states = hidden.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, width))
    logits = states @ embeddings.T
    answer = questions.gather(2, cue.unsqueeze(-1) + 1).squeeze(-1)
    target = torch.stack([answer, torch.full_like(answer, end_id)], dim=-1)
    loss = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answer.flatten())
    # The end token is the same after every answer and easy to learn, so it has a small weight.
    loss = loss + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), target[..., 1].flatten())
    return loss, logits[:, :, 0].argmax(-1) == answer


def caption_loss(hidden, questions, cue, embeddings, pad_id):
    """Loss 3 of captions: mean cross-entropy over their tokens, `</s>` included. Returns (loss, right bool [B, Q]).

    Arguments as in answer_loss. A caption is right if every token is the likeliest one after the right tokens before it.
    """
    target = questions[:, :, 1:]
    learnt = (torch.arange(target.shape[-1]) >= cue.unsqueeze(-1)) & (target != pad_id)
    logits = hidden[:, :, :-1][learnt] @ embeddings.T
    wrong = learnt.clone()
    wrong[learnt] = logits.argmax(-1) != target[learnt]
    return F.cross_entropy(logits, target[learnt]), ~wrong.any(-1)


def lookup_loss(middle, batch, embeddings):
    """Practice loss for "Is there a red circle?": after half of the layers, the "?" should know the circle's colour.

    The LLM must know what the picture shows before its last layers compare it with the question. From yes and no alone
    it did not learn this: accuracy on existence stayed at 61 %.

    middle: hidden states [B, Q, L, D] after half of the layers, of pictures with one tile. The loss is cross-entropy
    over words, for questions whose kind occurs exactly once. It is 0 if there is no such question.
    """
    # The prompt ends with: kind, "?", "assistant", ":". The cue is the ":". With the suffix sentence, no kind stands at
    # this place, and the question does not count.
    asked = batch.questions.gather(2, (batch.cue - 3).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    kind_ids = torch.tensor([word_id(kind) for kind in KINDS])
    color_ids = torch.tensor([word_id(color) for color in COLOR_NAMES])
    shown = (batch.kinds >= 0).unsqueeze(1) & (kind_ids[batch.kinds.clamp_min(0)].unsqueeze(1) == asked.unsqueeze(-1))
    use = (batch.category == QUESTION_TYPES.index("exists")) & (shown.sum(-1) == 1)
    if not bool(use.any()):
        return middle.sum() * 0.0  # a zero that is part of the graph, so that backward() works as usual
    color = color_ids[batch.colors.clamp_min(0)].unsqueeze(1).expand_as(shown).masked_fill(~shown, 0).sum(-1)
    where = (batch.cue - 2).view(*batch.cue.shape, 1, 1).expand(-1, -1, 1, middle.shape[-1])
    states = middle.gather(2, where).squeeze(2)
    return F.cross_entropy(states[use] @ embeddings.T, color[use])
