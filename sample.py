"""How y is drawn: batched sampling with a key-value cache.

Each prompt is read once and its keys and values are handed to the G answers of its group. Then one token per answer and
step, drawn from the full softmax at `temperature`: no top-k, no top-p, no penalty, because training scores what was sampled,
and a truncated distribution would make that score wrong. The log-probability of each token is taken from the very logits
that it was drawn from. On a CPU, answers to a prompt go through the model as one for as long as they say the same.

Letters: B rows = prompts x G, the rows of one prompt contiguous; P prompt length; T response length; V vocabulary.

    rollout = sample(policy, tokenizer, ["4 7 2 9,24="], group_size=4, max_new_tokens=24)
    rollout.texts[0]          # '2*(9+7-4)' from a trained policy, anything from a fresh one
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SHARING = ("cpu",)            # devices on which answers that say the same so far share a row; elsewhere the host would wait
LOOK_EVERY = 8                # for it, and it looks only this often at which answers have ended
SPAN = 256                    # on a GPU attention reads the cache up to the next multiple of this


@dataclass
class Rollout:
    """What was sampled. Everything about an answer's end comes from `mask`, never from token ids."""
    tokens: torch.Tensor       # (B, P+T) int64: prompt, padded on the left, then response, padded on the right
    prompt_mask: torch.Tensor  # (B, P) bool, False on the prompt's padding
    response: torch.Tensor     # (B, T) int64, the tail of `tokens`
    mask: torch.Tensor         # (B, T) bool, True on sampled tokens up to and including the first stop token
    logp: torch.Tensor         # (B, T) fp32, log-probability of each sampled token at the sampling temperature; else 0
    texts: list                # B strings, without the stop token; a special token before it is shown
    finished: torch.Tensor     # (B,) bool, False where max_new_tokens cut the answer


@torch.no_grad()
def sample(policy, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, generator=None):
    """Draw `group_size` answers to each of `prompts` (strings ready to tokenise) -> Rollout.

    generator: a torch.Generator on the policy's device, whose state alone decides the draws. ValueError for a prompt that
    does not fit into the model's context together with its answer.
    """
    device, stop_ids = policy.device, torch.tensor(policy.stop_ids, dtype=torch.int64, device=policy.device)
    prompt, prompt_mask = encode(tokenizer, prompts, device)                    # (prompts, P) each
    context, P = policy.config.max_position_embeddings, prompt.shape[1]
    if P + max_new_tokens > context:
        raise ValueError(f"a prompt of {P} tokens and {max_new_tokens} new ones exceed the model's context of {context}.")

    # Read each prompt once; its G answers start from its keys and values and from its last hidden state.
    row_prompt = torch.arange(len(prompts), device=device).repeat_interleave(group_size)    # (B,)
    cache, B = policy.new_cache(), len(row_prompt)
    padded = not prompt_mask.all()                     # prompts of one length need no attention mask at all
    hidden = policy(prompt, prompt_mask if padded else None, cache)[:, -1]      # (prompts, D)
    stepper = policy.stepper(cache, prompt_mask, room=max_new_tokens)

    # All draws are made here, one uniform a token, so what a row says does not depend on which rows are still alive.
    uniform = torch.rand(max_new_tokens, B, generator=generator, device=device)
    response = torch.zeros(B, max_new_tokens, dtype=torch.int64, device=device)
    logp = torch.zeros(B, max_new_tokens, device=device)
    length = torch.full((B,), max_new_tokens, device=device)                    # until a stop token says otherwise
    alive = torch.arange(B, device=device)             # the rows still going
    token, t = torch.zeros_like(alive), torch.zeros(1, dtype=torch.int64, device=device)

    def pick(hidden):
        """Draw token number t of the rows alive and note it. All state is written in place: a CUDA graph can hold it."""
        all_logp = stepper.logits(hidden, temperature).log_softmax(-1)          # (alive, V) fp32
        token.copy_(draw(all_logp.exp(), uniform[t, alive]))                    # (alive,)
        response[alive, t] = token
        logp[alive, t] = all_logp.gather(1, token[:, None])[:, 0]
        stopped = (token[:, None] == stop_ids).any(1)
        length[alive] = torch.minimum(length[alive], torch.where(stopped, t + 1, max_new_tokens))
        t.add_(1)

    pick(hidden[row_prompt])
    if device.type in SHARING:
        said, V = row_prompt, len(policy.head)         # said (alive,): the stepper's row that has said what this answer has
        for done in range(1, max_new_tokens):
            going = (length[alive] > done).nonzero()[:, 0]
            if len(going) == 0:
                break
            alive, token = alive[going], token[going]
            paths, said = torch.unique(said[going] * V + token, return_inverse=True)    # (different,), (alive,)
            stepper.keep(paths // V)
            pick(stepper.step(paths % V, P + done)[said])
    else:
        stepper.keep(row_prompt)                       # a row for each answer from the start, so that shapes are fixed
        replay, span = None, 0
        for done in range(1, max_new_tokens):
            if done % LOOK_EVERY == 0:
                going = (length[alive] > done).nonzero()[:, 0]
                if len(going) == 0:
                    break
                if len(going) < 0.8 * len(alive):      # drop finished rows where it pays for the copy
                    alive, token, replay = alive[going], token[going], None
                    stepper.keep(going)
            if device.type == "cuda" and not any(stepper.windows):
                if replay is None or P + done > span:  # a graph has fixed shapes: a new one for more slots or fewer rows
                    span = min(P + max_new_tokens, -(-(P + done) // SPAN) * SPAN)
                    replay = capture(lambda: pick(stepper.step(token, span)), (token, t, stepper.slot))
                replay()
            else:
                pick(stepper.step(token, P + done))

    T = int(length.max())
    mask = torch.arange(T, device=device) < length[:, None]                     # (B, T)
    response = torch.where(mask, response[:, :T], tokenizer.pad_token_id)
    finished = torch.isin(response.gather(1, length[:, None] - 1)[:, 0], stop_ids)
    kept = [ids[:n] for ids, n in zip(response.tolist(), (length - finished.long()).tolist())]
    return Rollout(tokens=torch.cat([prompt[row_prompt], response], dim=1), prompt_mask=prompt_mask[row_prompt],
                   response=response, mask=mask, logp=torch.where(mask, logp[:, :T], 0.0),
                   # A special token in mid-answer shows: an answer may not hide tokens from whoever judges its text.
                   texts=tokenizer.batch_decode(kept, skip_special_tokens=False), finished=finished)


def chat(tokenizer, system, text, style):
    """What a user writes, wrapped by the tokenizer's chat template; as it is for style "bare" or without a template."""
    if style == "bare" or not tokenizer.chat_template:
        return text
    turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:                                  # some templates refuse a system turn: say it all as the user
        turns = [{"role": "user", "content": f"{system}\n\n{text}"}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, prompts, device):
    """Strings -> token ids (prompts, P) padded on the left, and their mask, bool. A text that opens with the
    beginning-of-sequence token (chat templates write it) is not given a second one."""
    begun = bool(tokenizer.bos_token) and prompts[0].startswith(tokenizer.bos_token)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=not begun)
    return batch.input_ids.to(device), batch.attention_mask.bool().to(device)


def capture(step, state):
    """`step`, which launches some hundred small kernels, as one CUDA graph; a function that runs it again.

    step reads and writes the same tensors each time. Of these, `state` must come back from the trial run as they were:
    the others are written with the same values again.
    """
    before, stream = [x.clone() for x in state], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                    # a trial run: libraries set themselves up outside the graph
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for x, value in zip(state, before):
        x.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def draw(probs, uniform):
    """One index a row by inverting the distribution function: the first whose cumulated probability exceeds u.

    probs (N, V), uniform (N,) in [0, 1). Scaled by the last cumulated value, which fp32 rounding leaves near 1, not at 1.
    """
    cumulated = probs.cumsum(-1)
    target = uniform[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
