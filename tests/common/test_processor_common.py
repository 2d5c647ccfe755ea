"""transformers' own `ProcessorTesterMixin` on our processor, with a plain language model's tokenizer and a chat one's."""

import unittest

import pytest
from library_tests import Unavailable, library_module
from PIL import Image
from tiny import tiny_tokenizer
from transformers import SiglipImageProcessorPil

from blipren import BliprenProcessor
from blipren.prompts_blipren import build_chat_template

try:
    common = library_module("test_processing_common")
except Unavailable as reason:
    pytest.skip(f"transformers' own tests: {reason}", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def local_picture(tmp_path_factory):
    """The mixin's chats point to pictures on the Hub: here to one on disk."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 90)).save(path)
    common.MODALITY_INPUT_DATA["images"] = [str(path), str(path)]
    common.url_to_local_path = lambda url, **_options: str(path)


class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = BliprenProcessor

    @classmethod
    def _setup_image_processor(cls):
        return SiglipImageProcessorPil(size={"height": 32, "width": 32})

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        return tokenizer

    @staticmethod
    def prepare_processor_dict():
        template = build_chat_template(None, "<image>")
        return {"image_token": "<image>", "num_visual_tokens": 4, "chat_template": template}


class VideoProcessorTest(ProcessorTest):
    """The same for a model that takes videos."""

    def prepare_text_inputs(self, batch_size=None, modalities=None):
        """Leave out videos: these tests give them only to a processor that has a `video_processor` of its own settings."""
        return super().prepare_text_inputs(batch_size, [m for m in modalities or [] if m != "video"])

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = super()._setup_tokenizer()
        tokenizer.add_tokens(["<video>"], special_tokens=True)
        return tokenizer

    @staticmethod
    def prepare_processor_dict():
        template = build_chat_template(None, "<image>", " ", "<video>")
        videos = {"video_token": "<video>", "frames_per_video": 2, "num_video_tokens": 4}
        return ProcessorTest.prepare_processor_dict() | videos | {"chat_template": template}
