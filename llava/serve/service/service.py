"""The service: one checkpoint on its own thread. It answers requests of any number of threads in batches.

    with Service.load("playground/llava-shapes-v1.5", config=AdaVConfig()) as service:
        reply = service.submit(Request((Turn("user", "What colour is the circle?", (picture,)),)))
        for piece in reply: print(piece, end="")
        reply.result().seconds

Waiting requests with equal configurations form a batch, in the order of their arrival. One batch runs at a time, so
that configurations that are compared do not slow each other down.
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

# Seconds that the first request waits for others. A running batch takes no new rows, so a request that came just after
# its start would wait for all of its answers.
GATHER = 0.01
# Options that name files. Only the service's own configuration may set them: a request could otherwise read any file.
FILE_OPTIONS = ("table", "text_tower")
# Largest number that a request may set. There are never so many tokens, layers or steps, and torch fails on numbers
# beyond 64 bits.
LARGEST = 10**9
log = logging.getLogger("llava.serve")


class Busy(UserError):
    """Raised if the queue is full."""


class Closed(UserError):
    """Raised for a request to a closed service, and for one that still waited when the service was closed."""


class Service:
    """One checkpoint and one Engine on its own thread.

    model: a BatchAnswerer; nothing else may use it from now on. config: for requests without a configuration.
    max_batch: requests that are answered together. max_waiting: requests that may wait.
    """

    def __init__(self, model, config: AdaVConfig, max_batch: int = 8, max_waiting: int = 64):
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise UserError(f"{name} is {value}, allowed is a whole number of at least 1")
        self.model, self.config, self.max_batch, self.max_waiting = model, config, max_batch, max_waiting
        model.check(config)
        self._waiting: deque = deque()
        self._running: list[Reply] = []
        # Its lock guards the queue, the running replies, the counts and _closing. Replies end outside of it, because
        # ending one calls its listener, which may do anything.
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
        threads: int | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
        max_prompt_tokens: int | None = None,
        image_cache: int = 0,
    ) -> Service:
        """A service of a checkpoint, which is loaded as load_pretrained_model loads it.

        threads: CPU threads; None leaves the choice to llava.common.threads.
        max_prompt_tokens: limit of a prompt; None allows what the model's context holds.
        image_cache: bytes of encoded images that are kept for later requests about the same picture. With 0 no request
            becomes faster because of an earlier one.
        Raises UserError for a checkpoint that cannot be loaded or does not fit the configuration.
        """
        from llava.serve.service.batches import BatchAnswerer

        model = BatchAnswerer(
            model_path, model_base, config, device_map, dtype, threads, max_prompt_tokens, image_cache
        )
        return cls(model, config, max_batch, max_waiting)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exception) -> None:
        self.close(finish=False)

    def configure(self, settings: dict) -> AdaVConfig:
        """The service's configuration with the keys of a request. UserError for keys or values that cannot be used.

        A request that changes an option that names a file is refused.
        """
        # Keys are checked here, because AdaVConfig(**...) would raise TypeError. An unknown option would be accepted
        # and only give a warning, which a client does not see.
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
        """Queue a request and return its Reply. Its images are cut into tiles in the caller's thread.

        listener: called in the service's thread with each piece of the answer, and with None at its end.
        Raises UserError for a request that cannot be answered, Busy for a full queue, Closed after close().
        """
        submitted = time.perf_counter()
        with self._changed:
            self._refuse()  # checked twice: before the work on the images, and again before the request is queued
        reply = Reply(listener, on_cancel=self.withdraw, on_end=self.count)
        job = self.model.job(request, request.config or self.config, reply, submitted)
        with self._changed:
            self._refuse()
            self._waiting.append((_key(job.config), job))
            self._changed.notify_all()
        return reply

    def close(self, finish: bool = True) -> None:
        """Stop the service. Waiting requests fail with Closed.

        finish: running requests are answered first; False cancels them. Returns when the thread has ended.
        """
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
        if self._thread is not threading.current_thread():  # a listener may call close(); a thread cannot join itself
            self._thread.join()

    @property
    def alive(self) -> bool:
        """True while requests are accepted and answered."""
        return self._thread.is_alive() and not self._closing

    def stats(self) -> dict:
        """Counts of requests and tokens.

        waiting, running: requests now. answered, cancelled, failed: requests so far. prompt_tokens, new_tokens: of
        ended requests. batches: size of a batch -> number of batches of that size.
        """
        with self._changed:
            names = ("answered", "cancelled", "failed", "prompt_tokens", "new_tokens")
            return {
                "waiting": len(self._waiting),
                "running": sum(not reply.over for reply in self._running),
                **{name: self._counts[name] for name in names},
                "batches": dict(sorted(self._batches.items())),
            }

    # --- called by replies ----------------------------------------------------------------------------------------

    def withdraw(self, reply: Reply) -> None:
        """Remove a cancelled request from the queue. Does nothing for a request that is running or has ended."""
        with self._changed:
            left = [one for one in self._waiting if one[1].reply is not reply]
            waited = len(left) < len(self._waiting)
            self._waiting = deque(left)
        if waited:
            reply.finish(Answered("", "cancelled"))

    def count(self, answered: Answered | None) -> None:
        """Count a request that has ended. None: it failed."""
        with self._changed:
            if answered is None:
                self._counts["failed"] += 1
                return
            self._counts["cancelled" if answered.finish == "cancelled" else "answered"] += 1
            self._counts["prompt_tokens"] += answered.prompt_tokens
            self._counts["new_tokens"] += answered.new_tokens

    # --- inside ---------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Raise Closed or Busy if no request can be taken. The lock must be held."""
        if not self.alive:
            raise Closed("the service has been closed")
        if len(self._waiting) >= self.max_waiting:
            raise Busy(f"{self.max_waiting} requests are waiting, which is as many as may wait; try again later")

    def _serve(self) -> None:
        """The loop of the service's thread."""
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """Answer one batch. False after the service has been closed.

        This is its own function, so that its stack frame and with it the tensors of the batch are freed at its end. A
        local name in the loop would keep them until the next batch arrives.
        """
        jobs = self._next_batch()
        if jobs:
            self._answer(jobs)
        return bool(jobs)

    def _next_batch(self) -> list:
        """Wait for requests. Returns the first and later ones of equal configuration; empty if the service closes."""
        with self._changed:
            self._running = []
            while not self._waiting:  # the first request may be withdrawn during the second wait
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
        """Answer a batch. If it fails before any answer has begun, answer its two halves separately.

        A request then fails only for its own sake, and a smaller batch may fit into memory.
        """
        try:
            with self._changed:
                self._batches[len(jobs)] += 1
            self.model.answer(jobs)
            return
        except Exception as error:
            failure = _failure(error)
        # Outside the except block: there the exception still holds the frames, and so the tensors of the batch.
        try:
            self.model.free_memory()
        except Exception as error:  # a CUDA error that stays; the replies must end all the same
            log.error("memory could not be freed", exc_info=error)
        if len(jobs) > 1 and not any(job.reply.over or job.reply.text for job in jobs):
            middle = len(jobs) // 2
            self._answer(jobs[:middle])
            self._answer(jobs[middle:])
            return
        for job in jobs:
            if not job.reply.over:
                job.reply.fail(type(failure)(str(failure)))


def _key(config: AdaVConfig) -> str:
    """A key of a configuration. Requests with equal keys may share a batch."""
    return json.dumps(config.to_dict(), sort_keys=True)


def _numbers(value) -> list:
    """All numbers in a JSON value, at any depth."""
    if isinstance(value, (dict, list)):
        return [found for one in (value.values() if isinstance(value, dict) else value) for found in _numbers(one)]
    return [value] if isinstance(value, (int, float)) else []


def _failure(error: Exception) -> Exception:
    """The exception that a reply raises for `error`, without its traceback, whose frames hold tensors of the batch."""
    if isinstance(error, UserError):
        return type(error)(str(error))
    log.error("a batch failed", exc_info=error)
    return Failed(f"the model failed on this request ({type(error).__name__}: {first_line(error)[:200]})")
