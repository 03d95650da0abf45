"""From a checkpoint to a robot: bundles, a safety filter, the controller and links to robots.

What runs beside the robot (``contract``, ``motion``, ``safety``, ``controller`` and ``links``) does
not import torch.
"""
