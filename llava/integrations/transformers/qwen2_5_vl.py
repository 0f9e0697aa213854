"""QwenCompression: fewer vision tokens in transformers' Qwen2.5-VL, chosen before the LLM, at their own M-RoPE positions.

    with compress(model, method="adav", overall_tokens=256):
        output = model.generate(**processor(images=images, text=prompts, return_tensors="pt", padding=True))

The tower has no [CLS] token: saliency is the attention that a token's patches receive (received_attention.py). A vision
token is what the tower's merger makes of 2 x 2 patches; its features and the word embeddings are compared as in LLaVA.
Kept tokens keep their (time, height, width) positions of the whole prompt, and the text goes on where it would without
compression: dropping a token is the same as hiding it from all others, but it costs nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from llava.common.errors import UserError
from llava.conversation import turn_markers
from llava.integrations.transformers.base import Compression
from llava.integrations.transformers.qwen_prompts import QwenPrompts
from llava.methods.inside_llm import dropper_names

NAME = "Qwen2.5-VL"


class QwenCompression(Compression):
    """compress() of one Qwen2_5_VLForConditionalGeneration: its generate(), and its forward() on whole prompts.

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
        self._check_config()
        self._markers = self._turn_markers() if self.config.option("text_scope") == "turn" else ()
        self._rope_deltas = self.model.model.rope_deltas
        self._generate, self._forward = self.model.generate, self.model.forward
        self._prepare_inputs = self.model.prepare_inputs_for_generation

        @functools.wraps(self._forward)  # generate() looks at the signature
        def forward(*args, **kwargs):
            return self.forward(*args, **kwargs)

        return {
            "generate": self.generate,
            "forward": forward,
            "prepare_inputs_for_generation": self.prepare_inputs_for_generation,
        }

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.model.model.rope_deltas = self._rope_deltas

    def _check_config(self) -> None:
        """UserError where the configuration asks for what this family does not have."""
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
        needed = config.make_method().tower_states
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
        config.warn_of_unused_options()

    def _turn_markers(self) -> tuple[tuple[int, ...], ...]:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if tokenizer is None:
            raise UserError('options.text_scope is "turn", which needs words: pass compress(..., processor=processor)')
        return turn_markers("chatml_direct", tokenizer)

    # --- in place of the model's methods ----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *others, **kwargs):
        """As the model's own generate(): the prompt as it came, and the new tokens behind it."""
        settings = generation_config or self.model.generation_config
        helpers = [kwargs.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens")]
        for name, asked in (
            ("no KV cache", kwargs.get("use_cache", settings.use_cache) is False),
            ("prefill in chunks", kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None),
            ("assisted generation", any(helper is not None for helper in helpers)),
        ):
            if asked:
                raise UserError(
                    f"generate() was asked for {name}, allowed under compress() are greedy search, sampling and beams with a "
                    "KV cache and prefill in one piece"
                )
        prompts = self._prompts(kwargs.get("input_ids", inputs), kwargs)
        if prompts is not None:
            kwargs["prompts"] = prompts
        return self._generate(inputs, generation_config, *others, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, prompts: QwenPrompts | None = None, **kwargs):
        """In prefill the LLM reads what is left of the prompts, and in each step its mask is that.

        generate() itself goes on with the whole prompts: what it returns, lengths and positions of new tokens are those of
        a run without compression.
        """
        if prompts is None:
            return self._prepare_inputs(input_ids, **kwargs)
        copies = len(input_ids) // prompts.rows  # of each prompt: beams, or several answers
        if kwargs.get("is_first_iteration"):
            mask, whole = kwargs.get("attention_mask"), kwargs["position_ids"][:, ::copies]
            embeds = self._shorten(prompts, input_ids[::copies], None if mask is None else mask[::copies])
            kwargs["inputs_embeds"] = embeds.repeat_interleave(copies, dim=0)
            kwargs["position_ids"] = prompts.positions(whole).repeat_interleave(copies, dim=1)
            kwargs["next_sequence_length"] = None
        # The placeholders are gone, and with them what says where they are.
        kwargs["mm_token_type_ids"] = None
        kwargs.pop("image_grid_thw", None)
        mask = torch.nn.functional.pad(prompts.mask, (0, input_ids.shape[1] - prompts.length), value=1)
        kwargs["attention_mask"] = None if mask.all() else mask.repeat_interleave(copies, dim=0)
        return self._prepare_inputs(input_ids, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """As the model's own forward(); on whole prompts with images, logits and loss of what is left of them.

        Rows are then padded left to the longest of what is left; no cache is made, and none can be gone on from.
        """
        if kwargs.get("pixel_values") is None:
            return self._forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if kwargs.pop("use_cache", None):
            raise UserError(
                "under compress() forward() leaves no cache, but use_cache is true: generate() makes its own"
            )
        prompts = self._prompts(input_ids, kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        vision = {name: kwargs.pop(name, None) for name in ("image_grid_thw", "mm_token_type_ids")}
        whole = {"input_ids": input_ids, "attention_mask": attention_mask, **vision}
        positions = self.model._prepare_position_ids_for_generation(input_ids, whole)
        labels = kwargs.pop("labels", None)
        embeds = self._shorten(prompts, input_ids, attention_mask, labels)
        return self._forward(
            inputs_embeds=embeds,
            attention_mask=prompts.mask,
            position_ids=prompts.positions(positions),
            labels=None if labels is None else prompts.labels(labels),
            use_cache=False,
            **kwargs,
        )

    def _prompts(self, ids: Tensor | None, given: dict) -> QwenPrompts | None:
        """The prompts of a request whose images are looked at, or None without images; takes pixel_values out of `given`."""
        for name in ("pixel_values_videos", "video_grid_thw"):
            if given.get(name) is not None:
                raise UserError(f"{name} came with the prompt, allowed under compress() are images, and no videos")
        for name in ("inputs_embeds", "position_ids", "mm_encoder_outputs"):
            if given.get(name) is not None:
                raise UserError(f"{name} came with the prompt, but compress() makes it itself: leave it out")
        for name in ("past_key_values", "cache"):
            if given.get(name) is not None and given[name].get_seq_length():
                raise UserError(f"{name} holds an earlier prompt, allowed under compress() is the whole prompt anew")
        pixels, grid = given.pop("pixel_values", None), given.get("image_grid_thw")
        self.last_selection = []
        if pixels is None:
            return None
        if ids is None or grid is None:
            raise UserError(
                "pixel_values came without input_ids or image_grid_thw, and a prompt with images has all three"
            )
        return QwenPrompts(self.model, ids, pixels, grid, self.config)

    def _shorten(self, prompts: QwenPrompts, ids: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """Embeddings of what is left; who goes on from its cache by hand finds rope_deltas that count from the whole."""
        embeds = prompts.shorten(ids, mask, self._markers, labels)
        self.last_selection = prompts.selections
        inner = self.model.model
        inner.rope_deltas = inner.rope_deltas + prompts.dropped.to(inner.rope_deltas.device)
        return embeds
