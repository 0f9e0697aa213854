"""Compression, what `compress` returns: one model instance's methods redirected while a with-block lasts, and then put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.methods.before_llm import Selection


class Compression(ABC):
    """Base of a family's compression. Enter it once at a time; nothing but the instance `model` is touched.

    model, config, processor: as `compress` takes them.
    last_selection: what was kept for the last batch, per image in reading order; it outlives the block.
    """

    last_selection: list[Selection] | None = None

    def __init__(self, model, config: AdaVConfig, processor=None):
        self.model, self.config, self.processor = model, config, processor

    @abstractmethod
    def redirections(self) -> dict[str, Callable]:
        """Method of the model -> bound method of this object that takes its place. Called on entering; UserError where
        the model or the configuration cannot be used."""

    def __enter__(self):
        if any(isinstance(getattr(value, "__self__", None), Compression) for value in vars(self.model).values()):
            raise UserError(
                f"this {type(self.model).__name__} is under compress() already: leave that block first, one at a time "
                "is allowed"
            )
        redirected = self.redirections()
        # A method is the class's; where the instance has one of its own (accelerate's hooks), that comes back.
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
