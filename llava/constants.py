"""Markers of the LLaVA protocol (arXiv 2304.08485), as its users know them."""

IMAGE_TOKEN_INDEX = -200  # stands in input_ids where an image goes; no vocabulary has it
IGNORE_INDEX = -100  # labels that the loss passes over
DEFAULT_IMAGE_TOKEN = "<image>"
