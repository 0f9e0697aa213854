"""Prompts of one request to Qwen2.5-VL: the places of their images, the tokens that stay, and their old columns.

The processor repeats the placeholder of an image once per vision token. A shortened prompt is therefore a choice of
columns of the whole prompt. Embeddings, positions and labels follow from that choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IGNORE_INDEX
from llava.integrations.transformers.received_attention import QwenSaliency
from llava.methods.before_llm import ImageTokens, Selection, select_all
from llava.model.image_tokens import sample_key
from llava.model.prompt_rows import turn_around


class QwenPrompts:
    """B prompts of S columns and their images. After `shorten` it also holds the shortened prompts of L columns.

    ids [B, S], grid [I, 3] (of I images) and pixels: as the processor returns them. UserError if they do not match.

    mask        [B, L] int64 mask of the shortened prompts, padded left
    columns     [B, L] the column of each token in the whole prompt; any value in the padding
    dropped     [B, 1] number of tokens that each prompt lost
    selections  the Selection of each image, in reading order
    """

    def __init__(self, model, ids: Tensor, pixels: Tensor, grid: Tensor, config: AdaVConfig):
        self.model, self.config = model, config
        self.rows, self.length = ids.shape
        self._method = config.make_method()
        tower = model.model.visual
        if (grid[:, 0] != 1).any():
            raise UserError("image_grid_thw has several frames, allowed under compress() are images, and no videos")
        side = tower.spatial_merge_size
        self._sizes = [(height // side, width // side) for _, height, width in grid.tolist()]
        self._places = self._find(ids)
        self._features = None
        if self._method.needs_image:
            with QwenSaliency(tower) as saliency:
                self._features = model.get_image_features(pixels, grid, return_dict=True).pooler_output
            self._saliency = saliency.of(grid)

    def _find(self, ids: Tensor) -> list[tuple[int, Tensor]]:
        """(row, columns [N] of the placeholders) of each image, in reading order."""
        sizes = [height * width for height, width in self._sizes]
        rows, columns = torch.nonzero(ids == self.model.config.image_token_id, as_tuple=True)
        if sum(sizes) != len(rows):
            raise UserError(
                f"the prompts have {len(rows)} image placeholders, but the images of image_grid_thw have {sum(sizes)} tokens"
            )
        parts = list(zip(rows.split(sizes), columns.split(sizes), strict=True))
        if any(row[0] != row[-1] for row, _ in parts):
            raise UserError("the placeholders of an image lie in two prompts, allowed is one image after the other")
        return [(int(row[0]), own) for row, own in parts]

    def shorten(self, ids: Tensor, attention_mask: Tensor | None, markers, labels: Tensor | None = None) -> Tensor:
        """Select the tokens of every image. Returns the embeddings [B, L, D] of the shortened prompts.

        attention_mask: [B, S], or None for rows without padding.
        markers: turn markers for text_scope "turn"; empty for text_scope "after".
        labels: [B, S]. Tokens with a label are not part of the question: a selector in training would see the answer.
        """
        # 1. Which columns are real tokens, and which of them may be part of a question.
        words = self.model.get_input_embeddings()
        ids = ids.to(words.weight.device)
        real = (
            torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device).bool()
        )
        said = real if labels is None else real & (labels.to(ids.device) == IGNORE_INDEX)
        # 2. Select the tokens of all images of the batch together.
        if self._features is None:
            self.selections = [_no_tokens(words.weight) for _ in self._places]
        else:
            seen = [self._seen(nth, ids, real) for nth in range(len(self._places))]
            asked = [self._question(ids[row], said[row], columns, markers) for row, columns in self._places]
            texts = [words(ids[row][which]) for (row, _), which in zip(self._places, asked, strict=True)]
            options = self.config.method_options
            self.selections = select_all(self.config.method, seen, texts, self.config.overall_tokens, **options)
            self._features = self._saliency = None  # frees the memory of dropped tokens before the LLM runs
        # 3. The columns that stay: text, and the placeholders of kept tokens.
        keep = real.clone()
        for (row, columns), selection in zip(self._places, self.selections, strict=True):
            keep[row, columns] = False
            keep[row, columns[selection.indices.to(columns.device)]] = True
        counts = keep.sum(dim=1, keepdim=True)
        length = int(counts.max())
        # 4. Left-padded rows. A stable sort of 0 and 1 moves kept columns to the right end and keeps their order.
        self.columns = torch.argsort(keep.int(), dim=1, stable=True)[:, -length:]
        left = torch.arange(length, device=ids.device) >= length - counts
        self.mask, self.dropped = left.long(), real.sum(dim=1, keepdim=True) - counts
        # 5. Embeddings. Boolean indexing runs row by row, and so do the features of the images in reading order.
        kept_ids = ids[keep]
        rows = words(kept_ids)
        is_image = kept_ids == self.model.config.image_token_id
        rows = rows.index_put((is_image,), torch.cat([selection.features for selection in self.selections]).to(rows))
        return rows.new_zeros(*left.shape, rows.shape[-1]).index_put((left,), rows)

    def _seen(self, nth: int, ids: Tensor, real: Tensor) -> ImageTokens:
        """ImageTokens of the nth image: one tile in raster order."""
        height, width = self._sizes[nth]
        number = torch.arange(height * width)
        row = self._places[nth][0]
        before = sum(other == row for other, _ in self._places[:nth])
        return ImageTokens(
            self._features[nth].to(self.model.get_input_embeddings().weight),
            self._saliency[nth],
            tile=torch.zeros_like(number),
            row=number // width,
            column=number % width,
            # Padding must not change the key, or `random` would depend on the other prompts of the batch.
            key=sample_key(ids[row][real[row]], (width, height), before),
        )

    def _question(self, ids: Tensor, said: Tensor, columns: Tensor, markers) -> Tensor:
        """Bool mask [S] of the ids that are the question about the image at `columns`."""
        config = self.model.config
        start, end = int(columns[-1]) + 1, len(ids)
        if markers:
            start, end = turn_around(ids.tolist(), int(columns[0]), markers)
        inside = torch.zeros_like(said)
        inside[start:end] = True
        image_marks = [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]
        return inside & said & ~torch.isin(ids, ids.new_tensor(image_marks))

    def positions(self, whole: Tensor) -> Tensor:
        """Positions [4, B, L] of the shortened prompts; whole [4, B, S]: order in the text, time, height, width.

        Kept tokens have their old time, height and width. The order in the text is counted again: transformers reads it
        only to see whether several texts are packed into one row, and takes a gap in it for the start of another text.
        """
        left = whole.gather(2, self.columns[None].to(whole.device).expand(4, -1, -1))
        mask = self.mask.to(whole.device)
        left[0] = mask.cumsum(dim=1) - 1
        return left.masked_fill(mask[None] == 0, 0)

    def labels(self, whole: Tensor) -> Tensor:
        """Labels [B, L] of the shortened prompts; whole: [B, S]. Padding has no loss."""
        left = whole.gather(1, self.columns.to(whole.device))
        return left.masked_fill(self.mask.to(whole.device) == 0, IGNORE_INDEX)


def _no_tokens(words: Tensor) -> Selection:
    """The empty Selection of an image under `no_image`, for which the tower does not run."""
    none = torch.empty(0, dtype=torch.long, device=words.device)
    return Selection(none, words[:0], none, none, none, words[:0, 0].float(), total=0)
