"""Models we wrote, small policies, recorded results."""
