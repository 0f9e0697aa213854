"""LLaVA's module of this name, as far as scripts written for LLaVA import it."""


def disable_torch_init() -> None:
    """LLaVA's scripts call this before loading, to save the time of random weights. There is nothing to switch off here:
    load_pretrained_model makes no random weights."""
