"""TFDS builder of emoji-1594: one split per vendor, in ArrayRecord files, built without TensorFlow.

Images are stored as encoded bytes in a text feature, because TFDS's image feature needs TensorFlow to decode;
reading the data set back therefore needs none either.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.emoji1594 import captions, concepts, fetch, render

DESCRIPTION = (
    "1,594 concepts (emoji without skin tones and country flags), each drawn independently by several "
    "vendors, with an English name and keywords from Unicode CLDR.  "
    "One split per vendor; label = concept number."
)


class Emoji1594(tfds.core.GeneratorBasedBuilder):
    """One record per drawing, in the order of labels; see the README beside the data for the fields."""

    name = "emoji1594"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def __init__(
        self, *, packages: Mapping[str, pathlib.Path], english: Mapping[str, captions.Caption], **kwargs
    ):
        """Takes the unpacked icon packages by vendor, and the captions by character."""
        self._packages = packages
        self._english = english
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text, integer = tfds.features.Text, tfds.features.Scalar
        return self.dataset_info_from_configs(
            description=DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": text(doc="64 x 64 RGB WebP, encoded"),
                    "codepoints": text(doc="lower-case hexadecimal, joined by '-'"),
                    "label": integer(np.int32, doc="concept number, the same for all vendors"),
                    "name": text(doc="English CLDR name"),
                    "keywords": text(doc="English CLDR keywords, joined by '|'"),
                    "vendor": text(doc="equals the split's name"),
                    "fold": integer(np.int32, doc="0 to 4; 0 = held-out concepts of the concept split"),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # fetch.py has fetched and checked everything
        icon_sets = concepts.IconSets(self._packages)
        names = icon_sets.concepts()
        return {vendor: self._generate_examples(icon_sets, vendor, names) for vendor in fetch.ICONS}

    def _generate_examples(
        self, icon_sets: concepts.IconSets, vendor: str, names: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for label, codepoints, icon in icon_sets.drawings(vendor, names):
            caption = self._english[captions.to_text(codepoints)]
            yield (
                label,
                {
                    "image": render.render(icon),
                    "codepoints": codepoints,
                    "label": label,
                    "name": caption.name,
                    "keywords": "|".join(caption.keywords),
                    "vendor": vendor,
                    "fold": concepts.fold_of(codepoints),
                },
            )


def make_reproducible(folder: pathlib.Path) -> None:
    """Rewrites a prepared data set so that the same content always has the same bytes.

    Protocol buffers may write the fields of a record in any order, which differs from run to run, and the
    JSON files follow the order of Python dictionaries: both are brought into sorted order.
    """
    for path in sorted(folder.glob("*.array_record*")):
        reader = array_record_module.ArrayRecordReader(str(path))
        records = [
            tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
            for record in reader.read_all()
        ]
        reader.close()
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
