"""One run of `blipren search`: what is found, as JSON and as a sheet of pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from blipren import BliprenForImageTextRetrieval
from blipren.training.captioning.feature_reader import FeatureReader
from blipren.training.captioning.image_sources import CacheRows, open_images
from blipren.training.captioning.pictures import PictureConfig
from blipren.training.commands.search import SearchSettings
from blipren.training.data.cache.engines.workers import default_workers
from blipren.training.data.cache.shards import as_json
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.rows import Source
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_checkpoint, load_config, model_fingerprint
from blipren.training.errors import UserError
from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.generation import read_image
from blipren.training.evaluation.metrics.retrieval import embed_texts
from blipren.training.evaluation.report.pictures import sample_grid
from blipren.training.files import write_atomically
from blipren.training.search.index import embed, open_index, own_captions, pooled
from blipren.training.search.words import bm25


def search(s: SearchSettings) -> None:
    """Run the command. Raises `UserError` for what the user can repair."""
    source = open_images([s.dataset], s.split, None, s.source_options())
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    found = search_captions(s, source) if s.model is None else search_images(s, source, out)
    results = {
        "query": s.query,
        "by": "captions" if s.model is None else "images",
        "dataset": s.dataset,
        "results": found,
    }
    write_atomically(out / "results.json", as_json(results))
    for place in found:
        print(f"{place['rank']:3} {place['score']:7.4f} {place['id']}  {(place['captions'] or [''])[0]}")
    draw(s, source, found, out / "sheet.png")


def search_images(s: SearchSettings, source: Source, out: Path) -> list[dict]:
    """Search by the embeddings of stage 1."""
    try:
        load_config(s.model).check_trained_heads("contrast")
    except ValueError as error:
        raise UserError(f"{s.model} cannot search: {error}") from error
    model, processor = load_checkpoint(s.model, BliprenForImageTextRetrieval)
    model = model.to(choose_device(s.device)).eval()
    if isinstance(source, CacheRows):
        source.cache.check_model(model, processor)
    workers = default_workers() if s.workers is None else s.workers
    pictures = PictureConfig(None if isinstance(source, CacheRows) else processor.image_processor)
    reader = FeatureReader(source, model, pictures, s.batch_size, workers)
    fingerprint = {"model": model_fingerprint(s.model), "source": source.fingerprint}
    index = open_index(out / "index", reader, model, fingerprint)
    by_image = Path(s.query).is_file()
    if by_image:
        features = encode_images(model, processor, [read_image(s.query)])
        vectors = pooled(embed(model, features.patches, features.mask), "mean")[:, 0].cpu()
    elif processor.qformer_tokenizer is None:
        raise UserError(f"{s.model} has no text side: a text as the query needs a checkpoint of `blipren align`")
    else:
        length = min(64, model.config.qformer_config.max_position_embeddings)
        vectors = embed_texts(model, processor.qformer_tokenizer, [s.query], max_length=length)
    scores, numbers = index.search(vectors, s.top, by_image)
    return [
        {"rank": rank, "score": round(score, 5), **index.rows[number]}
        for rank, (score, number) in enumerate(zip(scores[0].tolist(), numbers[0].tolist()), 1)
    ]


def search_captions(s: SearchSettings, source: Source) -> list[dict]:
    """Search by the words of captions."""
    rows = [{"id": row.id, "place": place, "captions": own_captions(row)} for place, row in enumerate(source)]
    if not any(row["captions"] for row in rows):
        raise UserError(f"{s.dataset} has no captions: caption it first, or search its images by --model ALIGNED")
    scores = torch.tensor(bm25(s.query, [row["captions"] for row in rows]))
    best = scores.argsort(descending=True, stable=True)[: s.top]
    return [
        {"rank": rank, "score": round(float(scores[i]), 5), **rows[i]}
        for rank, i in enumerate(best.tolist(), 1)
        if scores[i] > 0
    ]


def draw(s: SearchSettings, source: Source, found: list[dict], path: Path) -> None:
    """Draw the pictures that were found with rank, score and caption. Those of a cache come from --pictures, by id."""
    if not found:
        print(f"nothing in {s.dataset} has a word of {s.query!r}")
        return
    pictures = source
    if isinstance(source, CacheRows):
        if s.pictures is None:
            print(
                f"a feature cache holds no pictures: --pictures DATASET draws them; results are in {s.out}/results.json"
            )
            return
        pictures = open_images([s.pictures], None, None, s.source_options())
    by_id = pictures is not source  # whose rows may have another order
    wanted = {one["id"] if by_id else one["place"]: one for one in found}
    images: dict[int, Image.Image] = {}
    start = 0 if by_id else min(wanted)
    for place, row in enumerate(pictures.rows(start), start):
        one = wanted.get(row.id if by_id else place)
        if one is not None:
            try:
                images[one["rank"]] = row.load()
            except ImageError:  # it was readable when the index was built
                images[one["rank"]] = Image.new("RGB", (64, 64), "white")
        if len(images) == len(wanted):
            break
    shown = [one for one in found if one["rank"] in images]
    labels = [f"{one['rank']}. {one['score']:.3f} {(one['captions'] or [one['id']])[0]}" for one in shown]
    sample_grid(path, [images[one["rank"]] for one in shown], labels)
    print(f"{len(shown)} pictures are in {path}, and the results in {s.out}/results.json")
