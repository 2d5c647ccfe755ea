"""Captions of image files and folders, for the command `caption`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blipren.training.data.sources.images import Folder, ImageError, decode_image, read_file
from blipren.training.evaluation.generation import Sampling, generate_answers, image_seed, read_image
from blipren.training.evaluation.settings import SamplingSettings


@dataclass(frozen=True)
class ImageFile:
    """A file to caption.

    Attributes:
        path: as it is printed. folder: the searched folder that the file was found in, None for a file that was named.
    """

    path: Path
    folder: Path | None = None

    def load(self, follow_links: bool = False) -> Image.Image:
        """Read the file as upright RGB. Raises `ImageError` if it is no image, or a link out of its folder."""
        path = self.path
        if self.folder is not None:
            folder = Folder(root=str(self.folder), follow_links=follow_links)
            path = folder.resolve(str(self.path.relative_to(self.folder)))
        return decode_image(read_file(path))


def find_files(names: Sequence[str]) -> list[ImageFile]:
    """Return the named files, and all files of the named folders and their subfolders in the order of their paths.

    Links to folders are not followed; they are in the list, so that they are reported.
    """
    found = []
    for name in map(Path, names):
        if not name.is_dir():
            found.append(ImageFile(name))
            continue
        paths = []
        for parent, folders, files in os.walk(name):
            links = [folder for folder in folders if Path(parent, folder).is_symlink()]
            paths += [Path(parent, file) for file in files + links]
        found += [ImageFile(path, name) for path in sorted(paths)]
    return found


def check_named_files(files: Sequence[ImageFile]) -> None:
    """Raise `UserError` unless every file that was named is an image. Files of folders are checked when they are read."""
    for file in files:
        if file.folder is None:
            read_image(str(file.path))


def caption_files(
    model, processor, files: Sequence[ImageFile], settings: SamplingSettings, follow_links: bool = False
) -> Iterator[tuple[ImageFile, dict | ImageError]]:
    """Yield for each file in order its answer (see `generate_answers`), or the error if it is no image.

    The images of one batch at a time are in memory.
    """
    for start in range(0, len(files), settings.batch_size):
        batch: list[tuple[ImageFile, Image.Image | ImageError]] = []
        for file in files[start : start + settings.batch_size]:
            try:
                batch.append((file, file.load(follow_links)))
            except ImageError as error:
                batch.append((file, error))
        images = [image for _, image in batch if isinstance(image, Image.Image)]
        sampling = Sampling(
            settings.temperature,
            settings.top_p,
            settings.repetition_penalty,
            [image_seed(image, settings.seed) for image in images] if settings.temperature else [],
        )
        answers = iter(
            generate_answers(
                model,
                processor,
                images,
                settings.prompt,
                settings.batch_size,
                sampling=sampling,
                **settings.generate_options(),
            )
            if images
            else []
        )
        yield from ((file, image if isinstance(image, ImageError) else next(answers)) for file, image in batch)
