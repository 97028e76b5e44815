"""Speed, error and memory of every op against plain PyTorch, on the machine at hand: `python -m fastppo.bench`."""
