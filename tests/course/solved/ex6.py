"""A right solution of exercise 6, unlike the reference: a plain loop, Gumbel noise, no sharing."""
import torch

from policy import KVCache, cache_of_rows
from sample import Rollout, encode, texts_of


@torch.no_grad()
def sample(policy, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, generator=None):
    device, pad = policy.device, tokenizer.pad_token_id
    prompt, prompt_mask = encode(tokenizer, prompts, device)
    P = prompt.shape[1]
    if P + max_new_tokens > policy.config.max_position_embeddings:
        raise ValueError("too long")
    cache = KVCache()
    hidden = policy(prompt, prompt_mask, cache)[:, -1]
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    cache, hidden, mask = cache_of_rows(cache, rows), hidden[rows], prompt_mask[rows]
    going = torch.ones(len(rows), dtype=torch.bool, device=device)
    stops = torch.tensor(policy.stop_ids, dtype=torch.int64, device=device)
    tokens, logps, masks = [], [], []
    for t in range(max_new_tokens):
        logp = (hidden.float() @ policy.head.T / temperature).log_softmax(-1)
        noise = torch.rand(logp.shape, generator=generator, device=device, dtype=torch.float64)
        token = (logp - (-noise.clamp(min=1e-300).log()).log()).argmax(-1)
        tokens.append(torch.where(going, token, pad))
        logps.append(torch.where(going, logp.gather(1, token[:, None])[:, 0], 0.0))
        masks.append(going)
        going = going & ~torch.isin(token, stops)
        if not going.any() or t == max_new_tokens - 1:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        hidden = policy(token[:, None], mask, cache)[:, -1]
    response, answered = torch.stack(tokens, 1), torch.stack(masks, 1)
    ids = [row[m].tolist() for row, m in zip(response, answered)]
    finished = ~going
    ids = [row[:-1] if end else row for row, end in zip(ids, finished.tolist())]
    return Rollout(tokens=torch.cat([prompt[rows], response], 1), prompt_mask=prompt_mask[rows],
                   response=response, mask=answered, logp=torch.stack(logps, 1).float(),
                   texts=texts_of(tokenizer, ids), finished=finished)
