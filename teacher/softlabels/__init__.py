"""Soft labels: what a teacher answered, stored so that it says what it is.

Read in this order: spec, codec (selecting: k classes of many rows), token_labels (blocks of tokens), columns, shards, placing,
manifest, gathering; for people inspect and verify (inspect_tokens, verify_tokens), comparison, plain_table,
class_columns (columns that `datasets` knows).
Imports: inputs, storage.
"""

from distilbeam.teacher.softlabels.class_columns import to_dataset, with_classes, write_dataset
from distilbeam.teacher.softlabels.codec import SoftLabels, decode, encode
from distilbeam.teacher.softlabels.columns import label_schema
from distilbeam.teacher.softlabels.gathering import compact_manifest, merge_manifests, remove_shards
from distilbeam.teacher.softlabels.manifest import Manifest, ManifestEntry, committed, entry_path, read_manifest
from distilbeam.teacher.softlabels.shards import file_checksum, write_shard
from distilbeam.teacher.softlabels.spec import SoftLabelSpec, label_key
from distilbeam.teacher.softlabels.token_labels import TokenLabels, decode_tokens

__all__ = [
    "Manifest",
    "ManifestEntry",
    "SoftLabelSpec",
    "SoftLabels",
    "TokenLabels",
    "committed",
    "compact_manifest",
    "decode",
    "decode_tokens",
    "encode",
    "entry_path",
    "file_checksum",
    "label_key",
    "label_schema",
    "merge_manifests",
    "read_manifest",
    "remove_shards",
    "to_dataset",
    "with_classes",
    "write_dataset",
    "write_shard",
]
