"""Features of vLLM's engine that selection does not work with, for families whose kept tokens carry their positions.

vLLM's processors see the configuration of the model alone. So the whole configuration is read when vLLM completes it, in
the process that will also answer requests, and what it says is noted in the configuration of the model.
"""

from __future__ import annotations

from vllm.model_executor.models.config import VerifyAndUpdateConfig

_NOTE = "adav_refuses"  # attribute of the model's configuration


def refused_because(hf_config) -> str | None:
    """Return why the engine cannot select tokens, as the end of a sentence; None where it can. hf_config: of the model."""
    return getattr(hf_config, _NOTE, None)


class EngineCheck(VerifyAndUpdateConfig):
    """What vLLM calls for a model class that is registered in its MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Note in the configuration of the model which feature of the engine is in the way. Nothing else changes."""
        model, lora = vllm_config.model_config, vllm_config.lora_config
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        # A kept token's place in its image travels in columns of its embedding, from the tower to the first LLM layer.
        found = [
            words
            for words, on in (
                ("--pipeline-parallel-size above 1", parallel.pipeline_parallel_size > 1),
                ("--enable-dbo", parallel.enable_dbo),
                ("--speculative-config", vllm_config.speculative_config is not None),
                ("--video-pruning-rate", model.multimodal_config.is_multimodal_pruning_enabled()),
                ("cudagraph_mm_encoder", compilation.cudagraph_mm_encoder),
                ("compile_mm_encoder", compilation.compile_mm_encoder),
                ("--enable-tower-connector-lora", lora is not None and lora.enable_tower_connector_lora),
            )
            if on
        ]
        if found:
            sentence = f"the server runs with {found[0]}; allowed is a server without it"
            setattr(model.hf_config, _NOTE, sentence)
