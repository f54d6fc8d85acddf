"""How y is drawn: the sampler against a full forward pass, one row at a time.

Bugs killed here: cache shifted by one, left padding read or counted as positions, another row's
prompt, rows mixed up when finished ones leave, temperature missing from the recorded
log-probability, stop token outside the mask, a zero-probability token drawn, draws that depend on
who is still alive, an end-of-answer token taken for padding, a prompt that begins twice, tokens
that the verifier does not see, a prompt that changes overnight.
"""
import types

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (LlamaConfig, MinistralConfig, MistralConfig, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen3Config)

import policy as policy_module
import sample as sampling
from rewards import Countdown, countdown_reward
from sample import chat, draw, encode, sample, texts_of
from test_losses import check, claim

core, care = pytest.mark.core, pytest.mark.care       # with the function that a test grades

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=1)
OTHER = dict(SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
             rope_parameters=dict(
                 rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0,
                 high_freq_factor=4.0, original_max_position_embeddings=32))
FAMILIES = {"llama": lambda V: LlamaConfig(vocab_size=V, **SIZES),
            "qwen2": lambda V: Qwen2Config(vocab_size=V, **SIZES),
            "qwen3": lambda V: Qwen3Config(vocab_size=V, head_dim=16, **SIZES),
            "mistral": lambda V: MistralConfig(vocab_size=V, sliding_window=4, **SIZES),
            "mistral, which no prompt fills":
                lambda V: MistralConfig(vocab_size=V, sliding_window=18, **SIZES),
            "ministral": lambda V: MinistralConfig(
                vocab_size=V, head_dim=8, sliding_window=5, **SIZES,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
            "llama with biases, a head of its own, stretched positions":
                lambda V: LlamaConfig(vocab_size=V, **OTHER)}
PROMPTS = ["4 7 2 9,24=", "1,2=", "3 9 9,7="]


def build(family="llama", seed=0, device="cpu"):
    _, tokenizer = policy_module.tiny(width=16, layers=1, heads=1, kv_heads=1, inner=16)
    policy = policy_module.Policy(FAMILIES[family](len(tokenizer)))
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    policy.stop_ids = [1, 4, 9, 14]                    # several, so that answers differ in length
    return policy.to(device), tokenizer


def prompt_of(rollout, row):
    """The tokens of a row's prompt, without its padding."""
    return rollout.tokens[row, :rollout.prompt_mask.shape[1]][rollout.prompt_mask[row]]


def drawn(policy, tokenizer, prompts=PROMPTS, G=4, new=14, temperature=1.0, seed=0):
    return sample(policy, tokenizer, prompts, G, new, temperature,
                  torch.Generator(policy.device).manual_seed(seed))


@core("sample")
@pytest.mark.parametrize("sharing", [(), ("cpu", "cuda")], ids=["apart", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recorded_log_probabilities_are_those_of_a_full_forward(family, temperature, sharing,
                                                                device, monkeypatch):
    """Cached decoding from one shared prefill, in a left-padded batch, against each row alone and
    whole; both decode loops. On a GPU the one with a row for each answer runs CUDA graphs, except
    for windows."""
    monkeypatch.setattr(sampling, "SHARING", sharing)
    policy, tokenizer = build(family, device=device)
    with torch.no_grad():
        rollout = drawn(policy, tokenizer, temperature=temperature)
        assert len(set(rollout.mask.sum(1).tolist())) > 2, "the batch must be ragged"
        for row in range(len(rollout.texts)):
            prompt, n = prompt_of(rollout, row), int(rollout.mask[row].sum())
            tokens = torch.cat([prompt, rollout.response[row, :n]])
            scores = policy(tokens[None])[0] @ policy.head.T / temperature
            at_answer = scores.log_softmax(-1)[len(prompt) - 1:-1]
            right = at_answer.gather(1, tokens[len(prompt):, None])[:, 0]
            error = (rollout.logp[row, :n] - right).abs().max()
            assert error < (1e-5 if device == "cpu" else 1e-4), (
                f"{family}, row {row}: the sampler's log-probabilities are off by {error:.1e} from "
                "those of the answer read alone, without cache and padding: does every forward get "
                "the prompt's mask, and every token its position?")


@core("sample")
@pytest.mark.parametrize("family", FAMILIES)
def test_other_prompts_in_the_batch_change_nothing(family):
    """As good as greedy, so that text can be compared: a prompt alone, and padded on the left to
    the width of longer ones."""
    policy, tokenizer = build(family)
    together = drawn(policy, tokenizer, G=1, temperature=1e-6)
    for row, prompt in enumerate(PROMPTS):
        alone = drawn(policy, tokenizer, [prompt], G=1, temperature=1e-6)
        assert alone.texts == [together.texts[row]], (
            f"{family}: the answer to {prompt!r} depends on its neighbours")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_scored_is_what_was_sampled(temperature, device, monkeypatch):
    """`score` against the sampler's own record, in fp32 and with activations in bf16."""
    policy, tokenizer = build("qwen3", device=device)
    for dtype, most in ((torch.float32, 1e-5 if device == "cpu" else 1e-4), (torch.bfloat16, 0.3)):
        policy.dtype = dtype
        rollout = drawn(policy, tokenizer, temperature=temperature)
        with torch.no_grad():
            logp, entropy = policy_module.score(policy, rollout, torch.arange(12, device=device), 4,
                                                temperature)
        error = (logp - rollout.logp).abs()
        assert logp.dtype == torch.float32 and (logp[~rollout.mask]
                                                == 0).all() and (entropy[rollout.mask] > 0).all()
        assert error.max() < most and error[rollout.mask].mean() < most / 10, (
            f"{dtype}: off by {error.max():.1e}")


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_dropping_finished_rows_changes_no_token(monkeypatch, family, device):
    policy, tokenizer = build(family, device=device)
    monkeypatch.setattr(sampling, "SHARING", (device,))
    kept = {"sharing": drawn(policy, tokenizer)}
    monkeypatch.setattr(sampling, "SHARING", ())       # as on a GPU
    for every in (1, 3, 1000):
        monkeypatch.setattr(sampling, "LOOK_EVERY", every)
        kept[every] = drawn(policy, tokenizer)
    assert (kept[1].mask.sum(1) < 5).sum() > 2, "some rows must end early"
    assert torch.equal(kept["sharing"].response, kept[1000].response), (
        "sharing rows changed a token")
    close = 1e-5 if device == "cpu" else 1e-4
    assert torch.allclose(kept["sharing"].logp, kept[1000].logp, atol=close)
    for every in (1, 3):
        assert torch.equal(kept[every].response, kept[1000].response), (
            f"looking every {every} steps changed a token")
        assert torch.allclose(kept[every].logp, kept[1000].logp, atol=close)


# ------ the decode loop of a GPU: when a graph is captured, when rows are dropped, how far it reads

class Script:
    """A Stepper whose answers are written out beforehand, (B, T): it says the next token of each
    row, and notes what decode_apart asks of it."""

    def __init__(self, written, P):
        self.written, self.P, self.slot, self.windows = written, P, torch.tensor([P]), [None]
        self.prompt_of, self.rows, self.noted = None, None, []

    def keep(self, rows):
        if self.rows is None:
            self.prompt_of, self.rows = rows, torch.arange(len(rows))
        else:
            self.rows = self.rows[rows]

    def step(self, token, span):
        read = int(self.slot) - self.P                 # tokens read before this one
        assert torch.equal(token, self.written[self.rows, read]), (
            "every row reads its own newest token")
        self.noted.append((len(self.rows), span))
        self.slot.add_(1)
        return self.written[self.rows, read + 1]

    def logits(self, hidden, temperature):
        return 1e4 * torch.nn.functional.one_hot(hidden, 10).float()


def decoded(monkeypatch, lengths, room, P=8, graphed=True):
    """decode_apart on answers of these lengths, token 0 last -> what was noted: (rows, slots read)
    a step."""
    monkeypatch.setattr(sampling, "LOOK_EVERY", 4)
    monkeypatch.setattr(sampling, "SPAN", 8)
    written = torch.randint(1, 10, (len(lengths), room), generator=torch.Generator().manual_seed(0))
    for row, n in enumerate(lengths):
        written[row, n - 1:] = 0
    script = Script(written, P)
    answers = sampling.Answers(len(lengths), room, [0], torch.Generator().manual_seed(0), "cpu")

    def held():
        return answers.rows, answers.newest, script.rows

    def run_only(step, state):
        """In place of `capture`: a trial run whose traces in `state` are wiped out, then the step
        itself; as a graph does, it insists on the tensors that it was captured with."""
        before, memory = [x.clone() for x in state], held()
        step()
        for x, value in zip(state, before):
            x.copy_(value)
        script.noted[-1] = "captured"

        def replay():
            assert all(a is b for a, b in zip(memory, held())), (
                "a graph must be captured again for other tensors")
            step()
        return replay

    monkeypatch.setattr(sampling, "capture", run_only)
    monkeypatch.setattr(sampling, "can_be_captured", lambda stepper: graphed and stepper is script)
    answers.extend(script.logits(written[:, 0], 1.0))
    prompt_of = torch.arange(2).repeat_interleave(len(lengths) // 2)
    sampling.decode_apart(script, answers, prompt_of, 1.0, P)
    assert torch.equal(script.prompt_of, prompt_of)
    assert answers.length.tolist() == lengths
    for row, n in enumerate(lengths):
        assert torch.equal(answers.tokens[row, :n], written[row, :n]), (
            f"row {row} says something else")
    return script.noted


# Looked at before step 4 (8 of 10 rows go on: not worth a copy), 8 (7 of 10: it is), 12 (6 of 7),
# 16 (3 of 7), 20 (3 of 3), 24 (1 of 3) and 28 (none). Step t reads 8 + t slots; a graph reads the
# next multiple of 8.
LENGTHS = [21, 4, 13, 3, 22, 8, 10, 16, 26, 14]


def test_graphs_are_captured_for_fewer_rows_and_more_slots(monkeypatch):
    graph = "captured"
    assert decoded(monkeypatch, LENGTHS, 40) == [
        graph, *[(10, 16)] * 7, graph, (7, 16), graph, *[(7, 24)] * 7, graph, (3, 24), graph,
        *[(3, 32)] * 7,
        graph, (1, 32), graph, *[(1, 40)] * 3]


def test_without_graphs_the_slots_read_are_those_written(monkeypatch):
    assert decoded(monkeypatch, LENGTHS, 40, graphed=False) == [
        *[(10, 8 + t) for t in range(1, 8)], *[(7, 8 + t) for t in range(8, 16)],
        *[(3, 8 + t) for t in range(16, 24)],
        *[(1, 8 + t) for t in range(24, 28)]]


@pytest.mark.parametrize("B, going, after", [(10, 8, 10), (10, 7, 7), (14, 11, 11), (16, 13, 16)])
def test_rows_are_dropped_when_fewer_than_four_in_five_go_on(monkeypatch, B, going, after):
    noted = decoded(monkeypatch, [5] * going + [2] * (B - going), 5, graphed=False)
    assert noted == [(B, 9), (B, 10), (B, 11), (after, 12)]


@pytest.mark.parametrize("graphed", [True, False])
def test_decoding_ends_with_the_room(monkeypatch, graphed):
    noted = decoded(monkeypatch, [6, 6], 6, P=3, graphed=graphed)
    assert noted == (["captured", *[(2, 8)] * 5] if graphed
                     else [(2, 4), (2, 5), (2, 6), (2, 7), (2, 8)])
    assert decoded(monkeypatch, [1, 1], 1, graphed=graphed) == []


def test_what_can_be_captured():
    for cuda, windows, right in ((True, [None, None], True), (True, [None, 4], False),
                                 (False, [None], False)):
        stepper = types.SimpleNamespace(slot=types.SimpleNamespace(is_cuda=cuda), windows=windows)
        assert sampling.can_be_captured(stepper) == right


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_slots_beyond_those_written_change_nothing(monkeypatch, family, device):
    """A graph reads ahead, into slots that hold nothing yet, and up to the end of the cache. On a
    GPU it is a real one."""
    policy, tokenizer = build(family, device=device)
    monkeypatch.setattr(sampling, "SHARING", ())
    monkeypatch.setattr(sampling, "can_be_captured", lambda stepper: False)
    plain = drawn(policy, tokenizer)
    monkeypatch.setattr(sampling, "can_be_captured", lambda stepper: True)
    if device == "cpu":
        monkeypatch.setattr(sampling, "capture", lambda step, state: step)
    for span in (5, 16, 256):
        monkeypatch.setattr(sampling, "SPAN", span)
        ahead = drawn(policy, tokenizer)
        assert torch.equal(ahead.response, plain.response), (
            f"reading up to multiples of {span} changed a token")
        assert torch.allclose(ahead.logp, plain.logp, atol=1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_was_said_alike_is_read_once(monkeypatch, family):
    """The model reads as many rows as there are different beginnings among the answers still going,
    and not one more."""
    policy, tokenizer = build(family)
    step, rows = sampling.Stepper.step, []
    monkeypatch.setattr(sampling.Stepper, "step", lambda self, token,
                        span: rows.append(len(token)) or step(self, token, span))
    rollout = drawn(policy, tokenizer, G=32, temperature=0.5)
    length = rollout.mask.sum(1).tolist()
    read = [len({(row // 32, *rollout.response[row, :t].tolist()) for row in range(96)
                 if length[row] > t})
            for t in range(1, max(length))]
    assert rows == read, f"rows read by step {rows}, different beginnings {read}"
    assert rows[0] < 60, "the batch must hold beginnings in common"


@core("sample")
def test_mask_ends_with_the_first_stop_token():
    policy, tokenizer = build()
    rollout = drawn(policy, tokenizer, G=8)
    for row, ids in enumerate(rollout.response.tolist()):
        n, stops = int(rollout.mask[row].sum()), [t for t, token in enumerate(ids)
                                                  if token in policy.stop_ids]
        assert rollout.mask[row].tolist() == [t < n for t in range(len(ids))], (
            "the mask is 1 up to some length, then 0")
        if rollout.finished[row]:
            assert n == stops[0] + 1, (
                f"row {row}: the stop token must be inside mask, position {stops[0]}")
        else:
            assert n == 14 and ids[-1] not in policy.stop_ids, (
                f"row {row}: a cut answer fills the budget")
        assert (rollout.logp[row, n:] == 0).all() and (rollout.logp[row, :n] < 0).all()
    assert torch.equal(rollout.tokens[:, rollout.prompt_mask.shape[1]:], rollout.response)
    assert 0 < rollout.finished.sum() < len(rollout.finished), "the batch must hold both kinds"


@core("sample")
def test_an_answer_that_stops_at_once_has_one_token():
    policy, tokenizer = build()
    policy.stop_ids = list(range(policy.config.vocab_size))
    rollout = drawn(policy, tokenizer)
    assert rollout.mask.shape == (12, 1) and rollout.mask.all() and rollout.finished.all()
    assert rollout.texts == [""] * 12, "the stop token is not part of the text"


@care("sample")
def test_no_sampled_token_is_hidden_from_the_verifier():
    """Smoothing pays for unlikely tokens: were special ones left out of the text, a right answer
    could be padded with them."""
    policy, tokenizer = policy_module.tiny()
    names = tokenizer.convert_ids_to_tokens(range(policy.config.vocab_size))
    rollout = drawn(policy, tokenizer, ["4 7 2 9,24="], G=64)
    assert any(name in text for text in rollout.texts for name in ("<unk>", "<pad>")), (
        "the batch must hold some")
    for row, text in enumerate(rollout.texts):
        n = int(rollout.mask[row].sum()) - int(rollout.finished[row])
        assert text == "".join(names[token] for token in rollout.response[row, :n].tolist()), (
            f"row {row}")
    assert countdown_reward("2*(9+7-4)", [4, 7, 2, 9], 24) == 1
    assert countdown_reward("2*(9+7-4)<pad>", [4, 7, 2, 9], 24) == 0


@pytest.mark.parametrize("characters", [policy_module.CHARACTERS, "0123456789()=, "])
def test_an_id_without_a_name_is_written_as_its_number(characters):
    """A model with more ids than its tokenizer (Qwen2.5: 271 more), at the end and in a hole, whose
    decoder leaves them out."""
    policy, tokenizer = policy_module.tiny(characters=characters)
    # the last names move up: a hole of four ids, 15 to 18
    if len(characters) < 19:
        tokenizer.backend_tokenizer.model = models.WordLevel(
            {name: i if i < 15 else i + 4 for name, i in tokenizer.get_vocab().items()},
            unk_token="<unk>")
    policy.model.embed_tokens = torch.nn.Embedding(30, 128)
    torch.nn.init.normal_(policy.model.embed_tokens.weight, std=0.05,
                          generator=torch.Generator().manual_seed(0))
    known = {i: name for name, i in tokenizer.get_vocab().items()}
    rollout = drawn(policy, tokenizer, ["1,2="], G=64)
    unnamed = [i for i in rollout.response[rollout.mask].tolist() if i not in known]
    assert {22, 29} <= set(unnamed) and (len(characters) == 19 or {15, 18} <= set(unnamed)), (
        "the batch must hold some")
    for row, text in enumerate(rollout.texts):
        n = int(rollout.mask[row].sum()) - int(rollout.finished[row])
        assert text == "".join(known.get(i, f"<|{i}|>")
                               for i in rollout.response[row, :n].tolist()), f"row {row}"


def test_blanks_before_a_full_stop_are_shown():
    """Some tokenizer configs ask for a clean-up that takes them out."""
    _, tokenizer = policy_module.tiny(characters=" .1")
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(tokenizer("1 .").input_ids) == "1.", "this tokenizer cleans up"
    assert texts_of(tokenizer, [tokenizer("1 .").input_ids, []]) == ["1 .", ""]


@care("sample")
def test_without_a_stop_token_every_answer_is_cut():
    policy, tokenizer = build()
    policy.stop_ids = []
    for new in (1, 9):
        rollout = drawn(policy, tokenizer, new=new)
        assert rollout.mask.shape == (12, new) and rollout.mask.all() and not rollout.finished.any()


@care("sample")
def test_seeds_and_rows():
    policy, tokenizer = build()
    one, same, other = (drawn(policy, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert one.texts == same.texts and torch.equal(one.logp, same.logp), "same seed, same text"
    assert one.texts != other.texts, "another seed, other text"
    assert len(set(one.texts[:4])) > 1, "rows of a group must differ"


def test_without_a_generator_torchs_own_seed_decides():
    policy, tokenizer = build()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(sample(policy, tokenizer, PROMPTS, 4, 14).texts)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sharing", [(), ("cpu", "cuda")], ids=["apart", "shared"])
def test_a_batch_in_pieces_draws_what_the_whole_draws(sharing, device, monkeypatch):
    """So memory knobs change no answer: pieces of some prompts, and pieces of one group."""
    monkeypatch.setattr(sampling, "SHARING", sharing)
    policy, tokenizer = build(device=device)
    whole = sample(policy, tokenizer, PROMPTS, 6, 14, 1.0, torch.Generator().manual_seed(0)).texts
    for pieces in ([(PROMPTS[:2], 6), (PROMPTS[2:], 6)],
                   [([prompt], G) for prompt in PROMPTS for G in (4, 2)]):
        generator = torch.Generator().manual_seed(0)
        texts = [text for prompts, G in pieces
                 for text in sample(policy, tokenizer, prompts, G, 14, 1.0, generator).texts]
        assert texts == whole, f"pieces of {[len(prompts) * G for prompts, G in pieces]} rows"


def test_rows_change_no_evaluation():
    from eval import evaluate
    policy, tokenizer = build()
    task = Countdown()
    problems, records = task.held_out_problems(5), []
    # all at once; two problems; one; one in pieces of 3, 3 and 2
    for rows in (64, 16, 8, 3):
        records.append(evaluate(policy, tokenizer, task, problems, 8, 12, rows=rows))
    for other in records[1:]:
        for a, b in zip(records[0], other):
            assert a["nats"] == pytest.approx(b["nats"], rel=1e-5)
            assert (a["c"], a["tokens"]) == (b["c"], b["tokens"])


def test_shared_prefill_is_separate_prefill():
    """A group of 4 from one prompt draws what four copies of the prompt draw, given the same
    uniforms."""
    policy, tokenizer = build()
    shared, separate = drawn(policy, tokenizer, PROMPTS,
                             4), drawn(policy, tokenizer, [p for p in PROMPTS for _ in range(4)], 1)
    assert torch.equal(shared.response,
                       separate.response) and torch.allclose(shared.logp, separate.logp, atol=1e-5)


@core("sample")
def test_draws_follow_the_softmax():
    """20,000 draws of one token against its probabilities: chi-square with 21 degrees stays below
    47 (p = .001)."""
    policy, tokenizer = build()
    rollout = drawn(policy, tokenizer, ["4 7 2 9,24="], 20000, 1, temperature=1.5)
    with torch.no_grad():
        last = policy(torch.tensor([tokenizer("4 7 2 9,24=").input_ids]))[0, -1]
        p = (last @ policy.head.T / 1.5).softmax(-1)
    counts = torch.bincount(rollout.response[:, 0], minlength=len(p))
    chi_square = ((counts - 20000 * p) ** 2 / (20000 * p)).sum().item()
    assert chi_square < 47, f"the draws do not follow the softmax: chi-square {chi_square:.1f}"


def test_draw_never_picks_an_impossible_token():
    probs = torch.tensor([[0., .3, 0., .7, 0.]]).repeat(4, 1)
    picked = draw(probs, torch.tensor([0., .2999, .3001, 1 - 2 ** -24])).tolist()
    assert picked == [1, 1, 3, 3], picked
    # most probabilities underflow to 0
    logits = 40 * torch.randn(512, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, 2990:] = -1e4
    for u in (0.0, 1e-7, 0.5, 1 - 2 ** -24):
        p = logits.softmax(-1).gather(1, draw(logits.softmax(-1), torch.full((512,), u))[:, None])
        assert (p > 0).all(), (
            f"u = {u}: an impossible token was drawn in {(p == 0).sum()} rows of 512")


@care("sample")
def test_a_prompt_that_does_not_fit_is_refused():
    policy, tokenizer = build()
    longest = max(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    room = policy.config.max_position_embeddings - longest
    drawn(policy, tokenizer, new=room)                 # to the last position
    with pytest.raises(ValueError):                    # in which words: test_survival.py
        drawn(policy, tokenizer, new=room + 1)


# ------------------------------------------------------------------------ from strings to token ids

def two_words(template=None, begin=False):
    """A tokenizer that knows the end of an answer, which is also its padding, and "a"; with
    `begin`, a first token too."""
    vocab = {"<eos>": 0, "a": 1} | ({"<bos>": 2} if begin else {})
    words = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if begin:
        words.post_processor = processors.TemplateProcessing(single="<bos> $A",
                                                             special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>",
                                        pad_token="<eos>",
                                        **({"bos_token": "<bos>"} if begin else {}))
    tokenizer.chat_template = template
    return tokenizer


@care("sample")
def test_two_words_and_prompts_of_one_token():
    """The smallest vocabulary; padding and the end of an answer are one token, told apart by
    position."""
    policy = policy_module.Policy(LlamaConfig(vocab_size=2, **SIZES | {"eos_token_id": 0}))
    tokenizer = two_words()
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    rollout = drawn(policy, tokenizer, ["a", "aaa"], G=32, temperature=3.0)
    assert rollout.prompt_mask.sum(1).tolist() == [1] * 32 + [3] * 32
    assert len(set(rollout.mask.sum(1).tolist())) > 2 and rollout.finished.any()
    for row, text in enumerate(rollout.texts):
        n = int(rollout.mask[row].sum())
        assert text.replace(" ", "") == "a" * (n - int(rollout.finished[row])), (
            "mask and text disagree about the answer's end")
        ids = torch.cat([rollout.tokens[row, :3][rollout.prompt_mask[row]],
                         rollout.response[row, :n]])
        with torch.no_grad():
            all_logp = (policy(ids[None])[0] @ policy.head.T / 3).log_softmax(-1)
        right = all_logp[-n - 1:-1].gather(1, ids[-n:, None])[:, 0]
        assert torch.allclose(rollout.logp[row, :n], right, atol=1e-5), (
            f"row {row}: the end token was read as padding")


SYSTEM_AND_USER = ("{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
                   "{% if add_generation_prompt %}>{% endif %}")
USER_ONLY = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
             "{% endif %}" + SYSTEM_AND_USER)


def test_chat_wraps_the_prompt_as_the_tokenizer_wants_it():
    assert chat(two_words(SYSTEM_AND_USER), "S", "U", "think") == "[system: S][user: U]>"
    assert chat(two_words(USER_ONLY), "S", "U", "think") == "[user: S\n\nU]>", (
        "what the system would say, the user says")
    assert chat(two_words(), "S", "U", "think") == "U", "without a template the text stays as it is"
    assert chat(two_words(SYSTEM_AND_USER), "S", "U", "bare") == "U", "bare means bare"


def test_a_prompt_begins_once():
    """Templates write the beginning-of-sequence token themselves; plain text gets it from the
    tokenizer."""
    for template, text in ((None, "aa"), ("<bos>{{ messages[-1].content }}", "aa")):
        tokenizer = two_words(template, begin=True)
        ids, mask = encode(tokenizer, [chat(tokenizer, "", text, "ask"),
                                       chat(tokenizer, "", "a", "ask")], "cpu")
        assert ids[0].tolist() == [2, 1, 1] and ids[1, mask[1]].tolist() == [2, 1], (
            f"with template {template}: {ids.tolist()}")


@pytest.mark.parametrize("name, template, post, bos", [
    ("opens with a newline", "\n<bos>{turns}", "<bos> $A", "<bos>"),
    ("has a first token, the config none", "<bos>{turns}", "<bos> $A", None),
    ("has no first token", "{turns}", "<bos> $A", "<bos>"),
    ("has no last token", "{turns}", "$A <eos>", None)])
def test_chat_prompts_are_the_ids_that_the_template_gives(name, template, post, bos):
    """Nothing is added to what a template wrote: no second first token, no end of an answer before
    it begins."""
    turns = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    tokenizer = two_words(template.replace("{turns}", turns), begin=True)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=post, special_tokens=[("<bos>", 2), ("<eos>", 0)])
    ids, mask = encode(tokenizer, [chat(tokenizer, "a", "aa", "think")], "cpu")
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "aa"}]
    right = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids[0].tolist() == right and mask.all(), f"a template that {name}"
    assert encode(tokenizer, ["aa"], "cpu")[0].tolist() == [tokenizer("aa").input_ids], (
        "plain text gets what the tokenizer adds")


def test_a_template_that_writes_the_date_asks_the_same_tomorrow():
    date = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}"
    tokenizer = two_words(date + SYSTEM_AND_USER)
    assert chat(tokenizer, "S", "U", "think") == "26 Jul 2024\n[system: S][user: U]>"


def test_a_template_that_fails_is_told_in_one_sentence():
    with pytest.raises(ValueError,
                       match=r"the tokenizer's chat template fails \(TemplateError: no way\)\."):
        chat(two_words("{{ raise_exception('no way') }}"), "S", "U", "think")


# ----------------------- for those who write the sampler themselves: failures that know the mistake

@core("sample")
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_what_is_recorded_is_named(temperature):
    """Each sampled token's log-probability at the sampling temperature, against one full forward
    pass a row."""
    policy, tokenizer = build()
    with torch.no_grad():
        rollout, made = drawn(policy, tokenizer, temperature=temperature), []
        claim(isinstance(rollout, sampling.Rollout),
              f"sample must return a Rollout, not {type(rollout).__name__}")
        claim(rollout.logp.shape == rollout.mask.shape == rollout.response.shape,
              "logp, mask and response must all be (B, T)")
        for row in range(12):
            prompt, n = prompt_of(rollout, row), int(rollout.mask[row].sum())
            ids = torch.cat([prompt, rollout.response[row, :n]])
            z = policy(ids[None])[0] @ policy.head.T
            at = slice(len(prompt) - 1, len(ids) - 1)
            pick = lambda x: x.gather(1, ids[len(prompt):, None])[:, 0]
            right, plain = pick((z / temperature).log_softmax(-1)[at]), pick(z.log_softmax(-1)[at])
            late = pick((z / temperature).log_softmax(-1)[len(prompt):])
            top = (z / temperature).log_softmax(-1)[at].amax(1)
            made.append((right, plain, plain / temperature, right.exp(), late, top))
    right, plain, divided, p, late, top = map(torch.cat, zip(*made))
    check(f"recorded log-probabilities at temperature {temperature}", rollout.logp[rollout.mask],
          right, 1e-4, 1e-4, bugs={
        "the temperature missing": plain,
        "log-probabilities divided by the temperature, not logits": divided,
        "probabilities, not their logarithms": p,
        "the distribution of the NEXT position: off by one": late,
        "the likeliest token's, not the sampled one's": top})


@core("sample")
def test_where_an_answer_ends_is_named():
    policy, tokenizer = build()
    rollout = drawn(policy, tokenizer, G=8)
    for row, ids in enumerate(rollout.response.tolist()):
        n = int(rollout.mask[row].sum())
        stops = [t for t, token in enumerate(ids) if token in policy.stop_ids]
        claim(stops or not rollout.finished[row],
              f"row {row} is finished, but no stop token is left in its response. This is what "
              "you get with: the stop token left out of the mask.")
        end = stops[0] + 1 if stops else 14
        bug = {end - 1: "the stop token left out of the mask",
               len(ids): "a mask that goes on after the stop token",
               (stops + [0])[-1] + 1: "an end at the last stop token, not the first"}.get(n)
        claim(n == end,
              f"row {row}: the first stop token is at position {stops[:1] or 'none'}, so the mask "
              f"must hold {end} ones, and holds {n}."
              + (f" This is what you get with: {bug}." if bug else ""))
        claim(bool(rollout.finished[row]) == bool(stops),
              f"row {row}: finished is True where a stop token ended the answer, False where "
              "max_new_tokens cut it")


@core("sample")
def test_groups_are_neighbours():
    """The G rows of a prompt stand side by side, in the order of the prompts."""
    policy, tokenizer = build()
    rollout = drawn(policy, tokenizer, G=2)
    asked = [tokenizer.decode(ids[:len(keep)][keep]) for ids,
             keep in zip(rollout.tokens, rollout.prompt_mask)]
    right = [prompt for prompt in PROMPTS for _ in range(2)]
    hint = " This is what you get with: groups interleaved." if asked == PROMPTS * 2 else ""
    claim(asked == right, f"rows must ask {right}, and ask {asked}.{hint}")
    claim(len(rollout.texts) == 6, f"one text a row: 6, not {len(rollout.texts)}")


@care("sample")
def test_what_is_off_the_mask():
    policy, tokenizer = build()
    rollout = drawn(policy, tokenizer, G=8)
    claim((rollout.logp[~rollout.mask] == 0).all(), "logp must be 0 off the mask")
    claim((rollout.response[~rollout.mask] == tokenizer.pad_token_id).all(),
          "response must hold padding off the mask")
    claim(torch.equal(rollout.tokens[:, rollout.prompt_mask.shape[1]:], rollout.response),
          "response must be the tail of tokens")
    claim(rollout.logp.dtype == torch.float32 and rollout.mask.dtype == torch.bool,
          "logp is fp32, mask bool")
    claim(not rollout.logp.requires_grad, "sampling needs no gradient: torch.no_grad()")
    claim(rollout.mask.shape[1] == rollout.mask.sum(1).max(),
          "T is the length of the longest answer, not the budget")


def test_rollouts_are_joined_and_rows_taken():
    """Prompts of other widths are padded on the left, answers on the right; a row keeps all that
    belongs to it."""
    policy, tokenizer = build()
    parts = [drawn(policy, tokenizer, [prompt], G=3, seed=i) for i, prompt in enumerate(PROMPTS)]
    whole = sampling.join(parts, tokenizer.pad_token_id)
    rows = torch.tensor([7, 2, 2, 5])
    for rollout, wanted in ((whole, range(9)), (sampling.take(whole, rows), rows.tolist())):
        for row, source in enumerate(wanted):
            part, i = parts[source // 3], source % 3
            p, n = part.prompt_mask.shape[1], int(part.mask[i].sum())
            prompt, answer = prompt_of(rollout, row), rollout.response[row][rollout.mask[row]]
            claim(torch.equal(prompt, part.tokens[i, :p][part.prompt_mask[i]]),
                  f"row {row}: another prompt, or its padding is on the right")
            claim(torch.equal(answer, part.response[i, :n]) and rollout.texts[row] == part.texts[i],
                  f"row {row}: another answer")
            claim(torch.equal(rollout.logp[row][rollout.mask[row]], part.logp[i, :n]),
                  f"row {row}: other log-probabilities")
            claim(rollout.prompt_mask[row, -1],
                  "a prompt ends where its answer begins: padding goes to the left")
