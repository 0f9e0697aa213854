"""The service: one checkpoint on a thread of its own, which answers the requests of any number of threads in batches.

    with Service.load("playground/llava-shapes-v1.5", config=AdaVConfig()) as service:
        reply = service.submit(Request((Turn("user", "What colour is the circle?", (picture,)),)))
        for piece in reply: print(piece, end="")
        reply.result().seconds

Requests that wait together and have the same configuration form a batch, in the order in which they came. One batch runs
at a time: comparisons do not slow each other down.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from llava.common.errors import UserError, first_line
from llava.config import AdaVConfig
from llava.methods.options import OPTION_RULES
from llava.serve.service.reply import Answered, Failed, KeptTokens, Reply
from llava.serve.service.request import Request, Turn

__all__ = ["Answered", "Busy", "Closed", "Failed", "KeptTokens", "Reply", "Request", "Service", "Turn"]

# Seconds that a first request waits for others to come along. Batches are not joined on their way, so whoever comes a
# little later than the others would wait for all of their answers.
GATHER = 0.01
# Options that name files: a request may not choose them, the service's own configuration may.
FILE_OPTIONS = ("table", "text_tower")
# Of the numbers that a request may set: more than there ever are tokens, layers or steps.
LARGEST = 10**9
log = logging.getLogger("llava.serve")


class Busy(UserError):
    """As many requests are waiting as may wait."""


class Closed(UserError):
    """The service has been closed, or was before the request's turn came."""


class Service:
    """One checkpoint and one Engine on a thread of its own.

    model: a BatchAnswerer, which belongs to the service from now on. max_batch: requests that are answered together;
    max_waiting: requests that may wait for their turn.
    """

    def __init__(self, model, config: AdaVConfig, max_batch: int = 8, max_waiting: int = 64):
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise UserError(f"{name} is {value}, allowed is a whole number of at least 1")
        self.model, self.config, self.max_batch, self.max_waiting = model, config, max_batch, max_waiting
        model.check(config)
        self._waiting: deque = deque()
        self._running: list[Reply] = []
        self._changed = threading.Condition()
        self._closing = False
        self._counts: Counter[str] = Counter()
        self._batches: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._serve, name="llava-service", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        model_path,
        *,
        model_base=None,
        config: AdaVConfig,
        device_map="auto",
        dtype="auto",
        max_batch: int = 8,
        max_waiting: int = 64,
        max_prompt_tokens: int | None = None,
        image_cache: int = 0,
    ) -> Service:
        """Load a checkpoint (as load_pretrained_model does) and serve it. UserError for whatever is wrong with it.

        max_prompt_tokens: None is all that the model's context holds. image_cache: bytes of encoded images that are kept
        for later requests about the same picture; with 0 no request is faster because of another.
        """
        from llava.serve.service.batches import BatchAnswerer

        model = BatchAnswerer(model_path, model_base, config, device_map, dtype, max_prompt_tokens, image_cache)
        return cls(model, config, max_batch, max_waiting)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exception) -> None:
        self.close(finish=False)

    def configure(self, settings: dict) -> AdaVConfig:
        """The service's configuration with some keys changed by a request; ConfigError says what is wrong with them.

        Options that name files stay the service's own: a request that sets them to something else is refused.
        """
        unknown = [key for key in settings if key not in self.config.to_dict()]
        if unknown:
            allowed = ", ".join(self.config.to_dict())
            raise UserError(f'adav: unknown key "{unknown[0][:80]}", allowed are {allowed}')
        options = settings.get("options")
        unknown = [name for name in options if name not in OPTION_RULES] if isinstance(options, dict) else []
        if unknown:
            raise UserError(f'adav: unknown option "{unknown[0][:80]}", allowed are {", ".join(OPTION_RULES)}')
        if any(abs(value) > LARGEST for value in _numbers(settings)):
            raise UserError(f"adav: a number that is out of all range, allowed is up to {LARGEST:,}")
        config = AdaVConfig(**(self.config.to_dict() | settings))
        for name in FILE_OPTIONS:
            if name in config.options and config.options[name] != self.config.options.get(name):
                raise UserError(f'adav: "options.{name}" names a file, which the server\'s own configuration alone may')
        return config

    def submit(self, request: Request, listener: Callable[[str | None], None] | None = None) -> Reply:
        """Queue a request. Its images are made ready in the caller's thread.

        listener: called in the service's thread with each piece of the answer, and with None at its end.
        UserError for a request that cannot be answered, Busy where too many wait, Closed after close().
        """
        submitted = time.perf_counter()
        with self._changed:
            self._refuse()
        reply = Reply(listener, self)
        job = self.model.job(request, request.config or self.config, reply, submitted)
        with self._changed:
            self._refuse()
            self._waiting.append((_key(job.config), job))
            self._changed.notify_all()
        return reply

    def close(self, finish: bool = True) -> None:
        """Stop: what waits fails with one sentence, what runs is answered first (finish), or ends where it is."""
        with self._changed:
            self._closing = True
            waiting, running = [job.reply for _, job in self._waiting], list(self._running)
            self._waiting.clear()
            self._changed.notify_all()
        for reply in waiting:
            reply.fail(Closed("the service was closed before the request's turn came"))
        if not finish:
            for reply in running:
                reply.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread.is_alive() and not self._closing

    def stats(self) -> dict:
        """Requests waiting and running now; answered, cancelled and failed so far; their prompt_tokens and new_tokens;
        batches: size -> how many batches of it there were."""
        with self._changed:
            names = ("answered", "cancelled", "failed", "prompt_tokens", "new_tokens")
            return {
                "waiting": len(self._waiting),
                "running": sum(not reply.over for reply in self._running),
                **{name: self._counts[name] for name in names},
                "batches": dict(sorted(self._batches.items())),
            }

    # --- for its replies ------------------------------------------------------------------------------------------

    def withdraw(self, reply: Reply) -> None:
        """Take a cancelled request out of the queue, if it still waits."""
        with self._changed:
            left = [one for one in self._waiting if one[1].reply is not reply]
            waited = len(left) < len(self._waiting)
            self._waiting = deque(left)
        if waited:
            reply.finish(Answered("", "cancelled"))

    def count(self, answered: Answered | None) -> None:
        """A request has come to its end; None: it failed."""
        with self._changed:
            if answered is None:
                self._counts["failed"] += 1
                return
            self._counts["cancelled" if answered.finish == "cancelled" else "answered"] += 1
            self._counts["prompt_tokens"] += answered.prompt_tokens
            self._counts["new_tokens"] += answered.new_tokens

    # --- inside ---------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        if not self.alive:
            raise Closed("the service has been closed")
        if len(self._waiting) >= self.max_waiting:
            raise Busy(f"{self.max_waiting} requests are waiting, which is as many as may wait; try again later")

    def _serve(self) -> None:
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """One batch; False once the service has been closed. (A frame of its own: no request outlives its batch.)"""
        jobs = self._next_batch()
        if jobs:
            self._answer(jobs)
        return bool(jobs)

    def _next_batch(self) -> list:
        """Wait for requests: the first and those behind it that have its configuration. Empty: the service closes."""
        with self._changed:
            self._running = []
            while not self._waiting:  # the first may have been withdrawn while others were waited for
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._changed.wait_for(lambda: len(self._waiting) >= self.max_batch or self._closing, timeout=GATHER)
                if self._closing:
                    return []
            key, chosen, left = self._waiting[0][0], [], deque()
            for one in self._waiting:
                if one[0] == key and len(chosen) < self.max_batch:
                    chosen.append(one[1])
                else:
                    left.append(one)
            self._waiting, self._running = left, [job.reply for job in chosen]
            return chosen

    def _answer(self, jobs: list) -> None:
        """A batch through the model. Where it fails before any answer has begun, its halves are tried by themselves, so
        that nobody fails for another's request and memory may suffice."""
        try:
            with self._changed:
                self._batches[len(jobs)] += 1
            self.model.answer(jobs)
            return
        except Exception as error:
            failure = _failure(error)
        self.model.free_memory()
        if len(jobs) > 1 and not any(job.reply.over or job.reply.text for job in jobs):
            middle = len(jobs) // 2
            self._answer(jobs[:middle])
            self._answer(jobs[middle:])
            return
        for job in jobs:
            if not job.reply.over:
                job.reply.fail(type(failure)(str(failure)))


def _key(config: AdaVConfig) -> str:
    """Equal for configurations whose requests may share a batch."""
    return json.dumps(config.to_dict(), sort_keys=True)


def _numbers(value) -> list:
    """All numbers in a JSON value."""
    if isinstance(value, (dict, list)):
        return [found for one in (value.values() if isinstance(value, dict) else value) for found in _numbers(one)]
    return [value] if isinstance(value, (int, float)) else []


def _failure(error: Exception) -> Exception:
    """What a reply raises for it: without the frames, which hold the tensors of the batch."""
    if isinstance(error, UserError):
        return type(error)(str(error))
    log.error("a batch failed", exc_info=error)
    return Failed(f"the model failed on this request ({type(error).__name__}: {first_line(error)[:200]})")
