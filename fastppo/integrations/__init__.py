"""The functions of other trainers, under their names and with their signatures, on our ops: one module for each package.

Each module's `patch()` swaps its functions into the installed package, and `unpatch()` puts the package's own back.
"""
