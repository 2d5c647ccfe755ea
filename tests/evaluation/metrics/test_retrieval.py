"""Recall with several captions an image, ties, re-ranking, the grid picture."""

import itertools
import math

import pytest
import torch
from PIL import Image

from blipren.training.evaluation.metrics import retrieval


def plain_ranks(scores, image_of_text):
    """Reference: sort, true candidates last among equals."""
    to_text, to_image = [], []
    for image, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda t: (-row[t], image_of_text[t] == image))
        to_text.append(1 + min(place for place, t in enumerate(order) if image_of_text[t] == image))
    for text, owner in enumerate(image_of_text):
        column = [row[text] for row in scores]
        order = sorted(range(len(column)), key=lambda i: (-column[i], i == owner))
        to_image.append(1 + order.index(owner))
    return to_text, to_image


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_a_plain_sort(seed):
    """Scores of 0 to 3, so that ties abound: with others' they push down, among an image's own captions they do not."""
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    scores = torch.randint(4, (4, 10), generator=generator).float()
    to_text, to_image = plain_ranks(scores.tolist(), image_of_text.tolist())
    assert retrieval.image_to_text_ranks(scores, image_of_text).tolist() == to_text
    assert retrieval.text_to_image_ranks(scores, image_of_text).tolist() == to_image


def test_five_captions_an_image():
    """Image 0's five captions hold the places 3 to 7: its rank is 3, and the captions' own ranks count one by one."""
    image_of_text = torch.tensor([0] * 5 + [1] * 5)
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 9, 8, 0, 0, 0], [1.0, 1, 1, 1, 9, 6, 6, 6, 6, -1]])
    assert retrieval.image_to_text_ranks(scores, image_of_text).tolist() == [3, 2]
    assert retrieval.text_to_image_ranks(scores, image_of_text).tolist() == [1, 1, 1, 1, 2, 2, 2, 1, 1, 2]
    found = retrieval.recall_both_ways(scores, image_of_text)
    assert found["image_to_text"] == {"R@1": 0.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 2.5}
    assert found["text_to_image"]["R@1"] == 0.6


def test_a_constant_score_finds_nothing():
    image_of_text = torch.arange(20).repeat_interleave(5)
    found = retrieval.recall_both_ways(torch.zeros(20, 100), image_of_text)
    assert found["image_to_text"] == {"R@1": 0, "R@5": 0, "R@10": 0, "median_rank": 96}
    assert found["text_to_image"] == {"R@1": 0, "R@5": 0, "R@10": 0, "median_rank": 20}


def test_chance_equals_all_orders():
    image_of_text = torch.tensor([0, 0, 1, 2, 2])
    orders = list(itertools.permutations(range(5)))
    hits = sum(order[0] in (0, 1) for order in orders), sum(order[0] == 2 for order in orders)
    wanted = (hits[0] * 2 + hits[1]) / 3 / math.factorial(5)
    found = retrieval.chance(image_of_text, 3)
    assert found["image_to_text"]["R@1"] == pytest.approx(wanted)
    assert found["text_to_image"] == {"R@1": pytest.approx(1 / 3), "R@5": 1.0, "R@10": 1.0}


def test_an_image_without_caption_is_named():
    with pytest.raises(ValueError, match="Image 1 has no caption"):
        retrieval.image_to_text_ranks(torch.zeros(2, 1), torch.tensor([0]))


def test_reranking_reorders_the_candidates_only():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.4, 0.5]])
    asked = []

    def match(images, texts):
        asked.extend(zip(images.tolist(), texts.tolist(), strict=True))
        return -10.0 * texts.float()  # likes early texts, whatever the similarity says

    to_text, to_image = retrieval.reranked(scores, match, 2)
    assert to_text.argsort(1, descending=True).tolist() == [[0, 1, 2, 3], [2, 3, 1, 0]]
    assert asked[:4] == [(0, 0), (0, 1), (1, 3), (1, 2)]
    assert len(asked) == 4 + 8
    assert torch.equal(to_image, scores - 10.0 * torch.arange(4.0)), "k covers both images: matching plus similarity"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import (
        BertTokenizerFast,
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
    )

    folder = tmp_path_factory.mktemp("clip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue"]
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=8, max_position_embeddings=8, eos_token_id=3, bos_token_id=2, **small)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_the_encoders_own_score(clip_folder):
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    captions = [["red", "red red"], ["green"], ["blue"]]
    found = retrieval.encoder_recall(str(clip_folder), images, captions, batch_size=2)
    assert found["encoder"] == str(clip_folder)
    assert found == retrieval.encoder_recall(str(clip_folder), images, captions, batch_size=3)
    assert found["text_to_image"]["R@5"] == 1.0


def test_an_encoder_without_text_tower_has_no_score(shared_data):
    assert retrieval.encoder_recall(str(shared_data("tiny-vision")), [], []) is None
