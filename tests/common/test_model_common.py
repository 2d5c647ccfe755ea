"""transformers' own `ModelTesterMixin` (and `GenerationTesterMixin`, if available) on our classes.

Two combinations always run: Q-Former with the MLP projector and a tied head, and patches with the MoE projector and an
untied head. The others, and two as remote code, run on request (`pytest -m slow tests/common`).
"""

import tempfile
import unittest
import unittest.mock

import pytest
import torch
from library_tests import Unavailable, has_generation_mixin, library_module
from tiny import TINY_QFORMER, tiny_llm_config
from transformers import SiglipVisionConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.testing_utils import torch_device

from blipren import BliprenForConditionalGeneration, BliprenModel
from blipren.configuration_blipren import copy_code_files

try:
    common = library_module("test_modeling_common")
except Unavailable as reason:
    pytest.skip(f"transformers' own tests: {reason}", allow_module_level=True)

# the mixin takes the classes of this table for models without head; AutoModel of a checkpoint of ours loads a whole one
common.MODEL_MAPPING_NAMES = common.MODEL_MAPPING_NAMES | {"blipren": "BliprenModel"}
VOCAB_SIZE, IMAGE_TOKEN_ID = 99, 98
# random text must not contain the placeholder: one without an image is an error in our model
draw = common.ids_tensor
common.ids_tensor = lambda shape, vocab_size, *args, **kwargs: draw(
    shape, min(vocab_size, IMAGE_TOKEN_ID), *args, **kwargs
)

MIXINS = (
    (common.ModelTesterMixin, common.GenerationTesterMixin) if has_generation_mixin() else (common.ModelTesterMixin,)
)


class ModelTester:
    """Make tiny configs and inputs, as transformers' testers do: rows with one image and text behind it."""

    def __init__(self, parent, connector="qformer", projector="mlp", tied=True):
        self.parent, self.connector, self.projector, self.tied = parent, connector, projector, tied
        # seven rows: the mixin fills smaller batches with random tokens, which have no placeholders for the images
        self.batch_size, self.num_channels, self.image_size, self.patch_size = 7, 3, 16, 8
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 2
        self.vocab_size, self.image_token_id, self.num_queries = VOCAB_SIZE, IMAGE_TOKEN_ID, 3
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.num_image_tokens = self.num_queries if connector == "qformer" else self.num_patches
        self.seq_length = self.encoder_seq_length = self.key_length = self.num_image_tokens + 5
        self.is_training = True

    def get_config(self):
        vision = SiglipVisionConfig(
            hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2, image_size=self.image_size,
            patch_size=self.patch_size, vision_use_head=False, attention_dropout=0.0,
        )  # fmt: skip
        text = tiny_llm_config(vocab_size=self.vocab_size, tie_word_embeddings=self.tied, max_position_embeddings=512)
        qformer = TINY_QFORMER | {"num_query_tokens": self.num_queries, "encoder_hidden_size": 32}
        qformer |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return self.parent.all_model_classes[0].config_class(
            vision_config=vision, text_config=text, qformer_config=qformer, connector=self.connector,
            projector=self.projector, projector_dropout=0.0, image_token_id=self.image_token_id,
            num_visual_tokens=self.num_image_tokens, vision_grid=[2, 2],
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixels = torch.rand(self.batch_size, self.num_channels, self.image_size, self.image_size, device=torch_device)
        ids = torch.randint(3, self.image_token_id, (self.batch_size, self.seq_length), device=torch_device)
        ids[:, : self.num_image_tokens] = self.image_token_id
        return config, {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common:
    """Settings of the mixin for our classes, and the tests that do not apply to them."""

    all_model_classes = (BliprenForConditionalGeneration, BliprenModel)
    pipeline_model_mapping = {}
    _is_composite = True
    options: dict = {}
    test_resize_embeddings = False  # the vocabulary of the language model is never resized
    has_attentions = True
    additional_model_inputs = ["pixel_values"]

    def setUp(self):
        self.model_tester = ModelTester(self, **self.options)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__ == "BliprenForConditionalGeneration":
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def _video_features_prepare_config_and_inputs(self):
        """Return a config of videos of two frames, and such videos."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_frames = 2
        return config, {"pixel_values_videos": torch.stack([inputs["pixel_values"]] * 2, dim=1)}

    test_missing_keys = False  # an error in ours, see tests/remote_code/test_refused_checkpoints.py

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        # the mixin checks the first layer of the vision tower, which is frozen by default and recomputes nothing
        with unittest.mock.patch.object(self.all_model_classes[0], "freeze", lambda *_args: None):
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    @unittest.skip("a missing weight is an error in our models")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    @unittest.skip("a missing weight is an error in our models")
    def test_base_model_prefix_loads_base_weights(self):
        pass

    if not has_generation_mixin():

        @unittest.expectedFailure
        def test_generation_tester_mixin_inheritance(self):
            super().test_generation_tester_mixin_inheritance()


class Remote:
    """The same classes as remote code, loaded from a folder with our code files."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.TemporaryDirectory()
        copy_code_files(cls.folder.name)
        names = ("BliprenForConditionalGeneration", "BliprenModel")
        cls.all_model_classes = tuple(
            get_class_from_dynamic_module(f"modeling_blipren.{name}", cls.folder.name) for name in names
        )
        assert all(c.__module__.startswith("transformers_modules") for c in cls.all_model_classes)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()
        super().tearDownClass()


def combination(name: str, slow: bool, remote: bool = False, **options):
    parents = (Remote, Common, *MIXINS, unittest.TestCase) if remote else (Common, *MIXINS, unittest.TestCase)
    case = type(name, parents, {"options": options, "__module__": __name__})
    return pytest.mark.slow(case) if slow else case


TestQformerMlpTied = combination("TestQformerMlpTied", False, connector="qformer", projector="mlp", tied=True)
TestPatchesMoeUntied = combination("TestPatchesMoeUntied", False, connector="patches", projector="moe", tied=False)
TestQformerMoeTied = combination("TestQformerMoeTied", True, connector="qformer", projector="moe", tied=True)
TestQformerMlpUntied = combination("TestQformerMlpUntied", True, connector="qformer", projector="mlp", tied=False)
TestPatchesMlpTied = combination("TestPatchesMlpTied", True, connector="patches", projector="mlp2", tied=True)
TestRemoteQformerMlpTied = combination("TestRemoteQformerMlpTied", True, remote=True, connector="qformer", tied=True)
TestRemotePatchesMoeUntied = combination(
    "TestRemotePatchesMoeUntied", True, remote=True, connector="patches", projector="moe", tied=False
)
