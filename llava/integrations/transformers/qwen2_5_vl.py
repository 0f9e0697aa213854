"""QwenCompression: fewer vision tokens in transformers' Qwen2.5-VL, chosen before the LLM, at their own M-RoPE positions.

    with compress(model, method="adav", overall_tokens=256):
        output = model.generate(**processor(images=images, text=prompts, return_tensors="pt", padding=True))

The tower has no [CLS] token: saliency is the attention that a token's patches receive (received_attention.py). A vision
token is what the tower's merger makes of 2 x 2 patches; its features and the word embeddings are compared as in LLaVA.
Kept tokens keep their (time, height, width) positions of the whole prompt, and the text goes on where it would without
compression: dropping a token is the same as hiding it from all others, but it costs nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from llava.config import method_class
from llava.conversation import turn_markers
from llava.errors import UserError
from llava.integrations.transformers.base import Compression
from llava.integrations.transformers.received_attention import QwenSaliency
from llava.model.llava_arch import sample_key
from llava.model.prompt_rows import turn_around
from llava.model.token_dropping import dropper_names
from llava.model.token_selection import ImageTokens, Selection, select_all

NAME = "Qwen2.5-VL"


@dataclass
class Request:
    """One call of generate(): its images as the tower saw them, and the prompt, once prefill has begun, as the LLM reads it.

    rows      B, prompts; length: S, of all of them before compression, padding included
    grid      per image: height and width in merged tokens; places: where its placeholders are, (row, columns [N])
    features  per image [N, D], and saliency [N]; None where no image is looked at
    mask      [B, L] of what is left of the prompts, left-padded; None before prefill
    """

    rows: int
    length: int
    grid: list[tuple[int, int]]
    places: list[tuple[int, Tensor]]
    features: list[Tensor] | None = None
    saliency: list[Tensor] | None = None
    mask: Tensor | None = None


class QwenCompression(Compression):
    """compress() of one Qwen2_5_VLForConditionalGeneration. generate() is compressed; forward() by itself is not.

    Selectors that read features, saliency and words go: adav, adav_cover, t2i, cls, mix, fastervlm (an image is one tile),
    divprune, cdpruner (by embeddings), random, none, no_image, and a user's own. The words of a question are the text behind
    its image, without the markers around images; text_scope "turn" needs `processor`. options.positions is always
    "original" here. Refused: videos, methods inside the LLM, adaptive KV caches, and methods that need [CLS] or square tiles.
    """

    # --- what can be compressed -------------------------------------------------------------------------------------

    def redirections(self):
        if not isinstance(self.model, Qwen2_5_VLForConditionalGeneration):
            raise UserError(
                f"compress() got a {type(self.model).__name__}, allowed for {NAME} is a "
                "Qwen2_5_VLForConditionalGeneration"
            )
        self._method = self._checked_method()
        self._markers = self._turn_markers() if self.config.option("text_scope") == "turn" else ()
        self._rope_deltas = self.model.model.rope_deltas
        self._generate, self._prepare = self.model.generate, self.model.prepare_inputs_for_generation
        return {"generate": self.generate, "prepare_inputs_for_generation": self.prepare_inputs_for_generation}

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.model.model.rope_deltas = self._rope_deltas

    def _checked_method(self) -> type:
        """The method's class; UserError where the configuration asks for what this family does not have."""
        config = self.config
        name, given = config.method, config.options
        if name in dropper_names():
            raise UserError(f'method "{name}" acts inside the LLM, allowed for {NAME} are methods before the LLM')
        if config.prefill_filter_flag:
            raise UserError(f'"prefill_filter_flag" is true, allowed for {NAME} are methods before the LLM alone')
        if config.cache_policy != "full":
            raise UserError(
                f'the configuration asks for the KV cache policy "{config.cache_policy}", allowed for {NAME} are methods '
                "before the LLM alone"
            )
        method = method_class(name)
        needed = method(**config.options_of(method)).tower_states
        if needed:
            raise UserError(
                f'method "{name}" reads {" and ".join(needed)} of a CLIP tower with [CLS] and square tiles, which {NAME} '
                "does not have"
            )
        if given.get("positions") == "reindexed":
            raise UserError(f'"options.positions" is "reindexed", allowed for {NAME} is "original", its default there')
        for option, value in (("compat", "public"), ("anyres", "fastervlm")):
            if given.get(option) == value:
                raise UserError(
                    f'"options.{option}" is "{value}", a rule for LLaVA\'s tiles, which {NAME} does not have'
                )
        for option in config.unused_options(method):
            warnings.warn(f'options.{option} is set, but method "{name}" does not use it', stacklevel=4)
        return method

    def _turn_markers(self) -> tuple[tuple[int, ...], ...]:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if tokenizer is None:
            raise UserError(
                '"options.text_scope" is "turn", which needs compress(..., processor=...) to know the turns'
            )
        return turn_markers("chatml_direct", tokenizer)

    # --- generate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *others, **kwargs):
        """In place of the model's generate(): its arguments, and its result, prompt and new tokens."""
        self._check_request(generation_config, kwargs)
        pixels, grid = kwargs.pop("pixel_values", None), kwargs.get("image_grid_thw")
        if pixels is None:
            self.last_selection = []
            return self._generate(inputs, generation_config, *others, **kwargs)
        ids = kwargs.get("input_ids", inputs)
        if ids is None or grid is None:
            raise UserError(
                "pixel_values came without input_ids or image_grid_thw, and a prompt with images has all three"
            )
        side = self.model.model.visual.spatial_merge_size
        if (grid[:, 0] != 1).any():
            raise UserError("image_grid_thw has several frames, allowed under compress() are images, and no videos")
        merged = [(height // side, width // side) for _, height, width in grid.tolist()]
        request = Request(*ids.shape, merged, self._places(merged, ids))
        if self._method.needs_image:
            with QwenSaliency(self.model.model.visual) as saliency:
                request.features = self.model.get_image_features(pixels, grid, return_dict=True).pooler_output
            request.saliency = saliency.of(grid)
        return self._generate(inputs, generation_config, *others, request=request, **kwargs)

    def _check_request(self, generation_config, kwargs: dict) -> None:
        for name in ("pixel_values_videos", "video_grid_thw"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name} came with the prompt, allowed under compress() are images, and no videos")
        for name in ("inputs_embeds", "position_ids", "mm_encoder_outputs"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name} came with the prompt, but compress() makes it itself: leave it out")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise UserError(
                "past_key_values holds an earlier prompt, allowed under compress() is the whole prompt anew"
            )
        settings = generation_config or self.model.generation_config
        for name, asked in (
            ("no KV cache", kwargs.get("use_cache", settings.use_cache) is False),
            ("prefill in chunks", kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None),
            (
                "assisted generation",
                any(kwargs.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens")),
            ),
        ):
            if asked:
                raise UserError(
                    f"generate() was asked for {name}, allowed under compress() are greedy search, sampling and beams with a "
                    "KV cache and prefill in one piece"
                )

    def prepare_inputs_for_generation(self, input_ids, request: Request | None = None, **kwargs):
        """In place of the model's: in prefill the LLM reads what is left of the prompts, and in each step its mask is that.

        generate() itself goes on with the whole prompts: what it returns, lengths and positions of new tokens are those of
        a run without compression.
        """
        if request is None:
            return self._prepare(input_ids, **kwargs)
        copies = len(input_ids) // request.rows  # of each prompt: beams, or several answers
        if kwargs.get("is_first_iteration"):
            embeds, columns = self._shorten(request, input_ids[::copies], kwargs.get("attention_mask"), copies)
            kwargs["inputs_embeds"] = embeds.repeat_interleave(copies, dim=0)
            positions = kwargs["position_ids"][:, ::copies]
            kwargs["position_ids"] = self._positions(request, positions, columns).repeat_interleave(copies, dim=1)
            kwargs["next_sequence_length"] = None
        # The placeholders are gone, and with them what says where they are.
        kwargs["mm_token_type_ids"] = None
        kwargs.pop("image_grid_thw", None)
        mask = torch.nn.functional.pad(request.mask, (0, input_ids.shape[1] - request.length), value=1)
        kwargs["attention_mask"] = None if mask.all() else mask.repeat_interleave(copies, dim=0)
        return self._prepare(input_ids, **kwargs)

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _shorten(
        self, request: Request, ids: Tensor, attention_mask: Tensor | None, copies: int
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens of every image. Returns embeddings [B, L, D] of what is left, padded left, and its columns [B, L]
        in `ids` [B, S], and sets request.mask."""
        words = self.model.get_input_embeddings()
        ids = ids.to(words.weight.device)
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[::copies].to(ids.device).bool()
        if request.features is None:
            selections = [_no_tokens(words.weight) for _ in request.places]
        else:
            seen = [self._seen(request, nth, ids, real) for nth in range(len(request.places))]
            asked = [self._question(ids[row], real[row], columns) for row, columns in request.places]
            texts = [words(ids[row][which]) for (row, _), which in zip(request.places, asked, strict=True)]
            options = self.config.options_of(self._method)
            selections = select_all(self.config.method, seen, texts, self.config.overall_tokens, **options)
        self.last_selection = selections

        keep = real.clone()
        for (row, columns), selection in zip(request.places, selections, strict=True):
            keep[row, columns] = False
            keep[row, columns[selection.indices.to(columns.device)]] = True
        counts = keep.sum(dim=1)
        length = int(counts.max())
        # Kept columns in order at the right end; what is before them in a shorter row is masked.
        columns = torch.argsort(keep.int(), dim=1, stable=True)[:, -length:]
        mask = torch.arange(length, device=ids.device) >= length - counts[:, None]
        kept_ids = ids[keep]
        left = words(kept_ids)
        left[kept_ids == self.model.config.image_token_id] = torch.cat([one.features for one in selections]).to(left)
        embeds = left.new_zeros(*mask.shape, left.shape[-1])
        embeds[mask] = left
        request.mask, request.features, request.saliency = mask.long(), None, None
        dropped = (real.sum(dim=1) - counts)[:, None]
        self.model.model.rope_deltas = self.model.model.rope_deltas + dropped.to(self.model.model.rope_deltas.device)
        return embeds, columns

    def _places(self, grid: list[tuple[int, int]], ids: Tensor) -> list[tuple[int, Tensor]]:
        """Per image, in reading order: its row, and the columns [N] of its placeholders."""
        sizes = [height * width for height, width in grid]
        rows, columns = torch.nonzero(ids == self.model.config.image_token_id, as_tuple=True)
        if sum(sizes) != len(rows):
            raise UserError(
                f"the prompts have {len(rows)} image placeholders, but the images of image_grid_thw have {sum(sizes)} tokens"
            )
        parts = list(zip(rows.split(sizes), columns.split(sizes), strict=True))
        if any(row[0] != row[-1] for row, _ in parts):
            raise UserError("the placeholders of an image lie in two prompts, allowed is one image after the other")
        return [(int(row[0]), own) for row, own in parts]

    def _seen(self, request: Request, nth: int, ids: Tensor, real: Tensor) -> ImageTokens:
        """What a selector sees of the nth image."""
        height, width = request.grid[nth]
        number = torch.arange(height * width)
        row = request.places[nth][0]
        before = sum(other == row for other, _ in request.places[:nth])
        return ImageTokens(
            request.features[nth].to(self.model.get_input_embeddings().weight),
            request.saliency[nth],
            tile=torch.zeros_like(number),
            row=number // width,
            column=number % width,
            key=sample_key(ids[row][real[row]], (width, height), before),
        )

    def _question(self, ids: Tensor, real: Tensor, columns: Tensor) -> Tensor:
        """[S] which ids of a prompt are the text that is asked about the image at `columns`."""
        config = self.model.config
        start, end = int(columns[-1]) + 1, len(ids)
        if self._markers:
            start, end = turn_around(ids.tolist(), int(columns[0]), self._markers)
        inside = torch.zeros_like(real)
        inside[start:end] = True
        markers = (
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        return inside & real & ~torch.isin(ids, ids.new_tensor(markers))

    def _positions(self, request: Request, positions: Tensor, columns: Tensor) -> Tensor:
        """positions [4, B, S] of the whole prompts (order in the text, time, height, width) -> [4, B, L] of what is left.

        The last three are those that the tokens had. The first is only read to see whether several texts were packed into
        one row: a gap in it would look like that, so it is counted anew.
        """
        left = positions.gather(2, columns[None].to(positions.device).expand(4, -1, -1))
        mask = request.mask.to(positions.device)
        left[0] = mask.cumsum(dim=1) - 1
        return left.masked_fill(mask[None] == 0, 0)


def _no_tokens(words: Tensor) -> Selection:
    """`no_image`: the tower did not even run."""
    none = torch.empty(0, dtype=torch.long, device=words.device)
    return Selection(none, words[:0], none, none, none, words[:0, 0].float(), total=0)
