"""Batched MuJoCo on the CPU: many simulations of one model, stepped by C++ threads.

``simulation`` binds the rows of ``mujoco.batch.Batch`` as tensors, ``task`` says what a task must
define, ``env`` makes a torchrl environment of one, and each further module holds one domain of the
dm_control suite or of gymnasium, written in vectorised torch over the batch.
"""
