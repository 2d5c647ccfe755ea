"""Every objective against a reference of plain loops in float64; two processes against the joined batch."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from blipren.training.objectives.contrast import _contrast, itc, similarity, true_pairs
from blipren.training.objectives.generation import itg
from blipren.training.objectives.gradient_cache import GradientCache
from blipren.training.objectives.matching import hard_negatives, itm

QUERIES, WIDTH = 3, 5
IMAGE_IDS = [7, 7, 8, 9, 10, 11]  # rows 0 and 1 show one image
TEXT_IDS = [1, 2, 3, 4, 3, 5]  # rows 2 and 4 say the same


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(count, QUERIES, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    return images, texts, torch.tensor(IMAGE_IDS[:count]), torch.tensor(TEXT_IDS[:count])


def reference_similarity(image, text, pooling):
    cosines = [sum(float(a) * float(b) for a, b in zip(query, text, strict=True)) for query in image]
    if pooling == "max":
        return max(cosines)
    mean = [sum(float(q[d]) for q in image) / len(image) for d in range(WIDTH)]
    return sum(m * float(t) for m, t in zip(mean, text, strict=True)) / math.sqrt(sum(m * m for m in mean))


def reference_itc(images, texts, image_ids, text_ids, scale, bias, kind, pooling, smoothing):
    count, total = len(images), 0.0
    logits = [[reference_similarity(i, t, pooling) * scale + bias for t in texts] for i in images]
    for i in range(count):
        allowed = [j for j in range(count) if j == i or (image_ids[i] != image_ids[j] and text_ids[i] != text_ids[j])]
        if kind == "sigmoid":
            total += sum(math.log1p(math.exp(-logits[i][j] if i == j else logits[i][j])) for j in allowed)
            continue
        for row in ({j: logits[i][j] for j in allowed}, {j: logits[j][i] for j in allowed}):
            partition = math.log(sum(math.exp(value) for value in row.values()))
            target = {j: smoothing / len(row) + (1 - smoothing) * (j == i) for j in row}
            total += sum(target[j] * (partition - row[j]) for j in row) / 2
    return total / count


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(
    ("kind", "smoothing", "bias"), [("softmax", 0.0, 0.0), ("softmax", 0.1, 0.0), ("sigmoid", 0.0, -2.0)]
)
def test_itc_equals_plain_loops(count, pooling, kind, smoothing, bias):
    images, texts, image_ids, text_ids = rows(count)
    found = itc(images, texts, image_ids, text_ids, 4.0, bias, kind=kind, pooling=pooling, label_smoothing=smoothing)
    wanted = reference_itc(images, texts, image_ids, text_ids, 4.0, bias, kind, pooling, smoothing)
    assert found.loss.item() == pytest.approx(wanted, abs=1e-12)


def test_softmax_true_pairs_are_never_negatives():
    """The text of row 1 belongs to row 0's image too: moving it leaves row 0's loss alone; that of row 2 does not."""
    images, texts, image_ids, text_ids = rows(6)
    texts.requires_grad_()
    left_out = true_pairs(image_ids, text_ids, image_ids, text_ids).fill_diagonal_(False)
    losses = _contrast(similarity(images, texts) * 4, torch.arange(6), left_out, 0.1)
    felt = torch.autograd.grad(losses[0], texts)[0].abs().sum(-1) > 0
    assert felt.tolist() == [True, False, True, True, True, True]


def test_sigmoid_true_pairs_are_never_negatives():
    """Text 1 is met by its own image 1 and, as a negative, by image 2; never by image 0, which it describes too."""
    images, texts, image_ids, text_ids = rows(3)
    texts.requires_grad_()
    loss = itc(images, texts, image_ids, text_ids, 4.0, kind="sigmoid").loss
    logits = similarity(images[1:], texts[1:2])[:, 0] * 4
    alone = (F.softplus(-logits[0]) + F.softplus(logits[1])) / 3
    assert torch.allclose(torch.autograd.grad(loss, texts)[0][1], torch.autograd.grad(alone, texts)[0][1])


def test_half_precision_is_computed_in_float32():
    images, texts, image_ids, text_ids = rows(6)
    half = itc(images.bfloat16(), texts.bfloat16(), image_ids, text_ids, 100.0)
    assert half.loss.dtype == torch.float32
    exact = itc(images.bfloat16().double(), texts.bfloat16().double(), image_ids, text_ids, 100.0)
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)


def test_accuracy_counts_the_own_partner_among_false_ones():
    images = torch.eye(5, dtype=torch.float64)[:4].unsqueeze(1)
    texts = torch.eye(5, dtype=torch.float64)[[0, 1, 3, 2]]
    ids = torch.arange(4)
    assert itc(images, texts, ids, ids, 10.0).accuracy.item() == 0.5


def test_unknown_names_are_refused():
    images, texts, image_ids, text_ids = rows(2)
    with pytest.raises(ValueError, match="'max' or 'mean'"):
        similarity(images, texts, "best")
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid'"):
        itc(images, texts, image_ids, text_ids, 1.0, kind="hinge")


def test_hard_negatives_follow_the_softmax_and_avoid_true_pairs():
    _, _, image_ids, text_ids = rows(6)
    pairs = true_pairs(image_ids, text_ids, image_ids, text_ids)
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = torch.stack([hard_negatives(logits, pairs, seed) for seed in range(4000)])
    for row in range(6):
        assert not pairs[row, draws[:, row].unique()].any()
        wanted = logits[row].masked_fill(pairs[row], float("-inf")).softmax(-1)
        shares = torch.bincount(draws[:, row], minlength=6) / len(draws)
        assert torch.allclose(shares.double(), wanted, atol=0.03)
    assert torch.equal(draws[3], hard_negatives(logits, pairs, 3))


def test_a_row_without_negative_has_none():
    assert hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 0).tolist() == [-1]
    same_image = torch.ones(3, 3, dtype=torch.bool)
    assert hard_negatives(torch.zeros(3, 3), same_image, 0).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("labels", [[1], [1, 1, 0, 0, 0]])
def test_itm_equals_plain_loops(labels):
    """One label: batch 1, which has no negative, so that the loss is that of the positive alone."""
    logits = torch.randn(len(labels), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = sum(
        math.log(math.exp(a) + math.exp(b)) - (a, b)[y] for (a, b), y in zip(logits.tolist(), labels, strict=True)
    )
    assert itm(logits, torch.tensor(labels)).item() == pytest.approx(wanted / len(labels), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [[[3, -100]], [[3, 1, -100], [0, -100, -100]]])
def test_itg_equals_plain_loops(labels, smoothing):
    labels = torch.tensor(labels)
    logits = torch.randn(*labels.shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    total, count = 0.0, 0
    for row, wanted in zip(logits.reshape(-1, 4).tolist(), labels.reshape(-1).tolist(), strict=True):
        if wanted == -100:
            continue
        partition = math.log(sum(map(math.exp, row)))
        total += sum((smoothing / 4 + (1 - smoothing) * (v == wanted)) * (partition - x) for v, x in enumerate(row))
        count += 1
    assert itg(logits, labels, smoothing).item() == pytest.approx(total / count, abs=1e-12)


class Towers(torch.nn.Module):
    """Two towers with dropout, so that a wrong random state shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Linear(WIDTH, QUERIES * WIDTH, dtype=torch.float64)
        self.text = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images, texts):
        image = self.dropout(self.image(images)).view(-1, QUERIES, WIDTH)
        return F.normalize(image + 0.1, dim=-1), F.normalize(self.dropout(self.text(texts)) + 0.1, dim=-1)


def raw_rows(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("sizes", [[6], [2, 2, 2], [4, 2], [1] * 6])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradient_caching_gives_the_plain_gradient(sizes, kind):
    images, texts = raw_rows(6)
    ids = torch.tensor(IMAGE_IDS), torch.tensor(TEXT_IDS)
    chunks = list(zip(images.split(sizes), texts.split(sizes), strict=True))

    plain = Towers()
    torch.manual_seed(1)
    encoded = [plain(*chunk) for chunk in chunks]  # chunk by chunk: the same dropout as below
    loss = itc(*map(torch.cat, zip(*encoded, strict=True)), *ids, plain.scale, kind=kind).loss
    loss.backward()

    cached = Towers()
    torch.manual_seed(1)
    cache = GradientCache(lambda chunk: cached(*chunk), chunks)
    with pytest.raises(ValueError, match="call backward"):
        cache.surrogate(0)
    cached_loss = itc(*cache.embeddings, *ids, cached.scale, kind=kind).loss
    cached_loss.backward()
    for index in range(len(chunks)):
        cache.surrogate(index).backward()

    assert cached_loss.item() == pytest.approx(loss.item(), abs=1e-12)
    for name, wanted in gradients(plain).items():
        assert torch.allclose(gradients(cached)[name], wanted, atol=1e-12), name


SHARES = {"equal": [3, 3], "unequal": [4, 2]}


def joined_step(part=slice(None), offset=0):
    """ITC, ITM and ITG of some rows; what every process does with its share."""
    model = Towers().eval()
    images, texts = raw_rows(6)
    image_ids, text_ids = torch.tensor(IMAGE_IDS), torch.tensor(TEXT_IDS)
    image_embeds, text_embeds = model(images[part], texts[part])
    found = itc(image_embeds, text_embeds, image_ids[part], text_ids[part], model.scale, label_smoothing=0.1)
    sigmoid = itc(image_embeds, text_embeds, image_ids[part], text_ids[part], model.scale, -3.0, kind="sigmoid")
    negatives = hard_negatives(found.image_to_text, found.pairs, seed=9, offset=found.offset)
    assert found.offset == offset
    match = torch.stack([image_embeds.sum((1, 2)), text_embeds.sum(1)], 1)
    labels = (negatives > 2).long()
    words = match.unsqueeze(1).repeat(1, 3, 1)
    targets = torch.tensor([[1, 0, -100], [1, -100, -100], [0, 1, 1]] * 2)[part]
    loss = found.loss + sigmoid.loss + itm(match, labels) + itg(words, targets, 0.1)
    loss.backward()
    return {"loss": loss.item(), "negatives": negatives, "gradients": gradients(model)}


def one_process(rank, shares, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    start = sum(shares[:rank])
    torch.save(joined_step(slice(start, start + shares[rank]), start), results / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_two_processes_equal_the_joined_batch(shares, tmp_path):
    mp.spawn(one_process, args=(shares, free_port(), tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = joined_step()
    assert (parts[0]["loss"] + parts[1]["loss"]) / 2 == pytest.approx(whole["loss"], abs=1e-12)
    assert torch.equal(torch.cat([part["negatives"] for part in parts]), whole["negatives"])
    for name, wanted in whole["gradients"].items():
        mean = (parts[0]["gradients"][name] + parts[1]["gradients"][name]) / 2
        assert torch.allclose(mean, wanted, atol=1e-12), name
