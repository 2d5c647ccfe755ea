"""The reward is CIDEr-D; samples that beat their fellows become likelier."""

import pytest
import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer

from blipren.training.evaluation.tokenizer import tokenize
from blipren.training.self_critical import CiderReward

REFERENCES = {
    "a": ["A black dog runs on the grass.", "A dog is running through a green field.", "The dog runs."],
    "b": ["Two children play with a red ball.", "Kids playing on the beach with a ball."],
    "c": ["A man in a blue shirt rides a bicycle.", "A cyclist on the street."],
}
CAPTIONS = {"a": "A dog runs on the green grass.", "b": "A man rides a red bicycle.", "c": "a a a a"}


def test_the_reward_is_pycocoevalcaps_cider_d():
    scorer = CiderScorer()
    for image, references in REFERENCES.items():
        scorer += (tokenize([CAPTIONS[image]], "python")[0], tokenize(references, "python"))
    _, expected = scorer.compute_score()
    found = CiderReward(REFERENCES)(list(CAPTIONS), list(CAPTIONS.values()))
    assert found == pytest.approx(expected.tolist(), abs=1e-9) and found[0] > 1 > found[2]


def test_a_rewarded_word_becomes_likelier(tmp_path):
    from tiny_models import QFORMER, make_llm, make_vision, random_image

    from blipren import BliprenForConditionalGeneration, BliprenProcessor
    from blipren.training.caption import plain
    from blipren.training.self_critical import SelfCritical

    bases = make_vision(tmp_path / "vision"), make_llm(tmp_path / "llm")
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        *bases, num_queries=4, qformer=QFORMER, dtype="float32"
    )
    processor = BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4)

    class Photos:
        ids = ["a", "b", "c"]

        def references(self):
            return dict(enumerate(REFERENCES.values()))

    features = model.encode_images(
        processor(images=[random_image(i) for i in range(3)], return_tensors="pt")["pixel_values"]
    )
    batch = {"ids": ["a", "b", "c", "a"], "inputs": {"patch_features": features[[0, 1, 2, 0]]}}
    for shared in (True, False):
        critic = SelfCritical(
            processor, [Photos()], samples=4, temperature=1.0, max_new_tokens=6, shared_prefix=shared
        )
        # a reward that can be seen to work: the share of one letter among the decoded text
        critic.reward.__class__ = type(
            "Letters",
            (CiderReward,),
            {"__call__": lambda self, images, captions: [sum(c.isalpha() for c in text) / 10 for text in captions]},
        )
        critic.processor = processor
        sampled = critic.batch(model, batch)
        assert sampled["weights"].shape == sampled["targets"].shape and sampled["ids"] != []
        assert abs(float(sampled["weights"].mean())) < 2
        inputs, mask = plain(sampled, torch.float32)
        logits = model(
            input_ids=sampled["input_ids"],
            position_ids=sampled["position_ids"],
            attention_mask=mask,
            logits_at=sampled["predict_from"],
            **inputs,
        ).logits
        assert logits.shape[0] == sampled["targets"].shape[0]
        assert torch.isfinite(logits).all()
