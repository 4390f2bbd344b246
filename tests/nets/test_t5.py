"""T5: against recorded outputs, and against transformers with weights under the official names."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import UMT5Config, UMT5EncoderModel

from tests.helpers import golden, golden_path, rel_l2
from utils.errors import ConfigError
from wan.files.load import load_t5
from wan.files.tokenizer import load_tokenizer
from wan.nets.spec import TEXT_LENGTH
from wan.nets.t5 import clean_prompt, encode_text, t5_key

VOCABULARY, HEADS, LAYERS = 40, 3, 2


@pytest.fixture(scope="module")
def plain() -> UMT5EncoderModel:
    """A small random encoder as transformers builds it. Its width, inner width and FFN all differ."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS)
    model = UMT5EncoderModel(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.02, std=0.3)  # also the norms, or a swap of two would go unnoticed
    return model


@pytest.fixture(scope="module")
def official(plain) -> dict[str, torch.Tensor]:
    """Its weights under the names of the published file, written out by hand."""
    weights = {"token_embedding.weight": plain.shared.weight, "norm.weight": plain.encoder.final_layer_norm.weight}
    for i, block in enumerate(plain.encoder.block):
        attention, ffn = block.layer
        weights |= {
            f"blocks.{i}.norm1.weight": attention.layer_norm.weight,
            f"blocks.{i}.norm2.weight": ffn.layer_norm.weight,
            f"blocks.{i}.pos_embedding.embedding.weight": attention.SelfAttention.relative_attention_bias.weight,
            f"blocks.{i}.ffn.gate.0.weight": ffn.DenseReluDense.wi_0.weight,
            f"blocks.{i}.ffn.fc1.weight": ffn.DenseReluDense.wi_1.weight,
            f"blocks.{i}.ffn.fc2.weight": ffn.DenseReluDense.wo.weight,
        }
        weights |= {f"blocks.{i}.attn.{x}.weight": getattr(attention.SelfAttention, x).weight for x in "qkvo"}
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.fixture
def loaded(official, tmp_path) -> UMT5EncoderModel:
    save_file(official, tmp_path / "t5.safetensors")
    return load_t5(tmp_path / "t5.safetensors", torch.float32, "cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per word `w3` ... `w39`; appends `</s>` like the real one."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    folder = tmp_path_factory.mktemp("tokenizer")
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    built.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_outputs_equal_those_of_transformers_for_the_same_weights(plain, loaded, tokenizer):
    words = [5, 3, 17, 39, 2, 2, 8]
    (embedding,) = encode_text(loaded, tokenizer, [" ".join(f"w{i}" if i > 2 else "?" for i in words)], "cpu")
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([[*words, 1]])).last_hidden_state[0]
    assert rel_l2(embedding, expected) <= 1e-5


def test_prompts_of_one_batch_do_not_change_each_other(loaded, tokenizer):
    prompts = ["w4 w5", "", " ".join(f"w{3 + i % 30}" for i in range(200))]
    together = encode_text(loaded, tokenizer, prompts, "cpu")
    assert [len(embedding) for embedding in together] == [3, 1, 201]
    for prompt, embedding in zip(prompts, together, strict=True):
        assert_close(embedding, encode_text(loaded, tokenizer, [prompt], "cpu")[0])


def test_a_long_prompt_is_cut_to_512_tokens_and_keeps_its_end_token(plain, loaded, tokenizer):
    (embedding,) = encode_text(loaded, tokenizer, ["w9 " * 2000], "cpu")
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([[9] * (TEXT_LENGTH - 1) + [1]])).last_hidden_state[0]
    assert rel_l2(embedding, expected) <= 1e-5


def test_embeddings_have_the_dtype_of_the_model(official, tokenizer, tmp_path):
    save_file(official, tmp_path / "t5.safetensors")
    model = load_t5(tmp_path / "t5.safetensors", torch.bfloat16, "cpu")
    assert encode_text(model, tokenizer, ["w3"], "cpu")[0].dtype == torch.bfloat16


def test_keys_with_encoder_anywhere_in_front_load_the_same_model(official, loaded, tmp_path):
    save_file(
        {name.replace("blocks.", "encoder.blocks."): t for name, t in official.items()}, tmp_path / "f.safetensors"
    )
    other = load_t5(tmp_path / "f.safetensors", torch.float32, "cpu").state_dict()
    assert_close(other, loaded.state_dict(), rtol=0, atol=0)
    assert t5_key("encoder.blocks.1.attn.q.weight") == t5_key("blocks.1.attn.q.weight")


def test_the_token_embedding_is_held_once_even_after_a_conversion(loaded):
    for model in (loaded, loaded.to(torch.bfloat16)):
        assert model.shared.weight is model.encoder.embed_tokens.weight
    elements = sum(weight.numel() for weight in loaded.parameters())
    assert elements == sum(weight.numel() for weight in loaded.state_dict().values()) - VOCABULARY * 32


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_an_error(official, tokenizer, tmp_path):
    official = official | {"token_embedding.weight": official["token_embedding.weight"][:30].clone()}
    save_file(official, tmp_path / "t5.safetensors")
    model = load_t5(tmp_path / "t5.safetensors", torch.float32, "cpu")
    with pytest.raises(ConfigError, match="token 35 is beyond the 30"):
        encode_text(model, tokenizer, ["w35"], "cpu")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\n b\t\u3000c ", "a b c"),
        ("fish &amp;amp; chips &lt;3", "fish & chips <3"),
        ("cafÃ© â€“ done", "café – done"),
        (" \n ", ""),
        ("把背景换成海滩，保留人物", "把背景换成海滩,保留人物"),  # ftfy turns full-width forms into plain ones
    ],
)
def test_prompts_are_repaired_unescaped_and_single_spaced(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_recorded_prompts_give_the_recorded_tokens_and_embeddings(tiny):
    expected = golden("t5")
    prompts = json.loads(golden_path("t5_prompts.json").read_text(encoding="utf-8"))[:3]
    cases = [*zip("012", prompts, strict=True), ("_empty", "")]
    tokenizer = load_tokenizer(tiny["tokenizer"])
    model = load_t5(tiny["t5"], torch.float32, "cpu")
    embeddings = encode_text(model, tokenizer, [prompt for _, prompt in cases], "cpu")
    for (name, prompt), embedding in zip(cases, embeddings, strict=True):
        tokens = tokenizer(clean_prompt(prompt), padding="max_length", truncation=True, max_length=TEXT_LENGTH)
        assert tokens.input_ids == expected[f"ids{name}"].tolist()
        assert sum(tokens.attention_mask) == len(embedding)
        if name != "_empty":
            assert tokens.attention_mask == expected[f"mask{name}"].tolist()
        assert rel_l2(embedding, expected[f"embed{name}"]) <= 1e-5
