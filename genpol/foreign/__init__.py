"""Policies of other libraries, read from their checkpoints: tensors, numbers and text alone.

The modules of the formats share :mod:`~genpol.foreign.files`, which opens files without ever
running what is in a pickle, :mod:`~genpol.foreign.scaling`, the normalisation of observations and
actions, and :mod:`~genpol.foreign.assembling`, which makes a
:class:`~genpol.pretrained.PretrainedPolicy` of what was found.

=========== ======================================================================================
format      what is read
=========== ======================================================================================
`dppo`      ``state_*.pt`` of DPPO: DiffusionMLP, with its YAML file and ``normalization.npz``
`reinflow`  ``state_*.pt`` of ReinFlow: FlowMLP in a ReFlow, likewise
`robomimic` ``model_epoch_*.pth`` of robomimic's diffusion policy
`lerobot`   the folder of a LeRobot DiffusionPolicy: ``config.json``, ``model.safetensors``, and in
            newer versions the files of its processors
=========== ======================================================================================

All of them are of vectors; policies that see images are refused.
"""

from __future__ import annotations

from pathlib import Path

from genpol.errors import CheckpointError, ConfigError
from genpol.foreign import dppo, lerobot, robomimic
from genpol.foreign.assembling import ImportOptions
from genpol.pretrained import PretrainedPolicy
from genpol.settings import one_of

__all__ = ["FORMATS", "ImportOptions", "read"]

_READERS = {
    "dppo": dppo.read_dppo,
    "reinflow": dppo.read_reinflow,
    "robomimic": robomimic.read,
    "lerobot": lerobot.read,
}
FORMATS = tuple(_READERS)


def read(form: str, path: Path, options: ImportOptions) -> PretrainedPolicy:
    """Read a policy of another library.

    Args:
        form: One of :data:`FORMATS`.
        path: Its file, or its folder.
        options: What the file does not say.

    Raises:
        ConfigError: If there is no such format, or an option does not fit the policy.
        CheckpointError: If the file is of another kind, damaged, or holds what is not supported.
    """
    one_of("format", form, FORMATS)
    try:
        return _READERS[form](path, options)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Files of others may hold anything; what was foreseen has a message of its own.
        raise CheckpointError(
            f"{path}: is not as {form} writes it ({type(error).__name__}: {error})"
        ) from error
