"""What pi is: every family against transformers, and checkpoints that open on both sides.

Bugs killed here: rotary positions counted with padding, a window off by one, a tied head ignored, query and key norms or
biases left out, a cache that shifts, weights in bf16 after loading, an end-of-turn token that is not known, damage believed.
"""
import json

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MinistralConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)

import policy as policy_module

SIZES = dict(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
STRETCHED = dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=32)
CONFIGS = {
    "llama": LlamaConfig(**SIZES), "llama, llama3 rope, tied": LlamaConfig(**SIZES, rope_parameters=STRETCHED, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2, window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16), "mistral, window": MistralConfig(**SIZES, sliding_window=4),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "ministral": MinistralConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=["full_attention", "sliding_attention", "full_attention"])}


def pair(config, seed=0):
    """transformers' model and ours with the same random weights."""
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.15 * torch.randn(weight.shape))
    ours = policy_module.Policy(config)
    wanted = ours.state_dict()
    ours.load_state_dict({name: w for name, w in theirs.state_dict().items() if name in wanted})
    return theirs, ours


def ragged(seed=1, B=4, T=11):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) >= torch.tensor([0, 3, 7, 10])[:, None]              # padded on the left; one prompt of one token
    return torch.randint(2, 53, (B, T), generator=generator), mask


def close(ours, theirs, message):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 2e-5, f"{message}: off by {error:.1e} of the largest value"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name):
    """A left-padded batch; compared on real tokens only."""
    theirs, ours = pair(CONFIGS[name])
    tokens, mask = ragged()
    with torch.no_grad():
        right = theirs(input_ids=tokens, attention_mask=mask.long(),
                       position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits
        close((ours(tokens, mask) @ ours.head.T)[mask], right[mask], name)
        alone = ours(tokens[2:3, 7:]) @ ours.head.T
        close(alone[0], right[2, 7:], f"{name}: a row without its padding")


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decode_is_the_full_forward(name):
    """Three tokens read, then one, four, and the rest."""
    _, ours = pair(CONFIGS[name])
    tokens, mask = ragged()
    with torch.no_grad():
        whole, cache, parts = ours(tokens, mask), ours.new_cache(), []
        for start, end in ((0, 3), (3, 4), (4, 8), (8, 11)):
            parts.append(ours(tokens[:, start:end], mask[:, :end], cache))
        cached = torch.cat(parts, dim=1)
        assert (cached - whole)[mask].abs().max() < 1e-5, f"{name}: off by {(cached - whole)[mask].abs().max():.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_generate(name):
    theirs, ours = pair(CONFIGS[name])
    tokens, mask = ragged()
    right = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        cache, new = ours.new_cache(), tokens
        for _ in range(12):
            new = (ours(new, mask, cache)[:, -1] @ ours.head.T).argmax(-1, keepdim=True)
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(tokens, right), f"{name}: greedy text differs"


def test_gradients_equal_transformers():
    theirs, ours = pair(CONFIGS["qwen3"])
    tokens, _ = ragged()
    theirs(input_ids=tokens).logits.log_softmax(-1)[:, 3, 5].sum().backward()
    (ours(tokens) @ ours.head.T).log_softmax(-1)[:, 3, 5].sum().backward()
    right = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if right[name].grad is not None:
            close(weight.grad, right[name].grad + 0, f"gradient of {name}")


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folders_open_in_transformers(name, tmp_path):
    theirs, ours = pair(CONFIGS[name])
    _, tokenizer = policy_module.tiny(width=16, layers=1, heads=1, kv_heads=1, inner=16)
    policy_module.save(ours, tokenizer, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens, _ = ragged()
    with torch.no_grad():
        close(opened(input_ids=tokens).logits, theirs(input_ids=tokens).logits, name)
    if name == "llama":                                # the others' Auto classes expect a tokenizer of their own kind
        assert AutoTokenizer.from_pretrained(tmp_path / "model")("4 7,1=").input_ids == tokenizer("4 7,1=").input_ids
    again, _ = policy_module.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))


def checkpoint(tmp_path, name="qwen2", shard="40KB", dtype=torch.float32, eos=1):
    """A folder as transformers writes it, in shards."""
    theirs, _ = pair(CONFIGS[name])
    theirs.generation_config.eos_token_id = eos
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    policy_module.tiny(width=16, layers=1, heads=1, kv_heads=1, inner=16)[1].save_pretrained(tmp_path)
    return theirs


def test_sharded_bf16_checkpoint_with_several_stop_tokens(tmp_path):
    theirs = checkpoint(tmp_path, dtype=torch.bfloat16, eos=[7, 9])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, tokenizer = policy_module.load(tmp_path)
    assert {w.dtype for w in ours.parameters()} == {torch.float32}, "parameters must be fp32"
    assert set(ours.stop_ids) >= {7, 9}, "every end-of-turn token of the generation config ends an answer"
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, dict(theirs.named_parameters())[name].float())


def broken_config(folder, **change):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


DAMAGE = {
    "architecture": (lambda f: broken_config(f, model_type="gpt2"), "model type 'gpt2' is not supported; these are: llama"),
    "rope": (lambda f: broken_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope scaling 'yarn'"),
    "shape": (lambda f: broken_config(f, intermediate_size=40), "but its config asks for (40, 32)"),
    "missing weight": (lambda f: broken_config(f, num_hidden_layers=4, layer_types=None), "lacks the weight 'model.layers.3."),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "corrupt config": (lambda f: (f / "config.json").write_text("{"), "config.json is missing or damaged"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "truncated": (lambda f: [x.write_bytes(x.read_bytes()[:-100]) for x in f.glob("*.safetensors")], "is damaged"),
    "no weights": (lambda f: [x.unlink() for x in f.glob("*.safetensors")], "is missing"),
    "pickle only": (lambda f: [x.rename(f / "pytorch_model.bin") for x in f.glob("model-00001*")], "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_sentence(kind, tmp_path):
    checkpoint(tmp_path)
    spoil, says = DAMAGE[kind]
    spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        policy_module.load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_hub_names_are_fetched_and_failures_told(tmp_path, monkeypatch):
    import huggingface_hub
    checkpoint(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **rest: {"some/model": str(tmp_path)}[name])
    assert policy_module.load("some/model")[0].config.model_type == "qwen2"
    with pytest.raises(ValueError, match="neither a folder here nor a model that the hub gives"):
        policy_module.load("other/model")


def test_tiny_is_about_a_million_parameters_and_reads_every_character():
    policy, tokenizer = policy_module.tiny()
    assert 5e5 < sum(w.numel() for w in policy.parameters()) < 2e6
    text = "4 7 2 9,24=(9-7)*4/2+1"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and len(tokenizer(text).input_ids) == len(text)
