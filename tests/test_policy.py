"""What pi is: every family against transformers, and checkpoints that open on both sides.

Bugs killed here: rotary positions counted with padding, a window off by one, a tied head ignored,
query and key norms or biases left out, a cache that shifts, weights in bf16 after loading, an
end-of-turn token that is not known, a head of its own beside a tied one or in place of it, code or
pickles of a checkpoint that are run, damage believed, a tokenizer rebuilt with other ids, settings
under names that an older transformers does not read, a model that cannot be saved after the work.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MinistralConfig,
                          MistralConfig, Qwen2Config,
                          Qwen3Config)

import policy as policy_module
from sample import sample
from test_losses import check, claim

core, care = pytest.mark.core, pytest.mark.care       # with the function that a test grades

SIZES = dict(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
SMALL = dict(width=16, layers=1, heads=1, kv_heads=1, inner=16)                # of `tiny`
# Of four frequencies two are kept, the third is blended (0.29 of it are kept), the last is divided
# by 4.
STRETCHED = dict(rope_type="llama3", rope_theta=30.0, factor=4.0, low_freq_factor=1.0,
                 high_freq_factor=4.0,
                 original_max_position_embeddings=64)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, llama3 rope, tied": LlamaConfig(**SIZES, rope_parameters=STRETCHED,
                                            tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2, window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4,
                                 max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mistral, window": MistralConfig(**SIZES, sliding_window=4),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window beyond the text": MistralConfig(**SIZES, sliding_window=99),
    "ministral": MinistralConfig(**SIZES, head_dim=8, sliding_window=4,
                                 layer_types=["full_attention", "sliding_attention",
                                              "full_attention"])}


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
    # padded on the left; one prompt of one token
    mask = torch.arange(T) >= torch.tensor([0, 3, 7, 10])[:, None]
    return torch.randint(2, 53, (B, T), generator=generator), mask


def close(ours, theirs, message):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 2e-5, f"{message}: off by {error:.1e} of the largest value"


@core("Attention.forward")
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


@core("Attention.forward")
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
        assert (cached - whole)[mask].abs().max() < 1e-5, (
            f"{name}: off by {(cached - whole)[mask].abs().max():.1e}")


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_generate(name):
    theirs, ours = pair(CONFIGS[name])
    tokens, mask = ragged()
    right = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=12, do_sample=False,
                            pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        cache, new = policy_module.KVCache(), tokens
        for _ in range(12):
            new = (ours(new, mask, cache)[:, -1] @ ours.head.T).argmax(-1, keepdim=True)
            tokens, mask = torch.cat([tokens, new],
                                     1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(tokens, right), f"{name}: greedy text differs"


@care("Attention.forward")
@pytest.mark.parametrize("name", ["llama, llama3 rope, tied", "qwen3", "ministral"])
def test_gradients_equal_transformers(name):
    """Of the log-probability of the next tokens; a tied head adds to the gradient of the
    embedding."""
    theirs, ours = pair(CONFIGS[name])
    tokens, _ = ragged()
    for logits in (theirs(input_ids=tokens).logits, ours(tokens) @ ours.head.T):
        logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).sum().backward()
    right = dict(theirs.named_parameters())
    assert set(right) == {weight for weight, _ in ours.named_parameters()}
    for weight, mine in ours.named_parameters():
        close(mine.grad, right[weight].grad, f"{name}: gradient of {weight}")


@pytest.mark.skipif(not policy_module.ONE_DNN, reason="a torch without MKL or oneDNN")
@pytest.mark.parametrize("rows", [(5,), (40, 3), (0,), (2, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_large_products_against_float64(rows, biased):
    """Their own gradients, too, where x has no rows or is a slice of something wider."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, g = (torch.randn(shape, generator=generator)
                          for shape in ((*rows, 400), (200, 300), (200,), (*rows, 200)))
    given = [x[..., 50:350], weight, bias if biased else None]
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [None if t is None else t.detach().to(dtype).requires_grad_()
                  for t in given]
        y = policy_module.product(*inputs)
        y.backward(g.to(dtype))
        results.append([y.detach(), *(t.grad for t in inputs if t is not None)])
    assert len(results[0]) == 3 + biased
    for mine, right in zip(*results):
        assert mine.shape == right.shape and mine.dtype == torch.float32
        assert torch.allclose(mine.double(), right, atol=2e-4, rtol=1e-5)


@pytest.mark.skipif(not policy_module.ONE_DNN, reason="a torch without MKL or oneDNN")
def test_which_products_go_to_one_dnn(monkeypatch):
    """Large fp32 ones on a CPU; the tiny policy's stay as they are, bit for bit."""
    seen, real = [], policy_module.one_dnn
    monkeypatch.setattr(policy_module, "one_dnn", lambda *args: seen.append(1) or real(*args))
    x, wide, narrow = torch.randn(7, 300), torch.randn(200, 300), torch.randn(128, 300)
    residual = torch.randn(7, 200)
    exact = x.double() @ wide.double().T + residual
    assert torch.allclose(policy_module.product(x, wide, residual=residual).double(), exact,
                          atol=1e-4) and len(seen) == 1
    assert torch.equal(policy_module.product(x, narrow), torch.nn.functional.linear(x, narrow))
    assert torch.equal(policy_module.product(x, narrow, residual=residual[:, :128]),
                       torch.addmm(residual[:, :128], x, narrow.T))
    assert policy_module.product(x.bfloat16(), wide.bfloat16()).dtype == torch.bfloat16
    assert policy_module.product(x.double(), wide.double()).dtype == torch.float64
    assert len(seen) == 1


@care("Attention.forward")
def test_bf16_lives_in_activations_only():
    """Parameters stay fp32, so a step of 1e-6 moves them; the log-probabilities move by bf16's two
    to three digits."""
    _, ours = pair(CONFIGS["qwen3"])
    tokens, mask = ragged()
    logp = lambda: policy_module.token_logprobs(ours(tokens, mask)[:, :-1], ours.head,
                                                tokens[:, 1:])[0][mask[:, :-1]]
    with torch.no_grad():
        exact, ours.dtype = logp(), torch.bfloat16
        rounded = logp()
    assert rounded.dtype == torch.float32 and {w.dtype
                                               for w in ours.parameters()} == {torch.float32}
    assert 0 < (rounded - exact).abs().max() < 0.5, f"off by {(rounded - exact).abs().max():.2f}"
    norm = ours.model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm -= 1e-6
    assert (norm != before).all(), "a step of 1e-6 was rounded away"


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folders_open_in_transformers(name, tmp_path):
    theirs, ours = pair(CONFIGS[name])
    _, tokenizer = policy_module.tiny(**SMALL)
    policy_module.save(ours, tokenizer, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens, _ = ragged()
    with torch.no_grad():
        close(opened(input_ids=tokens).logits, theirs(input_ids=tokens).logits, name)
    # The names by which transformers 4 knows the rotary settings: without them it takes theta
    # 10000.
    keys = json.loads((tmp_path / "model" / "config.json").read_text())
    rope = dict(ours.config.rope_parameters)
    assert keys["rope_theta"] == rope.pop("rope_theta")
    assert keys["rope_scaling"] == (None if rope == {"rope_type": "default"} else rope)
    # the others' Auto classes expect a tokenizer of their own kind
    if name == "llama":
        theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert theirs("4 7,1=").input_ids == tokenizer("4 7,1=").input_ids
    again, _ = policy_module.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    assert again.windows == ours.windows
    assert again.config.rope_parameters == ours.config.rope_parameters


def test_a_checkpoint_trained_in_bf16_stays_fp32(tmp_path, device):
    """Loaded on the device that is there, with activations in bf16, and saved again without the
    loss of a bit."""
    _, ours = pair(CONFIGS["qwen3"])
    _, tokenizer = policy_module.tiny(**SMALL)
    policy_module.save(ours, tokenizer, tmp_path / "model")
    loaded, _ = policy_module.load(tmp_path / "model", device, torch.bfloat16)
    assert {(w.dtype, w.device.type) for w in loaded.parameters()} == {(torch.float32, device)}
    tokens, mask = ragged()
    with torch.no_grad():
        exact = ours(tokens, mask)[mask]
        tokens, mask = tokens.to(device), mask.to(device)
        rounded = loaded(tokens, mask)[mask]
    assert rounded.dtype == torch.bfloat16 and rounded.device.type == device
    assert (rounded.float().cpu() - exact).abs().mean() < 0.02 * exact.abs().mean()
    policy_module.save(loaded, tokenizer, tmp_path / "again")
    again, _ = policy_module.load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are not here")
def test_a_second_process_fills_no_memory_of_the_first_gpu(tmp_path):
    policy_module.save(*policy_module.tiny(), tmp_path / "model")
    before = torch.cuda.memory_stats(0).get("allocated_bytes.all.allocated", 0)
    with torch.cuda.device(1):
        loaded, _ = policy_module.load(tmp_path / "model", "cuda", torch.bfloat16)
    assert torch.cuda.memory_stats(0).get("allocated_bytes.all.allocated",
                                          0) == before and str(loaded.device) == "cuda:1"


def test_a_saved_policy_replaces_the_one_before_it(tmp_path):
    old, tokenizer = policy_module.tiny(width=16, layers=2, heads=1, kv_heads=1, inner=16, seed=1)
    new, _ = policy_module.tiny(width=16, layers=1, heads=1, kv_heads=1, inner=16, seed=2)
    new.stop_ids = [1, 5]
    for policy in (old, new):
        policy_module.save(policy, tokenizer, tmp_path / "model")
    again, _ = policy_module.load(tmp_path / "model")
    assert torch.equal(again.head,
                       new.head) and again.stop_ids == [1, 5] and len(again.model.layers) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model"], "nothing is left beside it"


def checkpoint(tmp_path, name="qwen2", shard="40KB", dtype=torch.float32, eos=1):
    """A folder as transformers writes it, in shards."""
    theirs, _ = pair(CONFIGS[name])
    theirs.generation_config.eos_token_id = eos
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    policy_module.tiny(**SMALL)[1].save_pretrained(tmp_path)
    return theirs


def test_sharded_bf16_checkpoint_with_several_stop_tokens(tmp_path):
    theirs = checkpoint(tmp_path, dtype=torch.bfloat16, eos=[7, 9])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, tokenizer = policy_module.load(tmp_path)
    assert {w.dtype for w in ours.parameters()} == {torch.float32}, "parameters must be fp32"
    assert set(ours.stop_ids) >= {7, 9}, (
        "every end-of-turn token of the generation config ends an answer")
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, dict(theirs.named_parameters())[name].float())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_large_model_is_saved_in_several_files(name, tmp_path):
    """And read back bit for bit, by us and by transformers; a head of its own and a tied one."""
    theirs, ours = pair(CONFIGS[name])
    tokenizer = policy_module.tiny(**SMALL)[1]
    policy_module.save(ours, tokenizer, tmp_path / "model", file_size="40KB")
    files = list((tmp_path / "model").glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 50000 for file in files)
    again, _ = policy_module.load(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for weight, mine in ours.named_parameters():
        assert torch.equal(mine, dict(again.named_parameters())[weight]), weight
        assert torch.equal(mine, dict(opened.named_parameters())[weight]), weight


MEMORY = r"""
import re, sys, torch, policy
status = lambda: open("/proc/self/status").read()
pages = lambda what: int(re.search(what + r":\s+(\d+)", status())[1]) // 1024
made, tokenizer = policy.tiny(width=512, layers=8, heads=8, kv_heads=8, inner=2048)
size = sum(w.nbytes for w in made.parameters()) >> 20  # MB
policy.save(*policy.tiny(), sys.argv[1] + "/tiny")     # libraries loaded, threads started
policy.load(sys.argv[1] + "/tiny")
before = pages("VmHWM")
policy.save(made, tokenizer, sys.argv[1] + "/large")
saved = pages("VmHWM") - before
loaded = policy.load(sys.argv[1] + "/large")[0]
(sum(w.sum() for w in loaded.parameters())).item()     # every page is there now
print(size, saved, pages("VmHWM") - before - saved)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_no_second_copy_in_memory(tmp_path):
    """Peaks of a process that saves and loads 134 MB: nothing, and once."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True,
                          text=True, cwd=Path(policy_module.__file__).parent)
    assert done.returncode == 0, done.stderr
    size, saved, loaded = map(int, done.stdout.split())
    assert size > 100 and saved < 0.3 * size and loaded < 1.3 * size, done.stdout


def test_a_tied_checkpoint_may_carry_a_copy_of_its_head(tmp_path):
    from safetensors.torch import load_file, save_file
    checkpoint(tmp_path, shard="1GB")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(53, 32)}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    ours, _ = policy_module.load(tmp_path)
    assert "lm_head.weight" not in dict(ours.named_parameters())
    assert ours.head is ours.model.embed_tokens.weight
    assert torch.equal(ours.head, weights["model.embed_tokens.weight"])


def test_a_tied_head_under_its_other_name_alone(tmp_path):
    """What safetensors' save_model may leave; transformers opens it."""
    from safetensors.torch import load_file, save_file
    checkpoint(tmp_path, shard="1GB")
    weights = load_file(tmp_path / "model.safetensors")
    matrix = weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(policy_module.load(tmp_path)[0].head, matrix)


def test_a_copy_of_the_head_in_a_later_shard_is_left_out(tmp_path):
    from safetensors.torch import save_file
    theirs = checkpoint(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "zzz.safetensors"
    file.write_text(json.dumps(index))
    save_file({"lm_head.weight": torch.zeros(53, 32)}, tmp_path / "zzz.safetensors",
              metadata={"format": "pt"})
    assert torch.equal(policy_module.load(tmp_path)[0].head, theirs.get_input_embeddings().weight)


def test_what_is_synced_was_opened_for_writing(tmp_path, monkeypatch):
    """Windows refuses to sync a file that is open for reading only."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync",
                        lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    policy_module.save(*policy_module.tiny(**SMALL), tmp_path / "model")
    assert len(modes) == len(list((tmp_path / "model").iterdir())) and os.O_RDONLY not in modes


# ------------------------------------------------------------------- tokenizers as people have them

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def bytes_like_qwen():
    """256 bytes, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return made


def pieces_without_a_leading_blank():
    """Like SentencePiece, and like Yi and CodeQwen: no blank is put before the text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for c in "▁0123456789+-*/()=,abcdefghijklmnopqrstuvwxyzU.":
        vocab.setdefault(c, len(vocab))
    made = Tokenizer(models.BPE(vocab | {"▁t": len(vocab)}, [("▁", "t")], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in ("<unk>", "<s>", "</s>")])
    return made


def with_tokenizer(folder, made, family="qwen2", generation=None, **described):
    """A checkpoint of 300 ids whose tokenizer.json is `made` and tokenizer_config.json
    `described`."""
    config = dict(SIZES, vocab_size=300, max_position_embeddings=1024, tie_word_embeddings=True,
                  eos_token_id=256)
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family]
    AutoModelForCausalLM.from_config(kind(**config)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation or {"eos_token_id": 256}))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("family, label, make", [
    ("qwen2", "PreTrainedTokenizerFast", pieces_without_a_leading_blank),
    ("llama", "LlamaTokenizer", pieces_without_a_leading_blank),
    ("llama", "LlamaTokenizerFast", bytes_like_qwen), ("qwen2", "Qwen2Tokenizer", bytes_like_qwen)])
def test_ids_are_those_of_tokenizer_json(family, label, make, tmp_path):
    """transformers 5 rebuilds some of these from their vocabulary, and blanks are lost or added."""
    made, text = make(), "use 3, 4 to make 12."
    described = dict(tokenizer_class=label,
                     eos_token=made.id_to_token(made.token_to_id("</s>") or 256))
    folder = with_tokenizer(tmp_path / "in", made, family, **described)
    policy, tokenizer = policy_module.load(folder)
    policy_module.save(policy, tokenizer, tmp_path / "out")
    for loaded in tokenizer, policy_module.load(tmp_path / "out")[1]:
        ids = made.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False).input_ids == ids
        assert loaded.decode(ids) == text


def test_a_turn_of_the_chat_template_ends_an_answer(tmp_path):
    """Qwen2.5-Math and other base models: the template ends turns by <|im_end|>, the configs name
    <|endoftext|>."""
    described = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>")
    stops = {name: policy_module.load(with_tokenizer(tmp_path / name, bytes_like_qwen(),
                                                     chat_template=template,
                                                     **described))[0].stop_ids
             for name, template
             in (("chat", CHATML), ("none", None), ("fails", "{{ raise_exception('no') }}"),
                                    ("text", CHATML.replace("<|im_end|>", "[end]")),
                 ("asks only", "{{ messages[0].content }}"),
                                    ("blank", CHATML.replace("<|im_end|>", "\n<|im_end|>")))}
    assert stops == {"chat": [256, 258], "none": [256], "fails": [256], "text": [256],
                     "asks only": [256], "blank": [256, 258]}


def test_further_stop_tokens_can_be_named_and_are_kept(tmp_path):
    folder = with_tokenizer(tmp_path / "in", bytes_like_qwen(), eos_token="<|endoftext|>",
                            tokenizer_class="Qwen2Tokenizer")
    policy, tokenizer = policy_module.load(folder, stop=["<|im_start|>", "\n"])
    newline = tokenizer("\n").input_ids
    assert policy.stop_ids == sorted([256, 257, *newline])
    policy_module.save(policy, tokenizer, tmp_path / "out")
    assert policy_module.load(tmp_path / "out")[0].stop_ids == policy.stop_ids
    for wrong in ("two", ""):
        with pytest.raises(ValueError,
                           match=f"'{wrong}' cannot end an answer: it is not one token"):
            policy_module.load(folder, stop=[wrong])
    tiny_policy, tiny_tokenizer = policy_module.tiny(**SMALL)
    policy_module.save(tiny_policy, tiny_tokenizer, tmp_path / "tiny")
    with pytest.raises(ValueError, match="'@' cannot end an answer"):
        # known as unknown only
        policy_module.load(tmp_path / "tiny", stop=["@"])


def test_a_token_can_be_named_even_if_it_is_the_unknown_one(tmp_path):
    """GPT-2's line, SmolLM2 too, has <|endoftext|> for its unk_token; a byte has a name as well."""
    made = bytes_like_qwen()
    described = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")
    folder = with_tokenizer(tmp_path / "bytes", made, unk_token="<|endoftext|>", **described,
                            generation={"eos_token_id": 258})
    broken_config(folder, eos_token_id=258)
    assert policy_module.load(folder)[0].stop_ids == [258]
    assert policy_module.load(folder, stop=["<|endoftext|>"])[0].stop_ids == [256, 258]
    with pytest.raises(policy_module.UserError, match="'two' cannot end an answer"):
        policy_module.load(folder, stop=["two"])
    pieces = pieces_without_a_leading_blank()
    folder = with_tokenizer(tmp_path / "pieces", pieces, "llama", unk_token="<unk>",
                            eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")
    assert {0, 2, 256} == set(policy_module.load(folder, stop=["<unk>"])[0].stop_ids)
    for unknown in ("@", "two", ""):
        with pytest.raises(policy_module.UserError, match="cannot end an answer"):
            policy_module.load(folder, stop=[unknown])


def test_a_tokenizer_with_several_templates_can_be_saved(tmp_path):
    """And the names that transformers 4 reads are in its config."""
    templates = [dict(name="default", template=CHATML), dict(name="tool_use", template="tools")]
    folder = with_tokenizer(tmp_path / "in", bytes_like_qwen(), chat_template=templates,
                            tokenizer_class="Qwen2Tokenizer",
                            eos_token="<|endoftext|>",
                            additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    policy, tokenizer = policy_module.load(folder)
    policy_module.save(policy, tokenizer, tmp_path / "out")
    again = policy_module.load(tmp_path / "out")[1]
    both, special = {"default": CHATML, "tool_use": "tools"}, ["<|im_start|>", "<|im_end|>"]
    assert again.chat_template == tokenizer.chat_template == both
    assert again.extra_special_tokens == tokenizer.extra_special_tokens == special
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in written
    assert written["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]


def test_a_trial_save_leaves_nothing_and_tells_what_is_wrong(tmp_path, monkeypatch):
    policy, tokenizer = policy_module.tiny(**SMALL)
    policy_module.try_to_save(policy, tokenizer, tmp_path / "run" / "model")
    assert list((tmp_path / "run").iterdir()) == []
    policy_module.save(policy, tokenizer, tmp_path / "run" / "model")
    policy_module.try_to_save(policy, tokenizer, tmp_path / "run" / "model")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["model"], "the model is gone"
    policy_module.load(tmp_path / "run" / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a model cannot be saved as '.*file.model' "):
        policy_module.try_to_save(policy, tokenizer, tmp_path / "file" / "model")
    # a tokenizer that transformers itself cannot write
    tokenizer.init_kwargs["odd"] = object()
    with pytest.raises(ValueError, match="a model cannot be saved as .*TypeError"):
        policy_module.try_to_save(policy, tokenizer, tmp_path / "run" / "model")


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_pad_token_that_is_missing_or_equal_to_eos_does_no_harm(pad, tmp_path):
    """A ragged batch: the end-of-answer token is sampled and counted although it looks like
    padding."""
    checkpoint(tmp_path, "llama", eos=[1, 7])
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({key: value for key,
                                value in json.loads(file.read_text()).items() if key != "pad_token"}
                               | ({"pad_token": pad} if pad else {})))
    policy, tokenizer = policy_module.load(tmp_path)
    assert tokenizer.pad_token == "<eos>"
    rollout = sample(policy, tokenizer, ["1,2=", "4 7 2 9,24="], 16, 30, 2.0,
                     torch.Generator().manual_seed(0))
    assert rollout.prompt_mask.sum(1).tolist() == [4] * 16 + [11] * 16, (
        "padding is what stands left of the prompt")
    last = rollout.response[torch.arange(32), rollout.mask.sum(1) - 1]
    assert {1, 7} <= set(last.tolist()), (
        "both end-of-turn tokens must end answers, and lie inside the mask")
    assert [token in policy.stop_ids for token in last.tolist()] == rollout.finished.tolist()


def test_nothing_that_comes_with_a_checkpoint_is_run(tmp_path):
    """A module named in the configs, and a pickle beside the safetensors: both would leave a
    trace."""
    checkpoint(tmp_path)
    trace = f"open({str(tmp_path / 'trace')!r}, 'w')"
    (tmp_path / "evil.py").write_text(trace)
    for name, kind in (("config.json", {"AutoConfig": "evil.C"}),
                       ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]})):
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
    """The same weights, whole and harmless, but in the form that can hold code."""
    from safetensors.torch import load_file
    files = list(folder.glob("*.safetensors"))
    weights = {name: w for file in files for name, w in load_file(file).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    for file in [*files, folder / INDEX]:
        file.unlink()


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=2.0)
TOKENIZER, INDEX = ("tokenizer.json", "tokenizer_config.json"), "model.safetensors.index.json"
DAMAGE = {
    "architecture": (lambda f: broken_config(f, model_type="gpt2"),
                     "model type 'gpt2' is not supported; these are: llama"),
    "unheard-of architecture": (lambda f: broken_config(f, model_type="gpt9"), "gpt9"),
    "rope": (lambda f: broken_config(f, rope_parameters=YARN),
             "rope scaling 'yarn'"),
    "activation": (lambda f: broken_config(f, hidden_act="gelu"),
                   "activation 'gelu' is not supported"),
    "quantised": (lambda f: broken_config(f, quantization_config={"quant_method": "fp8"}),
                  "is quantised"),
    "shape": (lambda f: broken_config(f, intermediate_size=40),
              "'model.layers.0.mlp.down_proj.weight' of shape (32, 48), but its config asks for "
              "(32, 40)"),
    "missing weight": (lambda f: broken_config(f, num_hidden_layers=4, layer_types=None),
                       "lacks the weight 'model.layers.3.input_layernorm.weight'"),
    "no config": (lambda f: (f / "config.json").unlink(), "the config.json of "),
    "corrupt config": (lambda f: (f / "config.json").write_text("{"), "the config.json of "),
    "config of another kind": (lambda f: (f / "config.json").write_text("[1]"),
                               "the config.json of "),
    "config in bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
                        "the config.json of "),
    "impossible config": (lambda f: broken_config(f, hidden_size="wide"), "the config.json of "),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in TOKENIZER], "has no tokenizer"),
    "too many words": (lambda f: broken_config(f, vocab_size=9),
                       "its tokenizer has 22 tokens, but its config says"),
    "corrupt tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer of "),
    "corrupt generation config": (lambda f: (f / "generation_config.json").write_text("{"),
                                  "the generation_config.json of "),
    "corrupt index": (lambda f: (f / INDEX).write_text("{}"), "a file of weights of "),
    "empty file": (lambda f: next(f.glob("*.safetensors")).write_bytes(b""),
                   "a file of weights of "),
    "missing shard": (lambda f: next(f.glob("model-00002*")).unlink(), "model-00002-of"),
    "truncated": (lambda f: [x.write_bytes(x.read_bytes()[:-100])
                             for x in f.glob("*.safetensors")], "a file of weights of "),
    "no weights": (lambda f: [x.unlink() for x in f.glob("*.safetensors")],
                   "a file of weights of "),
    "pickle only": (pickle_only, "(safetensors only, never .bin or .pth) is missing or damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_sentence(kind, tmp_path):
    checkpoint(tmp_path)
    spoil, says = DAMAGE[kind]
    spoil(tmp_path)
    with pytest.raises(policy_module.UserError) as error:
        policy_module.load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert str(tmp_path) in str(error.value) or "supported" in str(error.value)


@pytest.mark.parametrize("kind", ["architecture", "rope", "activation", "quantised"])
def test_what_we_are_not_is_refused_before_any_weight_is_read(kind, tmp_path, monkeypatch):
    checkpoint(tmp_path)
    DAMAGE[kind][0](tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a,
                        **k: pytest.fail("read"))
    with pytest.raises(policy_module.UserError):
        policy_module.load(tmp_path)


LOAD = """
import sys, policy
try:
    model, tokenizer = policy.load(sys.argv[1])
    print(model.config.model_type, len(tokenizer), model.stop_ids)
except policy.UserError as error:
    print(error)
"""


def loaded_alone(name, cache):
    """What a process of its own prints that loads `name`, with no hub but what lies in `cache`."""
    offline = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", LOAD, str(name)], capture_output=True, text=True,
                          cwd=Path(policy_module.__file__).parent, env=os.environ | offline)


def pickled(folder):
    checkpoint(folder)
    pickle_only(folder)


def test_names_on_the_hub(tmp_path):
    """What lies in the hub's cache is found by its name; a pickle there is not; the rest is
    told."""
    for name, files in (("model", checkpoint), ("pickled", pickled)):
        place = tmp_path / "hub" / f"models--some--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        files(place / "snapshots" / ("0" * 40))
    assert loaded_alone("some/model", tmp_path).stdout == "qwen2 22 [1]\n"
    for name, says in (("some/pickled", "safetensors only, never .bin or .pth"),
                       ("other/model", "(a folder here, or a name on the hub)"),
                       ("no such/folder at/all", "(a folder here, or a name on the hub)")):
        told = loaded_alone(name, tmp_path).stdout
        assert says in told and f"'{name}'" in told and told.count("\n") == 1, told


def test_loading_is_silent(tmp_path):
    """No bar, no warning, whatever lies in the folder: a name too many, a weight too many."""
    from safetensors.torch import load_file, save_file
    checkpoint(tmp_path / "model", shard="1GB")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"unheard.of": torch.zeros(2)}, file, metadata={"format": "pt"})
    broken_config(tmp_path / "model", model_name="unheard of")
    done = loaded_alone(tmp_path / "model", tmp_path)
    assert (done.stdout, done.stderr) == ("qwen2 22 [1]\n", "")


def test_tiny_is_about_a_million_parameters_and_reads_every_character():
    policy, tokenizer = policy_module.tiny()
    assert 5e5 < sum(w.numel() for w in policy.parameters()) < 2e6
    text = "4 7 2 9,24=(9-7)*4/2+1"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) == len(text)


# ------------------------- for those who write attention themselves: failures that know the mistake

@core("rotate")
def test_rotate_by_hand():
    """x = (1, 2, 3, 4): the pairs are (1, 3) and (2, 4). A quarter turn for the first, none for the
    second: -3, 2, 1, 4."""
    x = torch.tensor([1., 2, 3, 4]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0., 1]]]), torch.tensor([[[1., 0]]])
    check("rotate((1, 2, 3, 4)), the first pair by a quarter turn",
          policy_module.rotate(x, cos, sin).flatten(), [-3, 2, 1, 4],
          bugs={
              "the other sense of rotation: a sign of the sine": [3, 2, -1, 4],
              "pairs of neighbours (x_0, x_1), not (x_i, x_{i + head_dim/2})": [-2, 1, 3, 4],
              "cos and sin exchanged": [1, -4, 3, 2], "no rotation at all": [1, 2, 3, 4]})


@core("rotate")
def test_only_the_distance_counts():
    """q at position m and k at n: their product depends on m - n alone, and lengths stay."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))

    def at(x, position):
        angles = position * torch.tensor([1., .3, .1, .02], dtype=torch.float64).view(1, 1, 4)
        return policy_module.rotate(x, angles.cos(), angles.sin())

    check("q at 7 times k at 4, against q at 3 times k at 0", (at(q, 7) * at(k, 4)).sum(),
          (at(q, 3) * at(k, 0)).sum())
    check("the length of a rotated vector", at(q, 7).norm(), q.norm())


@care("rotate")
def test_rotate_keeps_shape_and_dtype():
    x, angles = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 1, 3)
    for dtype in (torch.float32, torch.bfloat16):
        got = policy_module.rotate(x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype))
        claim(got.shape == x.shape and got.dtype == dtype,
              f"rotate: {tuple(x.shape)} {dtype} became {tuple(got.shape)} {got.dtype}")


SEEN = [  # mask, T, S, window; a row a query, a column a key
    ([1, 1, 1], 3, 3, None, "100 110 111"), ([0, 1, 1], 3, 3, None, "100 010 011"),
    ([1, 1, 1, 1], 2, 4, None, "1110 1111"),
    (None, 4, 4, 2, "1000 1100 0110 0011"), ([0, 1, 1, 1], 2, 4, None, "0110 0111"),
    (None, 2, 4, None, "1110 1111"),
    (None, 1, 4, 2, "0011"), ([1, 0, 1, 1], 4, 4, 3, "1000 1100 1010 0011"),
    (None, 1, 3, None, "111"), (None, 3, 3, None, "100 110 111")]


@core("allowed")
@pytest.mark.parametrize("mask, T, S, window, rows", SEEN,
                         ids=[f"{m} T={t} S={s} window={w}" for m, t, s, w, _ in SEEN])
def test_who_sees_whom(mask, T, S, window, rows):
    got = policy_module.allowed(None if mask is None else torch.tensor([mask]).bool(), T, S, window,
                                torch.device("cpu"))
    # plain causal attention: one token sees all, S tokens a triangle
    if got is None:
        claim(T in (1, S),
              f"T {T}, S {S}: None stands for plain causal attention, which is right for T = 1 "
              "and T = S only")
        got = torch.ones(1, 1, T, S).tril(S - T) > 0
    key, query = range(S), range(S - T, S)
    keep = [1] * S if mask is None else mask
    w = S if window is None else window
    table = lambda see: [[float(bool(see(q, k))) for k in key] for q in query]
    right = [[float(x) for x in row] for row in rows.split()]
    bugs = {
        "no causality: keys of the future are read":
            table(lambda q, k: k > q - w and keep[k] or k == q),
        "padding that is read: the mask is forgotten": table(lambda q, k: q - w < k <= q),
        "a window off by one: it includes the query itself":
            table(lambda q, k: q - w <= k <= q and keep[k] or k == q),
        "a window one too small": table(lambda q, k: q - w + 1 < k <= q and keep[k] or k == q),
        "the window forgotten": table(lambda q, k: k <= q and keep[k] or k == q),
        "a padded query that reads nothing, whose softmax is NaN":
            table(lambda q, k: q - w < k <= q and keep[k]),
        "queries at the first T positions, where they are the last":
            table(lambda q, k: k <= q - S + T),
        "a query that does not see itself": table(lambda q, k: q - w < k < q and keep[k])}
    check("allowed, a row per query", got.expand(1, 1, T, S)[0, 0].double(), right, bugs=bugs)


@care("allowed")
def test_each_row_has_its_own_padding():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    got = policy_module.allowed(mask, 2, 4, None, torch.device("cpu"))
    claim(got is not None and got.dtype == torch.bool and got.shape == (2, 1, 2, 4),
          "for a mask of numbers (2, 4) and T = 2 it must be (2, 1, 2, 4) bool, and is "
          f"{None if got is None else (tuple(got.shape), got.dtype)}")
    check("what row 2 may read, two tokens of padding first", got[1, 0].double(),
          [[0, 0, 1, 0], [0, 0, 1, 1]])
    check("what row 1 may read", got[0, 0].double(), [[1, 1, 1, 0], [1, 1, 1, 1]])


@core("KVCache.update")
def test_the_cache_grows():
    cache = policy_module.KVCache()
    make = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)
    bugs = {"the new ones only": [3], "new ones in front of old ones": [3, 1, 2],
            "the old ones only": [1, 2]}
    for layer in (0, 1):
        k, v = cache.update(layer, make(1, 2) + 100 * layer, make(10, 20) + 100 * layer)
        check(f"the first keys of layer {layer}", k.flatten(), [1 + 100 * layer, 2 + 100 * layer])
    k, v = cache.update(0, make(3), make(30))
    claim(k.dim() == 4 and k.shape[:2] == (1, 1),
          f"keys must be (B, kv_heads, S, head_dim), joined along S, and are {tuple(k.shape)}")
    check("keys after 1, 2 and then 3", k.flatten(), [1, 2, 3], bugs=bugs)
    check("values after 10, 20 and then 30", v.flatten(), [10, 20, 30],
          bugs={name: [10 * x for x in b] for name, b in bugs.items()} |
          {"keys returned as values": [1, 2, 3]})
    k, v = cache.update(1, make(103), make(130))
    check("keys of layer 1", k.flatten(), [101, 102, 103],
          bugs={"one list for all layers": [1, 2, 3, 103]})


@care("KVCache.update")
def test_the_cache_keeps_gradients_and_its_own_copy():
    cache, k = policy_module.KVCache(), torch.randn(2, 3, 4, 5, requires_grad=True)
    cache.update(0, k, 2 * k)
    keys, values = cache.update(0, k[:, :, :1], k[:, :, :1])
    claim(keys.shape == values.shape == (2, 3, 5, 5),
          f"4 tokens and 1 more must be (2, 3, 5, 5), not {tuple(keys.shape)}")
    for name, x, stored in (("keys", keys, cache.keys), ("values", values, cache.values)):
        grad, = torch.autograd.grad(x.sum(), k, retain_graph=True, allow_unused=True)
        claim(grad is not None and (grad[:, :, 1:] != 0).all(),
              f"gradients must flow through old {name}: training reads a prompt into the cache")
        claim(torch.equal(stored[0], x),
              f"what `update` returns must be what stands in cache.{name}")
    chosen = policy_module.cache_of_rows(cache, torch.tensor([1, 1]))
    claim(torch.equal(chosen.keys[0], keys[[1, 1]])
          and torch.equal(chosen.values[0], values[[1, 1]]),
          "the cache of rows 1 and 1 must hold these rows of keys and values")


def attention_by_loops(attention, x, positions, inv_freq, bug=None):
    """One row (T, D), plain causal attention, a query and a head at a time."""
    d = attention.head_dim
    q, k, v = (projection(x).unflatten(-1, (-1, d))
               for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    angles = (positions[:, None] * inv_freq)[:, None]                           # (T, 1, d / 2)

    def turned(y):
        a, b = y[..., :d // 2], y[..., d // 2:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()],
                         -1)

    if bug != "no rotary positions":
        q, k = turned(q), turned(k)
    v = turned(v) if bug == "values rotated, too" else v
    T, heads, kv_heads = len(x), q.shape[1], k.shape[1]
    mixed = torch.zeros_like(q)
    for t in range(T):
        for h in range(heads):
            g = h // (heads // kv_heads)
            if bug == "head h with key head h modulo kv_heads, not h // group":
                g = h % kv_heads
            seen = slice(0, T if bug == "no causality: keys of the future are read" else t + 1)
            scale = 1 if bug == "scores not divided by sqrt(head_dim)" else d ** -0.5
            mixed[t, h] = (k[seen, g] @ q[t, h] * scale).softmax(0) @ v[seen, g]
    mixed = mixed.flatten(1)
    return mixed if bug == "the output projection forgotten" else attention.o_proj(mixed)


ATTENTION_BUGS = ["no rotary positions", "values rotated, too",
                  "head h with key head h modulo kv_heads, not h // group",
                  "no causality: keys of the future are read",
                  "scores not divided by sqrt(head_dim)", "the output projection forgotten"]


@core("Attention.forward")
@pytest.mark.parametrize("pieces", [(6,), (3, 1, 2), (5, 1)],
                         ids=["whole", "cache, three pieces", "cache, one token"])
def test_attention_by_loops(pieces):
    """6 tokens, 4 heads over 2 key heads, in float64; read at once, and piece by piece with a
    cache."""
    config = LlamaConfig(**SIZES)
    policy = policy_module.Policy(config).double()
    attention, inv_freq = policy.model.layers[0].self_attn, policy.inv_freq.double()
    x = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, weight in enumerate(attention.parameters()):
        torch.nn.init.normal_(weight, std=.4, generator=torch.Generator().manual_seed(i))
    cache, parts, S = policy_module.KVCache() if len(pieces) > 1 else None, [], 0
    with torch.no_grad():
        for T in pieces:
            angles = torch.arange(S, S + T)[:, None, None] * inv_freq
            S += T
            attend = None if T in (1, S) else (torch.ones(1, 1, T, S).tril(S - T) > 0)
            out = attention(x[None, S - T:S], (angles.cos(), angles.sin()), attend, 0, cache)
            claim(out.shape == (1, T, 32),
                  f"attention of (1, {T}, 32) must have that shape, and has {tuple(out.shape)}")
            parts.append(out[0])
        made = lambda bug=None: attention_by_loops(attention, x, torch.arange(6), inv_freq, bug)
        check(f"attention over 6 tokens read as {pieces}, token by token", torch.cat(parts), made(),
              bugs=lambda: {bug: made(bug) for bug in ATTENTION_BUGS})


def test_cached_decode_without_padding():
    """No mask at all: positions of new tokens go on where the cache ends."""
    _, ours = pair(CONFIGS["llama"])
    tokens, _ = ragged()
    with torch.no_grad():
        whole, cache = ours(tokens), policy_module.KVCache()
        parts = torch.cat([ours(tokens[:, start:end], None, cache) for start,
                           end in ((0, 3), (3, 4), (4, 8), (8, 11))], 1)
    check("hidden states, read in four pieces", parts, whole, 1e-4, 1e-4)
