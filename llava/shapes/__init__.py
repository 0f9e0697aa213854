"""The demo task: pictures of coloured shapes, digits and letters, questions about them, and their tokenizer.

Only numpy and Pillow are needed here (`tokenizers` for the tokenizer): importing this package never imports torch.
"""
