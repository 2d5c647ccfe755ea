"""The decoder's captions are those of `generate`, for one prompt or several, in any batch."""

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.captioning.decoder import Decoder
from blipren.training.captioning.packed_linear import PackedLinear, pack_linears
from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.generation import Sampling, generate_answers
from blipren.training.evaluation.image_use import answer_losses
from tests.tiny_models import LLM_FAMILIES, QFORMER, make_llm, make_vision, random_image

GREEDY = Sampling()
NEW_WORDS = {"no_repeat_ngram_size": 1}  # without it an untrained model repeats one token
PROMPTS = [None, "What is in the picture?", "Short caption: colour?"]


def make(folder, family="llama", vision="siglip_vision_model", **options):
    bases = make_vision(folder / "vision", vision), make_llm(folder / "llm", family)
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        *bases, qformer=QFORMER, num_queries=4, **options
    )
    for part in ("qformer", "projector"):  # answers of new weights hardly depend on the image
        for parameter in model.parts()[part].parameters() if part in model.parts() else ():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.0)
    keywords = {"connector": options["connector"]} if "connector" in options else {}
    return model, BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4, **keywords)


def decode(model, processor, patches, prompts=PROMPTS, batch_size=32, tokens=12, sampling=GREEDY, seeds=(), **more):
    inputs = patches.model_inputs(model.device)
    features = model.get_image_features(**inputs).pooler_output
    options = {"max_new_tokens": tokens} | {name: more.pop(name) for name in ("num_beams", *NEW_WORDS) if name in more}
    return Decoder(model, processor, prompts, options, sampling, batch_size=batch_size, **more)(features, seeds)


def texts(results) -> list[list[str]]:
    return [[candidates[0].text for candidates in own] for own in results]


def ends_early(model) -> None:
    """Make an eighth of the vocabulary end an answer, so that rows leave the batch at different times."""
    model.generation_config.eos_token_id = list(range(2, model.config.text_config.vocab_size, 8))


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_families(family, tmp_path):
    model, processor = make(tmp_path, family)
    ends_early(model)
    patches = encode_images(model, processor, [random_image(i) for i in range(5)])
    found = decode(model, processor, patches, **NEW_WORDS)
    for p, prompt in enumerate(PROMPTS):
        expected = generate_answers(model, processor, patches, prompt, max_new_tokens=12, **NEW_WORDS)
        assert [own[p][0].text for own in found] == [one["text"] for one in expected]
        assert [own[p][0].num_tokens for own in found] == [one["num_tokens"] for one in expected]
        assert [own[p][0].ended for own in found] == [one["ended_by_eos"] for one in expected]
    weight = model.get_output_embeddings().weight.detach().clone()
    pack_linears(model)
    packed = decode(model, processor, patches, **NEW_WORDS)
    assert texts(packed) == texts(found)
    for own, others in zip(packed, found):
        assert [a[0].mean_logprob for a in own] == pytest.approx([a[0].mean_logprob for a in others], abs=1e-4)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert layers and torch.equal(model.get_output_embeddings().weight, weight)


def test_the_rows_of_this_test_end_at_different_times(tmp_path):
    model, processor = make(tmp_path)
    ends_early(model)
    patches = encode_images(model, processor, [random_image(i) for i in range(12)])
    found = decode(model, processor, patches, [None], **NEW_WORDS)
    assert len({own[0][0].num_tokens for own in found}) > 2 and len({own[0][0].text for own in found}) > 6


@pytest.mark.parametrize("connector", ["qformer", "patches"])
def test_images_of_different_lengths(connector, tmp_path):
    model, processor = make(tmp_path, vision="siglip2_vision_model", connector=connector)
    sizes = [(48, 40), (90, 20), (50, 30), (40, 40)]
    patches = encode_images(model, processor, [random_image(i, size) for i, size in enumerate(sizes)])
    lengths = {int(mask.sum()) for mask in patches.mask}
    assert len(lengths) > 1
    found = texts(decode(model, processor, patches))
    for batch_size in (1, 2, 3):
        assert texts(decode(model, processor, patches, batch_size=batch_size)) == found
    for p, prompt in enumerate(PROMPTS):
        expected = generate_answers(model, processor, patches, prompt, max_new_tokens=12)
        assert [own[p] for own in found] == [one["text"] for one in expected]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_log_probabilities_are_those_of_one_pass_over_the_answer(num_beams, tmp_path):
    model, processor = make(tmp_path)
    force(model, processor, "A black dog runs")
    patches = encode_images(model, processor, [random_image(i) for i in range(3)])
    answers = [own[0][0] for own in decode(model, processor, patches, [None], tokens=24, num_beams=num_beams)]
    assert all(answer.ended and answer.text for answer in answers)
    losses = answer_losses(model, processor, patches, [None] * 3, [answer.text for answer in answers])
    assert [tokens for _, tokens in losses] == [answer.num_tokens + 1 for answer in answers]
    found = [answer.mean_logprob for answer in answers]
    assert found == pytest.approx([-loss / tokens for loss, tokens in losses], abs=1e-4)


def force(model, processor, text) -> None:
    """Teach the model one answer by its head and embeddings, so that it ends by itself."""
    ids = torch.tensor([processor.encode_prompt(None) + processor.encode_answer(text)])
    labels = ids.clone()
    labels[:, : len(processor.encode_prompt(None))] = -100
    model.freeze(train=("connector", "llm"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    features = torch.zeros(1, 16, 32)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, patch_features=features).loss.backward()
        optimizer.step()
    model.eval()


def test_candidates_depend_on_seed_prompt_and_number_alone(tmp_path):
    model, processor = make(tmp_path)
    patches = encode_images(model, processor, [random_image(i) for i in range(5)])
    sampling, seeds = Sampling(temperature=1.5), [3, 4, 5, 6, 7]
    more = {"sampling": sampling, "candidates": 3}
    found = decode(model, processor, patches, seeds=seeds, **more)
    lines = [[answer.text for candidates in own for answer in candidates] for own in found]
    assert all(len(set(own)) == 9 for own in lines)
    single = decode(model, processor, patches[[4, 1]], seeds=[7, 4], batch_size=1, **more)
    assert [[answer.text for c in own for answer in c] for own in single] == [lines[4], lines[1]]
    one = decode(model, processor, patches, [None], seeds=seeds, sampling=sampling)
    assert texts(one) == [[own[0]] for own in lines]
