"""Videos: frames sampled evenly by time, decoded from files, animated images and lists of frames."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_processing_utils import BatchFeature
from transformers.utils import VIDEO_PROCESSOR_NAME, cached_file

from .image_blipren import with_fast_resize
from .pieces_blipren import load_image_processor_settings, with_pieces

MAX_SECONDS = 3600.0
MAX_PIXELS = 89_478_485  # of a frame, as for images
SEEK_AHEAD = 2.0  # seconds: frames that are nearer are reached by decoding, others by a jump to the keyframe before
# plain containers: a playlist could name other files and addresses
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,ivf,nut,gif,apng"
_ANIMATIONS = ("GIF", "WEBP", "PNG")


class VideoError(ValueError):
    """A video that cannot be used. `reason` is a short word that is counted, `detail` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def sample_times(seconds: float, num_frames: int) -> list[float]:
    """Return the middle of each of `num_frames` equal parts of a duration."""
    return [(number + 0.5) * seconds / num_frames for number in range(num_frames)]


class VideoFrames(list):
    """Frames of a video, with its duration in `seconds`, `None` where it is not known."""

    def __init__(self, frames, seconds: float | None = None):
        super().__init__(frames)
        self.seconds = seconds


def write_frame_times(features: torch.Tensor, num_frames: int, seconds_per_frame: torch.Tensor) -> torch.Tensor:
    """Return features of videos with the time of each frame, the middle of its part of the video, in the last column.

    Args:
        features: `(num_videos, num_frames * num_patches, width + 1)`.
        seconds_per_frame: `(num_videos,)`, seconds from one frame to the next.
    """
    places = torch.arange(num_frames, device=features.device) + 0.5
    times = seconds_per_frame.to(features.device, torch.float32)[:, None] * places
    times = times.repeat_interleave(features.shape[1] // num_frames, dim=1)[..., None]
    return torch.cat([features[..., :-1], times.to(features.dtype)], dim=-1)


def read_frames(video, num_frames: int, fps: float | None = None) -> VideoFrames:
    """Return `num_frames` upright RGB frames of a video, sampled evenly by time; a short video repeats frames.

    Args:
        video: path or bytes of a file, animated GIF and WebP among them; a list of PIL images or arrays; an array or
            tensor `(frames, height, width, 3)` or `(frames, 3, height, width)` of bytes. Frames without times count as
            equally long.
        fps: frames a second of a list or an array, whose duration is not known otherwise.

    Raises:
        VideoError: there is no video, it is damaged, cut short, too large, or longer than an hour.
        ImportError: reading a file needs PyAV.
    """
    if isinstance(video, torch.Tensor):
        video = video.cpu().numpy()
    if isinstance(video, np.ndarray):
        video = list(video)
    if isinstance(video, (list, tuple)):
        if not video:
            raise VideoError("empty", "a video without frames")
        frames = [_to_image(video[int(at)]) for at in sample_times(len(video), num_frames)]
        seconds = getattr(video, "seconds", None)
        return VideoFrames(frames, len(video) / fps if seconds is None and fps else seconds)
    if isinstance(video, (str, os.PathLike)):
        if "://" in str(video):
            raise VideoError("remote_path", f"{str(video)[:200]} is an address: download it, and give the file")
        if not Path(video).is_file():
            raise VideoError("missing_file", f"{video} is no file")
        with open(video, "rb") as file:
            start = file.read(16)
    else:
        video = bytes(video)
        start = video[:16]
    if not start:
        raise VideoError("empty", "0 bytes")
    if start[:4] == b"GIF8" or start[8:12] == b"WEBP" or start[:4] == b"\x89PNG":
        return _read_animation(video, num_frames)
    return _read_file(video, num_frames)


def _to_image(frame) -> Image.Image:
    if not isinstance(frame, Image.Image):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or 3 not in (frame.shape[0], frame.shape[2]):
            raise VideoError("no_frames", f"a frame of shape {frame.shape} and type {frame.dtype}: give RGB bytes")
        frame = Image.fromarray(np.ascontiguousarray(frame if frame.shape[2] == 3 else frame.transpose(1, 2, 0)))
    if frame.mode in ("RGBA", "LA", "PA") or "transparency" in frame.info:
        frame = frame.convert("RGBA")
        frame = Image.alpha_composite(Image.new("RGBA", frame.size, (255, 255, 255, 255)), frame)
    return frame.convert("RGB")


def _check_size(width: int, height: int, seconds: float | None = None) -> None:
    if width * height > MAX_PIXELS:
        raise VideoError("too_large", f"frames of {width}x{height} have more than {MAX_PIXELS:,} pixels")
    if seconds is not None and seconds > MAX_SECONDS:
        raise VideoError("too_long", f"{seconds:,.0f} seconds are more than {MAX_SECONDS:,.0f}: cut it into clips")


def _read_animation(video, num_frames: int) -> VideoFrames:
    try:
        with Image.open(
            video if isinstance(video, (str, os.PathLike)) else io.BytesIO(video), formats=_ANIMATIONS
        ) as image:
            _check_size(*image.size)
            ends, total = [], 0.0
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()  # WebP says only now how long the frame is shown
                total += (image.info.get("duration") or 100) / 1000  # browsers show a frame without duration for 0.1 s
                ends.append(total)
            _check_size(*image.size, total)
            frames = VideoFrames([], total)
            for at in sample_times(total, num_frames):
                image.seek(int(np.searchsorted(ends, at, side="right")))
                frames.append(_to_image(image.copy()))
            return frames
    except VideoError:
        raise
    except Exception as error:  # decoders raise nearly anything for foreign bytes
        raise VideoError("unreadable", f"damaged ({type(error).__name__} in its decoder)") from error


def _read_file(video, num_frames: int) -> VideoFrames:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install av (or blipren[video])") from error

    file = os.fspath(video) if isinstance(video, (str, os.PathLike)) else io.BytesIO(video)
    try:
        with av.open(file, options={"format_whitelist": CONTAINERS}) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise VideoError("no_video_stream", f"streams of type {', '.join(s.type for s in container.streams)}")
            stream = streams[0]
            _check_size(stream.width, stream.height)
            start, seconds = _duration(container, stream)
            _check_size(stream.width, stream.height, seconds)
            times = [start + at for at in sample_times(seconds, num_frames)]
            return VideoFrames(_frames_at(container, stream, times, seconds / num_frames), seconds)
    except av.FFmpegError as error:
        raise VideoError("unreadable", f"damaged ({type(error).__name__} in its decoder)") from error


def _duration(container, stream) -> tuple[float, float]:
    """Return start and duration in seconds; of files that do not say it, by their packets, which are not decoded."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start, float(stream.duration * stream.time_base)
    if container.duration:
        return start, container.duration / 1_000_000
    ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    if not ends:
        raise VideoError("empty", "no packet of the video stream has a time")
    return start, max(ends) * float(stream.time_base) - start


def _frames_at(container, stream, times: list[float], step: float) -> Iterator[Image.Image]:
    """Yield the frame that is shown at each time. Only these frames become images, one at a time."""
    frames, shown, following = iter(()), None, None
    for at in times:
        if shown is None or at - shown.time > SEEK_AHEAD:
            container.seek(max(0, int(at / stream.time_base)), stream=stream)
            frames, following = container.decode(stream), None
        if following is None:
            following = next(frames, None)
        while following is not None and (shown is None or following.time <= at):
            shown, following = following, next(frames, None)
        if shown is None:
            raise VideoError("empty", "no frame can be decoded")
        if following is None:  # the last frame: is it still shown, or are the ones behind it missing?
            end = shown.time + max(float((shown.duration or 0) * stream.time_base), step, 1.0)
            if at > end:
                raise VideoError("truncated", f"the file ends {at - shown.time:.1f} seconds before the video does")
        image = shown.to_image()
        if turn := round(shown.rotation) % 360:
            image = image.rotate(turn, expand=True)
        yield image


class BliprenVideoProcessor(ImageProcessingMixin):
    """Video processor: samples frames, which the image processor of the model then takes.

    `AutoVideoProcessor` finds it through the checkpoint's `video_preprocessor_config.json`.

    Args:
        num_frames: frames of a video.
        image_processor: settings of the image processor, or the image processor itself.
        frame_times: also return the seconds from frame to frame, for a model whose time embedding is by seconds.
    """

    fps = 24.0
    """Rate that vLLM gives the black frames that it measures its memory with; no other video has it."""

    def __init__(self, num_frames: int = 8, image_processor=None, frame_times: bool = False, **kwargs):
        self.num_frames = num_frames
        if isinstance(image_processor, dict):
            image_processor = with_pieces(with_fast_resize(load_image_processor_settings(image_processor)))
        self.image_processor = image_processor
        self.frame_times = frame_times

    @property
    def do_sample_frames(self) -> bool:
        """Whether the metadata of a video is needed beside its frames, which vLLM reads from here."""
        return self.frame_times

    @property
    def model_input_names(self) -> list[str]:
        names = [f"{name}_videos" for name in self.image_processor.model_input_names]
        return names + (["seconds_per_frame"] if self.frame_times else [])

    def __call__(self, videos, return_tensors: str | None = None, video_metadata=None, **kwargs) -> BatchFeature:
        """Return `pixel_values_videos` `(num_videos, num_frames, channels, height, width)`, with pieces behind frames.

        Args:
            videos: one video or a list of them, each as in [`read_frames`].
            video_metadata: for each video its metadata, of which `duration`, else `fps`, is used, for a list of frames.

        Raises:
            VideoError: a video cannot be used.
            ValueError: with `frame_times`, for frames of unknown duration.
        """
        return self.process_frames(read_videos(as_videos(videos), self.num_frames, video_metadata), return_tensors)

    preprocess = __call__

    def process_frames(self, clips: list[VideoFrames], return_tensors: str | None = None) -> BatchFeature:
        """Return the inputs of clips whose frames are sampled already."""
        inputs = self.image_processor(images=[frame for clip in clips for frame in clip], return_tensors="np")
        data = {f"{name}_videos": value.reshape(len(clips), -1, *value.shape[1:]) for name, value in inputs.items()}
        if self.frame_times:
            data["seconds_per_frame"] = np.array([seconds_per_frame(clip) for clip in clips], dtype=np.float32)
        return BatchFeature(data, tensor_type=return_tensors)

    def to_dict(self) -> dict:
        """Return the settings as they are saved."""
        return {
            "video_processor_type": type(self).__name__,
            "auto_map": {"AutoVideoProcessor": "video_blipren.BliprenVideoProcessor"},
            "num_frames": self.num_frames,
            "frame_times": self.frame_times,
            "image_processor": json.loads(self.image_processor.to_json_string()),
        }

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write `video_preprocessor_config.json`."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        Path(save_directory, VIDEO_PROCESSOR_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "BliprenVideoProcessor":
        """Load the video processor of a checkpoint."""
        hub_keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if key in kwargs}
        path = cached_file(str(pretrained_model_name_or_path), VIDEO_PROCESSOR_NAME, **hub_kwargs)
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(settings["num_frames"], settings["image_processor"], settings.get("frame_times", False))


def seconds_per_frame(clip: VideoFrames) -> float:
    """Return the seconds from one frame to the next. Raises `ValueError` where the duration is not known."""
    if clip.seconds is None:
        raise ValueError(
            "this model knows the times of frames in seconds, and a list of frames has none: give their rate too, as "
            'video_metadata=[{"fps": 4}], one for each video, or give files'
        )
    return clip.seconds / len(clip)


def read_videos(videos: list, num_frames: int, video_metadata=None) -> list[VideoFrames]:
    """Return the frames of each video, as [`read_frames`] does.

    Args:
        video_metadata: metadata whose `duration` in seconds, or else `fps`, is that of lists of frames: one for all, or
            one for each, in lists as the videos are.

    Raises:
        VideoError: a video cannot be used.
        ValueError: another number of metadata than of videos.
    """
    given = video_metadata if isinstance(video_metadata, (list, tuple)) else [video_metadata] * len(videos)
    flat = [one for group in given for one in (group if isinstance(group, (list, tuple)) else [group])]
    if len(flat) != len(videos):
        raise ValueError(f"{len(flat)} video_metadata for {len(videos)} videos: give one for each")
    rates = [None if one is None else _frame_rate(video, one) for video, one in zip(videos, flat)]
    return [read_frames(video, num_frames, fps) for video, fps in zip(videos, rates)]


def _frame_rate(video, metadata) -> float | None:
    """Return the frames a second of what is left of a video: of frames that were taken from it, fewer than it has itself."""
    if metadata.get("duration") and not isinstance(video, (str, bytes, os.PathLike)):
        return len(video) / metadata["duration"]
    return metadata.get("fps")


def as_videos(videos) -> list:
    """Return a list of videos: one video alone, a list of frames among them, becomes a list of one."""
    if not isinstance(videos, (list, tuple)):
        return [videos]
    first = videos[0] if videos else None
    if isinstance(first, Image.Image) or (isinstance(first, (np.ndarray, torch.Tensor)) and first.ndim == 3):
        return [list(videos)]
    return [v for video in videos for v in (as_videos(video) if holds_videos(video) else [video])]


def holds_videos(value) -> bool:
    """Return whether a value is a list of videos (those of one prompt), not of the frames of one."""
    if not isinstance(value, (list, tuple)):
        return False
    first = value[0] if value else None
    return not (isinstance(first, Image.Image) or (isinstance(first, (np.ndarray, torch.Tensor)) and first.ndim == 3))


__all__ = [
    "BliprenVideoProcessor",
    "VideoError",
    "VideoFrames",
    "as_videos",
    "holds_videos",
    "read_frames",
    "read_videos",
    "sample_times",
    "seconds_per_frame",
    "write_frame_times",
]
