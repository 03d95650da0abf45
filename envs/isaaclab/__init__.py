"""Tasks of Isaac Lab, without Isaac Sim: MuJoCo Warp under Newton, on the CPU or on CUDA.

Any task that Isaac Lab registers, and three of our own that need no download: their robots are the
USD files in ``assets/isaaclab``. Isaac Lab 3 needs Python 3.12 and pins PyTorch; ``make isaaclab``
gives it an environment of its own. Importing this package imports nothing of it.
"""
