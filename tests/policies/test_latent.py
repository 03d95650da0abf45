from __future__ import annotations

import pytest
import torch

from genpol.policies.latent import GaussianDecoder, IdentityDecoder


@pytest.mark.parametrize("shape", [(4,), (1, 4), (7, 4), (2, 7, 4)])
def test_identity_decoder_returns_the_noise_bit_for_bit(shape):
    noise = torch.randn(shape)
    assert torch.equal(IdentityDecoder().sample(torch.randn(*shape[:-1], 3), noise), noise)


def test_gaussian_decoder_starts_as_the_identity():
    decoder = GaussianDecoder(3, 2, (16,), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(50, 2)
    decoded = decoder.sample(10 * torch.randn(50, 3), noise)
    torch.testing.assert_close(decoded, noise, rtol=1e-6, atol=1e-6)


def test_reset_starts_from_the_identity_again():
    decoder = GaussianDecoder(3, 2, (16,), generator=torch.Generator().manual_seed(0))
    hidden = decoder.net.linears[0].weight.clone()
    with torch.no_grad():
        decoder.net.linears[-1].weight.fill_(1.0)
    decoder.reset(torch.Generator().manual_seed(1))
    noise = torch.randn(5, 2)
    torch.testing.assert_close(decoder.sample(torch.randn(5, 3), noise), noise)
    assert not torch.equal(decoder.net.linears[0].weight, hidden)


def test_gaussian_decoder_learns_mean_and_scale():
    generator = torch.Generator().manual_seed(0)
    decoder = GaussianDecoder(1, 1, (16,), generator=generator)
    optimizer = torch.optim.Adam(decoder.parameters(), 2e-2)
    for _ in range(200):
        observation = torch.rand(128, 1, generator=generator)
        action = 2 * observation + 0.3 * torch.randn(128, 1, generator=generator)
        loss, _ = decoder.bc_loss(observation, action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, scale = decoder(torch.tensor([[0.2], [0.8]]))
    torch.testing.assert_close(mean, torch.tensor([[0.4], [1.6]]), rtol=0, atol=0.1)
    torch.testing.assert_close(scale, torch.full((2, 1), 0.3), rtol=0, atol=0.06)


def test_identity_with_gain_scales_the_latent():
    noise = torch.randn(5, 2)
    assert torch.equal(IdentityDecoder(2.0).sample(torch.zeros(5, 1), noise), 2.0 * noise)
