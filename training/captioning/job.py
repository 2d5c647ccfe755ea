"""One run of `blipren caption`: what it needs, and the way of a batch of rows to captions and into the data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch

from blipren.training.captioning.choice import (
    CaptionColumn,
    caption_columns,
    caption_record,
    choose,
    column_features,
)
from blipren.training.captioning.decoder import Answer
from blipren.training.captioning.engines.local import LocalEngine
from blipren.training.captioning.feature_reader import FeatureReader
from blipren.training.captioning.image_sources import CacheRows, open_images
from blipren.training.captioning.matching import Matcher, has_matching_head
from blipren.training.captioning.output import CaptionFolder, CaptionUnit, encoded, picture_name, text_columns
from blipren.training.captioning.packed_linear import pack_linears
from blipren.training.captioning.pictures import PictureBatch, PictureConfig
from blipren.training.commands.caption import CaptionSettings
from blipren.training.data.cache.engines.local import Progress, batch_rows
from blipren.training.data.cache.engines.workers import default_workers
from blipren.training.data.cache.prepare import rejection
from blipren.training.data.cache.writer.lock import CacheLock
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.rows import Row, Source
from blipren.training.engine.loading import load_processor, model_fingerprint
from blipren.training.errors import UserError
from blipren.training.evaluation.generation import load_model
from blipren.training.files import report_full_disk


@dataclass
class CaptionedRow:
    """A row with its captions, one list a prompt; without any where it is rejected."""

    row: Row
    answers: list[list[Answer]] = field(default_factory=list)
    rejected: dict[str, Any] | None = None


@dataclass
class CaptionJob:
    """Everything that captioning a unit needs. It is a function of the settings, so that every process makes the same."""

    settings: CaptionSettings
    source: Source
    columns: list[CaptionColumn]
    model: Any
    """The captioning model; None where vLLM computes."""
    processor: Any
    engine: Any
    """None in the driver of Ray actors with vLLM."""
    matcher: Matcher | None
    reader: FeatureReader
    features: datasets.Features
    """Types of the columns of the data set that is written."""

    @classmethod
    def open(cls, s: CaptionSettings) -> CaptionJob:
        """Open data and model. Raises `UserError`."""
        source = open_images(s.images, s.split, s.limit, s.source_options())
        columns = caption_columns(s.prompts or [s.prompt], list(source.features))
        if computes_with_vllm(s):
            return cls._open_for_vllm(s, source, columns)
        dtype = {} if s.precision == "auto" else {"dtype": getattr(torch, s.precision)}
        model, processor = load_model(s.model, s.device, **dtype)
        matching = s.matching_model or (s.model if has_matching_head(s.model) else None)
        if matching is None and (s.candidates > 1 or "min_matching_score" in s.filter):
            raise UserError(
                f"{s.model} has no trained matching head, which candidates and min_matching_score need: name a checkpoint "
                "of `blipren align` with the same vision encoder by --matching-model"
            )
        matcher = None if matching is None else Matcher(matching, model, processor, s.device)
        if isinstance(source, CacheRows):
            source.cache.check_model(model, processor)
        features = output_features(source, s, columns, matcher is not None)
        seed = s.seed if s.temperature else None
        pictures = PictureConfig(None if isinstance(source, CacheRows) else processor.image_processor, seed)
        if s.out:
            pack_linears(model)  # it takes as long as captioning a few images
        engine = LocalEngine(model, processor, columns, s)
        reader = FeatureReader(source, model, pictures, s.batch_size, number_of_workers(s))
        return cls(s, source, columns, model, processor, engine, matcher, reader, features)

    @classmethod
    def _open_for_vllm(cls, s: CaptionSettings, source: Source, columns: list[CaptionColumn]) -> CaptionJob:
        from blipren.training.captioning.engines.vllm_engine import VllmEngine, check_vllm

        if isinstance(source, CacheRows):
            raise UserError(f"vLLM encodes pictures itself, and {source.name} is a feature cache: use --engine local")
        if s.matching_model is not None or s.candidates > s.keep or "min_matching_score" in s.filter:
            raise UserError("vLLM computes no matching scores: use --engine local or ray to choose by them")
        processor = load_processor(s.model)
        pictures = PictureConfig(None, s.seed if s.temperature else None, keep_images=True)
        features = output_features(source, s, columns, scored=False)
        check_vllm(s)
        engine = VllmEngine(s, processor, columns) if s.engine == "vllm" else None  # with Ray the actors have engines
        reader = FeatureReader(source, None, pictures, s.batch_size, number_of_workers(s))
        return cls(s, source, columns, None, processor, engine, None, reader, features)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that decides the captions. Batch size and workers do not."""
        s = self.settings
        return {
            "model": model_fingerprint(s.model),
            "matching_model": s.matching_model and model_fingerprint(s.matching_model),
            "source": {"dataset": self.source.fingerprint, "columns": self.source.columns.describe()},
            "prompts": {column.name: column.prompt for column in self.columns},
            "generation": s.generate_options()
            | {name: getattr(s, name) for name in ("temperature", "top_p", "repetition_penalty", "seed")}
            | {"candidates": s.candidates, "keep": s.keep, "filter": s.filter, "precision": s.precision},
            "decoder": "vllm" if computes_with_vllm(s) else "blipren",
            "output": {"format": s.format, "images": s.keep_images, "rows_per_shard": s.rows_per_shard},
        }

    def folder(self, out: Path) -> CaptionFolder:
        """Return the data set that is written."""
        s = self.settings
        return CaptionFolder(out, self.fingerprint(), s.rows_per_shard, s.format, self.features)

    # ---- a batch of rows -------------------------------------------------------------------------------------------

    def prepared(self, batches: Iterator[list[Row]]) -> Iterator[tuple[list[Row], PictureBatch]]:
        """Yield batches of rows with their pictures."""
        return self.reader.prepared(batches, self.engine.rows_per_batch)

    @torch.inference_mode()
    def caption(self, rows: list[Row], batch: PictureBatch) -> list[CaptionedRow]:
        """Return the rows of a batch with their captions, in order."""
        s = self.settings
        results = [CaptionedRow(row) for row in rows]
        for line in batch.rejected:
            next(one for one in results if one.row.index == line["row"]).rejected = line
        if not batch.kept:
            return results
        patches, mask = self.reader.features(rows, batch) if self.engine.needs_features else (None, None)
        answers = self.engine(patches, mask, batch)
        if self.matcher is not None:
            flat = [(i, answer) for i, own in enumerate(answers) for candidates in own for answer in candidates]
            scores = self.matcher(patches, mask, [i for i, _ in flat], [answer.text for _, answer in flat])
            for (_, answer), score in zip(flat, scores):
                answer.matching_score = score
        for place, size, own in zip(batch.kept, batch.sizes, answers):
            row = rows[place]
            row.width, row.height = size
            for column, candidates in zip(self.columns, own):
                left, why = choose(candidates, s.keep, s.filter)
                if not left:
                    results[place].rejected = rejection(row, "row", why[0], f"{column.name}: {why[1]}")
                    break
                results[place].answers.append(left)
        return results

    # ---- units -----------------------------------------------------------------------------------------------------

    def caption_units(self, out: CaptionFolder, only: int | None = None) -> Progress:
        """Caption the units that are not done.

        Args:
            only: the number of the one unit to caption.
        """
        finished = out.done_units() if only is None else []
        done = sum(json.loads(out.unit_path(number).read_text())["rows"] for number in finished)
        progress = Progress(self.source.num_rows, done, "caption")
        if finished:
            print(f"continuing after {len(finished)} finished shards ({done:,} rows)")
        units: list[tuple[int, bool]] = []
        unit: CaptionUnit | None = None
        try:
            with report_full_disk(out.folder):
                batches = batch_rows(self.source, out, self.engine.rows_per_batch, None, units, only)
                for number, (rows, batch) in enumerate(self.prepared(batches)):
                    unit_number, is_last = units[number]
                    unit = unit or CaptionUnit(out, unit_number)
                    for one in self.caption(rows, batch):
                        self.add(unit, one)
                    progress.add(len(rows))
                    if is_last:
                        out.finish(unit)
                        unit = None
                out.wait()
        finally:
            if unit is not None:
                unit.abandon()
            out.close()
        if only is None:
            progress.show("\n")
        return progress

    def run(self, path: Path) -> None:
        """Caption everything into a folder. A finished one is used as it is. Raises `UserError`."""
        with CacheLock(path):
            out = self.folder(path)
            if out.is_complete():
                print(f"{path} is complete: nothing to caption")
                return
            out.start()
            self.caption_units(out)
            self.complete(out)

    def complete(self, out: CaptionFolder) -> None:
        """Finish the data set when all its units are done, and print the summary."""
        names = [name for column in self.columns for name in column.names().values() if name in self.features]
        counts = out.complete(self.settings.model, names)["counts"]
        for reason, count in sorted(counts["rejected_by_reason"].items()):
            print(f"rejected, {reason}: {count:,}")
        print(f"{counts['rows']:,} rows = {counts['captioned']:,} captioned + {counts['rejected']:,} rejected")
        print(f"the captioned data set is in {out.out}; rejections in {out.out / 'rejected.jsonl'}")

    def add(self, unit: CaptionUnit, one: CaptionedRow) -> None:
        """Add a captioned or rejected row to a unit."""
        unit.rows += 1
        if one.rejected is not None:
            unit.rejected.append(one.rejected)
            return
        s, row, image = self.settings, one.row, None
        if s.keep_images and not isinstance(self.source, CacheRows):
            try:
                image = encoded(row.data())
            except ImageError as error:  # the file has gone since it was decoded
                unit.rejected.append(rejection(row, "row", error.reason, error.detail))
                return
            row._data = None
        record = dict(row.record)
        name = picture_name(row)
        if s.format == "metadata":
            record["file_name"] = name if self.beside_pictures() else unit.out.put_image(name, row.index, image)
        elif s.format == "parquet" and image is not None:
            record[image_column(self.source)] = {"bytes": image, "path": name and Path(name).name}
        for column, answers in zip(self.columns, one.answers):
            record |= caption_record(column, answers, s.keep)
        columns = text_columns(record, unit.out.features)
        unit.add(row.split, f"{row.index:09d}", columns, image, one.answers[0][0].text)

    def beside_pictures(self) -> bool:
        """Return whether OUT is the folder of the pictures themselves."""
        s = self.settings
        return s.out is not None and len(s.images) == 1 and Path(s.images[0]).resolve() == Path(s.out).resolve()

    def check_output(self) -> None:
        """Raise `UserError` if OUT cannot be written in its form."""
        s = self.settings
        if s.format != "metadata":
            return
        if isinstance(self.source, CacheRows) or not s.keep_images:
            raise UserError(
                "metadata.jsonl names picture files, which a cache or --no-keep-images does not give: use --format parquet"
            )
        ours = any((Path(s.out) / name).exists() for name in ("captions.json", ".captions"))
        if (Path(s.out) / "metadata.jsonl").exists() and not ours:
            raise UserError(f"{s.out} has a metadata.jsonl that is not ours: choose another OUT")

    def describe(self) -> str:
        """Return what will be captioned."""
        s = self.settings
        names = ", ".join(column.name for column in self.columns)
        matching = "" if self.matcher is None else f", matching scores by {s.matching_model or s.model}"
        engine = f"{s.engine} ({s.actor_engine} in each actor)" if s.engine == "ray" else s.engine
        return f"caption {self.source.describe()}\nwith {s.model} by the engine {engine} into {names}{matching} -> {s.out}"


def computes_with_vllm(s: CaptionSettings) -> bool:
    """Return whether vLLM computes, here or in Ray's actors."""
    return "vllm" in (s.engine, s.actor_engine)


def number_of_workers(s: CaptionSettings) -> int:
    """Return how many processes prepare pictures; by default none where captions are printed."""
    return s.workers if s.workers is not None else default_workers() if s.out else 0


def image_column(source: Source) -> str:
    """Return the column with the pictures of the data set that is written."""
    name = source.columns.image
    return name if isinstance(source.features.get(name), datasets.Image) else "image"


def output_features(
    source: Source, s: CaptionSettings, columns: list[CaptionColumn], scored: bool
) -> datasets.Features:
    """Return the types of all columns that are written."""
    return datasets.Features(kept_features(source, s) | column_features(columns, s.keep, scored))


def kept_features(source: Source, s: CaptionSettings) -> dict[str, Any]:
    """Return the types of the kept columns. Pictures are one column `Image`, or none without --keep-images."""
    kept = dict(source.features)
    names = source.columns.image.split("/")
    for name in names:  # the bytes or the decoded form of the picture; the name of its file is a text and stays
        if name in kept and kept[name] != datasets.Value("string"):
            del kept[name]
    if isinstance(source, CacheRows):
        return kept
    if s.format == "metadata":
        kept["file_name"] = datasets.Value("string")
    elif s.format == "parquet" and s.keep_images:
        kept[image_column(source)] = datasets.Image()
    return kept
