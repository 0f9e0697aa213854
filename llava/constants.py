"""Markers of the LLaVA protocol (arXiv 2304.08485), under LLaVA's own names."""

IMAGE_TOKEN_INDEX = -200  # placeholder of an image in input_ids; it is negative, so no vocabulary has it
IGNORE_INDEX = -100  # label of a token without loss; the default ignore_index of torch's cross_entropy
DEFAULT_IMAGE_TOKEN = "<image>"
