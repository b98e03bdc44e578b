"""Data sources: random access to examples in the formats that image-text data comes in."""

from vlpjax.data.sources.array_records import ArrayRecords, pack_record, unpack_record
from vlpjax.data.sources.base import Example, LazySource, Source
from vlpjax.data.sources.canvases import Canvases
from vlpjax.data.sources.combine import Concat, Filter, Mixture
from vlpjax.data.sources.declared import Declared
from vlpjax.data.sources.image_folder import ImageFolder
from vlpjax.data.sources.neighbors import WithNeighbors
from vlpjax.data.sources.order import cursors, draw, locate, permute
from vlpjax.data.sources.parquet import Parquet
from vlpjax.data.sources.scenes import Scenes
from vlpjax.data.sources.slideshows import Slideshows
from vlpjax.data.sources.tfds import TFDS
from vlpjax.data.sources.token_rows import PackedTexts, TokenFiles
from vlpjax.data.sources.webdataset import WebDataset

__all__ = [
    "TFDS",
    "ArrayRecords",
    "Canvases",
    "Concat",
    "Declared",
    "Example",
    "Filter",
    "ImageFolder",
    "LazySource",
    "Mixture",
    "PackedTexts",
    "Parquet",
    "Scenes",
    "Slideshows",
    "Source",
    "TokenFiles",
    "WebDataset",
    "WithNeighbors",
    "cursors",
    "draw",
    "locate",
    "pack_record",
    "permute",
    "unpack_record",
]
