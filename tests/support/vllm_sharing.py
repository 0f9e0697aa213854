"""What questions about one image share in vLLM, for tests of the plugin's families."""

from tiny_checkpoints import QUESTIONS, make_image

from llava.methods.before_llm import SELECTORS


def check_sharing(pair, methods, prompt, settings, side):
    """Assert that questions about one image select once exactly where the method reads neither them nor the prompt.

    pair: has ask() and `selected`, the number of selections. prompt: makes one of a question; settings: makes the keys of a
    method. side: of the images, in pixels.
    """
    for nth, method in enumerate(methods):
        image, before = make_image(side + nth, 81), pair.selected
        for text in QUESTIONS:
            pair.ask([(prompt(text), [image], settings(method))])
        shared = not SELECTORS[method].reads_text and not SELECTORS[method].reads_key
        assert pair.selected - before == (1 if shared else len(QUESTIONS)), method
