"""Estimates of many classes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from distilbeam.pipelines.labelling.label_quality import Estimates
from distilbeam.selection.trust.debias import DebiasEstimator
from distilbeam.selection.trust.noise import TeacherNoise


def test_more_candidates_than_sixteen_bits_hold() -> None:
    classes = 40_000
    logprobs = np.full((2, classes), -np.log(classes), np.float32)
    noise = TeacherNoise((0.0, 1.0), (0.5, 0.5), 0.5, 0.9, (1.0,) * (classes - 2), classes)
    debias = DebiasEstimator.fit(np.zeros((2, classes), np.float32), logprobs, np.array([0, 1]), soft=True)
    columns = Estimates(noise, debias).columns(logprobs, np.zeros((2, classes), np.float32))
    assert columns["candidates"].type == pa.int32()
    assert columns["candidates"].to_pylist() == noise.candidates(logprobs).tolist()
    assert max(columns["candidates"].to_pylist()) > 2**15
