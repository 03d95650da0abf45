"""Checkpoints in the layouts of other libraries, and what those libraries would do with them.

Written from the libraries' formats, without anything of genpol: names and shapes of the tensors,
networks as functions of them, samplers step by step.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.nn import functional as F

ACTIVATIONS = {"ReLU": F.relu, "Mish": F.mish, "GELU": F.gelu}


def random_weights(shapes, seed):
    """Draw weights by name; those of the last layer, which is listed last, are small."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        x = torch.randn(shape, generator=draw) / math.sqrt(fan_in)
        is_gain = len(shape) == 1 and name.endswith("weight")
        found[name] = 1 + 0.1 * x if is_gain else x
    for name in list(shapes)[-2:]:
        found[name] = 0.3 * found[name]
    return found


def embedded(w, name, time, dim):
    """Return features of times ``[B]``: sines, cosines, and a perceptron of them."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    angle = time[:, None] * frequency[None]
    x = torch.cat((torch.sin(angle), torch.cos(angle)), -1)
    x = F.mish(F.linear(x, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))
    return F.linear(x, w[f"{name}.3.weight"], w[f"{name}.3.bias"])


# --- DPPO and ReinFlow ---------------------------------------------------------------------------


def mlp_shapes(widths, time_dim, *, residual, norm):
    shapes = {}

    def linear(name, fan_in, fan_out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (fan_out, fan_in), (fan_out,)

    def layer_norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    linear("time_embedding.1", time_dim, 2 * time_dim)
    linear("time_embedding.3", 2 * time_dim, time_dim)
    if not residual:
        for i in range(len(widths) - 1):
            linear(f"mlp_mean.moduleList.{i}.linear_1", widths[i], widths[i + 1])
            if norm and i < len(widths) - 2:
                layer_norm(f"mlp_mean.moduleList.{i}.norm_1", widths[i + 1])
        return shapes
    blocks = (len(widths) - 3) // 2
    linear("mlp_mean.layers.0", widths[0], widths[1])
    for i in range(1, blocks + 1):
        for part in "12":
            linear(f"mlp_mean.layers.{i}.l{part}", widths[1], widths[1])
            if norm:
                layer_norm(f"mlp_mean.layers.{i}.norm{part}", widths[1])
    linear(f"mlp_mean.layers.{blocks + 1}", widths[1], widths[-1])
    return shapes


def mlp(w, x, time, state, time_dim, activation):
    activate = ACTIVATIONS[activation]

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x, eps):
        if f"{name}.weight" not in w:
            return x
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    x = torch.cat((x.flatten(1), embedded(w, "time_embedding", time, time_dim), state), -1)
    if "mlp_mean.layers.0.weight" in w:
        last = max(int(k.split(".")[2]) for k in w if k.startswith("mlp_mean.layers."))
        x = linear("mlp_mean.layers.0", x)
        for i in range(1, last):
            name = f"mlp_mean.layers.{i}"
            y = linear(f"{name}.l1", activate(norm(f"{name}.norm1", x, 1e-6)))
            x = x + linear(f"{name}.l2", activate(norm(f"{name}.norm2", y, 1e-6)))
        return linear(f"mlp_mean.layers.{last}", x)
    last = max(int(k.split(".")[2]) for k in w if k.startswith("mlp_mean.moduleList."))
    for i in range(last):
        name = f"mlp_mean.moduleList.{i}"
        x = activate(norm(f"{name}.norm_1", linear(f"{name}.linear_1", x), 1e-5))
    return linear(f"mlp_mean.moduleList.{last}.linear_1", x)


class DppoRun:
    """The folder of a run of DPPO, or of ReinFlow's with ``flow``."""

    history, horizon, time_dim = 2, 4, 8
    levels = 4

    def __init__(
        self,
        folder,
        *,
        flow=False,
        residual=True,
        norm=False,
        activation="ReLU",
        observation_dim=3,
        action_dim=2,
        **model,
    ):
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.folder, self.flow, self.activation = folder, flow, activation
        a, d = self.horizon * self.action_dim, self.history * self.observation_dim
        hidden = [16, 16, 16]
        widths = [a + self.time_dim + d, *hidden, a]
        shapes = mlp_shapes(widths, self.time_dim, residual=residual, norm=norm)
        self.weights = random_weights(shapes, 1)
        network = {
            "_target_": "model.flow.mlp_flow.FlowMLP"
            if flow
            else "model.diffusion.mlp_diffusion.DiffusionMLP",
            "time_dim": self.time_dim,
            "mlp_dims": hidden,
            "activation_type": activation,
            "residual_style": residual,
            "use_layernorm": norm,
            "cond_dim": "${eval:'${obs_dim} * ${cond_steps}'}",
            "horizon_steps": "${horizon_steps}",
        }
        name = "model.flow.reflow.ReFlow" if flow else "model.diffusion.diffusion.DiffusionModel"
        own = {"act_min": -1, "act_max": 1} if flow else {"predict_epsilon": True}
        own |= {"max_denoising_steps" if flow else "denoising_steps": "${denoising_steps}"}
        self.config = {
            "logdir": "${oc.env:NO_SUCH_VARIABLE}/x",
            "env": "hopper-medium-v2",
            "obs_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "cond_steps": self.history,
            "horizon_steps": self.horizon,
            "denoising_steps": self.levels,
            "model": {"_target_": name, "network": network, **own, **model},
        }
        draw = np.random.default_rng(0)
        low = draw.normal(size=self.observation_dim)
        self.statistics = {
            "obs_min": low,
            "obs_max": low + draw.uniform(0.5, 2.0, self.observation_dim),
            "action_min": np.array([-0.7, -1.0])[: self.action_dim],
            "action_max": np.array([0.5, 0.9])[: self.action_dim],
        }

    def write(self, *, averaged=True, extra=None):
        ours = {f"network.{k}": x for k, x in self.weights.items()}
        record = {"epoch": 7, "model": ours}
        if averaged:
            other = {k: x + 1.0 for k, x in ours.items()}
            record = {"epoch": 7, "model": other, "ema": ours}
        path = self.folder / "checkpoint" / "state_7.pt"
        (self.folder / ".hydra").mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        OmegaConf.save(OmegaConf.create(self.config), self.folder / ".hydra" / "config.yaml")
        np.savez(self.folder / "normalization.npz", **self.statistics)
        torch.save({**record, **(extra or {})}, path)
        return path

    def _network(self, x, time, state):
        time = torch.full((len(x),), float(time))
        return mlp(self.weights, x, time, state, self.time_dim, self.activation).view_as(x)

    def actions(self, observation, noise, step_noise=None, *, steps=0, ddim=False):
        """Return what is carried out, for raw ``[B, history, d]``, in the environment's units."""
        low, high = (torch.tensor(self.statistics[f"obs_{x}"]) for x in ("min", "max"))
        state = 2 * ((observation.double() - low) / (high - low + 1e-6) - 0.5)
        state = state.float().flatten(1)
        if self.flow:
            x = self._euler(noise, state, steps or self.levels)
        elif ddim or steps:
            x = self._ddim(noise, state, steps)
        else:
            x = self._ddpm(noise, step_noise, state)
        least, most = (torch.tensor(self.statistics[f"action_{x}"]) for x in ("min", "max"))
        return ((x.double() + 1) / 2 * (most - least) + least).float()

    def _euler(self, x, state, steps):
        for time in torch.linspace(0, 1, steps):
            x = (x + self._network(x, time, state) / steps).clamp(-1, 1)
        return x

    def _alpha_bar(self):
        cosine = np.cos((np.arange(self.levels + 1) / self.levels + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.cumprod(1 - np.clip(1 - cosine[1:] / cosine[:-1], 0, 0.999))

    def _clean(self, x, output, abar):
        clean = output
        if self.config["model"].get("predict_epsilon", True):
            clean = (x - math.sqrt(1 - abar) * output) / math.sqrt(abar)
        return clean.clamp(-1, 1)

    def _ddpm(self, x, step_noise, state):
        abar = self._alpha_bar()
        for k, t in enumerate(reversed(range(self.levels))):
            before = abar[t - 1] if t else 1.0
            beta = 1 - abar[t] / before
            clean = self._clean(x, self._network(x, t, state), abar[t])
            mean = beta * math.sqrt(before) / (1 - abar[t]) * clean
            mean = mean + (1 - before) * math.sqrt(1 - beta) / (1 - abar[t]) * x
            std = math.sqrt(beta * (1 - before) / (1 - abar[t]))
            x = mean + std * step_noise[:, k]
        return x

    def _ddim(self, x, state, steps):
        abar, ratio = self._alpha_bar(), self.levels // steps
        for i in reversed(range(steps)):
            now, before = abar[i * ratio], abar[(i - 1) * ratio] if i else 1.0
            clean = self._clean(x, self._network(x, i * ratio, state), now)
            epsilon = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
            x = math.sqrt(before) * clean + math.sqrt(1 - before) * epsilon
        return x


# --- The conditional U-Net -----------------------------------------------------------------------


def unet_shapes(names, action_dim, condition, dims, kernel, time_dim, *, scale):
    """Return shapes by name; ``names`` is ``robomimic`` or ``lerobot``."""
    blocks = ("blocks.0", "blocks.1") if names == "robomimic" else ("conv1", "conv2")
    conv = ".conv" if names == "robomimic" else ""
    shapes = {}

    def layer(name, *shape, out=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (out or shape[0],)

    def residual(name, a, b):
        for block, fan_in in zip(blocks, (a, b), strict=True):
            layer(f"{name}.{block}.block.0", b, fan_in, kernel)
            layer(f"{name}.{block}.block.1", b)
        layer(f"{name}.cond_encoder.1", (2 if scale else 1) * b, time_dim + condition)
        if a != b:
            layer(f"{name}.residual_conv", b, a, 1)

    layer("diffusion_step_encoder.1", 4 * time_dim, time_dim)
    layer("diffusion_step_encoder.3", time_dim, 4 * time_dim)
    widths = [action_dim, *dims]
    for i in range(len(dims)):
        residual(f"down_modules.{i}.0", widths[i], widths[i + 1])
        residual(f"down_modules.{i}.1", widths[i + 1], widths[i + 1])
        if i < len(dims) - 1:
            layer(f"down_modules.{i}.2{conv}", widths[i + 1], widths[i + 1], 3)
    for i in range(2):
        residual(f"mid_modules.{i}", dims[-1], dims[-1])
    for i, (a, b) in enumerate(zip(reversed(dims[1:]), reversed(dims[:-1]), strict=True)):
        residual(f"up_modules.{i}.0", 2 * a, b)
        residual(f"up_modules.{i}.1", b, b)
        layer(f"up_modules.{i}.2{conv}", b, b, 4)
    layer("final_conv.0.block.0", dims[0], dims[0], kernel)
    layer("final_conv.0.block.1", dims[0])
    layer("final_conv.1", action_dim, dims[0], 1)
    return shapes


def unet(names, w, x, time, condition, groups):
    """Return the output ``[B, H, A]`` at times ``[B]``."""
    blocks = ("blocks.0", "blocks.1") if names == "robomimic" else ("conv1", "conv2")
    conv = ".conv" if names == "robomimic" else ""
    time_dim = w["diffusion_step_encoder.3.weight"].shape[0]
    levels = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("down_modules"))

    def weights(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def block(name, x, groups):
        weight, bias = weights(f"{name}.block.0")
        x = F.conv1d(x, weight, bias, padding=weight.shape[-1] // 2)
        return F.mish(F.group_norm(x, groups, *weights(f"{name}.block.1")))

    def residual(name, x):
        out = block(f"{name}.{blocks[0]}", x, groups)
        film = F.linear(F.mish(seen), *weights(f"{name}.cond_encoder.1"))[..., None]
        if film.shape[1] == 2 * out.shape[1]:
            out = film[:, : out.shape[1]] * out + film[:, out.shape[1] :]
        else:
            out = out + film
        out = block(f"{name}.{blocks[1]}", out, groups)
        if f"{name}.residual_conv.weight" in w:
            x = F.conv1d(x, *weights(f"{name}.residual_conv"))
        return out + x

    seen = torch.cat((embedded(w, "diffusion_step_encoder", time, time_dim), condition), -1)
    x, skips = x.transpose(1, 2), []
    for i in range(levels):
        x = residual(f"down_modules.{i}.1", residual(f"down_modules.{i}.0", x))
        skips.append(x)
        if i < levels - 1:
            x = F.conv1d(x, *weights(f"down_modules.{i}.2{conv}"), stride=2, padding=1)
    x = residual("mid_modules.1", residual("mid_modules.0", x))
    for i in range(levels - 1):
        x = residual(f"up_modules.{i}.0", torch.cat((x, skips.pop()), 1))
        x = residual(f"up_modules.{i}.1", x)
        x = F.conv_transpose1d(x, *weights(f"up_modules.{i}.2{conv}"), stride=2, padding=1)
    x = block("final_conv.0", x, 8)
    return F.conv1d(x, *weights("final_conv.1")).transpose(1, 2)


def sampled(network, scheduler, steps, noise, seed):
    """Sample with a scheduler of diffusers, which draws the noise of its steps itself."""
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(seed), noise
    for t in scheduler.timesteps:
        output = network(x, torch.full((len(x),), float(t)))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def scheduler_noise(steps, shape, seed):
    """Return what :func:`sampled` draws, ``[B, K, H, A]``; the last step has none."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator) for _ in range(steps - 1)]
    return torch.stack([*draws, torch.zeros(shape)], dim=1)


class RobomimicFile:
    """A checkpoint of robomimic's diffusion policy."""

    # As in all_shapes: in the order of the alphabet.
    shapes: ClassVar = {"object": [2], "robot0_eef_pos": [3], "seen_by_nobody": [5]}
    names: ClassVar = ["robot0_eef_pos", "object"]
    observation_dim, action_dim, history, horizon, action_steps = 5, 2, 2, 8, 3
    levels = 4
    dims, kernel, time_dim = (8, 16), 5, 8

    def __init__(self, folder, *, sampler="ddpm", steps=4, normalized=True, prediction="epsilon"):
        self.folder, self.sampler, self.steps, self.normalized = folder, sampler, steps, normalized
        shapes = unet_shapes(
            "robomimic",
            self.action_dim,
            self.history * self.observation_dim,
            self.dims,
            self.kernel,
            self.time_dim,
            scale=True,
        )
        self.weights = random_weights(shapes, 2)
        noise = {
            "num_train_timesteps": self.levels,
            "num_inference_timesteps": steps,
            "beta_schedule": "squaredcos_cap_v2",
            "clip_sample": True,
            "prediction_type": prediction,
        }
        self.config = {
            "algo_name": "diffusion_policy",
            "algo": {
                "horizon": {
                    "observation_horizon": self.history,
                    "action_horizon": self.action_steps,
                    "prediction_horizon": self.horizon,
                },
                "unet": {"enabled": True, "n_groups": 8, "down_dims": [256, 512, 1024]},
                "ddpm": {"enabled": sampler == "ddpm", **noise},
                "ddim": {
                    "enabled": sampler == "ddim",
                    **noise,
                    "set_alpha_to_one": True,
                    "steps_offset": 0,
                },
            },
            "observation": {
                "modalities": {
                    "obs": {"low_dim": self.names, "rgb": [], "depth": [], "scan": []},
                    "goal": {"low_dim": [], "rgb": []},
                }
            },
            "train": {"hdf5_normalize_obs": normalized, "action_keys": ["actions"]},
        }
        draw = torch.Generator().manual_seed(3)
        self.statistics = {
            name: {
                "mean": torch.randn(1, *shape, generator=draw).tolist(),
                "std": (0.3 + torch.rand(1, *shape, generator=draw)).tolist(),
            }
            for name, shape in self.shapes.items()
        }
        self.action_statistics = {"actions": {"offset": [[0.1, -0.2]], "scale": [[0.6, 0.8]]}}

    def write(self, **extra):
        ours = {f"policy.noise_pred_net.{k}": x for k, x in self.weights.items()}
        record = {
            "model": {"nets": {k: x + 1 for k, x in ours.items()}, "ema": ours},
            "config": json.dumps(self.config),
            "algo_name": self.config["algo_name"],
            "env_metadata": {"env_name": "Lift", "env_kwargs": {"control_freq": 20}},
            "shape_metadata": {"ac_dim": self.action_dim, "all_shapes": self.shapes},
            "variable_state": {"epoch": 3},
        }
        if self.normalized:
            record["obs_normalization_stats"] = self.statistics
            record["action_normalization_stats"] = self.action_statistics
        path = self.folder / "model_epoch_3.pth"
        torch.save(record | extra, path)
        return path

    def actions(self, observation, noise, seed=0):
        """Return what is carried out for raw ``[B, history, d]`` in the order of all_shapes."""
        if self.normalized:
            used = [x for x in self.shapes if x in self.names]
            mean, std = (
                torch.cat([torch.tensor(self.statistics[x][k]).flatten() for x in used])
                for k in ("mean", "std")
            )
            observation = (observation - mean) / std
        condition = observation.flatten(1)
        own = self.config["algo"][self.sampler]
        options = {
            "num_train_timesteps": self.levels,
            "beta_schedule": "squaredcos_cap_v2",
            "clip_sample": own["clip_sample"],
            "prediction_type": own["prediction_type"],
        }
        scheduler = (DDPMScheduler if self.sampler == "ddpm" else DDIMScheduler)(**options)

        def network(x, time):
            return unet("robomimic", self.weights, x, time, condition, 8)

        x = sampled(network, scheduler, self.steps, noise, seed)
        x = x[:, self.history - 1 :][:, : self.action_steps]
        if not self.normalized:
            return x
        offset, scale = (
            torch.tensor(self.action_statistics["actions"][k]) for k in ("offset", "scale")
        )
        return x * scale + offset


class LerobotFolder:
    """What a DiffusionPolicy of LeRobot saves; ``buffers``: as before version 0.4."""

    widths: ClassVar = {"observation.state": 2, "observation.environment_state": 3}
    observation_dim, action_dim = 5, 2

    def __init__(self, folder, *, buffers=False, **config):
        self.folder, self.buffers = folder, buffers
        self.config = {
            "type": "diffusion",
            "n_obs_steps": 2,
            "horizon": 8,
            "n_action_steps": 4,
            "input_features": {
                # The other way round: the state comes first for the network all the same.
                "observation.environment_state": {"type": "ENV", "shape": [3]},
                "observation.state": {"type": "STATE", "shape": [2]},
            },
            "output_features": {"action": {"type": "ACTION", "shape": [2]}},
            "normalization_mapping": {"STATE": "MIN_MAX", "ENV": "MEAN_STD", "ACTION": "MIN_MAX"},
            "down_dims": [8, 16],
            "kernel_size": 3,
            "n_groups": 4,
            "diffusion_step_embed_dim": 8,
            "use_film_scale_modulation": True,
            "noise_scheduler_type": "DDPM",
            "num_train_timesteps": 4,
            "num_inference_steps": None,
            "beta_schedule": "squaredcos_cap_v2",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "epsilon",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            **config,
        }
        c = self.config
        self.history, self.horizon = c["n_obs_steps"], c["horizon"]
        self.shapes = unet_shapes(
            "lerobot",
            self.action_dim,
            c["n_obs_steps"] * self.observation_dim,
            c["down_dims"],
            c["kernel_size"],
            c["diffusion_step_embed_dim"],
            scale=c["use_film_scale_modulation"],
        )
        self.weights = random_weights(self.shapes, 4)
        draw = torch.Generator().manual_seed(5)
        self.stats = {}
        for name, width in self.widths.items():
            low = torch.randn(width, generator=draw)
            self.stats[f"{name}.min"] = low
            self.stats[f"{name}.max"] = low + 1 + torch.rand(width, generator=draw)
            self.stats[f"{name}.mean"] = torch.randn(width, generator=draw)
            self.stats[f"{name}.std"] = 0.5 + torch.rand(width, generator=draw)
        self.stats |= {"action.min": torch.tensor([10.0, 40.0])}
        self.stats |= {"action.max": torch.tensor([400.0, 500.0])}

    def write(self):
        folder = self.folder / "pretrained_model"
        folder.mkdir(parents=True)
        tensors = {f"diffusion.unet.{k}": x for k, x in self.weights.items()}
        if self.buffers:
            for name, x in self.stats.items():
                feature, _, statistic = name.rpartition(".")
                buffer = f"buffer_{feature.replace('.', '_')}.{statistic}"
                if feature == "action":
                    tensors[f"normalize_targets.{buffer}"] = x.clone()
                    tensors[f"unnormalize_outputs.{buffer}"] = x
                else:
                    tensors[f"normalize_inputs.{buffer}"] = x
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        if not self.buffers:
            self._write_processors(folder)
        return self.folder

    def _write_processors(self, folder):
        steps = {
            "policy_preprocessor": [
                {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
                {"registry_name": "to_batch_processor", "config": {}},
                {"registry_name": "device_processor", "config": {"device": "cpu"}},
                {"registry_name": "normalizer_processor"},
            ],
            "policy_postprocessor": [
                {"registry_name": "unnormalizer_processor"},
                {"registry_name": "device_processor", "config": {"device": "cpu"}},
            ],
        }
        for name, own in steps.items():
            for index, step in enumerate(own):
                if "normalizer" not in step["registry_name"]:
                    continue
                step["config"] = {"eps": 1e-8, "norm_map": self.config["normalization_mapping"]}
                step["state_file"] = f"{name}_step_{index}_{step['registry_name']}.safetensors"
                save_file(self.stats, folder / step["state_file"])
            (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": own}))

    def _scaled(self, name, kind, x):
        mode = self.config["normalization_mapping"].get(kind, "IDENTITY")
        margin = 1e-8 if self.buffers else 0.0
        if mode == "MEAN_STD":
            return (x - self.stats[f"{name}.mean"]) / (self.stats[f"{name}.std"] + 1e-8)
        if mode == "MIN_MAX":
            low, high = self.stats[f"{name}.min"], self.stats[f"{name}.max"]
            return 2 * (x - low) / (high - low + margin) - 1
        return x

    def actions(self, observation, noise, seed=0):
        """Return what is carried out for raw ``[B, history, d]``, the state first, in its units."""
        c = self.config
        state, environment = observation.split([2, 3], dim=-1)
        state = self._scaled("observation.state", "STATE", state)
        environment = self._scaled("observation.environment_state", "ENV", environment)
        condition = torch.cat((state, environment), -1).flatten(1)
        kind = DDPMScheduler if c["noise_scheduler_type"] == "DDPM" else DDIMScheduler
        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        keys += ("clip_sample", "clip_sample_range", "prediction_type")
        scheduler = kind(**{k: c[k] for k in keys})

        def network(x, time):
            return unet("lerobot", self.weights, x, time, condition, c["n_groups"])

        steps = c["num_inference_steps"] or c["num_train_timesteps"]
        x = sampled(network, scheduler, steps, noise, seed)
        x = x[:, c["n_obs_steps"] - 1 :][:, : c["n_action_steps"]]
        if c["normalization_mapping"]["ACTION"] == "IDENTITY":
            return x
        low, high = self.stats["action.min"], self.stats["action.max"]
        return (x + 1) / 2 * (high - low) + low


# --- genpol's side -------------------------------------------------------------------------------


def make_agent(policy, name="bc", **settings):
    """Return an agent that begins from the policy, as the command line makes it."""
    from genpol import agents
    from genpol.agent import Specs
    from genpol.offline.settings import DiffusionSettings, NetworkSettings, UnetSettings

    kinds = {"actor": NetworkSettings, "unet": UnetSettings, "diffusion": DiffusionSettings}
    model = {k: kinds[k](**x) if k in kinds else x for k, x in policy.model.items()}
    settings = agents.settings_class(name)(**(model | settings))
    specs = Specs(observation_dim=policy.observation_dim, action_dim=policy.action_dim, num_envs=2)
    agent = agents.make(name, settings, specs, seed=0)
    agent.load_policy(policy)
    return agent


def kept(policy, folder):
    """Return the policy as it comes back from a policy folder."""
    from genpol.training import policy_folder

    policy_folder.write(folder, policy)
    return policy_folder.read(folder)


def carried_out(policy, observation, noise, step_noise=None):
    """Return the actions that are carried out at raw ``[B, history, d]``, from given noise.

    The noise is that of the other library's chunks, which may begin in the past.
    """
    agent = make_agent(policy)
    past = agent.settings.past_steps
    draws = [noise] if step_noise is None else [noise, *step_noise.unbind(1)]
    own = torch.cat([x.roll(-past, 1) for x in draws], dim=1)
    agent.plan_noise = lambda rows, generator: own
    chunk = agent.plan_actions(observation.flatten(1), torch.Generator())
    return chunk[:, : policy.action_steps]


@pytest.fixture
def layouts(tmp_path: Path):
    """Return writers of checkpoints, by format, and what plays them back."""

    class Layouts:
        dppo = staticmethod(lambda **options: DppoRun(tmp_path / "run", **options))
        reinflow = staticmethod(lambda **options: DppoRun(tmp_path / "run", flow=True, **options))
        robomimic = staticmethod(lambda **options: RobomimicFile(tmp_path, **options))
        lerobot = staticmethod(lambda **options: LerobotFolder(tmp_path / "lerobot", **options))
        agent = staticmethod(make_agent)
        carried_out = staticmethod(carried_out)
        scheduler_noise = staticmethod(scheduler_noise)

        @staticmethod
        def kept(policy):
            return kept(policy, tmp_path / "policy")

        @staticmethod
        def draws(run, rows=3):
            """Return observations ``[B, history, d]`` and noise ``[B, H, A]``."""
            draw = torch.Generator().manual_seed(0)
            noise = torch.randn(rows, run.horizon, run.action_dim, generator=draw)
            seen = torch.randn(rows, run.history, run.observation_dim, generator=draw)
            # The first step of a cosine schedule divides by 0.01: where noise and network nearly
            # cancel, single precision would be all that is compared.
            return seen, noise + noise.sign()

    return Layouts
