"""A sentence encoder in a local Hugging Face folder: texts to vectors of length one.

The last hidden states of a text's tokens are averaged, or that of the first is taken where the folder's pooling says so
(`1_Pooling/config.json`, as sentence-transformers write it). Weights are read from safetensors only, code in the folder is not
executed, and nothing is downloaded.

References:
  Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084, section 3 (pooling).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

_POOLING = Path("1_Pooling") / "config.json"


class SentenceEncoder:
    """Encodes texts.

    Args:
      folder: with config.json, the tokenizer's files and safetensors.
      max_length: tokens of a text that are read.

    Raises:
      ValueError: the folder holds no encoder.
    """

    def __init__(self, folder: str, max_length: int) -> None:
        import transformers

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"student.encoder.folder: {folder} must be a folder with config.json, a tokenizer and safetensors on this disk"
            )
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self._model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
        except Exception as e:  # of a damaged folder anything
            raise ValueError(
                f"student.encoder.folder: {folder} holds no encoder with safetensors: {str(e).partition(chr(10))[0]}"
            ) from e
        places = getattr(self._model.config, "max_position_embeddings", None)
        self._longest = min(length for length in (max_length, self._tokenizer.model_max_length, places) if length)
        pooling = Path(folder) / _POOLING
        told = json.loads(pooling.read_text()) if pooling.is_file() else {}
        self._first = bool(told.get("pooling_mode_cls_token"))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode texts, float32 [texts, m]."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        states_BLM = self._model(**tokens).last_hidden_state
        if self._first:
            vectors = states_BLM[:, 0]
        else:
            there = tokens["attention_mask"].unsqueeze(-1)
            vectors = (states_BLM * there).sum(1) / there.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(vectors.float(), dim=1).numpy()
