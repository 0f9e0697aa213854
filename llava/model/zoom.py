"""Encodes the crops of an image when a question needs them, for methods that zoom (llava/methods/before_llm/zoom.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llava.methods.before_llm.zoom import Zoom
from llava.mm_utils import TilePlan
from llava.model.decoding.prepared import StageClock
from llava.model.encoded_images import EncodedImage, TilesOnDemand
from llava.model.image_tokens import Look, layout_of, outline_of, part_layout_of, projects_late, wanted_tiles


class LlavaZoom:
    """Mixin of LlavaMetaForCausalLM (llava_arch.py), whose tower, projector and order of tokens it uses."""

    def look(
        self, pixels: list[Tensor], plans: list[TilePlan], method: Zoom, budget: int, clock: StageClock
    ) -> list[EncodedImage]:
        """Encode tile 0 of each image, or all of its tiles if the budget or an option asks for them.

        pixels [T, 3, H, W] of each image of more than one tile. `zoom` encodes the other tiles.
        """
        side = self.get_vision_tower().num_patches_per_side
        images, asked = [], []
        for tiles, plan in zip(pixels, plans, strict=True):
            layout = layout_of(plan, side, plan.tiles)
            late = projects_late(method, outline_of(layout), budget)
            images.append(EncodedImage(plan, None, on_demand=TilesOnDemand(tiles, projected=not late)))
            every = method.needs_every_crop(layout.sizes, budget)
            asked.append(method.tiles(layout.sizes, [0.0] * (plan.tiles - 1), budget) if every else (0,))
        self._encode_missing(images, asked, method, clock)
        return [replace(image, tokens=self._part(image, (0,)).tokens) for image in images]

    def zoom(
        self, images: Sequence[EncodedImage], texts: Sequence[Tensor], method: Zoom, budget: int, clock: StageClock
    ) -> list[EncodedImage]:
        """Return, for each question about an image, the image with the tokens of the tiles that the method wants.

        images: as `encode` gave them, one per question. texts: what the method reads of each question [m, D]
        Tiles that are not encoded yet go through the tower in one pass, and stay with the image. Questions that want the
        same tiles of one image get the same object.
        """
        zoomed = [n for n, image in enumerate(images) if image.on_demand is not None]
        with clock.stage("selection"):
            looks = [Look(method, images[n].plan, images[n].tokens, texts[n], budget) for n in zoomed]
            chosen = wanted_tiles(looks, self.get_vision_tower().num_patches_per_side)
        self._encode_missing([images[n] for n in zoomed], chosen, method, clock)
        with clock.stage("splice"):
            found, parts = list(images), {}
            for n, tiles in zip(zoomed, chosen, strict=True):
                key = id(images[n]), tiles
                if key not in parts:
                    parts[key] = self._part(images[n], tiles)
                found[n] = parts[key]
        return found

    def _encode_missing(
        self, images: list[EncodedImage], tiles: list[tuple[int, ...]], method: Zoom, clock: StageClock
    ) -> None:
        """Encode those of the `tiles` of each image that are not encoded yet. An image may come several times."""
        # 1. What is missing of each image.
        wanted: dict[int, tuple[EncodedImage, set[int]]] = {}
        for image, own in zip(images, tiles, strict=True):
            wanted.setdefault(id(image), (image, set()))[1].update(image.on_demand.missing(own))
        todo = [(image, tuple(sorted(missing))) for image, missing in wanted.values() if missing]
        if not todo:
            return
        # 2. All of it through the tower in one pass.
        pixels = [torch.stack([image.on_demand.pixels[tile] for tile in missing]) for image, missing in todo]
        towers = self.encode_images(pixels, clock, method.tower_states, project=False)
        # 3. The patches through the projector in one call, where the method reads them. Padding stays zero.
        with clock.stage("projector"):
            found = [features for features, _, _ in towers]
            now = [n for n, (image, _) in enumerate(todo) if image.on_demand.projected]
            for n, features in zip(now, self._projected([(*todo[n], found[n]) for n in now]), strict=True):
                found[n] = features
        for (image, missing), features, (_, saliency, tower) in zip(todo, found, towers, strict=True):
            image.on_demand.add(missing, features, saliency, tower)

    def _projected(self, parts: list[tuple[EncodedImage, tuple[int, ...], Tensor]]) -> list[Tensor]:
        """Return LLM embeddings [t, P, D] of (image, its tiles, their states [t, P, W]), for all in one call."""
        if not parts:
            return []
        states, sources = [], []
        for image, tiles, own in parts:
            layout = part_layout_of(image.plan, math.isqrt(own.shape[1]), tiles)
            sources.append(layout.on(own.device, "source")[layout.on(own.device, "patches")])
            states.append(own.flatten(0, 1)[sources[-1]])
        features = self._project_to_llm(torch.cat(states)).split([len(own) for own in states])
        return [
            made.new_zeros(own.shape[0] * own.shape[1], made.shape[1])
            .index_copy(0, source.to(made.device), made)
            .unflatten(0, own.shape[:2])
            for (_, _, own), source, made in zip(parts, sources, features, strict=True)
        ]

    def _part(self, image: EncodedImage, tiles: tuple[int, ...]) -> EncodedImage:
        """Return an image with the tokens of some of its encoded tiles."""
        on_demand = image.on_demand
        features, saliency, tower = on_demand.of(tiles)
        layout = part_layout_of(image.plan, math.isqrt(features.shape[1]), tiles)
        tokens = self.tokens_of_layout(features, saliency, layout, tower=tower, projected=on_demand.projected)
        return EncodedImage(image.plan, tokens, part=layout)
