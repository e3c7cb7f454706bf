"""The operations of a TensorFlow SavedModel, looked at before TensorFlow loads it.

A SavedModel is a program: among its operations are some that read and write files and some that call Python. TensorFlow
runs whatever a signature contains, and initialisers already while the model is loaded.

Reference: https://github.com/tensorflow/tensorflow/blob/master/SECURITY.md ("TensorFlow models are programs")
"""

from __future__ import annotations

from pathlib import Path

from distilbeam.teacher.protobuf_fields import texts

_REACHING_OUT_NAMES = """
    ReadFile WriteFile MatchingFiles MatchingFilesDataset PyFunc PyFuncStateless EagerPyFunc DebugIdentity
    DebugIdentityV2 DebugIdentityV3 DebugNumericSummary DebugNanCount LMDBReader LMDBDataset
    FixedLengthRecordReader FixedLengthRecordReaderV2 IdentityReader TFRecordReader TFRecordReaderV2
    TextLineReader TextLineReaderV2 WholeFileReader WholeFileReaderV2 FixedLengthRecordDataset
    FixedLengthRecordDatasetV2 TFRecordDataset TFRecordDatasetV2 TextLineDataset SqlDataset CSVDataset
    CSVDatasetV2 SnapshotDataset SnapshotDatasetV2 SaveDataset SaveDatasetV2 LoadDataset CacheDataset
    CacheDatasetV2 DatasetToTFRecord RpcCall RpcClient RpcServer CreateSummaryFileWriter
    CreateSummaryDbWriter ImportEvent PrintV2 DataServiceDataset DataServiceDatasetV2 RegisterDataset
"""
_REACHING_OUT = frozenset(_REACHING_OUT_NAMES.split())
# SavedModel.meta_graphs 2, MetaGraphDef.graph_def 2, GraphDef.node 1, NodeDef.op 2;
# GraphDef.library 2, FunctionDefLibrary.function 1, FunctionDef.node_def 3
_NODES = ((2, 2, 1, 2), (2, 2, 2, 1, 3, 2))


def require_harmless(folder: Path) -> None:
    """Refuse a SavedModel with operations that reach out of it.

    Raises:
      ValueError: it has one, or its graph cannot be read.
    """
    graph = folder / "saved_model.pb"
    try:
        data = graph.read_bytes()
        found = {name for path in _NODES for name in texts(data, *path)}
    except (OSError, ValueError) as e:
        as_text = (folder / "saved_model.pbtxt").is_file()
        why = (
            "saved_model.pbtxt is text, of which nothing is looked at"
            if as_text
            else e.strerror
            if isinstance(e, OSError)
            else e
        )
        raise ValueError(
            f"teacher.model: {folder} is not a SavedModel whose operations can be looked at ({why}); save it again"
        ) from e
    outside = sorted(found & _REACHING_OUT)
    if outside:
        raise ValueError(
            f"teacher.model: {folder} has operations that read or write files or run code ({', '.join(outside[:5])}); say "
            "trust = true in [teacher] if you trust whoever made it, or save it without them"
        )
