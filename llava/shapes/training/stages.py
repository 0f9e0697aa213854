"""Training loop of one stage, and the accuracy after it."""

import json
import math
import time
from collections import defaultdict

import torch
from torch import distributed

from llava.common.progress import progress_bar
from llava.shapes.training.batches import batches, image_embeddings, jittered_positions, sparse_order
from llava.shapes.training.data import Asked, picture_set, prefix_ids, word_id
from llava.shapes.training.losses import Captioner, alignment_loss, answer_loss, caption_loss, lookup_loss
from llava.shapes.training.muon import Muon
from llava.shapes.training.packed import packed_forward
from llava.shapes.vocabulary import QUESTION_TYPES

_WARMUP = 40  # steps
_SUFFIX_EVERY = 8  # one batch of so many has LLaVA's sentence about short answers, so both prompts work
_CHANGED = 8  # extra wrong captions per picture under hard_captions


def run_stage(model, recipe, stage, cache, log):
    """Train `model` in place for one stage. cache: folder of drawn pictures. log: open text file for JSON lines."""
    # 1. Model. The seed is set per stage, so that a resumed run gives the same weights as an uninterrupted one.
    torch.manual_seed(stage.seed)
    if stage.fresh_llm:
        model.replace_llm_layers(stage.fresh_llm)
    if stage.grow_to:
        model.grow_llm(stage.grow_to)
    captioner = Captioner(recipe.sizes.width) if stage.train_tower else None
    # 2. Pictures and optimizers.
    first, last = stage.images
    pictures = picture_set(recipe.family, "train", first, last - first, stage.asked, recipe.pinpoints, cache)
    optimizers = _optimizers(model, captioner, stage)
    prefix = torch.tensor(prefix_ids())
    generator = torch.Generator().manual_seed(stage.seed)
    part = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    suffix = 0 if stage.captions else _SUFFIX_EVERY
    source = batches(pictures, stage.batch, recipe.pinpoints, recipe.sizes.side, stage.seed, suffix, part)
    bar = progress_bar(f"stage {stage.name}", source, total=stage.steps, disable=part[0] > 0 or None)
    # 3. Steps.
    trained = [p for optimizer, _ in optimizers for group in optimizer.param_groups for p in group["params"]]
    sums, started = defaultdict(float), time.monotonic()
    model.train()
    for step, batch in enumerate(bar):
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, stage.steps)
        losses, right = _losses(model, captioner, recipe, stage, batch, prefix, generator)
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        if part[1] > 1:
            _average_gradients(trained, part[1])
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        for name, value in losses.items():
            sums[name] += float(value.detach())
        sums["right"] += right
        # Means over the last 50 steps go to the log.
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            count = step % 50 + 1
            row = {name: round(value / count, 4) for name, value in sums.items()}
            seconds = round(time.monotonic() - started, 1)
            log.write(json.dumps({"stage": stage.name, "step": step + 1, "seconds": seconds, **row}) + "\n")
            log.flush()
            sums.clear()


def _average_gradients(parameters, processes):
    """Replace the gradients by their mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])  # one all_reduce: its latency would count once per weight
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / processes).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _losses(model, captioner, recipe, stage, batch, prefix, generator):
    """(weighted losses of one batch by name, share of right answers)."""
    # 1. Tower and projector.
    with torch.set_grad_enabled(stage.train_tower):
        hidden, taken = model.see_and_gather(batch.tiles)
    projected = model.projector(hidden[:, 1:])
    # 2. Losses of the tower: captions, and alignment of patches and words.
    losses, right = {}, 0.0
    if captioner is not None:
        shown = (batch.kinds >= 0).any(1)  # a crop without an object has no caption
        cls, changed = (taken, _CHANGED) if stage.hard_captions else (hidden[:, 0], 0)
        losses["caption"] = captioner(cls[shown], batch.kinds[shown], batch.colors[shown], changed)
    if recipe.alignment:
        objects = (batch.owners, batch.kinds, batch.colors)
        losses["alignment"] = 0.25 * alignment_loss(
            projected, *objects, model.embeddings, stage.flatness, stage.evenness
        )
    # 3. Losses of the LLM: answers and, if asked for, lookup.
    if stage.answers:
        order, lengths = batch.order, batch.lengths
        if stage.sparse:
            order, lengths = sparse_order(batch, stage.sparse, generator, stage.least)
        image = image_embeddings(projected, model.image_newline, order)
        positions = None
        if stage.jitter:
            positions = jittered_positions(lengths, image.shape[1], stage.jitter, generator)
        half = len(model.llm.model.layers) // 2
        states, middle = packed_forward(model.llm, prefix, image, batch.questions, positions, lengths, half)
        if stage.lookup:
            losses["lookup"] = stage.lookup * lookup_loss(middle, batch, model.embeddings)
        losses["answer"], hits = _answers(stage.captions, states, batch, model.embeddings)
        right = float(hits.float().mean())
    return losses, right


def _answers(captions, states, batch, embeddings):
    """(loss 3, right bool [B, Q]) of a batch with captions, or with questions."""
    if captions:
        return caption_loss(states, batch.questions, batch.cue, embeddings, word_id("<pad>"))
    return answer_loss(states, batch.questions, batch.cue, embeddings, word_id("</s>"))


def _optimizers(model, captioner, stage):
    """List of (optimizer, peak learning rate): Muon for matrices; AdamW for embeddings, convolution, biases, norms."""
    modules = [model.projector]
    if stage.answers:
        modules.append(model.llm.model)
    if stage.train_tower:
        tower = model.tower
        # Without the last layer: no loss depends on it, since LLaVA reads the layer before it.
        modules += [tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[:-1], captioner]
    matrices, others, seen = [], [model.image_newline] if stage.answers else [], set()
    for module in modules:
        for name, p in module.named_parameters():
            if id(p) not in seen:
                seen.add(id(p))
                embedding = any(part in name for part in ("embed", "pairs", "kinds", "colors"))
                (matrices if p.ndim == 2 and not embedding else others).append(p)
    # Without answers the word embeddings are not trained: the alignment loss then reads them as the LLM knows them.
    return [
        (Muon(matrices, lr=stage.lr), stage.lr),
        (torch.optim.AdamW(others, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0), stage.lr),
    ]


def _schedule(step, steps):
    """Factor of the learning rate: linear warm-up, then a cosine down to 2 % of the peak."""
    warm = min(_WARMUP, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def validate(model, recipe, cache, captions=False, batch=16):
    """Accuracy on the validation split by question type and over "all".

    Each picture has 8 questions or, with `captions`, one caption, which is right as in losses.caption_loss.
    """
    model.eval()
    asked = Asked(captions=captions)
    pictures = picture_set(recipe.family, "validation", 0, recipe.validation_images, asked, recipe.pinpoints, cache)
    prefix = torch.tensor(prefix_ids())
    hits, kinds = [], []
    source = batches(pictures, batch, recipe.pinpoints, recipe.sizes.side)
    for part in progress_bar("validation", source, total=-(-len(pictures) // batch)):
        projected = model.projector(model.see(part.tiles)[:, 1:])
        image = image_embeddings(projected, model.image_newline, part.order)
        states = packed_forward(model.llm, prefix, image, part.questions, lengths=part.lengths)
        hits.append(_answers(captions, states, part, model.embeddings)[1].flatten())
        kinds.append(part.category.flatten())
    hits, kinds = torch.cat(hits).float(), torch.cat(kinds)
    result = {"all": float(hits.mean())}
    for number, name in enumerate(QUESTION_TYPES):
        if bool((kinds == number).any()):
            result[name] = float(hits[kinds == number].mean())
    return {name: round(value, 4) for name, value in result.items()}
