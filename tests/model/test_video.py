"""Videos: sampling by time from every kind of source, faults, and the model's features, tokens and checkpoints."""

import io
import json
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import QFORMER, random_image
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.video_utils import VideoMetadata

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.image_features_blipren import VIDEO_INPUTS
from blipren.video_blipren import VideoError, read_frames, sample_times


def grey(level: int, size=(64, 48)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


def levels(frames) -> list[int]:
    return [int(np.asarray(frame).mean()) for frame in frames]


def write_video(frames, rate=10, kind="mp4", codec="libx264", times=None) -> bytes:
    """Encode frames, at equal steps or at the given times in seconds."""
    av = pytest.importorskip("av")
    from fractions import Fraction

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_image(frame)
            if times is not None:
                picture.pts, picture.time_base = int(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def write_animation(frames, milliseconds, kind="GIF") -> bytes:
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=milliseconds, **options)
    return file.getvalue()


RAMP = [grey(5 * i) for i in range(50)]  # five seconds at ten frames a second


def test_frames_are_the_middles_of_equal_parts():
    assert sample_times(8.0, 4) == [1.0, 3.0, 5.0, 7.0]
    assert levels(read_frames(RAMP, 5)) == [25, 75, 125, 175, 225]
    arrays = np.stack([np.asarray(frame) for frame in RAMP])
    assert levels(read_frames(arrays, 5)) == levels(read_frames(torch.from_numpy(arrays).permute(0, 3, 1, 2), 5))
    assert levels(read_frames([grey(7)], 3)) == [7, 7, 7]


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_files_are_sampled_by_time(kind, codec, tmp_path):
    data = write_video(RAMP, kind=kind, codec=codec)
    assert levels(read_frames(data, 5)) == pytest.approx([25, 75, 125, 175, 225], abs=8)
    (tmp_path / "clip").write_bytes(data)
    assert levels(read_frames(tmp_path / "clip", 5)) == levels(read_frames(data, 5))
    assert len(read_frames(data, 60)) == 60  # more than there are: some twice


def test_variable_rate_counts_time_not_frames():
    # nine frames in the first second, then one that is shown for the other nine
    times = [0.1 * i for i in range(10)] + [10.0]
    frames = [grey(10 * i) for i in range(10)] + [grey(250)]
    data = write_video(frames, rate=1000, kind="webm", codec="libvpx", times=times)
    assert levels(read_frames(data, 5))[1:] == pytest.approx([90, 90, 90, 90], abs=8)
    animation = write_animation([grey(0), grey(120), grey(240)], [100, 100, 1800])
    assert levels(read_frames(animation, 4)) == pytest.approx([240] * 4, abs=4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_videos(kind):
    animation = write_animation([grey(0), grey(80), grey(160), grey(240)], 100, kind)
    assert levels(read_frames(animation, 4)) == pytest.approx([0, 80, 160, 240], abs=2)
    found = read_frames(write_animation([grey(0), grey(0), grey(0), grey(240)], 100, kind), 4)  # stored as two frames
    assert levels(found) == pytest.approx([0, 0, 0, 240], abs=2) and found.seconds == pytest.approx(0.4)


def test_far_frames_are_reached_by_a_jump(monkeypatch):
    """Of six minutes with a keyframe every 12 seconds only the parts before the four frames are decoded."""
    pytest.importorskip("av")
    import blipren.video_blipren as module

    data = write_video([grey(i % 250) for i in range(360)], rate=1)
    read, decoded = module._frames_at, []

    class Counting:
        def __init__(self, container):
            self.seek, self.container = container.seek, container

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.time)
                yield frame

    monkeypatch.setattr(module, "_frames_at", lambda container, *rest: read(Counting(container), *rest))
    assert levels(read_frames(data, 4)) == pytest.approx([45, 135, 225, 315 % 250], abs=8)
    assert len(decoded) < 360


def test_rotated_video_stands_upright():
    left_white = Image.new("RGB", (64, 48))
    left_white.paste((255, 255, 255), (0, 0, 32, 48))
    data = bytearray(write_video([left_white] * 4))
    at = data.index(b"tkhd") + 4
    at += 4 + (32 if data[at] == 1 else 20) + 16
    assert struct.unpack(">9i", data[at : at + 36])[0] == 65536  # the identity
    # a quarter turn clockwise, as phones write it: the left side becomes the upper one
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    (frame,) = read_frames(bytes(data), 1)
    pixels = np.asarray(frame)
    assert frame.size == (48, 64)
    assert pixels[:24].mean() > 240 and pixels[40:].mean() < 15


def test_faulty_videos_have_a_reason(monkeypatch):
    data = write_video(RAMP)
    webm = write_video([random_image(i, (64, 48)) for i in range(50)], kind="webm", codec="libvpx")
    faults = {
        "empty": b"",
        "unreadable": data[: len(data) // 2],  # an mp4 has its index at the end
        "truncated": webm[: len(webm) // 2],
    }
    for reason, broken in faults.items():
        with pytest.raises(VideoError) as error:
            read_frames(broken, 4)
        assert error.value.reason == reason
    for video, reason in (
        (b"#EXTM3U\nfile:///etc/hostname\n", "unreadable"),  # a playlist names other files
        ("https://127.0.0.1/clip.mp4", "remote_path"),
        ("no/such/file.mp4", "missing_file"),
        ([], "empty"),
        ([np.zeros((4, 4, 2), np.uint8)], "no_frames"),
        (write_animation([grey(0), grey(9)], 100)[:40], "unreadable"),
    ):
        with pytest.raises(VideoError) as error:
            read_frames(video, 4)
        assert error.value.reason == reason
    monkeypatch.setattr("blipren.video_blipren.MAX_SECONDS", 4.0)
    for video in (data, write_animation([grey(0), grey(9)], 3000)):
        with pytest.raises(VideoError, match="too_long: [56] seconds"):
            read_frames(video, 4)


def test_sound_without_pictures_is_no_video():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no_video_stream: streams of type audio"):
        read_frames(file.getvalue(), 4)


def test_without_pyav_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        read_frames(b"\0\0\0\x18ftypmp42", 4)


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make(bases):
    """Function (chat, **options) -> model and processor that take videos of four frames."""

    def build(chat=False, **options):
        vision = [bases("vision", "siglip_vision_model")]
        vision += [bases("vision", "dinov2")] if options.pop("second", False) else []
        common = (vision if len(vision) > 1 else vision[0], bases("llm", "llama", chat=chat))
        shared = {
            k: options[k]
            for k in ("connector", "scales", "scale_join", "frame_tokens", "time_embedding")
            if k in options
        }
        shared |= {"frames": options.pop("frames", 4), "num_queries": 3}
        options |= {"qformer": QFORMER, "dtype": "float32"} | shared
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(*common, **options)
        return model, BliprenProcessor.from_vision_text_pretrained(*common, **shared)

    return build


def clip(seed: int, length: int = 8) -> list[Image.Image]:
    return [random_image(100 * seed + i) for i in range(length)]


MODELS = {
    "all frames at once": ({}, 3),
    "learned time": ({"time_embedding": "learned"}, 3),
    "time in seconds": ({"time_embedding": "seconds"}, 3),
    "frame by frame": ({"frame_tokens": True}, 12),
    "patches": ({"connector": "patches", "projector": "mlp2"}, 64),
    "two scales": ({"scales": [1, 2], "scale_join": "sequence"}, 3),
    "two encoders": ({"second": True, "scales": [1, 2]}, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_videos_images_and_texts_in_one_batch(make, name, tmp_path):
    options, tokens = MODELS[name]
    model, processor = make(**options)
    text = ["What moves ?", "What is this ?", "Both ?", "Hello"]
    videos, images = [[clip(1)], [], [clip(2, 3)], []], [[], [random_image(5)], [random_image(6)], []]
    rate = {"video_metadata": {"fps": 2.0}} if processor.frame_times else {}
    batch = processor(text=text, videos=videos, images=images, return_tensors="pt", **rate)
    ids = batch["input_ids"]
    assert (ids == processor.video_token_id).sum(1).tolist() == [tokens, 0, tokens, 0]
    assert batch["pixel_values_videos"].shape[:2] == (2, 4)
    together = model.generate(**batch, max_new_tokens=4, min_new_tokens=4)[:, ids.shape[1] :]
    for row in range(4):
        one = {"videos": [videos[row]] if videos[row] else None, "images": [images[row]] if images[row] else None}
        one |= rate if videos[row] else {}
        alone = processor(text=[text[row]], **{k: v for k, v in one.items() if v}, return_tensors="pt")
        assert torch.equal(
            model.generate(**alone, max_new_tokens=4, min_new_tokens=4)[0, alone["input_ids"].shape[1] :],
            together[row],
        )
    # features from a cache: the same, in a prompt of the placeholders that training uses
    own = {k: v for k, v in batch.items() if k in VIDEO_INPUTS}
    with torch.no_grad():
        patches = model.encode_videos(**own)
        assert patches.shape[1] == 4 * model.config.patches_per_frame
        assert model.config.count_visual_tokens(patches.shape[1]) == tokens == processor.num_video_tokens
        prompt = processor(text=["What moves ?"], videos=[videos[0]], return_tensors="pt", **rate)
        ids = prompt["input_ids"].masked_fill(
            prompt["input_ids"] == processor.video_token_id, processor.image_token_id
        )
        assert ids[0].tolist() == processor.encode_prompt("What moves ?", num_visual_tokens=[tokens])
        cached = model(input_ids=ids, patch_features=patches[:1]).logits
        torch.testing.assert_close(model(**prompt).logits, cached, atol=1e-5, rtol=0)
        features = model.get_video_features(**own).pooler_output
        assert [f.shape for f in features] == [(tokens, 32)] * 2
    model.save_bridge(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = (c.from_pretrained(tmp_path) for c in (BliprenForConditionalGeneration, BliprenProcessor))
    repeated = its_processor(text=text, videos=videos, images=images, return_tensors="pt", **rate)
    with torch.no_grad():
        assert torch.equal(again.eval()(**repeated).logits, model(**batch).logits)


def test_times_in_seconds(make, tmp_path):
    """The embedding is that of each frame's middle in seconds: the same frames make another video at another rate."""
    model, processor = make(time_embedding="seconds")
    with pytest.raises(
        ValueError, match=r'a list of frames has none: give their rate too, as video_metadata=\[\{"fps"'
    ):
        processor(text="What ?", videos=[clip(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="1 video_metadata for 2 videos"):
        processor(videos=[clip(1), clip(2)], video_metadata=[{"fps": 1.0}], return_tensors="pt")
    metadata = [VideoMetadata(total_num_frames=8, fps=2.0), {"fps": 30.0, "duration": 2.0}]  # its frames are a choice
    inputs = processor(text=["What ?"] * 2, videos=[clip(1), clip(1)], video_metadata=metadata, return_tensors="pt")
    assert inputs["seconds_per_frame"].tolist() == [1.0, 0.5]
    assert processor.video_processor.do_sample_frames  # vLLM asks for it
    own = {name: inputs[name] for name in VIDEO_INPUTS if name in inputs}
    with torch.no_grad():
        patches = model.encode_videos(**own)
        assert patches[0, :, -1].unique().tolist() == [0.5, 1.5, 2.5, 3.5]
        assert patches[1, :, -1].unique().tolist() == [0.25, 0.75, 1.25, 1.75]
        first, second = model.get_video_features(**own).pooler_output
        assert not torch.equal(first, second)
        # a reference: sinusoids of the seconds, added to the features that the Q-Former takes
        angles = patches[..., -1:] / 10000 ** (torch.arange(0, 32, 2) / 32)
        times = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        qformer = model.model.qformer
        found = qformer(patches).query_states
        qformer.config.time_embedding = None
        torch.testing.assert_close(found, qformer(patches[..., :-1] + times).query_states)
        expected = qformer(patches[..., :-1] + 3 * times).query_states
        qformer.config.time_embedding, qformer.config.time_embedding_scale = "seconds", 3.0
        torch.testing.assert_close(qformer(patches).query_states, expected)
    with pytest.raises(ValueError, match="knows the times of frames in seconds: give seconds_per_frame"):
        model.encode_videos(inputs["pixel_values_videos"])
    # files say it themselves
    (tmp_path / "clip.gif").write_bytes(write_animation([grey(0), grey(80), grey(160), grey(240)], 500))
    found = processor(text="What ?", videos=[tmp_path / "clip.gif"], return_tensors="pt")
    assert found["seconds_per_frame"].tolist() == [0.5]
    for options in ({"frame_tokens": True}, {"connector": "patches", "projector": "mlp2"}):
        with pytest.raises(ValueError, match="a time embedding by seconds needs a Q-Former that reads all frames"):
            make(time_embedding="seconds", **options)


def test_learned_times_start_as_large_as_patch_features(make):
    model, _ = make(time_embedding="learned")
    assert 0.7 < model.model.qformer.time_embeddings.weight.std() < 1.3


def test_one_frame_is_an_image(make):
    model, processor = make(frames=1)
    image = random_image(5)
    with torch.no_grad():
        video = model.get_video_features(**processor.video_processor([[image]], return_tensors="pt")).pooler_output
        alone = model.get_image_features(**processor.image_processor([image], return_tensors="pt")).pooler_output
    assert torch.equal(video[0], alone[0])


def test_order_of_frames_matters_when_they_are_read_together(make):
    model, processor = make()
    with torch.no_grad():
        patches = model.encode_videos(**processor.video_processor([clip(1)], return_tensors="pt"))
        turned = patches.unflatten(1, (4, 16)).flip(1).flatten(1, 2)
        first, second = (model.get_video_features(patch_features=p * 10).pooler_output[0] for p in (patches, turned))
        assert (first - second).abs().max() > 1e-5
        model.model.qformer.config.time_embedding = None
        first, second = (model.get_video_features(patch_features=p * 10).pooler_output[0] for p in (patches, turned))
        assert (first - second).abs().max() < 1e-5


def test_messages_with_videos(make, tmp_path):
    model, processor = make(chat=True)
    (tmp_path / "clip.gif").write_bytes(write_animation([grey(0), grey(80), grey(160), grey(240)], 100))
    content = [{"type": "video", "path": str(tmp_path / "clip.gif")}, {"type": "text", "text": "What moves ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.count(processor.video_token) == 1
    inputs = processor(text=text, videos=[tmp_path / "clip.gif"], return_tensors="pt")
    assert torch.equal(
        inputs["input_ids"],
        processor(text="What moves ?", videos=[tmp_path / "clip.gif"], return_tensors="pt")["input_ids"],
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_videos_as_arrays_and_the_number_of_their_tokens(make):
    _, processor = make(second=True)
    arrays = np.stack([np.asarray(frame) for frame in clip(1)])
    expected = processor(text="What ?", videos=[clip(1)], return_tensors="pt")
    assert processor.video_processor.model_input_names == ["pixel_values_videos", "second_pixel_values_videos"]
    for videos in (arrays, [arrays], [[arrays]], torch.from_numpy(arrays)):
        found = processor(text="What ?", videos=videos, return_tensors="pt")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    counts = processor._get_num_multimodal_tokens(image_sizes=[(40, 30)], video_sizes=[(8, 40, 30)] * 2)
    assert counts["num_image_tokens"] == [3] and counts["num_video_tokens"] == [3, 3]


def test_video_processor_is_found_as_autovideoprocessor_finds_it(make, tmp_path):
    """AutoVideoProcessor itself needs torchvision; it loads the class that the file names, and calls `from_pretrained`."""
    _, processor = make(scales=[1, 2])
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    found = get_class_from_dynamic_module(settings["auto_map"]["AutoVideoProcessor"], tmp_path)
    found.register_for_auto_class()
    own = found.from_pretrained(tmp_path)(clip(1), return_tensors="pt")
    expected = processor.video_processor(clip(1), return_tensors="pt")
    assert own.keys() == expected.keys() == {"pixel_values_videos"}
    assert torch.equal(own["pixel_values_videos"], expected["pixel_values_videos"])
    assert own["pixel_values_videos"].shape == (1, 4, 5, 3, 32, 32)


def test_what_a_model_does_not_take_is_refused(make, pair):
    model, processor = pair()
    with pytest.raises(
        ValueError, match="videos were given to the processor, and this model reads images and text only"
    ):
        processor(videos=[clip(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="takes no videos: make one with `blipren new --frames 8`"):
        model.encode_videos(torch.zeros(1, 4, 3, 32, 32))
    model, processor = make()
    inputs = processor(text="What ?", videos=[clip(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="Video features and video tokens do not match, tokens: 3, features: 0"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="assisted generation takes images and no videos"):
        model.generate(**inputs, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="2 texts, 1 groups of videos"):
        processor(text=["a", "b"], videos=[[clip(1)]], return_tensors="pt")
