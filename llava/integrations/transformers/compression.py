"""compress() for models whose own generate() and forward() run.

Vision tokens are selected before the LLM, or dropped between its layers (cuts.py).

    with compress(model, method="adav", overall_tokens=256):
        output = model.generate(**processor(images=images, text=prompts, return_tensors="pt", padding=True))

The vision tower runs before prefill, the prompt is shortened, and the model's own code does the rest. Its modules are
called as they are, so quantised, offloaded and adapted weights work. What differs between families is in families/.

Features of vision tokens are compared with word embeddings, as in LLaVA. Kept tokens have the positions that they have
in the whole prompt, and the text continues at the position that it has without compression. In an LLM whose layers all
mask, dropping a token therefore gives the same result as masking it, but it also saves the compute.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.conversation import turn_markers
from llava.integrations.transformers.base import Compression
from llava.integrations.transformers.cuts import cutting
from llava.integrations.transformers.families.base import Family
from llava.integrations.transformers.prompts import Prompts
from llava.integrations.transformers.selectors import check_selector
from llava.methods.inside_llm import dropper_names
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.dropping import Dropping
from llava.model.decoding.generation import refuse_beside_adaptive_cache

# Arguments of some families that configure the tower for one call.
FROM_CONFIG = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")


class FamilyCompression(Compression):
    """Compression of a model of `family`: its generate(), and its forward() on whole prompts.

    Selectors that read features, saliency and words are supported: adav, adav_cover, t2i, cls, mix, fastervlm,
    divprune, cdpruner (by embeddings), random, none, no_image, and a user's own. The words of a question are the text
    after its image, without the markers around images. text_scope "turn" needs `processor`. options.saliency chooses
    what plays the part of [CLS] attention. options.positions is always "original" here. Inside the LLM, the methods of
    Family.inside_llm work, and adaptive KV caches behind methods before the LLM where Family.adaptive_caches is True.
    Videos, other methods inside the LLM, and methods that make tokens or read more of the tower are refused with a
    UserError.
    """

    def __init__(self, family: type[Family], model, config, processor=None):
        super().__init__(model, config, processor)
        self.family = family(model)
        self._image_inputs = (*family.image_inputs, *family.optional_inputs)

    # --- what can be compressed -------------------------------------------------------------------------------------

    def redirections(self):
        """The methods of the model that are replaced. UserError if model or configuration cannot be used."""
        allowed = self.family.model_classes
        if not isinstance(self.model, allowed):
            raise UserError(
                f"compress() got a {type(self.model).__name__}, allowed for {self.family.name} is a "
                f"{' or a '.join(one.__name__ for one in allowed)}"
            )
        self._check_config()
        self._markers = self._turn_markers() if self.config.option("text_scope") == "turn" else ()
        self._state = self.family.state()
        self._generate, self._forward = self.model.generate, self.model.forward
        self._prepare_inputs = self.model.prepare_inputs_for_generation
        self._prepare_cache = self.model._prepare_cache_for_generation

        # generate() reads the signature of forward() to check its arguments, and would refuse them without wraps.
        @functools.wraps(self._forward)
        def forward(*args, **kwargs):
            return self.forward(*args, **kwargs)

        redirected = {
            "generate": self.generate,
            "forward": forward,
            "prepare_inputs_for_generation": self.prepare_inputs_for_generation,
        }
        if self.config.cache_policy != "full":
            redirected["_prepare_cache_for_generation"] = self._prepare_cache_for_generation
        return redirected

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.family.restore(self._state)

    def _check_config(self) -> None:
        """Raise UserError for a setting that is not available for this family."""
        config = self.config
        name, family = config.method, self.family.name
        if config.cache_policy != "full" and (name in dropper_names() or not self.family.adaptive_caches):
            beside = f' with method "{name}"' if self.family.adaptive_caches else ""
            raise UserError(
                f'the configuration asks for the KV cache policy "{config.cache_policy}", allowed for {family}{beside} is '
                '"full"'
            )
        if name in dropper_names():
            allowed = self.family.inside_llm
            if name not in allowed:
                others = f", and {', '.join(allowed)}" if allowed else ""
                raise UserError(
                    f'method "{name}" acts inside the LLM, allowed for {family} are methods before the LLM{others}'
                )
            dropper = config.make_method()
            dropper.check(self.model.config.get_text_config())
            if dropper.merges:
                raise UserError(
                    f'method "{name}" merges dropped tokens, but a merged token has no position in the prompt; allowed for '
                    f'{family} are methods that keep tokens as they are (sparsevlm: options.version "2.0")'
                )
        elif config.make_dropper() is not None:
            key = "prefill_filter_flag" if config.prefill_filter_flag else "options.second_stage"
            raise UserError(f'"{key}" is true, allowed for {family} are methods before the LLM alone')
        check_selector(config, family)
        config.warn_of_unused_options()

    def _turn_markers(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the markers between turns of the family's chat template."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if tokenizer is None:
            raise UserError('options.text_scope is "turn", which needs words: pass compress(..., processor=processor)')
        return turn_markers(self.family.conversation, tokenizer)

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
        output = self._generate(inputs, generation_config, *others, **kwargs)
        if prompts is not None:
            prompts.note_survivors()
        return output

    def prepare_inputs_for_generation(self, input_ids, prompts: Prompts | None = None, **kwargs):
        """Inputs of one step: the shortened prompts in prefill, and their attention mask in every step.

        generate() itself works with the whole prompts. The ids that it returns, its lengths and the positions of new
        tokens are therefore those of a run without compression.
        """
        if prompts is None:
            return self._prepare_inputs(input_ids, **kwargs)
        copies = len(input_ids) // prompts.rows  # rows per prompt: beams, or several answers
        # 1. Prefill: embeddings and positions of the tokens that stay, made once per prompt and repeated for its rows.
        if kwargs.get("is_first_iteration"):
            mask, whole = kwargs.get("attention_mask"), _every(kwargs["position_ids"], copies)
            embeds = self._shorten(prompts, input_ids[::copies], None if mask is None else mask[::copies])
            kwargs["inputs_embeds"] = embeds.repeat_interleave(copies, dim=0)
            kwargs["position_ids"] = prompts.positions(whole).repeat_interleave(copies, dim=-2)
            # It counts tokens of the whole prompt, and would cut the shortened embeddings.
            kwargs["next_sequence_length"] = None
            kwargs["llm_arguments"] = self._llm_arguments(prompts, copies)
            if prompts.steps is not None:
                # generate() takes the cache of the later steps from the output of prefill.
                kwargs[CACHE] = prompts.adaptive_cache(whole)
        kwargs["dropping"] = prompts.dropping
        # 2. The placeholders are replaced, so arguments that describe them must not reach the model.
        for name in ("mm_token_type_ids", *self._image_inputs):
            kwargs.pop(name, None)
        # 3. The mask covers the entries of the KV cache: the shortened prompt and the new tokens. None where nothing is
        # padding, which lets SDPA take its faster causal path.
        mask = torch.nn.functional.pad(prompts.mask, (0, input_ids.shape[1] - prompts.length), value=1)
        kwargs["attention_mask"] = None if mask.all() else mask.repeat_interleave(copies, dim=0)
        return self._prepare_inputs(input_ids, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *sizes):
        """Hook of transformers, called when the maximum length is known; in place of the model's for adaptive caches."""
        prompts = model_kwargs.get("prompts")
        if prompts is not None:
            refuse_beside_adaptive_cache(generation_config, generation_mode)
            # One step fewer than new tokens: the last one is never fed back.
            prompts.steps = generation_config.max_length - 1 - prompts.length
        return self._prepare_cache(generation_config, model_kwargs, generation_mode, *sizes)

    def forward(self, input_ids=None, attention_mask=None, llm_arguments=None, dropping=None, **kwargs):
        """Output of the model's own forward(). For whole prompts with images: logits and loss of the tokens that stay.

        Rows are then padded left to the longest shortened row. No cache is made, and an earlier cache cannot be
        continued. llm_arguments, dropping: only from prepare_inputs_for_generation.
        """
        # Steps of generate() come without pixels: prefill has embeddings, decode steps have new ids.
        if kwargs.get(self.family.image_inputs[0]) is not None:
            return self._forward_whole(input_ids, attention_mask, **kwargs)
        step = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if dropping is None and not llm_arguments and not isinstance(kwargs.get(CACHE), AdaptiveCache):
            return self._forward(**step)  # torch.compile follows this call into the model
        return self._forward_changed(dropping, llm_arguments, **step)

    # A compiled model would compile this, and it is Python work on the host.
    @torch.compiler.disable
    def _forward_whole(self, input_ids, attention_mask, **kwargs):
        """`forward` for whole prompts with images."""
        if kwargs.pop("use_cache", None):
            raise UserError(
                "under compress() forward() leaves no cache, but use_cache is true: generate() makes its own"
            )
        prompts = self._prompts(input_ids, kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        vision = {name: kwargs.pop(name, None) for name in ("mm_token_type_ids", *self._image_inputs)}
        whole = {"input_ids": input_ids, "attention_mask": attention_mask, **vision}
        positions = self.model._prepare_position_ids_for_generation(input_ids, whole)
        labels = kwargs.pop("labels", None)
        embeds = self._shorten(prompts, input_ids, attention_mask, labels)
        if labels is not None:
            labels = prompts.labels(labels)
        output = self._forward_changed(
            prompts.dropping,
            self._llm_arguments(prompts),
            inputs_embeds=embeds,
            attention_mask=prompts.mask,
            position_ids=prompts.positions(positions),
            # Which tokens have a logit is known behind the last cut.
            labels=labels if prompts.dropping is None else None,
            use_cache=False,
            **kwargs,
        )
        if prompts.dropping is not None:
            prompts.note_survivors()
            if labels is not None:
                vocabulary = self.model.config.get_text_config().vocab_size
                left = prompts.dropping.labels(labels)
                output.loss = self.model.loss_function(logits=output.logits, labels=left, vocab_size=vocabulary)
        return output

    @torch.compiler.disable
    def _forward_changed(self, dropping: Dropping | None, llm_arguments: dict | None, **step):
        """The model's own forward() with cuts in its LLM, an adaptive cache, or further arguments for its LLM."""
        llm = self.model.model.language_model
        with cutting(llm, dropping, step.get(CACHE)), _added(llm, llm_arguments):
            return self._forward(**step)

    def _prompts(self, ids: Tensor | None, given: dict) -> Prompts | None:
        """Prompts of a request, or None for a request that runs as without compress(). Removes the pixels from `given`."""
        for name in self.family.videos:
            if given.get(name) is not None:
                raise UserError(f"{name} came with the prompt, allowed under compress() are images, and no videos")
        for name in ("inputs_embeds", "position_ids", "mm_encoder_outputs"):
            if given.get(name) is not None:
                raise UserError(f"{name} came with the prompt, but compress() makes it itself: leave it out")
        for name in ("past_key_values", "cache"):
            if given.get(name) is not None and given[name].get_seq_length():
                raise UserError(f"{name} holds an earlier prompt, allowed under compress() is the whole prompt anew")
        for name in FROM_CONFIG:
            if given.get(name) is not None:
                raise UserError(f"{name} came with the prompt, but compress() reads it from the model's configuration")
        pixels, *others = self.family.image_inputs
        images = {name: given.get(name) for name in self._image_inputs}
        given.pop(pixels, None)
        self.last_selection = []
        if images[pixels] is None:
            # An adaptive cache also evicts entries of text.
            text_alone = ids is not None and self.config.cache_policy != "full"
            return Prompts(self.family, ids, images, self.config) if text_alone else None
        missing = [name for name in others if images[name] is None] + ["input_ids"] * (ids is None)
        if missing:
            raise UserError(f"{pixels} came without {' and '.join(missing)}, and a prompt with images has all of them")
        return Prompts(self.family, ids, images, self.config)

    def _llm_arguments(self, prompts: Prompts, copies: int = 1) -> dict:
        """Further arguments of the LLM in prefill of `copies` rows per prompt."""
        is_image, *beside = (states.repeat_interleave(copies, dim=0) for states in (prompts.is_image, *prompts.beside))
        return self.family.llm_arguments(is_image, beside)

    def _shorten(self, prompts: Prompts, ids: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """Embeddings [B, L, D] of the tokens that stay."""
        embeds = prompts.shorten(ids, mask, self._markers, labels)
        self.last_selection = prompts.selections
        self.family.count_dropped(prompts.dropped)
        return embeds


def _every(positions: Tensor, copies: int) -> Tensor:
    """Every `copies`-th row of positions [..., B, S]."""
    return positions.unflatten(-2, (-1, copies))[..., 0, :]


@contextmanager
def _added(llm, arguments: dict | None):
    """Add `arguments` to every call of the module `llm` inside the block.

    transformers' forward() makes them only where it runs the tower itself, and has no way to pass them on.
    """
    if not arguments:
        yield
        return
    handle = llm.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | arguments), with_kwargs=True)
    # torch.compile does not notice a new hook on a module that it has compiled.
    with handle, torch.compiler.set_stance("force_eager"):
        yield
