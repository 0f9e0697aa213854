"""From images and a prompt to one embedded sequence. Token selection happens here, before the LLM reads anything.

`LlavaMetaModel` adds tower, projector and newline embedding to an LLM. `LlavaMetaForCausalLM` adds `prepare`, which
turns token ids with image placeholders into a `PreparedPrompt` (prepared.py), and a `forward` that can start from one.
`encode` is the part of `prepare` that does not depend on the question. `generate` is in generation.py. All state of one
request is in its PreparedPrompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava.common.errors import UserError
from llava.common.transfer import to_device, to_host_together
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.methods.before_llm import ImageTokens, Selection, TowerStates, select_all
from llava.methods.before_llm.detail import gradient_energy
from llava.methods.before_llm.downsample import cells
from llava.methods.inside_llm import dropper_names
from llava.methods.kv_cache.base import RowSpans
from llava.mm_utils import TilePlan, merge_order, tile_plan
from llava.model.decoding.adaptive_cache import Caching
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.dropping import Dropping
from llava.model.decoding.generation import LlavaGeneration, check_cache
from llava.model.decoding.layer_loop import on_one_device
from llava.model.decoding.prepared import PreparedPrompt, SharedPrefixes, StageClock, worth_sharing
from llava.model.encoded_images import EncodedImage
from llava.model.image_tokens import (
    Layout,
    layout_of,
    made_smaller,
    project_now,
    projects_late,
    sample_key,
    tokens_in_order,
    with_newlines,
)
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
    words_read,
)
from llava.model.zoom import LlavaZoom


class LlavaMetaModel:
    """Mixin for an LLM's base model: vision_tower, mm_projector and, where tiles are unpadded, image_newline."""

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = CLIPVisionTower(config.vision, config.mm_vision_select_layer)
        self.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))


class LlavaMetaForCausalLM(LlavaZoom, LlavaGeneration):
    """Mixin for an LLM with a language-modelling head: images in, tokens out.

    adav_config     AdaVConfig of the model; without one from the builder it is the plain model
    turn_markers    token ids of the conversation template's turn markers, for text_scope="turn"
    question_words  function from token ids to a string, for methods that read the words of a question
    word_ids        function from words to token ids, each word tokenised by itself
    last_selection  the Selection of each image of the last batch, a convenience for notebooks. Under a dropper,
                    report["survivors"] has the slots that are left after each cut, and report["cuts"] the places of
                    cuts.
    """

    # Weights that may be left over: later tower layers, buffers of old versions, and the newline token where
    # mm_patch_merge_type does not use it. Any other weight without a place is an error (Checkpoint.load).
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
    word_ids: Callable[[list[str]], list[int]] | None = None
    _text_tower: ClipTextTower | None = None
    last_selection: list[Selection] | None = None

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.model.vision_tower

    # --- images -----------------------------------------------------------------------------------------------

    def _plans(self, images, image_sizes, anyres: str) -> tuple[list[Tensor], list[TilePlan]]:
        """Return the pixel tensors [T, 3, H, W] of all images, and their tile plans.

        UserError for an image of a wrong shape, and for sizes that do not fit the tiles.
        """
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
            # transformers pads a batch to the largest number of tiles. A single tile is an image that was not cut.
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
        """Return the number of vision tokens N of each image before selection, newline tokens included.

        images, image_sizes: as `prepare` takes them
        """
        pixels, plans = self._plans(images, image_sizes, (config or self.adav_config).option("anyres"))
        side = self.get_vision_tower().num_patches_per_side
        return [len(merge_order(plan, side, len(tiles))) for tiles, plan in zip(pixels, plans, strict=True)]

    def encode_images(
        self, pixels: list[Tensor], clock: StageClock, wanted: tuple[str, ...] = (), project: bool = True
    ) -> list[tuple[Tensor, Tensor, TowerStates]]:
        """Return (features, saliency [T_i, P], TowerStates) of each image, from pixels [T_i, 3, H, W].

        features: projected patches [T_i, P, D], or the tower's states [T_i, P, W] for project=False
        wanted: states of the tower that a method reads (Selector.tower_states); `text_cosine` depends on a question and
            is not filled in here
        """
        counts = [p.shape[0] for p in pixels]
        # text_cosine is computed from the hidden states later, when the question is known (_select).
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
            # Copies: an image may be stored for long, and a view would keep the states of its whole batch in memory.
            TowerStates(self._project, **{name: parts[i].clone() for name, parts in split.items()})
            for i in range(len(pixels))
        ]
        return list(zip(features.split(counts), saliency.split(counts), towers, strict=True))

    def encoding(self, config: AdaVConfig) -> tuple:
        """Return the part of a configuration that `encode` depends on; results are shared where it is equal."""
        method = config.make_method()
        # Whether all patches go through the projector depends on the number of kept ones (projects_late).
        # So does the size of an image that is made smaller.
        kept = None if method.reads_features and not method.resizes else (repr(method), config.overall_tokens)
        own = tuple(method.tower_states), method.zooms, kept, config.detail_share > 0
        return config.option("anyres"), method.needs_image, *own

    def encode(self, images, image_sizes=None, config: AdaVConfig | None = None, clock=None) -> list[EncodedImage]:
        """Return the vision tokens of images in LLM order, independent of any question.

        images, image_sizes: as `prepare` takes them. `prepare` takes the results as `encoded`. Questions about the same
        image may share one result.
        """
        config = config or self.adav_config
        words = self.get_input_embeddings().weight
        clock = clock or StageClock(words.device)
        method = config.make_method()
        pixels, plans = self._plans(images, image_sizes, config.option("anyres"))
        if not method.needs_image:
            return [EncodedImage(plan, None) for plan in plans]
        # Of an image that is looked at first, the other tiles are encoded in `prepare`, where the question is known.
        looked = [i for i, tiles in enumerate(pixels) if method.zooms and len(tiles) > 1]
        whole = [i for i in range(len(pixels)) if i not in looked]
        own = ([values[i] for i in looked] for values in (pixels, plans))
        found = dict(zip(looked, self.look(*own, method, config.overall_tokens, clock), strict=True))
        own = ([values[i] for i in whole] for values in (pixels, plans))
        found |= zip(whole, self._encode_whole(*own, config, clock), strict=True)
        return [found[i] for i in range(len(pixels))]

    def _encode_whole(
        self, pixels: list[Tensor], plans: list[TilePlan], config: AdaVConfig, clock: StageClock
    ) -> list[EncodedImage]:
        """Encode all tiles of images, as `encode` returns them. pixels [T, 3, H, W] of each image."""
        if not pixels:
            return []
        method = config.make_method()
        # 1. All tiles of all images through the tower as one batch; of images that are made smaller, one batch per size.
        totals: list[int | None] = [None] * len(pixels)
        if method.resizes:
            pixels, totals = self._made_smaller(pixels, plans, config.overall_tokens)
        details = [None] * len(pixels)
        if config.detail_share:
            pixels, details = self._detail(pixels, plans)
        towers: list = [None] * len(pixels)
        for size in dict.fromkeys(one.shape[-1] for one in pixels):
            of_size = [i for i, one in enumerate(pixels) if one.shape[-1] == size]
            found = self.encode_images([pixels[i] for i in of_size], clock, method.tower_states, project=False)
            for i, one in zip(of_size, found, strict=True):
                towers[i] = one
        # 2. The tokens of each image in LLM order.
        with clock.stage("splice"):
            tokens = [
                self.image_tokens(features, saliency, plan, tower=tower, projected=False, detail=detail)
                for plan, (features, saliency, tower), detail in zip(plans, towers, details, strict=True)
            ]
            # A choice that does not read features can come first; then only kept tokens go through the projector.
            now = [i for i, one in enumerate(tokens) if not projects_late(method, one, config.overall_tokens)]
        # 3. The patches of all other images through the projector, in one call.
        with clock.stage("projector"):
            for i, one in zip(now, project_now([tokens[i] for i in now], self._newline()), strict=True):
                tokens[i] = one
        return [EncodedImage(*one) for one in zip(plans, tokens, totals, strict=True)]

    def _made_smaller(
        self, pixels: list[Tensor], plans: list[TilePlan], budget: int
    ) -> tuple[list[Tensor], list[int | None]]:
        """Return (pixels, N before) of images made smaller for method `downsample`.

        An image of at most `budget` patches stays as it is, with None. A smaller one has its tile 0 alone,
        [1, 3, g * patch, g * patch].
        """
        tower, smaller, totals = self.get_vision_tower(), [], []
        side, patch = tower.num_patches_per_side, tower.config.patch_size
        for tiles, plan in zip(pixels, plans, strict=True):
            # On the device of the tower, where a picture is resized faster.
            picture = made_smaller(to_device(tiles[:1], tower.device), plan, len(tiles), side, patch, budget)
            smaller.append(tiles if picture is None else picture)
            totals.append(None if picture is None else len(merge_order(plan, side, len(tiles))))
        return smaller, totals

    def _detail(self, pixels: list[Tensor], plans: list[TilePlan]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return (pixels on the device of the tower, gradient energy [T, P] of the patches) of each image."""
        tower = self.get_vision_tower()
        pixels = [to_device(tiles, tower.device) for tiles in pixels]
        layouts = [
            layout_of(plan, tower.num_patches_per_side, len(tiles)) for plan, tiles in zip(plans, pixels, strict=True)
        ]
        bounds = torch.cat([layout.on(tower.device, "bounds") for layout in layouts])
        energy = gradient_energy(torch.cat(pixels), bounds, tower.config.patch_size)
        return pixels, energy.split([len(tiles) for tiles in pixels])

    def _newline(self) -> Tensor | None:
        """Return the embedding [D] of a newline token; None where images have none."""
        return getattr(self.model, "image_newline", None)

    def _project_to_llm(self, hidden: Tensor) -> Tensor:
        """Project tower states [n, W] to LLM embeddings [n, D], with device and dtype of the word embeddings."""
        words = self.get_input_embeddings().weight
        return self._project(hidden).to(words.device, words.dtype)

    def _project(self, hidden: Tensor) -> Tensor:
        """Project tower states [..., W] to [..., D], on the device and in the dtype of the projector."""
        projector = next(self.model.mm_projector.parameters())
        return self.model.mm_projector(hidden.to(projector.device, projector.dtype))

    def text_tower(self, name: str) -> ClipTextTower:
        """Return the CLIP text tower `name` (options.text_tower). It is loaded on first use and kept.

        UserError where the checkpoint has no tokenizer: the question must be turned into a string for CLIP.
        """
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
        detail: Tensor | None = None,
    ) -> ImageTokens:
        """Return the ImageTokens of one image in LLM order, newline tokens included.

        features [T, P, D], saliency [T, P], detail [T, P] (ImageTokens.detail): tile by tile
        projected: False for states of the tower, [T, P, W]. Tokens that are read then go through the projector.
        """
        layout = layout_of(plan, math.isqrt(features.shape[1]), len(features))
        return self.tokens_of_layout(features, saliency, layout, key, tower, projected, detail)

    def tokens_of_layout(
        self,
        features: Tensor,
        saliency: Tensor,
        layout: Layout,
        key: int = 0,
        tower: TowerStates | None = None,
        projected: bool = True,
        detail: Tensor | None = None,
    ) -> ImageTokens:
        """As `image_tokens`, for the tiles of a layout."""
        image = tokens_in_order(features, saliency, layout, self._project_to_llm, key, tower, detail)
        if not projected:
            return image
        merged = with_newlines(image.features[image.patches], image.patches, len(image.tile), self._newline())
        return replace(image, features=merged, unprojected=None)

    # --- prompt -----------------------------------------------------------------------------------------------

    def _row(self, ids: Tensor, labels: Tensor | None, scope: str) -> Row:
        """Return one row of ids [S] without padding, on the host, with the places of its images and their questions."""
        places = image_places(ids)
        return Row(ids, labels, places, [question_of(ids, place, scope, self.turn_markers, labels) for place in places])

    def _texts(self, rows: list[Row], words: Tensor, method) -> list[Tensor]:
        """Return what a method reads of each image's question [m, D], in reading order. words: as `embed` gives them."""
        if method.words is not None and self.word_ids is not None:
            return self._embedded_words(rows, words.device, method)
        return question_embeddings(rows, words)

    def _select(
        self, rows: list[Row], texts: list[Tensor], encoded: list[EncodedImage], config: AdaVConfig, method
    ) -> list[Selection]:
        """Return the Selection of every image of a batch, in reading order. texts: of each of them (_texts)."""
        text_tower = method.text_tower if "text_cosine" in method.tower_states else None
        asked = [(row.ids, nth, question) for row in rows for nth, question in enumerate(row.questions)]
        dropping = config.method in dropper_names()
        # Where the choice reads nothing of the question, questions about one image share it.
        alike = dropping or not (method.reads_text or method.reads_key)
        first: dict[int, int] = {}
        for n, one in enumerate(encoded):
            first.setdefault(id(one) if alike else n, n)
        images = []
        for n in first.values():
            one, (ids, nth, question) = encoded[n], asked[n]
            tower = one.tokens.tower
            if text_tower is not None:
                judged = self.text_tower(text_tower).cosine(
                    tower.hidden[:, 1:], self.question_words(ids[question].tolist())
                )
                tower = replace(tower, text_cosine=judged)
            # A copy: questions may share the encoded image, but its key and text_cosine belong to this question.
            images.append(replace(one.tokens, key=sample_key(ids, one.plan.image_size, nth), tower=tower))
        # A dropper removes tokens inside the LLM, so every token enters it.
        name, own = ("none", {}) if dropping else (config.method, config.method_options)
        texts = [texts[n] for n in first.values()]
        kept = select_all(name, images, texts, config.overall_tokens, config.detail_share, **own)
        found = dict(zip(first, kept, strict=True))
        # Copies: a dropper adds to the report of each question.
        selections = [
            replace(selection, report={**selection.report})
            for selection in (found[id(one) if alike else n] for n, one in enumerate(encoded))
        ]
        for one, selection in zip(encoded, selections, strict=True):
            if one.total is not None:
                _describe_smaller(selection, one.total, self.get_vision_tower().num_patches_per_side)
            if one.part is not None:
                one.part.in_whole_image(selection)
        return selections

    def _embedded_words(self, rows: list[Row], device: torch.device, method) -> list[Tensor]:
        """Return the embeddings [m, D] of the words that a method reads of each image's turn (Selector.words)."""
        ids = []
        for row in rows:
            for place in row.places:
                turn = row.ids, place, self.turn_markers, self.question_words, self.word_ids, row.labels
                ids.append(words_read(method.words, *turn))
        flat = torch.tensor([number for own in ids for number in own], dtype=torch.long)
        return list(self.get_input_embeddings()(to_device(flat, device)).split([len(own) for own in ids]))

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
        # 1. Ids, padding and places are read on the host. Tensors on the device are copied to it together.
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
        # 2. Images through the vision tower, unless they are encoded already.
        if encoded is None:
            encoded = self.encode(images, image_sizes, config, clock)
        # 3. The tokens of each image that the LLM reads.
        with clock.stage("splice"):
            words = embed(rows, embedding, device)
        with clock.stage("selection"):
            texts = self._texts(rows, words, method)
        if method.zooms:
            encoded = self.zoom(encoded, texts, method, config.overall_tokens, clock)
        with clock.stage("selection"):
            if method.needs_image:
                kept = iter(self._select(rows, texts, encoded, config, method))
            else:
                kept = iter([_no_tokens(words) for _ in encoded])
            for row in rows:
                row.selections = [next(kept) for _ in row.places]
        # 4. The batch, and the settings of the LLM for it: dropping and the KV cache.
        with clock.stage("splice"):
            prepared = splice(rows, words, config.option("positions"))
        layers = self.config.num_hidden_layers
        dropper = config.make_dropper()
        if dropper is not None:
            dropper.check(self.config)
            prepared.dropping = Dropping(dropper, config.overall_tokens, layers, [prompt_row(row) for row in rows])
        spans = [RowSpans(row.length, row.spans) for row in rows]
        # The positions of the first new tokens. The batch is left-padded, so the last column has each row's last token.
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
        if dropping is None and labels is None and self.one_device and not prepared.caching.adaptive:
            # On a GPU the text alone is not worth a pass: kernels, and not tokens, take the time of a short prefill.
            with_text, with_image = device.type == "cpu", not (method.reads_text or method.reads_key)
            prepared.prefixes = _prefixes(rows, encoded, with_text, with_image)
        prepared.clock = clock
        return prepared

    # --- the LLM ----------------------------------------------------------------------------------------------

    @property
    def one_device(self) -> bool:
        """Whether all layers of the LLM are on one device, and none is offloaded."""
        return on_one_device(self.model.layers)

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
        """Run the LLM's forward. With images, or placeholders in input_ids, the prompt is prepared first.

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
        """Return transformers' loss. labels [B, S] are those of the whole prompt, also where tokens were dropped."""
        if dropping is not None:
            labels = dropping.labels(labels)
        return super().loss_function(logits=logits, labels=labels, **kwargs)


def _prefixes(
    rows: list[Row], encoded: Sequence[EncodedImage], with_text: bool, with_image: bool
) -> tuple[SharedPrefixes, ...]:
    """Return the prefixes that rows share.

    with_text: the text before their first image; with_image: that text with the image, where rows about one image keep the
    same tokens of it
    """
    texts, images, text_lengths, image_lengths, at = [], [], [], [], 0
    for number, row in enumerate(rows):
        # A row without an image is a group of its own, with no prefix.
        text, image, text_length, image_length = number, number, 0, 0
        if row.places:
            text, text_length, image_length = (
                row.ids[: row.places[0]].numpy().tobytes(),
                row.places[0],
                sum(row.spans[0]),
            )
            # Rows share an image only as one object: two encodings may differ in rounding.
            image = text, id(encoded[at])
        texts.append(text)
        images.append(image)
        text_lengths.append(text_length)
        image_lengths.append(image_length)
        at += len(row.places)
    totals = [row.length for row in rows]
    found = ((with_text, texts, text_lengths), (with_image, images, image_lengths))
    return worth_sharing([SharedPrefixes.of_rows(*own, totals) for wanted, *own in found if wanted], totals)


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


def _describe_smaller(selection: Selection, total: int, side: int) -> None:
    """Describe the tokens of an image that was made smaller by the image before: as merged tokens of its patches.

    total: its tokens before; side: patches per side of tile 0, whose patches are the first of them
    """
    patches = math.isqrt(len(selection.indices))  # a newline token may follow
    made = torch.full_like(selection.indices, -1)
    selection.sources = cells(side, patches) + [[] for _ in range(len(made) - patches**2)]
    selection.indices = selection.tile = selection.row = selection.column = made
    selection.saliency = torch.full_like(selection.saliency, float("nan"))
    selection.total = total


def _no_tokens(words: Tensor) -> Selection:
    """Return the empty Selection of `no_image`, under which the tower does not run."""
    none = torch.empty(0, dtype=torch.long, device=words.device)
    return Selection(none, words[:0], none, none, none, words[:0, 0].float(), total=0)
