"""A teacher that is a causal language model of transformers in a local folder.

Weights are read from safetensors only, code in the folder is not run, and nothing is downloaded. The model runs over
some blocks at a time up to its last hidden states; its head makes logits of some hundred positions, of which labels are
made where they are. The draws of a block's labels depend on its id and on what the labels mean, never on its batch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from distilbeam.inputs.blocks import BLOCK_COLUMNS, COMPLETION_MASK, INPUT_IDS, SEGMENT_IDS, has_label
from distilbeam.inputs.config import InputError, require_columns
from distilbeam.inputs.tokenizer import TokenizerFolder, load_tokenizer
from distilbeam.teacher.backends.huggingface import positions
from distilbeam.teacher.backends.local import first_line
from distilbeam.teacher.backends.torch import find_device, torch_out_of_memory
from distilbeam.teacher.config import CausalLMConfig
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Halving
from distilbeam.teacher.protocol import NotPickled
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.softlabels.columns import flat_values
from distilbeam.teacher.softlabels.selecting import row_uniforms
from distilbeam.teacher.tokens.encoding import encode_positions, positions_at_once
from distilbeam.teacher.tokens.head import Halves
from distilbeam.teacher.tokens.segments import way_of

Blocks = Mapping[str, npt.NDArray[Any]]


class CausalLMTeacher(NotPickled):
    """Labels blocks with a causal language model; see `TokenTeacher`.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: transformers is not installed, the folder holds no such model, its head is smaller than its tokenizer, or it
        lets the texts of a block see each other whatever is done.
    """

    source = "logits"
    parallel = 1

    def __init__(self, config: CausalLMConfig) -> None:
        self._config = config
        self._device = find_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        if not Path(config.model).is_dir():
            raise ValueError(
                f"teacher.model: {config.model} must be a folder with config.json and safetensors on this disk"
            )
        self._artefact = Artefact([config.model], f"dtype={config.dtype}")
        self._tokenizer: TokenizerFolder = load_tokenizer(config.model, "teacher.model")
        self._tokens = self._tokenizer.fingerprint()
        self.num_classes = self._tokenizer.num_classes
        model = self._load()
        self.max_length = positions(model)
        self._halves: Halves | None = Halves(model, self.num_classes)
        halves = self._halves
        with torch.inference_mode():
            self._way = way_of(
                lambda *given: _all_logits(halves, *given),
                self.num_classes,
                self._device,
                self._dtype,
                f"teacher.model: {config.model}",
            )
        self._halving: Halving | None = None

    def fingerprint(self) -> str:
        """Identify the answers by the folder's files and the type that it computes in; see `Teacher`."""
        return f"causal_lm:{Path(self._config.model).name}:{self._artefact.digest()}"

    def tokenizer_fingerprint(self) -> str:
        """Identify what its ids mean."""
        return self._tokens

    @property
    def keeps_apart_by(self) -> str:
        """The way in which the texts of a block are kept apart: `positions`, `mask` or `rows`."""
        return self._way.name

    def token_labels(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> TokenLabels:
        """Label blocks; see `TokenTeacher`."""
        if self._halves is None:
            raise RuntimeError("the teacher was closed; load it again")
        arrays = self._read(blocks, spec)
        rows = max(1, self._config.batch_tokens // (spec.sequence_length or 1))
        if self._halving is None or (self._halving.rows or 0) > rows:
            self._halving = Halving(lambda given: self._run(given, spec), torch_out_of_memory, self._release, rows)
        halving = Halving(lambda given: self._run(given, spec), torch_out_of_memory, self._release, self._halving.rows)
        answers = halving(arrays)
        self._halving.rows = halving.rows
        return TokenLabels.unpack(answers, spec)

    @torch.inference_mode()
    def complete(self, text: str, tokens: int = 32) -> str:
        """Continue a text by the most probable token, again and again.

        Args:
          text: at least one token.
          tokens: how many to add at most; the end of the text ends it.

        Returns:
          The text and what was added.
        """
        halves = self._halves
        if halves is None:
            raise RuntimeError("the teacher was closed; load it again")

        def following(ids: list[int]) -> int:
            hidden = halves.hidden(torch.tensor([ids], device=self._device), None, None)[0, -1:]
            return int(halves.logits(hidden)[0, : self.num_classes].argmax())

        return self._tokenizer.continued(text, tokens, following)

    def close(self) -> None:
        """Drop the model; see `Teacher`."""
        self._halves = None
        self._release()

    def _read(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> dict[str, npt.NDArray[Any]]:
        """Give the columns of blocks as arrays, and the seeds of their draws."""
        require_columns(blocks, BLOCK_COLUMNS)
        length = spec.sequence_length or 0
        arrays = {name: flat_values(blocks.column(name), length) for name in BLOCK_COLUMNS}
        ids = arrays[INPUT_IDS]
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.num_classes:
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise InputError(
                f"column {INPUT_IDS} must hold ids from 0 to {self.num_classes - 1:,}, which the teacher's tokenizer can emit, got "
                f"{wrong:,}"
            )
        if spec.kind == "sampled":
            arrays["seeds"] = block_seeds(blocks, spec)
        return arrays

    @torch.inference_mode()
    def _run(self, blocks: Any, spec: SoftLabelSpec) -> npt.NDArray[np.float32]:
        assert self._halves is not None
        halves = self._halves
        ids, segments = blocks[INPUT_IDS], blocks[SEGMENT_IDS]
        labels = TokenLabels.empty(len(ids), spec)
        rows, places = np.nonzero(has_label(segments, blocks[COMPLETION_MASK]))
        if not len(rows):
            return labels.pack()
        states = self._way(halves.hidden, ids, segments, self._device)
        uniforms = _uniforms(blocks["seeds"], spec) if spec.kind == "sampled" else None
        step = positions_at_once(spec)
        for start in range(0, len(rows), step):
            at = (rows[start : start + step], places[start : start + step])
            tokens = torch.from_numpy(ids[at[0], at[1] + 1].astype(np.int64)).to(self._device)
            logits = halves.logits(states[tuple(torch.from_numpy(part).to(self._device) for part in at)])
            drawn = None if uniforms is None else uniforms[at]
            classes, logprobs, tail, token_logprob = encode_positions(logits, tokens, spec, drawn)
            labels.classes[at], labels.logprobs[at], labels.token_logprob[at] = classes, logprobs, token_logprob
            if labels.tail_logmass is not None:
                labels.tail_logmass[at] = tail
        return labels.pack()

    def _load(self) -> Any:
        logging.getLogger("torch.utils._pytree").setLevel(
            logging.ERROR
        )  # notes about libraries that transformers imports
        import transformers

        transformers.utils.logging.disable_progress_bar()
        folder = self._config.model
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # of a damaged folder anything
            raise ValueError(
                f"teacher.model: {folder} holds no causal language model with safetensors: {first_line(e)}"
            ) from e
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise ValueError(
                f"teacher.model: {folder} holds no weights for {missing}: they would be drawn at random; name a language model "
                "that was trained"
            )
        outputs = model.get_output_embeddings()
        size = len(outputs.weight) if outputs is not None else model.config.vocab_size
        if size < self.num_classes:
            raise ValueError(
                f"teacher.model: the head in {folder} has {size:,} outputs, fewer than the {self.num_classes:,} ids of its "
                "tokenizer; the two belong to different models"
            )
        return model.to(device=self._device, dtype=self._dtype).eval()

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def block_seeds(blocks: pa.RecordBatch, spec: SoftLabelSpec) -> npt.NDArray[np.uint64]:
    """Seed each block's draws by its id and what the labels mean.

    Args:
      blocks: with the column `example_id`.
      spec: of the labels, with the teacher's fingerprint.

    Returns:
      uint64 [n].
    """
    require_columns(blocks, ("example_id",))
    meaning = hashlib.blake2b(spec.meaning().encode(), digest_size=32).digest()
    values = blocks.column("example_id").cast(pa.binary()).to_pylist()
    hashes = (hashlib.blake2b(value, digest_size=8, key=meaning).digest() for value in values)
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64, copy=False)


def _uniforms(seeds: npt.NDArray[np.uint64], spec: SoftLabelSpec) -> npt.NDArray[np.float64]:
    shape = (len(seeds), spec.labels_per_row, spec.k or 0)
    return row_uniforms(seeds, spec.width).reshape(shape)


def _all_logits(halves: Halves, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    hidden = halves.hidden(ids, places, mask)
    logits = halves.logits(hidden.flatten(0, 1))
    return logits.view(*hidden.shape[:2], -1)
