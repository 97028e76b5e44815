"""The functions of other trainers, under their names and with their signatures, on our ops: one module for each package.

Each module's `patch()` swaps its functions into the installed package, and `unpatch()` puts the package's own back. CleanRL is scripts, so that
its module has no patch; that of Transformers patches one model at a time.
"""

# Module -> the name under which pip knows what it patches.
PATCHED = {
    "trl": "trl",
    "verl": "verl",
    "openrlhf": "openrlhf",
    "liger": "liger-kernel",
    "stable_baselines3": "stable-baselines3",
    "torchrl": "torchrl",
}
