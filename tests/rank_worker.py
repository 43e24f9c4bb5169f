"""One rank of a test: runs jobs (a JSON file) and saves what each gives, under the job's name and the rank's number."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from helpers import build_model, strings, tg


def model_on(run, c, **options):
    """A model with random weights on the run's device."""
    return build_model(c, **options).to(run.device)


def array(tensor):
    """A tensor's values as an array on the host."""
    return tensor.detach().cpu().numpy()


def train(c, run, steps):
    """Some training steps from random weights: the weights and their average afterwards, as arrays."""
    model = model_on(run, c, seed=1)
    trainer = tg.Trainer(model, tg.TrainLoader(c, run), c, run)
    losses = []
    for step in range(steps):
        losses.append(trainer.step(tg.Progress(step, 0.0), looped=c.loops and step >= steps // 2))
        run.all_reduce(losses[-1])
    arrays = {name: array(p) for name, p in model.named_parameters()}
    if trainer.ema is not None:
        arrays |= {f"ema {i}": array(p) for i, p in enumerate(trainer.ema)}
    if trainer.swa is not None:
        arrays |= {f"swa {i}": array(p) for i, p in enumerate(trainer.swa)}
    return dict(arrays, losses=np.array([n.item() for n in losses]))


def depth(c, run, trainable):
    """A step of all layers, then two of the first ones: the weights, and how much of frozen layers was disturbed."""
    model = model_on(run, c, seed=1)
    trainer = tg.Trainer(model, tg.TrainLoader(c, run), c, run)
    trainer.step(tg.Progress(0, 0.0), looped=c.loops)
    muon, adam = trainer.optimizers.muon, trainer.optimizers.adam

    def state():
        """Flat copies of what is frozen and of what trains, weights and optimizer states; and this rank's momenta."""
        parts = {True: [], False: []}
        for name, p in model.named_parameters():
            if name in tg.BANKS:
                for i, matrix in enumerate(p.detach()):
                    parts[i % c.num_layers >= trainable].append(matrix.flatten())
            else:
                frozen = name.startswith("blocks.") and int(name.split(".")[1]) >= trainable
                parts[frozen] += [p.detach().flatten(), *(s.flatten().to(p.dtype) for s in adam.state[p].values())]
        momenta = {True: [], False: []}
        for name, shard in muon.shards().items():
            bank = getattr(model, name.partition(".")[2])
            for i, matrix in enumerate(shard, run.rank * len(shard)):
                momenta[i % c.num_layers >= trainable or i >= len(bank)].append(matrix.flatten())
        empty = [next(model.parameters()).detach().flatten()[:0]]
        return [tg.torch.cat(part + empty) for part in (parts[True] + momenta[True], parts[False], momenta[False])]

    before = state()
    for step in (1, 2):
        trainer.step(tg.Progress(step, 0.0), c.loops, trainable)
    disturbed, moved, momenta = (np.array((x != y).sum().item()) for x, y in zip(before, state(), strict=True))
    return {
        **{name: array(p) for name, p in model.named_parameters()},
        "disturbed": disturbed,
        "moved": moved,
        "momenta moved": momenta,
    }


def score(c, run):
    """The validation score of random weights."""
    result = tg.Evaluator(c, run)(model_on(run, c, seed=2, spread=0.1))
    return dict(nats=np.array(result.nats), tokens=np.array(result.tokens), bytes=np.array(result.bytes))


def calibration(c, run):
    """Calibration from random weights, what is quantized with it, and the artifact after tuning."""
    model = model_on(run, c, seed=1)
    trainer = tg.Trainer(model, tg.TrainLoader(c, run), c, run)
    found = tg.calibrate(trainer, 5)
    trained = tg.Trained(model, found, tg.Progress(5, 0.0), tg.Score(0.0, 1, 1), 0.0, trainer.loader)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    stored = tg.quantize(weights, found, c)
    artifact = tg.make_artifact(weights, found, 40_000, c, lambda line: None)
    tuned = tg.tune_artifact(artifact, trained, 10**9, c, run) if c.tune_steps else artifact
    return {
        **{f"hessian {name}": array(h) for name, h in found.hessians.items()},
        **{f"rows {name}": array(r) for name, r in found.rows.items()},
        **{f"codes {name}": array(q.codes) for name, q in stored.items()},
        "artifact": np.frombuffer(artifact, np.uint8),
        "tuned": np.frombuffer(tuned, np.uint8),
    }


def config_of(job):
    """The Config of a job's knobs on this machine."""
    return tg.config_from_env(strings(job["knobs"]), tg.torch.cuda.is_available())[0]


def run_jobs(jobs, run, folder):
    for job in jobs:
        arguments = dict(job.get("arguments", {}))
        work = {"train": train, "depth": depth, "score": score, "calibration": calibration}[job["kind"]]
        result = work(config_of(job), run, **arguments)
        np.savez(folder / f"{job['name']}.{run.rank}.npz", **result)


def main(jobs, folder):
    """As train_gpt.py's main: the run, which holds a process group, must not live until the interpreter's end."""
    run = tg.start_run(config_of(jobs[0]), dict(os.environ))
    with run.guard():
        run_jobs(jobs, run, folder)
        run.leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
