"""What agents share that finetune a pretrained policy: critics of its chunks, from a replay."""

from genpol.finetuning.agent import FinetuningAgent
from genpol.finetuning.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "FinetuningAgent"]
