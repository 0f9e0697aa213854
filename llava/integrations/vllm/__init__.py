"""AdaV inside vLLM: fewer vision tokens per image for LLaVA-1.5 and LLaVA-1.6, with vLLM's own engine and server.

    pip install "adav[vllm]"
    vllm serve llava-hf/llava-v1.6-vicuna-7b-hf \
        --mm-processor-kwargs '{"adav": {"method": "adav", "overall_tokens": 144}}'

vLLM finds `register` by itself (entry point "vllm.general_plugins"). A server and each request may carry settings:
`mm_processor_kwargs={"adav": {...}}` with the keys of adav_configs.json. Keys of a request replace those of the server.
Without "adav", everything is vLLM's own. Methods and rules are those of llava.methods.

settings.py       which settings a server and a request may have
image_request.py  what the model is told about one image, as a tensor that vLLM carries along
prompt_images.py  images and prompt of one request: tiles, pixels, number of tokens, questions
tower_store.py    tower outputs of recent images, shared by all questions and methods
processor.py      vLLM's processor of a request, with our settings
model.py          vLLM's model classes, with selection between tower and LLM

Nothing here but processor.py and model.py imports vllm.
"""

#: Architectures of vLLM that `register` replaces, by subclasses of vLLM's own.
ARCHITECTURES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")


def register() -> None:
    """Register the model classes. vLLM calls this in each of its processes, before it reads a checkpoint."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        # A string: importing the class would import torch and start CUDA in processes that only read arguments.
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")
