"""State dicts of the notebooks' and the tutorial's own code become checkpoints of ours."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file, save_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DistilBertConfig, DistilBertModel

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.cli import main
from blipren.training.commands.import_ import ImportSettings, run
from blipren.training.errors import UserError
from tests import tiny_models
from tests.hub.ancestors import (
    LLM_WIDTH,
    QUERIES,
    TOLERANCE,
    VISION_WIDTH,
    MinimalProjector,
    NotebookExperts,
    NotebookProjector,
    NotebookQFormer,
    TutorialQFormer,
    randomize,
)

# ---- fixtures -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny_models.make_vision(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_models.make_vision(tmp_path_factory.mktemp("vit"), "vit")


@pytest.fixture(scope="module")
def base_llm(tmp_path_factory):
    """A Llama without a chat template, whose tokenizer begins every text with BOS, as that of Llama 3.2."""
    folder = tiny_models.make_llm(tmp_path_factory.mktemp("llm"))
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_llm(tmp_path_factory):
    return tiny_models.make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def chat_llm(tmp_path_factory):
    return tiny_models.make_llm(tmp_path_factory.mktemp("llm"), chat=True)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def load(folder):
    model = BliprenForConditionalGeneration.from_pretrained(folder).eval()
    return model, BliprenProcessor.from_pretrained(folder)


def all_tokens(vision, pixels):
    with torch.no_grad():
        return AutoModel.from_pretrained(vision)(pixel_values=pixels).last_hidden_state


@torch.no_grad()
def check_logits(folder, vision, llm, visual_tokens, before, after):
    """The imported model's logits are those of `[before] visual tokens [after]` through the language model.

    Args:
        visual_tokens: function from the encoder's last hidden state to visual tokens.
        before, after: texts around the image, without BOS where the tokenizer adds one.
    """
    model, processor = load(folder)
    inputs = processor(images=[tiny_models.random_image(1)], return_tensors="pt")
    pixels = inputs["pixel_values"]
    expected_tokens = visual_tokens(all_tokens(vision, pixels))
    found = model.get_image_features(pixel_values=pixels).pooler_output[0]
    assert (found - expected_tokens[0]).abs().max() < TOLERANCE
    embed = llm.get_input_embeddings()
    parts = [embed(torch.tensor([before]))] if before else []
    parts += [expected_tokens, embed(torch.tensor([after]))]
    expected = llm(inputs_embeds=torch.cat(parts, 1)).logits
    logits = model(**inputs).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.05


# ---- the BLIPren notebooks ----------------------------------------------------------------------------------------------


def notebook(kind):
    torch.manual_seed(0)
    projector = NotebookProjector(LLM_WIDTH) if kind == "normal" else NotebookExperts(LLM_WIDTH, VISION_WIDTH)
    return randomize(NotebookQFormer(VISION_WIDTH, LLM_WIDTH)), randomize(projector)


@pytest.mark.parametrize("kind", ["normal", "experts"])
def test_blipren_notebooks(kind, siglip, base_llm, tmp_path, out):
    qformer, projector = notebook(kind)
    torch.save(qformer.state_dict(), tmp_path / "qformer_best.pt")
    torch.save(projector.state_dict(), tmp_path / "projector_best.pt")
    settings = ["--format", "blipren", "--vision", str(siglip), "--llm", str(base_llm)]
    assert main(["import", str(tmp_path / "qformer_best.pt"), str(out), *settings]) == 0
    tokenizer = tiny_models.make_tokenizer()
    prompt = [tokenizer.bos_token_id, *tokenizer("Short caption:").input_ids]
    llm = AutoModelForCausalLM.from_pretrained(base_llm)
    check_logits(out, siglip, llm, lambda v: projector(qformer(v), v), [], prompt)
    processor = BliprenProcessor.from_pretrained(out)
    whole = tokenizer("Short caption: A dog .").input_ids
    assert (processor.encode_prompt() + processor.encode_answer("A dog ."))[QUERIES:] == [
        0 + tokenizer.bos_token_id,
        *whole,
        tokenizer.eos_token_id,
    ]


def test_one_file_with_the_whole_model(siglip, plain_llm, tmp_path, out, capsys):
    qformer, projector = notebook("normal")
    whole = nn.Module()
    whole.qformer, whole.projector, whole.vision = qformer, projector, nn.Linear(2, 2)
    save_file(whole.state_dict(), tmp_path / "blip2.safetensors")
    run(
        ImportSettings(
            source=str(tmp_path / "blip2.safetensors"),
            out=str(out),
            format="blipren",
            vision=str(siglip),
            llm=str(plain_llm),
        )
    )
    assert "2 weights of frozen parts are left out" in capsys.readouterr().out
    tokenizer = tiny_models.make_tokenizer()
    llm = AutoModelForCausalLM.from_pretrained(plain_llm)
    check_logits(out, siglip, llm, lambda v: projector(qformer(v), v), [], tokenizer("Short caption:").input_ids)


# ---- the two-stage tutorial ---------------------------------------------------------------------------------------------


def tutorial(llm_folder):
    torch.manual_seed(0)
    bert = DistilBertModel(
        DistilBertConfig(vocab_size=40, dim=32, n_layers=4, n_heads=4, hidden_dim=128, max_position_embeddings=24)
    )
    qformer = randomize(TutorialQFormer(bert, heads=4))
    adapter = randomize(nn.Sequential(nn.Linear(32, LLM_WIDTH), nn.ReLU(), nn.Linear(LLM_WIDTH, LLM_WIDTH)))
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=layers)
    llm = get_peft_model(AutoModelForCausalLM.from_pretrained(llm_folder), config)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return qformer, adapter, llm.eval()


@pytest.mark.parametrize("saved", ["folder", "file"])
def test_two_stage_tutorial(saved, vit, chat_llm, tmp_path, out):
    qformer, adapter, llm = tutorial(chat_llm)
    source = tmp_path / "best"
    if saved == "folder":
        (source / "qformer").mkdir(parents=True)
        torch.save(qformer.state_dict(), source / "qformer" / "pytorch_model.bin")
        torch.save(adapter.state_dict(), source / "adapter.pt")
        llm.save_pretrained(source / "lora_adapter")
    else:
        whole = nn.Module()
        whole.qformer, whole.adapter, whole.llm = qformer, adapter, llm
        source = tmp_path / "vlm.pth"
        torch.save(whole.state_dict(), source)
    settings = dict(format="two-stage", vision=str(vit), llm=str(chat_llm), heads=4)
    run(ImportSettings(source=str(source), out=str(out), **settings))
    tokenizer = tiny_models.make_tokenizer(chat=True)
    turns = [
        {"role": "system", "content": "Answer the user's question truthfully"},
        {"role": "user", "content": "Describe this picture."},
    ]
    before = tokenizer.apply_chat_template(turns, return_dict=False)
    after = tokenizer("<|im_start|>assistant\n").input_ids
    check_logits(out, vit, llm, lambda v: adapter(qformer(v)), before, after)
    model, processor = load(out)
    ids = torch.tensor([[5, 9, 30, 1]])
    with torch.no_grad():  # stage 1's text side came along
        text = model.model.qformer(input_ids=ids).text_states
        assert (text - qformer.encode_text(ids)).abs().max() < TOLERANCE
    answer = tokenizer.apply_chat_template([{"role": "assistant", "content": "A dog ."}], return_dict=False)
    end = len(answer) - answer[::-1].index(tokenizer.eos_token_id)
    assert processor.encode_prompt()[-len(after) :] + processor.encode_answer("A dog .") == answer[:end]


# ---- the minimal notebook -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["notebook", "module"])
def test_minimal_notebook(saved, vit, plain_llm, tmp_path, out):
    torch.manual_seed(0)
    projector = randomize(MinimalProjector(VISION_WIDTH, LLM_WIDTH))
    llm = AutoModelForCausalLM.from_pretrained(plain_llm)
    for parameter in llm.parameters():  # the notebook trains all of it
        parameter.data += 0.01 * torch.randn_like(parameter)
    llm.eval()
    if saved == "notebook":
        source = tmp_path / "mini_vlm_full.pt"
        states = {"projector_state_dict": projector.state_dict(), "language_model_state_dict": llm.state_dict()}
        torch.save(states | {"config": {"vision_dim": VISION_WIDTH}}, source)
    else:
        whole = nn.Module()
        whole.vision_encoder, whole.projector, whole.language_model = nn.Linear(2, 2), projector, llm
        source = tmp_path / "mini.safetensors"
        save_model(whole, str(source))  # which keeps tied weights once
    run(ImportSettings(source=str(source), out=str(out), format="minimal", vision=str(vit), llm=str(plain_llm)))
    prompt = tiny_models.make_tokenizer()("Short caption:").input_ids
    check_logits(out, vit, llm, projector, [], prompt)


# ---- refusals -----------------------------------------------------------------------------------------------------------


def damage_of(kind, state):
    """A state dict with one fault."""
    state = dict(state)
    if kind == "missing":
        del state["layers.1.cross_attn.in_proj_bias"]
    elif kind == "unknown":
        state["layers.0.gate"] = torch.zeros(3)
    elif kind == "shape":
        state["layers.2.mlp.2.bias"] = torch.zeros(7)
    return state


@pytest.mark.parametrize(
    "kind,message",
    [
        ("missing", "the weight 'layers.1.cross_attn.in_proj_bias' is missing"),
        ("unknown", "the weight 'layers.0.gate' is unknown"),
        ("shape", r"the weight 'layers.2.mlp.2.bias' has shape \(7,\).*must have \(32,\)"),
    ],
)
def test_each_weight_is_checked(kind, message, siglip, plain_llm, tmp_path, out):
    qformer, projector = notebook("normal")
    torch.save(damage_of(kind, qformer.state_dict()), tmp_path / "qformer_best.pt")
    torch.save(projector.state_dict(), tmp_path / "projector_best.pt")
    with pytest.raises(UserError, match=message):
        run(
            ImportSettings(
                source=str(tmp_path), out=str(out), format="blipren", vision=str(siglip), llm=str(plain_llm)
            )
        )
    assert not out.exists()


def test_files_that_are_refused(siglip, plain_llm, tmp_path, out, capsys):
    class Code:
        def __reduce__(self):
            return print, ("this code ran",)

    settings = dict(out=str(out), format="blipren", vision=str(siglip), llm=str(plain_llm))
    bad = tmp_path / "bad.pt"
    torch.save({"qformer.query": Code()}, bad)
    with pytest.raises(UserError, match="holds more than weights"):
        run(ImportSettings(source=str(bad), **settings))
    assert "this code ran" not in capsys.readouterr().out
    bad.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is damaged"):
        run(ImportSettings(source=str(bad), **settings))
    torch.save({"decoder.x": torch.zeros(1)}, bad)
    with pytest.raises(UserError, match=re.escape("'decoder.x' is unknown; weights begin with qformer., projector.")):
        run(ImportSettings(source=str(bad), **settings))
    with pytest.raises(UserError, match="must hold one file qformer"):
        run(ImportSettings(source=str(tmp_path), **settings))
    with pytest.raises(UserError, match="has no qformer/pytorch_model.bin"):
        run(ImportSettings(source=str(tmp_path), **settings | {"format": "two-stage"}))


def test_an_llm_of_another_width_is_refused(siglip, tmp_path, out):
    narrow = tiny_models.make_llm(tmp_path / "narrow", hidden_size=16)
    qformer, projector = notebook("normal")
    torch.save(qformer.state_dict(), tmp_path / "qformer_best.pt")
    torch.save(projector.state_dict(), tmp_path / "projector_best.pt")
    with pytest.raises(UserError, match="it is another --llm"):
        run(ImportSettings(source=str(tmp_path), out=str(out), format="blipren", vision=str(siglip), llm=str(narrow)))


def test_wrong_use(capsys):
    assert main(["import", "x", "y", "--format", "blipren", "--vision", "v"]) == 2
    assert "needs --vision and --llm" in capsys.readouterr().err
    assert main(["import", "x", "y", "--llm", "z"]) == 2
    assert "not of blip-2" in capsys.readouterr().err
