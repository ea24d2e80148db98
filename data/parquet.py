"""A table of records -> Parquet shards, to be streamed from a disk, the Hub or a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import tyro
from tqdm import tqdm

from pixelllm.records import Record
from pixelllm.shards import check_shard_size, unfinished_shards, write_shards
from pixelllm.tables import ARROW_FILE, REPORT_FILE, Table


def shard(table: Table, out: Path, shard_size: int) -> None:
    """Write the records of `table` to `out`, going on after what an interrupted call wrote."""
    report = json.loads((table.path / REPORT_FILE).read_text())
    check_shard_size(shard_size)
    file = (table.path / ARROW_FILE).resolve()
    plan = [str(file), file.stat().st_size, file.stat().st_mtime_ns, shard_size]
    done = sum(1 for _ in unfinished_shards(out, plan)) * shard_size

    def rest() -> Iterator[Record]:
        for index in tqdm(range(done, len(table)), initial=done, total=len(table), unit="record"):
            yield table[index]

    write_shards(rest(), out, report, shard_size)


def main(table: tyro.conf.Positional[Path], out: Path, records: int = 10_000) -> None:
    """Turn a table of records into Parquet shards.

    python -m data.parquet tables/ln_train --out shards/ln_train

    Args:
        table: of any reader.
        out: folder to write; the same command goes on where it was interrupted.
        records: in each shard. Make several shards for every process that will read them.
    """
    try:
        shard(Table(table), out, records)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    tyro.cli(main)
