"""Policies: Gaussian, flow, diffusion and latent decoders.

**The flow convention, for the whole library.** Time runs forward: ``t = 0`` is noise, ``t = 1`` is
the action. The path is ``x_t = (1 - t) eps + t a`` with ``eps ~ N(0, I)``, the regression target of
the velocity is ``a - eps``, and a sample integrates ``dx/dt = v(s, x, t)`` from 0 to 1. FQL, QC,
QGF, Fisher Decorator and OGPO's code use it. GoRL and FPO run time backwards: ``t' = 1 - t``,
``v' = -v``. diffusers' flow-matching schedulers count noise: ``sigma = 1 - t``, output ``-v``.

**The verbs.** Every policy takes raw observations ``[..., d]`` (its normaliser lives inside) and
takes its noise as an argument, so that tests, export and resume are exact:

- ``sample(observation, noise)``: an action.
- ``bc_loss(observation, action, noise, time)``: the behaviour-cloning loss and its metrics.
- ``score(observation, x, time)``: the gradient of the log-density with respect to the action.
- ``chain(observation, noise, step_noise, sigma)``, ``chain_log_prob(observation, chain, sigma)``:
  the denoising steps as a Markov chain, and the log-density of each of its transitions.

Actions are ``[..., A]``, or ``[..., H, A]`` where the policy's horizon H is above 1. Leading
dimensions broadcast: noise ``[G, B, A]`` with observations ``[B, d]`` draws G actions for each
observation and embeds every observation once.
"""
