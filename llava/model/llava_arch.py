"""Images + prompt -> one embedded sequence. Token selection happens here, before the LLM reads anything.

`LlavaMetaModel` adds tower, projector and newline embedding to an LLM; `LlavaMetaForCausalLM` adds `prepare`, which
turns token ids with image placeholders into a `PreparedPrompt` (prepared.py), and a `forward` that starts from one;
`generate` is in generation.py.
`encode` is the part of it that no question changes. Whatever belongs to one request lives in its PreparedPrompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from llava.common.errors import UserError
from llava.common.transfer import to_device, to_host, to_host_together
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.methods.before_llm import ImageTokens, Selection, TowerStates, select_all
from llava.methods.before_llm.base import TokenPlaces
from llava.methods.inside_llm import dropper_names
from llava.methods.inside_llm.prefill_filter import PrefillFilter
from llava.methods.kv_cache.base import RowSpans
from llava.mm_utils import NEWLINE, TilePlan, merge_order, tile_plan
from llava.model.decoding.adaptive_cache import Caching
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.dropping import Dropping
from llava.model.decoding.generation import LlavaGeneration, check_cache
from llava.model.decoding.prepared import PreparedPrompt, StageClock
from llava.model.encoded_images import EncodedImage
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.clip_text_tower import ClipTextTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prompt_rows import (
    Row,
    batch_of,
    embed,
    image_places,
    labels_of,
    prompt_row,
    question_embeddings,
    question_of,
    real_tokens,
    splice,
)


class LlavaMetaModel:
    """Mixin for an LLM's base model: vision_tower, mm_projector and, where checkpoints have one, image_newline."""

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = CLIPVisionTower(config.vision, config.mm_vision_select_layer)
        self.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))


class LlavaMetaForCausalLM(LlavaGeneration):
    """Mixin for an LLM with a language-modelling head: images in, tokens out.

    adav_config   AdaVConfig of the model (the plain model unless the builder was given one)
    turn_markers  token ids of the conversation template's turn markers, for text_scope="turn"
    question_words  token ids -> string, for methods that read the question with another model's tokenizer
    last_selection  what was kept for the last batch, per image; a convenience for notebooks. Under a method inside the
                  LLM its report["survivors"] has the slots that are left after each cut, and report["cuts"] where it was.
    """

    # Layers of the tower above the one whose features are used, buffers that old versions saved, and the newline token
    # where mm_patch_merge_type has no use for it. Any other weight without a place is an error (Checkpoint.load).
    _keys_to_ignore_on_load_unexpected = [
        r"rotary_emb\.inv_freq",
        r"image_newline",
        r"vision_tower\..*position_ids",
        r"vision_tower\..*post_layernorm",
        r"vision_tower\..*encoder\.layers\.\d+\.",
    ]
    adav_config = AdaVConfig(method="none")
    turn_markers: tuple[tuple[int, ...], ...] = ()
    question_words: Callable[[list[int]], str] | None = None
    _text_tower: ClipTextTower | None = None
    last_selection: list[Selection] | None = None

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.model.vision_tower

    # --- images -----------------------------------------------------------------------------------------------

    def _plans(self, images, image_sizes, anyres: str) -> tuple[list[Tensor], list[TilePlan]]:
        """Flat list of pixel tensors [T, 3, H, W] and the tile plan of each."""
        side = self.config.mm_tile_size
        images = _images_of(images)
        if image_sizes is not None and len(image_sizes) != len(images):
            raise UserError(f"{len(images)} images came with {len(image_sizes)} image_sizes, allowed is one size each")
        pixels, plans = [], []
        for i, image in enumerate(images):
            if not isinstance(image, Tensor):
                raise UserError(
                    f"image {i} is of type {type(image).__name__}, allowed is a tensor as process_images gives it"
                )
            tiles = image[None] if image.dim() == 3 else image
            if tiles.dim() != 4 or tuple(tiles.shape[1:]) != (3, side, side):
                raise UserError(
                    f"image {i} has shape {list(image.shape)}, allowed is [3, {side}, {side}] or [tiles, 3, {side}, {side}]"
                )
            if tiles.shape[0] > 1 and image_sizes is None:
                raise UserError(f"image {i} has {tiles.shape[0]} tiles, so image_sizes is needed: (width, height) each")
            size = image_sizes[i] if image_sizes is not None else (side, side)
            plan = tile_plan([int(x) for x in size], self.config, anyres)
            # transformers pads a batch to the largest number of tiles; a single tile stands for an image left whole.
            if tiles.shape[0] > 1:
                if tiles.shape[0] < plan.tiles:
                    raise UserError(
                        f"image {i} of {plan.image_size[0]} x {plan.image_size[1]} pixels has {tiles.shape[0]} tiles, "
                        f'but its grid under anyres "{anyres}" has {plan.tiles}'
                    )
                tiles = tiles[: plan.tiles]
            pixels.append(tiles)
            plans.append(plan)
        return pixels, plans

    def slots(self, images, image_sizes=None, config: AdaVConfig | None = None) -> list[int]:
        """Tokens that each image (as `prepare` takes them) has before any are dropped, newline tokens included."""
        pixels, plans = self._plans(images, image_sizes, (config or self.adav_config).option("anyres"))
        side = self.get_vision_tower().num_patches_per_side
        return [len(merge_order(plan, side, len(tiles))) for tiles, plan in zip(pixels, plans, strict=True)]

    def encode_images(
        self, pixels: list[Tensor], clock: StageClock, wanted: tuple[str, ...] = (), project: bool = True
    ) -> list[tuple[Tensor, Tensor, TowerStates]]:
        """[T_i, 3, H, W] each -> per image projected patches [T_i, P, D] (or the tower's own, [T_i, P, W]), [CLS] attention
        [T_i, P], and what a method wants of the tower (Selector.tower_states; `text_cosine` belongs to a question and is
        not filled in here)."""
        counts = [p.shape[0] for p in pixels]
        if "text_cosine" in wanted:
            wanted = (*wanted, "hidden")
        with clock.stage("vision_tower"):
            tower = self.get_vision_tower()
            features, saliency, states = tower(torch.cat([to_device(one, tower.device) for one in pixels]), wanted)
        if project:
            with clock.stage("projector"):
                features = self._project(features)
        split = {name: state.split(counts) for name, state in states.items()}
        towers = [
            # Copies: an image may be kept for longer than the batch that a view would keep alive.
            TowerStates(self._project, **{name: parts[i].clone() for name, parts in split.items()})
            for i in range(len(pixels))
        ]
        return list(zip(features.split(counts), saliency.split(counts), towers, strict=True))

    def encoding(self, config: AdaVConfig) -> tuple:
        """All of a configuration that `encode` depends on; two configurations with equal ones may share its results."""
        method = config.make_method()
        # Whether all patches go through the projector depends on how many are kept.
        kept = None if method.reads_features else (repr(method), config.overall_tokens)
        return config.option("anyres"), method.needs_image, tuple(method.tower_states), kept

    def encode(self, images, image_sizes=None, config: AdaVConfig | None = None, clock=None) -> list[EncodedImage]:
        """Images (as `prepare` takes them) -> their vision tokens in LLM order, before any question is known.

        `prepare` takes the results as `encoded`: the same one as often as questions share the image.
        """
        config = config or self.adav_config
        words = self.get_input_embeddings().weight
        clock = clock or StageClock(words.device)
        anyres, needs_image, wanted, _ = self.encoding(config)
        pixels, plans = self._plans(images, image_sizes, anyres)
        if not pixels or not needs_image:
            return [EncodedImage(plan, None) for plan in plans]
        towers = self.encode_images(pixels, clock, wanted, project=False)
        with clock.stage("splice"):
            tokens = [
                self.image_tokens(features, saliency, plan, tower=tower, projected=False)
                for plan, (features, saliency, tower) in zip(plans, towers, strict=True)
            ]
            # Where the choice does not look at them, only the features that are kept go through the projector, then.
            late = [self._defers_projection(one, config) for one in tokens]
        with clock.stage("projector"):
            now = [one.features[one.patches] for one, later in zip(tokens, late, strict=True) if not later]
            features = iter(self._project_to_llm(torch.cat(now)).split([len(part) for part in now]) if now else ())
            for one, later in zip(tokens, late, strict=True):
                if not later:
                    one.features = self._with_newlines(next(features), one.patches, len(one.tile))
                    one.unprojected = None
        return [EncodedImage(plan, one) for plan, one in zip(plans, tokens, strict=True)]

    def _defers_projection(self, image: ImageTokens, config: AdaVConfig) -> bool:
        method = config.make_method()
        return not method.reads_features and method.num_kept(image, config.overall_tokens) < len(image.patches)

    def _project_to_llm(self, hidden: Tensor) -> Tensor:
        """[n, W] states of the tower -> [n, D] as the LLM reads them, beside its word embeddings."""
        words = self.get_input_embeddings().weight
        return self._project(hidden).to(words.device, words.dtype)

    def _with_newlines(self, features: Tensor, patches: Tensor, tokens: int) -> Tensor:
        """[N, D] of an image of N tokens: features [P, D] at `patches` [P], the newline embedding everywhere else."""
        if len(patches) == tokens:
            return features
        newlines = self.model.image_newline.to(features).expand(tokens, -1)
        return newlines.index_copy(0, patches.to(features.device), features)

    def _project(self, hidden: Tensor) -> Tensor:
        """[..., W] states of the tower -> [..., D], on the projector's device."""
        projector = next(self.model.mm_projector.parameters())
        return self.model.mm_projector(hidden.to(projector.device, projector.dtype))

    def text_tower(self, name: str) -> ClipTextTower:
        """The CLIP text tower that `options.text_tower` names: loaded when it is first asked for, and kept."""
        if self.question_words is None:
            raise UserError(
                f'options.text_tower is "{name}", but the checkpoint has no tokenizer to read questions with'
            )
        if self._text_tower is None or self._text_tower.name != name:
            self._text_tower = ClipTextTower.load(name, self.get_vision_tower())
        return self._text_tower

    def image_tokens(
        self,
        features: Tensor,
        saliency: Tensor,
        plan: TilePlan,
        key: int = 0,
        tower: TowerStates | None = None,
        projected: bool = True,
    ) -> ImageTokens:
        """Tiles [T, P, D] and [T, P] of one image -> its ImageTokens in LLM order, newline tokens in place.

        projected: False for the tower's own states, [T, P, W]: what is read of them goes through the projector.
        """
        tiles, _, width = features.shape
        layout = _layout(plan, self.get_vision_tower().num_patches_per_side, tiles)
        source, newline, tile, row, column = (
            layout.on(features.device, name) for name in ("source", "newline", "tile", "row", "column")
        )
        merged = features.reshape(-1, width)[source]
        scores = saliency.reshape(-1).to(features.device)[source]
        if layout.newlines:
            scores = scores.masked_fill(newline, float("nan"))
        if not projected:
            merged = merged.masked_fill(newline[:, None], 0)
            return ImageTokens(merged, scores, tile, row, column, key, tower, self._project_to_llm, layout)
        patches = layout.on(features.device, "patches")
        merged = self._with_newlines(merged[patches], patches, len(tile))
        return ImageTokens(merged, scores, tile, row, column, key, tower, places=layout)

    # --- prompt -----------------------------------------------------------------------------------------------

    def _row(self, ids: Tensor, labels: Tensor | None, scope: str) -> Row:
        """One row without padding, on the host: where its images and their questions lie."""
        places = image_places(ids)
        return Row(ids, labels, places, [question_of(ids, place, scope, self.turn_markers, labels) for place in places])

    def _select(
        self, rows: list[Row], words: Tensor, encoded: list[EncodedImage], config: AdaVConfig, method
    ) -> list[Selection]:
        """What the LLM reads of every image of a batch, in reading order. words: embeddings of all ids (embed)."""
        if encoded and not method.needs_image:
            return [_no_tokens(words) for _ in encoded]
        text_tower = method.text_tower if "text_cosine" in method.tower_states else None
        asked = [(row.ids, nth, question) for row in rows for nth, question in enumerate(row.questions)]
        images = []
        for one, (ids, nth, question) in zip(encoded, asked, strict=True):
            tower = one.tokens.tower
            if text_tower is not None:
                judged = self.text_tower(text_tower).cosine(
                    tower.hidden[:, 1:], self.question_words(ids[question].tolist())
                )
                tower = replace(tower, text_cosine=judged)
            images.append(replace(one.tokens, key=sample_key(ids, one.plan.image_size, nth), tower=tower))
        name, own = ("none", {}) if config.method in dropper_names() else (config.method, config.method_options)
        return select_all(name, images, question_embeddings(rows, words), config.overall_tokens, **own)

    def prepare(
        self,
        input_ids,
        images=None,
        image_sizes=None,
        attention_mask=None,
        labels=None,
        config: AdaVConfig | None = None,
        encoded: list[EncodedImage] | None = None,
    ) -> PreparedPrompt:
        """Encode the images, select their tokens, and splice them into the prompts.

        input_ids: [B, S] or [S], tensor or list, IMAGE_TOKEN_INDEX where an image goes; padding is told by attention_mask [B, S] or,
            without one, by leading pad tokens.
        images: flat over the batch in reading order (a row without placeholder consumes none): tensor or list of
            [3, H, W] or [T, 3, H, W], as process_images gives them; a tensor [3, H, W] is one image. image_sizes: (width, height) of each original.
        config: settings of this request; None takes the model's own.
        encoded: what `encode` gave for these images under the same settings, in place of images and image_sizes.
        Raises UserError where images and placeholders do not match or a shape is wrong.
        """
        config = config or self.adav_config
        input_ids = batch_of(input_ids)
        attention_mask = None if attention_mask is None else batch_of(attention_mask, "attention_mask")
        embedding = self.get_input_embeddings()
        device = embedding.weight.device
        clock = StageClock(device)
        # 1. Ids, padding and places are read on the host; what is on the device already comes over once.
        input_ids, attention_mask, labels = to_host_together(input_ids, attention_mask, labels)
        real = real_tokens(input_ids, attention_mask, self.config)
        scope = config.option("text_scope")
        rows = [self._row(ids, own, scope) for (ids, _), own in zip(real, labels_of(labels, real), strict=True)]
        placeholders = sum(len(row.places) for row in rows)
        given = encoded if encoded is not None else _images_of(images)
        if placeholders != len(given):
            raise UserError(
                f"the prompts have {placeholders} image placeholders, but {len(given)} images came with them"
            )
        config.check_method_options()
        method = config.make_method()
        # 2. Images through the vision tower, unless they come encoded.
        if encoded is None:
            encoded = self.encode(images, image_sizes, config, clock)
        # 3. Which of their tokens the LLM reads.
        with clock.stage("splice"):
            words = embed(rows, embedding, device)
        with clock.stage("selection"):
            kept = iter(self._select(rows, words, encoded, config, method))
            for row in rows:
                row.selections = [next(kept) for _ in row.places]
        # 4. The batch, and how the LLM is to run on it.
        with clock.stage("splice"):
            prepared = splice(rows, words, config.option("positions"))
        layers = self.config.num_hidden_layers
        dropper = method if config.method in dropper_names() else PrefillFilter.from_config(config)
        if dropper is not None:
            dropper.check(self.config)
            prepared.dropping = Dropping(dropper, config.overall_tokens, layers, [prompt_row(row) for row in rows])
        spans = [RowSpans(row.length, row.spans) for row in rows]
        following = prepared.position_ids[:, -1:] + 1 + prepared.position_offset
        dropping = prepared.dropping
        prepared.caching = Caching(
            config.make_cache_policy(),
            layers,
            spans,
            following,
            image_counts=None if dropping is None else dropping.image_counts(),
            numbering=None if dropping is None else dropping.numbering(),
            one_device=self.one_device,
        )
        prepared.clock = clock
        return prepared

    # --- the LLM ----------------------------------------------------------------------------------------------

    @property
    def one_device(self) -> bool:
        """Whether all layers of the LLM are on one device. Weights that are offloaded are on none ("meta")."""
        devices = {weight.device for layer in self.model.layers for weight in layer.parameters()}
        return len(devices) == 1 and next(iter(devices)).type != "meta"

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        images=None,
        image_sizes=None,
        logits_to_keep=0,
        cache=None,
        caching: Caching | None = None,
        **kwargs,
    ):
        """The LLM's forward; with images (or placeholders in input_ids) the prompt is prepared first.

        Logits are then those of the spliced, left-padded sequence; under a method that acts inside the LLM those of
        what is left of it, and so is the loss. Cached steps after such a prompt need its `dropping`, and under an
        adaptive KV cache its `caching` and past_key_values=caching.cache(steps): start from `prepare`, whose result has
        them. Without that, a prompt whose configuration asks for an adaptive cache leaves no cache behind.
        cache is transformers' newer name of past_key_values. logits_to_keep is named here because generate() looks for it in the signature: without it, prefill computes the
        logits of every position.
        """
        cache = past_key_values if cache is None else cache
        fresh = inputs_embeds is None and cache is None
        if fresh and (images is not None or bool((input_ids == IMAGE_TOKEN_INDEX).any())):
            prepared = self.prepare(input_ids, images, image_sizes, attention_mask, labels)
            input_ids, inputs_embeds, labels = None, prepared.inputs_embeds, prepared.labels
            attention_mask, position_ids = prepared.attention_mask, prepared.position_ids
            kwargs["dropping"] = prepared.dropping
            if prepared.caching.adaptive:
                if kwargs.get("use_cache"):
                    raise UserError(
                        "the configuration asks for an adaptive KV cache, which forward() cannot make by itself: start "
                        "from prepare(), whose result has caching.cache(steps)"
                    )
                kwargs["use_cache"] = False
        if caching is not None:
            check_cache(cache, caching)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **{CACHE: cache},
            **kwargs,
        )

    def loss_function(self, logits, labels, dropping: Dropping | None = None, **kwargs):
        """transformers' loss; labels [B, S] are those of the whole prompt, also where part of it was dropped."""
        if dropping is not None:
            labels = dropping.labels(labels)
        return super().loss_function(logits=logits, labels=labels, **kwargs)


def _images_of(images) -> Sequence[Tensor]:
    """The images of a batch one by one; a tensor [3, H, W] is one of them."""
    if images is None:
        return []
    if isinstance(images, Tensor):
        return images[None] if images.dim() == 3 else images
    if not isinstance(images, (list, tuple)):
        raise UserError(
            f"images is of type {type(images).__name__}, allowed is a tensor or a list of tensors as process_images gives them"
        )
    return images


def sample_key(ids: Tensor, image_size: tuple[int, int], place: int) -> int:
    """What identifies an image of a sample whatever batch it is in: prompt, image size, place among its images."""
    material = to_host(ids).numpy().astype("<i8").tobytes() + repr((tuple(image_size), place)).encode()
    return int.from_bytes(hashlib.blake2b(material, digest_size=7).digest(), "little")


class _Layout(TokenPlaces):
    """Where the tokens of an image of one tile plan lie. source [N]: which patch of the tower's output each of them is;
    newline [N]: which are newline tokens."""

    def __init__(self, order: Tensor, side: int):
        per_tile = side * side
        self.newline, self.source = order == NEWLINE, order.clamp(min=0)
        self.newlines = int(self.newline.sum())
        tile, row = self.source // per_tile, self.source % per_tile // side
        # A newline token ends a row of the merged crops: the number of newlines before it.
        row = torch.where(self.newline, self.newline.long().cumsum(0) - 1, row)
        super().__init__(tile.masked_fill(self.newline, -1), row, (self.source % side).masked_fill(self.newline, -1))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may next index what is trained
def _layout(plan: TilePlan, side: int, tiles: int) -> _Layout:
    """side: patches per side of a tile; tiles: how many there are."""
    return _Layout(merge_order(plan, side, tiles), side)


def _no_tokens(words: Tensor) -> Selection:
    """`no_image`: the tower did not even run."""
    none = torch.empty(0, dtype=torch.long, device=words.device)
    return Selection(none, words[:0], none, none, none, words[:0, 0].float(), total=0)
