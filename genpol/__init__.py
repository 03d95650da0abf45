"""Reinforcement learning with generative policies for continuous control and robotics."""

__version__ = "0.1.0"
