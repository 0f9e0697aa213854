"""compress() for transformers' Qwen2.5-VL: vision tokens are selected before the LLM and keep their M-RoPE positions.

    with compress(model, method="adav", overall_tokens=256):
        output = model.generate(**processor(images=images, text=prompts, return_tensors="pt", padding=True))

The tower has no [CLS] token, so saliency is the attention that a token's patches receive (received_attention.py). The
tower's merger makes one vision token of 2 x 2 patches. Its features are compared with word embeddings, as in LLaVA.
Kept tokens have the (time, height, width) positions that they have in the whole prompt, and the text continues at the
position that it has without compression. Dropping a token therefore gives the same result as masking it, but it also
saves the compute.
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
    """Compression of a Qwen2_5_VLForConditionalGeneration: its generate(), and its forward() on whole prompts.

    Selectors that read features, saliency and words are supported: adav, adav_cover, t2i, cls, mix, fastervlm (an image
    is one tile), divprune, cdpruner (by embeddings), holov, random, none, no_image, and a user's own. The words of a
    question are the text after its image, without the markers around images. text_scope "turn" needs `processor`.
    options.positions is always "original" here. Videos, methods inside the LLM, adaptive KV caches, and methods that
    need [CLS] or square tiles are refused with a UserError.
    """

    # --- what can be compressed -------------------------------------------------------------------------------------

    def redirections(self):
        """The three methods of the model that are replaced. UserError if model or configuration cannot be used."""
        if not isinstance(self.model, Qwen2_5_VLForConditionalGeneration):
            raise UserError(
                f"compress() got a {type(self.model).__name__}, allowed for {NAME} is a "
                "Qwen2_5_VLForConditionalGeneration"
            )
        self._check_config()
        self._markers = self._turn_markers() if self.config.option("text_scope") == "turn" else ()
        # transformers keeps rope_deltas of the last prompt on the model. `_shorten` changes it; __exit__ restores it.
        self._rope_deltas = self.model.model.rope_deltas
        self._generate, self._forward = self.model.generate, self.model.forward
        self._prepare_inputs = self.model.prepare_inputs_for_generation

        # generate() reads the signature of forward() to check its arguments, and would refuse them without wraps.
        @functools.wraps(self._forward)
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
        """Raise UserError for a setting that is not available for this family."""
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
        """Token ids of the turn markers. Qwen's chat template uses ChatML, so LLaVA's ChatML markers apply."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if tokenizer is None:
            raise UserError('options.text_scope is "turn", which needs words: pass compress(..., processor=processor)')
        return turn_markers("chatml_direct", tokenizer)

    # --- in place of the model's methods ----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *others, **kwargs):
        """Token ids as the model's own generate() returns them: the prompt as it was given, then the new tokens."""
        settings = generation_config or self.model.generation_config
        # The prompt is shortened once, for one prefill. Each of these reads it in another way.
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
            # generate() passes every argument that prepare_inputs_for_generation names to it, at every step. The
            # prompts go this way, so that this object holds no state of a request.
            kwargs["prompts"] = prompts
        return self._generate(inputs, generation_config, *others, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, prompts: QwenPrompts | None = None, **kwargs):
        """Inputs of one step: the shortened prompts in prefill, and their attention mask in every step.

        generate() itself works with the whole prompts. The ids that it returns, its lengths and the positions of new
        tokens are therefore those of a run without compression.
        """
        if prompts is None:
            return self._prepare_inputs(input_ids, **kwargs)
        copies = len(input_ids) // prompts.rows  # rows per prompt: beams, or several answers
        # 1. Prefill: embeddings and positions of the tokens that stay, made once per prompt and repeated for its rows.
        if kwargs.get("is_first_iteration"):
            mask, whole = kwargs.get("attention_mask"), kwargs["position_ids"][:, ::copies]
            embeds = self._shorten(prompts, input_ids[::copies], None if mask is None else mask[::copies])
            kwargs["inputs_embeds"] = embeds.repeat_interleave(copies, dim=0)
            kwargs["position_ids"] = prompts.positions(whole).repeat_interleave(copies, dim=1)
            # It counts tokens of the whole prompt, and would cut the shortened embeddings.
            kwargs["next_sequence_length"] = None
        # 2. The placeholders are replaced, so arguments that describe them must not reach the model.
        kwargs["mm_token_type_ids"] = None
        kwargs.pop("image_grid_thw", None)
        # 3. The mask covers the entries of the KV cache: the shortened prompt and the new tokens. None where nothing is
        # padding, which lets SDPA take its faster causal path.
        mask = torch.nn.functional.pad(prompts.mask, (0, input_ids.shape[1] - prompts.length), value=1)
        kwargs["attention_mask"] = None if mask.all() else mask.repeat_interleave(copies, dim=0)
        return self._prepare_inputs(input_ids, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """Output of the model's own forward(). For whole prompts with images: logits and loss of the tokens that stay.

        Rows are then padded left to the longest shortened row. No cache is made, and an earlier cache cannot be
        continued.
        """
        # Steps of generate() come without pixels: prefill has embeddings, decode steps have new ids.
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
        """QwenPrompts of a request, or None for a request without images. Removes pixel_values from `given`."""
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
        """Embeddings [B, L, D] of the tokens that stay.

        It also adds the number of dropped tokens to the model's rope_deltas, so that a caller who continues from the
        cache by hand gets positions that count from the whole prompt.
        """
        embeds = prompts.shorten(ids, mask, self._markers, labels)
        self.last_selection = prompts.selections
        inner = self.model.model
        inner.rope_deltas = inner.rope_deltas + prompts.dropped.to(inner.rope_deltas.device)
        return embeds
