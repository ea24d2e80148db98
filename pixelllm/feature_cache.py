"""Features of frozen encoders on disk, so that they are computed once.

A cache folder belongs to one set of encoders: its name is the digest of their weights and of
the preprocessing. Inside, shards of 512 images are arrays beside a list of content digests; a
shard appears when it is complete, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pixelllm.batches import frame_images
from pixelllm.files import write_text, written_whole
from pixelllm.models.pixelllm import ImageBranch
from pixelllm.records import Record
from pixelllm.tables import Table

SHARD = 512
BATCH = 64


def weights_digest(modules: dict[str, nn.Module], *facts: object) -> str:
    """Digest of the modules' weights and of whatever else decides their output."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=10)
    for name, module in sorted(modules.items()):
        for key, value in sorted(module.state_dict().items()):
            digest.update(f"{name}.{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def content_digest(record: Record) -> str:
    """Digest of the encoded image file."""
    data = Path(record.path).read_bytes() if record.data is None else record.data
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def rounded(encoder: ImageBranch, features: Tensor) -> Tensor:
    """Features at the precision that the branch itself gives them."""
    return features.half() if encoder.half_features else features.float()


class FeatureCache:
    """Encoder outputs by image content.

    Args:
        folder: of all caches; this one is a subfolder.
        encoders: the frozen branches by name; they are put into evaluation mode.
        frame: the side images are padded to.
        facts: what else decides their output, such as the sizes of their windows.
    """

    def __init__(
        self, folder: Path | str, encoders: dict[str, ImageBranch], frame: int, facts: object = ()
    ) -> None:
        self.encoders = {name: encoder.eval() for name, encoder in encoders.items()}
        self.frame = frame
        precisions = [encoder.half_features for _, encoder in sorted(encoders.items())]
        self.folder = Path(folder) / weights_digest(encoders, frame, precisions, facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[str, int]] = {}
        self._by_path: dict[str, str] = {}
        self._shards: dict[tuple[str, str], np.ndarray] = {}
        for index in sorted(self.folder.glob("*.json")):
            for row, digest in enumerate(json.loads(index.read_text())):
                self._places[digest] = (index.stem, row)

    def fill(self, table: Table, device: torch.device) -> None:
        """Compute what is missing for the images of `table`, with a progress bar."""
        missing: dict[str, int] = {}
        for index, record in enumerate(table.images()):
            if record.path is not None and record.path not in self._by_path:
                self._by_path[record.path] = content_digest(record)
            digest = self._digest(record)
            if digest not in self._places:
                missing.setdefault(digest, index)
        if not missing:
            return
        digests = list(missing)
        with tqdm(total=len(digests), desc=f"features of {table.path.name}", unit="img") as bar:
            for start in range(0, len(digests), SHARD):
                part = digests[start : start + SHARD]
                self._write_shard(part, self._encode(table, [missing[d] for d in part], device))
                bar.update(len(part))

    def _digest(self, record: Record) -> str:
        return content_digest(record) if record.path is None else self._by_path[record.path]

    def _encode(
        self, table: Table, indices: Sequence[int], device: torch.device
    ) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(indices), BATCH):
            records = [table[index] for index in indices[start : start + BATCH]]
            images, sizes = (tensor.to(device) for tensor in frame_images(records, self.frame))
            with torch.inference_mode():
                yield {
                    name: rounded(encoder, encoder(images, sizes)).cpu()
                    for name, encoder in self.encoders.items()
                }

    def _write_shard(self, digests: list[str], batches: Iterator[dict[str, Tensor]]) -> None:
        parts = list(batches)
        # Another run may fill the same cache now; what was interrupted is written again.
        stem = hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
        for name in self.encoders:
            array = torch.cat([part[name] for part in parts]).numpy()
            shard = self.folder / f"{stem}-{name}.npy"
            with written_whole(shard) as beside, beside.open("wb") as file:
                np.save(file, array)
        write_text(self.folder / f"{stem}.json", json.dumps(digests))
        self._places.update((digest, (stem, row)) for row, digest in enumerate(digests))

    def lookup(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """Features of the records by encoder, float16 or float32[B, C, h, w].

        Raises KeyError for a record whose table was not given to `fill`.
        """
        places = [self._places[self._digest(record)] for record in records]
        return {
            name: torch.from_numpy(np.stack([self._shard(name, s)[row] for s, row in places]))
            for name in self.encoders
        }

    def _shard(self, name: str, stem: str) -> np.ndarray:
        key = (name, stem)
        if key not in self._shards:
            file = self.folder / f"{stem}-{name}.npy"
            self._shards[key] = np.load(file, mmap_mode="r")
        return self._shards[key]
