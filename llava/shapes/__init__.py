"""The demo task: pictures of coloured shapes, digits and letters, questions about them, and their tokenizer.

The package needs only numpy and Pillow, and `tokenizers` for the tokenizer. Importing it never imports torch.
"""
