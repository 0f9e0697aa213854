"""The folder that vLLM loads a checkpoint from: the checkpoint itself if it is in transformers' format, else a copy.

The copy is written once, into `<output>/llava-hf/<name>-<digest>/checkpoint`, and shared by all runs below `output`. It
takes as much disk as the checkpoint.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, digest_of
from llava.common.find_checkpoint import EvalCheckpoint
from llava.eval.runs.locks import hold


@dataclass(frozen=True)
class Exported:
    """Where vLLM finds a checkpoint. output: folder above all run folders."""

    checkpoint: EvalCheckpoint
    model_base: EvalCheckpoint | None
    output: Path

    @property
    def needed(self) -> bool:
        """Whether the checkpoint has to be copied: it is in LLaVA's format, or lies on a model_base."""
        return self.model_base is not None or "text_config" not in self.checkpoint.settings

    @property
    def folder(self) -> Path:
        """The folder that vLLM loads. Its name has the content of the checkpoint, so a changed one is copied anew."""
        if not self.needed:
            return self.checkpoint.folder
        digest = digest_of([self.checkpoint.identity, self.model_base and self.model_base.identity])
        return Path(self.output) / "llava-hf" / f"{self.checkpoint.short_name}-{digest}" / "checkpoint"

    def write(self) -> None:
        """Write the copy, if it is needed and not there yet. UserError for what transformers' format cannot hold.

        Takes the memory of the whole model, and minutes for a large one. torch is imported only here.
        """
        folder = self.folder
        if not self.needed or folder.is_dir():
            return
        with as_user_error_on_write(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(folder.parent / "lock")
        try:
            # Another start of a run may have written it before this one got the lock.
            if folder.is_dir():
                return
            from llava.model.export import load_and_save

            print(f"note: vLLM reads transformers' format, so a copy is written into {folder}", file=sys.stderr)
            part = folder.with_name("part")
            with as_user_error_on_write(folder):
                shutil.rmtree(part, ignore_errors=True)
                base = self.model_base and str(self.model_base.folder)
                load_and_save(str(self.checkpoint.folder), base, str(part), "llava-hf", self._dtype())
                # The name appears at once, so a folder of this name is complete.
                os.rename(part, folder)
        finally:
            os.close(lock)

    def _dtype(self) -> str:
        """The dtype of the checkpoint's own weights. Where config.json does not say it, one that holds them all."""
        settings = (self.model_base or self.checkpoint).settings
        name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
        if name not in ("float32", "float16", "bfloat16"):
            raise UserError(
                f'{self.checkpoint.name}: config.json says dtype "{name}", allowed are float32, float16 and bfloat16'
            )
        return name
