"""How close the tuner comes to a tuned learning rate: `python -m benchmarks.convergence`."""
