"""The model, written again for the tests from its definition: one position at a time, in float64, with no batching."""

import math

import torch


def unit(x):
    """Root mean square 1."""
    return x / torch.sqrt((x * x).mean() + torch.finfo(torch.float64).eps)


def turn(x, position, c):
    """Rotary embedding of one head's vector at one position."""
    dims = c.rope_dims or c.head_dim
    out = list(x)
    for i in range(dims // 2):
        frequency = c.rope_base ** (-2 * i / dims)
        longest = c.yarn_max_len
        if (c.rope_yarn or c.rope_type == "yarn") and longest > c.train_seq_len:
            ramp = min(1.0, max(0.0, (2 * i / dims - 0.25) / 0.75))
            frequency /= 1 + ramp * (longest / c.train_seq_len - 1)
        angle = position * frequency
        a, b = x[i], x[i + dims // 2]
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + dims // 2] = -a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(out)


def order_of_layers(c, looped):
    if not looped or not c.num_loops:
        return list(range(c.num_layers))
    middle = list(range(c.loop_start, c.loop_end + 1))
    order = list(range(c.loop_start)) + middle * (c.num_loops + 1) + list(range(c.loop_end + 1, c.num_layers))
    return order[: c.virtual_depth] if c.virtual_depth else order


def rounded_rows(matrix, bits, sigmas):
    """Each row on a grid of its own, from its deviation or its largest magnitude; no gradient."""
    rows = []
    for row in matrix.detach():
        reach = sigmas * ((row - row.mean()) ** 2).mean().sqrt() if sigmas else row.abs().max()
        step = reach / (2 ** (bits - 1) - 1)
        rows.append(torch.clamp(torch.round(row / step), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) * step)
    return torch.stack(rows)


def int32(number):
    """A number as 32 bits hold it."""
    return (number + 2**31) % 2**32 - 2**31


def hash32(number):
    """Chris Wellons' lowbias32, a hash of 32 bits."""
    number %= 2**32
    number = (number ^ number >> 16) * 0x7FEB352D % 2**32
    number = (number ^ number >> 15) * 0x846CA68B % 2**32
    return number ^ number >> 16


def softcap(logits, c, caps=None):
    """Logits within C of zero, where C is LOGIT_SOFTCAP, or `caps` above and below zero."""
    cap = c.logit_softcap if caps is None else torch.where(logits > 0, caps[0], caps[1])
    x = logits / cap
    if c.softcap_type == "tanh":
        return cap * torch.tanh(x)
    x = torch.clamp(x, -2, 2)
    return cap * torch.clamp(x - x**3 / 3 + x**5 / 15, -1, 1)


class Reference:
    """The forward pass of one row. Weights are read from a GPT's parameters by name."""

    def __init__(self, model, fake_quant=None, temperature=1.0):
        """`fake_quant`: (bits, clip sigmas) of the attention banks and of the MLP banks, or None."""
        self.c, self.p, self.temperature = model.config, dict(model.named_parameters()), temperature
        if fake_quant:
            attention, mlp = fake_quant
            for name, grid in dict(qo_bank=attention, kv_bank=attention, up_bank=mlp, down_bank=mlp).items():
                self.p[name] = torch.stack([rounded_rows(m, *grid) for m in self.p[name]]).requires_grad_()

    def of(self, layer, name):
        return self.p[f"blocks.{layer}.{name}"]

    def normed(self, x, layer):
        return unit(x) * (1 / math.sqrt(layer + 1) if self.c.ln_scale else 1)

    def gate(self, n, layer):
        """One number per head, or ones."""
        c = self.c
        if c.sparse_attn_gate_enabled:
            return torch.sigmoid(c.sparse_attn_gate_scale * (self.of(layer, "head_gate") @ n[: c.gate_window]))
        if c.attn_out_gate_enabled:
            return 2 * torch.sigmoid(self.of(layer, "head_gate") @ n[: c.gate_window])
        if c.gated_attn_enabled:
            return torch.sigmoid(self.of(layer, "head_gate") @ n)
        return torch.ones(c.num_heads, dtype=n.dtype)

    def attention(self, inputs, layer, starts):
        """Attention's output at every position, from its inputs, before the output vector a."""
        c, h, depth = self.c, self.c.head_dim, self.c.num_layers
        n = [self.normed(x, layer) for x in inputs]
        wq, wo = self.p["qo_bank"][layer], self.p["qo_bank"][depth + layer]
        wk, wv = self.p["kv_bank"][layer], self.p["kv_bank"][depth + layer]
        q, k, v = [], [], []
        for t, x in enumerate(n):
            q.append(
                [turn(unit(a), t, c) * g for a, g in zip((wq @ x).split(h), self.of(layer, "query_gain"), strict=True)]
            )
            k.append([turn(unit(a), t, c) for a in (wk @ x).split(h)])
            own = wv @ x
            if self.c.ve_dim and str(layer) in self.c.ve_layers.split(","):
                own = own + self.of(layer, "value_scale") * self.values[t]
            if c.value_residual and layer:
                own = own + torch.sigmoid(self.of(layer, "value_gate")) * self.first_values[t]
            v.append(own.split(h))
        if self.first_values is None:
            self.first_values = [torch.cat(heads) for heads in v]
        if c.key_offset:
            kept = (h + c.rope_dims) // 2
            k = [
                [torch.cat((a[:kept], b[kept:])) for a, b in zip(k[t], k[max(t - 1, starts[t])], strict=True)]
                for t in range(len(n))
            ]
        if c.window_attn_size:
            named = c.window_attn_layers.split(",") if c.window_attn_layers else map(str, range(0, depth, 2))
            if str(layer) in named:
                starts = [max(s, t - c.window_attn_size) for t, s in enumerate(starts)]
        outputs = []
        for t in range(len(n)):
            heads = []
            for head in range(c.num_heads):
                group = head // (c.num_heads // c.num_kv_heads)
                scores = torch.stack([q[t][head] @ k[s][group] / math.sqrt(h) for s in range(starts[t], t + 1)])
                weights = torch.softmax(scores, 0)
                y = sum(w * v[s][group] for w, s in zip(weights, range(starts[t], t + 1), strict=True))
                if layer >= c.num_layers - c.xsa_last_n:
                    own = v[t][group] / v[t][group].norm()
                    strength = torch.tanh(self.of(layer, "xsa_gate")[head]) if c.gated_xsa else 1
                    y = y - strength * (y @ own) * own
                heads.append(y)
            gates = self.gate(n[t], layer)
            outputs.append(wo @ torch.cat([g * y for g, y in zip(gates, heads, strict=True)]))
        return outputs

    def mlp(self, inputs, layer):
        outputs = []
        for x in inputs:
            hidden = self.p["up_bank"][layer] @ self.normed(x, layer)
            hidden = torch.where(hidden > 0, hidden, self.c.leaky_relu_slope * hidden) ** 2
            outputs.append(self.p["down_bank"][layer] @ hidden)
        return outputs

    def bigram(self, ids, starts, t):
        """The embedding of the pair that ends at t."""
        buckets = self.c.bigram_vocab_size
        bucket = (int32(36313 * ids[t]) ^ int32(27191 * ids[t - 1])) % (buckets - 1) if starts[t] < t else buckets - 1
        row = self.p["bigram.table"][bucket]
        if self.c.bigram_signs:
            vector = hash32(hash32(ids[t]) + ids[t - 1]) >> 8 & 255 if starts[t] < t else 0
            width = len(row)
            row = row * torch.tensor([1 - 2 * (hash32(vector * width + i) & 1) for i in range(width)], dtype=row.dtype)
        return self.p["bigram.scale"] * (self.p["bigram.projection"] @ row)

    def embed(self, ids, starts, noise):
        x = [self.p["embedding"][token] for token in ids]
        if self.c.bigram_vocab_size:
            x = [a + self.bigram(ids, starts, t) for t, a in enumerate(x)]
        if noise is not None:
            x = [a + b for a, b in zip(x, noise, strict=True)]
        if self.c.smear_gate_enabled and self.c.smear_gate_type == "channel":
            x, g = [unit(a) for a in x], torch.sigmoid(self.p["smear.weight"])
            return [x[t] if starts[t] == t else (1 - g) * x[t] + g * x[t - 1] for t in range(len(x))]
        if self.c.smear_gate_enabled:
            w, scale = self.p["smear.weight"], self.p["smear.scale"]
            x = [
                x[t] if starts[t] == t else x[t] + scale * torch.sigmoid(w @ x[t][: self.c.gate_window]) * x[t - 1]
                for t in range(len(x))
            ]
        return [unit(a) for a in x]

    def blend(self, x, saved, place):
        skip = self.p["skip_weights"][place] * saved
        if not self.c.skip_gates_enabled:
            return x + skip
        g = torch.sigmoid(self.p["skip_gates"][place])
        return (1 - g) * skip + g * x

    def layer(self, number, streams, x0, starts):
        """One layer on one residual stream (a list with one entry) or on two parallel ones."""
        m0, m1 = self.of(number, "input_mix")
        a, b = self.of(number, "attention_scale"), self.of(number, "mlp_scale")
        x_mixed = [m0 * x + m1 * y for x, y in zip(streams[0], x0, strict=True)]
        attention_out = [a * y for y in self.attention(x_mixed, number, starts)]
        if len(streams) == 1:
            x = [y + z for y, z in zip(x_mixed, attention_out, strict=True)]
            return [[y + b * z for y, z in zip(x, self.mlp(x, number), strict=True)]]
        mlp_out = [b * y for y in self.mlp(streams[1], number)]
        mixed = []
        for stream, (r, p, q) in zip(streams, self.of(number, "stream_mix"), strict=True):
            mixed.append([r * x + p * y + q * z for x, y, z in zip(stream, attention_out, mlp_out, strict=True)])
        return mixed

    def row(self, ids, targets, starts, looped, noise=None):
        """NLL and log-sum-exp of each position of a row: lists of scalars."""
        c, order, saved = self.c, order_of_layers(self.c, looped), []
        self.first_values = None
        half = len(order) // 2
        x0 = self.embed(ids, starts, noise)
        if c.ve_dim:
            self.values = [
                self.p["value_embeds.scale"] * (self.p["value_embeds.projection"] @ self.p["value_embeds.table"][token])
                for token in ids
            ]
        streams = [x0]
        for place, number in enumerate(order):
            if 0 <= c.parallel_start_layer <= number and len(streams) == 1:
                streams = [streams[0], streams[0]]
            if place >= half and saved:
                skip = saved.pop()
                streams[0] = [self.blend(x, y, place - half) for x, y in zip(streams[0], skip, strict=True)]
            streams = self.layer(number, streams, x0, starts)
            if place < half:
                saved.append(streams[0])
        head = self.p["embedding"] if c.tie_embeddings else self.p["head"]
        nll, lse = [], []
        for t, target in enumerate(targets):
            hidden = unit(sum(stream[t] for stream in streams) / len(streams))
            z = softcap(head @ hidden, c, self.p.get("softcaps")) / self.temperature
            lse.append(z.max() + torch.log(torch.exp(z - z.max()).sum()))
            nll.append(lse[-1] - z[target])
        return torch.stack(nll), torch.stack(lse)

    def __call__(self, batch, looped, noise=None):
        rows = [
            self.row(ids.tolist(), targets.tolist(), starts.tolist(), looped, None if noise is None else noise[r])
            for r, (ids, targets, starts) in enumerate(
                zip(batch.ids, batch.targets, batch.documents.starts, strict=True)
            )
        ]
        nll, lse = zip(*rows, strict=True)
        return torch.stack(nll), torch.stack(lse)
