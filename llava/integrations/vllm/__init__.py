"""AdaV inside vLLM: fewer vision tokens per image for LLaVA and Qwen-VL, with vLLM's own engine and server.

    pip install "adav[vllm]"
    vllm serve llava-hf/llava-v1.6-vicuna-7b-hf \
        --mm-processor-kwargs '{"adav": {"method": "adav", "overall_tokens": 144}}'

vLLM finds `register` by itself (entry point "vllm.general_plugins"). A server and each request may carry settings:
`mm_processor_kwargs={"adav": {...}}` with the keys of adav_configs.json. Keys of a request replace those of the server.
Without "adav", everything is vLLM's own. Methods and rules are those of llava.methods.

settings.py       which settings a server and a request may have
engine_check.py   which features of the engine are in the way of Qwen-VL
image_request.py  what the model is told about one image, as a tensor that vLLM carries along
prompt_images.py  images and prompt of one request: places, number of tokens, questions; tiles and pixels of LLaVA
grid_positions.py positions of kept tokens under M-RoPE
row_store.py      tensors of recent images in memory of a fixed size
tower_store.py    tower outputs of recent images of LLaVA, shared by all questions and methods
clip_tower.py     the run of LLaVA's tower, and what vLLM's attention does not return of it
processor.py      what the families' processors of a request share
selecting.py      what the families' model classes share
families/         one file per family: its processors and its model classes

Nothing here but engine_check.py, processor.py, clip_tower.py, selecting.py and families/ imports vllm.
"""

#: Architectures of vLLM that `register` replaces by subclasses of vLLM's own -> the file in families/.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl",
    "Qwen3VLForConditionalGeneration": "qwen_vl",
}


def register() -> None:
    """Register the model classes. vLLM calls this in each of its processes, before it reads a checkpoint."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from llava.integrations.vllm.engine_check import EngineCheck

    for name, file in ARCHITECTURES.items():
        # A string: importing the class would import torch and start CUDA in processes that only read arguments.
        ModelRegistry.register_model(name, f"{__name__}.families.{file}:{name}")
        if file == "qwen_vl":
            MODELS_CONFIG_MAP[name] = EngineCheck
