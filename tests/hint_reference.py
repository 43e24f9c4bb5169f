"""Hints from repetition, from their definition: every pair of places is compared, one target at a time."""

import math

BOS, PRIOR = 1, 4.0
CHANCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99)


def lengths(low, high):
    """1, 1.5, 2, 3, 4, 6, ... times the shortest."""
    return [n for n in range(low, high + 1) if any(n in (low << k, (low << k) * 3 // 2) for k in range(20))]


def begin_of(tokens, place):
    """Where the document of an input begins."""
    return max(i for i in range(place + 1) if tokens[i] == BOS)


def hint(tokens, place, c):
    """(What followed the longest earlier run like the one that ends at an input, its length's number), or None."""
    best = None
    for number, length in enumerate(lengths(c.hint_min_match, c.hint_max_match), 1):
        begin = begin_of(tokens, place)
        if place - begin < length - 1:
            continue
        run = tokens[place - length + 1 : place + 1]
        for other in range(place - 1, length - 2, -1):  # the latest first
            known = other >= begin or other // c.hint_chunk_tokens < place // c.hint_chunk_tokens
            if known and tokens[other - length + 1 : other + 1] == run:
                best = tokens[other + 1], number
                break
    return best


def distribution(q, h, w):
    """Probabilities [V] after a weight was added to the logit of one token."""
    raised = [p * math.exp(w) if token == h else p for token, p in enumerate(q)]
    return [p / sum(raised) for p in raised]


def scores(tokens, probabilities, c):
    """NLL of every target; probabilities[t] is the model's distribution [V] for the target of input t."""
    weights, curvatures, out = {}, {}, []
    gradients, curved = {}, {}
    for place in range(len(tokens) - 1):
        if place % c.hint_chunk_tokens == 0:
            for bucket in gradients:
                curvatures[bucket] = curvatures.get(bucket, PRIOR) + curved[bucket]
                step = c.hint_lr * gradients[bucket] / curvatures[bucket]
                weights[bucket] = weights.get(bucket, 0.0) - max(-1.0, min(1.0, step))
            gradients, curved = {}, {}
        q, found, target = list(probabilities[place]), hint(tokens, place, c), tokens[place + 1]
        if found is None:
            out.append(-math.log(q[target]))
            continue
        h, number = found
        bucket = number, sum(q[h] >= bound for bound in CHANCES)
        after = distribution(q, h, weights.get(bucket, 0.0))
        out.append(-math.log(after[target]))
        gradients[bucket] = gradients.get(bucket, 0.0) + after[h] - (target == h)
        curved[bucket] = curved.get(bucket, 0.0) + after[h] * (1 - after[h])
    return out
