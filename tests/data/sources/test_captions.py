"""The caption filter: each rule on and off, similarity with a dual encoder's own text tower."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, SiglipConfig, SiglipModel, ViTImageProcessorPil

from blipren.training.data.cache.similarity_filter import refuse_by_similarity
from blipren.training.data.sources.caption_filter import CaptionFilter, count_captions, filter_texts
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.errors import UserError
from tests.data.tools import encoded, make_model, picture, run_embed, write_folder
from tests.tiny_models import make_tokenizer

OFF = {
    "min_words": 0, "max_words": None, "max_chars": None, "max_repetition": None, "markup": False, "boilerplate": False,
    "script": None, "duplicates": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "rule, on, text, value",
    [
        ("min_words", 3, "a cat", "2"),
        ("max_words", 3, "a cat on the mat", "5"),
        ("max_chars", 10, "a cat on the mat", "16"),
        ("max_repetition", 0.5, "a cat a cat a cat a cat a cat", "0.75"),
        ("max_repetition", 0.5, "very very very very very big", "one word five times in a row"),
        ("markup", True, "a <b>cat</b>", "<b>"),
        ("markup", True, "a cat &amp; a dog", "&amp;"),
        ("markup", True, "cats at https://x.y/z", "https://"),
        ("markup", True, "cat.jpg", "cat.jpg"),
        ("boilerplate", True, "Stock photo of a cat", "Stock photo"),
        ("boilerplate", True, "IMG_20231 cat", "IMG_20231"),
        ("boilerplate", True, "I'm sorry, I cannot see it", "I'm sorry"),
        ("script", "LATIN", "кошка и собака на траве", "0.00 LATIN"),
        ("script", "cyrillic", "a cat and кот", "0.30 CYRILLIC"),
    ],
)  # fmt: skip
def test_each_rule_is_a_switch(rule, on, text, value):
    assert CaptionFilter(**(OFF | {rule: on})).check(text) == (rule, value)
    assert CaptionFilter(**OFF).check(text) is None


@pytest.mark.parametrize(
    "text",
    ["A man is playing a guitar .", "Two dogs, one black and one white, run.", "a sign that reads no parking",
     "bananas for sale at a market", "A red-and-white plane (747) at 5 o'clock", "the the cat", "a < b and b > a"],
)  # fmt: skip
def test_good_captions_pass_all_rules(text):
    assert CaptionFilter(script="LATIN").check(text) is None


def test_real_captions_hardly_lose_any(shared_data):
    rules = CaptionFilter(script="LATIN")
    answers = [text for row in open_rows(str(shared_data("flickr8k-mini"))) for text in row.answers]
    lost = [(rules.check(text), text) for text in answers if rules.check(text)]
    assert len(answers) > 12_000 and len(lost) < 0.001 * len(answers), lost


def test_duplicates_and_answers_to_questions():
    prompts = [None, None, None, "What?", "What?"]
    answers = ["A red car.", "a RED car", "a blue car", "red", "red"]
    left = filter_texts(prompts, answers, CaptionFilter(min_words=2))
    assert left.answers == ["A red car.", "a blue car", "red", "red"] and left.kept == [0, 2, 3, 4]
    assert left.rejected == [("duplicates", "same caption of the same image", "a RED car")]


def test_captions_of_too_many_images():
    rows = [([None, None], ["a picture", f"the number {i}"]) for i in range(4)]
    counts = count_captions(rows)
    assert counts == {"a picture": 4}
    for limit, left in ((3, 1), (4, 2)):
        assert len(filter_texts(*rows[0], CaptionFilter(max_images_per_caption=limit), counts).answers) == left


def test_similarity_ranks_and_cuts():
    scores = [0.3, 0.1, None, 0.2, 0.4]
    assert refuse_by_similarity(scores, 0.15, None) == {1: ("min_similarity", "0.100")}
    assert refuse_by_similarity(scores, None, 2) == {
        3: ("keep_best", "0.200, rank 3"),
        1: ("keep_best", "0.100, rank 4"),
    }
    assert refuse_by_similarity(scores, 0.15, 3) == {1: ("min_similarity", "0.100")}


@pytest.fixture(scope="module")
def dual(tmp_path_factory, tiny_llm):
    """A tiny SigLIP with both towers, and a model on its image tower."""
    folder = tmp_path_factory.mktemp("dual")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32},
        vision_config=small | {"image_size": 32, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(folder / "siglip")
    tokenizer.save_pretrained(folder / "siglip")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "siglip")
    return folder / "siglip", make_model(folder / "model", folder / "siglip", tiny_llm)


def test_similarity_filters_and_is_kept_for_other_thresholds(tmp_path, dual, tiny_llm):
    siglip, model = dual
    captions = ["a black dog", "two children on the beach", "a red ball", "green grass"]
    rows = [{"file_name": f"{i}.png", "captions": captions, "split": "train"} for i in range(6)]
    write_folder(tmp_path / "d", rows, {f"{i}.png": encoded(picture(i), "PNG") for i in range(6)})
    cache = run_embed(model, tmp_path / "d", tmp_path / "c", keep_best=2)
    both, tokenizer = AutoModel.from_pretrained(siglip).eval(), AutoTokenizer.from_pretrained(siglip)
    processor = ViTImageProcessorPil.from_pretrained(siglip)
    tokens = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        images = [row.load() for row in open_rows(str(tmp_path / "d"))]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        output = both(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        cosines = (
            torch.nn.functional.normalize(output.image_embeds) @ torch.nn.functional.normalize(output.text_embeds).T
        )
    for row, scores in zip(cache.split("train"), cosines):
        assert set(row["answers"]) == {captions[i] for i in scores.topk(2).indices}
    lines = [json.loads(line) for line in (cache.folder / "rejected.jsonl").open()]
    assert len(lines) == 12 and {line["reason"] for line in lines} == {"keep_best"}
    threshold = float(cosines.flatten().sort().values[11:13].mean())
    again = run_embed(model, tmp_path / "d", tmp_path / "c", min_similarity=threshold)
    kept = sum(len(row["answers"]) for row in again.split("train"))
    assert kept == 12 and again.info["content_hash"] == cache.info["content_hash"]


def test_similarity_needs_a_text_tower(tmp_path, tiny_model):
    write_folder(tmp_path / "d", [{"file_name": "a.png", "caption": "a cat"}], {"a.png": encoded(picture(0), "PNG")})
    with pytest.raises(UserError, match="siglip_vision_model.* has no text tower"):
        run_embed(tiny_model, tmp_path / "d", tmp_path / "c", min_similarity=0.1)
    assert not (tmp_path / "c").exists()


def test_tidy_changes_white_space_alone():
    left = filter_texts([None, "Who ?"], ["A dog  runs , then\nsits .", "a dog ."], CaptionFilter(tidy=True))
    assert left.answers == ["A dog runs, then sits.", "a dog ."] and not left.rejected
    assert filter_texts([None], ["A dog ."], CaptionFilter()).answers == ["A dog ."]
