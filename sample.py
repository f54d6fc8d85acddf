"""How y is drawn: batched sampling with a key-value cache.

    rollout = sample(policy, tokenizer, ["4 7 2 9,24="], group_size=4, max_new_tokens=24)
    rollout.texts[0]          # '2*(9+7-4)' from a trained policy, anything from a fresh one

Each prompt is read once, and the G answers of its group start from its keys and values. Then every
answer grows by one token at a time, drawn from the full softmax at `temperature`: no top-k, no
top-p, no penalty, because training scores the answers under the full softmax, too.

On a CPU, answers to a prompt with a common prefix share one row until they diverge. On a GPU every
answer has a row of its own, so that a step has fixed shapes and can be captured as a CUDA graph.

Letters: B rows = prompts x G, the rows of one prompt contiguous; P prompt length; T response
length; V vocabulary; D width; S slots of the cache.
"""
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from policy import KVCache, UserError, head_dim, logits_of, operands, product


@dataclass
class Rollout:
    """What was sampled. Where an answer ends is told by `mask`, never by token ids. `logp` serves
    evaluation (its nats) and tests; training scores the answers anew, with gradient: policy.score.
    """
    tokens: torch.Tensor       # (B, P+T) int64: prompt, padded left, then response, padded right
    prompt_mask: torch.Tensor  # (B, P) bool, False on the prompt's padding
    response: torch.Tensor     # (B, T) int64, the tail of `tokens`
    mask: torch.Tensor         # (B, T) bool, True up to and including the first stop token
    logp: torch.Tensor         # (B, T) fp32 of the drawn tokens, at `temperature`; 0 off the mask
    texts: list                # B strings, without the stop token; other special tokens are shown
    finished: torch.Tensor     # (B,) bool, False where max_new_tokens cut the answer


@torch.no_grad()
def sample(policy, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, generator=None):
    """Draw `group_size` answers to each of `prompts` (strings ready to tokenise) -> Rollout.

    T is trimmed to the longest answer. generator: a torch.Generator, whose state alone decides the
    draws. One on the CPU draws the same on every device, and for a batch in pieces what it draws
    for the whole; a GPU's does neither.
    UserError for a prompt that does not fit into the model's context together with its answer.
    """
    device, pad = policy.device, tokenizer.pad_token_id
    prompt, prompt_mask = encode(tokenizer, prompts, device)                # (prompts, P) each
    context, P = policy.config.max_position_embeddings, prompt.shape[1]
    if P + max_new_tokens > context:
        raise UserError(f"a prompt of {P} tokens and {max_new_tokens} new ones exceed the model's "
                        f"context of {context}.")

    # Read each prompt once. Prompts of one length need no attention mask at all.
    cache = KVCache()
    mask = None if prompt_mask.all() else prompt_mask
    hidden = policy(prompt, mask, cache)[:, -1]                             # (prompts, D)
    stepper = Stepper(policy, cache, prompt_mask, room=max_new_tokens)

    # The G answers of a group draw their first tokens from its prompt's last hidden state.
    prompt_of = torch.arange(len(prompts), device=device).repeat_interleave(group_size)    # (B,)
    answers = Answers(len(prompt_of), max_new_tokens, policy.stop_ids, generator, device)
    answers.extend(stepper.logits(hidden[prompt_of], temperature))
    decode = decode_shared if device.type in SHARING else decode_apart
    decode(stepper, answers, prompt_of, temperature, P)

    length = answers.length                                                 # (B,)
    T = int(length.max())
    mask = torch.arange(T, device=device) < length[:, None]                 # (B, T)
    response = torch.where(mask, answers.tokens[:, :T], pad)
    finished = torch.isin(response.gather(1, length[:, None] - 1)[:, 0], answers.stop_ids)
    shown = (length - finished.long()).tolist()        # the stop token is not part of the text
    return Rollout(
        tokens=torch.cat([prompt[prompt_of], response], dim=1), prompt_mask=prompt_mask[prompt_of],
        response=response, mask=mask, logp=torch.where(mask, answers.logp[:, :T], 0.0),
        texts=texts_of(tokenizer, [ids[:n] for ids, n in zip(response.tolist(), shown)]),
        finished=finished)


# ------------------------------------------------- a first reading ends here; below: how it is fast

SHARING = ("cpu",)      # devices on which answers with a common prefix share a row
LOOK_EVERY = 8          # elsewhere: after so many tokens the rows that have ended are looked for
SPAN = 256              # a CUDA graph reads the cache up to the next multiple of this


class Answers:
    """The answers so far, of all B rows. Everything is written in place: a CUDA graph holds it."""

    def __init__(self, B, room, stop_ids, generator, device):
        # All chance is here, one uniform per token and row by row, so that what a row says depends
        # neither on which others are still going nor on how a batch is cut into pieces.
        where = generator.device if generator else device
        self.uniform = torch.rand(B, room, generator=generator, device=where).to(device)
        self.tokens = torch.zeros(B, room, dtype=torch.int64, device=device)
        self.logp = torch.zeros(B, room, device=device)
        self.length = torch.full((B,), room, device=device)    # until a stop token says otherwise
        self.count = torch.zeros(1, dtype=torch.int64, device=device)      # tokens drawn so far
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        self.rows = torch.arange(B, device=device)             # those that still grow
        self.newest = torch.zeros_like(self.rows)              # (rows,) the last token of each

    def extend(self, logits):
        """Draw the next token of each growing row from its logits (rows, V), fp32."""
        rows, count = self.rows, self.count
        all_logp = logits.log_softmax(-1)                                   # (rows, V)
        token = draw(all_logp.exp(), self.uniform[rows, count])             # (rows,)
        self.tokens[rows, count] = token
        self.logp[rows, count] = all_logp.gather(1, token[:, None])[:, 0]
        stopped = (token[:, None] == self.stop_ids).any(1)
        ends = torch.where(stopped, count + 1, self.tokens.shape[1])
        self.length[rows] = torch.minimum(self.length[rows], ends)
        self.newest.copy_(token)
        count.add_(1)

    def growing(self):
        """Which of `rows` have no stop token yet, as indices into `rows`."""
        return (self.length[self.rows] > self.count).nonzero()[:, 0]

    def keep(self, growing):
        """Only the rows at these indices into `rows` grow on."""
        self.rows, self.newest = self.rows[growing], self.newest[growing]


def decode_shared(stepper, answers, prompt_of, temperature, P):
    """Until all have ended: answers to a prompt with a common prefix are one row of the stepper."""
    V = len(stepper.head)
    reader = prompt_of                                 # (rows,) the stepper's row of each answer
    for t in range(1, answers.tokens.shape[1]):
        growing = answers.growing()
        if len(growing) == 0:
            break
        answers.keep(growing)
        # Two answers stay together if they had one reader and drew one token: pairs as one integer.
        pairs, reader = torch.unique(reader[growing] * V + answers.newest, return_inverse=True)
        stepper.keep(pairs // V)
        hidden = stepper.step(pairs % V, P + t)        # (different prefixes, D)
        answers.extend(stepper.logits(hidden[reader], temperature))


def decode_apart(stepper, answers, prompt_of, temperature, P):
    """Until all have ended: a row for each answer, so that shapes stay fixed for a CUDA graph."""
    graphed, span = can_be_captured(stepper), 0        # a graph reads `span` slots; 0: none yet
    stepper.keep(prompt_of)

    def step(span):
        answers.extend(stepper.logits(stepper.step(answers.newest, span), temperature))

    for t in range(1, answers.tokens.shape[1]):
        if t % LOOK_EVERY == 0:                        # looking makes the host wait for the GPU
            growing = answers.growing()
            if len(growing) == 0:
                break
            if len(growing) < 0.8 * len(answers.rows):         # fewer rows pay for the copy
                answers.keep(growing)
                stepper.keep(growing)
                span = 0
        if not graphed:
            step(P + t)                                # the prompt, and a slot for each token read
            continue
        if P + t > span:                               # a new graph for fewer rows or more slots;
            span = -(-(P + t) // SPAN) * SPAN          # a slice ends where the cache does
            state = answers.newest, answers.count, stepper.slot
            replay = capture(lambda span=span: step(span), state)
        replay()


def can_be_captured(stepper):
    """Whether a decode step can be a CUDA graph. A window moves on, a captured one would not."""
    return stepper.slot.is_cuda and not any(stepper.windows)


def capture(step, state):
    """`step`, some hundred small kernels on the same tensors each time, as one CUDA graph -> a
    function that runs it. A trial run's traces in `state` are undone; the rest is written anew."""
    before, stream = [x.clone() for x in state], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                    # libraries set themselves up beforehand
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for x, value in zip(state, before):
        x.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def draw(probs, uniform):
    """One index per row, by inverting the distribution function: the first whose cumulated
    probability exceeds u. probs (N, V); uniform (N,) in [0, 1) -> (N,)."""
    cumulated = probs.cumsum(-1)
    target = uniform[:, None] * cumulated[:, -1:]      # in fp32 they do not quite add up to 1
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


class FusedBlock:
    """The weights of a policy's Block in `dtype`, as a Stepper reads them; None for a bias or a
    norm of queries and keys that the model lacks."""

    def __init__(self, block, dtype):
        def stack(*linears, norm=None):
            weight = torch.cat([linear.weight for linear in linears])     # (sum of outputs, inputs)
            weight = weight if norm is None else weight * norm.weight
            biased = linears[0].bias is not None
            bias = torch.cat([linear.bias for linear in linears]).to(dtype) if biased else None
            return weight.to(dtype), bias

        attention, mlp, self.qk_norm = block.self_attn, block.mlp, None
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        gate_up = mlp.gate_proj, mlp.up_proj
        self.qkv, self.qkv_bias = stack(*qkv, norm=block.input_layernorm)
        self.out, self.out_bias = stack(attention.o_proj)
        self.gate_up, self.gate_up_bias = stack(*gate_up, norm=block.post_attention_layernorm)
        self.down, self.down_bias = stack(mlp.down_proj)
        if hasattr(attention, "q_norm"):
            heads, kv_heads = (len(x.weight) // attention.head_dim for x in qkv[:2])
            norms = [attention.q_norm.weight] * heads + [attention.k_norm.weight] * kv_heads
            self.qk_norm = torch.stack(norms).to(dtype)                     # (heads + kv_heads, ..)


class Stepper:
    """`Policy.forward` for one token per row, on plain tensors: where sampling spends its time. The
    same mathematics in fewer operations: q, k and v are one product, gate and up another; a norm's
    weight is folded into the matrix that reads it, a residual is added by the product before it,
    and the query heads that share a key head are the rows of one small product. The weights are
    copies, so a Stepper serves one `sample` call."""

    def __init__(self, policy, cache, mask, room):
        """Rows go on from prompts in `cache`, mask (prompts, P) bool, by `room` tokens at most."""
        config, dtype, device = policy.config, policy.dtype, policy.device
        S = cache.length + room
        self.eps, self.dtype, self.head_dim = config.rms_norm_eps, dtype, head_dim(config)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.windows = [None if w is None or w >= S else w for w in policy.windows]
        self.embedding, self.norm = policy.model.embed_tokens.weight, policy.model.norm
        self.head = policy.head.to(dtype) if device.type == "cuda" else policy.head
        self.layers = [FusedBlock(block, dtype) for block in policy.model.layers]
        # The prompts' keys and values with room for answers: (B kv_heads, S, head_dim) per layer.
        self.keys = [F.pad(k, (0, 0, 0, room)).flatten(0, 1) for k in cache.keys]
        self.values = [F.pad(v, (0, 0, 0, room)).flatten(0, 1) for v in cache.values]
        angles = torch.arange(S, device=device)[:, None] * policy.inv_freq  # (S, head_dim / 2)
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=1).to(dtype)     # (S, head_dim)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=1).to(dtype)
        # Added to the attention scores: -inf hides padding and slots that are not yet written.
        seen = F.pad(mask, (0, room), value=False).repeat_interleave(self.kv_heads, 0)
        self.bias = torch.where(seen, 0.0, -math.inf).to(dtype)[:, None]    # (B kv_heads, 1, S)
        self.padding = (~mask).sum(1)                  # (B,): positions count real tokens only
        self.slot = torch.tensor([cache.length], device=device)    # where the next keys go

    def step(self, token, span):
        """Read one token per row, (B,), looking at the first `span` slots -> hidden (B, D)."""
        B, H, KV, size = len(token), self.heads, self.kv_heads, self.head_dim
        position = self.slot - self.padding                                 # (B,)
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]     # (B, 1, head_dim)
        self.bias.index_fill_(2, self.slot, 0.0)
        x = F.embedding(token, self.embedding).to(self.dtype)               # (B, D)
        for block, keys, values, window in zip(self.layers, self.keys, self.values, self.windows):
            normed = F.rms_norm(x, x.shape[-1:], eps=self.eps)              # its weight is in qkv
            qkv = product(normed, block.qkv, block.qkv_bias).view(B, H + 2 * KV, size)
            qk, v = qkv.split([H + KV, KV], dim=1)
            if block.qk_norm is not None:
                qk = F.rms_norm(qk, (size,), eps=self.eps) * block.qk_norm
            qk = (qk * cos).addcmul_(qk.roll(size // 2, dims=-1), sin)      # policy.rotate
            q, k = qk.split([H, KV], dim=1)                                 # (B, heads, head_dim)
            keys.index_copy_(1, self.slot, k.reshape(-1, 1, size))
            values.index_copy_(1, self.slot, v.reshape(-1, 1, size))
            near = slice(0 if window is None else max(0, span - window), span)
            q = q.reshape(B * KV, H // KV, size)       # heads that share a key head are its rows
            scores = torch.baddbmm(self.bias[:, :, near], q, keys[:, near].mT, alpha=size ** -0.5)
            mixed = torch.bmm(scores.softmax(-1), values[:, near]).view(B, H * size)
            residual = x if block.out_bias is None else x + block.out_bias
            x = product(mixed, block.out, residual=residual)
            normed = F.rms_norm(x, x.shape[-1:], eps=self.eps)
            gate, up = product(normed, block.gate_up, block.gate_up_bias).chunk(2, dim=-1)
            residual = x if block.down_bias is None else x + block.down_bias
            x = product(F.silu(gate).mul_(up), block.down, residual=residual)
        self.slot.add_(1)
        return self.norm(x)

    def logits(self, hidden, temperature):
        """hidden (B, D) -> (B, V) at `temperature`, made as `token_logprobs` makes them."""
        return logits_of(*operands(hidden, self.head), temperature)

    def keep(self, rows):
        """Go on with these rows alone, each of them once or several times."""
        if torch.equal(rows, torch.arange(len(self.padding), device=rows.device)):
            return
        heads = torch.arange(len(self.bias), device=rows.device).view(-1, self.kv_heads)
        heads = heads[rows].flatten()                                       # (rows kv_heads,)
        self.keys = [k.index_select(0, heads) for k in self.keys]
        self.values = [v.index_select(0, heads) for v in self.values]
        self.bias, self.padding = self.bias.index_select(0, heads), self.padding[rows]


# ------------------------------------------ prompts to tokens, tokens to texts, rollouts together

class Templated(str):
    """A prompt that a chat template wrote: all its special tokens are there, none may be added."""


# Some templates write today's date, and a run that goes on tomorrow would ask something else. They
# are given one day instead, that of Llama 3's own template, by a macro in the function's place.
SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"


def chat(tokenizer, system, text, style):
    """What a user writes, wrapped by the tokenizer's chat template; as it is for style "bare" or
    where there is no template. UserError if the template fails."""
    if style == "bare" or not tokenizer.chat_template:
        return text
    system_turn, user = {"role": "system", "content": system}, {"role": "user", "content": text}
    both = {"role": "user", "content": f"{system}\n\n{text}"}
    for turns in [system_turn, user], [both]:          # some templates refuse a system turn
        try:
            template = SAME_DAY + tokenizer.get_chat_template()
            return Templated(tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True))
        except Exception as error:                     # a template may raise anything
            failure = f"{type(error).__name__}: {error}"
    raise UserError(f"the tokenizer's chat template fails ({failure}).")


def encode(tokenizer, prompts, device):
    """Strings -> token ids (prompts, P) padded on the left, and their mask, bool. Plain text gets
    the special tokens that the tokenizer adds, unless it begins with one already."""
    begin = tokenizer.bos_token
    begun = isinstance(prompts[0], Templated) or begin and prompts[0].startswith(begin)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt",
                      add_special_tokens=not begun)
    return batch.input_ids.to(device), batch.attention_mask.bool().to(device)


def texts_of(tokenizer, answers):
    """Lists of token ids -> texts in which every token shows: an answer may hide nothing from the
    verifier, because smoothing pays for unlikely tokens. Special tokens stay, and an id that the
    model has and the tokenizer has not (Qwen2.5: 271 of 151,936) is written as <|id|>."""
    nameless = {i for i in set().union(*answers) if not tokenizer.convert_ids_to_tokens(i)}
    texts = []
    for ids in answers:
        parts = []
        for unnamed, run in itertools.groupby(ids, key=nameless.__contains__):
            parts += [f"<|{i}|>" for i in run] if unnamed else [tokenizer.decode(
                list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False)]
        texts.append("".join(parts))
    return texts


def join(rollouts, pad):
    """Several rollouts as one: prompts padded on the left to the widest, responses on the right."""
    def padded(tensors, value, left=False):
        width = max(x.shape[1] for x in tensors)
        gaps = [width - x.shape[1] for x in tensors]
        return torch.cat([F.pad(x, (gap, 0) if left else (0, gap), value=value)
                          for x, gap in zip(tensors, gaps)])

    prompt = padded([r.tokens[:, :r.prompt_mask.shape[1]] for r in rollouts], pad, left=True)
    response = padded([r.response for r in rollouts], pad)
    return Rollout(
        tokens=torch.cat([prompt, response], dim=1), response=response,
        prompt_mask=padded([r.prompt_mask for r in rollouts], False, left=True),
        mask=padded([r.mask for r in rollouts], False), logp=padded([r.logp for r in rollouts], 0),
        texts=[text for r in rollouts for text in r.texts],
        finished=torch.cat([r.finished for r in rollouts]))


def take(rollout, rows):
    """The rollout of `rows` alone."""
    fields = {name: value[rows] for name, value in vars(rollout).items() if name != "texts"}
    return Rollout(**fields, texts=[rollout.texts[row] for row in rows.tolist()])
