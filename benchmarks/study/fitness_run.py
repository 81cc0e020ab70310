"""Train a real Mixture-of-Experts and keep what every expert is worth to every client: the data of `trained`.

Usage::

    python -m benchmarks.study.fitness_run                  # scikit-learn's digits, offline
    python -m benchmarks.study.fitness_run --data cifar10 --data-dir FOLDER

A federated run by `fedmoe_sched.federated` with the policy ``balanced``. After every round each global expert is
tried on each training sample of each client. A client's reward for an expert is its accuracy on the client's own
samples, and fitness is the moving average of that, with the rate and the prior of the run's policy: what
`fedmoe_sched.scores.FitnessScores` would hold if every pair were reported in every round. A mean over samples and
a mean over rounds may change places, so the file holds the moving average for each *sample*. Its mean over a
client's samples is the client's fitness, and resampling the samples gives the noise that the fitness really has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.study.families import FITNESS_FILE
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.data import Dataset, load_dataset
from fedmoe_sched.federated.model import MixtureOfExperts, build_model
from fedmoe_sched.federated.partition import Partition, partition
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.scores import FitnessOptions

_BATCH = 512


def run_config(
    data: str, *, data_dir: str | None, clients: int, experts: int, rounds: int, seed: int
) -> TrainConfig:
    """Return the settings of the run: many small clients of uneven class mixes, experts that are small heads."""
    return TrainConfig.from_dict(
        {
            "policy": "balanced",
            "policy_options": {"fitness": {"prior": 0.5}},
            "rounds": rounds,
            "seed": seed,
            "data": {"name": data} | ({"dir": data_dir} if data_dir else {}),
            "clients": {
                "count": clients,
                "capacity": [1, 2, 3, 4],
                "split": "dirichlet",
                "alpha": 0.3,
                "min_samples": 4,
            },
            "model": {"experts": experts},
        }
    )


class SampleScores:
    """Moving average, over the rounds, of whether each expert is right about each sample.

    Parameters
    ----------
    config : TrainConfig
    folder : Path
        The run folder, whose newest checkpoint is judged after each round.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.data = load_dataset(config.data.name, config.data.dir, seed=config.seed)
        self.parts = _partition(self.data, config)
        options = FitnessOptions(**config.policy_options.get("fitness", {}))
        self.rate = options.rate
        self.rows = np.concatenate(self.parts.samples)
        self.values = np.full((len(self.rows), config.model.experts), options.prior)
        self._folder = RunFolder(folder)
        channels = self.data.train_images.shape[1]
        self._model = build_model(config.model, channels, self.data.n_classes, seed=config.seed)

    def __call__(self, record: dict[str, Any]) -> None:
        """Take in one round."""
        found = self._folder.load_checkpoint()
        if found is None:
            msg = f"round {record['round']}: there is no checkpoint to judge"
            raise RuntimeError(msg)
        self._model.load_parts({name: torch.from_numpy(value) for name, value in found[0].items()})
        right = _right(self._model, self.data, self.rows)
        self.values += self.rate * (right - self.values)
        print(
            f"round {record['round']:3d}: accuracy {record['accuracy']:.3f}, mean fitness {self.values.mean():.3f}"
        )


def _partition(data: Dataset, config: TrainConfig) -> Partition:
    return partition(data.train_labels, config.clients, n_classes=data.n_classes, seed=config.seed)


@torch.no_grad()
def _right(model: MixtureOfExperts, data: Dataset, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return 1.0 where an expert alone labels a training sample right, else 0.0; shape (samples, m)."""
    model.eval()
    parts = []
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        images = torch.from_numpy(data.normalised(data.train_images[batch]))
        answers = model(images).expert_log_probabilities.argmax(dim=2).numpy()
        parts.append(answers == data.train_labels[batch][:, None])
    return np.concatenate(parts).astype(np.float64)


def save_scores(scores: SampleScores, config: TrainConfig, path: Path) -> None:
    """Write sample scores, the client of each sample, and the settings they came from."""
    sizes = [len(part) for part in scores.parts.samples]
    np.savez_compressed(
        path,
        correct=scores.values.astype(np.float32),
        client=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        settings=np.array(json.dumps(config.to_dict() | {"data": {"name": config.data.name}})),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", choices=["digits", "fashion-mnist", "cifar10"])
    parser.add_argument("--data-dir", help="folder of the publisher's files")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FITNESS_FILE)
    options = parser.parse_args(arguments)
    config = run_config(
        options.data,
        data_dir=options.data_dir,
        clients=options.clients,
        experts=options.experts,
        rounds=options.rounds,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        scores = SampleScores(config, Path(folder))
        run_training(config, folder, callbacks=[scores])
    save_scores(scores, config, options.output)
    print(f"{options.output}: {scores.values.shape} from {len(scores.parts.samples)} clients")


if __name__ == "__main__":
    main()
