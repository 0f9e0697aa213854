"""Prompts of one request: the places of their images, the tokens that stay, and their old columns. For all families.

The processor repeats the placeholder of an image once per vision token. A shortened prompt is therefore a choice of
columns of the whole prompt. Embeddings, positions and labels follow from that choice.
"""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IGNORE_INDEX
from llava.integrations.transformers.families.base import Family
from llava.methods.before_llm import ImageTokens, Selection, select_all
from llava.methods.before_llm.scores import distance_from_mean
from llava.methods.inside_llm.base import Dropper
from llava.methods.kv_cache.base import RowSpans
from llava.model.decoding.adaptive_cache import AdaptiveCache, Caching
from llava.model.decoding.dropping import Dropping, PromptRow
from llava.model.decoding.layer_loop import on_one_device
from llava.model.image_tokens import sample_key
from llava.model.prompt_rows import turn_around


class Prompts:
    """B prompts of S columns and their images. After `shorten` it also holds the shortened prompts of L columns.

    ids [B, S], given: input_ids and the family's image_inputs, as the processor returns them; None where no prompt has an
    image. UserError if they do not match.

    mask        [B, L] int64 mask of the shortened prompts, padded left
    is_image    [B, L] True for vision tokens
    beside      VisionTokens.beside of the tokens that stay, [B, L, D'] each
    columns     [B, L] the column of each token in the whole prompt; any value in the padding
    dropped     [B, 1] number of tokens that each prompt lost
    selections  the Selection of each image, in reading order
    spans       RowSpans of the shortened prompts
    dropping    the cuts inside the LLM; None for a method before the LLM
    steps       decode steps at most; known once generate() has read its settings
    """

    dropping: Dropping | None = None
    steps: int | None = None

    def __init__(self, family: Family, ids: Tensor, given: dict, config: AdaVConfig):
        self.family, self.config = family, config
        self.rows, self.length = ids.shape
        self._layouts = [] if given[family.image_inputs[0]] is None else family.layouts(ids, given)
        self._places = self._find(ids)
        self._vision = None
        if self._layouts and config.make_method().needs_image:
            # The tower runs outside forward(), whose hook would bring the weights that belong to no submodule.
            # torch.compile does not notice the hook that reads saliency, so a compiled tower runs uncompiled.
            with align_module_device(family.model.model), torch.compiler.set_stance("force_eager"):
                self._vision = family.encode(given, self._layouts)

    def _find(self, ids: Tensor) -> list[tuple[int, Tensor]]:
        """(row, columns [N] of the placeholders) of each image, in reading order."""
        sizes = [len(layout) for layout in self._layouts]
        rows, columns = torch.nonzero(ids == self.family.image_token, as_tuple=True)
        if sum(sizes) != len(rows):
            raise UserError(
                f"the prompts have {len(rows)} image placeholders, but the {len(sizes)} images that came with them have "
                f"{sum(sizes)} tokens"
            )
        parts = list(zip(rows.split(sizes), columns.split(sizes), strict=True))
        if any(row[0] != row[-1] for row, _ in parts):
            raise UserError("the placeholders of an image lie in two prompts, allowed is one image after the other")
        if any(own[-1] - own[0] != len(own) - 1 for _, own in parts):
            raise UserError("the placeholders of an image have other tokens between them, allowed is an unbroken run")
        return [(int(row[0]), own) for row, own in parts]

    def shorten(self, ids: Tensor, attention_mask: Tensor | None, markers, labels: Tensor | None = None) -> Tensor:
        """Select the tokens of every image. Returns the embeddings [B, L, D] of the shortened prompts.

        attention_mask: [B, S], or None for rows without padding.
        markers: turn markers for text_scope "turn"; empty for text_scope "after".
        labels: [B, S]. Tokens with a label are not part of the question: a selector in training would see the answer.
        """
        # 1. Embeddings of all ids. They are called as a module, because the weights of an offloaded one are elsewhere.
        embedding = self.family.model.get_input_embeddings()
        words = embedding(ids if embedding.weight.is_meta else ids.to(embedding.weight.device))
        ids = ids.to(words.device)
        # 2. Which columns are real tokens, and which of them may be part of a question.
        real = (
            torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device).bool()
        )
        said = real if labels is None else real & (labels.to(ids.device) == IGNORE_INDEX)
        # 3. Select the tokens of all images of the batch together.
        if self._vision is None:
            self.selections = [_no_tokens(words[0], len(layout)) for layout in self._layouts]
        else:
            seen = [self._seen(nth, ids, real, words) for nth in range(len(self._places))]
            asked = [self._question(ids[row], said[row], columns, markers) for row, columns in self._places]
            texts = [words[row][which] for (row, _), which in zip(self._places, asked, strict=True)]
            method, budget = self.config.make_method(), self.config.overall_tokens
            if isinstance(method, Dropper):
                self.selections = select_all("none", seen, texts, budget)
                self.dropping = self._dropping(method.with_kept_positions(), real, asked)
            else:
                self.selections = select_all(self.config.method, seen, texts, budget, **self.config.method_options)
        # 4. The columns that stay: text, and the placeholders of kept tokens.
        keep = real.clone()
        for (row, columns), selection in zip(self._places, self.selections, strict=True):
            keep[row, columns] = False
            keep[row, columns.to(ids.device)[selection.indices.to(ids.device)]] = True
        counts = keep.sum(dim=1, keepdim=True)
        length = int(counts.max())
        # 5. Left-padded rows. A stable sort of 0 and 1 moves kept columns to the right end and keeps their order.
        self.columns = torch.argsort(keep.int(), dim=1, stable=True)[:, -length:]
        left = torch.arange(length, device=ids.device) >= length - counts
        self.spans = self._spans(keep)
        self.mask, self.dropped = left.long(), real.sum(dim=1, keepdim=True) - counts
        self.is_image = left & (ids.gather(1, self.columns) == self.family.image_token)
        # 6. Embeddings. Boolean indexing runs row by row, and so do the features of the images in reading order.
        rows = words.new_zeros(*left.shape, words.shape[-1]).index_put((left,), words[keep])
        features = torch.cat([words[0, :0], *(selection.features for selection in self.selections)])
        self.beside = self._beside()
        self._vision = None  # frees the memory of dropped tokens before the LLM runs
        return rows.index_put((self.is_image,), features.to(rows))

    def _dropping(self, dropper: Dropper, real: Tensor, asked: list[Tensor]) -> Dropping:
        """The cuts of `dropper` in these prompts. asked: per image, bool [S] of its question."""
        layers = self.family.model.config.get_text_config().num_hidden_layers
        slots = real.long().cumsum(dim=1) - 1  # of each column in its row without padding
        rows = []
        for row, columns in enumerate(real):
            images, text = [], []
            for (other, own), question in zip(self._places, asked, strict=True):
                if other == row:
                    start = int(slots[row, own[0]])
                    images.append((start, len(own)))
                    behind = slots[row][question]
                    # Text before an image cannot attend to it.
                    text.append(behind[behind > start])
            rows.append(PromptRow(int(columns.sum()), images, text))
        return Dropping(dropper, self.config.overall_tokens, layers, rows)

    def _spans(self, keep: Tensor) -> list[RowSpans]:
        """RowSpans of the shortened prompts. keep [B, S]: columns that stay."""
        images = [[] for _ in range(self.rows)]
        for (row, columns), selection in zip(self._places, self.selections, strict=True):
            images[row].append((int(keep[row, : columns[0]].sum()), len(selection.indices)))
        return [RowSpans(int(own.sum()), spans) for own, spans in zip(keep, images, strict=True)]

    def adaptive_cache(self, whole: Tensor) -> AdaptiveCache:
        """The empty adaptive cache of this request. whole [B, S]: positions of the whole prompts, of one dimension."""
        layers = self.family.model.model.language_model.layers
        policy, one = self.config.make_cache_policy(), on_one_device(layers)
        return Caching(policy, len(layers), self.spans, whole[:, -1:] + 1, one_device=one).cache(self.steps)

    def note_survivors(self) -> None:
        """After prefill, add the places of the cuts and the kept slots to the report of each image's selection."""
        if self.dropping is None:
            return
        seen = [0] * self.rows
        for (row, _), selection in zip(self._places, self.selections, strict=True):
            selection.report["survivors"] = self.dropping.survivors(row, seen[row])
            selection.report["cuts"] = self.dropping.places(row, seen[row])
            seen[row] += 1

    def _beside(self) -> list[Tensor]:
        """Other states of the tokens that stay, [B, L, D'] each, zero for text."""
        if self._vision is None or not self._vision.beside:
            return []
        kept = [
            [states[selection.indices.to(states.device)] for states in own]
            for own, selection in zip(self._vision.beside, self.selections, strict=True)
        ]
        padded = []
        for parts in zip(*kept, strict=True):
            states = torch.cat(parts).to(self.is_image.device)
            zeros = states.new_zeros(*self.is_image.shape, states.shape[-1])
            padded.append(zeros.index_put((self.is_image,), states))
        return padded

    def _seen(self, nth: int, ids: Tensor, real: Tensor, words: Tensor) -> ImageTokens:
        """ImageTokens of the nth image."""
        layout, row = self._layouts[nth], self._places[nth][0]
        features, saliency = self._vision.features[nth].to(words), self._vision.saliency[nth]
        if self.config.option("saliency") == "distance":
            saliency = distance_from_mean(features, layout.tile >= 0)
        before = sum(other == row for other, _ in self._places[:nth])
        return ImageTokens(
            features,
            saliency,
            tile=layout.tile,
            row=layout.row,
            column=layout.column,
            # Padding must not change the key, or `random` would depend on the other prompts of the batch.
            key=sample_key(ids[row][real[row]], layout.size, before),
        )

    def _question(self, ids: Tensor, said: Tensor, columns: Tensor, markers) -> Tensor:
        """Bool mask [S] of the ids that are the question about the image at `columns`."""
        start, end = int(columns[-1]) + 1, len(ids)
        if markers:
            start, end = turn_around(ids.tolist(), int(columns[0]), markers)
        inside = torch.zeros_like(said)
        inside[start:end] = True
        return inside & said & ~torch.isin(ids, ids.new_tensor(self.family.marks))

    def positions(self, whole: Tensor) -> Tensor:
        """Positions [..., B, L] of the shortened prompts, from those of the whole prompts.

        whole: [B, S], or [4, B, S] under M-RoPE: order in the text, time, height, width.
        Kept tokens have their old positions. Under M-RoPE, the order in the text is counted again: transformers reads it
        only to see whether several texts are packed into one row, and takes a gap in it for the start of another text.
        """
        columns, mask = self.columns.to(whole.device), self.mask.to(whole.device)
        left = whole.gather(-1, columns.expand(*whole.shape[:-1], -1))
        if whole.dim() == 3:
            left[0] = mask.cumsum(dim=1) - 1
        return left.masked_fill(mask == 0, 0)

    def labels(self, whole: Tensor) -> Tensor:
        """Labels [B, L] of the shortened prompts; whole: [B, S]. Padding has no loss."""
        left = whole.gather(1, self.columns.to(whole.device))
        return left.masked_fill(self.mask.to(whole.device) == 0, IGNORE_INDEX)


def _no_tokens(words: Tensor, total: int) -> Selection:
    """The empty Selection of an image of `total` tokens under `no_image`, for which the tower does not run."""
    none = torch.empty(0, dtype=torch.long, device=words.device)
    return Selection(none, words[:0], none, none, none, words[:0, 0].float(), total=total)
