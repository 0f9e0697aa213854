"""Compression, the context manager that `compress` returns: it replaces methods of one model and puts them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.methods.before_llm import Selection


class Compression(ABC):
    """Base class of a family's compression. It changes only the instance `model`. A model has one at a time.

    model, config, processor: as `compress` takes them.
    last_selection: Selection of each image of the last batch, in reading order. It stays after the block.
    """

    last_selection: list[Selection] | None = None

    def __init__(self, model, config: AdaVConfig, processor=None):
        self.model, self.config, self.processor = model, config, processor

    @abstractmethod
    def redirections(self) -> dict[str, Callable]:
        """Name of a method of the model -> the function that replaces it.

        __enter__ calls this. UserError if the model or the configuration cannot be used.
        """

    def __enter__(self):
        # A second block would save the first one's methods as the originals, and leave them there when it ends.
        if any(isinstance(getattr(value, "__self__", None), Compression) for value in vars(self.model).values()):
            raise UserError(
                f"this {type(self.model).__name__} is under compress() already: leave that block first, one at a time "
                "is allowed"
            )
        redirected = self.redirections()
        # Normally a method belongs to the class, and deleting the instance's attribute restores it. accelerate's hooks
        # put a method on the instance; that one is saved here and put back.
        self._before = {name: vars(self.model)[name] for name in redirected if name in vars(self.model)}
        self._redirected = tuple(redirected)
        for name, method in redirected.items():
            setattr(self.model, name, method)
        return self

    def __exit__(self, *exception) -> None:
        for name in self._redirected:
            delattr(self.model, name)
        for name, method in self._before.items():
            setattr(self.model, name, method)
