"""generate() of transformers from a PreparedPrompt: its inputs in prefill and in every step, and its KV cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.model.decoding.adaptive_cache import AdaptiveCache, Caching
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.prefill import prefill
from llava.model.decoding.prepared import PreparedPrompt


class LlavaGeneration:
    """Mixin for a causal LM with `prepare` (llava_arch): generate() for prompts with images."""

    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        images=None,
        image_sizes=None,
        attention_mask=None,
        *,
        inputs=None,
        position_ids=None,
        prepared: PreparedPrompt | None = None,
        prompt_ids: Tensor | None = None,
        config: AdaVConfig | None = None,
        **generation_kwargs,
    ):
        """Run generate() of transformers on prompts with images. Returns the new tokens only, [B, T].

        Takes what `prepare` takes, or its result as `prepared`; everything else goes to transformers.
        inputs: LLaVA's name for input_ids. position_ids: None, since `prepare` counts positions.
        prompt_ids: [B, P] a spelling of the prompts in token ids. Processors of logits, stopping criteria and streamers
            then see it before the new tokens, max_length counts it, and the result is [B, P + T].
        """
        given = {"input_ids": input_ids, "inputs": inputs, "prepared": prepared}
        given = [name for name, value in given.items() if value is not None]
        if len(given) != 1:
            raise UserError(
                f"generate() got {' and '.join(given) or 'no prompt'}, allowed is one of input_ids, inputs, prepared"
            )
        for name, value in (
            ("position_ids", position_ids),
            ("inputs_embeds", generation_kwargs.pop("inputs_embeds", None)),
        ):
            if value is not None:
                raise UserError(
                    f"generate() got {name}, but it makes them itself from token ids and images: leave it out"
                )
        if prepared is None:
            input_ids = inputs if input_ids is None else input_ids
            prepared = self.prepare(input_ids, images, image_sizes, attention_mask, config=config)
        self.last_selection = [selection for row in prepared.selections for selection in row]
        output = super().generate(
            prompt_ids,
            prompt_length=0 if prompt_ids is None else prompt_ids.shape[1],
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            position_offset=prepared.position_offset,
            dropping=prepared.dropping,
            caching=prepared.caching if prepared.caching.adaptive else None,
            **generation_kwargs,
        )
        _report_survivors(prepared)
        return output

    def prefill(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
        """Prefill the prompts of a batch into an empty cache of `prepared.caching`.

        Returns the float32 logits [B, V] of each row's first new token. Logits of other positions are not computed.
        """
        if prepared.dropping is None:
            return prefill(self, prepared, cache)
        output = self.model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            dropping=prepared.dropping,
            **{CACHE: cache},
        )
        _report_survivors(prepared)
        return self.lm_head(output.last_hidden_state[:, -1]).float()

    def decode_step(self, tokens: Tensor, cache: AdaptiveCache) -> Tensor:
        """Return the float32 logits [B, V] behind tokens [B], on a prefilled cache whose begin_step() has been called.

        Nothing in it waits for the host, so it can be captured as a CUDA graph.
        """
        hidden = self.model.step(self.get_input_embeddings()(tokens[:, None]), cache)
        return self.lm_head(self.model.norm(hidden[:, -1])).float()

    def prepare_inputs_for_generation(
        self,
        input_ids,
        inputs_embeds=None,
        position_offset=None,
        dropping=None,
        caching=None,
        prompt_length=0,
        is_first_iteration=False,
        **kwargs,
    ):
        """Return transformers' inputs of one step, with corrected positions, `dropping` and `caching`.

        transformers passes only arguments that are named here. `prompt_length` is named so that it is not passed on.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # transformers counts on from the last position. An image at the very end of a prompt may have left a gap there.
        if position_offset is not None and not is_first_iteration and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + position_offset
        if dropping is not None:
            inputs["dropping"] = dropping
        if caching is not None:
            inputs["caching"] = caching
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """transformers' hook. Its own chunks are cut from ids; here they are cut from what the LLM reads."""
        size, embeds = generation_config.prefill_chunk_size, model_kwargs.get("inputs_embeds")
        if size is None or embeds is None or not is_first_iteration:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        length, past = embeds.shape[1], model_kwargs["past_key_values"].get_seq_length()
        _check_chunks(size, length, model_kwargs.get("dropping"))
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
        for start in range(past, length, size):
            end = start + size
            chunk = {
                "inputs_embeds": embeds[:, start:end],
                "attention_mask": None if mask is None else mask[:, :end],
                "position_ids": positions[:, start:end],
            }
            inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **(model_kwargs | chunk))
            output = self(**inputs, return_dict=True)
        return output

    def _prepare_generated_length(
        self,
        generation_config,
        has_default_max_length,
        has_default_min_length,
        model_input_name,
        input_ids_length,
        inputs_tensor,
    ):
        """Hook of transformers: lengths count the ids of the prompt where ids are given, not the spliced tokens."""
        return super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            has_default_min_length=has_default_min_length,
            model_input_name="input_ids" if input_ids_length else model_input_name,
            input_ids_length=input_ids_length,
            inputs_tensor=inputs_tensor,
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Hook of transformers, called when the maximum length is known: a request with `caching` gets its cache.

        UserError for kinds of generation that an adaptive KV cache, or a prompt with prompt_ids, does not allow.
        """
        # 1. Refuse what does not work.
        if generation_mode == GenerationMode.ASSISTED_GENERATION and model_kwargs["prompt_length"]:
            raise UserError(
                "assisted generation (prompt lookup) does not go with a prompt whose ids are not what the LLM reads: it "
                "counts cache entries by them"
            )
        caching: Caching | None = model_kwargs.get("caching")
        if caching is None:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        refuse_beside_adaptive_cache(generation_config, generation_mode)
        if model_kwargs.get(CACHE) is None:
            # One step fewer than new tokens: the last one is never fed back.
            steps = generation_config.max_length - 1 - model_kwargs["prompt_length"]
            model_kwargs[CACHE] = caching.cache(steps)


def refuse_beside_adaptive_cache(generation_config, generation_mode: GenerationMode) -> None:
    """Raise UserError for kinds of generation that an adaptive KV cache does not allow."""
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(
            f"an adaptive KV cache does not go with {generation_mode.value.replace('_', ' ')}, allowed are greedy "
            "search and sampling: entries that one continuation evicts are gone for the others"
        )
    for name in ("cache_implementation", "prefill_chunk_size"):
        if getattr(generation_config, name) is not None:
            raise UserError(
                f"{name} is {getattr(generation_config, name)!r}, which does not go with an adaptive KV cache: "
                "leave it out"
            )


def _report_survivors(prepared: PreparedPrompt) -> None:
    """After prefill, add the places of the cuts and the kept slots to the report of each image's selection."""
    if prepared.dropping is None:
        return
    for row, selections in enumerate(prepared.selections):
        for image, selection in enumerate(selections):
            selection.report["survivors"] = prepared.dropping.survivors(row, image)
            selection.report["cuts"] = prepared.dropping.places(row, image)


def _check_chunks(size: int, length: int, dropping) -> None:
    """UserError where prompts of `length` tokens cannot be prefilled in chunks of `size` tokens."""
    if size < 1:
        raise UserError(f"prefill_chunk_size is {size}, allowed is 1 or more")
    if dropping is not None and length > size:
        raise UserError(
            f"prefill_chunk_size is {size}, which does not go with a method that drops tokens inside the LLM: it ranks "
            f"the tokens of whole prompts, here of {length} tokens; leave it out"
        )


def check_cache(cache, caching: Caching) -> None:
    """Raise UserError where a request with `caching` comes with a cache that `caching` did not make."""
    if not isinstance(cache, AdaptiveCache) or cache.caching is not caching:
        found = "none" if cache is None else f"a {type(cache).__name__} of another making"
        raise UserError(
            f"the prompt was prepared for an adaptive KV cache, but past_key_values is {found}; allowed is "
            "prepared.caching.cache(steps)"
        )
