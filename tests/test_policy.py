"""What pi is: every family against transformers, and checkpoints that open on both sides.

Bugs killed here: rotary positions counted with padding, a window off by one, a tied head ignored, query and key norms or
biases left out, a cache that shifts, weights in bf16 after loading, an end-of-turn token that is not known, a head of its own
beside a tied one, code or pickles of a checkpoint that are run, damage believed.
"""
import json
import shutil

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MinistralConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)

import policy as policy_module
from sample import sample

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
    "mistral": MistralConfig(**SIZES, sliding_window=None), "mistral, window beyond the text": MistralConfig(**SIZES, sliding_window=99),
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
        whole, cache, parts = ours(tokens, mask), policy_module.KVCache(), []
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
        cache, new = policy_module.KVCache(), tokens
        for _ in range(12):
            new = (ours(new, mask, cache)[:, -1] @ ours.head.T).argmax(-1, keepdim=True)
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(tokens, right), f"{name}: greedy text differs"


@pytest.mark.parametrize("name", ["llama, llama3 rope, tied", "qwen3", "ministral"])
def test_gradients_equal_transformers(name):
    """Of the log-probability of the next tokens; a tied head adds to the gradient of the embedding."""
    theirs, ours = pair(CONFIGS[name])
    tokens, _ = ragged()
    for logits in (theirs(input_ids=tokens).logits, ours(tokens) @ ours.head.T):
        logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).sum().backward()
    right = dict(theirs.named_parameters())
    assert set(right) == {weight for weight, _ in ours.named_parameters()}
    for weight, mine in ours.named_parameters():
        close(mine.grad, right[weight].grad, f"{name}: gradient of {weight}")


def test_bf16_lives_in_activations_only():
    """Parameters stay fp32, so a step of 1e-6 moves them; the log-probabilities move by bf16's two to three digits."""
    _, ours = pair(CONFIGS["qwen3"])
    tokens, mask = ragged()
    logp = lambda: policy_module.token_logprobs(ours(tokens, mask)[:, :-1], ours.head, tokens[:, 1:])[0][mask[:, :-1]]
    with torch.no_grad():
        exact, ours.dtype = logp(), torch.bfloat16
        rounded = logp()
    assert rounded.dtype == torch.float32 and {w.dtype for w in ours.parameters()} == {torch.float32}
    assert 0 < (rounded - exact).abs().max() < 0.5, f"off by {(rounded - exact).abs().max():.2f}"
    norm = ours.model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm -= 1e-6
    assert (norm != before).all(), "a step of 1e-6 was rounded away"


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


def test_a_saved_policy_replaces_the_one_before_it(tmp_path):
    old, tokenizer = policy_module.tiny(width=16, layers=2, heads=1, kv_heads=1, inner=16, seed=1)
    new, _ = policy_module.tiny(width=16, layers=1, heads=1, kv_heads=1, inner=16, seed=2)
    new.stop_ids = [1, 5]
    for policy in (old, new):
        policy_module.save(policy, tokenizer, tmp_path / "model")
    again, _ = policy_module.load(tmp_path / "model")
    assert torch.equal(again.head, new.head) and again.stop_ids == [1, 5] and len(again.model.layers) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model"], "nothing is left beside it"


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


def test_a_tied_checkpoint_may_carry_a_copy_of_its_head(tmp_path):
    from safetensors.torch import load_file, save_file
    checkpoint(tmp_path, shard="1GB")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(53, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, _ = policy_module.load(tmp_path)
    assert "lm_head.weight" not in dict(ours.named_parameters())
    assert ours.head is ours.model.embed_tokens.weight and torch.equal(ours.head, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_pad_token_that_is_missing_or_equal_to_eos_does_no_harm(pad, tmp_path):
    """A ragged batch: the end-of-answer token is sampled and counted although it looks like padding."""
    checkpoint(tmp_path, "llama", eos=[1, 7])
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "pad_token"}
                               | ({"pad_token": pad} if pad else {})))
    policy, tokenizer = policy_module.load(tmp_path)
    assert tokenizer.pad_token == "<eos>"
    rollout = sample(policy, tokenizer, ["1,2=", "4 7 2 9,24="], 16, 30, 2.0, torch.Generator().manual_seed(0))
    assert rollout.prompt_mask.sum(1).tolist() == [4] * 16 + [11] * 16, "padding is what stands left of the prompt"
    last = rollout.response[torch.arange(32), rollout.mask.sum(1) - 1]
    assert {1, 7} <= set(last.tolist()), "both end-of-turn tokens must end answers, and lie inside the mask"
    assert [token in policy.stop_ids for token in last.tolist()] == rollout.finished.tolist()


def test_nothing_that_comes_with_a_checkpoint_is_run(tmp_path):
    """A module named in the configs, and a pickle beside the safetensors: both would leave a trace."""
    checkpoint(tmp_path)
    trace = f"open({str(tmp_path / 'trace')!r}, 'w')"
    (tmp_path / "evil.py").write_text(trace)
    for name, kind in (("config.json", {"AutoConfig": "evil.C"}), ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]})):
        broken_config(tmp_path, name, auto_map=kind)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V" + trace.encode() + b"\ntR.")
    try:
        policy_module.load(tmp_path)
    except ValueError as error:                        # refusing it is as good
        assert "\n" not in str(error)
    assert not (tmp_path / "trace").exists(), "code that came with the checkpoint was run"


def broken_config(folder, name="config.json", **change):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def pickle_only(folder):
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


DAMAGE = {
    "architecture": (lambda f: broken_config(f, model_type="gpt2"), "model type 'gpt2' is not supported; these are: llama"),
    "rope": (lambda f: broken_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope scaling 'yarn'"),
    "activation": (lambda f: broken_config(f, hidden_act="gelu"), "activation 'gelu' is not supported"),
    "quantised": (lambda f: broken_config(f, quantization_config={"quant_method": "fp8"}), "is quantised"),
    "shape": (lambda f: broken_config(f, intermediate_size=40), "but its config asks for (40, 32)"),
    "missing weight": (lambda f: broken_config(f, num_hidden_layers=4, layer_types=None), "lacks the weight 'model.layers.3."),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "corrupt config": (lambda f: (f / "config.json").write_text("{"), "config.json is missing or damaged"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[1]"), "config.json is missing or damaged"),
    "config in bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is missing or damaged"),
    "impossible config": (lambda f: broken_config(f, hidden_size="wide"), "config.json is missing or damaged"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "too many words": (lambda f: broken_config(f, vocab_size=9), "its tokenizer has 22 tokens, but its config says"),
    "corrupt tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer in"),
    "corrupt generation config": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is missing or"),
    "corrupt index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is missing or damaged"),
    "empty file": (lambda f: next(f.glob("*.safetensors")).write_bytes(b""), "is damaged"),
    "missing shard": (lambda f: next(f.glob("model-00002*")).unlink(), "model-00002-of"),
    "truncated": (lambda f: [x.write_bytes(x.read_bytes()[:-100]) for x in f.glob("*.safetensors")], "is damaged"),
    "no weights": (lambda f: [x.unlink() for x in f.glob("*.safetensors")], "is missing"),
    "pickle only": (pickle_only, "any other form than safetensors (.bin, .pth) are never read"),
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
    checkpoint(tmp_path / "hub")
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"never fetched")

    def fake(name, **patterns):
        if name != "some/model":
            raise OSError(f"{name} is not there,\nand this goes on")
        kept = huggingface_hub.utils.filter_repo_objects([file.name for file in (tmp_path / "hub").iterdir()], **patterns)
        (tmp_path / "here").mkdir()
        for file in kept:
            shutil.copy(tmp_path / "hub" / file, tmp_path / "here")
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert policy_module.load("some/model")[0].config.model_type == "qwen2"
    assert {file.suffix for file in (tmp_path / "here").iterdir()} == {".json", ".safetensors"}, "a pickle was fetched"
    with pytest.raises(ValueError, match="neither a folder here nor a model that the hub gives"):
        policy_module.load("other/model")
    with pytest.raises(ValueError, match="neither a folder here nor"):
        policy_module.load("no such/folder at/all")


def test_tiny_is_about_a_million_parameters_and_reads_every_character():
    policy, tokenizer = policy_module.tiny()
    assert 5e5 < sum(w.numel() for w in policy.parameters()) < 2e6
    text = "4 7 2 9,24=(9-7)*4/2+1"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and len(tokenizer(text).input_ids) == len(text)
