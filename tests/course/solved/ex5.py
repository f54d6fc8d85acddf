"""A right solution of exercise 5, unlike the reference: rows in pieces, a plain Function."""
import torch


def token_logprobs(hidden, weight, targets, temperature=1.0):
    shape = targets.shape
    flat = hidden.reshape(-1, hidden.shape[-1])
    logp, entropy = Pieces.apply(flat, weight, targets.reshape(-1), temperature)
    return logp.reshape(shape), entropy.reshape(shape)


ROWS = 256


class Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        kind = torch.promote_types(hidden.dtype, torch.float32)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        logp = torch.zeros(len(hidden), dtype=kind)
        entropy = torch.zeros(len(hidden), dtype=kind)
        for i in range(0, len(hidden), ROWS):
            z = hidden[i:i + ROWS].to(kind) @ weight.to(kind).T / temperature
            z = z.log_softmax(-1)
            logp[i:i + ROWS] = z.gather(1, targets[i:i + ROWS, None])[:, 0]
            entropy[i:i + ROWS] = -(z.exp() * z).sum(-1)
        return logp, entropy

    @staticmethod
    def backward(ctx, g, e):
        hidden, weight, targets = ctx.saved_tensors
        kind = torch.promote_types(hidden.dtype, torch.float32)
        dh = torch.zeros(hidden.shape, dtype=kind)
        dw = torch.zeros(weight.shape, dtype=kind)
        w = weight.to(kind)
        for i in range(0, len(hidden), ROWS):
            h = hidden[i:i + ROWS].to(kind)
            z = (h @ w.T / ctx.temperature).log_softmax(-1)
            p = z.exp()
            entropy = -(p * z).sum(-1, keepdim=True)
            up, down = g[i:i + ROWS, None], e[i:i + ROWS, None]
            dz = -p * (up + down * (z + entropy))
            dz.scatter_add_(1, targets[i:i + ROWS, None], up)
            dh[i:i + ROWS] = dz @ w / ctx.temperature
            dw += dz.T @ h / ctx.temperature
        return dh.to(hidden.dtype), dw.to(weight.dtype), None, None
